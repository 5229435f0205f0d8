"""What the transport's sockets are and how each is set up, read and written: no state of its own.

Options stand here with their reasons, and nowhere else.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from cluster.gatekeeper import JOIN_DOMAIN, WORK_DOMAIN
from cluster.keys import KeyPair, is_key
from meshinfer import limits
from meshinfer.errors import AuthError, ConfigurationError

Frames = Sequence[bytes | memoryview]
Socket = zmq.Socket[bytes]
E = TypeVar("E", bound="Ends")

LOST: Final = "the connection was lost"
NO_ROUTE: Final = "no connection to this peer"
REVOKED: Final = "its key is admitted no more"
REFUSED: Final = "refused: key not admitted"
BUSY: Final = "the other side has too many strangers to serve now"
WRONG_KEY: Final = (
    "the other side does not hold the key that we were told of it, or its gate admits nobody now"
)
NOT_YET: Final = "the other side does not know our key yet, or does not hold its own"
PLAINTEXT: Final = "the other side is without encryption, and we are not"
ENCRYPTED: Final = "the other side is encrypted, and we are not"
NOT_OURS: Final = "what answers at this address is no MeshInfer socket"
FINAL: Final = frozenset({REFUSED, WRONG_KEY, PLAINTEXT, ENCRYPTED, NOT_OURS})
"""Of a control or join socket: trying again is of no use until somebody mends something."""
CANNOT_CONNECT: Final = "nobody answers at this address"

# Plain integers: each operation on zmq's flags makes a new enum member, 1 us, many times a message.
POLLIN: Final = int(zmq.POLLIN)
_EVENTS: Final = int(zmq.EVENTS)
_SRCFD: Final = int(zmq.SRCFD)
_NOW: Final = int(zmq.DONTWAIT)
_NOW_AND_MORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)
_ZERO_COPY_BYTES: Final = 64 * 1024  # below, the bookkeeping costs more than the copy
_CURVE_BYTES: Final = 33  # what CURVE adds to a frame (RFC 26: name, nonce, flags, MAC)
UNKNOWN: Final = -1


class Plane(StrEnum):
    """Which kind of socket."""

    CONTROL = "control"
    BULK = "bulk"
    JOIN = "join"


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
    """One whole message; the frames are read-only views. ``key``: that of the connection, which
    may call itself ``peer``; a stranger's peer is its key. ``inbound``: by a socket that we bound.
    """

    plane: Plane
    peer: str
    frames: list[memoryview]
    key: str = ""
    inbound: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """A hint that the peer is gone or refuses us. ``peer`` is empty if it cannot be named."""

    plane: Plane
    peer: str
    reason: str


Incoming = Received | Lost


_process = os.getpid()


def _forked() -> None:
    global _process
    _process = os.getpid()


os.register_at_fork(after_in_child=_forked)  # to ask the kernel at each message takes its time


def this_thread() -> tuple[int, int]:
    """Process and thread that ask."""
    return _process, threading.get_ident()


def frame_limit(plane: Plane) -> int:
    if plane is Plane.JOIN:
        return limits.JOIN_FRAME_BYTES
    return limits.FRAME_BYTES if plane is Plane.BULK else limits.CONTROL_FRAME_BYTES


def _options(plane: Plane, *, server: bool, plaintext: bool) -> dict[int, int]:
    """Every socket option with its reason (see RELIABILITY.md); the keys are in ``configure``."""
    bulk = plane is Plane.BULK
    options: dict[int, int] = {
        # Per frame, and before any allocation: a stranger cannot claim gigabytes. libzmq counts
        # the encrypted frame: without the extra bytes a full one silently cuts the connection.
        zmq.MAXMSGSIZE: frame_limit(plane) + (0 if plaintext else _CURVE_BYTES),
        # Idle strangers hold a connection 1 s instead of 30 s.
        zmq.HANDSHAKE_IVL: limits.HANDSHAKE_MS,
        # Never wait for a dead peer at the end; close() sets another when draining.
        zmq.LINGER: 0,
        # The device network is IPv4; a second family doubles what can be misconfigured.
        zmq.IPV6: 0,
        # HWM counts messages, so it must be small where messages are large. Control messages are
        # small and already bounded by the cores; a low mark there would delay heartbeats.
        zmq.SNDHWM: limits.HIGH_WATER_MARK if bulk else 1000,
        # None: input that stands at a mark as its connection is reset, with a heartbeat of anybody
        # to be answered behind it, aborts the process (stream_engine_base.cpp: !_io_error). What
        # comes is bounded by credits, by the cores, and of strangers by ``ports``.
        zmq.RCVHWM: 0,
    }
    # Give up on bytes that nobody acknowledges. On bulk this alone finds a dead link. On control
    # those of a closed connection outlive it in the kernel, reach after a cut a ROUTER that has the
    # peer by another one by then, and libzmq (``handover``) never lets go of the old.
    silent_ms = int(limits.SILENT_MOST_S * 1000)
    options[zmq.TCP_MAXRT] = limits.TCP_MAX_RETRANSMIT_MS if bulk else silent_ms
    if bulk or server:
        # On an idle link there are none: the kernel asks, or a Pi without power would leave a
        # descriptor behind for ever. (Asked and answered below ZeroMQ, whatever is queued.) On
        # control a client's PING sets the time after which its silence ends the connection, but
        # libzmq takes that back with the next message: who is gone before the next PING stays.
        options[zmq.TCP_KEEPALIVE] = 1
        options[zmq.TCP_KEEPALIVE_IDLE] = limits.KEEPALIVE_IDLE_S
        options[zmq.TCP_KEEPALIVE_INTVL] = limits.TCP_MAX_RETRANSMIT_MS // 1000
        options[zmq.TCP_KEEPALIVE_CNT] = 3
    if not bulk and not server:
        # Finds a dead link or host that TCP does not tell of, and proves nothing about the program
        # (PONG comes from libzmq's thread). One end asks for both: half as many wake-ups.
        options[zmq.HEARTBEAT_IVL] = int(limits.HEARTBEAT_S * 1000)
        # What is frozen or cut off for less keeps its connection, and so all that is under way.
        options[zmq.HEARTBEAT_TIMEOUT] = silent_ms
        # The same for who is connected to: it closes what has been silent for so long.
        options[zmq.HEARTBEAT_TTL] = silent_ms
    if server and plane is Plane.JOIN:  # of strangers, who have no reason to be told more
        options[zmq.SNDHWM] = 4
    if server:
        # An unknown peer is an error that we see, not a silent drop.
        options[zmq.ROUTER_MANDATORY] = 1
        # A peer that reconnects takes over its routing id; else it would be ignored for ever.
        options[zmq.ROUTER_HANDOVER] = 1
        if not plaintext:
            # A dead gatekeeper refuses everybody instead of admitting everybody.
            options[zmq.ZAP_ENFORCE_DOMAIN] = 1
    else:
        # Queue from the first moment: a hello may be sent before the handshake is over.
        options[zmq.IMMEDIATE] = 0
        # Come back soon after a cut, but do not hammer a host that stays away.
        options[zmq.RECONNECT_IVL] = limits.RECONNECT_MS
        options[zmq.RECONNECT_IVL_MAX] = limits.RECONNECT_MAX_MS
        # A lost SYN is tried again instead of waiting minutes for the kernel to give up.
        options[zmq.CONNECT_TIMEOUT] = limits.CONNECT_MS
    return options


def configure(
    new: Socket,
    plane: Plane,
    *,
    server: KeyPair | None = None,
    client: KeyPair | None = None,
    server_key: str = "",
    plaintext: bool = False,
    proxy: str = "",
) -> None:
    """Set up every socket that carries messages: a CURVE server, or a client of ``server_key``.

    ``plaintext``: the same without CURVE and without a gatekeeper. ZMTP's greeting names the
    mechanism, so that such a socket and one with CURVE refuse each other. ``proxy``: HOST:PORT of
    a SOCKS5 proxy that a client goes through.
    """
    if proxy and server is None:
        new.setsockopt_string(zmq.SOCKS_PROXY, proxy)
    for option, value in _options(plane, server=server is not None, plaintext=plaintext).items():
        new.setsockopt(option, value)
    if plaintext:
        return
    if server is not None:
        new.curve_server = 1
        new.curve_secretkey = server.secret.encode()
        new.zap_domain = (JOIN_DOMAIN if plane is Plane.JOIN else WORK_DOMAIN).encode()
    if client is not None:
        new.curve_publickey = client.public.encode()
        new.curve_secretkey = client.secret.encode()
        new.curve_serverkey = server_key.encode()


def frame_size(frame: bytes | memoryview) -> int:
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def send_whole(to: Socket, frames: Frames, plane: Plane) -> bool:
    """Send one message or, if the pipe is full, nothing."""
    taken = True
    last = len(frames) - 1
    most = frame_limit(plane)
    for index, frame in enumerate(frames):
        flags = _NOW_AND_MORE if index < last else _NOW
        size = frame_size(frame)
        assert size <= most, "frames are cut above"
        try:
            to.send(frame, flags, copy=size < _ZERO_COPY_BYTES)
        except zmq.Again:
            if index == 0:
                return False
            # The connection went away within the message. libzmq takes its first frames back and
            # swallows the others, so they must still be given, or it would swallow the next one's.
            taken = False
    return taken


def events_of(source: Socket) -> int:
    """Whether it can be received from and sent by; what its descriptor was readable for is over."""
    return int(source.getsockopt(_EVENTS))


def receive_whole(source: Socket, *, expected: bool = False) -> list[zmq.Frame] | None:
    """One whole message, None if there is none; of too many frames only as many as show that.
    ``expected``: there is one, as far as known."""
    if not expected and not events_of(source) & POLLIN:  # cheaper than to be told by an exception
        return None
    frames: list[zmq.Frame] = []
    while True:
        try:
            frame = source.recv(_NOW, copy=False)
        except zmq.Again:  # libzmq shows a message only when all of it is there
            return None
        if len(frames) < limits.FRAMES_PER_MESSAGE + 2:  # routing id, and one too many
            frames.append(frame)
        if not frame.more:
            return frames


def drained(
    sources: list[E], accept: Callable[[E, list[zmq.Frame]], Received | None]
) -> tuple[list[Received], list[E]]:
    """One message from each of these sockets in turn, until all are empty or enough is read; and
    those of which it is not known that they are empty."""
    found: list[Received] = []
    count = size = 0
    while sources:
        for source in tuple(sources):
            if count >= limits.DRAIN_MESSAGES or size >= limits.DRAIN_BYTES:
                return found, sources
            frames = receive_whole(source.socket, expected=not count)
            if frames is None:
                sources.remove(source)
                continue
            count += 1
            message = accept(source, frames)
            if message is not None:
                size += sum(view.nbytes for view in message.frames)
                found.append(message)
    return found, sources


def connection_of(frame: zmq.Frame) -> int:
    """The descriptor of the TCP connection that a message came by, where libzmq still tells it.

    Deprecated for want of a use; ours is to name the peer of a DISCONNECTED event, at once.
    """
    try:
        return int(frame.get(_SRCFD))
    except (zmq.ZMQError, ValueError, AttributeError):
        return UNKNOWN


def admitted_as(frame: zmq.Frame) -> str:
    """The public key that the gatekeeper admitted a message's connection with (ZAP's user id)."""
    try:
        return str(frame.get(b"User-Id"))
    except (zmq.ZMQError, ValueError):
        return ""


def monitor_events(monitor: Socket | None) -> list[tuple[int, int]]:
    """What a monitor has to say now: (event, value), a bounded number."""
    found: list[tuple[int, int]] = []
    while monitor is not None and len(found) < limits.DRAIN_MESSAGES:
        try:
            message = recv_monitor_message(monitor, zmq.DONTWAIT)
        except zmq.Again:
            break
        found.append((message["event"], message["value"]))
    return found


def close_socket(data: Socket, monitor: Socket | None, linger_ms: int = 0) -> None:
    if monitor is not None:
        data.disable_monitor()
        monitor.close(linger=0)
    data.close(linger=linger_ms)


def address_error(host: str, port: int) -> ConfigurationError:
    return ConfigurationError(
        f"{host}:{port} is not an address", hint="give HOST:PORT, with a name or an IPv4 address"
    )


def check_endpoint(peer: str, endpoint: Endpoint) -> None:
    if not is_key(endpoint.key):
        raise AuthError(
            f"the key of {peer} at {endpoint.host}:{endpoint.port} is damaged",
            hint="check the keyring, or the coordinator's key",
        )
    if not 0 < endpoint.port < 65536:  # libzmq takes it modulo 65536
        raise address_error(endpoint.host, endpoint.port)


def listen(bound: Socket, host: str, port: int) -> None:
    """Bind it, or close it and raise ``ConfigurationError``."""
    try:
        if not 0 <= port < 65536:
            raise address_error(host, port)
        bound.bind(f"tcp://{host}:{port if port else '*'}")
    except zmq.ZMQError as error:
        bound.close()
        raise _bind_error(error, host, port) from error
    except ConfigurationError:
        bound.close()
        raise


def _bind_error(error: zmq.ZMQError, host: str, port: int) -> ConfigurationError:
    if error.errno == errno.EADDRINUSE:
        return ConfigurationError(
            f"port {port} on {host} is in use",
            hint="stop what listens there, or choose another port with --port (0: any free one)",
        )
    return ConfigurationError(
        f"cannot listen at {host}:{port}: {error.strerror}",
        hint="the host must be an IPv4 address of this machine (0.0.0.0: all of them); "
        "ports below 1024 need more rights",
    )


@dataclass(slots=True, eq=False)
class Ends:
    plane: Plane
    socket: Socket
    monitor: Socket | None
