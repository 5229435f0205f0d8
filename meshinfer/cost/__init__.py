"""What a plan costs: device profiles, the cost of a task, the timeline of a plan. All predicted."""

from __future__ import annotations

from meshinfer.cost.alike import alike
from meshinfer.cost.kinds import OpKind, kind_of
from meshinfer.cost.model import field_work, glued_to, op_work, seconds, variable_seconds
from meshinfer.cost.profile import DeviceProfile, PairLink
from meshinfer.cost.spans import (
    Boxes,
    DeviceUse,
    Load,
    Message,
    TaskSpan,
    Timeline,
    TransferSpan,
    load_of,
)
from meshinfer.cost.timeline import predict, timeline
from meshinfer.cost.work import Work

__all__ = [
    "Boxes",
    "DeviceProfile",
    "DeviceUse",
    "Load",
    "Message",
    "OpKind",
    "PairLink",
    "TaskSpan",
    "Timeline",
    "TransferSpan",
    "Work",
    "alike",
    "field_work",
    "glued_to",
    "kind_of",
    "load_of",
    "op_work",
    "predict",
    "seconds",
    "timeline",
    "variable_seconds",
]
