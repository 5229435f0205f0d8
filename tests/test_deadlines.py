"""A request that is over, whichever way, costs each worker one task more at most, which is counted;
a deadline is kept whatever the devices do, and what comes after it is dropped.
"""

from __future__ import annotations

from collections import Counter

import pytest
from cores import COMPUTE_S, Cluster, Node, image
from shared import graph
from test_fallback import pipeline

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e

NAMES = ("pi-1", "pi-2", "pi-3")
TASK_S = 1.0


def slow(**fields: object) -> Cluster:
    """Three devices, each of which takes a second for its task."""
    cluster = Cluster(NAMES)
    cluster.deployed(**fields)
    for name in NAMES:
        cluster.slowness[name] = TASK_S / COMPUTE_S
    return cluster


def begun(cluster: Cluster) -> Counter[str]:
    """Counts the tasks that each device begins from now on."""
    count: Counter[str] = Counter()

    def note(node: Node, job: e.Compute) -> None:
        count[node.name] += 1

    cluster.kernel_fault = note
    return count


def infos(cluster: Cluster) -> dict[str, m.DeviceInfo]:
    return {info.device: info for info in cluster.core.members.infos(cluster.now)}


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_a_request_that_is_over_costs_a_worker_one_task_at_most(end: str) -> None:
    cluster = slow()
    before = begun(cluster)
    asked = cluster.submit(image(1), deadline_s=0.5 if end == "deadline" else 60.0)
    cluster.settle(lambda: sum(before.values()) > 0)
    if end == "cancel":
        cluster.post(cluster.nodes["ann"], e.Cancelled(asked), 0.0)
        cluster.pass_time(0.2)
    else:
        assert cluster.failure(asked).error == "DeadlineExceeded"
    after = begun(cluster)
    cluster.pass_time(10 * TASK_S)
    assert not after, "what was queued is dropped"
    wasted = {name: infos(cluster)[name].stale_tasks for name in NAMES}
    assert max(wasted.values()) == 1 and sum(wasted.values()) == sum(before.values())
    cluster.slowness.clear()
    cluster.check(cluster.submit(image(2)), image(2))
    cluster.check_idle()


@pytest.mark.parametrize("deadline_s", [0.05, 0.5, 1.5, 2.5])
def test_a_deadline_is_kept_whatever_is_computed(deadline_s: float) -> None:
    """In the middle of a first task, of a later one, between two devices."""
    cluster = slow(plan=str(pipeline(graph())))
    since = cluster.now
    asked = cluster.submit(image(1), deadline_s=deadline_s)
    failure = cluster.failure(asked)
    assert failure.error == "DeadlineExceeded" and "deadline_s" in failure.hint
    assert deadline_s <= cluster.now - since < deadline_s + limits.HEARTBEAT_S
    cluster.pass_time(10 * TASK_S)
    cluster.check_idle()


def test_a_deadline_is_kept_though_every_device_is_frozen() -> None:
    cluster = slow()
    for name in NAMES:
        cluster.nodes[name].frozen_until = cluster.now + 1.5
    since = cluster.now
    assert cluster.failure(cluster.submit(image(1), deadline_s=0.7)).error == "DeadlineExceeded"
    assert cluster.now - since < 0.7 + limits.HEARTBEAT_S
