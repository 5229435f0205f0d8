"""What has changed since a plan was made: how far its devices have drifted apart, and their links.

Noted with its deployment; ``balance``, ``ages`` and ``replanning`` say what it means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from meshinfer.protocol import messages as m


@dataclass(slots=True)
class Drift:
    """``looked``: how many samples of paces there were when this was seen last; ``times``: by how
    much devices have drifted apart; ``uneven``: twice in turn too much; ``tried``: as much when a
    search failed. ``wanted_at``: since when another plan only waits for samples to agree, and
    whether it is ``grave``. ``adapted``: the plan itself was made from plans of before, when they
    had. ``by_one``: who does all (``retreat``), so that the others are to be tried. ``overtaken``:
    how many plans in turn were dropped on their way, as devices were no more what they are for.
    ``slow``: who is so slow that it may be left, and by how many times."""

    looked: int = 0
    times: float = 1.0
    uneven: bool = False
    tried: float = 1.0
    wanted_at: tuple[float, bool] | None = None
    adapted: bool = False
    by_one: str = ""
    overtaken: int = 0
    slow: Mapping[str, float] = field(default_factory=dict)

    def settled(self) -> Drift:
        """A search has found no better plan for devices as they are."""
        return replace(self, times=1.0, uneven=False, adapted=False, overtaken=0)


@dataclass(slots=True)
class Links:
    """``known``: the links that a plan was made by; ``changed``: how often each had become another
    by then; ``seen``: how often any was found to be better when this was looked at last;
    ``nearer``: one of a device that the plan leaves out is much better."""

    changed: Mapping[tuple[str, str], int] = field(default_factory=dict)
    seen: int = 0
    known: Mapping[tuple[str, str], m.Link] = field(default_factory=dict)
    nearer: bool = False
