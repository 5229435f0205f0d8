"""Processes that come and go leave nothing behind in those that stay: whatever is kept of each
would add up for as long as a coordinator runs."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from cores import Cluster
from entries import entries

from meshinfer import limits

ROUND = 12
WORKERS = ("pi-1", "pi-2", "pi-3")
BOUNDS = (
    "JOURNALED_IDS",
    "ANSWERED_IDS_KEPT",
    "TASK_TIMES_KEPT",
    "CAUSES_KEPT",
    "STALE_REQUESTS_KEPT",
    "GIVEN_UP_KEPT",
    "LATE_SAMPLES",
)


def _held(cluster: Cluster) -> Counter[str]:
    """By the coordinator and by its head, once all is quiet."""
    cluster.pass_time(5.0)
    return entries(cluster.core) + entries(cluster.nodes["head"].core)


def test_processes_that_die_and_come_again_under_their_names_leave_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. a worker dies within a request, and another process comes under its name; so does a
    client's; 2. so often that what is kept of the last few is full; 3. as often again: nothing has
    got an entry for each."""
    for bound in BOUNDS:
        monkeypatch.setattr(limits, bound, ROUND)
    cluster, rng = Cluster(WORKERS, ("ann", "bob")), random.Random(0)
    cluster.deployed()
    held = []
    for _ in range(3):
        for i in range(ROUND):
            victim, request = WORKERS[i % 3], cluster.submit()
            cluster.pass_time(0.05 * rng.random())
            cluster.kill(victim, silent=i % 2 == 0)
            cluster.check(request)
            cluster.join(victim)
            cluster.check(cluster.submit(client="bob"), client="bob")
            cluster.kill("bob")
            cluster.connect("bob")
            cluster.pass_time(30.0 * rng.random())
        held.append(_held(cluster))
    before, after = held[1], held[2]
    assert sum(after.values()) > 0
    more = {name: n - before[name] for name, n in after.items() if n >= before[name] + ROUND}
    assert not more, "entries more, of so many processes that came and went"
