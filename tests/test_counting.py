"""Words of a control connection that were lost are noticed by their count, whichever they are.

That nothing costs more than seconds then is ``test_drops.py``.
"""

from __future__ import annotations

import pytest
from cores import Cluster, kind

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import encode
from meshinfer.scheduler.counting import COUNTED, Tallies

LOST = {"words of a peer were lost", "words of the coordinator were lost"}
SOON_S = 3 * limits.HEARTBEAT_S


def noticed(cluster: Cluster) -> list[str]:
    """By whom, in order."""
    nodes = sorted(cluster.nodes.values(), key=str)
    return [n.name for n in nodes for note in n.notes if note.text in LOST]


def in_use(**fields: object) -> Cluster:
    cluster = Cluster(("pi-1", "pi-2", "pi-3"), **fields)  # type: ignore[arg-type]
    cluster.deployed()
    cluster.check(cluster.submit())
    cluster.pass_time(2.0)
    return cluster


@pytest.mark.parametrize("beside", [False, True])
def test_nobody_misses_a_word_where_none_is_lost(beside: bool) -> None:
    cluster = in_use(beside=beside)
    cluster.kill("pi-2")
    cluster.check(cluster.submit())
    cluster.join("pi-2")
    cluster.cut("pi-1")
    cluster.cut("ann")
    cluster.check(cluster.submit())
    cluster.restart_coordinator()
    cluster.check(cluster.submit())
    cluster.pass_time(3.0)
    assert noticed(cluster) == []


@pytest.mark.parametrize(
    ("lost", "who"),
    [
        (kind(m.Release, to="pi-1"), "pi-1"),
        (kind(m.TasksDone, by="pi-1"), "coordinator"),
        (kind(m.Merged, by="head"), "coordinator"),
        (kind(m.Reply), "ann"),
        (kind(m.Submit), "coordinator"),
    ],
)
def test_a_word_that_is_lost_is_missed_once_and_by_whom_it_was_for(lost, who) -> None:  # type: ignore[no-untyped-def]
    cluster = in_use()
    cluster.drop(lost)
    cluster.deployed()
    cluster.check(cluster.submit())
    cluster.pass_time(SOON_S)
    assert noticed(cluster) == [who]
    cluster.pass_time(SOON_S)
    assert noticed(cluster) == [who] and all(map(cluster.joined, cluster.living()))
    cluster.check(cluster.submit())
    cluster.check_idle()


@pytest.mark.parametrize("who", ["ann", "pi-1"])
def test_beats_and_their_answers_may_be_lost_too(who: str) -> None:
    """A word, then each of what would tell of it, both ways; and of that what it leads to."""
    cluster = in_use()
    cluster.drop(kind(m.Reply if who == "ann" else m.Install, to=who))
    for _ in range(3):
        cluster.drop(kind(m.Alive, to=who))
        cluster.drop(kind(m.Heartbeat, by=who))
    cluster.drop(kind(m.Hello, by=who))
    cluster.drop(kind(m.Welcome, to=who))
    cluster.deployed()
    cluster.check(cluster.submit())
    assert noticed(cluster)
    cluster.check_idle()


def test_who_speaks_the_protocol_before_counts_nothing_and_understands_all() -> None:
    """By its beats and the answers to them, as they are on the wire."""
    before = (COUNTED - 1, COUNTED - 1)
    cluster = in_use()
    sent: list[m.AnyMessage] = []
    carry = cluster._carry

    def carried(sender, receiver, plane, frames, what):  # type: ignore[no-untyped-def]
        if {"old", "pi-old"} & {sender.name, receiver.name}:
            sent.append(what.message)
        carry(sender, receiver, plane, frames, what)

    cluster._carry = carried  # type: ignore[method-assign]
    cluster.join("pi-old", protocol=before)
    node = cluster.connect("old", protocol=before)
    cluster.settle(lambda: cluster.joined(node))
    cluster.pass_time(1.0)
    cluster.check(cluster.submit(client="old"), client="old")
    cluster.drop(kind(m.Reply, to="old"))
    failure = cluster.failure(cluster.submit(client="old", deadline_s=3.0), "old")
    assert failure.error == "DeadlineExceeded", "nobody has noticed"
    beats = [x for x in sent if isinstance(x, m.Heartbeat | m.Alive)]
    assert len(beats) > 4 and noticed(cluster) == []
    for beat in beats:
        assert b"said" not in bytes(encode(beat)[0]) and b"heard" not in bytes(encode(beat)[0])
    assert {x.protocol for x in sent if isinstance(x, m.Welcome)} == {COUNTED - 1}


def test_those_that_have_left_are_forgotten() -> None:
    here: set[str] = {"always"}
    tallies = Tallies(here.__contains__)
    for name in ("always", *(f"c{i}" for i in range(1000))):
        hello = m.Hello(role="client", device=name, incarnation="1", cluster="c", protocol=(5, 6))
        tallies.heard(name, hello)
    assert len(tallies._of) < 40 and "always" in tallies._of
