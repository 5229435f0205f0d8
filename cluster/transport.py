"""The one factory of every ZeroMQ socket: it carries frames and decides nothing.

Planes: *control* (small, ZMTP heartbeats), *bulk* (tensors in frames of at most 1 MiB, no
heartbeats, because those cut healthy peers during big messages) and *join* (strangers').
Whoever binds is a ROUTER and CURVE server, whoever connects is a DEALER and CURVE client.
Nothing here blocks but ``receive``. A message handed over is not a message delivered: the layers
above acknowledge and resend.
"""

from __future__ import annotations

import errno
import math
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Final

import zmq

from cluster import sockets
from cluster.gatekeeper import Gatekeeper, GateList
from cluster.keys import KeyPair
from cluster.links import Backlog, Enquiries, Link, heard_of, linked
from cluster.ports import IDENTITY_BYTES, Port, draw_wire_id
from cluster.readiness import Readiness
from cluster.sockets import Endpoint, Frames, Incoming, Lost, Plane, Received
from cluster.strangers import try_as_stranger
from cluster.waking import Waker
from meshinfer import limits
from meshinfer.protocol.joining import Admission

_RETRY_S: Final = 0.001  # first wait before a full ROUTER pipe is tried again; doubles up to
_RETRY_MAX_S: Final = 0.02
_FALLEN_S: Final = 0.05  # how often links are looked at of which libzmq may make no other


class Transport:
    """All sockets of one process: used by one thread, except ``wake``.

    ``identity``: what peers know us by (device#incarnation); ``key``: ours, of what we bind and of
    what we connect with. ``admitted``: who may always connect to us, whatever ``admit`` says.
    ``plaintext``, as the keyring says: no encryption and no gatekeeper, so that keys are believed;
    all else is the same. ``proxy``: of all that we connect to (``cluster.gate``).
    ``unknown_is_temporary``: as in ``Gatekeeper``.
    """

    def __init__(
        self,
        identity: str,
        key: KeyPair,
        admitted: Iterable[Admission] = (),
        plaintext: bool = False,
        proxy: str = "",
        unknown_is_temporary: bool = False,
    ) -> None:
        assert 0 < len(identity.encode()) <= IDENTITY_BYTES and identity[0] not in "\0~"
        self.identity = identity
        self.counters: Counter[str] = Counter()  # what was dropped, and why
        self._key = key
        self._plaintext = plaintext
        self._admitted = GateList(admitted)
        self._unknown_is_temporary = unknown_is_temporary
        self._configure = partial(sockets.configure, plaintext=plaintext, proxy=proxy)
        self._context: zmq.Context[sockets.Socket] = zmq.Context(io_threads=1)
        # A link is a DEALER and its monitor, on each plane.
        self._context.max_sockets = 4 * limits.DEVICES + 64
        # Of monitors: one that stands at the mark stops the I/O thread, for ever once it is closed.
        self._context.rcvhwm = 0
        self._gatekeeper: Gatekeeper | None = None
        self._ports: dict[Plane, Port] = {}
        self._links: dict[tuple[Plane, str], Link] = {}
        self._backlogs: dict[tuple[Plane, str], Backlog] = {}
        self._enquiries = Enquiries(self.wake, proxy)
        self._lost: dict[tuple[Plane, str], str] = {}
        self._fallen: set[Link] = set()
        self._data: dict[sockets.Socket, Port | Link] = {}
        self._monitors: set[sockets.Socket] = set()
        self._retry_s = _RETRY_S
        self._turn = 0
        self._owner = sockets.this_thread()
        self._waker = Waker()
        self._ready = Readiness(self._waker)

    @property
    def public_key(self) -> str:
        """The key (Z85) that peers need in their Endpoint to connect to us."""
        return self._key.public

    @property
    def gatekeeper(self) -> Gatekeeper:
        """Who may connect; there from the first ``bind`` on, unless in plaintext."""
        assert self._gatekeeper is not None, "nothing is bound, or in plaintext"
        return self._gatekeeper

    # --- connections ----------------------------------------------------------------------

    def bind(self, plane: Plane, host: str, port: int = 0) -> int:
        """Listen at an IPv4 address and return the port (0: any free one). Raises
        ``AuthError`` if it lets strangers in (``cluster.strangers``)."""
        self._check_thread()
        assert plane not in self._ports, f"{plane} is bound already"
        if self._gatekeeper is None and not self._plaintext:
            self._gatekeeper = Gatekeeper(self._context, self._admitted)
        bound = self._context.socket(zmq.ROUTER)
        self._configure(bound, plane, server=self._key)
        sockets.listen(bound, host, port)
        made = Port(plane, bound, self._admitted, self.counters, plaintext=self._plaintext)
        self._ports[plane] = made
        self._register(made)
        if self._gatekeeper is not None:
            self._gatekeeper.unknown_is_temporary = False  # libzmq takes HANDSHAKE_MS over that
            try_as_stranger(self._context, plane, host, made.number, self._key.public)
            self._gatekeeper.unknown_is_temporary = self._unknown_is_temporary
        return made.number

    def admit(self, members: Iterable[Admission]) -> None:
        """From now on these may connect, each under its name, beside those that always may. The
        connections of all others end."""
        self._check_thread()
        removed = self._admitted.replace(members)
        late = self._gatekeeper is not None and self._gatekeeper.turned_away_too_early()
        for port in self._ports.values():
            for peer, why in port.review(removed, late=late):
                if why == sockets.REVOKED:
                    self._backlogs.pop((port.plane, peer), None)
                self._lost.setdefault((port.plane, peer), why)
        for link in list(self._links.values()):
            if link.endpoint.key in removed:
                self._drop(link)
                self._lost.setdefault((link.plane, link.peer), sockets.REVOKED)

    def connect(self, plane: Plane, peer: str, endpoint: Endpoint) -> None:
        """Connect to a peer; again with the same endpoint does nothing unless it was refused."""
        self._check_thread()
        sockets.check_endpoint(peer, endpoint)
        old = self._links.get((plane, peer))
        if old is not None:
            if old.endpoint == endpoint and not old.refused:
                return
            self._drop(old)
        wire = draw_wire_id(self.identity, self._key.public if self._plaintext else "")
        self._link(plane, peer, endpoint, wire)

    def _link(self, plane: Plane, peer: str, endpoint: Endpoint, wire: bytes) -> None:
        dealer = self._context.socket(zmq.DEALER)
        self._configure(dealer, plane, client=self._key, server_key=endpoint.key)
        self._links[plane, peer] = linked(dealer, wire, plane, peer, endpoint, self._plaintext)
        self._register(self._links[plane, peer])

    def _link_anew(self, link: Link) -> None:
        """Libzmq has given it up: the same by another socket. What waits for room goes by that."""
        key = (link.plane, link.peer)
        waiting = self._backlogs.get(key)
        self._drop(link)
        self._link(*key, link.endpoint, link.wire)
        if waiting is not None:
            self._backlogs[key] = waiting
            self._poll_for_room(key)

    def is_up(self, plane: Plane, peer: str) -> bool:
        """Whether what we connected to has proven its key, and is still there, as far as known."""
        link = self._links.get((plane, peer))
        return link is not None and link.up

    def may_greet(self, peer: str) -> bool:
        """Whether to send a hello: while there is no connection one waits, and more that came
        after it would have the peer begin anew with each."""
        link = self._links[Plane.CONTROL, peer]
        first, link.greeted = not link.greeted, not link.up
        return link.up or first

    def ends_of(self, plane: Plane, peer: str) -> tuple[str, str]:
        """The addresses of the connection that a peer made to us: its end and ours."""
        return self._ports[plane].ends_of(peer)

    def renew(self, plane: Plane, peer: str, *, if_silent: bool = False) -> None:
        """End the connections with a peer; they are made anew, what is on its way is lost."""
        for ends in (self._links.get((plane, peer)), self._ports.get(plane)):
            if ends is not None:
                ends.end(peer, if_silent=if_silent)

    def disconnect(self, peer: str) -> None:
        """Close our connections to this peer and forget what was not sent to it."""
        self._check_thread()
        for plane in Plane:
            if link := self._links.get((plane, peer)):
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
        for ends in self._data.values():
            sockets.close_socket(ends.socket, ends.monitor, linger_ms)
        if self._gatekeeper is not None:
            self._gatekeeper.stop()
        self._ready.close()
        self._context.term()  # waits for linger at most
        for kept in (self._links, self._ports, self._data, self._backlogs):
            kept.clear()

    # --- messages -------------------------------------------------------------------------

    def send(self, plane: Plane, peer: str, frames: Frames) -> bool:
        """Hand over one message; never blocks. False: dropped, send it again later.

        The buffers must stay unchanged. True means queued, not delivered.
        """
        self._check_thread()
        assert 0 < len(frames) <= limits.FRAMES_PER_MESSAGE, "messages are cut above"
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
            if self._backlogs and any(key not in self._links for key in self._backlogs):
                # POLLOUT of a ROUTER speaks of any peer, not of this one: try again by time.
                wait_s = min(wait_s, self._retry_s)
            wait_s = min(wait_s, _FALLEN_S) if self._fallen else wait_s
            ready = self._ready.wait(wait_s)
            # Before the messages, for a descriptor that is used anew; reported after them, for a
            # peer's last words come before its loss.
            self._watch(ready)
            self._raise_fallen()
            if self._backlogs:
                self._flush()
            incoming: list[Incoming] = []
            readable = [self._data[s] for s in ready if s in self._data]
            if len(readable) == 1:
                self._drain(readable, incoming)
            elif readable:
                for plane in Plane:
                    self._drain([ends for ends in readable if ends.plane is plane], incoming)
            if self._lost:
                incoming += [Lost(plane, peer, why) for (plane, peer), why in self._lost.items()]
                self._lost.clear()
            if incoming or self._ready.woken or time.monotonic() >= deadline:
                return incoming

    def wake(self) -> None:
        """End the ``receive`` that waits, or else the next one, early. Any thread may call it."""
        self._waker.wake()

    # --- sending --------------------------------------------------------------------------

    def _hand_over(self, key: tuple[Plane, str], frames: Frames) -> bool | None:
        """Give the message to libzmq: True taken, False there is no such peer, None full."""
        plane, peer = key
        link = self._links.get(key)
        if link is not None and not link.refused:
            self._ready.doubt(link.socket)
            return True if sockets.send_whole(link.socket, frames, plane) else None
        port = self._ports.get(plane)
        wire = port.wire_of(peer) if link is None and port is not None else None
        if port is not None and wire is not None:
            self._ready.doubt(port.socket)
            try:
                return True if sockets.send_whole(port.socket, [wire, *frames], plane) else None
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
        self._lost.setdefault(key, (link and link.said) or sockets.NO_ROUTE)
        self.counters["no route"] += 1
        return False

    def _put_aside(self, key: tuple[Plane, str], frames: Frames) -> bool:
        backlog = self._backlogs.setdefault(key, Backlog())
        if not backlog.put(frames):
            if not backlog.messages:
                del self._backlogs[key]
            self.counters["backlog full"] += 1
            return False
        self._poll_for_room(key)
        return True

    def _poll_for_room(self, key: tuple[Plane, str]) -> None:
        if link := self._links.get(key):
            self._ready.await_room(link.socket, full=key in self._backlogs)

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
                backlog.pop()
            if not backlog.messages:
                del self._backlogs[key]
                self._poll_for_room(key)
        self._retry_s = _RETRY_S if progress else min(self._retry_s * 2, _RETRY_MAX_S)

    # --- receiving ------------------------------------------------------------------------

    def _drain(self, sources: list[Port | Link], incoming: list[Incoming]) -> None:
        self._turn += 1  # whoever was cut off by the bound is not always the same
        first = self._turn % len(sources) if sources else 0
        found, unread = sockets.drained(sources[first:] + sources[:first], self._accept)
        incoming += found
        self._ready.doubt(*(each.socket for each in unread))

    def _accept(self, source: Port | Link, frames: list[zmq.Frame]) -> Received | None:
        """Check a message's shape and sender; None: dropped and counted."""
        if isinstance(source, Port):
            return source.accept(frames)
        if not 0 < len(frames) <= limits.FRAMES_PER_MESSAGE:
            self.counters["frames per message"] += 1
            return None
        if source.spoiled:
            self.counters["of a connection that was ended"] += 1
            return None
        views = [frame.buffer.toreadonly() for frame in frames]
        return Received(source.plane, source.peer, views, source.endpoint.key)

    def _watch(self, ready: set[sockets.Socket]) -> None:
        """Turn the sockets' own events into losses."""
        for link in self._enquiries.answers():
            if self._links.get((link.plane, link.peer)) is link:
                self._falls(link)
        spoken = ready & self._monitors
        if not spoken:
            return
        self._ready.doubt(*spoken)  # of each a bounded number is read
        for port in self._ports.values():
            if port.monitor in spoken:
                for peer, why in port.watch():
                    self._lost.setdefault((port.plane, peer), why)
        for link in self._links.values():
            if link.monitor in spoken:
                for event, value in sockets.monitor_events(link.monitor):
                    if heard_of(link, event, value) and not self._enquiries.ask(link):
                        self._falls(link)

    def _falls(self, link: Link) -> None:
        self._lost.setdefault((link.plane, link.peer), link.said)
        if link.fell is not None:
            self._fallen.add(link)

    def _raise_fallen(self) -> None:
        for link in tuple(self._fallen):
            if link.fell is None or self._links.get((link.plane, link.peer)) is not link:
                self._fallen.discard(link)
            elif link.is_given_up():
                self._link_anew(link)

    # --- sockets --------------------------------------------------------------------------

    def _register(self, ends: Port | Link) -> None:
        self._data[ends.socket] = ends
        self._ready.add(ends.socket)
        if ends.monitor is not None:
            self._monitors.add(ends.monitor)
            self._ready.add(ends.monitor)

    def _drop(self, link: Link) -> None:
        self._ready.remove(link.socket)
        if link.monitor is not None:
            self._ready.remove(link.monitor)
        del self._data[link.socket]
        self._monitors.discard(link.monitor)
        sockets.close_socket(link.socket, link.monitor)
        del self._links[link.plane, link.peer]
        self._backlogs.pop((link.plane, link.peer), None)
        self._lost.pop((link.plane, link.peer), None)

    def _check_thread(self) -> None:
        # A forked child's sends would return as if they worked, and never arrive.
        assert self._owner == sockets.this_thread(), "not this transport's thread"
