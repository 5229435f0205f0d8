"""A process that all TCP of a LocalCluster's workers goes through, so that it can be stopped.

Cut off, nothing passes and every connection stays: as behind a dead switch, and without root.
Started by ``cluster.local``; told what to do by JSON lines on stdin, whose end is its own.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from meshinfer.errors import ClusterUnavailable

LOOPBACK: Final = "127.0.0.1"
_CHUNK_BYTES: Final = 1 << 18
_BACKLOG: Final = 128
_SOCKS: Final = 5
_NO_AUTHENTICATION, _CONNECT, _IPV4 = 0, 1, 1  # RFC 1928


class Gate:
    """The ways of all workers at one address. What passes between two ends waits while either is
    cut off."""

    def __init__(self, host: str = LOOPBACK) -> None:
        self._host = host
        self._cuts: set[frozenset[str]] = set()  # of one: from everybody; of two: of each other
        self._changed = threading.Condition()
        self._reached_at: dict[int, str] = {}  # which worker a port leads to

    def add(self, name: str, behind: int) -> dict[str, int]:
        """Open a worker's ways; ``behind`` is where it will listen. The ports of both."""
        inward, outward = (
            socket.create_server((self._host, 0), backlog=_BACKLOG) for _ in range(2)
        )
        front, outbound = inward.getsockname()[1], outward.getsockname()[1]
        self._reached_at[front] = name
        self._start(self._serve, inward, name, behind)
        self._start(self._serve, outward, name, None)
        return {"front": front, "outbound": outbound}

    def cut(self, names: list[str]) -> None:
        """Stop one worker's traffic, or that between two."""
        with self._changed:
            self._cuts.add(frozenset(names))

    def heal(self, names: list[str]) -> None:
        """End all cuts with these workers."""
        with self._changed:
            self._cuts = {cut for cut in self._cuts if not cut & set(names)}
            self._changed.notify_all()

    # --- inside

    def _serve(self, listener: socket.socket, name: str, behind: int | None) -> None:
        while True:
            self._wait_until_open(name)
            connection, _ = listener.accept()
            self._start(self._connect, connection, name, behind)

    def _connect(self, near: socket.socket, name: str, behind: int | None) -> None:
        """Join a new connection to where it is to lead, in or out."""
        other, far = "", None
        with suppress(OSError):
            if behind is None:
                host, port = _destination(near)
                other = self._reached_at.get(port, "")
            else:
                host, port = self._host, behind
            self._wait_until_open(name, other)
            far = socket.create_connection((host, port))
            if behind is None:
                near.sendall(bytes((_SOCKS, 0, 0, _IPV4, 0, 0, 0, 0, 0, 0)))
        if far is None:  # nobody is there: it shall try again
            near.close()
            return
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._start(self._pump, near, far, name, other)
        self._pump(far, near, name, other)

    def _pump(self, source: socket.socket, sink: socket.socket, name: str, other: str) -> None:
        with suppress(OSError):
            while data := self.passed(source.recv(_CHUNK_BYTES)):
                self._wait_until_open(name, other)
                sink.sendall(data)
        self._wait_until_open(name, other)  # that one end is gone is news as well
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def passed(self, data: bytes) -> bytes:
        """What arrives of what was sent."""
        return data

    def _wait_until_open(self, name: str, other: str = "") -> None:
        ends = {name, other}
        with self._changed:
            self._changed.wait_for(lambda: not any(cut <= ends for cut in self._cuts))

    def _start(self, body: Any, *arguments: Any) -> None:
        threading.Thread(target=body, args=arguments, daemon=True).start()


class GateProcess:
    """The other end: a gate in a process of its own, that a busy user does not slow down.

    ``spawn`` starts it, given what to run and options of ``Popen``.
    """

    def __init__(
        self, spawn: Callable[..., subprocess.Popen] = subprocess.Popen, *argv: str
    ) -> None:
        self._process = spawn(
            [sys.executable, *(argv or ("-m", "cluster.gate"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, what: str, **how: Any) -> Any:
        """Have it done. Raises ``ClusterUnavailable`` when the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": what, **how}) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise ClusterUnavailable("the gate has ended", hint="make a new LocalCluster")
        return json.loads(answer)

    def close(self) -> None:
        """End it, and with it all connections."""
        self._process.kill()
        self._process.communicate()


def _destination(connection: socket.socket) -> tuple[str, int]:
    """The IPv4 address and port that a SOCKS5 client asks for. Raises ``OSError``."""
    _, methods = _exactly(connection, 2)
    _exactly(connection, methods)
    connection.sendall(bytes((_SOCKS, _NO_AUTHENTICATION)))
    version, command, _, kind = _exactly(connection, 4)
    if (version, command, kind) != (_SOCKS, _CONNECT, _IPV4):
        raise OSError("not a SOCKS5 request to connect to an IPv4 address")
    address, port = struct.unpack("!4sH", _exactly(connection, 6))
    return socket.inet_ntoa(address), port


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise OSError("closed")
        data += more
    return data


def serve(gate: Gate) -> None:
    """Do what each line on stdin says, and answer it with a line."""
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(gate, command.pop("do"))(**command)
        os.write(sys.stdout.fileno(), json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve(Gate())
