"""A device that has become slow is left its tasks only until others would sooner be done with them.

Another plan takes seconds to find and to prepare, and each request as long as its slowest device.
Those that stand by for it have prepared its tasks: while each of them is sooner done with these
and its own than it is with its own, they do them, and it is tried (``trying``) until it recovers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from meshinfer.protocol import messages as m
from meshinfer.scheduler.balance import Balance
from meshinfer.scheduler.catalogue import Deployment
from meshinfer.scheduler.membership import Membership
from meshinfer.scheduler.standing_by import first_ready


class Leaving:
    """Mutable: owned by the coordinator's core."""

    def __init__(self, members: Membership, balance: Balance) -> None:
        self._members, self._balance = members, balance

    def tasks(
        self, made: Deployment, now: float, but: Collection[str] = ()
    ) -> dict[str, dict[m.Place, str]]:
        """Of each device that is left: who does its tasks in a request that begins now. ``but``:
        nobody of these, as they may be gone soon."""
        slow = self._balance.slow(made, now)
        if not slow:
            return {}
        away = {*self._members.presence.resting(now), *but}
        own = {name: self._own_s(made, name, now) for name in made.programs.keys() - slow.keys()}
        busy = {name: own.get(name, 0.0) for name in made.members}
        left: dict[str, dict[m.Place, str]] = {}
        for name in sorted(slow.keys() - away):
            takers = self._takers(made, name, away | slow.keys())
            more = self._more_s(made, takers, now)
            after = {n: _sum(busy.get(n, 0.0), seconds) for n, seconds in more.items()}
            until_s = self._planned_s(made, name) * slow[name]
            if takers and all(s is not None and s < until_s for s in after.values()):
                left[name] = takers
                busy |= after
        return left

    def _takers(self, made: Deployment, name: str, away: Collection[str]) -> dict[m.Place, str]:
        """Of all that a device has; none where nobody has prepared some of it, or where who does it
        is chosen for each request."""
        programs = made.programs[name]
        found = {p.place: first_ready(p, made.spares.ready, away) for p in programs}
        fixed = not found.keys() & made.choices.keys()
        return found if fixed and all(found.values()) else {}

    def _own_s(self, made: Deployment, name: str, now: float) -> float | None:
        places = [p.place for p in made.programs[name] if p.model is not None]
        return _sum(*(self._balance.seconds(made, place, name, now) for place in places))

    def _planned_s(self, made: Deployment, name: str) -> float:
        """What its tasks were planned to take; 0 where that is not known."""
        return _sum(*(made.seconds(p.place, name) for p in made.programs[name] if p.model)) or 0.0

    def _more_s(
        self, made: Deployment, takers: Mapping[m.Place, str], now: float
    ) -> dict[str, float | None]:
        """What takers have to do beside their own; None where that is not known."""
        computed = {p.place for each in made.programs.values() for p in each if p.model is not None}
        more: dict[str, float | None] = dict.fromkeys(takers.values(), 0.0)
        for place, taker in takers.items():
            if place in computed:
                more[taker] = _sum(more[taker], self._balance.seconds(made, place, taker, now))
        return more


def _sum(*seconds: float | None) -> float | None:
    """None where one of them is not known."""
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None
