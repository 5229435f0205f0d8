"""The client's core: says hello, sends headers to the coordinator and tensors to the source.

On a device's host it is the source and the sink itself, by the same rules as a worker. A request is
over when its reply and all its tensors are here, or its failure. Bodies are kept until then, so
that a broken connection costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, array_of, describe, payload_of
from meshinfer.scheduler.checking import Checking
from meshinfer.scheduler.computing import Computing
from meshinfer.scheduler.counting import Member
from meshinfer.scheduler.detours import Detours
from meshinfer.scheduler.events import (
    Array,
    Arrived,
    Asked,
    BlobsFound,
    BlobWritten,
    Cancelled,
    Connect,
    Disconnect,
    Effect,
    Event,
    Note,
    PeerLost,
    RanHere,
    Resolve,
    ServeBlob,
    Settle,
    Stop,
    StopRequested,
    Submitted,
    Ticked,
)
from meshinfer.scheduler.installing import Installing
from meshinfer.scheduler.load import nbytes_of
from meshinfer.scheduler.on_device import OnDevice
from meshinfer.scheduler.outbox import Outbox
from meshinfer.scheduler.refusing import Full, GivenUp, overdue, silence, unanswered
from meshinfer.scheduler.telling import COORDINATOR, refusal, told

NOBODY = ""
"""The name in plans of a client whose requests the head holds."""

LATE_S = 2.0
"""How long after its deadline a request is given up here, should the coordinator not say so."""


@dataclass(slots=True)
class _Request:
    header: m.Submit
    arrays: Mapping[str, Array]
    deadline: float
    turn: int = 0
    sent: bool = False
    reply: m.Reply | None = None
    answers: dict[int, dict[str, Array]] = field(default_factory=dict)
    whole: tuple[int, Mapping[str, Array]] = (-1, {})


@dataclass(slots=True)
class _Question:
    message: m.AnyMessage
    asked_s: float
    deadline: float
    sent: bool = False


class ClientCore(Member):
    """``handle`` is the only gate; ``next_deadline`` says when to tick; ``full``: what need not
    even be submitted."""

    def __init__(self, hello: m.Hello) -> None:
        super().__init__()
        self.hello = hello
        self._welcome: m.Welcome | None = None
        self._requests: dict[str, _Request] = {}
        self._questions: dict[str, _Question] = {}
        self._peer = f"{hello.device}#{hello.incarnation}"
        self._outbox = Outbox()
        self._act_as(NOBODY)
        self._hello_due = self._beat_due = self._heard = 0.0
        self._ever_welcome, self._head = False, ""
        self._connected: set[str] = set()
        self._on_device = OnDevice()
        self.full, self._given_up = Full(self._requests), GivenUp()

    def _act_as(self, name: str) -> None:
        """Begin with nothing, as the device of this name in plans."""
        self._acts_as = name
        self._installing = Installing(name)
        self._computing = Computing(name, self._installing.deployments, self._peer, self._merged)
        self._checking = Checking(name, self._computing, self._installing)
        self._computing.outbox.follow(self._outbox)
        self._detours = Detours(self._peer)  # to say who is late; it then goes by the head
        self._outbox, self._acks = self._computing.outbox, self._computing.acks

    def _handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Arrived():
                return self._arrived(event, now)
            case Submitted(request, message, arrays):
                assert isinstance(message, m.Submit)
                assert request not in self._requests, f"two requests of the id {request}"
                refusal = self.full.refusal(nbytes_of(message), now)
                if refusal is not None:
                    return [Resolve(request, m.Reply(request=request, failure=refusal), {})]
                self._begin_to_wait(now)
                deadline, turn = now + message.deadline_s, self._given_up.turn(request)
                self._requests[request] = _Request(message, arrays, deadline, turn)
                return self._send_open(now)
            case Asked(call, message, deadline_s):
                self._begin_to_wait(now)
                self._questions[call] = _Question(message, deadline_s, now + deadline_s)
                return self._send_open(now)
            case Cancelled(request):
                given_up = self._requests.pop(request, None)
                if given_up is None:
                    return []
                self._forget_feeds(request, given_up.turn)
                return [self._given_up.tell(request, given_up.turn)]
            case PeerLost():
                return self._lost(event, now)
            case BlobsFound() | BlobWritten() | RanHere():
                bulk = None if self._welcome is None else self._welcome.bulk
                return self._on_device.handle(event, bulk, now)
            case Ticked():
                return self._tick(now)
            case StopRequested():
                cancels = [
                    told(m.Cancel(request=n, turn=r.turn)) for n, r in self._requests.items()
                ]
                failed = self._fail_all("the client was closed")
                return [*cancels, *failed, *self._acks.flush(), Stop()]
            case _:
                raise AssertionError(f"a client has no use for {event}")

    def _begin_to_wait(self, now: float) -> None:
        """Silence counts from when somebody waits: a coordinator may be coming back."""
        if not self._requests and not self._questions:
            self._heard = max(self._heard, now)

    def next_deadline(self) -> float:
        times = [self._beat_due if self._welcome is not None else self._hello_due]
        times += [r.deadline + LATE_S for r in self._requests.values()]
        times += [q.deadline for q in self._questions.values()]
        others = (part.next_deadline() for part in (self._computing, self._on_device))
        return min([*times, *(other for other in others if other is not None)])

    # --- messages

    def _arrived(self, event: Arrived, now: float) -> list[Effect]:
        if event.peer == COORDINATOR:
            self._heard = now
            return self._told(event.message, now)
        message = event.message
        match message:
            case m.Deliver() if message.request in self._requests and self._acts_as:
                return self._computing.deliver(event.peer, message, event.payload, now)
            case m.Deliver():  # of what is over here
                self._outbox.acknowledge(event.peer, message.acks)
                self._acks.add(event.peer, message.id, len(event.payload), now)
                return []
            case m.Answer():
                self._acks.add(event.peer, message.id, len(event.payload), now)
                return self._answered(event.peer, message, event.payload)
            case m.Ack():
                self._outbox.acknowledge(event.peer, message.ids)
                return []
            case m.Chunk() | m.Gone():
                return self._on_device.arrived(event.peer, message, event.payload, now)
            case m.Want() if self._welcome is not None and event.peer == self._welcome.bulk.id:
                return [ServeBlob(event.peer, message.digest, message.offset, message.length)]
            case m.Probe():
                return []
            case _:
                return [Note("warning", "unexpected message", {"type": type(message).__name__})]

    def _told(self, message: m.AnyMessage, now: float) -> list[Effect]:
        """What only the coordinator may say, over its control connection."""
        match message:
            case m.Welcome():
                return self._welcomed(message, now)
            case m.Reply():
                request = self._requests.get(message.request)
                if request is None:
                    return []
                request.reply = message
                resolved = self._try_resolve(message.request, request)
                self.full.told(request.header, message.failure, now)
                return resolved
            case m.Deployed() | m.Devices() | m.Models() | m.AdmittedNow():
                if self._questions.pop(message.call, None) is None:
                    return []
                failure = None if isinstance(message, m.Devices | m.Models) else message.failure
                return [Settle(message.call, message, failure)]
            case m.Refused():
                return [*self._fail_all("", message.failure), Stop(message.failure)]
            case m.Who():
                return self._rejoin(now) if self._welcome is not None else []
            case m.Closing():
                return [*self._fail_all("the coordinator has stopped"), *self._rejoin(now + 1.0)]
            case m.Alive():
                self._given_up.heard()
                if message.beat_in_s:
                    self._beat_due = now + message.beat_in_s
                return self._on_device.heard(now)
            case m.Probe():
                return []
            case m.Start() if message.request not in self._requests:
                return [told(m.Cancel(request=message.request))]  # it may be lost
            case m.Assign() if message.request not in self._requests:
                return []  # it is over here
            case m.Start() if self._acts_as:
                return self._computing.start(message, now)
            case m.Assign() if self._acts_as:
                return self._computing.assign(message, now)
            case m.Check() if self._acts_as:
                return self._checking.asked(message, now)
            case m.Install() if self._acts_as:
                return self._installing.install(message)
            case m.Forget() if self._acts_as:
                self._computing.holding.forget(message.deployment)
                self._installing.forget(message.deployment)  # nothing was prepared by this half
                return self._on_device.revoked(message.deployment)
            case m.Grant() | m.Revoke():
                return self._on_device.told(message, self._installing.deployments, now)
            case _:
                return [Note("warning", "unexpected message", {"type": type(message).__name__})]

    def _welcomed(self, message: m.Welcome, now: float) -> list[Effect]:
        if message.head is None:  # the coordinator's own device is still starting
            self._hello_due = now + 0.05
            return []
        before, apart = self._welcome, self._on_device.reset()
        other = before is not None and before.head != message.head
        if other or self._acts_as != message.acts_as:
            self._rejoin(now)  # what the other head was fed must be fed again
            apart += [*self._acks.flush(), *self._installing.leave()]  # the next half owes none
            self._act_as(message.acts_as)
        elif self._acts_as:  # what was told before this welcome means nothing any more
            self._computing.reset(keep_inputs=True)
            self._installing.reset()
        peers = {peer.id: peer for peer in (message.bulk, message.head)}
        left, self._connected = sorted(self._connected - set(peers)), set(peers)
        self._welcome, self._head = message, message.head.id
        self._ever_welcome = True
        self.full.over()
        self._beat_due = now
        return [
            *apart,
            *(Disconnect(peer) for peer in left),
            *(Connect(peer) for peer in peers.values()),
            *self._given_up.again(self._requests),
            *self._send_open(now),
        ]

    def _rejoin(self, when: float) -> list[Effect]:
        """The coordinator does not know us (any more): say hello and send again what is open."""
        self._welcome = None
        self._hello_due = when
        self._computing.reset(keep_inputs=False)
        for request in self._requests.values():
            request.sent = False
        for question in self._questions.values():
            question.sent = False
        return self._on_device.reset()

    def _send_open(self, now: float) -> list[Effect]:
        if self._welcome is None or self._welcome.head is None:
            return []
        effects: list[Effect] = []
        head = self._welcome.head.id
        for name, request in self._requests.items():
            if request.sent:
                continue
            request.sent, request.reply = True, None  # it is told again, or is another by now
            self._forget_feeds(name, request.turn)
            request.turn += 1
            left = max(0.0, request.deadline - now)
            header = structs.replace(request.header, turn=request.turn, deadline_s=left)
            effects.append(told(header))
            if self._acts_as:
                effects += self._computing.giving.feed_here(name, request.turn, request.arrays, now)
                continue
            for value, array in request.arrays.items():
                tensor = describe(value, array)
                number = self._outbox.number()
                message = m.Feed(id=number, request=name, tensor=tensor, turn=request.turn)
                effects += self._outbox.send(head, message, payload_of(array), now)
        for question in self._questions.values():
            if not question.sent:
                question.sent = True
                effects.append(told(question.message))
        return effects

    def _answered(self, peer: str, message: m.Answer, payload: memoryview) -> list[Effect]:
        request = self._requests.get(message.request)
        if request is None or peer != self._head:  # devices send pieces, and to a head alone
            return []
        try:
            array = array_of(message.tensor, payload)
        except ProtocolError as error:
            return [Note("warning", "bad answer", {"request": message.request, "why": str(error)})]
        answers = request.answers.setdefault(message.attempt, {})
        answers[message.tensor.name] = array
        whole = len(answers) == message.count
        return self._merged(message.request, message.attempt, answers) if whole else []

    def _merged(self, name: str, attempt: int, outputs: Mapping[str, Array]) -> list[Effect]:
        """All outputs of an attempt are here. Any is right that its reply does not rule out."""
        request = self._requests.get(name)
        if request is None:
            return []
        request.answers = {a: each for a, each in request.answers.items() if a > attempt}
        request.whole = max(request.whole, (attempt, outputs), key=lambda each: each[0])
        return self._try_resolve(name, request)

    def _try_resolve(self, name: str, request: _Request) -> list[Effect]:
        reply = request.reply
        if reply is None or (reply.failure is None and request.whole[0] < reply.since):
            return []
        del self._requests[name]
        self._forget_feeds(name, request.turn)
        effects: list[Effect] = [Resolve(name, reply, request.whole[1])]
        if request.turn > 1:  # the header of the last turn may be lost, and its inputs held
            effects.append(self._given_up.tell(name, request.turn))
        return effects

    # --- time, loss

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._welcome is None and now >= self._hello_due:
            self._hello_due = now + limits.HELLO_RETRY_S
            effects.append(told(self.hello))
        if self._welcome is not None and now >= self._beat_due:
            self._beat_due = now + limits.HEARTBEAT_S
            effects.append(self._given_up.beat())
        if self._ever_welcome and now - self._heard > limits.COORDINATOR_SILENT_S:
            effects += self._fail_all("the coordinator is silent")
            if self._welcome is not None:
                effects += self._rejoin(now + limits.HELLO_RETRY_S)
        effects += self._on_device.due(now) + self._computing.due(now)
        effects += self._detours.late(self._outbox.late, now)
        for name in [n for n, r in self._requests.items() if r.deadline + LATE_S <= now]:
            effects += self._give_up(name)
        for call in [c for c, q in self._questions.items() if q.deadline <= now]:
            late = unanswered(self._questions.pop(call).asked_s)
            effects.append(Settle(call, None, silence() if self._welcome is None else late))
        return effects

    def _give_up(self, name: str) -> list[Effect]:
        request = self._requests.pop(name)
        self._forget_feeds(name, request.turn)
        late = overdue(request.header.deadline_s)
        failure = silence() if self._welcome is None else late
        return [
            self._given_up.tell(name, request.turn),
            Resolve(name, m.Reply(request=name, failure=failure), {}),
        ]

    def _lost(self, event: PeerLost, now: float) -> list[Effect]:
        if event.peer == COORDINATOR:
            if event.unadmitted or (event.refused and not self._ever_welcome):
                failure = refusal("this client", event)
                return [*self._fail_all("", failure), Stop(failure)]
            return self._rejoin(now) if self._welcome is not None else []
        if event.peer:
            self._outbox.hasten(event.peer, now)
            self._on_device.hasten(event.peer, now)
        return []

    def _fail_all(self, why: str, failure: m.Failure | None = None) -> list[Effect]:
        failure = failure or silence(why)
        effects: list[Effect] = [
            Resolve(name, m.Reply(request=name, failure=failure), {}) for name in self._requests
        ]
        effects += [Settle(call, None, failure) for call in self._questions]
        for name, request in self._requests.items():
            self._forget_feeds(name, request.turn)
            self._given_up.note(name, request.turn)
        self._requests.clear()
        self._questions.clear()
        return effects

    def _forget_feeds(self, request: str, turn: int) -> None:
        self._outbox.forget(lambda message: message.request == request)
        if self._acts_as:
            self._computing.giving.let_go(request, turn)
