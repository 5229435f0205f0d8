"""What a plan costs: device profiles, the cost of a task, the timeline of a plan. All predicted."""

from __future__ import annotations

from meshinfer.cost.model import Work, field_work, glued_to, seconds
from meshinfer.cost.profile import DeviceProfile
from meshinfer.cost.timeline import (
    Boxes,
    DeviceUse,
    Load,
    Message,
    TaskSpan,
    Timeline,
    TransferSpan,
    load_of,
    predict,
    timeline,
)

__all__ = [
    "Boxes",
    "DeviceProfile",
    "DeviceUse",
    "Load",
    "Message",
    "TaskSpan",
    "Timeline",
    "TransferSpan",
    "Work",
    "field_work",
    "glued_to",
    "load_of",
    "predict",
    "seconds",
    "timeline",
]
