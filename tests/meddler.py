"""A man in the middle, as a stranger would write one: plain TCP and SOCKS5, nothing of ours.

It stands where ``cluster.gate`` does (JSON lines on stdin, an answer each) and passes everything on
between workers and whoever they talk to, until it is told to meddle with what passes next.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import Any

HOST = "127.0.0.1"
KINDS = (
    "flip", "noise", "truncate", "drop", "insert", "duplicate", "swap", "replay", "reflect", "end",
)  # fmt: skip
OLD = 64
RECORDED_BYTES = 1 << 16


class Meddler:
    """``waiting``: what is to be done to the pieces that pass next."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: deque[tuple[str, int, int]] = deque()
        self.count = 0
        self.old: dict[bool, deque[bytes]] = {True: deque(maxlen=OLD), False: deque(maxlen=OLD)}
        self.records: list[dict[str, Any]] = []

    # --- what it is told

    def add(self, name: str, behind: int) -> dict[str, int]:
        """Ways in (``front``, to the worker at ``behind``) and out (``outbound``: SOCKS5)."""
        ports = {}
        for way, port in (("front", behind), ("outbound", None)):
            listener = socket.create_server((HOST, 0), backlog=128)
            ports[way] = listener.getsockname()[1]
            self.start(self.accept, listener, port)
        return ports

    def meddle(self, kind: str, seed: int, least: int) -> None:
        """Once, with the next piece of at least so many bytes, in either direction."""
        with self.lock:
            self.waiting.append((kind, seed, least))

    def done(self) -> int:
        """How often it has meddled; what waits is forgotten."""
        with self.lock:
            self.waiting.clear()
            return self.count

    def recorded(self) -> list[dict[str, Any]]:
        """How connections began: where they led, and what was said each way, in hex."""
        with self.lock:
            return [{"port": r["port"], "said": [s.hex() for s in r["said"]]} for r in self.records]

    # --- inside

    def start(self, body: Any, *arguments: Any) -> None:
        threading.Thread(target=body, args=arguments, daemon=True).start()

    def accept(self, listener: socket.socket, port: int | None) -> None:
        while True:
            near, _ = listener.accept()
            self.start(self.join, near, port)

    def join(self, near: socket.socket, port: int | None) -> None:
        try:
            host, to = destination(near) if port is None else (HOST, port)
            far = socket.create_connection((host, to))
            if port is None:
                near.sendall(bytes((5, 0, 0, 1, 0, 0, 0, 0, 0, 0)))
        except OSError:
            near.close()
            return
        record = {"port": to, "said": [], "length": 0}
        with self.lock:
            self.records.append(record)
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.start(self.pump, near, far, True, record)
        self.pump(far, near, False, record)

    def pump(
        self, source: socket.socket, sink: socket.socket, out: bool, record: dict[str, Any]
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                for piece in self.passed(data, out, record):
                    sink.sendall(piece)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def passed(self, data: bytes, out: bool, record: dict[str, Any]) -> list[bytes]:
        """What arrives of it. Raises ``OSError`` to end the connection."""
        with self.lock:
            if out and record["length"] < RECORDED_BYTES:
                record["said"].append(data)
                record["length"] += len(data)
            what = None
            if self.waiting and len(data) >= self.waiting[0][2]:
                what, self.count = self.waiting.popleft(), self.count + 1
            mine, other = list(self.old[out]), list(self.old[not out])
            self.old[out].append(data)
        return [data] if what is None else spoiled(data, *what[:2], mine, other)


def spoiled(
    data: bytes, kind: str, seed: int, mine: list[bytes], other: list[bytes]
) -> list[bytes]:
    rng = random.Random(seed)
    at = rng.randrange(len(data))
    match kind:
        case "flip":
            return [data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]]
        case "noise":
            return [data[:at] + rng.randbytes(min(64, len(data) - at)) + data[at + 64 :]]
        case "truncate":
            return [data[:at]]
        case "drop":
            return []
        case "insert":
            return [data[:at] + rng.randbytes(rng.randrange(1, 64)) + data[at:]]
        case "duplicate":
            return [data, data]
        case "swap":
            return [data[at:] + data[:at]]
        case "replay":
            return [data, rng.choice(mine)] if mine else [data, data]
        case "reflect":
            return [rng.choice(other)] if other else []
        case _:
            raise OSError("ended")


def destination(connection: socket.socket) -> tuple[str, int]:
    """Where a SOCKS5 client wants to go (RFC 1928, no authentication, IPv4)."""
    exactly(connection, exactly(connection, 2)[1])
    connection.sendall(bytes((5, 0)))
    exactly(connection, 4)
    address, port = struct.unpack("!4sH", exactly(connection, 6))
    return socket.inet_ntoa(address), port


def exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise OSError("closed")
        data += more
    return data


def main() -> None:
    meddler = Meddler()
    tasks = {"add": meddler.add, "meddle": meddler.meddle, "done": meddler.done}
    tasks["recorded"] = meddler.recorded
    for line in sys.stdin:
        command = json.loads(line)
        answer = tasks[command.pop("do")](**command)
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
