"""When everything of a plan happens: a device runs its tasks in order, a link one thing each way.

A list schedule over the derived transfers (Graham 1969): a task starts when its inputs are there
and its device is free; a message when it is ready and both links are. Links are full duplex
(switched Ethernet): a device may send one message and receive another at the same time. Devices on
one host share its link, and reach each other without it. Where a pair's own link is slower than
both ends, it carries one message each way beside what else the ends send. Messages take processors
as well: those of a task are part of it; source and sink see to theirs one by one, on the processor
of the device that computes on their host, if there is just one.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshinfer.cost.model import seconds
from meshinfer.cost.profile import DeviceProfile
from meshinfer.cost.spans import (
    Boxes,
    DeviceUse,
    Load,
    Message,
    TaskSpan,
    Timeline,
    TransferSpan,
    load_of,
)
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan
from meshinfer.transfers import Flow, TaskRef, derive

MESSAGE_BYTES = 256
"""Header of a message beside its tensors."""
KEPT = 0.25
"""What a byte that stays on its device costs, beside one that is sent: it is copied into the next
task's input. Measured 0.1 to 0.4 ns a byte against 1.3 to 1.5 ns, most of that for encryption."""


def timeline(
    graph: Graph, plan: Plan, profiles: Sequence[DeviceProfile], *, flow: Flow | None = None
) -> Timeline:
    """Predict a plan's course. A device without a profile holds data over a default link.

    A task with several devices runs on its first one, and holds its weights on all. With several
    requests in flight (``window``) it runs on each of them for its share of the requests, in
    proportion to speed, which ``devices`` and ``bottleneck_s`` (seconds between two answers) tell.
    A task on a device that cannot compute never ends: the total is infinite. ``flow``: what
    ``derive`` made of this plan, if it is at hand. The client is on the head's host.
    """
    flow = flow if flow is not None else derive(graph, plan)
    total: dict[tuple[TaskRef, TaskRef], tuple[int, int]] = {}
    for t in flow.transfers:
        key = (t.producer, t.consumer)
        nbytes, wire = total.get(key, (0, 0))
        nbytes += graph.nbytes(t.piece.value, t.piece.box)
        total[key] = (nbytes, wire + flow.wire_bytes(graph, t))
    numbers: Boxes = {}
    loads = {ref: load_of(graph, f, numbers) for ref, f in flow.fields.items()}
    return predict(plan, profiles, loads, [(*ends, *n) for ends, n in total.items()])


def predict(
    plan: Plan,
    profiles: Sequence[DeviceProfile],
    loads: Mapping[TaskRef, Load],
    messages: Sequence[Message],
    *,
    brief: bool = False,
) -> Timeline:
    """The timeline of tasks with these loads, in plan order, and these messages, in order of their
    consumers. ``brief``: without its transfers, and without what bounds it."""
    run = _Run(plan, {p.id: p for p in profiles}, loads, messages, brief)
    run.go()
    use = _uses(run)
    busy = [*(u.busy_s for u in use), *_busy_links(run, use), *run.busy_pairs()]
    run.stay_on_device()
    return Timeline(
        total_s=run.total_s,
        tasks=tuple(run.tasks),
        transfers=tuple(run.sent),
        devices=use,
        bound="" if brief else run.bound(),
        bottleneck_s=max(busy, default=0.0),
    )


def _busy_links(run: _Run, use: Sequence[DeviceUse]) -> list[float]:
    """Seconds that each host's link is busy for one request, the busier way."""
    out: dict[str, float] = {}
    into: dict[str, float] = {}
    for u in use:
        profile = run.profile(u.id)
        host, speed = _link(profile), max(profile.bandwidth_bytes_per_s, 1e-9)
        out[host] = out.get(host, 0.0) + u.bytes_sent / speed
        into[host] = into.get(host, 0.0) + u.bytes_received / speed
    return [max(out[host], into[host]) for host in out]


def _link(profile: DeviceProfile) -> str:
    """Whose link a device sends over: its host's, where that is known."""
    return f"host {profile.host}" if profile.host else f"device {profile.id}"


_Cause = tuple[str, float, "TaskRef | int | None"]
"""What is waited for: its name, its seconds, and what it waited for (a task, or a message)."""


@dataclass(slots=True)
class _Way:
    """From one device to another: no link if they are beside each other."""

    beside: bool
    sender: DeviceId
    receiver: DeviceId
    slow: DeviceId
    s_per_byte: float
    latency_s: float = 0.0
    out: str = ""
    into: str = ""
    pair_s_per_byte: float = 0.0


class _Run:
    """The schedule while it is made; times in seconds."""

    def __init__(
        self,
        plan: Plan,
        profiles: Mapping[DeviceId, DeviceProfile],
        loads: Mapping[TaskRef, Load],
        messages: Sequence[Message],
        brief: bool,
    ) -> None:
        self.plan, self.profiles, self.loads = plan, profiles, loads
        self.messages, self.brief = messages, brief
        self.source, self.sink = TaskRef(-1, 0), TaskRef(len(plan.stages), 0)
        self.tasks: list[TaskSpan] = []
        self.sent: list[TransferSpan] = []
        self.ready: dict[TaskRef, float] = {}
        self.cause: dict[TaskRef | int, _Cause] = {}
        self.late: dict[TaskRef, TaskRef | int | None] = {}
        self.where: dict[TaskRef, DeviceId] = {self.source: plan.source, self.sink: plan.sink}
        self.queues: dict[DeviceId, list[TaskRef]] = {}
        for ref in loads:
            device = plan.stages[ref.stage].tasks[ref.task].devices[0]
            self.where[ref] = device
            self.queues.setdefault(device, []).append(ref)
        self.ways: dict[tuple[DeviceId, DeviceId], _Way] = {}
        self.total_s = 0.0
        self.processors: dict[DeviceId, DeviceId] = {}
        self.ends_s: dict[DeviceId, float] = {}
        """Seconds that source and sink keep each processor busy, beside tasks."""

    def profile(self, device: DeviceId) -> DeviceProfile:
        return self.profiles.get(device) or DeviceProfile(device, 0.0, computes=False)

    def way(self, sender: DeviceId, receiver: DeviceId) -> _Way:
        known = self.ways.get((sender, receiver))
        if known is None:
            a, b = self.profile(sender), self.profile(receiver)
            slow = a if a.bandwidth_bytes_per_s <= b.bandwidth_bytes_per_s else b
            if a.beside(b):
                known = _Way(True, sender, receiver, slow.id, 0.0)
            else:
                pace = 1 / max(slow.bandwidth_bytes_per_s, 1e-9)
                late = max(a.latency_s, b.latency_s)
                known = _Way(False, sender, receiver, slow.id, pace, late, _link(a), _link(b))
                if a.links and (pair := a.link_to(b)) is not None:
                    known.latency_s = pair.latency_s or late
                    own = 1 / pair.bytes_per_s if pair.bytes_per_s else 0.0
                    known.pair_s_per_byte = own if own > pace else 0.0
            self.ways[sender, receiver] = known
        return known

    def go(self) -> None:
        self.outgoing: dict[TaskRef, list[int]] = {}
        self.missing: dict[TaskRef, int] = {}
        self.talk: dict[TaskRef, tuple[int, float]] = {}
        for i, (producer, consumer, nbytes, _) in enumerate(self.messages):
            self.outgoing.setdefault(producer, []).append(i)
            self.missing[consumer] = self.missing.get(consumer, 0) + 1
            sent = self.where[producer] != self.where[consumer]
            for ref in (producer, consumer) if sent else (consumer,):
                count, moved = self.talk.get(ref, (0, 0.0))
                self.talk[ref] = (count + sent, moved + nbytes * (1.0 if sent else KEPT))
        self.place = dict.fromkeys(self.queues, 0)
        self.free: dict[DeviceId, tuple[float, TaskRef | None]] = {}
        self.heap: list[tuple[float, int]] = []
        self.out: dict[str, tuple[float, int | None]] = {}
        self.into: dict[str, tuple[float, int | None]] = {}
        self.pairs: dict[tuple[DeviceId, DeviceId], float] = {}
        self._scatter()
        for device in self.queues:
            self._advance(device)
        while self.heap:
            ready, i = heapq.heappop(self.heap)
            self._send(i, ready)
        head = self.profile(self.plan.sink)
        last = head.request_s / 2 + head.report_s * len(self.tasks)
        self.total_s = self._occupy(self.plan.sink, self.ready.get(self.sink, 0.0), last)

    def _scatter(self) -> None:
        """The request reaches the source, which sends one message after another."""
        now = self._occupy(self.plan.source, 0.0, self.profile(self.plan.source).request_s / 2)
        for i in self.outgoing.get(self.source, ()):
            now = self._occupy(self.plan.source, now, self.toll(i, self.plan.source))
            heapq.heappush(self.heap, (now, i))

    def toll(self, i: int, device: DeviceId) -> float:
        """How long a message keeps the processor of this end, its sender or receiver, busy."""
        producer, consumer, nbytes, _ = self.messages[i]
        p = self.profile(device)
        if self.where[producer] == self.where[consumer]:
            return KEPT * nbytes * p.byte_s if consumer == self.sink else 0.0
        return p.message_s + nbytes * p.byte_s

    def processor(self, device: DeviceId) -> DeviceId:
        """Whose tasks wait while a source or sink sends or receives: those of the one device that
        computes on its host. Where several do, there is room for it beside them."""
        known = self.processors.get(device)
        if known is None:
            p = self.profile(device)
            near = [q.id for q in self.profiles.values() if q.able and q.beside(p)]
            known = self.processors[device] = near[0] if len(near) == 1 and not p.able else device
        return known

    def _occupy(self, end: DeviceId, ready: float, took: float) -> float:
        """Keep the processor of a source or sink busy for so long; when that is done."""
        if took <= 0.0:
            return ready
        name = self.processor(end)
        done = max(ready, self.free.get(name, (0.0, None))[0]) + took
        self.free[name] = (done, None)
        self.ends_s[name] = self.ends_s.get(name, 0.0) + took
        return done

    def _finish(self, ref: TaskRef, now: float) -> None:
        for i in self.outgoing.get(ref, ()):
            heapq.heappush(self.heap, (now, i))

    def _advance(self, device: DeviceId) -> None:
        """Run the tasks of a device, in order, whose inputs are all there."""
        queue = self.queues[device]
        while self.place[device] < len(queue):
            ref = queue[self.place[device]]
            if self.missing.get(ref, 0):
                return
            free, before = self.free.get(device, (0.0, None))
            there = self.ready.get(ref, 0.0)
            start = max(free, there)
            work = self.loads[ref].work
            took = self.seconds(ref, device)
            if not self.brief:
                waited = before if free > there else self.late.get(ref)
                self.cause[ref] = (f"compute of {device}", took, waited)
            self.tasks.append(TaskSpan(ref, device, start, start + took, work))
            self.free[device] = (start + took, ref)
            self.place[device] += 1
            self._finish(ref, start + took)

    def seconds(self, ref: TaskRef, device: DeviceId) -> float:
        """How long a task keeps a device busy, with its messages."""
        profile, (count, moved) = self.profile(device), self.talk.get(ref, (0, 0.0))
        talk = count * profile.message_s + moved * profile.byte_s
        return seconds(self.loads[ref].work, profile) + talk

    def _send(self, i: int, ready: float) -> None:
        producer, consumer, _, nbytes = self.messages[i]
        way = self.way(self.where[producer], self.where[consumer])
        if way.beside:
            end = ready + nbytes * way.s_per_byte
        else:
            t_out, m_out = self.out.get(way.out, (0.0, None))
            t_in, m_in = self.into.get(way.into, (0.0, None))
            start = max(ready, t_out, t_in)
            done = start + (nbytes + MESSAGE_BYTES) * way.s_per_byte
            end = done + way.latency_s
            if way.pair_s_per_byte:
                end = self._narrow(way, start, nbytes) + way.latency_s
            self.out[way.out] = self.into[way.into] = (done, i)
            if not self.brief:
                waited: TaskRef | int | None = producer
                slow, a, b = way.slow, way.sender, way.receiver
                if way.pair_s_per_byte:
                    slow = DeviceId(f"{a} to {b}")
                elif start > ready:
                    waited, slow = (m_out, a) if t_out >= t_in else (m_in, b)
                self.cause[i] = (f"link of {slow}", end - start, waited)
                self.sent.append(TransferSpan(producer, consumer, a, b, nbytes, start, end))
        if consumer == self.sink:
            end = self._occupy(self.plan.sink, end, self.toll(i, self.plan.sink))
        if end >= self.ready.get(consumer, 0.0):
            self.ready[consumer] = end
            self.late[consumer] = producer if way.beside else i
        self.missing[consumer] -= 1
        if not self.missing[consumer] and consumer != self.sink:
            self._advance(self.where[consumer])

    def _narrow(self, way: _Way, start: float, nbytes: int) -> float:
        """When a message has passed a pair's own slow link; the ends may send others meanwhile."""
        key = (way.sender, way.receiver)
        begin = max(start, self.pairs.get(key, 0.0))
        done = self.pairs[key] = begin + (nbytes + MESSAGE_BYTES) * way.pair_s_per_byte
        return done

    def busy_pairs(self) -> list[float]:
        """Seconds that each pair's own slow link is busy for one request."""
        busy: dict[tuple[DeviceId, DeviceId], float] = {}
        for producer, consumer, _, nbytes in self.messages if self.pairs else ():
            key = (self.where[producer], self.where[consumer])
            busy[key] = busy.get(key, 0.0) + nbytes * self.way(*key).pair_s_per_byte
        return list(busy.values())

    def stay_on_device(self) -> None:
        """One task on the head's host: for one request at a time, a client there runs it itself,
        without a message. A stream goes by messages, so what keeps devices busy stays as it is."""
        if len(self.tasks) != 1 or self.plan.window > 1:
            return
        (span,) = self.tasks
        if self.profile(span.device).beside(self.profile(self.plan.source)):
            self.total_s = seconds(span.work, self.profile(span.device))
            self.tasks = [TaskSpan(span.ref, span.device, 0.0, self.total_s, span.work)]
            self.ends_s.clear()

    def bound(self) -> str:
        """The largest share of the critical path, walked back from the sink."""
        shares: dict[str, float] = {}
        at: TaskRef | int | None = self.late.get(self.sink)
        while at is not None and at in self.cause:
            name, took, at = self.cause[at]
            shares[name] = shares.get(name, 0.0) + took
        for name, took in self.ends_s.items():
            shares[f"client and head on {name}"] = took
        if not shares:
            return "nothing"
        return min(shares, key=lambda name: (-shares[name], name))


def _uses(run: _Run) -> tuple[DeviceUse, ...]:
    weights: dict[DeviceId, dict[int, int]] = {}
    largest: dict[DeviceId, int] = {}
    busy: dict[DeviceId, float] = {}
    portions: dict[TaskRef, dict[DeviceId, float]] = {}
    for ref, load in run.loads.items():
        devices = run.plan.stages[ref.stage].tasks[ref.task].devices
        for device in devices:
            weights.setdefault(device, {}).update(load.weights)
            largest[device] = max(largest.get(device, 0), load.work.peak_bytes)
        if run.plan.window > 1 and len(devices) > 1:
            busy_s = run.ends_s if len(run.loads) == 1 else {}  # of whole requests
            portions[ref] = _portions(run, ref, devices, busy_s)
    for span in run.tasks:
        for device, portion in portions.get(span.ref, {span.device: 1.0}).items():
            took = span.end_s - span.start_s
            if device != span.device:
                took = run.seconds(span.ref, device)
            busy[device] = busy.get(device, 0.0) + (portion * took if portion else 0.0)
    for device, took in run.ends_s.items():
        busy[device] = busy.get(device, 0.0) + took
    out: dict[DeviceId, float] = {}
    into: dict[DeviceId, float] = {}
    for producer, consumer, _, nbytes in run.messages:
        a, b = run.where[producer], run.where[consumer]
        if producer not in portions and consumer not in portions:
            if not run.way(a, b).beside:
                out[a] = out.get(a, 0.0) + nbytes
                into[b] = into.get(b, 0.0) + nbytes
            continue
        for sender, one in portions.get(producer, {a: 1.0}).items():
            for receiver, other in portions.get(consumer, {b: 1.0}).items():
                if not run.way(sender, receiver).beside:
                    out[sender] = out.get(sender, 0.0) + nbytes * one * other
                    into[receiver] = into.get(receiver, 0.0) + nbytes * one * other
    uses = []
    for device in dict.fromkeys((run.plan.source, *run.plan.devices(), run.plan.sink)):
        held = sum(weights.get(device, {}).values())
        sent, received = round(out.get(device, 0)), round(into.get(device, 0))
        peak = held + largest.get(device, 0)
        uses.append(DeviceUse(device, busy.get(device, 0.0), sent, received, held, peak))
    return tuple(uses)


def _portions(
    run: _Run, ref: TaskRef, devices: Sequence[DeviceId], busy_s: Mapping[DeviceId, float]
) -> dict[DeviceId, float]:
    """The share of the requests for which each device runs a task, in proportion to its speed.

    ``busy_s``: what every request costs a device besides. It gets less, so that all are as busy.
    """
    speeds = {d: 1 / max(1e-9, run.seconds(ref, d)) for d in devices}
    total = sum(speeds.values())
    if not total:
        return {devices[0]: 1.0}
    level = (1 + sum(speeds[d] * busy_s.get(d, 0.0) for d in devices)) / total
    shares = {d: speeds[d] * max(0.0, level - busy_s.get(d, 0.0)) for d in devices}
    return {d: share / sum(shares.values()) for d, share in shares.items()}
