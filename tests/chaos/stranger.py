"""Somebody in the network who has no key: raw sockets, nothing of ours. Until its stdin ends.

``stranger.py crowd COUNT HOST:PORT...`` holds so many connections open, and talks garbage on each.
``stranger.py records CLUSTER COUNT ADDRESS`` announces so many coordinators that are none, at its
own address, where it listens; every other one with the words of the true one. What it did and saw
is one JSON line at the end.
"""

from __future__ import annotations

import json
import random
import selectors
import socket
import struct
import sys
import threading
import time
from contextlib import suppress

AGAIN_EVERY_S = 0.002
"""Between two connections: what was closed is opened again, if need be some hundred times a second:
who says nothing is shown out after a second."""

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
NULL_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
FOUR_GIB = b"\x02" + struct.pack(">Q", 1 << 32)

MDNS = ("224.0.0.251", 5353)
PACKETS_A_SECOND = 1000
_PTR, _TXT, _A, _SRV = 12, 16, 1, 33


def openings(rng: random.Random) -> list[bytes]:
    """What strangers say first: nothing, a greeting and nothing more, a frame of 4 GiB, noise,
    another protocol, a plaintext peer's words."""
    return [
        b"",
        GREETING,
        GREETING + FOUR_GIB,
        GREETING + b"\x04\xc8" + b"\x05HELLO" + rng.randbytes(194),
        NULL_GREETING + READY + FOUR_GIB,
        rng.randbytes(rng.randrange(1, 4096)),
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    ]


class Crowd:
    """``count`` connections to these places, opened again as they are closed."""

    def __init__(self, count: int, places: list[tuple[str, int]]) -> None:
        self.rng = random.Random(count)
        self.count, self.places = count, places
        self.waiting = selectors.DefaultSelector()
        self.open = self.made = self.refused = self.closed = self.heard = 0

    def run(self, over: threading.Event) -> dict[str, int]:
        most, at = 0, 0.0
        while not over.is_set():
            if self.open < self.count and time.monotonic() >= at:
                at = time.monotonic() + AGAIN_EVERY_S
                self.come()
            if not self.open:
                time.sleep(AGAIN_EVERY_S)
                continue
            for key, _ in self.waiting.select(AGAIN_EVERY_S):
                self.hear(key.fileobj)
            most = max(most, self.open)
        return {
            "made": self.made, "most": most, "refused": self.refused, "closed": self.closed,
            "heard_bytes": self.heard,
        }  # fmt: skip

    def come(self) -> None:
        place = self.places[self.made % len(self.places)]
        self.made += 1
        silent = self.rng.random() < 0.75
        said = b"" if silent else self.rng.choice(openings(self.rng))
        try:
            connection = socket.create_connection(place, timeout=1.0)
            connection.sendall(said)
        except OSError:
            self.refused += 1
            return
        connection.setblocking(False)
        self.waiting.register(connection, selectors.EVENT_READ)
        self.open += 1

    def hear(self, connection: socket.socket) -> None:
        data = b""
        with suppress(OSError):
            data = connection.recv(1 << 16)
        self.heard += len(data)
        if not data:
            self.waiting.unregister(connection)
            connection.close()
            self.open, self.closed = self.open - 1, self.closed + 1


def name(text: str) -> bytes:
    return b"".join(bytes((len(part),)) + part.encode() for part in text.split(".")) + b"\0"


SERVICE = name("_meshinfer._tcp.local")
QUESTION = struct.pack(">HH", _PTR, 1)


def record(owner: bytes, kind: int, data: bytes, *, unique: bool) -> bytes:
    return owner + struct.pack(">HHIH", kind, 0x8001 if unique else 1, 120, len(data)) + data


def overheard(address: str) -> bytes:
    """The text record of the true coordinator; anybody may ask for it. Empty if nobody answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        udp.settimeout(2.0)
        for _ in range(3):
            with suppress(TimeoutError):
                udp.sendto(struct.pack(">HHHHHH", 1, 0, 1, 0, 0, 0) + SERVICE + QUESTION, MDNS)
                if found := text_in(udp.recv(9000)):
                    return found
    return b""


def text_in(packet: bytes) -> bytes:
    """The data of the first TXT record (RFC 1035, with pointers in names)."""
    _, _, questions, *counts = struct.unpack_from(">HHHHHH", packet)
    at = 12
    for i in range(questions + sum(counts)):
        while packet[at] and packet[at] < 0xC0:
            at += packet[at] + 1
        at += 2 if packet[at] else 1
        if i < questions:
            at += 4
            continue
        kind, _, _, length = struct.unpack_from(">HHIH", packet, at)
        at += 10
        if kind == _TXT:
            return packet[at : at + length]
        at += length
    return b""


def announcement(cluster: str, i: int, address: str, port: int, text: bytes) -> bytes:
    """One packet with all that a browser would ask for (RFC 6762, 6763)."""
    service = SERVICE
    label = f"{cluster}@evil-{i}".encode()
    instance, host = bytes((len(label),)) + label + service, name(f"evil-{i}.local")
    answers = (
        record(service, _PTR, instance, unique=False),
        record(instance, _SRV, struct.pack(">HHH", 0, 0, port) + host, unique=True),
        record(instance, _TXT, text, unique=True),
        record(host, _A, socket.inet_aton(address), unique=True),
    )
    return struct.pack(">HHHHHH", 0, 0x8400, 0, len(answers), 0, 0) + b"".join(answers)


def own_words(cluster: str, port: int, rng: random.Random) -> bytes:
    texts = (f"cluster={cluster}", "protocol=1-99", f"key={rng.randbytes(8).hex()}", f"join={port}")
    return b"".join(bytes((len(t),)) + t.encode() for t in texts)


class Impostor:
    """Listens where the records lead, and speaks as a peer without keys would: who then says more
    than a greeting that refuses him, or a handshake's first word, has opened a session."""

    def __init__(self, address: str) -> None:
        self.listener = socket.create_server((address, 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.came = self.sessions = 0
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            self.came += 1
            threading.Thread(target=self.speak, args=(connection,), daemon=True).start()

    def speak(self, connection: socket.socket) -> None:
        said = b""
        with suppress(OSError), connection:
            connection.settimeout(2.0)
            connection.sendall(NULL_GREETING if self.came % 2 else GREETING)
            while more := connection.recv(1 << 16):
                said += more
                if b"READY" in said:
                    connection.sendall(READY)
        self.sessions += b"READY" in said or b"INITIATE" in said


def records(cluster: str, count: int, address: str, over: threading.Event) -> dict[str, int]:
    rng, impostor, sent, true = random.Random(count), Impostor(address), 0, overheard(address)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    udp.bind((address, MDNS[1]))  # an answer comes from this port, or nobody believes it
    udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
    while sent < count and not over.is_set():
        with suppress(OSError):
            own = own_words(cluster, impostor.port, rng)
            text = true if sent % 2 and true else own
            udp.sendto(announcement(cluster, sent, address, impostor.port, text), MDNS)
        sent += 1
        if sent % 10 == 0:
            time.sleep(10 / PACKETS_A_SECOND)
    say({"sent": sent})
    over.wait()
    told = {"came": impostor.came, "sessions": impostor.sessions, "overheard": len(true)}
    return {"sent": sent, **told}


def say(what: dict[str, int]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main(what: str, *arguments: str) -> None:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    if what == "crowd":
        pairs = [place.rpartition(":") for place in arguments[1:]]
        saw = Crowd(int(arguments[0]), [(host, int(port)) for host, _, port in pairs]).run(over)
    else:
        saw = records(arguments[0], int(arguments[1]), arguments[2], over)
    say(saw)


if __name__ == "__main__":
    main(*sys.argv[1:])
