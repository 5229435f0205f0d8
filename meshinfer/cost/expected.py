"""How long each task takes on each device that may get it, and whether another plan is worth it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from meshinfer import limits
from meshinfer.cost.model import field_work, seconds
from meshinfer.cost.profile import DeviceProfile
from meshinfer.cost.timeline import timeline
from meshinfer.graph import Graph
from meshinfer.halo import receptive_field
from meshinfer.plan import Plan


def expected_seconds(
    graph: Graph,
    plan: Plan,
    profiles: Sequence[DeviceProfile],
    spares: Mapping[tuple[int, int], Sequence[str]] = MappingProxyType({}),
) -> dict[tuple[tuple[int, int], str], float]:
    """Seconds by ((stage, task), device). A device without a profile, or unable, is left out.
    ``spares``: others that prepare a task."""
    known: dict[str, DeviceProfile] = {p.id: p for p in profiles}
    found: dict[tuple[tuple[int, int], str], float] = {}
    for s, stage in enumerate(plan.stages):
        for t, task in enumerate(stage.tasks):
            work = field_work(graph, receptive_field(graph, stage, task))
            for device in (*task.devices, *spares.get((s, t), ())):
                took = seconds(work, known[device]) if device in known else math.inf
                if math.isfinite(took):
                    found[(s, t), device] = took
    return found


def is_better(
    graph: Graph, plan: Plan, present: Plan, profiles: Sequence[DeviceProfile], objective: str
) -> bool:
    """Whether a plan is expected to beat the present one by REPLAN_GAIN: a change costs."""
    if present.graph != graph.digest:
        return True
    new, old = (timeline(graph, each, profiles) for each in (plan, present))
    if objective == "throughput":
        return new.bottleneck_s * limits.REPLAN_GAIN < old.bottleneck_s
    return new.total_s * limits.REPLAN_GAIN < old.total_s
