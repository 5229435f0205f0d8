"""What is open is bounded in requests and bytes; who is refused is told when to come again."""

from __future__ import annotations

import numpy as np
import pytest
from cores import Cluster, conv_net, image

from meshinfer import limits
from meshinfer.protocol import messages as m

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
