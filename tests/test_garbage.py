"""A link into which somebody puts what is no ZMTP, or not encrypted, is there again soon: libzmq
ends such a one and makes no other (``session_base_t::engine_error``), so the transport does.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import replace

import pytest
from wires import HOST, PLANES, Net, greet, lost, pump, received

from cluster.sockets import LOST, Plane

GARBAGE = {
    "a frame of a kind that is none": b"\xff" * 40,
    "a frame that is too long": b"\x02" + b"\x7f" * 8 + b"x" * 40,
    "a message that nobody encrypted": b"\x00\x20" + b"\x07MESSAGE" + b"x" * 24,
}


class Between:
    """Passes everything on, both ways, and says to who has connected whatever it is told to.
    ``first``: all that the first one hears."""

    def __init__(self, target: int, first: bytes = b"") -> None:
        self.target, self.first = target, first
        self.listening = socket.create_server((HOST, 0))
        self.port = int(self.listening.getsockname()[1])
        self.connections: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def put_in(self, data: bytes) -> None:
        for near, _ in self.connections:  # more than one, where it took long to connect
            with suppress(OSError):
                near.sendall(data)

    def close(self) -> None:
        for one in (self.listening, *(each for both in self.connections for each in both)):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self.listening.accept()
                if self.first:
                    with near, suppress(OSError):  # reset
                        near.sendall(self.first)
                        while near.recv(1 << 16):
                            pass
                    self.first = b""
                    continue
                far = socket.create_connection((HOST, self.target), 5.0)
                self.connections.append((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("plane", PLANES)
def test_a_link_is_made_anew_after_garbage(net: Net, plane: Plane, garbage: str) -> None:
    hub, endpoints = net.server()
    between = Between(endpoints[plane].port)
    try:
        client = net.client("pi-1", {plane: replace(endpoints[plane], port=between.port)})
        greet(hub, client, planes=[plane])
        # libzmq looks for commands at most once a millisecond, and it is that which spoils errno.
        pump(client, hub, until=lambda heard: False, within_s=0.05)
        between.put_in(GARBAGE[garbage])
        assert lost(pump(client, hub, until=lambda heard: bool(lost(heard))))
        pump(client, hub, until=lambda heard: client.is_up(plane, "hub"))
        client.send(plane, "hub", [b"again"])
        heard = pump(hub, client, until=lambda heard: bool(received(heard)))
        assert received(heard) == [(plane, "pi-1", [b"again"])]
        hub.send(plane, "pi-1", [b"yes"])
        assert received(pump(client, hub)) == [(plane, "hub", [b"yes"])]
    finally:
        between.close()


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
DISTURBED = {
    "no greeting": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a greeting of another kind": GREETING.replace(b"CURVE", b"PLAIN"),
    "no handshake": GREETING + b"\x04\x08\x07NOTHING",
}


@pytest.mark.parametrize("first", DISTURBED)
@pytest.mark.parametrize("plane", PLANES)
def test_who_is_disturbed_while_it_greets_is_not_taken_for_another(
    net: Net, plane: Plane, first: str
) -> None:
    """It is asked in peace what it is, and then tried again, without anybody's doing."""
    hub, endpoints = net.server()
    between = Between(endpoints[plane].port, DISTURBED[first])
    try:
        client = net.client("pi-1", {plane: replace(endpoints[plane], port=between.port)})
        assert client.send(plane, "hub", [b"hello"])
        heard = pump(client, hub)
        assert [one.reason for one in lost(heard)] == [LOST]
        pump(client, hub, until=lambda heard: client.is_up(plane, "hub"))
        greet(hub, client, planes=[plane])
    finally:
        between.close()
