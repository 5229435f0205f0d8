"""How long something of a kind usually takes, and from when on it is late; of the newest samples.

Late is a multiple of a quantile. The 95th percentile is what Dean & Barroso take, The tail at scale
(2013); the median is not moved by the very faults that are looked for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from math import ceil
from typing import Generic, TypeVar

from meshinfer import limits

Kind = TypeVar("Kind", bound=Hashable)


class Usual(Generic[Kind]):
    """Mutable: owned by who notes samples. ``times``: so often the ``quantile`` is late."""

    def __init__(self, times: float, quantile: float) -> None:
        self._times, self._quantile = times, quantile
        self._took: OrderedDict[Kind, deque[float]] = OrderedDict()
        self._late_after: dict[Kind, float] = {}

    def note(self, kind: Kind, took_s: float) -> None:
        took = self._took.setdefault(kind, deque(maxlen=limits.LATE_SAMPLES))
        self._took.move_to_end(kind)
        took.append(took_s)
        if len(took) >= limits.PACE_SAMPLES:
            usual = sorted(took)[ceil(self._quantile * len(took)) - 1]
            self._late_after[kind] = max(self._times * usual, limits.LATE_S)
        if len(self._took) > limits.USUAL_KEPT:
            self.forget(next(iter(self._took)))

    def late_after_s(self, kind: Kind) -> float | None:
        """None before enough is known."""
        return self._late_after.get(kind)

    def forget(self, kind: Kind) -> None:
        self._took.pop(kind, None)
        self._late_after.pop(kind, None)
