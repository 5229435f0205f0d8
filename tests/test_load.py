"""What is open is bounded in requests and bytes; who is refused is told when to come again."""

from __future__ import annotations

import sys
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cores import Cluster, conv_net, image

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.opened import SPARE_DEADLINES, OpenRequests

NBYTES = 1 * 3 * 12 * 10 * 4
"""Of ``image()``."""


def test_inputs_beyond_the_bytes_that_may_wait_are_refused_until_some_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QUEUE_BYTES", 3 * NBYTES)
    cluster = Cluster()
    cluster.deployed()
    accepted = [cluster.submit(image(i)) for i in range(3)]
    failure = cluster.failure(cluster.submit())
    assert failure.error == "QueueFull" and failure.retry_after_s and "bytes" in failure.message
    for i, request in enumerate(accepted):
        cluster.check(request, image(i))
    cluster.check(cluster.submit())
    cluster.check_idle()


def test_one_request_larger_than_all_that_may_wait_is_served_when_it_is_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QUEUE_BYTES", NBYTES // 2)
    cluster = Cluster()
    cluster.deployed()
    first, second = cluster.submit(), cluster.submit()
    assert cluster.failure(second).error == "QueueFull"
    cluster.check(first)


def test_what_can_never_fit_is_refused_at_once_and_not_as_a_full_queue() -> None:
    cluster = Cluster(head=False, clients=())
    facts = m.Facts(computes=False, head=True, host="h", memory_bytes=8 * NBYTES)
    cluster.join("head", facts)
    cluster.connect("ann")
    cluster.pass_time(1.0)
    cluster.deployed(model=conv_net(None))
    cluster.check(cluster.submit(), model=conv_net(None))
    large = {"x": np.zeros((1, 3, 24, 20), np.float32)}
    failure = cluster.failure(cluster.submit(large))
    assert failure.error == "NotEnoughMemory" and failure.retry_after_s is None and failure.hint


def test_inputs_that_lie_with_their_client_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QUEUE_BYTES", NBYTES)
    cluster = Cluster(beside=True)
    cluster.deployed()
    for i, request in enumerate([cluster.submit(image(i)) for i in range(5)]):
        cluster.check(request, image(i))


@pytest.mark.parametrize(("slowness", "least", "most"), [(1.0, 0.05, 0.2), (60.0, 0.2, 30.0)])
def test_how_long_to_wait_follows_the_measured_pace(
    slowness: float, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "QUEUE_REQUESTS", 8)
    monkeypatch.setattr(limits, "RUNNING_REQUESTS", 1)
    cluster = Cluster()
    cluster.deployed()
    cluster.slowness = {"pi-1": slowness, "pi-2": slowness}
    for request in [cluster.submit() for _ in range(6)]:
        cluster.check(request)
    for _ in range(8):
        cluster.submit()
    failure = cluster.failure(cluster.submit())
    assert failure.error == "QueueFull" and failure.retry_after_s is not None
    assert least <= failure.retry_after_s <= most


def test_before_anything_was_answered_the_wait_is_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "QUEUE_REQUESTS", 1)
    cluster = Cluster()
    cluster.deployed()
    cluster.submit()
    assert cluster.failure(cluster.submit()).retry_after_s == limits.RETRY_AFTER_S


def test_what_would_be_refused_again_is_not_sent_until_the_told_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. others fill the queue; 2. until then: refused where it is submitted, not sent; 3. sent."""
    monkeypatch.setattr(limits, "QUEUE_REQUESTS", 2)
    cluster = Cluster(clients=("ann", "bob"))
    cluster.deployed()
    cluster.slowness = {"pi-1": 100.0, "pi-2": 100.0}
    for _ in range(2):
        cluster.submit(client="bob")
    cluster.pass_time(0.1)
    told = cluster.failure(cluster.submit()).retry_after_s
    sent = cluster.sent["Submit"]
    cluster.pass_time(0.4 * limits.RETRY_AFTER_S)
    failure = cluster.failure(cluster.submit())
    assert failure.error == "QueueFull" and cluster.sent["Submit"] == sent
    assert told == limits.RETRY_AFTER_S
    assert failure.retry_after_s == pytest.approx(0.6 * told, abs=0.01)
    cluster.pass_time(0.6 * limits.RETRY_AFTER_S)
    cluster.failure(cluster.submit())
    assert cluster.sent["Submit"] == sent + 1


def test_as_many_as_were_open_when_the_queue_was_full_go_on_being_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QUEUE_REQUESTS", 3)
    cluster = Cluster()
    cluster.deployed()
    first, *others = [cluster.submit(image(i)) for i in range(3)]
    assert cluster.failure(cluster.submit()).error == "QueueFull"
    sent = cluster.sent["Submit"]
    assert cluster.failure(cluster.submit()).error == "QueueFull"
    assert cluster.sent["Submit"] == sent
    cluster.check(first, image(0))
    cluster.check(cluster.submit())
    for i, request in enumerate(others):
        cluster.check(request, image(i + 1))
    assert cluster.sent["Submit"] == sent + 1
    cluster.check_idle()


def test_smaller_requests_than_the_one_that_was_refused_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QUEUE_BYTES", 2 * NBYTES)
    cluster = Cluster()
    cluster.deployed(model=conv_net(None))
    small, large = image(size=(4, 4)), image(size=(24, 20))
    first = cluster.submit()
    assert cluster.failure(cluster.submit(large)).error == "QueueFull"
    cluster.check(cluster.submit(small), small, model=conv_net(None))
    cluster.check(first, model=conv_net(None))


def test_a_coordinator_to_which_one_comes_back_is_asked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "QUEUE_REQUESTS", 1)
    cluster = Cluster(clients=("ann", "bob"))
    cluster.deployed()
    first = cluster.submit(client="bob")
    assert cluster.failure(cluster.submit()).error == "QueueFull"
    cluster.check(first, client="bob")
    assert cluster.failure(cluster.submit()).error == "QueueFull"
    cluster.cut("ann")
    cluster.pass_time(0.2)
    cluster.check(cluster.submit())


def test_what_finds_no_room_moves_no_rule_of_the_coordinator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the queue full at the rules' last look, ten refusals are no reason for the next."""
    monkeypatch.setattr(limits, "QUEUE_REQUESTS", 1)
    cluster = Cluster(clients=("ann", "bob"))
    cluster.deployed()
    cluster.slowness = {"pi-1": 100.0, "pi-2": 100.0}
    cluster.submit(client="bob")
    cluster.pass_time(0.1)
    ruled = cluster.core._ruled
    for i in range(10):
        header = m.Submit(
            request=f"refused-{i}",
            model="net",
            version=None,
            inputs=(),
            picture=False,
            deadline_s=1.0,
        )
        event = e.Arrived("ann#1", header, memoryview(b""))
        effects = cluster.core.handle(event, ruled + 0.01)
        replies = [each.message for each in effects if isinstance(each, e.Send)]
        assert any(isinstance(reply, m.Reply) and reply.failure for reply in replies)
    assert cluster.core._ruled == ruled


def test_what_only_waits_its_turn_costs_the_rules_nothing() -> None:
    """They are looked at with each event: else an overload would slow down what is answered."""
    lines = []
    for many in (limits.RUNNING_REQUESTS + 20, limits.QUEUE_REQUESTS - 1):
        cluster = Cluster()
        cluster.deployed()
        cluster.slowness = dict.fromkeys(cluster.core.members.devices, 1e4)
        for _ in range(many):
            cluster.submit()
        cluster.pass_time(1.0)
        assert len(cluster.core.requests) == many
        waiting = [r for r in cluster.core.requests.values() if r.waiting]
        assert len(waiting) >= many - limits.RUNNING_REQUESTS
        lines.append(lines_of(cluster))
    assert lines[1] <= 1.05 * lines[0], "as much for those that run"


def test_of_requests_that_are_over_no_more_is_kept_than_of_those_that_are_open() -> None:
    """One that ends soon stands before the deadlines of all that are answered meanwhile."""

    def request(name: str, deadline: float) -> Any:
        return SimpleNamespace(id=name, deadline=deadline, model=model, signature=model)

    model, opened = SimpleNamespace(key=1), OpenRequests()
    opened.add(request("soon", 1.0))
    for _ in range(1000):
        again = request("again", 300.0)
        opened.add(again)
        opened.remove(again)
    opened.add(last := request("again", 200.0))
    assert len(opened._deadlines) <= SPARE_DEADLINES + 4
    assert [r.id for r in opened.overdue(100.0)] == ["soon"] and opened.next_deadline() == 200.0
    assert opened.overdue(250.0) == [last] and opened.next_deadline() is None


def lines_of(cluster: Cluster) -> int:
    """That a tick of the coordinator's core runs."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        cluster.core.handle(e.Ticked(), cluster.now + 0.01)
    finally:
        sys.settrace(before)
    return count
