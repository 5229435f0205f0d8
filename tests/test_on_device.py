"""A client on the host of a plan's one device computes its requests itself, while it may."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping

import numpy as np
import pytest
from cores import Cluster, Node, conv_net, image, kind
from oracle import assert_exact, reference

from cluster.local import LocalCluster
from meshinfer.errors import ClusterUnavailable, DeadlineExceeded, InvalidInput
from meshinfer.importers import load
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e

BESIDE = "pi-1 h"
"""Where pi-1 of the fake cluster is."""


def on_one(device: str, model: bytes | None = None) -> str:
    """A plan of one task."""
    graph = load(conv_net() if model is None else model)
    outputs = "\n".join(f"    {name} {graph.whole(name)}" for name in graph.outputs)
    head = f"plan graph={graph.digest} source=head sink=head window=1"
    return f"{head}\nstage 0:{len(graph.ops)}\n  task {device}\n{outputs}\n"


def make(where: str = BESIDE, **facts: int) -> tuple[Cluster, Node]:
    cluster = Cluster(workers=(), clients=())
    for name in ("pi-1", "pi-2"):
        cluster.join(name, m.Facts(flops_per_s=1e9, host=name, engine="ort", **facts))
    client = cluster.connect("ann", where=where)
    cluster.settle(lambda: client.id in cluster.core.members.clients)
    return cluster, client


def ask(cluster: Cluster, seed: int = 0) -> m.Reply:
    reply = cluster.check(cluster.submit(image(seed)), image(seed))
    cluster.pass_time(0.5)
    return reply


def test_a_client_beside_the_one_device_is_granted_its_task_and_computes_the_same() -> None:
    cluster, client = make()
    cluster.deployed(plan=on_one("pi-1"))
    assert not client.granted, "nobody has asked for anything yet"
    ask(cluster)
    assert [t.grant.engine for t in client.granted.values()] == ["ort"]
    before = dict(cluster.sent)
    assert_exact(conv_net(), image(7), client.run_here(image(7)))
    assert cluster.sent == before, "a message was sent for it"


@pytest.mark.parametrize(
    ("where", "device", "memory"),
    [("elsewhere h", "pi-1", 0), (BESIDE, "pi-2", 0), (BESIDE, "pi-1", 9_000)],
    ids=["client elsewhere", "device elsewhere", "no room for it twice"],
)
def test_nothing_is_granted_where_it_does_not_belong(where: str, device: str, memory: int) -> None:
    cluster, client = make(where, **({"memory_bytes": memory} if memory else {}))
    cluster.deployed(plan=on_one(device))
    ask(cluster)
    assert not client.granted and not cluster.sent["Grant"]


def test_a_plan_of_several_tasks_is_not_granted() -> None:
    cluster, client = make()
    cluster.deployed()
    ask(cluster)
    assert not client.granted and not cluster.sent["Grant"]


def test_a_new_version_takes_back_what_was_granted_for_the_old_one() -> None:
    cluster, client = make()
    cluster.deployed(plan=on_one("pi-1"))
    ask(cluster)
    other = conv_net(seed=1)
    assert cluster.deployed("net", other, plan=on_one("pi-1", other)).version == 2
    cluster.pass_time(0.01)
    assert not client.granted
    reply = cluster.check(cluster.submit(image(3)), image(3), other)
    cluster.pass_time(0.5)
    assert reply.version == 2
    assert_exact(other, image(4), client.run_here(image(4)))
    old = cluster.submit(image(5), version=1)  # still to be had, but from the cluster
    assert cluster.check(old, image(5), conv_net()).version == 1
    cluster.pass_time(0.5)
    assert [t.grant.version for t in client.granted.values()] == [2]
    cluster.check_idle()


@pytest.mark.parametrize("how", ["device", "coordinator", "connection"])
def test_what_was_granted_ends_with_what_granted_it(how: str) -> None:
    cluster, client = make()
    cluster.deployed(plan=on_one("pi-1"))
    ask(cluster)
    assert client.granted
    if how == "device":
        cluster.kill("pi-1")
    elif how == "coordinator":
        cluster.restart_coordinator()
    else:
        cluster.cut("ann")
    cluster.pass_time(0.05)
    assert not client.granted


def test_a_lease_ends_two_seconds_after_the_coordinator_was_last_heard() -> None:
    cluster, client = make()
    cluster.deployed(plan=on_one("pi-1"))
    ask(cluster)
    cluster.pass_time(3.0)
    assert client.lease > cluster.now + 1.0
    cluster.kill(cluster.coordinator.name, silent=True)
    last = client.lease
    cluster.settle(lambda: cluster.now > last + 1.0)
    assert client.lease == last


def test_what_cannot_be_fetched_is_left_to_the_cluster() -> None:
    cluster, client = make()
    cluster.deployed(plan=on_one("pi-1"))
    for _ in range(200):
        cluster.drop(kind(m.Chunk, to="ann"))
    ask(cluster)
    cluster.pass_time(30.0)
    assert not client.granted
    ask(cluster, 1)
    cluster.check_idle()


def test_what_a_client_computed_is_counted_for_the_device() -> None:
    cluster, client = make()
    cluster.deployed(plan=on_one("pi-1"))
    ask(cluster)
    (number,) = client.granted
    done = cluster.core.members.devices["pi-1"].tasks_done
    cluster.post(client, e.RanHere(number, 5, 0.005), 0.0)
    cluster.post(client, e.RanHere(number + 99, 5, 0.005), 0.0)  # taken back meanwhile
    cluster.pass_time(0.1)
    assert cluster.core.members.devices["pi-1"].tasks_done == done + 5


# --- Real processes -------------------------------------------------------------------------------


def _until_granted(client: object, inputs: Mapping[str, np.ndarray]) -> None:
    """Ask until the client does it itself: the coordinator's count of requests stands still."""
    for _ in range(400):
        client.infer("net", inputs)  # type: ignore[attr-defined]
        if client._on_device._ready:  # type: ignore[attr-defined]
            return
        threading.Event().wait(0.02)
    raise AssertionError("never granted")


@pytest.fixture(scope="module")
def alone():  # type: ignore[no-untyped-def]
    """A cluster of one worker, its client, and a model that the client computes itself."""
    with LocalCluster(1) as cluster, cluster.client() as client:
        client.deploy("net", conv_net())
        _until_granted(client, image())
        yield cluster, client


def test_a_client_answers_while_its_coordinator_is_stopped(alone) -> None:  # type: ignore[no-untyped-def]
    cluster, client = alone
    process = cluster._coordinator.pid
    os.kill(process, signal.SIGSTOP)
    try:
        result = client.infer("net", image(5), deadline_s=1.0)
    finally:
        os.kill(process, signal.SIGCONT)
    assert_exact(conv_net(), image(5), result.outputs)
    assert [task.device for task in result.timing.tasks] == ["worker-0"]
    assert (result.model_version, result.attempts, result.degraded) == (1, 1, False)
    assert result.plan.count("task ") == 1


def test_many_threads_of_a_client_all_get_their_own_answers(alone) -> None:  # type: ignore[no-untyped-def]
    _, client = alone
    found: dict[int, Mapping[str, np.ndarray]] = {}

    def one(seed: int) -> None:
        for _ in range(5):
            found[seed] = client.infer("net", image(seed)).outputs

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for seed, outputs in found.items():
        assert_exact(conv_net(), image(seed), outputs)


def test_what_the_caller_does_to_an_answer_or_an_input_changes_no_other(alone) -> None:  # type: ignore[no-untyped-def]
    _, client = alone
    given = image(1)
    first = client.infer("net", given)
    kept = {name: array.copy() for name, array in first.outputs.items()}
    for array in given.values():
        array[:] = 0.0
    second = client.infer("net", given)
    for array in second.outputs.values():
        array[:] = 1.0
    for name, array in first.outputs.items():
        assert np.array_equal(array, kept[name])


def test_bad_requests_get_the_errors_that_the_cluster_gives(alone) -> None:  # type: ignore[no-untyped-def]
    _, client = alone
    with pytest.raises(InvalidInput, match="shape"):
        client.infer("net", {"x": np.zeros((1, 3, 5, 5), np.float32)})
    with pytest.raises(InvalidInput):
        client.infer("net", {"z": np.zeros((1, 3, 12, 10), np.float32)})
    with pytest.raises(InvalidInput, match="deadline"):
        client.infer("net", image(), deadline_s=-1.0)
    with pytest.raises(DeadlineExceeded):
        client.infer("net", image(), deadline_s=1e-9)


def test_one_array_and_some_outputs_are_answered_as_well(alone) -> None:  # type: ignore[no-untyped-def]
    _, client = alone
    whole = reference(conv_net(), image(2))
    single = client.infer("net", image(2)["x"])
    assert set(single.outputs) == {"y", "mean"}
    for _ in range(3):  # by the cluster, then granted for these outputs too
        some = client.infer("net", image(2), outputs=["mean"])
        assert list(some.outputs) == ["mean"]
        np.testing.assert_allclose(some.outputs["mean"], whole["mean"], rtol=1e-5)


def test_a_client_that_was_closed_answers_no_more(alone) -> None:  # type: ignore[no-untyped-def]
    cluster, _ = alone
    with cluster.client() as client:
        _until_granted(client, image())
    with pytest.raises(ClusterUnavailable, match="closed"):
        client.infer("net", image())


def test_a_new_version_answers_as_soon_as_it_is_deployed(alone) -> None:  # type: ignore[no-untyped-def]
    _, client = alone
    other = conv_net(seed=2)
    version = client.deploy("net", other).version
    result = client.infer("net", image(3))
    assert result.model_version == version
    assert_exact(other, image(3), result.outputs)
