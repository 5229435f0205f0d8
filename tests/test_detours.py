"""Two workers that do not reach each other: their pieces go by the head until they do again."""

from __future__ import annotations

import pytest
from cores import Cluster, image, kind

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.detours import Detours

APART = frozenset(("pi-1", "pi-2"))


def three(*, beside: bool = False) -> Cluster:
    cluster = Cluster(("pi-1", "pi-2", "pi-3"), beside=beside)
    cluster.deployed()
    cluster.check(cluster.submit(image(9)), image(9))
    return cluster


@pytest.mark.parametrize("beside", [False, True])
def test_a_partition_of_two_workers_costs_no_request_and_no_attempt(beside: bool) -> None:
    cluster = three(beside=beside)
    cluster.severed.add(APART)
    requests = [cluster.submit(image(i), deadline_s=10.0) for i in range(6)]
    for i, request in enumerate(requests):
        reply = cluster.check(request, image(i))
        assert reply.attempts == 1
        assert {"pi-1", "pi-2", "pi-3"} == {task.device for task in reply.tasks}
    assert reply.degraded and any("go" in each or "went" in each for each in reply.reasons)
    assert cluster.sent["Relay"] > 0
    cluster.check_idle()


def test_once_it_is_known_nothing_waits_for_it() -> None:
    cluster = three()
    cluster.severed.add(APART)
    first = cluster.check(cluster.submit())
    assert first.total_s < limits.ACK_TIMEOUT_S + 1.5
    later = cluster.check(cluster.submit())
    assert later.total_s < 0.5 and later.attempts == 1


def test_the_straight_way_is_taken_again_when_it_is_there() -> None:
    cluster = three()
    cluster.severed.add(APART)
    cluster.check(cluster.submit())
    cluster.severed.clear()
    cluster.pass_time(2 * limits.DETOUR_PROBE_S)
    assert cluster.core.members.apart == {}
    before = cluster.sent["Relay"]
    reply = cluster.check(cluster.submit())
    assert cluster.sent["Relay"] == before and not reply.degraded


def test_all_workers_apart_from_each_other_still_answer() -> None:
    cluster = three()
    for pair in (("pi-1", "pi-2"), ("pi-1", "pi-3"), ("pi-2", "pi-3")):
        cluster.severed.add(frozenset(pair))
    for i in range(3):
        assert cluster.check(cluster.submit(image(i)), image(i)).attempts == 1
    cluster.check_idle()


def test_a_relay_that_dies_with_the_head_is_asked_for_anew() -> None:
    cluster = three()
    cluster.severed.add(APART)
    cluster.check(cluster.submit())
    cluster.kill("head")
    cluster.join("head", m.Facts(computes=False, head=True, host="h"))
    cluster.pass_time(1.0)
    cluster.check(cluster.submit(image(1), deadline_s=20.0), image(1))


def test_a_worker_of_the_pair_that_dies_is_no_longer_apart() -> None:
    cluster = three()
    cluster.severed.add(APART)
    cluster.check(cluster.submit())
    assert cluster.core.members.apart == {("pi-1", "pi-2"): True}
    cluster.kill("pi-2")
    cluster.pass_time(1.0)
    assert cluster.core.members.apart == {}
    cluster.check(cluster.submit(image(1)), image(1))


def test_a_piece_that_was_lost_once_takes_a_detour_and_comes_back() -> None:
    cluster = three()
    cluster.drop(kind(m.Deliver, by="pi-1", to="pi-2"))
    assert cluster.check(cluster.submit()).attempts == 1
    cluster.pass_time(3.0)
    assert cluster.core.members.apart == {}


def test_a_pair_is_apart_no_more_although_its_plan_is_gone() -> None:
    cluster = three()
    cluster.severed.add(APART)
    cluster.check(cluster.submit())
    word = m.Stalled(peer="pi-2#1", over=True)
    cluster.inject(cluster.coordinator, "pi-3#1", word)  # which is none of the two
    assert cluster.core.members.apart == {("pi-1", "pi-2"): True}
    cluster.core.catalogue.deployments.clear()
    cluster.kill("head")  # nor is it there while the coordinator's own device begins again
    cluster.pass_time(0.1)
    assert cluster.core.members.head is None
    cluster.inject(cluster.coordinator, "pi-1#1", word)
    assert cluster.core.members.apart == {}


def test_a_relay_is_passed_on_to_no_one_but_the_receiver_and_never_back() -> None:
    detours = Detours("head#1")
    relay = m.Relay(to="b#1", origin="a#1", message=m.Ack(ids=(1,)))
    (sent,) = detours.pass_on("a#1", relay, memoryview(b""))
    assert isinstance(sent, e.Send) and sent.peer == "b#1" and sent.message == relay
    for other in ("b#1", "x#1"):  # who gets it believes that the origin said it
        assert kinds(detours.pass_on(other, relay, memoryview(b""))) == ["Note"]


def test_only_the_head_relays_to_a_device() -> None:
    """Else any member could have all that goes to another come to itself."""
    detours, mine = Detours("b#1"), m.Relay(to="b#1", origin="a#1", message=m.Ack(ids=(1,)))
    head = m.Peer(device="head", incarnation="1", host="h", port=1, key="k" * 40)
    assert not detours.is_for_us("head#1", mine, 0.0)  # nobody has said who that is
    detours.trust(head)
    assert not detours.is_for_us("x#1", mine, 0.0) and not detours.goes("a#1")
    assert detours.is_for_us("head#1", mine, 0.0) and detours.goes("a#1")
    other = m.Relay(to="c#1", origin="a#1", message=m.Ack(ids=(1,)))
    assert not detours.is_for_us("head#1", other, 0.0)


def kinds(effects: list[e.Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def test_ways_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DEVICES", 3)
    detours = Detours("me#1")
    detours.trust(m.Peer(device="head", incarnation="1", host="h", port=1, key="k" * 40))
    for i in range(9):
        relay = m.Relay(to="me#1", origin=f"pi-{i}#1", message=m.Ack(ids=(1,)))
        assert detours.is_for_us("head#1", relay, 0.0)
    assert [detours.goes(f"pi-{i}#1") for i in range(9)] == [False] * 6 + [True] * 3


@pytest.mark.parametrize("other", ["pi-1", "pi-2"])
def test_a_client_that_does_not_reach_a_worker_goes_by_the_head_within_seconds(other: str) -> None:
    """It was source and sink itself."""
    cluster = three(beside=True)
    cluster.severed.add(frozenset(("ann", other)))
    for i in range(3):
        reply = cluster.check(cluster.submit(image(i), deadline_s=10.0), image(i))
        assert reply.total_s < limits.ACK_TIMEOUT_S + 2.0 and reply.attempts <= 2
    cluster.check_idle()
