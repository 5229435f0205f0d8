"""Devices that are members and say nothing: frozen, or cut off from the coordinator.

Of a request that takes longer than usual, those that owe it something are asked for a sign of life.
Who gives none gets no work until it is heard again, nor does who computes one task for longer than
whole requests take; what they owe goes to the devices that have prepared it. Where the doubt was
wrong, tasks are computed twice, and the first result wins.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Effect, Plane, Send
from meshinfer.scheduler.fallback import Fallback
from meshinfer.scheduler.membership import Device, Membership
from meshinfer.scheduler.request import Request, Try
from meshinfer.scheduler.usual import Usual


class Silence:
    """Mutable: owned by the coordinator's core. ``open_`` is a view of the open requests."""

    def __init__(
        self, open_: Mapping[str, Request], members: Membership, fallback: Fallback
    ) -> None:
        self._open, self._members, self._fallback = open_, members, fallback
        self._usual: Usual[Hashable] = Usual(limits.DOUBT_TIMES, 0.5)
        self._late: Usual[Hashable] = Usual(limits.LATE_TIMES, 0.95)

    def took(self, tried: Try, now: float) -> None:
        """An attempt has been answered."""
        for usual in (self._usual, self._late):
            usual.note(tried.deployment.kind, now - tried.since)

    def doubt(self, now: float) -> list[Effect]:
        """Ask those that owe late requests, and go on without those that did not answer."""
        effects: list[Effect] = []
        health = self._members.health
        overdue = [d.name for d in self._members.overdue(now) if d.name not in health.silent]
        for name in overdue:  # but borne with: the others are lost by now
            health.falls_silent(name, now)
        for name in overdue + health.unanswered(now, len(self._members.devices)):
            ids = self._members.devices[name].ids
            effects.append(self._members.faults.note("warning", "a device says nothing", ids))
        effects += self._stuck(now)
        if effects:
            effects += self._fallback.go_on_without_away(now)
        late = [tried for tried in self._running() if now >= self._due(tried)]
        for tried in late:
            tried.doubted = now
            for name in sorted(self._owe(tried)):
                device = self._members.devices.get(name)
                if device is not None and health.ask(name, now):
                    beat = m.Alive(beat_in_s=limits.BEAT_NOW_S)
                    effects.append(Send(Plane.CONTROL, device.peer, beat))
        if late and not effects:  # silent ones may have got spare devices meanwhile
            effects = self._fallback.go_on_without_away(now)
        return effects

    def _stuck(self, now: float) -> list[Effect]:
        """Devices that answer, but compute one task for longer than whole requests take."""
        effects: list[Effect] = []
        health, devices = self._members.health, self._members.devices
        for request in self._open.values():
            made = request.deployment
            after = None if made is None else self._late.late_after_s(made.kind)
            if made is None or after is None:
                continue
            for name in sorted(made.members):
                device = devices.get(name)
                if device is None or name in health.away or request.id not in device.computing:
                    continue
                computes_s = device.computing_s + now - device.heard
                if computes_s > after and health.sticks(name, device.computing, len(devices)):
                    fields = {**device.ids, "computing": device.computing, "seconds": computes_s}
                    note = self._members.faults.note
                    effects.append(note("warning", "a device is stuck in a task", fields))
        return effects

    def bears(self, device: Device, now: float) -> bool:
        """Whether a device without a heartbeat stays a member: others do its work meanwhile."""
        soon = now - device.heard <= limits.SILENT_MOST_S
        return soon and self._fallback.stands_in(device.name)

    def next_deadlines(self) -> list[float]:
        times = [self._due(tried) for tried in self._running()]
        return [*times, *self._members.health.answers_due()]

    def tells_no_more(self, tried: Try) -> bool:
        """Whether whoever has not told of its tasks says nothing at all."""
        return self._owe(tried) <= self._members.health.away

    # --- inside

    def _due(self, tried: Try) -> float:
        """When to ask, or to ask again."""
        after = self._usual.late_after_s(tried.deployment.kind)
        late = tried.since + (limits.DOUBT_FIRST_S if after is None else after)
        return late if tried.doubted is None else tried.doubted + limits.DOUBT_AGAIN_S

    def _owe(self, tried: Try) -> set[str]:
        """The devices whose tasks are not all told of."""
        made, told = tried.deployment, tried.tasks.keys() | tried.untold
        found = {name for place, name in tried.moved.items() if place not in told}
        for name, programs in made.programs.items():
            own = {p.place for p in programs if p.model is not None and not p.free}
            found |= {name} if own - told - tried.moved.keys() else set()
        for place, names in tried.assigned.items():
            found |= set() if place in told else set(names)
        return found

    def _running(self) -> list[Try]:
        return [r.tried[r.attempt] for r in self._open.values() if r.runs]
