"""Devices that the plan leaves out are tried now and then, and those whose tasks others do, as long
as these are slow or one does all: how fast they are is known of nobody whose tasks are not timed,
and a wrong or an old figure would leave them idle for ever.

Such a device runs a task that it has prepared anyway, on made-up inputs, while it has nothing else
to do, and tells what it took. To put it into a plan to see would slow all requests down.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.balance import Balance
from meshinfer.scheduler.catalogue import Catalogue, Deployment, Phase
from meshinfer.scheduler.computing import Computing
from meshinfer.scheduler.events import Array, Compute, Computed, Effect, Plane, Send
from meshinfer.scheduler.installing import Installing
from meshinfer.scheduler.leaving import Leaving
from meshinfer.scheduler.membership import Device, Membership
from meshinfer.scheduler.on_device import only_task
from meshinfer.scheduler.recipe import Recipe
from meshinfer.scheduler.replanning import disturbs
from meshinfer.scheduler.telling import told

_SINCE = 6
"""The protocol that has these messages."""


@dataclass(frozen=True, slots=True)
class _Open:
    """A device that was asked, as which peer, what, and when."""

    peer: str
    deployment: int
    place: m.Place
    since: float

    def is_for(self, peer: str, message: m.Tried) -> bool:
        said = (peer, message.deployment, message.place)
        return said == (self.peer, self.deployment, self.place)


class Tries:
    """The coordinator's half. Mutable: owned by its core. ``_asked``: requests of each deployment
    when it was looked at; ``_vain``: tries of a device that came to nothing in turn;
    ``_ended``: those that may have ended its process, each of which costs a plan; ``_spoilt``:
    deployments of which one may have."""

    def __init__(
        self, members: Membership, catalogue: Catalogue, balance: Balance, leaving: Leaving
    ) -> None:
        self._members, self._catalogue, self._balance = members, catalogue, balance
        self._leaving = leaving
        self._open: dict[str, _Open] = {}
        self._next: dict[str, float] = {}
        self._vain: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._asked: dict[int, int] = {}
        self._spoilt: set[int] = set()
        self._look_at = 0.0

    def begin(self, now: float) -> list[Effect]:
        """Ask those whose turn has come. Heartbeats come often enough, so no timer is needed."""
        if now < self._look_at:
            return []
        self._look_at = now + limits.HEARTBEAT_S
        self._give_up(now)
        known, here = self._asked, self._catalogue.deployments
        self._asked = {number: made.asked for number, made in here.items()}
        self._spoilt &= here.keys()
        asked = [made for number, made in here.items() if made.asked > known.get(number, 0)]
        busy = {name for made in asked for name in self._busy(made, now)}
        effects: list[Effect] = []
        for made in filter(self._may_change, asked):
            effects += self._ask(made, busy, now)
        return effects

    def _may_change(self, made: Deployment) -> bool:
        """Whether it serves, and another plan may take its place."""
        if made.phase is not Phase.READY or made.given or made.number in self._spoilt:
            return False
        return self._catalogue.serving(made.model, made.signature) is made

    def _ask(self, made: Deployment, busy: Collection[str], now: float) -> list[Effect]:
        """``busy``: who has tasks, of whatever model, is timed by these."""
        effects: list[Effect] = []
        timed = made.idle & made.spares.ready | self._left(made, now)
        if made.drift.by_one:
            timed |= made.programs.keys()
        may = timed & set(self._members.ready(now))
        for name in sorted(may.difference(busy, self._members.presence.away, self._open)):
            place = _task_for(made, name) if now >= self._next.get(name, 0.0) else None
            device = self._members.devices[name]
            if place is not None and device.hello.protocol[1] >= _SINCE:
                peer = device.peer
                self._open[name] = _Open(peer, made.number, place, now)
                word = m.Try(deployment=made.number, place=place)
                effects.append(Send(Plane.CONTROL, peer, word))
        return effects

    def _busy(self, made: Deployment, now: float) -> Collection[str]:
        """Who does tasks of it now."""
        if made.drift.by_one:
            return (made.drift.by_one,)
        return made.programs.keys() - self._left(made, now)

    def _left(self, made: Deployment, now: float) -> frozenset[str]:
        """Whose tasks others do; not where a client may do them beside the device itself."""
        return frozenset(self._leaving.tasks(made, now) if only_task(made) is None else ())

    def heard(self, device: Device, message: m.Tried, now: float) -> None:
        """What a task took, 0 where it could not be run; or one that nobody had asked for, which
        was done in vain."""
        asked = self._open.get(device.name)
        took, made = message.compute_s, self._catalogue.deployments.get(message.deployment)
        done = m.Done(place=message.place, compute_s=took, sent_bytes=0)
        if asked is None or not asked.is_for(device.peer, message):
            if made is not None and not disturbs(self._catalogue, self._members, device):
                self._balance.note(made, device.name, (done,), now)
            return
        del self._open[device.name]
        if not took or made is None:  # it has something to do, maybe, or it cannot at all
            self._vain[device.name] = times = self._vain.get(device.name, 0) + 1
            one = made is not None and made.drift.by_one
            pause_s = limits.TRY_SOON_S if one else limits.TRY_S
            pause_s *= 2 ** min(times - 1, limits.REPLAN_DOUBLINGS)
            self._next[device.name] = now + min(pause_s, limits.TRY_VAIN_S)
            return
        self._vain.pop(device.name, None)
        self._ended.pop(device.name, None)
        if disturbs(self._catalogue, self._members, device):
            self._next[device.name] = now + limits.TRY_SOON_S
            return
        self._balance.note(made, device.name, (done,), now)
        sure = self._balance.sure(device.name, now)
        pause_s = limits.TRY_S if sure else limits.TRY_SOON_S
        share = limits.TRY_SHARE if sure else limits.TRY_SHARE_SOON
        self._next[device.name] = now + max(pause_s, took / share)

    def _give_up(self, now: float) -> None:
        for name, asked in list(self._open.items()):
            device = self._members.devices.get(name)
            pause_s = limits.TRY_VAIN_S
            if device is None or device.peer != asked.peer:
                self._spoilt.add(asked.deployment)  # nobody else is to end of it
                self._ended[name] = times = self._ended.get(name, 0) + 1
                pause_s = min(pause_s * 4.0**times, limits.PACE_FORGOTTEN_MOST_S)
            elif now < asked.since + limits.TRY_VAIN_S:
                continue
            del self._open[name]
            self._next[name] = now + pause_s


def _task_for(made: Deployment, name: str) -> m.Place | None:
    """Of the tasks that a device has prepared, its own first: the shortest that is long enough to
    tell something, else the longest."""
    prepared = made.programs.get(name) or made.spare_programs(name)
    known = [(made.seconds(p.place, name), p.place) for p in prepared]
    timed = sorted((took, place) for took, place in known if took)
    enough = (place for took, place in timed if took >= limits.TRY_LEAST_S)
    return next(enough, timed[-1][1] if timed else None)


@dataclass(slots=True)
class _Running:
    """A task that is tried, time and again: what is run, since when, and what each run before has
    taken, with its way there and back: of a short task a quota ends mostly in between."""

    job: Compute
    since: float
    took: list[float] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return sum(self.took) >= limits.TRY_SPAN_S

    @property
    def lasting(self) -> float:
        """What a run takes once it has gone on for half of the time; 0 if it has not. A device
        with a quota has saved up some of it while it had nothing to do, and is as fast as if it
        had none until that is spent."""
        spans = zip(accumulate(self.took), self.took, strict=True)
        late = [took for until, took in spans if until - took >= limits.TRY_SPAN_S / 2]
        late = late or self.took[-1:] * self.over  # one run may be longer than all that
        return sum(late) / len(late) if late else 0.0


class Trying:
    """The device's half. Mutable: owned by a worker's core. ``_waiting``: a try that begins once a
    task of another device is prepared, which would have it seem much slower."""

    def __init__(self, computing: Computing, installing: Installing) -> None:
        self._computing, self._installing = computing, installing
        self._running: _Running | None = None
        self._waiting: m.Try | None = None

    @property
    def wanted(self) -> bool:
        """Whether a task is tried, or is to be."""
        return self._running is not None or self._waiting is not None

    def asked(self, message: m.Try, now: float) -> list[Effect]:
        """Run a task, unless there is something to do; not beside what is being prepared."""
        self._waiting = message if self._installing.preparing else None
        return [] if self._waiting is not None else self._begin(message, now)

    def prepared(self, now: float) -> list[Effect]:
        """Something is: what waited for that may begin."""
        message, self._waiting = self._waiting, None
        return [] if message is None else self.asked(message, now)

    def _begin(self, message: m.Try, now: float) -> list[Effect]:
        made = self._installing.deployments.get(message.deployment)
        recipe = None if made is None else made.recipes.get(message.place)
        inputs = None if recipe is None or recipe.program.model is None else made_up(recipe)
        if inputs is None or self._running is not None or not self._computing.free:
            return [_tried(message.deployment, message.place, 0.0)]
        job = Compute("", 0, message.deployment, message.place, inputs, again=True)
        self._running = _Running(job, now)
        return [job]

    def in_vain(self, deployment: int, event: Computed) -> list[Effect]:
        """A task of a request that was over by then, as of one so slow that others took over: what
        it took is known by nothing else."""
        took = max(event.compute_s, event.lasting_s)
        return [] if event.error is not None else [_tried(deployment, event.place, took)]

    def computed(self, event: Computed, now: float) -> list[Effect]:
        """Again, until it has run for long enough, or there is something to do."""
        running = self._running
        if running is None:
            return []
        running.took.append(max(event.compute_s, now - running.since))
        running.since = now
        if event.error is None and not running.over and self._computing.free:
            return [running.job]
        self._running = None
        took = 0.0 if event.error is not None else running.lasting
        return [_tried(running.job.deployment, running.job.place, took)]


def made_up(recipe: Recipe) -> dict[str, Array] | None:
    """Inputs of a task, of the right kind; None where that is known only when they come.

    Whole numbers are 1, by which one may divide; others are small, as what goes through a network.
    """
    found: dict[str, Array] = {}
    for value in recipe.program.inputs:
        box = value.box.box
        if not box.axes or not value.dtype:
            return None
        dtype = np.dtype(value.dtype)
        found[value.name] = np.full(box.shape, 0.5 if dtype.kind == "f" else 1, dtype)
    return found


def _tried(deployment: int, place: m.Place, took: float) -> Send:
    return told(m.Tried(deployment=deployment, place=place, compute_s=took))
