"""How long each task of a plan is expected to take on each device that may get it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from meshinfer.cost.model import field_work, seconds
from meshinfer.cost.profile import DeviceProfile
from meshinfer.graph import Graph
from meshinfer.halo import receptive_field
from meshinfer.plan import Plan


def expected_seconds(
    graph: Graph, plan: Plan, profiles: Sequence[DeviceProfile]
) -> dict[tuple[tuple[int, int], str], float]:
    """Seconds by ((stage, task), device). A device without a profile, or unable, is left out."""
    known = {p.id: p for p in profiles}
    found: dict[tuple[tuple[int, int], str], float] = {}
    for s, stage in enumerate(plan.stages):
        for t, task in enumerate(stage.tasks):
            work = field_work(graph, receptive_field(graph, stage, task))
            for device in task.devices:
                took = seconds(work, known[device]) if device in known else math.inf
                if math.isfinite(took):
                    found[(s, t), device] = took
    return found
