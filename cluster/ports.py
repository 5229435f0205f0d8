"""A bound socket: who is behind each of its connections, by key, and how a connection is ended.

A peer is what its key may call itself, never what it says. On the wire it is known by a routing id
that it drew for one link and that nobody else can guess, so that nobody can take it over.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

import zmq

from cluster import sockets
from cluster.connections import Connection
from cluster.gatekeeper import GateList, Rate
from cluster.keys import is_key
from cluster.sockets import LOST, REVOKED, UNKNOWN, Plane, Received, Socket
from meshinfer import limits

_WIRE: Final = re.compile(rb"([^\0~].*)~[0-9a-f]{16}(?:~(.{40}))?", re.DOTALL)
_DRAWN_BYTES: Final = 8
_HANDSHAKE_S: Final = 1.2 * limits.HANDSHAKE_MS / 1000
IDENTITY_BYTES: Final = 255 - 2 * _DRAWN_BYTES - 1 - 41


def draw_wire_id(identity: str, said_key: str = "") -> bytes:
    """A routing id for one link of ours. ``said_key``: without encryption nothing else tells it."""
    drawn = f"{identity}~{secrets.token_hex(_DRAWN_BYTES)}"
    return (f"{drawn}~{said_key}" if said_key else drawn).encode()


@dataclass(slots=True, eq=False)
class Route:
    """How to reach a peer: its routing id on the wire, and the connection it last spoke by.

    ``retired``: the routing ids before; what still comes from them is older, and too late."""

    peer: str
    wire: bytes
    key: str
    connection: int = UNKNOWN
    gone: bool = False
    retired: tuple[bytes, ...] = ()


@dataclass(slots=True)
class _Stranger:
    """A connection of which nothing was heard yet (on the join socket: any)."""

    host: str
    since: float


class Port(sockets.Ends):
    """A bound ROUTER with its monitor."""

    def __init__(
        self,
        plane: Plane,
        bound: Socket,
        admitted: GateList,
        counters: Counter[str],
        *,
        plaintext: bool,
    ) -> None:
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        super().__init__(plane, bound, bound.get_monitor_socket(events))
        self.number = int(bound.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._admitted, self._counters, self._plaintext = admitted, counters, plaintext
        self._routes: dict[str, Route] = {}
        self._by_wire: dict[bytes, Route] = {}
        self._gone: dict[str, Route] = {}  # the first to go first
        self._strangers: dict[int, _Stranger] = {}  # the oldest first
        self._connections: dict[int, Connection] = {}
        self._is_work = plane is not Plane.JOIN
        self._untold = False  # whether libzmq ever kept a peer's connection to itself
        self._joins = Rate(limits.JOIN_MESSAGES_PER_S, limits.JOIN_MESSAGES)

    def wire_of(self, peer: str) -> bytes | None:
        """The routing id to send to."""
        route = self._routes.get(peer)
        return None if route is None else route.wire

    def ends_of(self, peer: str) -> tuple[str, str]:
        """The addresses of a peer's connection, its end and ours; empty where nobody knows."""
        route = self._routes.get(peer)
        known = None if route is None else self._connections.get(route.connection)
        return ("", "") if known is None else known.hosts()

    # --- who speaks -----------------------------------------------------------------------

    def accept(self, frames: list[zmq.Frame]) -> Received | None:
        """A message, if its sender is who it says and its shape is right; else it is counted."""
        routing_id, *parts = frames
        route = self._by_wire.get(routing_id.bytes)
        key = self._key_of(routing_id)
        if route is None or route.key != key or (self._is_work and key not in self._admitted):
            route = self._introduce(routing_id.bytes, key, sockets.connection_of(frames[-1]))
            if route is None:
                return None
        connection = sockets.connection_of(frames[-1])
        if connection != route.connection or route.gone:
            route.connection, route.gone = connection, False
            self._gone.pop(route.peer, None)
            self._untold = self._untold or connection == UNKNOWN
            if self._is_work:
                self._strangers.pop(connection, None)
        known = self._connections.get(connection)
        if known is not None and known.spoiled:
            self._counters["of a connection that was ended"] += 1
            return None
        most = limits.FRAMES_PER_MESSAGE if self._is_work else limits.JOIN_FRAMES
        if not 0 < len(parts) <= most:
            self._counters["frames per message"] += 1
            return None
        if not self._is_work and not self._joins.take():
            self._counters["too many strangers"] += 1
            self._end(connection)  # nothing else bounds what it says; an honest one comes back
            return None
        return Received(
            self.plane, route.peer, [part.buffer.toreadonly() for part in parts], key, inbound=True
        )

    def _key_of(self, routing_id: zmq.Frame) -> str:
        if not self._plaintext:
            return sockets.admitted_as(routing_id)
        said = _WIRE.fullmatch(routing_id.bytes)
        return said[2].decode("ascii", "replace") if said and said[2] else ""

    def _introduce(self, wire: bytes, key: str, connection: int) -> Route | None:
        """Who speaks by this routing id for the first time; None: not who it says it is."""
        said = _WIRE.fullmatch(wire)
        try:
            peer = said[1].decode() if said else ""
        except UnicodeDecodeError:
            peer = ""
        if not peer or not is_key(key):
            self._counters["peer without a name"] += 1
            return None
        if self._is_work:
            if key not in self._admitted:  # it was, when it connected
                self._counters["key revoked"] += 1
                self._end(connection)
                return None
            if not self._admitted.may_be(key, peer.partition("#")[0]):
                self._counters["name of another"] += 1
                return None
        else:
            peer = key  # nothing else is known of a stranger
        return self._routed(peer, wire, key)

    def _routed(self, peer: str, wire: bytes, key: str) -> Route | None:
        route = self._routes.get(peer)
        if wire in self._by_wire or (route is not None and route.key != key):
            self._counters["name of another"] += 1
            return None
        if route is None:
            self._make_room()
            route = self._routes[peer] = Route(peer, wire, key)
        elif wire in route.retired:
            self._counters["from a link that was replaced"] += 1
            return None
        else:
            del self._by_wire[route.wire]
            route.retired = (*route.retired, route.wire)[-limits.RETIRED_KEPT :]
            route.wire = wire
        self._by_wire[wire] = route
        return route

    def _make_room(self) -> None:
        """Of those who left, all are known by ``_gone``; who stays was here first."""
        while len(self._routes) >= limits.ROUTES_KEPT:
            self._forget(next(iter((self._gone or self._routes).values())))

    def _left(self, route: Route) -> None:
        """Its connection is over. It may come back by another; most never do, for each process has
        a name of its own: of those only the last are known."""
        route.connection, route.gone = UNKNOWN, True
        self._gone.pop(route.peer, None)
        self._gone[route.peer] = route
        if len(self._gone) > limits.ROUTES_GONE:
            self._forget(next(iter(self._gone.values())))

    def _forget(self, route: Route) -> None:
        del self._routes[route.peer], self._by_wire[route.wire]
        self._gone.pop(route.peer, None)

    def end(self, peer: str, *, if_silent: bool) -> None:
        """End the connection by which this peer last spoke; what it still says does not count."""
        route = self._routes.get(peer)
        if route is not None:
            self._end(route.connection, if_silent=if_silent)

    # --- connections ----------------------------------------------------------------------

    def watch(self) -> list[tuple[str, str]]:
        """Read the monitor: (peer, why) of those that were lost."""
        lost: list[tuple[str, str]] = []
        for event, connection in sockets.monitor_events(self.monitor):
            if event == zmq.EVENT_ACCEPTED:
                self._accepted(connection)
            else:
                lost += self._ended(connection)
        return lost

    def _accepted(self, connection: int) -> None:
        made = self._connections[connection] = Connection.at(connection)
        now = time.monotonic()
        host, _ = made.hosts()
        self._strangers.pop(connection, None)
        self._strangers[connection] = _Stranger(host, now)
        if self._is_work:  # who is past the handshake is admitted, if silent
            while self._strangers:
                first = next(iter(self._strangers))
                if now - self._strangers[first].since < _HANDSHAKE_S:
                    break
                del self._strangers[first]
        surplus = UNKNOWN
        if len(self._strangers) > (
            limits.HANDSHAKES_AT_ONCE if self._is_work else limits.JOIN_CONNECTIONS
        ):
            surplus = next(iter(self._strangers))
        elif not self._is_work:
            of_host = [c for c, each in self._strangers.items() if each.host == host]
            if len(of_host) > limits.JOIN_CONNECTIONS_PER_HOST:
                surplus = of_host[0]
        if surplus != UNKNOWN:
            del self._strangers[surplus]
            self._counters["too many strangers"] += 1
            self._end(surplus)

    def _ended(self, connection: int) -> list[tuple[str, str]]:
        """libzmq names only the descriptor: whoever spoke by it last is lost.

        Nobody: it never said anything, or it came back by another connection.
        """
        known = self._connections.get(connection)
        if known is not None and not known.spoiled:  # what one that we ended said may still come
            del self._connections[connection]
        stranger = self._strangers.pop(connection, None)
        if stranger is not None and self._is_work and not self._untold:
            return []  # at once: many of them may come and go
        lost: list[tuple[str, str]] = []
        for route in list(self._routes.values()):
            if route.gone:
                continue
            if route.connection == connection:
                self._left(route)
                lost.append((route.peer, LOST))
                if not self._is_work:
                    self._forget(route)
            elif route.connection == UNKNOWN:
                lost.append(("", LOST))
        # A cut on bulk is repaired by resending, and is no death; a stranger's is nobody's loss.
        return lost if self.plane is Plane.CONTROL else []

    def review(self, removed: frozenset[str], *, late: bool) -> list[tuple[str, str]]:
        """The list is another: (peer, why) of those that are lost. ``removed``: these keys'
        connections end, and so do all that never spoke, for whose they are is not known: an honest
        one comes back. ``late``: who was turned away for now is on it: libzmq closes such a
        connection only when the time of its handshake is over, and then they come back."""
        lost = self.watch()
        if not self._is_work:
            return lost
        kept = set()
        for route in list(self._routes.values()):
            if route.key in removed:
                lost.append((route.peer, REVOKED))
                self._forget(route)
                self._end(route.connection)
            elif not route.gone:
                kept.add(route.connection)
        if removed:
            for connection in self._connections.keys() - kept:
                self._end(connection)
        elif late:
            for connection in self._strangers:
                self._end(connection)
        return lost

    def _end(self, connection: int, *, if_silent: bool = False) -> None:
        known = self._connections.get(connection)
        if known is None or known.ends is None:  # there was no descriptor left to look at it by
            known = Connection.at(connection)
            if not known.is_bound_to(self.number):
                return
            self._connections[connection] = known
        known.end(if_silent=if_silent)
