"""Late tasks get a second copy, within bounds; who loses a device goes on where others take over.

Virtual time and real cores; a slow device still beats, as one with a long kernel does.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from architectures import squeezenet1_1
from cores import COMPUTE_S, Cluster, image, kind
from oracle import assert_exact
from shared import bands, graph, whole

import meshinfer as mi
from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e

NAMES = ("pi-1", "pi-2", "pi-3", "pi-4")


def computing(cluster: Cluster) -> Counter[str]:
    """Counts the tasks that each device begins from now on."""
    begun: Counter[str] = Counter()

    def note(node, job: e.Compute) -> None:  # type: ignore[no-untyped-def]
        begun[node.name] += 1

    cluster.kernel_fault = note
    return begun


def stream(cluster: Cluster, count: int, *, apart_s: float = 0.0) -> list[m.Reply]:
    """Requests without waiting for each other; all are answered right."""
    asked = []
    for i in range(count):
        asked.append(cluster.submit(image(i % 5)))
        cluster.pass_time(apart_s)
    return [cluster.check(request, image(i % 5)) for i, request in enumerate(asked)]


def warm(window: int = 8) -> Cluster:
    """Whole requests on four devices, after so many that it is known what they take."""
    cluster = Cluster(NAMES)
    cluster.deployed(plan=str(whole(graph(), NAMES, window)))
    stream(cluster, 60)
    return cluster


def test_a_task_on_a_device_that_hangs_is_answered_by_a_second_copy() -> None:
    cluster = warm()
    begun = computing(cluster)
    cluster.slowness["pi-2"] = 1000.0
    replies = stream(cluster, 40, apart_s=0.005)
    assert all(reply.attempts == 1 for reply in replies)
    assert max(reply.total_s for reply in replies) < 0.5 < 1000 * COMPUTE_S
    assert cluster.sent["Assign"] >= 1 and begun["pi-2"] <= 4, "a suspect gets no new work"
    assert sum(begun.values()) <= 44
    cluster.slowness["pi-2"] = 1.0
    cluster.pass_time(6.0)
    begun.clear()
    stream(cluster, 40)
    assert begun["pi-2"] >= 7, "it is well again"
    cluster.check_idle()


def test_nothing_is_copied_before_it_is_known_what_a_task_takes() -> None:
    cluster = Cluster(NAMES)
    cluster.deployed(plan=str(whole(graph(), NAMES, window=8)))
    cluster.slowness["pi-1"] = 100.0
    stream(cluster, limits.PACE_SAMPLES - 1)
    assert cluster.sent["Assign"] == 0


@pytest.mark.parametrize(("share", "least", "most"), [(0.1, 4, 26), (0.01, 1, 3)])
def test_only_a_share_of_the_tasks_is_copied_however_many_are_late(
    share: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "COPIES_SHARE", share)
    cluster, rng = warm(), random.Random(7)
    begun = computing(cluster)
    asked = []
    for i in range(200):
        cluster.slowness = {name: 100.0 if rng.random() < 0.04 else 1.0 for name in NAMES}
        asked.append(cluster.submit(image(i % 5)))
        cluster.pass_time(0.02)
    for i, request in enumerate(asked):
        assert cluster.check(request, image(i % 5)).attempts == 1
    assert least <= sum(begun.values()) - 200 <= most
    cluster.check_idle()


def test_when_all_devices_are_slow_copies_are_off() -> None:
    cluster = warm()
    begun = computing(cluster)
    cluster.slowness = dict.fromkeys(NAMES, 100.0)
    replies = stream(cluster, 24)
    assert all(reply.attempts == 1 for reply in replies)
    assert sum(begun.values()) - 24 <= 2
    cluster.check_idle()


@pytest.mark.parametrize("silent", [False, True], ids=["reset", "silent"])
def test_a_device_that_dies_amid_whole_requests_costs_no_second_attempt(silent: bool) -> None:
    cluster = warm()
    asked = [cluster.submit(image(i % 5)) for i in range(30)]
    cluster.pass_time(3 * COMPUTE_S)
    cluster.kill("pi-3", silent=silent)
    replies = [cluster.check(request, image(i % 5)) for i, request in enumerate(asked)]
    assert all(reply.attempts == 1 for reply in replies)
    cluster.pass_time(limits.DEAD_AFTER_S + 1.0)
    again = stream(cluster, 10)
    assert all("pi-3" not in {t.device for t in reply.tasks} for reply in again)
    cluster.check_idle()


MOMENTS = {
    "before it has its input": kind(m.Deliver, to="pi-2"),
    "as it hands on a halo": kind(m.Deliver, by="pi-2"),
    "as it tells of a task": kind(m.TasksDone, by="pi-2"),
    "as it hands over the answer": kind(m.Deliver, by="pi-2", to="head"),
    "as another computes": kind(m.TasksDone, by="pi-1"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_device_that_dies_amid_bands_costs_no_second_attempt(moment: str) -> None:
    """What it had sent may be lost with it, so whatever it had taken is done again elsewhere."""
    cluster = Cluster(NAMES)
    cluster.deployed(plan=str(bands(graph(), NAMES, count=6)))
    stream(cluster, 4)
    cluster.when(MOMENTS[moment], lambda: lose(cluster, "pi-2"))
    replies = stream(cluster, 6)
    assert not cluster.nodes["pi-2"].alive
    assert [reply.attempts for reply in replies] == [1] * 6
    cluster.check_idle()


def lose(cluster: Cluster, name: str) -> None:
    """It dies, and so does what it has sent and nobody has received."""
    node = cluster.nodes[name]
    cluster.kill(name)
    cluster._events = [
        entry
        for entry in cluster._events
        if not (isinstance(entry[3], e.Arrived) and entry[3].peer == node.id)
    ]


def test_two_devices_that_die_one_after_the_other_cost_no_second_attempt() -> None:
    cluster = Cluster(NAMES)
    cluster.deployed(plan=str(bands(graph(), NAMES, count=6)))
    stream(cluster, 4)
    cluster.when(kind(m.Deliver, by="pi-2"), lambda: lose(cluster, "pi-2"))
    cluster.when(kind(m.Assign, to="pi-4"), lambda: lose(cluster, "pi-4"))
    replies = stream(cluster, 3)
    assert [n for n in NAMES if not cluster.nodes[n].alive] == ["pi-2", "pi-4"]
    assert [reply.attempts for reply in replies] == [1] * 3
    cluster.check_idle()


def test_what_was_not_kept_costs_an_attempt_and_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEPT_BYTES", 0)
    cluster = Cluster(NAMES)
    cluster.deployed(plan=str(bands(graph(), NAMES, count=6)))
    stream(cluster, 2)
    cluster.when(kind(m.TasksDone, by="pi-2"), lambda: lose(cluster, "pi-2"))
    replies = stream(cluster, 3)
    assert cluster.sent["NotKept"] >= 1 and max(reply.attempts for reply in replies) == 2
    cluster.check_idle()


def test_the_last_device_of_a_task_takes_the_deployment_with_it() -> None:
    cluster = Cluster(("pi-1", "pi-2"))
    cluster.deployed(plan=str(whole(graph(), ("pi-1", "pi-2"), window=4)))
    asked = [cluster.submit(image(i)) for i in range(6)]
    cluster.pass_time(COMPUTE_S)
    cluster.kill("pi-1")
    cluster.kill("pi-2")
    cluster.pass_time(0.5)
    cluster.join("pi-5")
    for i, request in enumerate(asked):
        cluster.check(request, image(i))
    cluster.check_idle()


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_a_stream_over_free_workers_survives_a_fault_without_a_second_attempt(fault: str) -> None:
    model = squeezenet1_1(96)
    x = {"image": np.random.default_rng(0).standard_normal((1, 3, 96, 96)).astype(np.float32)}
    with mi.LocalCluster(4, speeds=[0.2] * 4) as cluster, cluster.client() as client:
        plan = whole(mi.load(model), cluster.names(), window=8)
        client.deploy("net", model, plan=plan)
        results = []
        for i, result in enumerate(client.map("net", [x] * 80, max_in_flight=8)):
            results.append(result)
            if i == 30:
                getattr(cluster, fault)(1)
    assert_exact(model, x, results[0].outputs)
    for result in results:
        assert np.array_equal(result.outputs["logits"], results[0].outputs["logits"])
    assert [result.attempts for result in results] == [1] * 80
