"""Devices that are members and say nothing: frozen, or cut off from the coordinator.

Of a request that takes longer than usual, those that owe it something are asked for a sign of life.
Who gives none gets no work until it is heard again, nor does who computes one task for longer than
the whole requests take that wait for it; what they owe goes to the devices that have prepared it.
Where the doubt was wrong, tasks are computed twice, and the first result wins.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Effect, Plane, Send
from meshinfer.scheduler.fallback import Fallback
from meshinfer.scheduler.membership import Device, Membership
from meshinfer.scheduler.opened import OpenRequests
from meshinfer.scheduler.poison import suspect_of
from meshinfer.scheduler.request import Request, Try
from meshinfer.scheduler.usual import Usual


class Silence:
    """Mutable: owned by the coordinator's core. ``open_`` is a view of the open requests."""

    def __init__(self, open_: OpenRequests, members: Membership, fallback: Fallback) -> None:
        self._open, self._members, self._fallback = open_, members, fallback
        self._usual: Usual[Hashable] = Usual(limits.DOUBT_TIMES, 0.5)
        self._late: Usual[Hashable] = Usual(limits.LATE_TIMES, 0.95)

    def took(self, tried: Try, now: float) -> None:
        """An attempt has been answered."""
        for usual in (self._usual, self._late):
            usual.note(tried.deployment.kind, now - tried.since)

    def doubt(self, now: float) -> list[Effect]:
        """Ask those that owe late requests, and go on without those that are away."""
        late = [r for r in self._open.running() if now >= self._due(r.tried[r.attempt])]
        effects = [*self._silent(now), *self._stuck(late, now)]
        self._starve(late, now)
        if effects or late:  # there may be spare devices meanwhile, or less doubt
            effects += self._fallback.go_on_without_away(now)
        for request in late:
            request.tried[request.attempt].doubted = now
            effects += self._ask(request, now)
        return effects

    def _silent(self, now: float) -> list[Effect]:
        """Devices that have not answered, or sent no heartbeat for so long."""
        presence = self._members.presence
        overdue = [d.name for d in self._members.overdue(now) if d.name not in presence.silent]
        for name in overdue:  # but borne with: the others are lost by now
            presence.falls_silent(name, now)
        names = overdue + presence.unanswered(now, len(self._members.devices))
        ids = (self._members.devices[name].ids for name in names)
        return [self._members.faults.note("warning", "a device says nothing", i) for i in ids]

    def _stuck(self, late: Iterable[Request], now: float) -> list[Effect]:
        """Devices that answer, and have computed one task for longer than whole requests of those
        that wait for them take, or several times as long as any of its plan."""
        effects: list[Effect] = []
        presence, devices = self._members.presence, self._members.devices
        for request in late:
            tried = request.tried[request.attempt]
            after = self._late.late_after_s(tried.deployment.kind) or math.inf
            for name in sorted(self._owe(tried) - presence.away):  # others are through
                device = devices.get(name)
                if device is None or now - device.heard > limits.DOUBT_AGAIN_S:
                    continue  # it may be through since it said so
                long = device.computing_s > after or suspect_of(self._open, device) is not None
                if long and presence.sticks(name, device.computing, len(devices)):
                    what = {"computing": device.computing, "seconds": device.computing_s}
                    note = self._members.faults.note
                    fields = {**device.ids, **what}
                    effects.append(note("warning", "a device is stuck in a task", fields))
        return effects

    def _starve(self, late: Iterable[Request], now: float) -> None:
        """Where all that owe a late request answer and compute nothing, they await messages: what
        is known of their links may be wrong."""
        for request in late:
            tried = request.tried[request.attempt]
            after = self._late.late_after_s(tried.deployment.kind)
            if after is None or now - tried.since <= after:
                continue
            here = [self._members.devices.get(name) for name in self._owe(tried)]
            idle = {d.name for d in here if d is not None and d.idle(now)}
            if len(idle) == len(here):
                self._members.presence.starved |= idle

    def _ask(self, request: Request, now: float) -> list[Effect]:
        """For a sign of life, of those that owe an attempt; who computes nothing may not have heard
        of it: TCP loses no word of ours, but somebody in between may, and CURVE does not notice."""
        owing = self._owe(request.tried[request.attempt])
        devices = (self._members.devices.get(name) for name in sorted(owing))
        asked = [d for d in devices if d is not None and self._members.presence.ask(d.name, now)]
        beat = m.Alive(beat_in_s=limits.BEAT_NOW_S)
        effects: list[Effect] = []
        for device in asked:
            if not device.computing:
                effects.append(Send(Plane.CONTROL, device.peer, request.start(again=True)))
            effects.append(Send(Plane.CONTROL, device.peer, beat))
        return effects

    def bears(self, device: Device, now: float) -> bool:
        """Whether a device without a heartbeat stays a member: others do its work meanwhile."""
        soon = now - device.heard <= limits.SILENT_MOST_S
        return soon and self._fallback.stands_in(device.name)

    def next_deadlines(self) -> list[float]:
        times = [self._due(r.tried[r.attempt]) for r in self._open.running()]
        return [*times, *self._members.presence.answers_due()]

    def tells_no_more(self, tried: Try) -> bool:
        """Whether whoever has not told of its tasks says nothing at all."""
        return self._owe(tried) <= self._members.presence.away

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
