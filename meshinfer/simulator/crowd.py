"""Many devices to which nothing happens, and what their coordinator hears, says and takes.

The cores, the codec and the plans are the real ones. Links have rates, a task takes what its plan
expects, and its results are zeros: no kernel runs, and nothing is held against an oracle.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np

from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Buffer, describe
from meshinfer.scheduler import events as e
from meshinfer.scheduler.coordinator import CoordinatorCore
from meshinfer.scheduler.enrolment import Door
from meshinfer.scheduler.ledger import TokenMade
from meshinfer.scheduler.worker import COORDINATOR
from meshinfer.simulator.kernels import Array
from meshinfer.simulator.node import Node, Timing
from meshinfer.simulator.world import World

HEAD, USER = "head", "ann"
HERE = frozenset((COORDINATOR, HEAD, USER))
"""Nodes on the coordinator's host: what they tell each other crosses no link."""
BYTES_PER_S = 125e6
LATENCY_S = 0.0003
BOARDS = (12e9, 25e9, 50e9)
"""FLOP/s of the kinds of devices, one after another."""
MEMORY_BYTES = 2 << 30

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0

Planned = tuple[e.ModelOpened | e.PlanReady, float]
Plans = Callable[[e.OpenModel | e.MakePlan], Planned]
"""Opens a model or makes a plan, and says how many seconds that took."""


@dataclass(slots=True)
class Meter:
    """Of the coordinator, by kinds of messages (and of other events): how many it heard and said,
    their bytes, and the seconds that it took over what it heard, with what it said to that.
    ``longest``: bytes of the longest that it said, ever."""

    heard: Counter[str] = field(default_factory=Counter)
    said: Counter[str] = field(default_factory=Counter)
    heard_bytes: Counter[str] = field(default_factory=Counter)
    said_bytes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)

    def took(self, kind: str, seconds: float) -> None:
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def copy(self) -> Meter:
        return Meter(
            Counter(self.heard),
            Counter(self.said),
            Counter(self.heard_bytes),
            Counter(self.said_bytes),
            dict(self.seconds),
            dict(self.longest),
        )

    def since(self, before: Meter) -> Meter:
        """What came since a copy was made."""
        return Meter(
            self.heard - before.heard,
            self.said - before.said,
            self.heard_bytes - before.heard_bytes,
            self.said_bytes - before.said_bytes,
            {kind: s - before.seconds.get(kind, 0.0) for kind, s in self.seconds.items()},
            dict(self.longest),
        )


class Metered(CoordinatorCore):
    """The coordinator's core. ``cpu``: seconds of processor time so far."""

    meter: Meter
    cpu: Callable[[], float]

    def handle(self, event: e.Event, now: float) -> list[e.Effect]:
        begun = self.cpu()
        effects = super().handle(event, now)
        self.meter.took(kind_of(event), self.cpu() - begun)
        return effects


def kind_of(event: e.Event) -> str:
    return type(event.message if isinstance(event, e.Arrived) else event).__name__


class Crowd(World):
    """So many devices, the head, and a user on the coordinator's host, all admitted beforehand.

    ``blob``: the bytes of what a plan names; ``warm``: devices have all of them on their disks.
    ``rate``: of each host's link, bytes/s each way; bulk messages queue for it at both ends.
    """

    def __init__(
        self,
        devices: int,
        plans: Plans,
        blob: Callable[[str], bytes],
        cpu: Callable[[], float],
        *,
        rate: float = BYTES_PER_S,
        tokens: tuple[TokenMade, ...] = (),
    ) -> None:
        self.devices = tuple(f"pi-{i:04}" for i in range(devices))
        self.meter, self.warm = Meter(), False
        self.link_bytes: Counter[str] = Counter()
        """Sent and received by each host over its link; ``here`` is the coordinator's."""
        self.fetched_bytes: Counter[str] = Counter()
        """Of blobs that each device was sent, or would have been."""
        self.between = 0
        """Messages that the coordinator neither said nor heard."""
        self.search_s = 0.0
        self._plans, self._blob, self._cpu, self._rate = plans, blob, cpu, rate
        self._current, self._drawn = "", 0.0
        self._free: dict[tuple[str, str], float] = {}
        self._queue: list[tuple[float, int, Node]] = []
        self._numbers = itertools.count()
        self._zeros: dict[tuple[int, ...], Array] = {}
        self._expected: dict[int, Mapping[tuple[m.Place, str], float]] = {}
        known = (*((name, "worker") for name in (HEAD, *self.devices)), (USER, "admin"))
        always = tuple(
            m.Admission(key=self.key_of(name), name=name, role=role)  # type: ignore[arg-type]
            for name, role in known
        )
        door = Door(1, always, tokens)
        super().__init__(Timing(LATENCY_S), lambda: LATENCY_S, now=1.0, door=door)
        self.join(HEAD, m.Facts(computes=False, head=True, host="h"))
        self.user = self.connect(USER, beside=True)

    def join_device(self, name: str) -> Node:
        number = self.devices.index(name) if name in self.devices else len(self.devices)
        kind = number % len(BOARDS)
        facts = m.Facts(
            host=name,
            cores=4,
            memory_bytes=MEMORY_BYTES,
            architecture="aarch64",
            processor=f"board {kind}",
            engine="onnxruntime neon",
            flops_per_s=BOARDS[kind],
            overhead_s=0.0018,
            message_s=0.0004,
            byte_s=5e-9,
        )
        return self.join(name, facts)

    def forget_blobs(self) -> None:
        """Devices' disks are empty; what they have prepared stays."""
        for name in self.nodes.keys() - HERE:
            self.nodes[name].blobs.clear()
        self.fetched_bytes.clear()

    def _coordinator(self, bulk: m.Peer) -> Node:
        self.ledger.starts += 1
        core = Metered("home", "0", bulk, self.door, deepcopy(self.ledger), self._chance)
        core.meter, core.cpu = self.meter, self._cpu
        return self._add(COORDINATOR, bulk.id, core)

    def _chance(self) -> float:
        """Evenly spread, so that as many tasks are checked as outside."""
        self._drawn = (self._drawn + _GOLDEN) % 1.0
        return self._drawn

    # --- what the user does

    def deploy(self, model: bytes, digest: str, objective: str) -> str:
        """Returns the call, and the model's name. The coordinator has its bytes already."""
        call = f"{objective}-{next(self._numbers)}"
        self.coordinator.blobs[digest] = model
        message = m.Deploy(
            call=call, name=call, digest=digest, nbytes=len(model), objective=objective
        )
        self._handle(self.user, e.Asked(call, message, 3600.0))
        return call

    def submit(self, model: str, arrays: Mapping[str, Array], body: str) -> str:
        """``body``: the digest of the arrays."""
        request = f"request-{next(self._numbers)}"
        header = m.Submit(
            request=request,
            model=model,
            version=None,
            inputs=tuple(describe(n, a) for n, a in arrays.items()),
            picture=False,
            deadline_s=300.0,
            body=body,
        )
        self._handle(self.user, e.Submitted(request, header, arrays))
        return request

    # --- the codec, metered at the coordinator

    def _encoded(self, sender: Node, send: e.Send) -> list[Buffer]:
        if sender.name != COORDINATOR:
            return super()._encoded(sender, send)
        begun = self._cpu()
        frames = super()._encoded(sender, send)
        self.meter.took(self._current, self._cpu() - begun)
        kind, nbytes = type(send.message).__name__, sum(map(len, frames))
        self.meter.said[kind] += 1
        self.meter.said_bytes[kind] += nbytes
        self.meter.longest[kind] = max(nbytes, self.meter.longest.get(kind, 0))
        return frames

    def _decoded(self, receiver: Node, frames: list[Buffer]) -> tuple[m.AnyMessage, memoryview]:
        begun = self._cpu()
        message, payload = super()._decoded(receiver, frames)
        if receiver.name == COORDINATOR:
            kind = type(message).__name__
            self.meter.took(kind, self._cpu() - begun)
            self.meter.heard[kind] += 1
            self.meter.heard_bytes[kind] += sum(map(len, frames))
        return message, payload

    def _handle(self, node: Node, event: e.Event, at_least: float = 0.0) -> None:
        if node.name == COORDINATOR:
            self._current = kind_of(event)
        super()._handle(node, event, at_least)
        if node in self._due:
            heapq.heappush(self._queue, (self._due[node], next(self._numbers), node))

    # --- links

    def _carry(
        self, sender: Node, receiver: Node, plane: e.Plane, frames: list[Buffer], what: e.Arrived
    ) -> None:
        """Bulk waits for both links; control is short, and passes between its packets."""
        self.between += COORDINATOR not in (sender.name, receiver.name)
        extra, ends = 0.0, [_host(sender), _host(receiver)]
        if ends[0] != ends[1]:
            nbytes = sum(map(len, frames))
            took = nbytes / self._rate
            for host in ends:
                self.link_bytes[host] += nbytes
            extra = took
            if plane is e.Plane.BULK:
                begins = self.now
                for end in zip(ends, ("out", "in"), strict=True):
                    begins = max(begins, self._free.get(end, 0.0))
                    self._free[end] = begins + took
                extra = begins + took - self.now
        self._deliver(sender, receiver, plane, what.message, what.payload, extra)

    def _receiver(self, sender: Node, send: e.Send) -> Node | None:
        """Each name has one process."""
        to_coordinator = send.peer == COORDINATOR and sender is not self.coordinator
        found = self.nodes[COORDINATOR if to_coordinator else send.peer.rpartition("#")[0]]
        return found if found.here else None

    def step(self) -> None:
        """As in a world without faults, where many have timers."""
        queue = self._queue
        while queue and self._due.get(queue[0][2]) != queue[0][0]:
            heapq.heappop(queue)
        due = queue[0][0] if queue else math.inf
        if self._events and self._events[0][0] <= due:
            at, _, receiver, event = heapq.heappop(self._events)
            self.now = max(self.now, at)
            self._handle(receiver, event)
            return
        _, _, node = heapq.heappop(queue)
        self.now = max(self.now, due)
        self._handle(node, e.Ticked(), node.due)

    def tell_story(self, line: Callable[[], str]) -> None:
        """Nobody listens."""

    # --- what shells do

    def _work(self, node: Node, effect: e.Effect) -> None:
        match effect:
            case e.FindBlobs(purpose, digests) if node.name not in HERE and self.warm:
                self.fetched_bytes[node.name] += sum(map(self._length, self._new(node, digests)))
                self.post(node, e.BlobsFound(purpose, ()), self.timing.disk_s)
            case _:
                super()._work(node, effect)

    def _new(self, node: Node, digests: tuple[str, ...]) -> list[str]:
        found = [digest for digest in digests if digest not in node.blobs]
        node.blobs.update(dict.fromkeys(found, b""))
        return found

    def _length(self, digest: str) -> int:
        return len(self.coordinator.blobs[digest])

    def _write(self, node: Node, effect: e.WriteBlob) -> None:
        """Only the last chunk matters, since nobody reads what was written."""
        self.fetched_bytes[node.name] += len(effect.data)
        if effect.offset + len(effect.data) >= effect.total:
            node.blobs[effect.digest] = b""
            self.post(node, e.BlobWritten(effect.digest, None), self.timing.disk_s)

    def _open(self, node: Node, effect: e.OpenModel) -> e.ModelOpened:
        opened, _ = self._plans(effect)
        assert isinstance(opened, e.ModelOpened) and opened.failure is None, opened
        return opened

    def _plan(self, node: Node, effect: e.MakePlan) -> e.PlanReady:
        ready, self.search_s = self._plans(effect)
        assert isinstance(ready, e.PlanReady)
        for programs in ready.programs.values():
            for program in programs:
                for digest in (*((program.model,) if program.model else ()), *program.weights):
                    if digest not in node.blobs:
                        node.blobs[digest] = self._blob(digest)
        self._expected[effect.deployment] = ready.expected
        return ready

    def _search_s(self) -> float:
        return self.search_s

    def _prepare(self, node: Node, effect: e.Prepare) -> e.Prepared:
        found = {p.place: p for p in effect.programs}
        node.prepared.setdefault(effect.deployment, {}).update(found)
        return e.Prepared(effect.deployment)

    def _seconds(self, node: Node, job: e.Compute) -> float:
        expected = self._expected[job.deployment]
        return expected.get((job.place, node.name), self.timing.compute_s)

    def _compute(self, node: Node, job: e.Compute, took: float) -> e.Computed:
        program = node.prepared[job.deployment][job.place]
        outputs = tuple(self._zero(o.shard.box.shape) for o in program.outputs)
        return e.Computed(job.request, job.attempt, job.place, outputs, took, again=job.again)

    def _zero(self, shape: tuple[int, ...]) -> Array:
        if shape not in self._zeros:
            self._zeros[shape] = np.zeros(shape, np.float32)
            self._zeros[shape].flags.writeable = False
        return self._zeros[shape]


def _host(node: Node) -> str:
    return "here" if node.name in HERE else node.name
