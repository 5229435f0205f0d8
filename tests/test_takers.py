"""Devices that took over from a silent one, under an attempt or for all: they may be silent or lost
in their turn, are asked what they await like any other, and hold nothing when the answer is there.
"""

from __future__ import annotations

import pytest
from cores import COMPUTE_S, Cluster, _imported, banded, conv_net, image, kind
from test_covering import lose, warm
from test_fallback import Watched, pipeline, ready
from test_silence import AT_ONCE_S, SILENT_AFTER_S, USUAL, freeze, used

from meshinfer import limits
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.simulator.models import for_any

SOON_S = 2 * (SILENT_AFTER_S + AT_ONCE_S)
FIVE = ("pi-1", "pi-2", "pi-3", "pi-4", "pi-5")


def graph() -> Graph:
    found: Graph = _imported(conv_net(), None, e.Signature(False, (("x", (1, 3, 12, 10)),)))
    return found


def made_usual(cluster: Watched) -> Watched:
    for i in range(USUAL):
        cluster.check(cluster.submit(image(i)), image(i))
    return cluster


def test_of_many_that_may_take_a_task_only_who_did_is_told_that_its_request_is_over() -> None:
    cluster = Cluster(FIVE)
    cluster.planner = lambda g, names: for_any(
        g, tuple(map(DeviceId, names)), DeviceId("head"), [0, len(g.ops)], 1, window=4
    )
    cluster.deployed()
    before = cluster.sent["Release"]
    replies = [cluster.check(cluster.submit(image(i)), image(i)) for i in range(3)]
    cluster.pass_time(1.0)
    assert cluster.sent["Release"] - before == 2 * len(replies)  # its taker, and the head
    cluster.check_idle()


def moved(cluster: Cluster) -> set[str]:
    """Who has taken over, of open requests."""
    tried = (t for r in cluster.core.requests.values() for t in r.tried.values())
    return {name for each in tried for name in each.moved.values()}


@pytest.mark.parametrize("beside", [False, True], ids=["by the head", "client is the head"])
def test_who_only_stood_by_and_took_over_holds_nothing_afterwards(beside: bool) -> None:
    plan = banded(graph(), ("pi-1", "pi-2"), "head")
    cluster = made_usual(ready(plan=plan, beside=beside))
    freeze(cluster, "pi-2", 1.0)
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert "pi-3" in {t.device for t in reply.tasks}
    cluster.pass_time(1.0)
    cluster.check_idle()


def test_who_only_stood_by_and_took_over_is_asked_what_it_awaits() -> None:
    cluster = made_usual(ready(FIVE, plan=pipeline(graph(), ("pi-1", "pi-2"))))
    cluster.plan_s = 30.0
    [made] = cluster.core.catalogue.deployments.values()
    cluster.core._answering.fallback.leaves(made, "pi-1")
    freeze(cluster, "pi-2", 1.5)
    cluster.delay(kind(m.Deliver, to="pi-1"), 0.5)
    request, since = cluster.submit(image(1)), cluster.now
    while not moved(cluster):
        cluster.pass_time(0.01)
    assert not moved(cluster) & made.programs.keys()
    cluster.pass_time(0.01)
    lose(cluster, "pi-1")
    reply = cluster.check(request, image(1))
    assert cluster.now - since < SOON_S and reply.attempts == 1
    cluster.check_idle()


@pytest.mark.parametrize("first", ["lost", "silent"])
def test_who_took_over_may_be_silent_in_its_turn(first: str) -> None:
    """From one that was lost, or from one that is heard again and rests: nobody waits for it."""
    cluster = used()
    cluster.plan_s = 30.0
    [made] = cluster.core.catalogue.deployments.values()
    if first == "lost":
        lose(cluster, "pi-2")
        cluster.pass_time(0.05)
        taker = made.spares.moved[0, 1]
    else:
        freeze(cluster, "pi-2", 1.5)
        cluster.check(cluster.submit(image(1)), image(1))
        while "pi-2" in cluster.core.members.presence.away:
            cluster.pass_time(0.05)
        assert "pi-2" in cluster.core.members.presence.resting(cluster.now)
        taker = cluster.core._answering.fallback.takers(made, {"pi-2"})[0, 1]
    freeze(cluster, taker, limits.SILENT_MOST_S - 1.0)
    since = cluster.now
    reply = cluster.check(cluster.submit(image(2)), image(2))
    assert cluster.now - since < SOON_S and reply.attempts == 1
    assert taker not in {t.device for t in reply.tasks}
    cluster.pass_time(limits.SILENT_MOST_S)
    cluster.check_idle()


@pytest.mark.parametrize("other_s", [0.3, 0.4])
def test_who_is_through_with_a_request_is_not_stuck_in_it(other_s: float) -> None:
    """The last heartbeat may be of a task that has ended since, while another device is late."""
    cluster = made_usual(ready(plan=pipeline(graph(), ("pi-1", "pi-2"))))
    cluster.slowness |= {"pi-1": 1.5 / COMPUTE_S, "pi-2": other_s / COMPUTE_S}
    told: list[float] = []
    cluster.when(kind(m.TasksDone, by="pi-1"), lambda: told.append(cluster.now))
    request = cluster.submit(image(1))
    cluster.settle(lambda: bool(told))
    assert cluster.core.members.presence.away == {"pi-1"}
    cluster.pass_time(0.005)
    while request not in cluster.nodes["ann"].resolved:
        assert "pi-1" not in cluster.core.members.presence.away
        cluster.pass_time(0.01)


def test_what_a_silent_device_awaits_is_computed_elsewhere_once_it_is_heard_again() -> None:
    """Where nobody does its own work meanwhile, it could not say that it awaits a stuck one."""
    names = (*FIVE, "pi-6")
    cluster = made_usual(ready(names, plan=pipeline(graph(), ("pi-1", "pi-2", "pi-3"))))
    [made] = cluster.core.catalogue.deployments.values()
    of = {p.place: set(p.spares) for each in made.programs.values() for p in each}
    assert of[1, 0] - of[2, 0]
    for name in of[2, 0]:
        cluster.core._answering.fallback.leaves(made, name)
    cluster.slowness["pi-2"] = 10.0 / COMPUTE_S
    request, since = cluster.submit(image(1)), cluster.now
    cluster.pass_time(limits.HUNG_S - 1.0)
    freeze(cluster, "pi-3", 1.5)
    reply = cluster.check(request, image(1))
    assert cluster.now - since < limits.HUNG_S + 0.5 + SOON_S and reply.attempts == 1


def test_what_a_device_says_of_before_it_joined_again_does_not_make_it_stand_by() -> None:
    cluster = ready(FIVE, plan=pipeline(graph(), ("pi-1", "pi-2")))
    [made] = cluster.core.catalogue.deployments.values()
    taker = next(p.spares[0] for p in made.programs["pi-1"])
    cluster.plan_s = 30.0
    cluster.cut(taker)
    cluster.settle(lambda: taker not in made.spares.ready and taker in cluster.core.members.devices)
    prepared = m.Installed(deployment=made.number)
    cluster.inject(cluster.coordinator, cluster.nodes[taker].id, prepared)
    lose(cluster, "pi-1")
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert reply.attempts == 1 and taker not in {t.device for t in reply.tasks}


def test_a_second_copy_on_a_device_that_falls_silent_is_no_last_one() -> None:
    cluster = warm()
    request, since = cluster.submit(image(1)), cluster.now
    for copies in (1, 2):
        while not (names := taking(cluster, request)) or len(names) < copies:
            cluster.pass_time(0.001)
        freeze(cluster, names[-1], limits.SILENT_MOST_S - 1.0)
    reply = cluster.check(request, image(1))
    assert cluster.now - since < SOON_S and reply.attempts == 1


def taking(cluster: Cluster, request: str) -> tuple[str, ...]:
    """The devices that were given the one task of a request."""
    asked = cluster.core.requests.get(request)
    if asked is None or not asked.runs:
        return ()
    return asked.tried[asked.attempt].assigned[0, 0]
