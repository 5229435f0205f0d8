"""A socket that connects to one peer, and what its monitor says of the connection."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import zmq

from cluster.connections import Connection
from cluster.greeting import mechanism_at
from cluster.sockets import (
    BUSY,
    CANNOT_CONNECT,
    ENCRYPTED,
    FINAL,
    LOST,
    NOT_OURS,
    NOT_YET,
    PLAINTEXT,
    REFUSED,
    WRONG_KEY,
    Endpoint,
    Ends,
    Frames,
    Plane,
    Socket,
    address_error,
    close_socket,
    frame_size,
)
from meshinfer import limits

# Never HANDSHAKE_FAILED_PROTOCOL: libzmq 4.3.5 says it also of what it cannot decrypt later on, and
# saying it turns errno from EPROTO to EAGAIN (``curve_mechanism_base_t::decode``; the monitor's
# ``process_commands``). Then the engine believes that its reader is behind: it reads no more, stays
# for ever, and at the first heartbeat after the other side has gone aborts us (``!_io_error``).
DEALER_EVENTS: Final = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
)
_FELL_S: Final = 0.5  # libzmq says within a millisecond that it will connect once more


@dataclass(slots=True, eq=False)
class Link(Ends):
    """A DEALER to one peer. ``said`` is the last reason reported: one Lost for each outage.
    ``greeted``: a hello waits for it to be up."""

    peer: str
    endpoint: Endpoint
    wire: bytes = b""
    plaintext: bool = False
    up: bool = False
    refused: bool = False  # libzmq gave up on it: only a new socket can try again
    said: str = ""
    greeted: bool = False
    failing: bool = False  # the handshake of this connection
    failures: int = 0  # of handshakes in a row, without a reason
    connection: Connection | None = None
    spoiled: bool = False  # nothing that this connection still has to say counts
    fell: float | None = None  # since when it is down, and libzmq has not said that it tries again

    def is_given_up(self) -> bool:
        """Whether libzmq makes no other connection: so it is after what was no ZMTP, or was not
        encrypted as it should be (``session_base_t::engine_error``)."""
        return self.fell is not None and time.monotonic() >= self.fell + _FELL_S

    def end(self, peer: str, *, if_silent: bool) -> None:
        """End the connection with it; libzmq makes another."""
        if self.connection is not None:
            self.connection.end(if_silent=if_silent)
            self.spoiled = self.spoiled or self.connection.spoiled


@dataclass(slots=True, eq=False)
class Backlog:
    """What a full pipe to one peer could not take yet, oldest first."""

    messages: deque[tuple[Frames, int]] = field(default_factory=deque)
    size: int = 0

    def put(self, frames: Frames) -> bool:
        """Whether there is room for it."""
        size = sum(map(frame_size, frames)) + 64 * len(frames)  # empty frames take memory as well
        if self.size + size > limits.BACKLOG_BYTES:
            return False
        self.messages.append((frames, size))
        self.size += size
        return True

    def pop(self) -> None:
        self.size -= self.messages.popleft()[1]


def heard_of(link: Link, event: int, value: int) -> str:
    """Note what a link's monitor says. The reason to call it lost, if it is one that is new."""
    reason = ""
    if event in (zmq.EVENT_CONNECTED, zmq.EVENT_CONNECT_RETRIED):
        link.fell = None
    if event == zmq.EVENT_CONNECTED:
        link.connection, link.spoiled = Connection.at(value), False
    elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
        link.up, link.said, link.greeted, link.failures = True, "", False, 0
    elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        # ZAP: 400 refused, 500 busy (300, try again, closes without a word).
        reason = BUSY if value == 500 else REFUSED
        link.refused = link.failing = True
    elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        # A server that cannot read our first packet closes, and so does a gate that is to be tried
        # again (only workers have one), and one that is in haste or ends: that is not so twice.
        link.failing = True
        link.failures += 1
        if link.plane is Plane.BULK:
            reason = NOT_YET
        elif link.failures >= 2 and link.said not in FINAL:
            reason = WRONG_KEY
    elif event == zmq.EVENT_DISCONNECTED:
        if link.up:
            reason, link.fell = LOST, time.monotonic()
        elif not link.failing:  # what it said was no handshake, or another than ours
            reason = NOT_OURS
        link.up, link.failing, link.connection = False, False, None
    elif event == zmq.EVENT_CLOSED:
        reason = CANNOT_CONNECT
    if not reason or reason == link.said:
        return ""
    link.said = reason
    return reason


def linked(
    made: Socket, wire: bytes, plane: Plane, peer: str, endpoint: Endpoint, plaintext: bool
) -> Link:
    """Connect this socket, under this routing id; it is closed if that cannot be."""
    made.routing_id = wire
    monitor = made.get_monitor_socket(DEALER_EVENTS)
    try:
        made.connect(str(endpoint))
    except zmq.ZMQError as error:
        close_socket(made, monitor)
        raise address_error(endpoint.host, endpoint.port) from error
    return Link(plane, made, monitor, peer, endpoint, wire, plaintext)


def told_by(link: Link, mechanism: str) -> str:
    """Why a handshake failed without a word, or by words that were none of a handshake, given what
    ``mechanism_at`` says of the other side."""
    if not mechanism:  # a frozen one, which may well be ours, unless it said something
        return NOT_OURS if link.said == NOT_OURS else CANNOT_CONNECT
    if link.plaintext:
        return ENCRYPTED if mechanism == "CURVE" else LOST
    if mechanism in ("NULL", "PLAIN"):
        return PLAINTEXT
    return LOST if link.said == NOT_OURS else WRONG_KEY


class Enquiries:
    """Asks, each in a thread of its own, what the other sides of links are. ``wake``: when one
    is answered. ``proxy``: nobody can be asked through one."""

    def __init__(self, wake: Callable[[], None], proxy: str) -> None:
        self._wake = wake
        self._proxy = proxy
        self._answered: deque[tuple[Link, str]] = deque()

    def ask(self, link: Link) -> bool:
        """Whether it is asked; else ``said`` is all that will be known."""
        if link.said not in (WRONG_KEY, NOT_OURS):
            return False
        if self._proxy:
            self._settle(link, LOST if link.said == NOT_OURS else WRONG_KEY)
            return False
        threading.Thread(target=self._ask, args=(link,), daemon=True).start()
        return True

    def _ask(self, link: Link) -> None:
        self._answered.append((link, mechanism_at(link.endpoint.host, link.endpoint.port)))
        self._wake()

    def answers(self) -> Iterator[Link]:
        """The links of which it is known by now, if they are still down; ``said`` is the reason."""
        while self._answered:
            link, mechanism = self._answered.popleft()
            if not link.up:
                self._settle(link, told_by(link, mechanism))
                yield link

    @staticmethod
    def _settle(link: Link, reason: str) -> None:
        """After NOT_OURS libzmq makes no other connection. Where the other side is ours, somebody
        put that in between, and it is to be tried again."""
        if link.said == NOT_OURS and reason == LOST:
            link.fell = time.monotonic()
        elif link.said == NOT_OURS:
            link.refused = True
        link.said = reason
