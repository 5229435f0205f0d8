"""A device that is there and says nothing gives up what it owes before it counts as dead: it is
asked for a sign of life once a request is late, and its spares take over while it is silent.
"""

from __future__ import annotations

import pytest
from cores import COMPUTE_S, Cluster, image, kind
from test_covering import lose
from test_fallback import MOMENTS, computing, ready

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.held import Held

USUAL = 12
"""Requests after which it is known how long they take."""
SILENT_AFTER_S = limits.LATE_S + limits.SILENT_S
AT_ONCE_S = 0.1
"""Far more than a request takes here."""


def used(**fields: object) -> Cluster:
    """It has answered so often that it knows when a request is late."""
    cluster = ready(**fields)  # type: ignore[arg-type]
    for i in range(USUAL):
        cluster.check(cluster.submit(image(i)), image(i))
    return cluster


def freeze(cluster: Cluster, name: str, seconds: float) -> None:
    node = cluster.nodes[name]
    node.frozen_until = cluster.now + seconds


@pytest.mark.parametrize("beside", [False, True], ids=["by the head", "client is the head"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_frozen_device_holds_no_request_up_until_it_is_dead(moment: str, beside: bool) -> None:
    cluster = used(beside=beside)
    matches = MOMENTS[moment]
    if beside and "answer" in moment:
        matches = kind(m.Deliver, by="pi-2", to="ann")
    times: list[float] = []

    def strike() -> None:
        times.append(cluster.now)
        freeze(cluster, "pi-2", 1.5)

    cluster.when(matches, strike)
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert times and cluster.now - times[0] < SILENT_AFTER_S + AT_ONCE_S
    assert reply.attempts == 1 and not reply.lost
    begun = computing(cluster)
    since = cluster.now
    next_ = cluster.check(cluster.submit(image(2)), image(2))
    assert cluster.now - since < AT_ONCE_S, "the next one knows"
    assert next_.degraded and "silent" in next_.reasons[0]
    assert {t.device for t in next_.tasks} == {"pi-1", "pi-3"}
    assert set(begun.values()) == {1}
    cluster.pass_time(2.0)
    assert cluster.nodes["pi-2"].alive
    last = cluster.check(cluster.submit(image(3)), image(3))
    assert not last.degraded and "pi-2" in {t.device for t in last.tasks}, "it is heard again"
    cluster.check_idle()


def test_of_its_own_tasks_a_device_tells_with_the_last_that_no_other_has() -> None:
    """One that was silent rests, and others have its tasks; of one that falls silent then, it takes
    back what is its own: to tell of that, it waits for no task that is not to come."""
    cluster = used()
    (made,) = cluster.nodes["pi-2"].core._computing._deployments.values()
    own = [p for p in made.programs.values() if p.model is not None and p.is_own("pi-2")]
    places = [p.place for p in own]
    dones = [m.Done(place=place, compute_s=1.0, sent_bytes=0) for place in places]

    def told(*elsewhere: m.Place) -> list[list[m.Done]]:
        held = Held(0.0, assigned=tuple((*place, 1) for place in elsewhere))
        rest = [done for done in dones if done.place not in elsewhere]
        return [held.finish(done, made.programs.values(), "pi-2") for done in rest]

    assert len(places) == 3
    assert told() == [[], [], dones]
    assert told(*places[:2]) == [[dones[2]]]
    assert told(places[2]) == [[], dones[:2]]


def test_a_freeze_costs_no_plan_and_a_longer_one_the_device() -> None:
    cluster = used()
    [made] = cluster.core.catalogue.deployments.values()
    freeze(cluster, "pi-2", limits.SILENT_MOST_S - 1.0)
    cluster.check(cluster.submit(image(1)), image(1))
    cluster.pass_time(limits.SILENT_MOST_S)
    assert list(cluster.core.catalogue.deployments.values()) == [made]
    assert "pi-2" in cluster.check(cluster.submit(image(2)), image(2)).plan
    freeze(cluster, "pi-2", limits.SILENT_MOST_S + 2.0)
    cluster.check(cluster.submit(image(3)), image(3))
    cluster.pass_time(limits.SILENT_MOST_S + 1.0)
    assert made.number not in cluster.core.catalogue.deployments
    assert "pi-2" not in cluster.check(cluster.submit(image(4)), image(4)).plan


@pytest.mark.parametrize("lost", ["pi-1", "pi-3"])
def test_a_loss_beside_a_silent_device_is_borne_too(lost: str) -> None:
    """Whether the one that is lost had taken over from the silent one, or not."""
    cluster = used()
    cluster.plan_s = 30.0
    freeze(cluster, "pi-2", 3.0)
    cluster.when(kind(m.Lacks, by=lost), lambda: lose(cluster, lost))
    since = cluster.now
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert cluster.now - since < SILENT_AFTER_S + AT_ONCE_S
    assert reply.attempts == 1 and reply.lost == (lost,)
    cluster.pass_time(4.0)
    last = cluster.check(cluster.submit(image(2)), image(2))
    assert {t.device for t in last.tasks} == {"pi-1", "pi-2", "pi-3"} - {lost}


def test_who_is_only_slow_answers_and_keeps_its_work() -> None:
    """A request that takes long is no proof: whoever gives a sign of life is waited for."""
    cluster = used()
    cluster.slowness["pi-2"] = 1.5 * limits.LATE_S / COMPUTE_S
    begun = computing(cluster)
    asked = cluster.sent["Alive"]
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert cluster.sent["Alive"] > asked
    assert not reply.degraded and set(begun.values()) == {1}
    cluster.check_idle()


def test_a_device_cut_off_from_the_coordinator_alone_is_silent() -> None:
    cluster = used()
    cluster.severed.add(frozenset(("coordinator", "pi-2")))
    cluster.severed.add(frozenset(("head", "pi-2")))
    since = cluster.now
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert cluster.now - since < SILENT_AFTER_S + AT_ONCE_S
    assert reply.attempts == 1 and "pi-2" not in {t.device for t in reply.tasks}


def test_a_task_that_hangs_is_done_elsewhere_while_its_device_answers() -> None:
    cluster = used()
    cluster.slowness["pi-2"] = 10.0 / COMPUTE_S
    since = cluster.now
    first = cluster.submit(image(9))
    for i in range(5):
        cluster.check(cluster.submit(image(i)), image(i))
    assert cluster.now - since < 0.5, "what waits behind it does not wait for long"
    reply = cluster.check(first, image(9))
    assert reply.degraded and reply.attempts == 1
    assert cluster.now - since < limits.HUNG_S + limits.HEARTBEAT_S + 0.5
    [info] = [d for d in cluster.core.members.infos(cluster.now) if d.device == "pi-2"]
    assert info.state == "suspect"
    cluster.slowness.clear()
    cluster.pass_time(12.0)
    last = cluster.check(cluster.submit(image(2)), image(2))
    assert not last.degraded and "pi-2" in {t.device for t in last.tasks}, "it is through"
    cluster.check_idle()


def test_where_most_say_nothing_nobody_is_silent() -> None:
    """Then it is the coordinator that hears nothing: copies would make it worse."""
    cluster = used()
    for name in ("pi-1", "pi-2", "pi-3"):
        freeze(cluster, name, 1.0)
    begun = computing(cluster)
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert not reply.degraded and set(begun.values()) == {1}
    cluster.check_idle()


def test_who_was_silent_has_its_link_measured() -> None:
    """It may have been the link: what the planner knows of it would be wrong."""
    cluster = used()
    cluster.pass_time(20.0)  # all others are measured
    freeze(cluster, "pi-2", 1.0)
    cluster.check(cluster.submit(image(1)), image(1))
    before = cluster.sent["MeasureLink"]
    cluster.pass_time(2.0)
    assert cluster.sent["MeasureLink"] > before


def test_where_messages_come_late_and_nobody_computes_the_links_are_measured() -> None:
    cluster = used(beside=True)
    cluster.pass_time(20.0)
    cluster.delay(kind(m.Deliver, to="pi-2"), 1.0)
    before = cluster.sent["MeasureLink"]
    reply = cluster.check(cluster.submit(image(1)), image(1))
    assert not reply.degraded, "it answers, and is waited for"
    cluster.pass_time(0.5)
    assert cluster.sent["MeasureLink"] > before
