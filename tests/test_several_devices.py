"""Tasks of several devices: each attempt gives them to who is expected to be done first.

With the real cores under virtual time, and with processes at last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from architectures import squeezenet1_1
from cores import Cluster, conv_net, image, kind
from oracle import assert_exact
from shared import bands, graph, whole

import meshinfer as mi
from meshinfer import limits
from meshinfer.programs import make_programs
from meshinfer.protocol import messages as m

SPEEDS = {"pi-1": 1.0, "pi-2": 1.0, "pi-3": 0.5, "pi-4": 0.25}


def uneven() -> Cluster:
    """Four devices, of which one is half and one a quarter as fast, and known to be."""
    cluster = Cluster(())
    for name, speed in SPEEDS.items():
        cluster.join(name, m.Facts(flops_per_s=1e9 * speed, host=name))
        cluster.slowness[name] = 1.0 / speed
    cluster.settle(lambda: len(cluster.core.members.devices) == 5)
    return cluster


def shares(replies: Sequence[m.Reply]) -> Counter[str]:
    return Counter(t.device for reply in replies for t in reply.tasks)


def test_a_task_of_several_devices_is_installed_on_each_and_its_senders_know_them_all() -> None:
    g = graph()
    programs = make_programs(g, bands(g, ("a", "b"), 3)).by_device
    assert programs["a"] == programs["b"]
    assert all(p.devices == ("a", "b") for p in programs["a"])
    sends = [s for p in (*programs["head"], *programs["a"]) for s in p.sends]
    to_tasks = [s for s in sends if s.device != "head"]
    assert to_tasks and all((s.device, s.others) == ("a", ("b",)) for s in to_tasks)
    assert all(not s.others for s in sends if s.device == "head")


def test_whole_requests_go_to_free_devices_in_proportion_to_their_speed() -> None:
    cluster = uneven()
    plan = whole(graph(), tuple(SPEEDS), window=8)
    cluster.deployed(plan=str(plan))
    asked = [cluster.submit(image(i)) for i in range(44)]
    replies = [cluster.check(request, image(i)) for i, request in enumerate(asked)]
    assert all(reply.attempts == 1 and len(reply.tasks) == 1 for reply in replies)
    found, total = shares(replies), sum(SPEEDS.values())
    for name, speed in SPEEDS.items():
        assert found[name] == pytest.approx(44 * speed / total, abs=2.5), found
    cluster.check_idle()


def test_a_window_of_the_plan_lets_that_many_requests_run_and_no_more() -> None:
    cluster = uneven()
    cluster.deployed(plan=str(whole(graph(), tuple(SPEEDS), window=6)))
    most = 0
    asked = [cluster.submit(image(i)) for i in range(12)]
    for i, request in enumerate(asked):
        while request not in cluster.nodes["ann"].resolved:
            cluster.step()
            running = sum(r.deployment is not None for r in cluster.core.requests.values())
            most = max(most, running)
        cluster.check(request, image(i))
    assert most == 6 > limits.RUNNING_REQUESTS


def test_more_tiles_than_devices_are_shared_out_and_exact() -> None:
    cluster = uneven()
    cluster.deployed(plan=str(bands(graph(), tuple(SPEEDS), count=6)))
    replies = []
    for i in range(6):
        replies.append(cluster.check(cluster.submit(image(i)), image(i)))
    places = {t.place for t in replies[0].tasks}
    assert len(places) > 10 and all({t.place for t in r.tasks} == places for r in replies)
    found = shares(replies)
    assert set(found) == set(SPEEDS)
    assert min(found["pi-1"], found["pi-2"]) > found["pi-3"] > found["pi-4"], found
    cluster.check_idle()


def test_streams_of_two_models_do_not_starve_each_other() -> None:
    cluster = uneven()
    cluster.deployed("stream", plan=str(whole(graph(), tuple(SPEEDS), window=8)))
    cluster.deployed("other", conv_net(seed=1))
    stream = [cluster.submit(image(i), "stream") for i in range(60)]
    other = cluster.submit(model="other")
    cluster.check(other, model=conv_net(seed=1))
    resolved = cluster.nodes["ann"].resolved
    assert sum(request in resolved for request in stream) < 50
    for i, request in enumerate(stream):
        cluster.check(request, image(i))


def test_an_answer_that_comes_from_two_devices_is_merged_once() -> None:
    """1. the head tells two devices to take the one task; 2. both answer; 3. so one outcome."""
    cluster = Cluster()
    cluster.deployed(plan=str(whole(graph(), ("pi-1", "pi-2"), window=2)))
    begun: list[str] = []
    cluster.kernel_fault = lambda node, job: begun.append(node.name)
    copies: list[m.AnyMessage] = []
    cluster.when(lambda s, r, x: isinstance(x, m.Start) and (copies.append(x) or True), list)
    request = cluster.submit()
    cluster.settle(lambda: bool(copies))
    (start,) = copies
    assert isinstance(start, m.Start) and len(start.assigned) == 1
    both = m.Start(
        request=start.request,
        attempt=start.attempt,
        deployment=start.deployment,
        client=start.client,
        assigned=((0, 0, 0), (0, 0, 1)),
    )
    for name in ("head", "pi-1", "pi-2"):
        cluster.inject(cluster.nodes[name], "coordinator", both)
    cluster.check(request)
    cluster.pass_time(0.5)
    assert sorted(begun) == ["pi-1", "pi-2"]
    release = m.Release(request=start.request, attempt=start.attempt)
    cluster.inject(cluster.nodes["pi-2"], "coordinator", release)  # which knows of pi-1 alone
    cluster.check_idle()


def test_an_assignment_that_names_no_device_sends_nothing_and_breaks_nothing() -> None:
    cluster = Cluster()
    cluster.deployed(plan=str(whole(graph(), ("pi-1", "pi-2"), window=2)))
    made = next(iter(cluster.core.catalogue.deployments.values()))
    head = cluster.nodes["head"]
    request = cluster.submit(deadline_s=1.0)
    cluster.drop(kind(m.Start))
    wild = m.Start(
        request=request, attempt=99, deployment=made.number, client="ann#1", assigned=((0, 0, 7),)
    )
    cluster.settle(lambda: bool(head.core._computing._requests))  # type: ignore[union-attr]
    cluster.inject(head, "coordinator", wild)
    assert cluster.failure(request).error == "DeadlineExceeded"
    cluster.check(cluster.submit())


# --- processes ------------------------------------------------------------------------------------


def test_a_stream_keeps_uneven_workers_busy_each_as_it_can() -> None:
    rng = np.random.default_rng(0)
    xs = [{"image": rng.standard_normal((1, 3, 160, 160)).astype(np.float32)} for _ in range(3)]
    model = squeezenet1_1(160)
    names = [f"worker-{i}" for i in range(4)]
    speeds = [
        0.1,
        0.1,
        0.05,
        0.025,
    ]  # a quarter of a core together: they do not wait for each other
    with mi.LocalCluster(4, speeds=speeds) as cluster, cluster.client() as client:
        client.deploy("net", model, plan=whole(mi.load(model), names, window=8))
        results = list(client.map("net", (xs[i % 3] for i in range(66)), max_in_flight=8))
    for i, result in enumerate(results[:6]):
        assert_exact(model, xs[i % 3], result.outputs)
    found = Counter(name for r in results for name in r.timing.compute_s)
    assert sum(found.values()) == 66 and set(found) == set(names), found
    assert (found["worker-0"] + found["worker-1"]) / 2 > found["worker-2"] > found["worker-3"], (
        found
    )
