"""Tasks of several devices while they run: who takes one, second copies of late ones, and who takes
over from a device that is lost.

The first result wins. An assignment of an attempt only grows, so its order of arrival is no matter;
devices keep the inputs of such tasks until the request is released. Dean & Barroso, The tail at
scale (2013): a few second copies cut the tail, many make it.
"""

from __future__ import annotations

from collections.abc import Iterable

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.assigning import Seconds, assign, open_work
from meshinfer.scheduler.catalogue import Deployment
from meshinfer.scheduler.events import Effect, Note
from meshinfer.scheduler.fallback import tell
from meshinfer.scheduler.opened import OpenRequests
from meshinfer.scheduler.presence import Presence
from meshinfer.scheduler.request import Request, Try
from meshinfer.scheduler.usual import Usual


class Covering:
    """Mutable: owned by the coordinator's core. ``open_`` is a view of the open requests."""

    def __init__(self, open_: OpenRequests, presence: Presence) -> None:
        self._open = open_
        self._presence = presence
        self._usual: Usual[tuple[int, m.Place]] = Usual(limits.LATE_TIMES, 0.95)
        self._given = 0.0
        self._copies = 0.0

    # --- who takes what

    def begin(self, tried: Try, seconds: Seconds, now: float) -> None:
        """Assign the tasks of an attempt; devices that owe a late result come last."""
        made = tried.deployment
        if not made.choices:
            return
        busy = open_work((t for _, t in self._running() if t is not tried), seconds)
        chosen = assign(made, busy, seconds, self._avoided(made, now))
        tried.assigned = {place: (device,) for place, device in chosen.items()}
        self._given += len(chosen)
        if self._given > limits.COPIES_WINDOW:
            self._given, self._copies = self._given / 2, self._copies / 2

    def done(self, tried: Try, device: str, tasks: Iterable[m.Done], now: float) -> None:
        """A device has told of tasks: it is well, and this is how long such tasks take."""
        self._presence.well(device)
        for task in tasks:
            if task.place in tried.assigned and task.place not in tried.tasks:
                self._usual.note((tried.deployment.number, task.place), now - tried.since)

    def forget(self, made: Deployment) -> None:
        for place in made.choices:
            self._usual.forget((made.number, place))

    # --- late tasks

    def back_up(self, seconds: Seconds, now: float) -> list[Effect]:
        """Give late tasks to a second device each, within the bounds."""
        effects: list[Effect] = []
        for request, tried in self._running():
            late = [place for place, when in self._due(tried) if when <= now]
            if not late:
                continue
            made = tried.deployment
            for place in late:
                for device in tried.assigned[place]:
                    self._presence.suspect(device, now)
            avoided = self._avoided(made, now)
            here = {name for devices in made.choices.values() for name in devices}
            if 2 * len(avoided) > len(here & set(made.members)):
                continue  # it is not one device: copies would make it worse
            first = min(place[0] for place in late)  # later stages wait for it anyway
            wanted = [place for place in late if place[0] == first]
            effects += self._copy(request, tried, wanted, avoided, seconds, now)
        return effects

    def _copy(
        self,
        request: Request,
        tried: Try,
        places: Iterable[m.Place],
        avoided: frozenset[str],
        seconds: Seconds,
        now: float,
    ) -> list[Effect]:
        made = tried.deployment
        busy = open_work((t for _, t in self._running()), seconds)
        more = []
        for place in places:
            taken = (*avoided, *tried.assigned[place])
            others = [d for d in made.choices[place] if d in made.members and d not in taken]
            many = self._copies + 1 > limits.COPIES_SHARE * self._given
            if not others or (many and not self._presence.silent.issuperset(tried.assigned[place])):
                continue
            device = min(others, key=lambda d: busy.get(d, 0.0))
            busy[device] = busy.get(device, 0.0) + seconds(made, place, device)
            tried.assigned[place] += (device,)
            self._copies += 1
            more.append((place, device))
        if not more:
            return []
        fields = {"request": request.id, "tasks": str(more)}
        return [Note("info", "second copies of late tasks", fields), *tell(request, tried)]

    def _due(self, tried: Try) -> list[tuple[m.Place, float]]:
        """Tasks that are not done, of one copy or on silent devices alone, and when each is late;
        none of the former before enough is known."""
        found = []
        for place, devices in tried.assigned.items():
            if place in tried.tasks:
                continue
            after = self._usual.late_after_s((tried.deployment.number, place))
            if self._presence.silent.issuperset(devices):
                found.append((place, tried.since))
            elif after is not None and len(devices) < limits.COPIES:
                found.append((place, tried.since + after))
        return found

    def next_deadlines(self) -> list[float]:
        return [when for _, tried in self._running() for _, when in self._due(tried)]

    def _avoided(self, made: Deployment, now: float) -> frozenset[str]:
        return frozenset(name for name in self._presence.suspects(now) if name in made.members)

    # --- lost devices

    def lost(self, made: Deployment, name: str, seconds: Seconds) -> list[Effect]:
        """A device has left a deployment that goes on: what it had taken goes to others.

        That it was done with a task proves nothing: what it sent on may be lost with it.
        """
        effects: list[Effect] = []
        for request, tried in self._running():
            if tried.deployment is not made:
                continue
            taken = [place for place, devices in tried.assigned.items() if name in devices]
            if not taken:
                continue
            busy = open_work((t for _, t in self._running()), seconds)
            for place in taken:
                done = tried.tasks.get(place)
                if done is not None and done.device != name:
                    continue
                tried.tasks.pop(place, None)
                others = [d for d in made.choices[place] if d in made.members]
                device = min(others, key=lambda d: busy.get(d, 0.0))
                busy[device] = busy.get(device, 0.0) + seconds(made, place, device)
                if device not in tried.assigned[place]:
                    tried.assigned[place] += (device,)
            effects += tell(request, tried)
        return effects

    def _running(self) -> Iterable[tuple[Request, Try]]:
        return [(r, r.tried[r.attempt]) for r in self._open.running()]
