"""What a plan costs: device profiles, the cost of a task, the timeline of a plan. All predicted."""

from __future__ import annotations

from meshinfer.cost.kinds import OpKind, kind_of
from meshinfer.cost.model import field_work, glued_to, op_work, seconds, variable_seconds
from meshinfer.cost.profile import DeviceProfile
from meshinfer.cost.timeline import DeviceUse, TaskSpan, Timeline, TransferSpan, timeline
from meshinfer.cost.work import Work

__all__ = [
    "DeviceProfile",
    "DeviceUse",
    "OpKind",
    "TaskSpan",
    "Timeline",
    "TransferSpan",
    "Work",
    "field_work",
    "glued_to",
    "kind_of",
    "op_work",
    "seconds",
    "timeline",
    "variable_seconds",
]
