"""For the loss of any one device, or two: which others prepare each task, within their memory.

The boxes stay those of the plan, so that what others have made already serves on. A task goes where
it is expected to be done first beside what that device does in the same stage anyway (Graham 1969).
The second device of each is the one that would do all tasks first, as far as it can: it may have to
(``scheduler/retreat``). Of those that have no task at all a few prepare one, to be timed by it
(``scheduler/trying``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshinfer import limits
from meshinfer.cost import DeviceProfile
from meshinfer.cost.model import seconds
from meshinfer.cost.spans import Boxes, Load, load_of
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.ops import is_random
from meshinfer.plan import Plan
from meshinfer.planner.pins import Pins
from meshinfer.transfers import TaskRef, derive

ALIKE = 1.05
"""Of devices that would be done within so much of the first one, the one that holds least."""

SECOND_BYTES = 64 << 20
"""What a device may hold at most to be the second that takes over: models that are small beside a
device's memory live through two losses at once."""

TIMED = 8
"""So many devices that have nothing else prepare a task to be timed by: each costs connections."""

TIMED_BYTES = 16 << 20
"""Of such a task at most."""


@dataclass(frozen=True, slots=True)
class Spares:
    """``devices``: those that prepare each task, should its own be lost, then the first of them.
    ``extra_bytes``: what a device holds for that beside its peak. ``notes``: for people."""

    devices: Mapping[TaskRef, tuple[DeviceId, ...]]
    extra_bytes: Mapping[DeviceId, int]
    notes: tuple[str, ...]


def find_spares(
    graph: Graph,
    plan: Plan,
    profiles: Sequence[DeviceProfile],
    pins: Pins,
    *,
    strict: bool = False,
    twice: bool = True,
) -> Spares:
    """Spare devices for a valid plan: for all tasks of a device, or for none of them.

    ``strict``: only devices of the same numeric class; ``twice``: two, for what is small. Tasks
    that several devices may take anyway need none.
    """
    search = _Search(graph, plan, profiles, pins, strict)
    why = {lost: search.cover(lost) for lost in plan.devices()}
    if twice:
        search.once_more()
        for lost in plan.devices():
            search.cover(lost)
        search.occupy()
    extra = {name: held.peak - search.first[name].peak for name, held in search.held.items()}
    extra = {name: nbytes for name, nbytes in extra.items() if nbytes}
    return Spares(search.found, extra, _notes(plan, why, extra))


@dataclass(slots=True)
class _Held:
    """What one device holds: boxes of weights, and the most bytes of values of one task."""

    weights: dict[int, int]
    values: int = 0

    def with_(self, load: Load) -> _Held:
        return _Held({**self.weights, **load.weights}, max(self.values, load.work.peak_bytes))

    @property
    def peak(self) -> int:
        return sum(self.weights.values()) + self.values


class _Search:
    """Mutable while spare devices are sought for one device after another."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        profiles: Sequence[DeviceProfile],
        pins: Pins,
        strict: bool,
    ) -> None:
        self.graph, self.plan, self.pins, self.strict = graph, plan, pins, strict
        self.known = {p.id: p for p in profiles}
        flow, numbers = derive(graph, plan), Boxes()
        self.loads = {ref: load_of(graph, f, numbers) for ref, f in flow.fields.items()}
        self.reads: dict[TaskRef, list[tuple[TaskRef, DeviceId, int]]] = defaultdict(list)
        for t in flow.transfers:
            nbytes = graph.nbytes(t.piece.value, t.piece.box)
            self.reads[t.consumer].append((t.producer, t.sender, nbytes))
        self.found: dict[TaskRef, tuple[DeviceId, ...]] = {}
        self.busy: dict[tuple[int, DeviceId], float] = {}
        self.held: dict[DeviceId, _Held] = {name: _Held({}) for name in self.known}
        for ref, load in self.loads.items():
            for device in self._devices(ref):
                self.held[device] = self.held.get(device, _Held({})).with_(load)
            first = self._devices(ref)[0]
            if first in self.known:
                key = (ref.stage, first)
                self.busy[key] = self.busy.get(key, 0.0) + seconds(load.work, self.known[first])
        self.weights = {number for load in self.loads.values() for number in load.weights}
        self.apart = not any(map(self._is_whole, self.held.values()))
        self.first = dict(self.held)
        self.most: dict[DeviceId, int] = {}
        self.one: DeviceId | None = None

    def once_more(self) -> None:
        """From now on a second spare device is sought for what has one."""
        self.most = {name: held.peak + SECOND_BYTES for name, held in self.held.items()}
        able = self._may_do_all()
        total = {p.id: sum(seconds(load.work, p) for load in self.loads.values()) for p in able}
        self.one = min(total, key=lambda name: (total[name], name), default=None)

    def _may_do_all(self) -> list[DeviceProfile]:
        """The devices that may have each task, and have room for all."""
        if self.apart:
            return []
        whole = _Held({})
        for load in self.loads.values():
            whole = whole.with_(load)
        most, peak = self.most, whole.peak
        able = [p for p in self.known.values() if peak <= most[p.id] and self._fits(whole, p)]
        for ref in self.loads:
            devices = self._devices(ref)
            may = {*devices, *self.found.get(ref, ())}
            may |= {p.id for p in self._options(ref, devices[0])}
            able = [p for p in able if p.id in may]
        return able

    def _devices(self, ref: TaskRef) -> tuple[DeviceId, ...]:
        return self.plan.stages[ref.stage].tasks[ref.task].devices

    def cover(self, lost: DeviceId) -> str:
        """Spare devices for all tasks of one; else why it has none, and nothing is changed."""
        refs = [ref for ref in self.loads if self._devices(ref) == (lost,)]
        if self.most and any(ref not in self.found for ref in refs):
            return "it has no first one"
        held, busy = dict(self.held), dict(self.busy)
        taken: dict[TaskRef, DeviceId] = {}
        for ref in refs:
            why = self._refusal(ref)
            options = [] if why else self._options(ref, lost)
            then = {p.id: held[p.id].with_(self.loads[ref]) for p in options}
            fitting = [p for p in options if self._fits(then[p.id], p)]
            if self.most:
                fitting = [p for p in fitting if then[p.id].peak <= self.most[p.id]]
            if self.apart:  # nobody gets the whole model while another can be the first
                some = [p for p in fitting if not self._is_whole(then[p.id])]
                fitting = some if some or self.most else fitting
            if not fitting:
                return why or ("no other has room" if options else "no other may take its tasks")
            done = {p.id: self._done(p, ref, taken, busy) for p in fitting}
            soon = (p for p in fitting if done[p.id] <= ALIKE * min(done.values()))
            best = min(soon, key=lambda p: (then[p.id].peak, p.id))
            best = next((p for p in fitting if p.id == self.one), best)
            key = (ref.stage, best.id)
            busy[key] = busy.get(key, 0.0) + seconds(self.loads[ref].work, best)
            held[best.id], taken[ref] = then[best.id], best.id
        self.held = held
        self.found |= {ref: (*self.found.get(ref, ()), name) for ref, name in taken.items()}
        return ""

    def occupy(self) -> None:
        """Some of those that have nothing prepare one task more than need be, if it is small: of
        those that last long enough to tell something, one that the fewest prepare."""
        then = {ref: _Held({}).with_(load) for ref, load in self.loads.items()}
        idle = [p for p in self.known.values() if p.able and self.held[p.id] == _Held({})]
        for p in idle:
            took = {
                ref: seconds(self.loads[ref].work, p)
                for ref in self.found
                if then[ref].peak <= TIMED_BYTES
                and self._fits(then[ref], p)
                and self._may_take(p, ref, self._devices(ref)[0])
            }
            long = min(limits.TRY_LEAST_S, max(took.values(), default=0.0))
            enough = [ref for ref in took if took[ref] >= long]
            if enough:
                few = {ref: len(self.found[ref]) for ref in enough}
                best = min(enough, key=lambda r: (few[r] < 2, few[r], then[r].peak, r))
                self.held[p.id] = then[best]
                self.found[best] = (*self.found[best], p.id)
            if sum(self.held[each.id] != _Held({}) for each in idle) == TIMED:
                break

    def _refusal(self, ref: TaskRef) -> str:
        stage = self.plan.stages[ref.stage]
        drawn = any(map(is_random, self.graph.ops[stage.start : stage.stop]))
        return "it draws random numbers, which must happen once" if drawn else ""

    def _options(self, ref: TaskRef, lost: DeviceId) -> list[DeviceProfile]:
        return [p for p in self.known.values() if self._may_take(p, ref, lost)]

    def _may_take(self, p: DeviceProfile, ref: TaskRef, lost: DeviceId) -> bool:
        if not p.able or p.id == lost or p.id in self.found.get(ref, ()):
            return False
        own = self.known.get(lost) if self.strict else None
        if own is not None and p.numeric_class != own.numeric_class:
            return False
        stage = self.plan.stages[ref.stage]
        allowed = self.pins.allowed(stage.start, stage.stop)
        return allowed is None or p.id in allowed

    def _is_whole(self, held: _Held) -> bool:
        return held.weights.keys() >= self.weights

    def _fits(self, held: _Held, p: DeviceProfile) -> bool:
        return not p.memory_bytes or held.peak <= limits.SPARES_ROOM * p.memory_bytes

    def _done(
        self,
        p: DeviceProfile,
        ref: TaskRef,
        taken: Mapping[TaskRef, DeviceId],
        busy: Mapping[tuple[int, DeviceId], float],
    ) -> float:
        """When a device would be done with a task, its inputs from elsewhere included."""
        reads = ((taken.get(producer, at), nbytes) for producer, at, nbytes in self.reads[ref])
        moved = sum(nbytes for at, nbytes in reads if at != p.id)
        wire = moved / max(p.bandwidth_bytes_per_s, 1e-9)
        return busy.get((ref.stage, p.id), 0.0) + seconds(self.loads[ref].work, p) + wire


def _notes(
    plan: Plan, why: Mapping[DeviceId, str], extra: Mapping[DeviceId, int]
) -> tuple[str, ...]:
    """What the loss of each device comes to, in few lines."""
    pinned = [d for d in why if any(t.devices == (d,) for s in plan.stages for t in s.tasks)]
    reasons = sorted({why[d] for d in pinned if why[d]})
    notes = [
        f"the loss of {', '.join(d for d in pinned if why[d] == reason)} takes a new plan: {reason}"
        for reason in reasons
    ]
    if any(not why[d] for d in pinned):
        most = max(extra, key=lambda name: extra[name], default=None)
        held = "nothing more" if most is None else f"at most {extra[most] / 1e6:.1f} MB, on {most}"
        who = "any one device" if not reasons else "any one other device"
        notes.append(f"{who} may be lost: its tasks are prepared elsewhere, which holds {held}")
    return tuple(notes)
