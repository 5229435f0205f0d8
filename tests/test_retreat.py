"""Where links between devices keep requests for longer than one device would take alone, that one
does all of each, until the links are what the plan was made by.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from cores import Cluster, Node, image
from test_fallback import NAMES, Watched, settled

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e

SLOW_S = 0.3
"""A request takes a few hundredths of a second where links are good."""


class Lossy(Watched):
    """``extra_s``: what each piece between two devices takes longer on its way."""

    extra_s = 0.0

    def _deliver(self, sender: Node, receiver: Node, plane: e.Plane, message: m.AnyMessage,
                 payload: memoryview, extra: float) -> None:  # fmt: skip
        between = {sender.name, receiver.name} <= set(NAMES)
        extra += self.extra_s if between else 0.0
        super()._deliver(sender, receiver, plane, message, payload, extra)


def lossy(**fields: object) -> Lossy:
    cluster = Lossy(NAMES)
    cluster.deployed(**fields)
    settled(cluster)
    return cluster


def ask(cluster: Cluster, seed: int) -> tuple[m.Reply, float]:
    """A request, held against plain onnxruntime: the reply, and what it took."""
    since = cluster.now
    reply = cluster.check(cluster.submit(image(seed)), image(seed))
    return reply, cluster.now - since


def on(reply: m.Reply) -> set[str]:
    return {task.device for task in reply.tasks}


def retreated(cluster: Lossy) -> str:
    """Requests, until one device does all; who that is."""
    cluster.extra_s = SLOW_S
    for i in range(limits.RETREAT_REQUESTS):
        reply, took = ask(cluster, i)
        assert took > SLOW_S
    reply, took = ask(cluster, 9)
    (device,) = on(reply)
    assert took < SLOW_S and reply.degraded
    assert f"waited for links of its plan: {device} ran all tasks" in reply.reasons[0]
    return device


def test_one_device_does_all_while_links_are_slow_and_the_plan_serves_again_after() -> None:
    cluster = lossy()
    assert on(ask(cluster, 0)[0]) == set(NAMES)
    retreated(cluster)
    cluster.extra_s = 0.0
    cluster.pass_time(limits.RETREAT_S)
    for i in range(limits.RETREAT_REQUESTS):
        reply, _ = ask(cluster, i)
        assert on(reply) == set(NAMES) and not reply.degraded, "to see"
    reply, _ = ask(cluster, 1)
    assert on(reply) == set(NAMES) and not reply.degraded
    cluster.check_idle()


def test_who_is_seen_to_be_slow_yet_is_tried_again_later_each_time() -> None:
    cluster = lossy()
    device = retreated(cluster)
    tried = []
    for i in range(400):
        since = cluster.now
        reply, _ = ask(cluster, i)
        if on(reply) != {device}:
            tried.append(since)
        cluster.pass_time(0.25)
    apart = [b - a for a, b in pairwise(tried)]
    assert len(apart) >= 3 and apart == sorted(apart) and apart[-1] > 3 * apart[0], tried
    assert apart[0] > limits.RETREAT_S
    cluster.check_idle()


def test_several_at_once_are_no_reason_where_links_are_good() -> None:
    """They take longer each, as they would on one device."""
    cluster = lossy()
    for i in range(10):
        requests = [cluster.submit(image(j)) for j in range(limits.RUNNING_REQUESTS)]
        for j, request in enumerate(requests):
            assert not cluster.check(request, image(j)).degraded, i


@pytest.mark.parametrize("forced", ["spread", "plan"])
def test_what_the_user_wants_on_all_devices_stays_there(forced: str) -> None:
    cluster = lossy(**_forced(forced))
    cluster.extra_s = SLOW_S
    for i in range(3 * limits.RETREAT_REQUESTS):
        assert on(ask(cluster, i)[0]) == set(NAMES)


def _forced(how: str) -> dict[str, object]:
    if how == "spread":
        return {"spread": True}
    other = Cluster(NAMES)
    other.deployed()
    (made,) = other.core.catalogue.deployments.values()
    return {"plan": made.plan}


def test_a_device_that_is_as_slow_alone_is_left_for_the_plan() -> None:
    """It was expected to be quick; all its kernels take long by now, or all messages do."""
    cluster = lossy()
    device = retreated(cluster)
    cluster.slowness[device] = 100.0
    replies = [ask(cluster, i)[0] for i in range(3 * limits.RETREAT_REQUESTS)]
    assert on(replies[-1]) != {device}


def test_when_that_device_is_lost_requests_go_on_without_it() -> None:
    cluster = lossy()
    device = retreated(cluster)
    cluster.kill(device)
    reply, _ = ask(cluster, 3)
    assert device not in on(reply)
    cluster.check_idle()


def test_what_only_some_prepare_stays_with_the_plan() -> None:
    """No device has prepared all of it."""
    cluster = Lossy(NAMES)
    cluster.spares = False
    cluster.deployed()
    cluster.extra_s = SLOW_S
    for i in range(2 * limits.RETREAT_REQUESTS):
        assert on(ask(cluster, i)[0]) == set(NAMES)
