"""The one factory of every ZeroMQ socket: it carries frames and decides nothing.

Two planes: *control* (small, ZMTP heartbeats) and *bulk* (tensors in frames of at most 1 MiB, no
heartbeats, because those cut healthy peers during big messages). Whoever binds is a ROUTER and
CURVE server, whoever connects is a DEALER and CURVE client. Nothing here blocks but ``receive``.
A message handed over is not a message delivered: the layers above acknowledge and resend.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from cluster.security import Gatekeeper, KeyPair, generate_keypair, is_key
from meshinfer import limits
from meshinfer.errors import AuthError, ConfigurationError

Frames = Sequence[bytes | memoryview]
_Socket = zmq.Socket[bytes]

LOST: Final = "the connection was lost"
NO_ROUTE: Final = "no connection to this peer"
REFUSED: Final = "refused: key not admitted"
NOT_OURS: Final = (
    "the other side is not a MeshInfer socket (no CURVE), has another coordinator's key, "
    "or admits nobody now"
)
CANNOT_CONNECT: Final = "nobody answers at this address"

_ZERO_COPY_BYTES: Final = 64 * 1024  # below, the bookkeeping costs more than the copy
_CURVE_BYTES: Final = 33  # what CURVE adds to a frame (RFC 26: name, nonce, flags, MAC)
_RETRY_S: Final = 0.001  # first wait before a full ROUTER pipe is tried again; doubles up to
_RETRY_MAX_S: Final = 0.02


class Plane(StrEnum):
    """Which of the two kinds of socket."""

    CONTROL = "control"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a peer listens, and the public key (Z85) it must prove to have."""

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"tcp://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Received:
    """One whole message. ``peer`` is the sender's routing id; the frames are read-only views."""

    plane: Plane
    peer: str
    frames: list[memoryview]


@dataclass(frozen=True, slots=True)
class Lost:
    """A hint that the peer is gone or refuses us. ``peer`` is empty if it cannot be named."""

    plane: Plane
    peer: str
    reason: str


Incoming = Received | Lost


def _frame_limit(plane: Plane) -> int:
    return limits.FRAME_BYTES if plane is Plane.BULK else limits.CONTROL_FRAME_BYTES


def _options(plane: Plane, *, server: bool) -> dict[int, int]:
    """Every socket option with its reason (see RELIABILITY.md); keys are in ``_secure``."""
    bulk = plane is Plane.BULK
    options: dict[int, int] = {
        # Per frame, and before any allocation: a stranger cannot claim gigabytes. libzmq counts
        # the encrypted frame: without the extra bytes a full one silently cuts the connection.
        zmq.MAXMSGSIZE: _frame_limit(plane) + _CURVE_BYTES,
        # Idle strangers hold a connection 1 s instead of 30 s.
        zmq.HANDSHAKE_IVL: limits.HANDSHAKE_MS,
        # Never wait for a dead peer at the end; close() sets another when draining.
        zmq.LINGER: 0,
        # The device network is IPv4; a second family doubles what can be misconfigured.
        zmq.IPV6: 0,
        # HWM counts messages, so it must be small where messages are large. Control messages are
        # small and already bounded by the cores; a low mark there would delay heartbeats.
        zmq.SNDHWM: limits.HIGH_WATER_MARK if bulk else 1000,
        zmq.RCVHWM: limits.HIGH_WATER_MARK if bulk else 1000,
    }
    if bulk:
        # The only detector of a dead link here: give up on unacknowledged bytes after this time.
        options[zmq.TCP_MAXRT] = limits.TCP_MAX_RETRANSMIT_MS
    else:
        # Finds a dead link or host that TCP does not tell of. It proves nothing about the
        # program (PONG comes from libzmq's thread): that is what our own heartbeat is for.
        options[zmq.HEARTBEAT_IVL] = int(limits.HEARTBEAT_S * 1000)
        options[zmq.HEARTBEAT_TIMEOUT] = int(limits.HEARTBEAT_S * 3000)
    if server:
        # An unknown peer is an error that we see, not a silent drop.
        options[zmq.ROUTER_MANDATORY] = 1
        # A peer that reconnects takes over its routing id; else it would be ignored for ever.
        options[zmq.ROUTER_HANDOVER] = 1
        # A dead gatekeeper refuses everybody instead of admitting everybody.
        options[zmq.ZAP_ENFORCE_DOMAIN] = 1
    else:
        # Queue from the first moment: a hello may be sent before the handshake is over.
        options[zmq.IMMEDIATE] = 0
        # Come back soon after a cut, but do not hammer a host that stays away.
        options[zmq.RECONNECT_IVL] = limits.RECONNECT_MS
        options[zmq.RECONNECT_IVL_MAX] = limits.RECONNECT_MAX_MS
        # A lost SYN is tried again instead of waiting minutes for the kernel to give up.
        options[zmq.CONNECT_TIMEOUT] = limits.RECONNECT_MAX_MS
    return options


_DEALER_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)


@dataclass(slots=True, eq=False)
class _Ends:
    plane: Plane
    socket: _Socket
    monitor: _Socket | None


@dataclass(slots=True, eq=False)
class _Port(_Ends):
    """A bound ROUTER. ``connection_of``: by which TCP connection each peer last spoke."""

    connection_of: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Link(_Ends):
    """A DEALER to one peer. ``said`` is the last reason reported: one Lost for each outage."""

    peer: str
    endpoint: Endpoint
    up: bool = False
    refused: bool = False  # libzmq gave up on it: only a new socket can try again
    said: str = ""


@dataclass(slots=True, eq=False)
class _Backlog:
    """What a full pipe to one peer could not take yet, oldest first."""

    messages: deque[tuple[Frames, int]] = field(default_factory=deque)
    size: int = 0


class Transport:
    """All sockets of one process: used by one thread, except ``wake``.

    ``identity`` is the routing id that peers know us by (device#incarnation), ``member`` the key
    we connect with, ``server`` the key of the sockets that we bind (a fresh one if not given).
    """

    def __init__(self, identity: str, member: KeyPair, server: KeyPair | None = None) -> None:
        routing_id = identity.encode()
        assert 0 < len(routing_id) <= 255 and routing_id[0] != 0, "not a ZeroMQ routing id"
        self.identity = identity
        self.counters: Counter[str] = Counter()  # what was dropped, and why
        self._routing_id = routing_id
        self._member = member
        self._server = server or generate_keypair()
        self._context: zmq.Context[_Socket] = zmq.Context(io_threads=1)
        # A link is a DEALER and its monitor, on each plane.
        self._context.max_sockets = 4 * limits.DEVICES + 64
        self._gatekeeper: Gatekeeper | None = None
        self._ports: dict[Plane, _Port] = {}
        self._links: dict[tuple[Plane, str], _Link] = {}
        self._backlogs: dict[tuple[Plane, str], _Backlog] = {}
        self._lost: dict[tuple[Plane, str], str] = {}
        self._poller = zmq.Poller()
        self._retry_s = _RETRY_S
        self._turn = 0
        self._owner = (os.getpid(), threading.get_ident())
        # A socket pair, because zmq_poll also takes plain descriptors; the lock keeps wake() from
        # writing to a descriptor that close() gave back (reentrant: wake() in a signal handler).
        self._wake_lock = threading.RLock()
        self._wake_send, self._wake_receive = socket.socketpair()
        self._wake_send.setblocking(False)
        self._wake_receive.setblocking(False)
        self._poller.register(self._wake_receive, zmq.POLLIN)

    @property
    def public_key(self) -> str:
        """The server key (Z85) that peers need in their Endpoint to connect to us."""
        return self._server.public

    @property
    def gatekeeper(self) -> Gatekeeper:
        """Who may connect; there from the first ``bind`` on."""
        assert self._gatekeeper is not None, "nothing is bound"
        return self._gatekeeper

    # --- connections ----------------------------------------------------------------------

    def bind(self, plane: Plane, host: str, port: int = 0) -> int:
        """Listen at an IPv4 address and return the port (0: any free one)."""
        self._check_thread()
        assert plane not in self._ports, f"{plane} is bound already"
        if self._gatekeeper is None:
            self._gatekeeper = Gatekeeper(self._context, [self._member.public])
        bound = self._new_socket(plane, server=True)
        try:
            bound.bind(f"tcp://{host}:{port if port else '*'}")
        except zmq.ZMQError as error:
            bound.close()
            raise _bind_error(error, host, port) from error
        monitor = None
        if plane is Plane.CONTROL:  # a cut on bulk is repaired by resending, and is no death
            monitor = bound.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._poller.register(monitor, zmq.POLLIN)
        self._poller.register(bound, zmq.POLLIN)
        self._ports[plane] = _Port(plane, bound, monitor)
        return int(bound.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def connect(self, plane: Plane, peer: str, endpoint: Endpoint) -> None:
        """Connect to a peer; again with the same endpoint does nothing unless it was refused."""
        self._check_thread()
        if not is_key(endpoint.key):
            raise AuthError(
                f"the key of {peer} at {endpoint.host}:{endpoint.port} is damaged",
                hint="check the keyring, or the coordinator's key",
            )
        old = self._links.get((plane, peer))
        if old is not None:
            if old.endpoint == endpoint and not old.refused:
                return
            self._drop(old)
        dealer = self._new_socket(plane, server=False, server_key=endpoint.key)
        monitor = dealer.get_monitor_socket(_DEALER_EVENTS)
        link = _Link(plane, dealer, monitor, peer, endpoint)
        try:
            dealer.connect(str(endpoint))
        except zmq.ZMQError as error:
            _close(dealer, monitor)
            raise ConfigurationError(
                f"{endpoint.host}:{endpoint.port} is not an address to connect to",
                hint="give HOST:PORT, with a name or an IPv4 address",
            ) from error
        self._links[plane, peer] = link
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)

    def disconnect(self, peer: str) -> None:
        """Close our connections to this peer and forget what was not sent to it."""
        self._check_thread()
        for plane in Plane:
            link = self._links.get((plane, peer))
            if link is not None:
                self._drop(link)
            self._backlogs.pop((plane, peer), None)

    def close(self, linger_s: float = 0.0) -> None:
        """Close everything, after trying for ``linger_s`` to send what is queued."""
        self._check_thread()
        if self._context.closed:
            return
        deadline = time.monotonic() + linger_s
        while self._backlogs and time.monotonic() < deadline:
            self._flush()
            time.sleep(_RETRY_S)
        linger_ms = math.ceil(max(0.0, deadline - time.monotonic()) * 1000)
        for ends in self._ends():
            _close(ends.socket, ends.monitor, linger_ms)
        if self._gatekeeper is not None:
            self._gatekeeper.stop()
        with self._wake_lock:
            self._wake_send.close()
            self._wake_receive.close()
        self._context.term()  # waits for linger at most
        self._links.clear()
        self._ports.clear()
        self._backlogs.clear()

    # --- messages -------------------------------------------------------------------------

    def send(self, plane: Plane, peer: str, frames: Frames) -> bool:
        """Hand over one message; never blocks. False: dropped, send it again later.

        The buffers must stay unchanged. True means queued, not delivered.
        """
        self._check_thread()
        assert 0 < len(frames) <= limits.FRAMES_PER_MESSAGE, "messages are cut above"
        assert all(_size(frame) <= _frame_limit(plane) for frame in frames), "frames are cut above"
        key = (plane, peer)
        if key not in self._backlogs:
            sent = self._hand_over(key, frames)
            if sent is not None:
                return sent
        return self._put_aside(key, frames)

    def receive(self, timeout_s: float) -> list[Incoming]:
        """What came in, waiting at most ``timeout_s`` for it; empty when woken or out of time.

        At most DRAIN_MESSAGES and about DRAIN_BYTES a call, control first, peers in turn.
        """
        self._check_thread()
        deadline = time.monotonic() + timeout_s
        while True:
            wait_s = 0.0 if self._lost else max(0.0, deadline - time.monotonic())
            if any(key not in self._links for key in self._backlogs):
                # POLLOUT of a ROUTER speaks of any peer, not of this one: try again by time.
                wait_s = min(wait_s, self._retry_s)
            ready = dict(self._poller.poll(math.ceil(wait_s * 1000)))
            woken = self._take_wake(ready)
            # Before the messages, for a descriptor that is used anew; reported after them, for a
            # peer's last words come before its loss.
            self._watch(ready)
            if self._backlogs:
                self._flush()
            incoming: list[Incoming] = []
            for plane in (Plane.CONTROL, Plane.BULK):
                self._drain(plane, ready, incoming)
            incoming += [Lost(plane, peer, why) for (plane, peer), why in self._lost.items()]
            self._lost.clear()
            if incoming or woken or time.monotonic() >= deadline:
                return incoming

    def wake(self) -> None:
        """End the ``receive`` that waits, or else the next one, early. Any thread may call it."""
        with self._wake_lock, suppress(OSError):  # full: it wakes anyway; closed: nobody waits
            self._wake_send.send(b"\0")

    # --- sending --------------------------------------------------------------------------

    def _hand_over(self, key: tuple[Plane, str], frames: Frames) -> bool | None:
        """Give the message to libzmq: True taken, False there is no such peer, None full."""
        plane, peer = key
        link = self._links.get(key)
        if link is not None and not link.refused:
            return True if _send(link.socket, frames) else None
        port = self._ports.get(plane)
        if link is None and port is not None:
            try:
                return True if _send(port.socket, [peer.encode(), *frames]) else None
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
        self._lost.setdefault(key, (link and link.said) or NO_ROUTE)
        self.counters["no route"] += 1
        return False

    def _put_aside(self, key: tuple[Plane, str], frames: Frames) -> bool:
        backlog = self._backlogs.setdefault(key, _Backlog())
        size = sum(map(_size, frames)) + 64 * len(frames)  # empty frames take memory as well
        if backlog.size + size > limits.BACKLOG_BYTES:
            if not backlog.messages:
                del self._backlogs[key]
            self.counters["backlog full"] += 1
            return False
        backlog.messages.append((frames, size))
        backlog.size += size
        self._poll_for_room(key)
        return True

    def _poll_for_room(self, key: tuple[Plane, str]) -> None:
        link = self._links.get(key)
        if link is not None:
            waiting = zmq.POLLOUT if key in self._backlogs else 0
            self._poller.modify(link.socket, zmq.POLLIN | waiting)

    def _flush(self) -> None:
        """Send from the backlogs as far as the pipes take it, in order."""
        progress = False
        for key in list(self._backlogs):
            backlog = self._backlogs[key]
            while backlog.messages:
                sent = self._hand_over(key, backlog.messages[0][0])
                if sent is None:
                    break
                progress = True
                if not sent:
                    self.counters["dropped with its peer"] += len(backlog.messages)
                    backlog.messages.clear()
                    break
                backlog.size -= backlog.messages.popleft()[1]
            if not backlog.messages:
                del self._backlogs[key]
                self._poll_for_room(key)
        self._retry_s = _RETRY_S if progress else min(self._retry_s * 2, _RETRY_MAX_S)

    # --- receiving ------------------------------------------------------------------------

    def _drain(self, plane: Plane, ready: dict[Any, int], incoming: list[Incoming]) -> None:
        """One message from each readable socket in turn, until all are empty or enough is read."""
        sources = [
            ends
            for ends in self._ends()
            if ends.plane is plane and ready.get(ends.socket, 0) & zmq.POLLIN
        ]
        self._turn += 1  # whoever was cut off by the bound is not always the same
        first = self._turn % len(sources) if sources else 0
        sources = sources[first:] + sources[:first]
        count = size = 0
        while sources:
            for source in tuple(sources):
                if count >= limits.DRAIN_MESSAGES or size >= limits.DRAIN_BYTES:
                    return
                frames = _receive(source.socket)
                if frames is None:
                    sources.remove(source)
                    continue
                count += 1
                message = self._accept(source, frames)
                if message is not None:
                    size += sum(view.nbytes for view in message.frames)
                    incoming.append(message)

    def _accept(self, source: _Port | _Link, frames: list[zmq.Frame]) -> Received | None:
        """Check a message's shape and sender; None: dropped and counted."""
        peer = ""
        if isinstance(source, _Link):
            peer = source.peer
        elif frames:
            routing_id, *frames = frames
            try:
                peer = routing_id.bytes.decode()
            except UnicodeDecodeError:
                peer = ""
            # ZAP's user id is the key that this connection was admitted with: it may have been
            # revoked since, and libzmq never asks again.
            if not self.gatekeeper.is_allowed(str(routing_id.get("User-Id"))):
                self.counters["key revoked"] += 1
                return None
        if not peer or peer[0] == "\0":  # libzmq makes up such ids for peers that give none
            self.counters["peer without a name"] += 1
            return None
        if not 0 < len(frames) <= limits.FRAMES_PER_MESSAGE:
            self.counters["frames per message"] += 1
            return None
        if isinstance(source, _Port) and source.monitor is not None:
            source.connection_of[peer] = _connection(frames[0])
        return Received(source.plane, peer, [frame.buffer.toreadonly() for frame in frames])

    def _watch(self, ready: dict[Any, int]) -> None:
        """Turn the sockets' own events into losses."""
        for port in self._ports.values():
            if port.monitor in ready:
                for event, value in _events(port.monitor):
                    if event == zmq.EVENT_DISCONNECTED:
                        self._lost_connection(port, value)
        for link in self._links.values():
            if link.monitor in ready:
                for event, value in _events(link.monitor):
                    self._link_event(link, event, value)

    def _lost_connection(self, port: _Port, connection: int) -> None:
        """libzmq names only the descriptor: whoever spoke by it last is lost.

        Nobody: it never said anything, or it came back by another connection.
        """
        names = [peer for peer, fd in port.connection_of.items() if fd in (connection, -1)]
        for peer in names:
            if port.connection_of.pop(peer) == connection:
                self._lost.setdefault((port.plane, peer), LOST)
            else:
                self._lost.setdefault((port.plane, ""), LOST)  # this libzmq tells no descriptors

    def _link_event(self, link: _Link, event: int, value: int) -> None:
        reason = ""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            link.up, link.said = True, ""
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            # ZAP: 300 try again, 400 refused, 500 the gatekeeper has a bug.
            reason = REFUSED if value == 400 else f"{REFUSED} (ZAP status {value})"
            link.refused = True
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            reason = NOT_OURS
            link.refused = True
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            reason = NOT_OURS
        elif event == zmq.EVENT_DISCONNECTED and link.up:
            link.up = False
            reason = LOST
        elif event == zmq.EVENT_CLOSED:
            reason = CANNOT_CONNECT
        if reason and reason != link.said:
            link.said = reason
            self._lost.setdefault((link.plane, link.peer), reason)

    # --- sockets --------------------------------------------------------------------------

    def _new_socket(self, plane: Plane, *, server: bool, server_key: str = "") -> _Socket:
        """Every ZeroMQ socket that carries messages is made here."""
        made = self._context.socket(zmq.ROUTER if server else zmq.DEALER)
        for option, value in _options(plane, server=server).items():
            made.setsockopt(option, value)
        if server:
            made.curve_server = 1
            made.curve_secretkey = self._server.secret.encode()
            made.zap_domain = Gatekeeper.DOMAIN.encode()
        else:
            made.routing_id = self._routing_id
            made.curve_publickey = self._member.public.encode()
            made.curve_secretkey = self._member.secret.encode()
            made.curve_serverkey = server_key.encode()
        return made

    def _ends(self) -> list[_Port | _Link]:
        return [*self._ports.values(), *self._links.values()]

    def _drop(self, link: _Link) -> None:
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        _close(link.socket, link.monitor)
        del self._links[link.plane, link.peer]
        self._backlogs.pop((link.plane, link.peer), None)
        self._lost.pop((link.plane, link.peer), None)

    def _take_wake(self, ready: dict[Any, int]) -> bool:
        if self._wake_receive.fileno() not in ready:
            return False
        self._wake_receive.recv(4096)  # what is left over only wakes once more
        return True

    def _check_thread(self) -> None:
        # A forked child's sends would return as if they worked, and never arrive.
        assert self._owner == (os.getpid(), threading.get_ident()), "not this transport's thread"


def _size(frame: bytes | memoryview) -> int:
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def _send(to: _Socket, frames: Frames) -> bool:
    """Send one message or, if the pipe is full, nothing."""
    taken = True
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        flags = zmq.DONTWAIT | (zmq.SNDMORE if index < last else 0)
        try:
            to.send(frame, flags, copy=_size(frame) < _ZERO_COPY_BYTES)
        except zmq.Again:
            if index == 0:
                return False
            # The connection went away within the message. libzmq takes its first frames back and
            # swallows the others, so they must still be given, or it would swallow the next one's.
            taken = False
    return taken


def _receive(source: _Socket) -> list[zmq.Frame] | None:
    """One whole message, None if there is none; of too many frames only as many as show that."""
    frames: list[zmq.Frame] = []
    while True:
        try:
            frame = source.recv(zmq.DONTWAIT, copy=False)
        except zmq.Again:  # libzmq shows a message only when all of it is there
            return None
        if len(frames) < limits.FRAMES_PER_MESSAGE + 2:  # routing id, and one too many
            frames.append(frame)
        if not frame.more:
            return frames


def _connection(frame: zmq.Frame) -> int:
    """The descriptor of the TCP connection it came by; -1 if libzmq does not tell (deprecated)."""
    try:
        return int(frame.get(zmq.SRCFD))
    except (zmq.ZMQError, ValueError, AttributeError):
        return -1


def _events(monitor: _Socket | None) -> list[tuple[int, int]]:
    """What a monitor has to say now: (event, value), a bounded number."""
    found: list[tuple[int, int]] = []
    while monitor is not None and len(found) < limits.DRAIN_MESSAGES:
        try:
            message = recv_monitor_message(monitor, zmq.DONTWAIT)
        except zmq.Again:
            break
        found.append((message["event"], message["value"]))
    return found


def _close(data: _Socket, monitor: _Socket | None, linger_ms: int = 0) -> None:
    if monitor is not None:
        data.disable_monitor()
        monitor.close(linger=0)
    data.close(linger=linger_ms)


def _bind_error(error: zmq.ZMQError, host: str, port: int) -> ConfigurationError:
    if error.errno == errno.EADDRINUSE:
        return ConfigurationError(
            f"port {port} on {host} is in use",
            hint=f"stop what listens there, or choose another port: --port {port + 1}, "
            "or --port 0 for any free one",
        )
    if error.errno == errno.EACCES:
        return ConfigurationError(
            f"port {port} on {host} needs more rights", hint="choose a port above 1023: --port N"
        )
    return ConfigurationError(
        f"cannot listen at {host}:{port}: {error.strerror}",
        hint="the host must be an IPv4 address of this machine; 0.0.0.0 means all of them",
    )
