"""While links keep requests for longer than one device would take alone, it does all of each.

A link that loses packets, or that others use, is not what the plan was made by; to measure it and
plan anew takes seconds. A device that has prepared all tasks can take them at once, and what waits
begins again there. Now and then a request goes by the plan, to see: a circuit breaker (Nygard,
Release It!, 2007). What requests would have taken there alone follows from when they came (Lindley
1952).
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from statistics import median_high

from meshinfer import limits
from meshinfer.scheduler.balance import Balance
from meshinfer.scheduler.catalogue import Deployment, Phase
from meshinfer.scheduler.events import Effect, Note
from meshinfer.scheduler.membership import Membership
from meshinfer.scheduler.request import Request, Try


@dataclass(frozen=True, slots=True)
class _Sample:
    """An attempt by the plan, so far at least: when it began, beside how many others, and when it
    was over; ``alone_s``: what one device takes for it, ``expected_s``: what the plan was to;
    ``busiest_s``: what the device computed that computed the longest."""

    since: float
    until: float
    beside: int
    alone_s: float
    expected_s: float
    busiest_s: float = 0.0

    @property
    def took_s(self) -> float:
        return self.until - self.since

    @property
    def beside_s(self) -> float:
        """What one device takes for it and for those that ran beside it."""
        return self.alone_s * (self.beside + 1)

    def late(self, alone_s: float) -> bool:
        """Whether it took much longer than so, and than the plan was expected to; and not since a
        device has become slow, which is to be seen, and planned for."""
        usual_s = max(alone_s, self.expected_s * (self.beside + 1))
        idle = self.took_s > 2 * self.busiest_s * (self.beside + 1)
        return idle and self.took_s > max(limits.RETREAT_TIMES * usual_s, usual_s + limits.LATE_S)


@dataclass(slots=True)
class _State:
    """Of what is deployed, by its plan of this ``number``. ``by_plan``: the newest attempts by the
    plan, while all go by it; ``answered``: when the last one was, by whom ever; ``computed``: when
    a device last said that it computes what goes by the plan, or what that may wait for.

    ``to``: who does all of each, empty while nobody does; ``waited_s``: what the longest of those
    took for which it was chosen, ``longest_s``: and what the plan may take by now. ``look_at``:
    when the next one may go by the plan, or the next device be chosen; ``probe``: the one that
    does; ``good``, ``vain``: how often in turn that was well, or not. ``alone``: what those took,
    each for itself, that the ``last`` device did all of.
    """

    number: int
    by_plan: deque[_Sample] = field(default_factory=lambda: deque(maxlen=limits.RETREAT_REQUESTS))
    answered: float = -math.inf
    computed: float = -math.inf
    to: str = ""
    longest_s: float = 0.0
    waited_s: float = 0.0
    look_at: float = 0.0
    probe: Try | None = None
    good: int = 0
    vain: int = 0
    last: str = ""
    alone: deque[float] = field(default_factory=lambda: deque(maxlen=limits.PACE_SAMPLES))

    def retreat(self, name: str, longest_s: float, now: float) -> None:
        self.to, self.good, self.probe = name, 0, None
        self.longest_s = self.waited_s = longest_s
        self.look_at = now + self._pause_s
        if name != self.last:
            self.last = name
            self.alone.clear()

    def looked(self, now: float, *, well: bool) -> None:
        """A request has gone by the plan, to see."""
        self.probe = None
        self.good = self.good + 1 if well else 0
        self.vain = self.vain if well else min(self.vain + 1, limits.RETREAT_DOUBLINGS)
        self.look_at = now if well else now + self._pause_s

    @property
    def _pause_s(self) -> float:
        return limits.RETREAT_S * 2.0**self.vain


class Retreat:
    """Mutable: owned by the coordinator's core."""

    def __init__(self, members: Membership, balance: Balance) -> None:
        self._members, self._balance = members, balance
        self._states: dict[Hashable, _State] = {}
        self._able: dict[int, tuple[tuple[int, int], object, dict[str, float]]] = {}

    def device(self, request: Request, tried: Try, now: float) -> str:
        """Who does all of an attempt that begins now; empty where each device does its own."""
        made = tried.deployment
        state = self._state(made, now) if _may(made) else None
        if state is None or not state.to:
            return ""
        if state.to not in self._seconds(made, now):  # it is lost, or says nothing
            self._advance(made, state)
            return ""
        if now < state.look_at:
            return state.to
        if state.probe is not None:  # it is not back yet
            state.looked(now, well=False)
            return state.to
        if len(request.tried) > 1:
            return state.to
        if request.deadline - now < 2 * state.longest_s:  # it may have become less, though
            state.longest_s, state.look_at = state.longest_s / 2, now + limits.RETREAT_S
            return state.to
        state.probe, state.look_at = tried, now + limits.RETREAT_S
        return ""

    def took(
        self, request: Request, tried: Try, now: float, *, answered: bool = True
    ) -> list[Effect]:
        """An attempt is over: it was answered, or its deadline is here. Of a request that began
        anew, links are not to blame."""
        made = tried.deployment
        if not _may(made):
            return []
        state = self._state(made, now)
        if state is None:
            return []
        state.answered = now if answered else state.answered
        if (len(request.tried) > 1 and not tried.all_by) or not self._is_here(tried, now):
            return []
        until = request.merged[0] if answered and request.merged else now
        sample = self._sample(made, state, tried, until, now)
        if sample is None:
            return []
        if state.to:
            if tried.all_by == state.to:
                state.alone.append(sample.took_s / (sample.beside + 1))
                if len(state.alone) > 1 and median_high(state.alone) > state.waited_s:
                    return self._back(made, state, now)  # its own link is worse
            elif tried is state.probe:
                state.looked(now, well=not sample.late(sample.beside_s))
            return self._back(made, state, now) if state.good >= limits.RETREAT_REQUESTS else []
        if tried.all_by:
            return []
        state.by_plan.append(sample)
        if now < state.look_at or not _all_late(state.by_plan):
            return []
        return self._begin(made, state, max(each.took_s for each in state.by_plan), now)

    def waits(self, running: Iterable[Request], now: float) -> tuple[list[Effect], list[Request]]:
        """What of that which runs by its plan is to begin again at one device: all of it, once
        nothing is computed there and nothing was answered for some time; and later what is late.
        Not if all just now were well: one piece is lost then, or one pair apart (``detours``)."""
        groups: dict[int, list[tuple[Request, Try]]] = defaultdict(list)
        for request in running:
            tried = request.tried[request.attempt]
            if len(request.tried) == 1 and not tried.all_by and _may(tried.deployment):
                groups[tried.deployment.number].append((request, tried))
        effects: list[Effect] = []
        again: list[Request] = []
        for group in groups.values():
            made = group[0][1].deployment
            state = self._state(made, now)
            if state is None:
                continue
            if self._computes(made, state, group, now):
                state.computed = now
            late = [(r, t) for r, t in group if self._waits(made, state, t, now)]
            if not late or now <= state.computed + limits.RETREAT_STALL_S / 2:
                continue
            if not state.to:
                just = (s for s in state.by_plan if s.until > now - limits.RETREAT_S)
                well = not any(s.late(s.beside_s) for s in just)
                last = max(state.answered, state.computed, state.look_at)
                if well or now <= last + limits.RETREAT_STALL_S:
                    continue
                longest_s = now - min(t.since for _, t in late)
                effects += self._begin(made, state, longest_s, now)
                late = group
            if any(t is state.probe for _, t in late):
                state.looked(now, well=False)
            again += [request for request, _ in late]
        return effects, again

    def stood_still(self, now: float) -> None:
        """The coordinator did: nobody is to blame."""
        for state in self._states.values():
            state.answered = now
            state.by_plan.clear()

    def forget(self, made: Deployment) -> None:
        """It is retired."""
        self._able.pop(made.number, None)
        state = self._states.get(made.kind)
        if state is not None and state.number == made.number:
            state.probe = None

    # --- inside

    def _state(self, made: Deployment, now: float) -> _State | None:
        """None of a plan that has been replaced. Where one device does all, it does so under a new
        plan, too, until that is seen to be well; the next request is to see."""
        if made.phase is not Phase.READY:
            return None
        state = self._states.setdefault(made.kind, _State(made.number))
        while len(self._states) > limits.PACES_KEPT:
            del self._states[next(iter(self._states))]
        if made.number < state.number:
            return None
        if made.number > state.number:
            state.number, state.probe, state.good, state.look_at = made.number, None, 0, now
            state.by_plan.clear()
            made.drift.by_one = state.to
        return state

    def _is_here(self, tried: Try, now: float) -> bool:
        """Whether the client of an attempt is heard, where it is source and sink itself: what a
        paused one does not hand on waits for no link."""
        heard = self._members.clients.get(tried.head, -math.inf)
        return not tried.head or now - heard <= limits.RETREAT_STALL_S

    def _waits(self, made: Deployment, state: _State, tried: Try, now: float) -> bool:
        """Whether an attempt by the plan is late, and has been for some time."""
        if now - tried.since <= limits.RETREAT_STALL_S or not self._is_here(tried, now):
            return False
        sample = self._sample(made, state, tried, now, now)
        return sample is not None and sample.late(sample.beside_s)

    def _computes(
        self, made: Deployment, state: _State, group: Iterable[tuple[Request, Try]], now: float
    ) -> bool:
        """Whether a device of the plan computes, as it said last: that may be what they wait for.
        Of who does, or would do, all only if it is one of these."""
        names = made.programs.keys() & self._members.devices.keys()
        computing = [d for d in map(self._members.devices.__getitem__, names) if d.computing]
        ids = {request.id for request, _ in group}
        if not computing or any(d.request in ids for d in computing):
            return bool(computing)
        first, _ = self._first(made, state, now)
        return any(d.name != first for d in computing)

    def _begin(self, made: Deployment, state: _State, longest_s: float, now: float) -> list[Effect]:
        """From now on one device does all."""
        state.retreat(self._first(made, state, now)[0], longest_s, now)
        self._members.presence.starved |= made.programs.keys()  # their links are in doubt
        made.drift.by_one = state.to
        fields = {**_ids(made), "device": state.to, "longest_s": round(longest_s, 3)}
        return [Note("info", "requests wait for links: one device does all of each", fields)]

    def _first(self, made: Deployment, state: _State, now: float) -> tuple[str, float]:
        """Who does, or would do, all, and what it takes there; an empty name where nobody can."""
        seconds = self._seconds(made, now)
        able = seconds.keys() & {state.to} if state.to else seconds.keys()
        name = min(able, key=lambda each: (seconds[each], each), default="")
        return name, seconds.get(name, 0.0)

    def _sample(
        self, made: Deployment, state: _State, tried: Try, until: float, now: float
    ) -> _Sample | None:
        """An attempt until then; None where nobody could do all of it. What the last device took
        for others, inputs and outputs included, it would take for this one."""
        name, alone_s = self._first(made, state, now)
        if not name:
            return None
        if name == state.last and len(state.alone) > 1:
            alone_s = max(alone_s, median_high(state.alone))
        expected_s = 0.0 if made.report is None else made.report.expected_s
        computed: dict[str, float] = defaultdict(float)
        for task in tried.tasks.values():
            computed[task.device] += task.compute_s
        busiest_s = max(computed.values(), default=0.0)
        return _Sample(tried.since, until, tried.beside, alone_s, expected_s, busiest_s)

    def _back(self, made: Deployment, state: _State, now: float) -> list[Effect]:
        """By the plan again: since it is well, or since it is the lesser evil for a while."""
        fields = {**_ids(made), "device": state.to}
        if state.good:
            state.vain = 0
        else:
            state.looked(now, well=False)
        self._advance(made, state)
        return [Note("info", "requests go by their plan again", fields)]

    def _advance(self, made: Deployment, state: _State) -> None:
        """By the plan again."""
        state.to, state.probe, made.drift.by_one = "", None, ""
        state.by_plan.clear()

    def _seconds(self, made: Deployment, now: float) -> dict[str, float]:
        """Who could do all tasks now, and what they take there."""
        away, factor = self._members.presence.resting(now), self._balance.factor
        able = self._all_done(made).items()
        return {n: s * factor(n, now) / made.factors.get(n, 1.0) for n, s in able if n not in away}

    def _all_done(self, made: Deployment) -> dict[str, float]:
        """Of each device that has all tasks, or has prepared them: what they are expected to take.
        Nobody where tasks go to who is free, or where a device was lost: there is a plan soon."""
        spares = made.spares
        state = (len(spares.ready), len(made.members))
        known = self._able.get(made.number)
        if known is None or known[0] != state or known[1] is not made.expected:
            tasks = {p.place: p for each in made.programs.values() for p in each if p.model}
            own = {n: {p.place for p in each if p.model} for n, each in made.programs.items()}
            several = sum(map(bool, own.values())) > 1 and not made.choices and not spares.moved
            found: dict[str, float] = {}
            for name in sorted(spares.ready & made.members.keys()) if several else ():
                mine = own.get(name, ())
                if all(place in mine or name in p.spares for place, p in tasks.items()):
                    took = [made.seconds(place, name) for place in tasks]
                    found |= {} if None in took else {name: sum(s for s in took if s)}
            self._able[made.number] = known = (state, made.expected, found)
        return known[2]


def _may(made: Deployment) -> bool:
    """Whether it serves, for latency, by a plan that nobody forced."""
    forced = made.given or made.model.spread or made.model.objective != "latency"
    return made.phase is Phase.READY and not made.alone and not forced


def _all_late(by_plan: Iterable[_Sample]) -> bool:
    """Whether all requests took much longer than on one device, where they would have been done in
    turn, and those that ran beside the first one before it. Not if they all ran at one moment,
    which may have been a bad one."""
    samples = sorted(by_plan, key=lambda sample: sample.since)
    ended = min((sample.until for sample in samples), default=0.0)
    if len(samples) < limits.RETREAT_REQUESTS or samples[-1].since < ended:
        return False
    free_at = samples[0].since + samples[0].beside * samples[0].alone_s
    for sample in samples:
        free_at = max(free_at, sample.since) + sample.alone_s
        if not sample.late(free_at - sample.since):
            return False
    return True


def _ids(made: Deployment) -> dict[str, object]:
    return {"model": made.model.name, "deployment": made.number}
