"""A client on a device's host is source and sink of its own requests; elsewhere the head is."""

from __future__ import annotations

import pytest
from cores import Cluster, conv_net, image
from oracle import assert_exact

from meshinfer.protocol import messages as m
from meshinfer.protocol.records import BESIDE_COORDINATOR
from meshinfer.scheduler import events as e
from meshinfer.scheduler.client import ClientCore


def _moved(cluster: Cluster) -> set[tuple[str, str, str]]:
    """Sender, receiver and type of all that carried tensors from now on."""
    seen: set[tuple[str, str, str]] = set()

    def note(sender, receiver, message) -> bool:  # type: ignore[no-untyped-def]
        if isinstance(message, m.Deliver | m.Feed | m.Answer):
            seen.add((sender.name, receiver.name, type(message).__name__))
        return False

    cluster.drop(note)
    return seen


def _core(cluster: Cluster) -> ClientCore:
    core = cluster.nodes["ann"].core
    assert isinstance(core, ClientCore)
    return core


def test_tensors_of_a_client_on_the_coordinators_host_pass_no_other_process() -> None:
    cluster = Cluster(beside=True)
    cluster.deployed()
    seen = _moved(cluster)
    reply = cluster.check(cluster.submit(image()), image())
    assert reply.attempts == 1
    assert {("ann", "pi-1", "Deliver"), ("pi-2", "ann", "Deliver")} <= seen
    assert not any("head" in ends[:2] for ends in seen)
    cluster.check_idle()


def test_tensors_of_a_client_elsewhere_go_by_the_head() -> None:
    cluster = Cluster()
    cluster.deployed()
    seen = _moved(cluster)
    cluster.check(cluster.submit(image()), image())
    assert {("ann", "head", "Feed"), ("head", "ann", "Answer")} <= seen
    assert not any(ends[2] == "Deliver" and "ann" in ends[:2] for ends in seen)


def test_a_client_on_a_workers_host_is_its_own_head_and_another_is_not() -> None:
    cluster = Cluster(clients=())
    cluster.connect("ann", where="pi-1 h")
    cluster.connect("bob", where="pi-1 elsewhere")
    cluster.settle(lambda: len(cluster.core.members.clients) == 2)
    cluster.pass_time(0.1)
    assert _core(cluster)._acts_as == "head"
    other = cluster.nodes["bob"].core
    assert isinstance(other, ClientCore) and other._acts_as == ""


@pytest.mark.parametrize(
    ("where", "ends", "there"),
    [
        (BESIDE_COORDINATOR, ("10.0.0.1", "10.0.0.1"), True),
        (BESIDE_COORDINATOR, ("10.0.0.9", "10.0.0.1"), False),
        ("pi-1 h", ("h", "10.0.0.1"), True),
        ("pi-1 h", ("10.0.0.9", "10.0.0.1"), False),
        ("pi-1 h", ("10.0.0.9", "h"), False),  # our end says nothing of where it is
        ("pi-1 h", ("", ""), False),  # its connection is gone, or nobody knows
        (BESIDE_COORDINATOR, ("", ""), False),
        ("elsewhere g", ("g", "10.0.0.1"), False),  # truly there, where no device is
    ],
)
def test_a_client_is_believed_to_be_where_its_connection_comes_from(
    where: str, ends: tuple[str, str], there: bool
) -> None:
    cluster = Cluster(clients=())
    hello = cluster.hello("eve", "client", where=where)
    effects = cluster.core.handle(e.Arrived(f"eve#{hello.incarnation}", hello, ends=ends), 1.0)
    (acts_as,) = (
        effect.message.acts_as
        for effect in effects
        if isinstance(effect, e.Send) and isinstance(effect.message, m.Welcome)
    )
    assert acts_as == ("head" if there else "")
    notes = [x for x in effects if isinstance(x, e.Note) and x.text.endswith("not where it says")]
    lied = ends[0] != (ends[1] if where == BESIDE_COORDINATOR else where.split()[1])
    assert len(notes) == (lied or not ends[0])
    assert all((n.level, n.fields["comes_from"]) == ("warning", ends[0]) for n in notes)


def test_a_client_is_given_a_plans_programs_once_and_forgets_them_with_it() -> None:
    cluster = Cluster(beside=True)
    cluster.deployed()
    for number in range(3):
        cluster.check(cluster.submit(image(number)), image(number))
    assert len(_core(cluster)._installing.deployments) == 1
    cluster.kill("pi-2")
    cluster.check(cluster.submit(image()), image())
    cluster.pass_time(3.0)
    assert len(_core(cluster)._installing.deployments) == 1, "the old plan's are gone"


def test_a_request_outlives_a_worker_and_the_clients_connection() -> None:
    cluster = Cluster(beside=True)
    cluster.deployed()
    request = cluster.submit(image())
    cluster.pass_time(0.004)
    cluster.kill("pi-1")
    cluster.cut("ann")
    reply = cluster.check(request, image())
    assert reply.attempts >= 1
    cluster.check_idle()


def test_a_cancelled_request_leaves_nothing_with_its_client() -> None:
    cluster = Cluster(beside=True)
    cluster.deployed()
    request = cluster.submit(image())
    cluster.pass_time(0.003)
    cluster._handle(cluster.nodes["ann"], e.Cancelled(request))
    cluster.check_idle()
    assert _core(cluster)._computing.idle


def test_a_mean_and_a_map_are_merged_as_onnxruntime_has_them() -> None:
    cluster = Cluster(("pi-1", "pi-2", "pi-3"), beside=True)
    cluster.deployed()
    request = cluster.submit(image(5))
    cluster.reply(request)
    (resolved,) = cluster.nodes["ann"].resolved[request]
    assert set(resolved.arrays) == {"y", "mean"}
    assert_exact(conv_net(), image(5), dict(resolved.arrays))


@pytest.mark.parametrize(("who", "within_s"), [("ann", 5.0), ("head", 10.0)])
def test_a_cut_while_a_request_runs_costs_seconds_and_not_the_deadline(
    who: str, within_s: float
) -> None:
    for after_s in (0.0015, 0.004, 0.006, 0.008, 0.012, 0.015, 0.021):
        cluster = Cluster(beside=True)
        cluster.deployed()
        request = cluster.submit(image(), deadline_s=30.0)
        cluster.pass_time(after_s)
        cluster.cut(who)
        since = cluster.now
        cluster.check(request, image())
        assert cluster.now - since < within_s
        cluster.check_idle()


def test_a_dead_client_keeps_nobody_waiting() -> None:
    cluster = Cluster(clients=("ann", "bob"), beside=True)
    cluster.deployed()
    for number in range(8):
        cluster.submit(image(number))
    cluster.pass_time(0.003)
    cluster.kill("ann")
    since = cluster.now
    cluster.check(cluster.submit(image(), client="bob"), image(), client="bob")
    assert cluster.now - since < 2.0


def test_a_client_that_does_not_reach_a_device_goes_by_the_head_and_costs_no_device() -> None:
    cluster = Cluster(beside=True)
    cluster.deployed()

    def lost(sender, receiver, message) -> bool:  # type: ignore[no-untyped-def]
        return sender.name == "ann" and receiver.name == "pi-1" and isinstance(message, m.Deliver)

    for _ in range(40):
        cluster.drop(lost)
    cluster.check(cluster.submit(image(), deadline_s=120.0), image())
    assert _core(cluster)._acts_as == ""
    answer = cluster.ask(m.ListDevices).answer
    assert isinstance(answer, m.Devices)
    assert {d.state for d in answer.devices} == {"ready"}
