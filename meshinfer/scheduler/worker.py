"""The worker's core: joins, installs programs, gathers pieces, computes, sends pieces on.

Data drives it: a task runs when its last piece is here. The device at the coordinator (the *head*)
is this same core without an engine; it is the source and the sink of requests.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.mapreduce import reduce, scatter
from meshinfer.plan import Shard
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, array_of, describe, payload_of
from meshinfer.scheduler.events import (
    Array,
    Arrived,
    BlobsFound,
    BlobWritten,
    Compute,
    Computed,
    Connect,
    Discard,
    Effect,
    Event,
    FindBlobs,
    Note,
    PeerLost,
    Plane,
    Prepare,
    Prepared,
    Send,
    ServeBlob,
    Stop,
    StopRequested,
    Ticked,
)
from meshinfer.scheduler.outbox import Outbox
from meshinfer.scheduler.puller import Puller

COORDINATOR = "coordinator"
"""Name of the control connection to the coordinator."""

SOURCE: m.Place = (-1, 0)


@dataclass(slots=True)
class _Deployment:
    programs: dict[m.Place, m.Program]
    peers: dict[str, str]
    missing: set[str] = field(default_factory=set)
    ready: bool = False


@dataclass(slots=True)
class _Request:
    """One request on this device, under its newest attempt."""

    since: float
    attempt: int = 0
    deployment: int = -1
    client: str = ""
    fed: dict[str, Array] = field(default_factory=dict)
    scattered: bool = False
    pieces: dict[m.Place, dict[Shard, Array]] = field(default_factory=dict)
    begun: set[m.Place] = field(default_factory=set)

    def renew(self, attempt: int, deployment: int) -> None:
        """Start over under a newer attempt; what the client fed stays."""
        self.attempt, self.deployment, self.scattered = attempt, deployment, False
        self.pieces.clear()
        self.begun.clear()


class WorkerCore:
    """``handle`` is the only gate; ``next_deadline`` says when to tick."""

    def __init__(self, hello: m.Hello) -> None:
        self.hello = hello
        self.device = hello.device
        self.joined = False
        self._coordinator: m.Peer | None = None
        self._deployments: dict[int, _Deployment] = {}
        self._requests: dict[str, _Request] = {}
        self._released: OrderedDict[str, None] = OrderedDict()
        self._queue: list[Compute] = []
        self._running: tuple[Compute, float] | None = None
        self._outbox = Outbox()
        self._puller = Puller()
        self._hello_due = 0.0
        self._beat_due = 0.0
        self._stop_due: float | None = None

    # --- the gate

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Arrived():
                return self._arrived(event, now)
            case Ticked():
                return self._tick(now)
            case Computed():
                return self._computed(event, now)
            case Prepared():
                return self._prepared(event)
            case BlobsFound():
                return self._found(event, now)
            case BlobWritten():
                return self._written(event, now)
            case PeerLost():
                return self._lost(event, now)
            case StopRequested():
                return self._stop(now)
            case _:
                raise AssertionError(f"a worker has no use for {event}")

    def next_deadline(self) -> float:
        times = [self._beat_due if self.joined else self._hello_due]
        for other in (self._outbox.next_deadline(), self._puller.next_deadline(), self._stop_due):
            if other is not None:
                times.append(other)
        return min(times)

    @property
    def idle(self) -> bool:
        """Whether nothing is held or under way; tests and draining look at it."""
        return not self._requests and self._running is None and not self._queue

    # --- messages

    def _arrived(self, event: Arrived, now: float) -> list[Effect]:
        message = event.message
        match message:
            case m.Deliver():
                return self._delivered(event.peer, message, event.payload, now)
            case m.Feed():
                return self._feed(event.peer, message, event.payload, now)
            case m.Ack():
                self._outbox.acknowledge(message.id)
                return []
            case m.Chunk():
                return self._puller.arrived(event.peer, message, event.payload, now)
            case m.Want():
                return [ServeBlob(event.peer, message.digest, message.offset, message.length)]
            case m.Start():
                return self._start(message, now)
            case m.Release():
                return self._release(message.request)
            case m.Install():
                return self._install(message)
            case m.Forget():
                return self._forget(message.deployment)
            case m.Gone():
                self._puller.done(message.digest)
                return self._install_failed(message.digest, "the coordinator has lost it")
            case m.Welcome():
                return self._welcome(message, now)
            case m.Who() | m.Closing():
                self.joined = False
                self._hello_due = now if isinstance(message, m.Who) else now + limits.HELLO_RETRY_S
                return []
            case m.Refused():
                return [Stop(message.failure)]
            case m.Dismiss():
                return [Stop()]
            case m.Probe() | m.Alive() | m.Heartbeat():
                return []
            case _:
                return [Note("warning", "unexpected message", {"type": type(message).__name__})]

    def _welcome(self, message: m.Welcome, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._coordinator is not None and self._coordinator.id != message.bulk.id:
            effects += [Discard(number) for number in self._deployments]
            self._deployments.clear()
            self._requests.clear()
            self._queue.clear()
        self._coordinator = message.bulk
        self.joined = True
        self._beat_due = now
        return [*effects, Connect(message.bulk), Note("info", "joined", {"device": self.device})]

    # --- installing

    def _install(self, message: m.Install) -> list[Effect]:
        self._deployments[message.deployment] = _Deployment(
            {program.place: program for program in message.programs},
            {peer.device: peer.id for peer in message.peers},
        )
        digests = {
            digest
            for program in message.programs
            if program.model is not None
            for digest in (program.model, *program.weights)
        }
        return [
            *(Connect(peer) for peer in message.peers if peer.device != self.device),
            FindBlobs(str(message.deployment), tuple(sorted(digests))),
        ]

    def _found(self, event: BlobsFound, now: float) -> list[Effect]:
        number = int(event.purpose)
        deployment = self._deployments.get(number)
        if deployment is None or self._coordinator is None:
            return []
        deployment.missing = set(event.missing)
        if not deployment.missing:
            return self._prepare(number, deployment)
        effects: list[Effect] = []
        for digest in event.missing:
            effects += self._puller.want(digest, self._coordinator.id, now)
        return effects

    def _written(self, event: BlobWritten, now: float) -> list[Effect]:
        self._puller.done(event.digest)
        if event.failure is not None:
            return self._install_failed(event.digest, event.failure.message)
        effects: list[Effect] = []
        for number, deployment in self._deployments.items():
            if event.digest in deployment.missing:
                deployment.missing.discard(event.digest)
                if not deployment.missing:
                    effects += self._prepare(number, deployment)
        return effects

    def _prepare(self, number: int, deployment: _Deployment) -> list[Effect]:
        programs = tuple(p for p in deployment.programs.values() if p.model is not None)
        return [Prepare(number, programs)]

    def _prepared(self, event: Prepared) -> list[Effect]:
        deployment = self._deployments.get(event.deployment)
        if deployment is None:
            return [Discard(event.deployment)]
        deployment.ready = event.failure is None
        return [self._tell(m.Installed(deployment=event.deployment, failure=event.failure))]

    def _install_failed(self, digest: str, why: str) -> list[Effect]:
        failure = m.Failure(error="MeshInferError", message=f"blob {digest[:12]}: {why}")
        return [
            self._tell(m.Installed(deployment=number, failure=failure))
            for number, deployment in self._deployments.items()
            if digest in deployment.missing
        ]

    def _forget(self, number: int) -> list[Effect]:
        if self._deployments.pop(number, None) is None:
            return []
        for name in [n for n, r in self._requests.items() if r.deployment == number]:
            self._requests[name].deployment = -1
        self._queue = [c for c in self._queue if c.deployment != number]
        return [Discard(number)]

    # --- requests

    def _request(self, name: str, now: float) -> _Request:
        if name not in self._requests:
            self._requests[name] = _Request(now)
        return self._requests[name]

    def _current(self, name: str, attempt: int, deployment: int, now: float) -> _Request | None:
        """The request under this attempt; None when the attempt is stale."""
        request = self._request(name, now)
        if attempt < request.attempt:
            return None
        if attempt > request.attempt:
            request.renew(attempt, deployment)
            self._queue = [c for c in self._queue if c.request != name]
            self._outbox.forget_request(name)
        return request

    def _feed(self, peer: str, message: m.Feed, payload: memoryview, now: float) -> list[Effect]:
        effects: list[Effect] = [Send(Plane.BULK, peer, m.Ack(id=message.id))]
        if message.request in self._released:
            return effects
        try:
            array = array_of(message.tensor, payload)
        except ProtocolError as error:
            return [*effects, Note("warning", "bad input", {"why": str(error)})]
        request = self._request(message.request, now)
        request.fed[message.tensor.name] = array
        return effects + self._scatter(message.request, request, now)

    def _start(self, message: m.Start, now: float) -> list[Effect]:
        if message.request in self._released:
            return []
        request = self._current(message.request, message.attempt, message.deployment, now)
        if request is None:
            return []
        request.client = message.client
        effects = self._scatter(message.request, request, now)
        effects += self._begin_without_inputs(message.request, request, now)
        return effects + self._try_sink(message.request, request, now)

    def _begin_without_inputs(self, name: str, request: _Request, now: float) -> list[Effect]:
        """Tasks that read nothing but weights have no last piece to wait for."""
        deployment = self._deployments.get(request.deployment)
        for place, program in () if deployment is None else deployment.programs.items():
            if program.model is not None and not program.inputs and place not in request.begun:
                request.begun.add(place)
                job = Compute(name, request.attempt, request.deployment, place, {})
                self._queue.append(job)
        return self._compute_next(now)

    def _scatter(self, name: str, request: _Request, now: float) -> list[Effect]:
        """The source's part: cut the inputs and send them to the tasks, once all are here."""
        deployment = self._deployments.get(request.deployment)
        if deployment is None or request.scattered or not request.client:
            return []
        program = deployment.programs.get(SOURCE)
        if program is None or any(o.name not in request.fed for o in program.outputs):
            return []
        for output in program.outputs:
            array = request.fed[output.name]
            if output.shard.box.shape != array.shape:
                text = f"input {output.name} has shape {array.shape}, not {output.shard.box.shape}"
                return [self._failed(name, request, SOURCE, text)]
        request.scattered = True
        arrays = {o.shard: request.fed[o.name] for o in program.outputs}
        effects, _ = self._send_on(name, request, deployment, program, arrays, now)
        return effects

    def _delivered(
        self, peer: str, message: m.Deliver, payload: memoryview, now: float
    ) -> list[Effect]:
        ack: list[Effect] = [Send(Plane.BULK, peer, m.Ack(id=message.id))]
        if message.request in self._released:
            return ack
        deployment = self._deployments.get(message.deployment)
        if deployment is None:
            return []  # not acknowledged: the program may still be on its way
        request = self._current(message.request, message.attempt, message.deployment, now)
        if request is None:
            return ack
        try:
            array = array_of(message.tensor, payload)
        except ProtocolError as error:
            return [*ack, Note("warning", "bad piece", {"why": str(error), "peer": peer})]
        return ack + self._place(
            message.request, request, deployment, message.consumer, message.piece, array, now
        )

    def _place(
        self,
        name: str,
        request: _Request,
        deployment: _Deployment,
        consumer: m.Place,
        piece: Shard,
        array: Array,
        now: float,
    ) -> list[Effect]:
        """A piece has come (from a peer or from this device): compute when it was the last one."""
        program = deployment.programs.get(consumer)
        wanted = () if program is None else program.inputs
        fits = piece.box.shape == array.shape or not piece.box.axes
        if not fits or not any(p.shard == piece for value in wanted for p in value.pieces):
            return [Note("warning", "a piece that nobody awaits", {"piece": str(piece)})]
        assert program is not None
        held = request.pieces.setdefault(consumer, {})
        held[piece] = array
        if consumer in request.begun:
            return []
        if any(p.shard not in held for value in wanted for p in value.pieces):
            return []
        if program.model is None:
            return self._try_sink(name, request, now)
        request.begun.add(consumer)
        inputs = self._merge(program, held)
        held.clear()
        self._queue.append(Compute(name, request.attempt, request.deployment, consumer, inputs))
        return self._compute_next(now)

    def _merge(self, program: m.Program, held: dict[Shard, Array]) -> dict[str, Array]:
        return {
            value.name: reduce(value.box.box, [(p.shard, held[p.shard]) for p in value.pieces])
            for value in program.inputs
        }

    def _try_sink(self, name: str, request: _Request, now: float) -> list[Effect]:
        """The sink's part: when all outputs are here and the client is known, merge and answer."""
        deployment = self._deployments.get(request.deployment)
        if deployment is None or not request.client:
            return []
        for place, program in deployment.programs.items():
            if program.model is not None or place == SOURCE or place in request.begun:
                continue
            held = request.pieces.get(place, {})
            if any(p.shard not in held for value in program.inputs for p in value.pieces):
                continue
            request.begun.add(place)
            return self._answer(name, request, self._merge(program, held), now)
        return []

    def _answer(
        self, name: str, request: _Request, outputs: dict[str, Array], now: float
    ) -> list[Effect]:
        effects: list[Effect] = []
        for value, array in outputs.items():
            message = m.Answer(
                id=0,
                request=name,
                attempt=request.attempt,
                tensor=describe(value, array),
                count=len(outputs),
            )
            # Under a name of its own: ``Release`` must not take back what the client still awaits.
            key = f"answer {name}"
            effects.append(self._outbox.send(request.client, key, message, payload_of(array), now))
        return [*effects, self._tell(m.Merged(request=name, attempt=request.attempt))]

    def _release(self, name: str) -> list[Effect]:
        self._requests.pop(name, None)
        self._queue = [c for c in self._queue if c.request != name]
        self._outbox.forget_request(name)
        self._released[name] = None
        while len(self._released) > limits.STALE_REQUESTS_KEPT:
            self._released.popitem(last=False)
        return []

    # --- computing

    def _compute_next(self, now: float) -> list[Effect]:
        if self._running is not None or not self._queue:
            return []
        job = self._queue.pop(0)
        self._running = (job, now)
        return [job]

    def _computed(self, event: Computed, now: float) -> list[Effect]:
        self._running = None
        effects = self._finish(event, now)
        return effects + self._compute_next(now)

    def _finish(self, event: Computed, now: float) -> list[Effect]:
        request = self._requests.get(event.request)
        if request is None or request.attempt != event.attempt:
            return []  # released, or an older attempt: one wasted task
        deployment = self._deployments.get(request.deployment)
        if deployment is None:
            return []
        if event.error is not None:
            return [self._failed(event.request, request, event.place, event.error)]
        program = deployment.programs[event.place]
        arrays = {o.shard: a for o, a in zip(program.outputs, event.outputs, strict=True)}
        effects, sent = self._send_on(event.request, request, deployment, program, arrays, now)
        done = m.TaskDone(
            request=event.request,
            attempt=event.attempt,
            place=event.place,
            compute_s=event.compute_s,
            sent_bytes=sent,
        )
        return [*effects, self._tell(done)]

    def _failed(self, name: str, request: _Request, place: m.Place, text: str) -> Send:
        return self._tell(
            m.TaskFailed(request=name, attempt=request.attempt, place=place, text=text[:4000])
        )

    def _send_on(
        self,
        name: str,
        request: _Request,
        deployment: _Deployment,
        program: m.Program,
        arrays: dict[Shard, Array],
        now: float,
    ) -> tuple[list[Effect], int]:
        """Cut what was made for each task that reads it; and how many bytes leave this device."""
        effects: list[Effect] = []
        local: list[tuple[m.Send, Array]] = []
        sent = 0
        for send in program.sends:
            array = _cut(arrays, send.piece)
            if send.device == self.device:
                local.append((send, array))
                continue
            message = m.Deliver(
                id=0,
                request=name,
                attempt=request.attempt,
                deployment=request.deployment,
                consumer=send.consumer,
                piece=send.piece,
                tensor=describe(send.piece.value, array),
            )
            payload = payload_of(array)  # the one copy of what is sent, where rows are strided
            sent += len(payload)
            peer = deployment.peers[send.device]
            effects.append(self._outbox.send(peer, name, message, payload, now))
        for send, array in local:
            effects += self._place(name, request, deployment, send.consumer, send.piece, array, now)
        return effects, sent

    # --- time, loss, the end

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._stop_due is not None and now >= self._stop_due:
            return [Stop()]
        if not self.joined and now >= self._hello_due:
            self._hello_due = now + limits.HELLO_RETRY_S
            effects.append(self._tell(self.hello))
        if self.joined and now >= self._beat_due:
            self._beat_due = now + limits.HEARTBEAT_S
            effects.append(self._tell(self._heartbeat(now)))
        again, silent = self._outbox.resend_due(now)
        effects += again
        effects += [Note("warning", "no acknowledgement", {"peer": peer}) for peer in silent]
        wants, failed = self._puller.due(now)
        effects += wants
        for digest in failed:
            effects += self._install_failed(digest, "the coordinator does not send it")
        for name in [n for n, r in self._requests.items() if _orphan(r, now)]:
            effects += self._release(name)
        return effects

    def _heartbeat(self, now: float) -> m.Heartbeat:
        if self._running is None:
            return m.Heartbeat()
        job, since = self._running
        return m.Heartbeat(computing=f"{job.request} {job.place}", since_s=now - since)

    def _lost(self, event: PeerLost, now: float) -> list[Effect]:
        if event.peer == COORDINATOR:
            if event.refused and self._coordinator is None:
                failure = m.Failure(
                    error="AuthError",
                    message=f"the coordinator refuses this device: {event.reason}",
                    hint="give the keyring.json that this coordinator wrote, with --keyring",
                )
                return [Stop(failure)]
            return []
        return self._outbox.resend_to(event.peer, now) if event.peer else []

    def _stop(self, now: float) -> list[Effect]:
        if self._stop_due is not None or not self.joined:
            return [Stop()]
        self._stop_due = now + limits.DRAIN_S
        return [self._tell(m.Goodbye())]

    def _tell(self, message: m.AnyMessage) -> Send:
        return Send(Plane.CONTROL, COORDINATOR, message)


def _cut(arrays: dict[Shard, Array], piece: Shard) -> Array:
    for shard, array in arrays.items():
        if (
            shard.value == piece.value
            and shard.over == piece.over
            and shard.box.contains(piece.box)
        ):
            return scatter(array, shard.box, piece.box)
    raise AssertionError(f"{piece} is not among {list(arrays)}")


def _orphan(request: _Request, now: float) -> bool:
    """Fed by a client, but never started: its header was refused or lost."""
    return not request.client and now - request.since > limits.ORPHAN_INPUT_S
