"""A member that means harm: its own valid key, raw sockets, and whatever message it likes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import zmq

import meshinfer as mi
from cluster.joining import Wish, enrol
from cluster.keyring import Keyring
from cluster.keys import generate_keypair
from cluster.ports import draw_wire_id
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Buffer, decode, encode
from meshinfer.protocol.token import Role, client_name

HEARD_S = 5.0
Word = TypeVar("Word", bound=m.AnyMessage)


class Intruder:
    """``ring``: what it was admitted with; ``name``: what it calls itself; ``source``: where it
    comes from."""

    def __init__(
        self, ring: Keyring, control: tuple[str, int], name: str = "", source: str = ""
    ) -> None:
        worker = ring.role == "worker"
        self.ring, self.control, self._source = ring, control, source
        self.device = name or (ring.name if worker else f"{client_name(ring.key.public)}-evil")
        self.peer = f"{self.device}#1"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self.connect("control", *control, ring.coordinator_public)

    def connect(self, to: str, host: str, port: int, key: str) -> None:
        new = self._context.socket(zmq.DEALER)
        new.linger = 0
        new.routing_id = draw_wire_id(self.peer)
        new.curve_publickey = self.ring.key.public.encode()
        new.curve_secretkey = self.ring.key.secret.encode()
        new.curve_serverkey = key.encode()
        source = f"{self._source}:0;" if self._source else ""
        new.connect(f"tcp://{source}{host}:{port}")
        self._sockets[to] = new

    def reach(self, peer: m.Peer) -> None:
        """Connect to a bulk socket."""
        self.connect(peer.id, self.control[0], peer.port, peer.key)

    def say(self, message: m.AnyMessage, payload: Buffer = b"", to: str = "control") -> None:
        self._sockets[to].send_multipart(encode(message, payload))

    def hear(self, kind: type[Word], of: str = "control", within_s: float = HEARD_S) -> Word | None:
        """The first such message; others are passed over."""
        socket, end = self._sockets[of], time.monotonic() + within_s
        while (left := end - time.monotonic()) > 0 and socket.poll(int(left * 1000) + 1):
            frames = [memoryview(frame) for frame in socket.recv_multipart()]
            message, _ = decode(frames)
            if isinstance(message, kind):
                return message
        return None

    def hello(self, where: str = "", role: str = "client") -> m.Welcome | None:
        self.say(
            m.Hello(
                role=role,
                device=self.device,
                incarnation="1",
                cluster=self.ring.cluster,
                protocol=m.PROTOCOL,
                where=where,
            )
        )
        return self.hear(m.Welcome)

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextmanager
def intruder(cluster: mi.LocalCluster, role: Role, name: str = "mallory") -> Iterator[Intruder]:
    """Admitted by a token, as anybody is."""
    with cluster.client() as admin:
        token = admin.admitting.token(role)
    wish = Wish(
        token.cluster, role, name, token.coordinator, token.secret, token.places,
        interfaces=(), patience_s=20.0,
    )  # fmt: skip
    ring, where = enrol(generate_keypair(), wish)
    made = Intruder(ring, (where.host, where.port))
    try:
        yield made
    finally:
        made.close()
