"""The loop between a core and its sockets: what it adds to the effects that it performs."""

from __future__ import annotations

import io
import queue
import sys
import threading
import time
from functools import partial

import pytest
import structlog
import zmq
from wires import Net, RawClient

from cluster import telemetry
from cluster.keys import generate_keypair
from cluster.loop import Loop, report
from cluster.transport import Endpoint, Plane, Transport
from meshinfer.protocol.codec import encode
from meshinfer.protocol.messages import Chunk
from meshinfer.protocol.records import BESIDE_COORDINATOR, Peer
from meshinfer.scheduler.events import Arrived, Connect, Effect, Event, Stop

KEY = generate_keypair()


class Recording(Transport):
    """Notes where it is told to connect."""

    seen: list[tuple[str, str, int]]

    def connect(self, plane: Plane, peer: str, endpoint: Endpoint) -> None:
        self.seen.append((peer, endpoint.host, endpoint.port))


class Script:
    """A core that asks for the connections of two peers, then stops."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        peers = [
            Peer(device="head", incarnation="1", host=BESIDE_COORDINATOR, port=1, key=KEY.public),
            Peer(device="pi", incarnation="1", host="192.0.2.7", port=2, key=KEY.public),
        ]
        return [*(Connect(peer) for peer in peers), Stop()]

    def next_deadline(self) -> float | None:
        return None


def test_who_is_beside_the_coordinator_is_reached_by_the_address_that_led_to_it() -> None:
    Recording.seen = []
    coordinator = Endpoint("198.51.100.3", 7433, KEY.public)
    loop = Loop(Script(), partial(Recording, "me#1", KEY), lambda effect: None, coordinator)
    assert loop.run() is None
    assert Recording.seen == [("head#1", "198.51.100.3", 1), ("pi#1", "192.0.2.7", 2)]


class Hearing:
    """A core that keeps what arrives; it says where its shell listens."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        self.heard.append(event)
        return []

    def next_deadline(self) -> float | None:
        return None


def test_a_connection_ends_with_what_is_no_message_and_bears_a_wrong_checksum() -> None:
    net, core, ports = Net(), Hearing(), queue.Queue[Endpoint]()

    def listen() -> Transport:
        hub, endpoints = net.server()
        ports.put(endpoints[Plane.BULK])
        return hub

    loop = Loop(core, listen, lambda effect: None)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        told = RawClient(net, ports.get(timeout=10.0), events=zmq.EVENT_DISCONNECTED)
        with told as raw:
            ended = told.monitor
            assert ended is not None
            header, body = encode(Chunk(digest="a" * 64, offset=0, total=4), b"body")
            for frames, ends in (
                ([header, b"b0dy"], False),
                ([b"garbage"], True),
                ([header, body], None),
            ):
                raw.send_multipart(frames)
                if ends is not None:
                    assert bool(ended.poll(5000 if ends else 500)) == ends
            deadline = time.monotonic() + 5.0  # the last went by a new connection
            while (
                not any(isinstance(e, Arrived) for e in core.heard) and time.monotonic() < deadline
            ):
                time.sleep(0.01)
        assert [e.payload for e in core.heard if isinstance(e, Arrived)] == [b"body"]
        assert sum(loop.dropped.values()) == 2
    finally:
        loop.post(Stop())
        thread.join(10.0)


def test_a_defect_is_told_on_when_nobody_can_read_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who embeds us may replace stderr and close the old one, or close the one there is."""
    before = structlog.get_config()
    first, second = io.StringIO(), io.StringIO()
    try:
        monkeypatch.setattr(sys, "stderr", first)
        telemetry.configure()
        monkeypatch.setattr(sys, "stderr", second)
        first.close()
        assert report(ZeroDivisionError("planted")).message
        assert "planted" in second.getvalue()
        second.close()
        assert "planted" in report(ZeroDivisionError("planted")).message
    finally:
        structlog.configure(**before)
