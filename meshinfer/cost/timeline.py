"""When everything of a plan happens: a device runs its tasks in order, a link one thing each way.

A list schedule over the derived transfers (Graham 1969): a task starts when its inputs are there
and its device is free; a message when it is ready and both links are. Links are full duplex
(switched Ethernet): a device may send one message and receive another at the same time. Devices on
one host share its link, and reach each other without it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshinfer.cost.model import Work, field_work, seconds
from meshinfer.cost.profile import DeviceProfile
from meshinfer.geometry import Box
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan
from meshinfer.transfers import Flow, TaskRef, derive

MESSAGE_BYTES = 256
"""Header of a message beside its tensors."""
BESIDE_BYTES_PER_S = 500e6
"""Between two processes on one machine, encryption included. An assumption."""


@dataclass(frozen=True, slots=True)
class TaskSpan:
    """One task on its device, in seconds from the arrival of the request."""

    ref: TaskRef
    device: DeviceId
    start_s: float
    end_s: float
    work: Work


@dataclass(frozen=True, slots=True)
class TransferSpan:
    """All that one task gives another, in one message; ``end_s``: its arrival, latency included."""

    producer: TaskRef
    consumer: TaskRef
    sender: DeviceId
    receiver: DeviceId
    nbytes: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What one device does for one request, on average where requests go to different devices.

    ``peak_bytes``: its weights for the whole plan and the values of its largest task.
    """

    id: DeviceId
    busy_s: float
    bytes_sent: int
    bytes_received: int
    weight_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """A plan's predicted course. ``bound``: what takes most of its critical path, in words."""

    total_s: float
    tasks: tuple[TaskSpan, ...]
    transfers: tuple[TransferSpan, ...]
    devices: tuple[DeviceUse, ...]
    bound: str
    bottleneck_s: float

    def use(self, device: DeviceId) -> DeviceUse:
        """What this device does; nothing, if it is not in the plan."""
        for found in self.devices:
            if found.id == device:
                return found
        return DeviceUse(device, 0.0, 0, 0, 0, 0)


def timeline(
    graph: Graph,
    plan: Plan,
    profiles: Sequence[DeviceProfile],
    *,
    flow: Flow | None = None,
    works: Mapping[TaskRef, Work] | None = None,
) -> Timeline:
    """Predict a plan's course. A device without a profile holds data over a default link.

    A task with several devices runs on its first one, and holds its weights on all. With several
    requests in flight (``window``) it runs on each of them for its share of the requests, in
    proportion to speed, which ``devices`` and ``bottleneck_s`` (seconds between two answers) tell. A
    task on a device that cannot compute never ends: the total is infinite. ``flow``: what
    ``derive`` made of this plan, ``works``: what its fields take, if they are at hand.
    """
    flow = flow if flow is not None else derive(graph, plan)
    run = _Run(flow, {p.id: p for p in profiles}, _messages(graph, flow))
    run.works = works or {ref: field_work(graph, f) for ref, f in flow.fields.items()}
    run.go()
    use = _uses(graph, flow, run)
    return Timeline(
        total_s=run.ready.get(flow.sink, 0.0),
        tasks=tuple(run.tasks),
        transfers=tuple(run.sent),
        devices=use,
        bound=run.bound(),
        bottleneck_s=max([*(u.busy_s for u in use), *_busy_links(run, use)], default=0.0),
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


_Message = tuple[TaskRef, TaskRef, int]


def _messages(graph: Graph, flow: Flow) -> list[_Message]:
    """(producer, consumer, bytes), one for each pair of tasks, in plan order."""
    total: dict[tuple[TaskRef, TaskRef], int] = {}
    for t in flow.transfers:
        key = (t.producer, t.consumer)
        total[key] = total.get(key, 0) + graph.nbytes(t.piece.value, t.piece.box)
    return [(a, b, n) for (a, b), n in total.items()]


_Cause = tuple[str, float, "TaskRef | int | None"]
"""What is waited for: its name, its seconds, and what it waited for (a task, or a message)."""


@dataclass
class _Run:
    """The schedule while it is made; times in seconds."""

    flow: Flow
    profiles: Mapping[DeviceId, DeviceProfile]
    messages: list[_Message]
    works: Mapping[TaskRef, Work] = field(default_factory=dict)
    tasks: list[TaskSpan] = field(default_factory=list)
    sent: list[TransferSpan] = field(default_factory=list)
    ready: dict[TaskRef, float] = field(default_factory=dict)
    cause: dict[TaskRef | int, _Cause] = field(default_factory=dict)
    late: dict[TaskRef, TaskRef | int | None] = field(default_factory=dict)

    def profile(self, device: DeviceId) -> DeviceProfile:
        return self.profiles.get(device) or DeviceProfile(device, 0.0, computes=False)

    def go(self) -> None:
        self.outgoing: dict[TaskRef, list[int]] = {}
        self.missing: dict[TaskRef, int] = {}
        for i, (producer, consumer, _) in enumerate(self.messages):
            self.outgoing.setdefault(producer, []).append(i)
            self.missing[consumer] = self.missing.get(consumer, 0) + 1
        self.queues: dict[DeviceId, list[TaskRef]] = {}
        for ref in self.flow.fields:
            self.queues.setdefault(self.flow.device(ref), []).append(ref)
        self.place = dict.fromkeys(self.queues, 0)
        self.free: dict[DeviceId, tuple[float, TaskRef | None]] = {}
        self.heap: list[tuple[float, int]] = []
        links: dict[tuple[str, str], tuple[float, int | None]] = {}
        self._finish(self.flow.source, 0.0)
        for device in self.queues:
            self._advance(device)
        while self.heap:
            ready, i = heapq.heappop(self.heap)
            self._send(i, ready, links)

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
            took = seconds(self.works[ref], self.profile(device))
            waited = before if free > there else self.late.get(ref)
            self.cause[ref] = (f"compute of {device}", took, waited)
            self.tasks.append(TaskSpan(ref, device, start, start + took, self.works[ref]))
            self.free[device] = (start + took, ref)
            self.place[device] += 1
            self._finish(ref, start + took)

    def _send(
        self, i: int, ready: float, links: dict[tuple[str, str], tuple[float, int | None]]
    ) -> None:
        producer, consumer, nbytes = self.messages[i]
        sender, receiver = self.flow.device(producer), self.flow.device(consumer)
        a, b = self.profile(sender), self.profile(receiver)
        end = ready
        if a.beside(b):
            end += 0.0 if sender == receiver else nbytes / BESIDE_BYTES_PER_S
        else:
            out, into = (_link(a), "out"), (_link(b), "in")
            (t_out, m_out), (t_in, m_in) = links.get(out, (0.0, None)), links.get(into, (0.0, None))
            start = max(ready, t_out, t_in)
            slow = a if a.bandwidth_bytes_per_s <= b.bandwidth_bytes_per_s else b
            busy = (nbytes + MESSAGE_BYTES) / max(slow.bandwidth_bytes_per_s, 1e-9)
            end = start + busy + max(a.latency_s, b.latency_s)
            waited: TaskRef | int | None = producer
            if start > ready:
                waited, slow = (m_out, a) if t_out >= t_in else (m_in, b)
            links[out] = links[into] = (start + busy, i)
            self.cause[i] = (f"link of {slow.id}", end - start, waited)
            self.sent.append(TransferSpan(producer, consumer, sender, receiver, nbytes, start, end))
        if end >= self.ready.get(consumer, 0.0):
            self.ready[consumer] = end
            self.late[consumer] = producer if a.beside(b) else i
        self.missing[consumer] -= 1
        if not self.missing[consumer] and consumer != self.flow.sink:
            self._advance(receiver)

    def bound(self) -> str:
        """The largest share of the critical path, walked back from the sink."""
        shares: dict[str, float] = {}
        at: TaskRef | int | None = self.late.get(self.flow.sink)
        while at is not None and at in self.cause:
            name, took, at = self.cause[at]
            shares[name] = shares.get(name, 0.0) + took
        if not shares:
            return "nothing"
        return min(shares, key=lambda name: (-shares[name], name))


def _uses(graph: Graph, flow: Flow, run: _Run) -> tuple[DeviceUse, ...]:
    weights: dict[DeviceId, dict[tuple[str, Box], int]] = {}
    largest: dict[DeviceId, int] = {}
    busy: dict[DeviceId, float] = {}
    portions = {ref: _portions(flow, run, ref) for ref in (*flow.fields, flow.source, flow.sink)}
    for ref, found in flow.fields.items():
        for device in flow.plan.stages[ref.stage].tasks[ref.task].devices:
            held = weights.setdefault(device, {})
            for name in found.weights:
                held[name, found.needs[name]] = graph.nbytes(name, found.needs[name])
            largest[device] = max(largest.get(device, 0), run.works[ref].peak_bytes)
        for device, portion in portions[ref].items():
            took = seconds(run.works[ref], run.profile(device)) if portion else 0.0
            busy[device] = busy.get(device, 0.0) + portion * took
    out: dict[DeviceId, float] = {}
    into: dict[DeviceId, float] = {}
    for producer, consumer, nbytes in run.messages:
        for sender, one in portions[producer].items():
            for receiver, other in portions[consumer].items():
                if not run.profile(sender).beside(run.profile(receiver)):
                    out[sender] = out.get(sender, 0.0) + nbytes * one * other
                    into[receiver] = into.get(receiver, 0.0) + nbytes * one * other
    names = dict.fromkeys((flow.plan.source, *flow.plan.devices(), flow.plan.sink))
    uses = []
    for device in names:
        total = sum(weights.get(device, {}).values())
        uses.append(
            DeviceUse(
                device,
                busy.get(device, 0.0),
                round(out.get(device, 0)),
                round(into.get(device, 0)),
                total,
                total + largest.get(device, 0),
            )
        )
    return tuple(uses)


def _portions(flow: Flow, run: _Run, ref: TaskRef) -> dict[DeviceId, float]:
    """The share of the requests for which each device runs a task, in proportion to its speed."""
    if ref not in flow.fields:
        return {flow.device(ref): 1.0}
    devices = flow.plan.stages[ref.stage].tasks[ref.task].devices
    if flow.plan.window == 1 or len(devices) == 1:
        return {devices[0]: 1.0}
    speeds = {d: 1 / max(1e-9, seconds(run.works[ref], run.profile(d))) for d in devices}
    total = sum(speeds.values())
    return {d: speed / total for d, speed in speeds.items()} if total else {devices[0]: 1.0}
