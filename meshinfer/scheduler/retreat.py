"""While links keep requests for longer than one device would take alone, it does all of each.

A link that loses packets, or that others use, is not what the plan was made by; to measure it and
plan anew takes seconds. A device that has prepared all tasks can take them at once. Now and then a
request goes by the plan, to see: a circuit breaker (Nygard, Release It!, 2007). What requests would
have taken there alone follows from when they came (Lindley 1952).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from meshinfer import limits
from meshinfer.scheduler.balance import Balance
from meshinfer.scheduler.catalogue import Deployment
from meshinfer.scheduler.events import Effect, Note
from meshinfer.scheduler.membership import Membership
from meshinfer.scheduler.request import Request, Try


@dataclass(slots=True)
class _State:
    """Of a deployment. ``by_plan``: the newest requests by the plan while all go by it: when each
    began, beside how many others, and what it took.

    ``to``: who does all of each, empty while nobody does; ``times``: how often what that device
    would take those took for which it was chosen. ``looked``: when a request went by the plan to
    see, ``look_at``: when the next one may; ``good``, ``vain``: how often in turn that was well, or
    not. ``alone``: how many times longer than expected requests took that one device did; ``pace``:
    what those came to.
    """

    by_plan: deque[tuple[float, int, float]] = field(
        default_factory=lambda: deque(maxlen=limits.RETREAT_REQUESTS)
    )
    to: str = ""
    times: float = 1.0
    looked: float = -1.0
    look_at: float = 0.0
    good: int = 0
    vain: int = 0
    alone: deque[float] = field(default_factory=lambda: deque(maxlen=limits.PACE_SAMPLES))
    pace: float = 1.0

    def retreat(self, name: str, times: float, now: float) -> None:
        self.to, self.times, self.good, self.look_at = name, times, 0, now + self.pause_s
        self.alone.clear()

    def advance(self) -> None:
        self.to = ""
        self.by_plan.clear()

    @property
    def pause_s(self) -> float:
        return limits.RETREAT_S * 2.0**self.vain


class Retreat:
    """Mutable: owned by the coordinator's core."""

    def __init__(self, members: Membership, balance: Balance) -> None:
        self._members, self._balance = members, balance
        self._states: dict[int, _State] = {}
        self._able: dict[int, tuple[tuple[int, int, int], dict[str, float]]] = {}

    def device(self, made: Deployment, now: float) -> str:
        """Who does all of a request that begins now; empty where each device does its own."""
        state = self._states.get(made.number)
        if state is None or not state.to:
            return ""
        if state.to not in self._seconds(made, now):  # it is lost, or says nothing
            state.advance()
        elif now >= state.look_at:
            state.looked, state.look_at = now, now + state.pause_s  # should it never be answered
            return ""
        return state.to

    def took(self, request: Request, tried: Try, now: float) -> list[Effect]:
        """A request has been answered. Of one that began anew, links are not to blame."""
        made, took_s = tried.deployment, now - tried.since
        if len(request.tried) > 1 or made.given or made.model.spread:
            return []
        state, seconds = self._states.setdefault(made.number, _State()), self._seconds(made, now)
        if state.to in seconds:
            alone_s = (tried.beside + 1) * seconds[state.to]
            if tried.all_by:
                return self._was_alone(made, state, took_s / alone_s)
            if tried.since == state.looked:
                return self._was_by_plan(made, state, took_s, alone_s, now)
        if state.to or tried.all_by or not seconds:
            return []
        state.by_plan.append((tried.since, tried.beside, took_s))
        name = min(seconds, key=lambda each: (seconds[each], each))
        alone = _alone(state.by_plan, seconds[name] * state.pace)
        late = [_late(took_s, alone_s) for took_s, alone_s in alone]
        if len(late) < limits.RETREAT_REQUESTS or not all(late):
            return []
        times = median(took_s / alone_s for took_s, alone_s in alone)
        state.retreat(name, times * state.pace, now)
        return [_note(made, "requests wait for links: one device does all of each", name, times)]

    def forget(self, made: Deployment) -> None:
        """It is retired."""
        self._states.pop(made.number, None)
        self._able.pop(made.number, None)

    # --- inside

    def _was_alone(self, made: Deployment, state: _State, times: float) -> list[Effect]:
        """One device has done all: back to the plan, if that takes as long."""
        state.alone.append(times)
        if len(state.alone) < limits.RETREAT_REQUESTS:
            return []
        state.pace = max(1.0, median(state.alone))
        if state.pace < state.times:
            return []
        return self._back(made, state)

    def _was_by_plan(
        self, made: Deployment, state: _State, took_s: float, alone_s: float, now: float
    ) -> list[Effect]:
        """One went by the plan, to see."""
        if _late(took_s, alone_s * state.pace):
            state.good, state.vain = 0, min(state.vain + 1, limits.RETREAT_DOUBLINGS)
            state.look_at = now + state.pause_s
            return []
        state.good, state.look_at = state.good + 1, now
        if state.good < limits.RETREAT_REQUESTS:
            return []
        state.vain = 0
        return self._back(made, state)

    def _back(self, made: Deployment, state: _State) -> list[Effect]:
        note = _note(made, "requests go by their plan again", state.to, state.pace)
        state.advance()
        return [note]

    def _seconds(self, made: Deployment, now: float) -> dict[str, float]:
        """Who could do all tasks now, and what they take there."""
        away, factor = self._members.presence.resting(now), self._balance.factor
        able = self._all_done(made).items()
        return {n: s * factor(n, now) / made.factors.get(n, 1.0) for n, s in able if n not in away}

    def _all_done(self, made: Deployment) -> dict[str, float]:
        """Of each device that has all tasks, or has prepared them: what they are expected to take.
        Nobody where tasks go to who is free, or where a device was lost: there is a plan soon."""
        spares = made.spares
        state = (len(spares.ready), len(made.members), id(made.expected))
        if made.number not in self._able or self._able[made.number][0] != state:
            found: dict[str, float] = {}
            several = len(made.programs) > 1 and not made.choices and not spares.moved
            for name in spares.ready & made.members.keys() if several else ():
                own = {p.place for p in made.programs.get(name, ())}
                tasks = [p for each in made.programs.values() for p in each if p.model is not None]
                if all(p.place in own or name in p.spares for p in tasks):
                    known = [made.seconds(p.place, name) for p in tasks]
                    found |= {} if None in known else {name: sum(s for s in known if s)}
            self._able[made.number] = (state, found)
        return self._able[made.number][1]


def _alone(
    requests: Iterable[tuple[float, int, float]], each_s: float
) -> list[tuple[float, float]]:
    """What requests took, and would have taken had one device done them in turn, those that ran
    beside the first one before it."""
    found: list[tuple[float, float]] = []
    free_at = 0.0
    for since, beside, took_s in sorted(requests):
        free_at = max(free_at, since) + each_s * (1 if found else 1 + beside)
        found.append((took_s, free_at - since))
    return found


def _late(took_s: float, alone_s: float) -> bool:
    return took_s > max(limits.RETREAT_TIMES * alone_s, alone_s + limits.LATE_S)


def _note(made: Deployment, text: str, name: str, times: float) -> Note:
    fields = {"model": made.model.name, "deployment": made.number, "device": name}
    return Note("info", text, {**fields, "times": round(times, 2)})
