"""From a graph and the devices' profiles to the plan that is expected to be best, with the reasons.

Coarse searches propose, the timeline decides: the plan on the best single device is always among
the finalists, and several must be expected to gain more on it than predictions err. Nothing here
is random.
"""

from __future__ import annotations

from meshinfer.planner.axes import Axes, axes_of
from meshinfer.planner.bands import Block, build
from meshinfer.planner.choose import (
    ADAPTED,
    OBJECTIVES,
    Layout,
    Planned,
    adapt_plan,
    make_plan,
    pins_of,
    refuse_pinned,
)
from meshinfer.planner.spares import Spares, find_spares

__all__ = [
    "ADAPTED",
    "OBJECTIVES",
    "Axes",
    "Block",
    "Layout",
    "Planned",
    "Spares",
    "adapt_plan",
    "axes_of",
    "build",
    "find_spares",
    "make_plan",
    "pins_of",
    "refuse_pinned",
]
