"""Transports over real sockets on 127.0.0.1, as the tests of the transport and the gate set them
up: a hub, devices with a key each, and a raw client that keeps none of our limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from cluster.keys import KeyPair, generate_keypair
from cluster.ports import draw_wire_id
from cluster.transport import Endpoint, Incoming, Lost, Plane, Received, Transport
from meshinfer.protocol.joining import Admission

HOST = "127.0.0.1"
MIB = 1 << 20
PLANES = [Plane.CONTROL, Plane.BULK]
NAMES = ["pi-1", "pi-2", "hub-2", "raw"]


@dataclass
class Net:
    """The keys of a hub and of devices, and transports that are closed at the end of the test."""

    own: KeyPair = field(default_factory=generate_keypair)
    keys: dict[str, KeyPair] = field(default_factory=lambda: {n: generate_keypair() for n in NAMES})
    transports: list[Transport] = field(default_factory=list)
    plaintext: bool = False

    @property
    def members(self) -> list[Admission]:
        return [Admission(key.public, name, "worker") for name, key in self.keys.items()]

    def transport(self, identity: str, key: KeyPair | None = None) -> Transport:
        key = key or self.keys.get(identity.partition("#")[0]) or generate_keypair()
        made = Transport(identity, key, plaintext=self.plaintext)
        self.transports.append(made)
        return made

    def server(self, identity: str = "hub") -> tuple[Transport, dict[Plane, Endpoint]]:
        made = Transport(identity, self.own, plaintext=self.plaintext)
        made.admit(self.members)
        self.transports.append(made)
        ports = {plane: made.bind(plane, HOST) for plane in PLANES}
        return made, {p: Endpoint(HOST, port, self.own.public) for p, port in ports.items()}

    def client(self, identity: str, endpoints: dict[Plane, Endpoint]) -> Transport:
        made = self.transport(identity)
        for plane, endpoint in endpoints.items():
            made.connect(plane, "hub", endpoint)
        return made


def pump(
    *transports: Transport,
    until: Callable[[list[Incoming]], bool] = lambda heard: bool(heard),
    within_s: float = 5.0,
) -> list[Incoming]:
    """What the first transport hears until it is enough; the others are served meanwhile."""
    heard: list[Incoming] = []
    end = time.monotonic() + within_s
    while not until(heard) and time.monotonic() < end:
        heard += transports[0].receive(0.02)
        for other in transports[1:]:
            other.receive(0)
    return heard


def received(heard: list[Incoming]) -> list[tuple[Plane, str, list[bytes]]]:
    return [
        (one.plane, one.peer, [bytes(frame) for frame in one.frames])
        for one in heard
        if isinstance(one, Received)
    ]


def lost(heard: list[Incoming]) -> list[Lost]:
    return [one for one in heard if isinstance(one, Lost)]


def counted(count: int) -> Callable[[list[Incoming]], bool]:
    return lambda heard: len(received(heard)) >= count


def greet(hub: Transport, *clients: Transport, planes: list[Plane] = PLANES) -> None:
    """Each client speaks first, so that the hub knows a way to it."""
    for client in clients:
        for plane in planes:
            assert client.send(plane, "hub", [b"hello"])
    heard = pump(hub, *clients, until=counted(len(clients) * len(planes)))
    assert len(received(heard)) == len(clients) * len(planes), heard


@dataclass
class RawClient:
    """A CURVE client that keeps none of our limits. ``events``: those that ``monitor`` tells of,
    from before it connects: plaintext is greeted before the next line of a test runs."""

    net: Net
    endpoint: Endpoint
    plain: bool = False
    name: str = "raw"
    key: KeyPair | None = None
    events: int = 0
    monitor: zmq.Socket[bytes] | None = None

    def __enter__(self) -> zmq.Socket[bytes]:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        key = self.key or self.net.keys["raw"]
        self.socket.routing_id = draw_wire_id(self.name, key.public if self.plain else "")
        if not self.plain:
            self.socket.curve_publickey = key.public.encode()
            self.socket.curve_secretkey = key.secret.encode()
            self.socket.curve_serverkey = self.endpoint.key.encode()
        if self.events:
            self.monitor = self.socket.get_monitor_socket(self.events)
        self.socket.connect(str(self.endpoint))
        return self.socket

    def __exit__(self, *_: object) -> None:
        if self.monitor is not None:
            self.socket.disable_monitor()
            self.monitor.close(0)
        self.socket.close()
        self.context.term()
