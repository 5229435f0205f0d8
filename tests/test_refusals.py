"""Who is turned away, over real sockets: each is told apart, and nothing that it sends arrives."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress
from functools import partial

import pytest
import zmq
from wires import HOST, PLANES, Net, RawClient, greet, lost, pump, received

from cluster import sockets
from cluster.keys import generate_keypair
from cluster.ports import draw_wire_id
from cluster.transport import Endpoint, Lost, Plane, Transport
from meshinfer import limits
from meshinfer.protocol.joining import Admission


def test_a_strangers_key_is_refused_and_told_so_until_it_is_admitted(net: Net) -> None:
    hub, endpoints = net.server()
    stranger = generate_keypair()
    client = net.transport("pi-3#1", stranger)
    for plane in PLANES:
        client.connect(plane, "hub", endpoints[plane])
        assert client.send(plane, "hub", [b"let me in"])
    heard = pump(client, hub, until=lambda heard: len(heard) >= 2)
    assert sorted(lost(heard), key=str) == [
        Lost(p, "hub", sockets.REFUSED) for p in reversed(PLANES)
    ]
    assert not client.send(Plane.CONTROL, "hub", [b"let me in"])
    assert pump(hub, client, within_s=0.2) == []
    hub.admit([*net.members, Admission(stranger.public, "pi-3", "worker")])
    for plane in PLANES:
        client.connect(plane, "hub", endpoints[plane])  # after a refusal the caller tries again
    greet(hub, client)


def test_a_plaintext_client_is_refused(net: Net) -> None:
    hub, endpoints = net.server()
    for plane in PLANES:
        with RawClient(net, endpoints[plane], plain=True) as raw:
            raw.send(b"hello")
            assert pump(hub, within_s=0.3) == []
    greet(hub, net.client("pi-1#1", endpoints))


def test_a_server_without_encryption_gets_nothing_and_is_named(net: Net) -> None:
    client = net.transport("pi-1#1")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as plain:
        plain.linger = 0
        port = plain.bind_to_random_port(f"tcp://{HOST}")
        client.connect(Plane.CONTROL, "hub", Endpoint(HOST, port, net.own.public))
        assert client.send(Plane.CONTROL, "hub", [b"hello"])
        assert pump(client) == [Lost(Plane.CONTROL, "hub", sockets.PLAINTEXT)]
        assert not plain.poll(200)


@pytest.mark.parametrize("of_server", [False, True])
def test_a_side_with_and_a_side_without_encryption_refuse_each_other(
    net: Net, of_server: bool
) -> None:
    net.plaintext = of_server
    hub, endpoints = net.server()
    net.plaintext = not of_server
    client = net.client("pi-1#1", endpoints)
    for plane in PLANES:
        assert client.send(plane, "hub", [b"hello"])
    told = Lost(
        Plane.CONTROL, "hub", sockets.ENCRYPTED if of_server is False else sockets.PLAINTEXT
    )
    heard = pump(client, hub, until=lambda heard: told in heard)
    assert [one for one in heard if one.plane is Plane.CONTROL] == [told]
    assert pump(hub, client, within_s=0.3) == []
    net.plaintext = of_server
    greet(hub, net.client("pi-2#1", endpoints))


def test_a_server_with_another_key_gets_nothing_and_is_told_apart(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.transport("pi-1#1")
    wrong = Endpoint(HOST, endpoints[Plane.CONTROL].port, generate_keypair().public)
    client.connect(Plane.CONTROL, "hub", wrong)
    assert client.send(Plane.CONTROL, "hub", [b"hello"])
    assert pump(client, hub) == [Lost(Plane.CONTROL, "hub", sockets.WRONG_KEY)]
    assert pump(client, hub, within_s=0.6) == [], "one loss for one outage, however often tried"
    client.connect(Plane.CONTROL, "hub", endpoints[Plane.CONTROL])  # another endpoint: replaced
    greet(hub, client, planes=[Plane.CONTROL])


def test_what_is_no_zeromq_is_told_apart(net: Net) -> None:
    client = net.transport("pi-1#1")
    with socket.create_server((HOST, 0)) as server:
        over = threading.Event()

        def answer() -> None:
            server.settimeout(0.1)
            while not over.is_set():
                with suppress(TimeoutError):
                    caller, _ = server.accept()
                    with caller:
                        caller.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

        web = threading.Thread(target=answer)
        web.start()
        try:
            place = Endpoint(HOST, server.getsockname()[1], net.own.public)
            client.connect(Plane.CONTROL, "hub", place)
            told = Lost(Plane.CONTROL, "hub", sockets.NOT_OURS)
            assert told in pump(client, until=lambda heard: told in heard)
        finally:
            over.set()
            web.join(5.0)


def test_who_is_connected_but_says_nothing_is_not_called_another(net: Net) -> None:
    """It may be ours, and frozen: that is no reason to give up."""
    client = net.transport("pi-1#1")
    with socket.create_server((HOST, 0)) as silent:
        client.connect(
            Plane.CONTROL, "hub", Endpoint(HOST, silent.getsockname()[1], net.own.public)
        )
        heard = pump(client)
    assert heard and not {one.reason for one in lost(heard)} & sockets.FINAL


def test_a_dead_gatekeeper_admits_nobody(net: Net) -> None:
    hub, endpoints = net.server()
    hub.gatekeeper.stop()
    client = net.client("pi-1#1", endpoints)
    for plane in PLANES:
        assert client.send(plane, "hub", [b"hello"])
    heard = pump(client, hub, until=lambda heard: len(heard) >= 2)
    assert {(one.plane, one.reason) for one in lost(heard)} == {
        (Plane.CONTROL, sockets.WRONG_KEY),
        (Plane.BULK, sockets.NOT_YET),
    }
    assert pump(hub, client, within_s=0.3) == []


def test_nobody_at_the_address_is_told_once(net: Net) -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    client = net.transport("pi-1#1")
    client.connect(Plane.BULK, "hub", Endpoint(HOST, port, net.own.public))
    assert pump(client) == [Lost(Plane.BULK, "hub", sockets.CANNOT_CONNECT)]
    assert pump(client, within_s=0.4) == []


def test_a_message_to_an_unknown_peer_is_not_sent_and_a_hint_comes(net: Net) -> None:
    hub, _ = net.server()
    unbound = net.transport("pi-1#1")
    for one in (hub, unbound):
        for plane in PLANES:
            assert not one.send(plane, "nobody", [b"hello"])
            assert not one.send(plane, "nobody", [b"hello"])
            assert one.receive(0.0) == [Lost(plane, "nobody", sockets.NO_ROUTE)]
        assert one.receive(0.0) == []


def test_garbage_on_the_port_does_no_harm(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    greet(hub, client)
    chance = random.Random(7)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(54, b"\0")
    strangers: list[socket.socket] = []
    try:
        for number in range(60):
            stranger = socket.create_connection((HOST, endpoints[PLANES[number % 2]].port), 2.0)
            strangers.append(stranger)
            match number % 5:
                case 0:
                    stranger.sendall(chance.randbytes(chance.randrange(1, 4096)))
                case 1:
                    stranger.sendall(b"GET / HTTP/1.1\r\nHost: pi\r\n\r\n")
                case 2:  # a frame of 4 GiB before the handshake
                    stranger.sendall(greeting + b"\x02\0\0\0\x01\0\0\0\0")
                case 3:
                    stranger.sendall(greeting + chance.randbytes(300))
                case _:
                    pass  # stays silent
        for number in range(10):
            text = b"%d" % number
            assert client.send(Plane.CONTROL, "hub", [text])
            assert received(pump(hub, client)) == [(Plane.CONTROL, "pi-1#1", [text])]
        greet(hub, net.client("pi-2#1", endpoints))
    finally:
        for stranger in strangers:
            stranger.close()
    assert pump(hub, client, within_s=0.3) == [], "strangers that come and go are no losses"


def test_an_oversized_frame_is_rejected_and_the_others_are_served(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    greet(hub, client)
    too_much = {Plane.CONTROL: limits.CONTROL_FRAME_BYTES, Plane.BULK: limits.FRAME_BYTES}
    for plane, size in too_much.items():
        with RawClient(net, endpoints[plane]) as raw:
            raw.send(b"ok")
            assert received(pump(hub)) == [(plane, "raw", [b"ok"])]
            raw.send(bytes(size + 1))
            assert received(pump(hub, client, within_s=0.3)) == []
    greet(hub, client)


def test_messages_of_no_or_too_many_frames_and_of_nameless_peers_are_dropped(net: Net) -> None:
    hub, endpoints = net.server()
    with RawClient(net, endpoints[Plane.CONTROL]) as raw:
        raw.send_multipart([b"x"] * (limits.FRAMES_PER_MESSAGE + 1))
        raw.send_multipart([b"y"] * limits.FRAMES_PER_MESSAGE)
        heard = received(pump(hub))
        assert [len(frames) for _, _, frames in heard] == [limits.FRAMES_PER_MESSAGE]
    assert hub.counters["frames per message"] == 1
    drawn = draw_wire_id("raw")
    forms = b"", b"raw", b"\xff" + drawn, b"~" + drawn[3:], drawn[:-1], drawn[:-1] + b"X", drawn[3:]
    for number, routing_id in enumerate(forms):
        nameless = RawClient(net, endpoints[Plane.BULK])
        with nameless as raw:
            raw.disconnect(str(nameless.endpoint))
            raw.routing_id = routing_id or b"\xfe"
            raw.connect(str(nameless.endpoint))
            raw.send(b"who am I")
            heard = pump(hub, until=partial(_more_than, hub, "peer without a name", number))
            assert not received(heard) and hub.counters["peer without a name"] == number + 1


def _more_than(hub: Transport, what: str, count: int, _: object) -> bool:
    return hub.counters[what] > count
