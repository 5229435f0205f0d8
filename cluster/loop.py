"""Feeds events to a core, performs its effects, arms one timer. The only thread that has sockets.

Other threads hand in events, or messages to send, with ``post``; nothing else is shared. A defect,
in the core or in a thread beside it, is logged with its traceback and ends the loop.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

import structlog

from cluster.sockets import FINAL, REFUSED, Endpoint, Lost, Received
from cluster.sockets import Plane as Wire
from cluster.transport import Transport
from meshinfer.errors import MeshInferError
from meshinfer.protocol.codec import (
    ChecksumError,
    ProtocolError,
    decode,
    encode,
    failure_of,
    is_of_the_disk,
)
from meshinfer.protocol.messages import Failure, Hello, Join, Joined, Probe, Refused, Wait
from meshinfer.protocol.records import BESIDE_COORDINATOR
from meshinfer.scheduler.events import (
    Admit,
    Arrived,
    Connect,
    Disconnect,
    Effect,
    Event,
    Knocked,
    Note,
    PeerLost,
    Plane,
    Renew,
    Send,
    Stop,
    Ticked,
)

_LONGEST_WAIT_S = 1.0
_LINGER_S = 0.5
_PLANES = {plane: Wire(plane.value) for plane in Plane}
_ANSWERS = (Joined, Wait, Refused)


Post = Callable[[Event | Send | Stop], None]
"""How threads beside a loop hand something in."""


class Core(Protocol):
    """A core of ``meshinfer.scheduler``."""

    def handle(self, event: Event, now: float) -> list[Effect]: ...

    def next_deadline(self) -> float | None: ...


class Loop:
    """``make_transport`` runs in the loop's thread; ``perform`` gets the effects that are not I/O
    of sockets, and must not block. ``coordinator``: where workers and clients say hello.
    ``each_step`` is called at least once a second, as long as the loop lives.
    """

    def __init__(
        self,
        core: Core,
        make_transport: Callable[[], Transport],
        perform: Callable[[Effect], None],
        coordinator: Endpoint | None = None,
        each_step: Callable[[], None] | None = None,
    ) -> None:
        self._core = core
        self._each_step = each_step
        self._make_transport = make_transport
        self._perform = perform
        self._coordinator = coordinator
        self._inbox: deque[Event | Send | Stop] = deque()
        self._transport: Transport | None = None
        self._log = structlog.get_logger()
        self.dropped: Counter[str] = Counter()
        self.failure: Failure | None = None
        self.stopped = threading.Event()

    def post(self, item: Event | Send | Stop, *, wake: bool = True) -> None:
        """Hand in an event, a message or the end, from any thread. Without ``wake`` it is seen with
        whatever comes next."""
        self._inbox.append(item)
        transport = self._transport
        if wake and transport is not None:
            transport.wake()

    def run(self) -> Failure | None:
        """Until the core asks to stop; returns the failure that it stopped with. Never raises."""
        transport: Transport | None = None
        try:
            transport = self._transport = self._make_transport()
            self._handle(Ticked())
            while not self.stopped.is_set():
                self._step(transport)
                if self._each_step is not None:
                    self._each_step()
        except Exception as error:
            self.failure = report(error)
        finally:
            self._transport = None
            self.stopped.set()
            if transport is not None:
                transport.close(linger_s=_LINGER_S)
        return self.failure

    def _step(self, transport: Transport) -> None:
        due = self._core.next_deadline()
        wait = 0.0
        if not self._inbox:
            wait = _LONGEST_WAIT_S if due is None else due - time.monotonic()
        arrived = transport.receive(max(0.0, min(wait, _LONGEST_WAIT_S)))
        for _ in range(len(self._inbox)):  # first: a record that is written lets a reply go
            item = self._inbox.popleft()
            if isinstance(item, Send | Stop):
                self._do(item)
            else:
                self._handle(item)
        for incoming in arrived:
            if isinstance(incoming, Lost):
                reason, plane = incoming.reason, Plane(incoming.plane.value)
                final = reason in FINAL and incoming.plane is not Wire.BULK
                gate = final and reason == REFUSED
                self._handle(PeerLost(incoming.peer, reason, final, gate, plane))
                continue
            event = self._event_of(incoming)
            if event is not None:
                self._handle(event)
        if due is not None and due <= time.monotonic():
            self._handle(Ticked())

    def _event_of(self, incoming: Received) -> Event | None:
        """What a message is to the core. Of a stranger only that it knocks is ever looked at."""
        try:
            message, payload = decode(incoming.frames)
        except ProtocolError as error:
            self.dropped[str(error)[:60]] += 1
            self._log.warning("dropped", peer=incoming.peer, why=str(error))
            if not isinstance(error, ChecksumError):
                assert self._transport is not None
                self._transport.renew(incoming.plane, incoming.peer)
            return None
        if incoming.plane is not Wire.JOIN:
            if isinstance(message, Hello) and incoming.inbound and message.where:
                assert self._transport is not None
                ends = self._transport.ends_of(incoming.plane, incoming.peer)
                return Arrived(incoming.peer, message, payload, ends)
            return Arrived(incoming.peer, message, payload)
        if incoming.inbound and isinstance(message, Join):
            return Knocked(incoming.peer, incoming.key, message)
        if not incoming.inbound and isinstance(message, _ANSWERS):
            return Arrived(incoming.peer, message, payload)
        self.dropped["not of the join socket"] += 1
        return None

    def _handle(self, event: Event) -> None:
        for effect in self._core.handle(event, time.monotonic()):
            self._do(effect)

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Connect(peer):
                assert self._transport is not None
                host = peer.host
                if host == BESIDE_COORDINATOR and self._coordinator is not None:
                    host = self._coordinator.host
                endpoint = Endpoint(host, peer.port, peer.key)
                self._transport.connect(Wire.BULK, peer.id, endpoint)
                # It can send to us only once it has heard us.
                self._transport.send(Wire.BULK, peer.id, encode(Probe()))
            case Disconnect(peer_id):
                assert self._transport is not None
                self._transport.disconnect(peer_id)
            case Renew(peer_id):
                assert self._transport is not None
                self._transport.renew(Wire.BULK, peer_id, if_silent=True)
            case Admit(members):
                assert self._transport is not None
                self._transport.admit(members)
            case Note(level, text, fields):
                getattr(self._log, level)(text, **fields)
            case Stop(failure):
                self.failure = self.failure or failure
                self.stopped.set()
            case _:
                self._perform(effect)

    def _send(self, effect: Send) -> None:
        assert self._transport is not None
        if self._coordinator is not None and isinstance(effect.message, Hello):
            # libzmq gives up on a socket that was refused: a hello may need a new one.
            self._transport.connect(Wire.CONTROL, effect.peer, self._coordinator)
            if not self._transport.may_greet(effect.peer):
                return
        frames = encode(effect.message, effect.payload)
        self._transport.send(_PLANES[effect.plane], effect.peer, frames)


def report(error: Exception) -> Failure:
    """Log an exception that should not have happened; the failure that it is."""
    if is_of_the_disk(error):
        structlog.get_logger().error("a disk does not take what is to be stored", why=str(error))
    elif not isinstance(error, MeshInferError):
        with contextlib.suppress(OSError, ValueError):  # nobody listens; the failure goes on
            structlog.get_logger().error("a defect of MeshInfer", exc_info=error)
    return failure_of(error)


def start_thread(name: str, body: Callable[[], None], post: Post) -> threading.Thread:
    """Run ``body`` beside a loop. If it raises, the loop stops with that failure."""

    def run() -> None:
        try:
            body()
        except Exception as error:
            post(Stop(report(error)))

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
