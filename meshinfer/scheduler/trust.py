"""Whose results are believed: devices that computed the same task with other results, and who of
two that differ is wrong.

Two say nothing of who it is; one that differs from two others is wrong (one liar at a time). Where
that does not come about, the one that agreed less with others meanwhile, or is less known, works no
more, and is believed again should the other one prove wrong later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from meshinfer import limits


@dataclass(frozen=True, slots=True)
class Verdict:
    """``liar`` works no more, and why; ``proven``: by two others. ``cleared``: those that were
    taken for wrong, and were not."""

    liar: str
    why: str
    proven: bool
    cleared: tuple[str, ...] = ()


@dataclass(slots=True)
class _Pair:
    """Two devices that have differed: how often, and for how many checks more that is held against
    both. ``agreed``: the checks in which one of them agreed with a third since."""

    times: int = 0
    left: int = limits.DOUBT_CHECKS
    agreed: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Known:
    """Of a device: tasks that it did, and checks of them or by it that agreed."""

    tasks: int = 0
    agreed: int = 0


@dataclass(slots=True)
class Trust:
    """Mutable: owned by the coordinator's core. ``_kept_out``: those of whom it is not proven, and
    with whom they had differed."""

    _known: dict[str, _Known] = field(default_factory=dict)
    _pairs: dict[frozenset[str], _Pair] = field(default_factory=dict)
    _kept_out: dict[str, str] = field(default_factory=dict)

    def did(self, device: str, tasks: int = 1) -> None:
        """It has done tasks of a request that is answered."""
        self._of(device).tasks += tasks

    def share(self, device: str) -> float:
        """Of its tasks that are to be checked."""
        if self.rivals(device):
            return 1.0
        new = self._of(device).tasks <= limits.CHECK_NEW_TASKS
        return limits.CHECK_SHARE_NEW if new else limits.CHECK_SHARE

    def rivals(self, device: str) -> set[str]:
        """The devices that had other results than this one."""
        return {name for pair in self._pairs if device in pair for name in pair} - {device}

    def agree(self, one: str, other: str) -> None:
        for name in (one, other):
            self._of(name).agreed += 1
        for pair, doubt in list(self._pairs.items()):
            if pair & {one, other}:
                doubt.left -= 1
                if pair != {one, other}:
                    doubt.agreed.update(pair & {one, other})
                if not doubt.left:
                    del self._pairs[pair]

    def differ(self, one: str, other: str, joined: Mapping[str, float]) -> Verdict | None:
        """``joined``: since when each device that may work is here."""
        doubt = self._pairs.setdefault(frozenset((one, other)), _Pair())
        doubt.times, doubt.left = doubt.times + 1, limits.DOUBT_CHECKS
        most = sorted((one, other), key=lambda name: len(self.rivals(name)))
        others = self.rivals(most[1])
        if len(others) > len(self.rivals(most[0])):  # each has the other one, at least
            return self._proven(most[1], others)
        if len(joined.keys() - {one, other}) and doubt.times < limits.CHECKS_UNDECIDED:
            return None
        less, rival = sorted(
            (one, other),
            key=lambda n: (doubt.agreed[n], self._of(n).agreed, -joined.get(n, 0.0), n),
        )
        self._kept_out[less] = rival
        self._known.pop(less)
        why = f"its results differ from those of {rival}, which "
        why += (
            "others agree with" if doubt.agreed[rival] > doubt.agreed[less] else "is known better"
        )
        return Verdict(less, why, proven=False)

    def _proven(self, liar: str, others: set[str]) -> Verdict:
        cleared = tuple(sorted(n for n, rival in self._kept_out.items() if rival == liar))
        for name in (liar, *cleared):
            self._kept_out.pop(name, None)
        self._known.pop(liar, None)  # should it work again one day, it is new
        self._pairs = {pair: doubt for pair, doubt in self._pairs.items() if liar not in pair}
        why = f"its results differ from those of {' and '.join(sorted(others))}"
        return Verdict(liar, why, proven=True, cleared=cleared)

    def _of(self, device: str) -> _Known:
        return self._known.setdefault(device, _Known())
