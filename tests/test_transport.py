"""Real sockets on 127.0.0.1: what arrives, and how a loss is noticed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import zmq
from entries import entries
from wires import HOST, MIB, PLANES, Net, RawClient, counted, greet, lost, pump, received

from cluster import sockets
from cluster.keys import generate_keypair
from cluster.ports import draw_wire_id
from cluster.transport import Endpoint, Lost, Plane, Received, Transport
from meshinfer import limits
from meshinfer.errors import AuthError, ConfigurationError


@dataclass
class Wiretap:
    """Passes on what comes to its port to another, both ways, and keeps a copy."""

    target: int
    heard: bytearray = field(default_factory=bytearray)

    def __enter__(self) -> int:
        self.listening = socket.create_server((HOST, 0))
        self.connections: list[socket.socket] = []
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()
        return int(self.listening.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        for one in (self.listening, *self.connections):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5.0)
        for one in (self.listening, *self.connections):
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            near, _ = self.listening.accept()
            far = socket.create_connection((HOST, self.target), 5.0)
            self.connections += [near, far]
            for ends in ((near, far), (far, near)):
                self.threads.append(threading.Thread(target=self._pass_on, args=ends))
                self.threads[-1].start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.heard += data
                sink.sendall(data)


# --- what arrives -----------------------------------------------------------------------------


def test_both_planes_carry_messages_both_ways(net: Net) -> None:
    hub, endpoints = net.server()
    first, second = net.client("pi-1#1", endpoints), net.client("pi-2#1", endpoints)
    greet(hub, first, second)
    for plane in PLANES:
        for client in (first, second):
            text = f"{plane} to {client.identity}".encode()
            assert hub.send(plane, client.identity, [text, b"", memoryview(b"end")])
            heard = pump(client, hub)
            assert received(heard) == [(plane, "hub", [text, b"", b"end"])]


@pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux")
def test_both_ends_of_a_connection_resend_lost_packets_without_doubling_the_wait(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    greet(hub, client)
    for _ in range(20):  # until what the monitors tell is read
        hub.receive(0.02)
        client.receive(0.02)
    ports = {endpoint.port for endpoint in endpoints.values()}
    found: dict[tuple[int, bool], int] = {}
    for name in os.listdir("/proc/self/fd"):
        # a socket of Unix has an address without a port
        with suppress(OSError, IndexError), socket.socket(fileno=os.dup(int(name))) as each:
            here, there = each.getsockname()[1], each.getpeername()[1]
            for port in ports & {here, there}:
                found[port, here == port] = each.getsockopt(socket.IPPROTO_TCP, 16)
    assert found == {(port, accepted): 1 for port in ports for accepted in (False, True)}


def test_eight_mib_travel_in_frames_of_one_mib_and_arrive_read_only(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    frames = [random.Random(i).randbytes(MIB) for i in range(8)]
    assert client.send(Plane.BULK, "hub", [b"header", *(memoryview(frame) for frame in frames)])
    heard = pump(hub, client)
    assert received(heard) == [(Plane.BULK, "pi-1#1", [b"header", *frames])]
    message = heard[0]
    assert isinstance(message, Received) and all(frame.readonly for frame in message.frames)
    assert hub.send(Plane.BULK, "pi-1#1", message.frames), "what came in can be sent on as it is"
    assert received(pump(client, hub)) == [(Plane.BULK, "hub", [b"header", *frames])]


def test_a_frame_of_exactly_the_limit_passes_although_encryption_makes_it_longer(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    full = {Plane.CONTROL: limits.CONTROL_FRAME_BYTES, Plane.BULK: limits.FRAME_BYTES}
    for plane, size in full.items():
        assert client.send(plane, "hub", [bytes(size)])
        assert received(pump(hub, client)) == [(plane, "pi-1#1", [bytes(size)])]
        with pytest.raises(AssertionError, match="cut above"):
            client.send(plane, "hub", [bytes(size + 1)])
    for frames in ([], [b""] * (limits.FRAMES_PER_MESSAGE + 1)):
        with pytest.raises(AssertionError, match="cut above"):
            client.send(Plane.CONTROL, "hub", frames)


def test_control_comes_before_bulk_and_each_peer_has_its_turn(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DRAIN_MESSAGES", 4)
    first, first_endpoints = net.server("hub")
    second, second_endpoints = net.server("other")
    reader = net.client("pi-1#1", first_endpoints)
    for plane, endpoint in second_endpoints.items():
        reader.connect(plane, "other", endpoint)
    for plane in PLANES:
        assert reader.send(plane, "hub", [b"hello"]) and reader.send(plane, "other", [b"hello"])
    for server in (first, second):
        assert len(received(pump(server, reader, until=counted(2)))) == 2
    for number in range(8):
        assert first.send(Plane.BULK, "pi-1#1", [b"%d" % number])
        assert second.send(Plane.BULK, "pi-1#1", [b"%d" % number])
    assert first.send(Plane.CONTROL, "pi-1#1", [b"now"])
    time.sleep(0.3)  # all of it is there
    drained = [received(reader.receive(1.0)) for _ in range(4)]
    assert [len(messages) for messages in drained] == [5, 4, 4, 4]
    assert drained[0][0] == (Plane.CONTROL, "hub", [b"now"])
    for messages in drained:
        peers = [peer for plane, peer, _ in messages if plane is Plane.BULK]
        assert sorted(peers) == ["hub", "hub", "other", "other"]


def test_the_threads_stay_apart_and_wake_ends_a_wait_early(net: Net) -> None:
    one = net.transport("pi-1#1")
    one.wake()
    one.wake()
    started = time.monotonic()
    assert one.receive(5.0) == []
    waker = threading.Timer(0.1, one.wake)
    waker.start()
    assert one.receive(5.0) == []
    waker.join()
    assert 0.09 < time.monotonic() - started < 2.0
    assert one.receive(0.0) == []
    failures: list[str] = []

    def intrude() -> None:
        try:
            one.receive(0.0)
        except AssertionError as error:
            failures.append(str(error))

    intruder = threading.Thread(target=intrude)
    intruder.start()
    intruder.join()
    assert failures == ["not this transport's thread"]
    for _ in range(100_000):  # far more than the descriptor's buffer: never blocks
        one.wake()
    one.close()
    one.close()
    one.wake()


# --- without encryption, where the keyring says so -----------------------------------------------


def test_every_socket_has_curve_unless_it_is_asked_not_to(net: Net) -> None:
    for plaintext, mechanism in ((False, zmq.CURVE), (True, zmq.NULL)):
        net.plaintext = plaintext
        hub, endpoints = net.server()
        client = net.client("pi-1#1", endpoints)
        ends = [*hub._ports.values(), *client._links.values()]
        assert [each.socket.mechanism for each in ends] == [mechanism] * 4
    defaults = Transport.__init__.__defaults__
    assert defaults == ((), False, "", False), "encrypted is what nobody asks for"


@pytest.mark.parametrize("plaintext", [False, True])
def test_only_without_encryption_can_a_listener_read_what_is_sent(
    net: Net, plaintext: bool
) -> None:
    net.plaintext = plaintext
    hub, endpoints = net.server()
    there, back = random.Random(1).randbytes(5000), random.Random(2).randbytes(5000)
    tap = Wiretap(endpoints[Plane.BULK].port)
    with tap as port:
        client = net.transport("pi-1#1")
        client.connect(Plane.BULK, "hub", Endpoint(HOST, port, net.own.public))
        assert client.send(Plane.BULK, "hub", [there])
        assert received(pump(hub, client)) == [(Plane.BULK, "pi-1#1", [there])]
        assert hub.send(Plane.BULK, "pi-1#1", [back])
        assert received(pump(client, hub)) == [(Plane.BULK, "hub", [back])]
        client.disconnect("hub")
    assert len(tap.heard) > 10_000
    found = [secret[at : at + 16] in tap.heard for secret in (there, back) for at in (0, 999, 4984)]
    assert found == [plaintext] * 6


def test_without_encryption_the_limits_are_the_same(net: Net) -> None:
    net.plaintext = True
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    greet(hub, client)
    full = {Plane.CONTROL: limits.CONTROL_FRAME_BYTES, Plane.BULK: limits.FRAME_BYTES}
    for plane, size in full.items():
        assert client.send(plane, "hub", [bytes(size)])
        assert received(pump(hub, client)) == [(plane, "pi-1#1", [bytes(size)])]
        with RawClient(net, endpoints[plane], plain=True) as raw:
            raw.send(b"ok")
            assert received(pump(hub)) == [(plane, "raw", [b"ok"])], "anyone can join"
            raw.send(bytes(size + 1))
            assert received(pump(hub, client, within_s=0.3)) == []
    with RawClient(net, endpoints[Plane.CONTROL], plain=True) as raw:
        raw.send_multipart([b"x"] * (limits.FRAMES_PER_MESSAGE + 1))
        pump(hub, within_s=0.3)
    assert hub.counters["frames per message"] == 1
    greet(hub, client)


# --- losing and coming back --------------------------------------------------------------------


def test_a_peer_that_comes_back_under_its_name_takes_it_over(net: Net) -> None:
    hub, endpoints = net.server()
    before = net.client("pi-1#1", endpoints)
    greet(hub, before)
    after = net.client("pi-1#1", endpoints)
    greet(hub, after)
    for plane in PLANES:
        assert hub.send(plane, "pi-1#1", [b"to the new one"])
        assert received(pump(after, hub)) == [(plane, "hub", [b"to the new one"])]
    before.close()
    assert pump(hub, after, within_s=0.3) == [], "the name lives on by its new connection"
    after.close()
    assert pump(hub) == [Lost(Plane.CONTROL, "pi-1#1", sockets.LOST)]


def test_processes_that_connect_and_go_leave_nothing_but_the_last_few(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a name of its own: what was kept of all would add up. Who comes back is known."""
    monkeypatch.setattr(limits, "ROUTES_GONE", 2)
    hub, endpoints = net.server()
    stays = net.client("pi-2#1", endpoints)
    greet(hub, stays)
    held = []
    for i in range(9):
        comes = net.client(f"pi-1#{i}", endpoints)
        greet(hub, comes)
        comes.close()
        heard = pump(hub, stays)
        assert heard == [Lost(Plane.CONTROL, f"pi-1#{i}", sockets.LOST)]
        pump(hub, stays, within_s=0.1)  # the other plane's end
        held.append(entries(hub))
    assert not held[-1] - held[2], "more than after the third"
    assert not hub.send(Plane.CONTROL, "pi-1#0", [b"nobody"])
    again = net.client("pi-1#8", endpoints)
    greet(hub, stays, again)
    assert hub.send(Plane.CONTROL, "pi-1#8", [b"known"])


CHILD = """
import sys, time
from cluster.keys import KeyPair
from cluster.transport import Endpoint, Plane, Transport
from meshinfer.protocol.joining import Admission
control, bulk, hub_key, public, secret, other = sys.argv[1:]
me = Transport("pi-1#1", KeyPair(public, secret), [Admission(other, "pi-2", "worker")])
me.connect(Plane.CONTROL, "hub", Endpoint("127.0.0.1", int(control), hub_key))
me.connect(Plane.BULK, "hub", Endpoint("127.0.0.1", int(bulk), hub_key))
port = me.bind(Plane.CONTROL, "127.0.0.1")
me.send(Plane.BULK, "hub", [b"hello"])
me.send(Plane.CONTROL, "hub", [b"hello", str(port).encode(), me.public_key.encode()])
end = time.monotonic() + 20
while time.monotonic() < end:
    me.receive(0.1)
"""


def test_a_killed_process_is_noticed_within_a_second_by_both_sides_of_the_link(net: Net) -> None:
    hub, endpoints = net.server()
    member, other = net.keys["pi-1"], net.keys["pi-2"].public
    ports = [str(endpoints[plane].port) for plane in (Plane.CONTROL, Plane.BULK)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *ports, net.own.public, member.public, member.secret, other]
    )
    try:
        heard = received(pump(hub, until=counted(2), within_s=10.0))
        _, port, key = next(frames for plane, _, frames in heard if plane is Plane.CONTROL)
        caller = net.transport("pi-2#1")
        caller.connect(Plane.CONTROL, "pi-1#1", Endpoint(HOST, int(port), key.decode()))
        assert caller.send(Plane.CONTROL, "pi-1#1", [b"hello"])
        pump(caller, hub, within_s=0.3)
        os.kill(child.pid, signal.SIGKILL)
        killed = time.monotonic()
        assert pump(hub) == [Lost(Plane.CONTROL, "pi-1#1", sockets.LOST)]
        assert lost(pump(caller))[0] == Lost(Plane.CONTROL, "pi-1#1", sockets.LOST)
        assert time.monotonic() - killed < 1.0
    finally:
        child.kill()
        child.wait(10)
    for _ in range(100):  # the bulk connection ends on its own, at nearly the same time
        if not hub.send(Plane.BULK, "pi-1#1", [b"hello"]):
            break
        time.sleep(0.01)
    assert hub.receive(0.0) == [Lost(Plane.BULK, "pi-1#1", sockets.NO_ROUTE)]


STOOD_STILL = """
import sys
from cluster.keys import KeyPair
from cluster.transport import Plane, Transport
from meshinfer.protocol.joining import Admission
plane, device, own_public, own_secret = sys.argv[1:]
hub = Transport("hub", KeyPair(own_public, own_secret), [Admission(device, "pi-1", "worker")])
print(hub.bind(Plane(plane), "127.0.0.1"), flush=True)
while not hub.receive(1.0):
    pass
sys.stdin.readline()  # it reads nothing all the while
count = 0
while came := hub.receive(0.5):
    count += len(came)
print(count > 0, flush=True)
"""
FLOOD = """
import sys, time, zmq
place, wire, *keys = sys.argv[1:]
me = zmq.Context().socket(zmq.DEALER)
me.routing_id, me.sndhwm = wire.encode(), 0
me.heartbeat_ivl, me.heartbeat_timeout = 1, 60000
me.curve_publickey, me.curve_secretkey, me.curve_serverkey = (key.encode() for key in keys)
me.connect(place)
me.send(b"hello")
time.sleep(0.3)
for _ in range(2500):
    me.send(bytes(20))
    time.sleep(0.0005)  # and heartbeats among them
print("full", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("plane", list(Plane))
def test_who_floods_and_is_reset_does_not_abort_a_server_that_is_behind(
    net: Net, plane: Plane
) -> None:
    """Steps: the server reads no more; a stranger, or a member with a libzmq of its own, says much
    and has each millisecond a heartbeat to be answered; it is killed, which resets the connection;
    the server reads. libzmq 4.3.5 ends a process whose input stood at a mark then: !_io_error."""
    key = generate_keypair() if plane is Plane.JOIN else net.keys["pi-1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    own = (net.own.public, net.own.secret)
    hub = subprocess.Popen([sys.executable, "-c", STOOD_STILL, plane, key.public, *own], **pipes)
    with hub:
        assert hub.stdout is not None
        place = f"tcp://{HOST}:{hub.stdout.readline().strip()}"
        said = (place, draw_wire_id("pi-1#1").decode(), key.public, key.secret, net.own.public)
        peer = subprocess.Popen([sys.executable, "-c", FLOOD, *said], **pipes)
        with peer:
            assert peer.stdout is not None and peer.stdout.readline() == "full\n"
            peer.kill()
        time.sleep(0.3)  # until its end is known
        told, _ = hub.communicate("\n", timeout=20)
    assert (told, hub.returncode) == ("True\n", 0)


def test_a_link_reconnects_by_itself_when_its_server_is_back(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    greet(hub, client)
    hub.close()
    heard = pump(client, until=lambda heard: len(heard) >= 4)
    assert [one.reason for one in lost(heard) if one.plane is Plane.BULK] == [
        sockets.LOST,
        sockets.CANNOT_CONNECT,
    ]
    again = Transport("hub", net.own)
    again.admit(net.members)
    net.transports.append(again)
    for plane, endpoint in endpoints.items():
        assert again.bind(plane, HOST, endpoint.port) == endpoint.port
    greet(again, client)


def test_connecting_twice_changes_nothing_and_disconnecting_forgets(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    greet(hub, client)
    for plane, endpoint in endpoints.items():
        client.connect(plane, "hub", endpoint)
    greet(hub, client)
    client.disconnect("hub")
    client.disconnect("hub")
    assert not client.send(Plane.CONTROL, "hub", [b"hello"])
    assert client.receive(0.0) == [Lost(Plane.CONTROL, "hub", sockets.NO_ROUTE)]
    assert pump(hub) == [Lost(Plane.CONTROL, "pi-1#1", sockets.LOST)]


# --- full pipes --------------------------------------------------------------------------------


@pytest.mark.parametrize("server", [True, False], ids=["inbound", "outbound"])
def test_a_connection_that_is_renewed_ends_with_all_it_had_to_say_and_comes_back(
    net: Net, server: bool
) -> None:
    hub, endpoints = net.server()
    device = net.client("pi-1#1", endpoints)
    greet(hub, device)
    hub.send(Plane.BULK, "pi-1#1", [b"there"])
    assert len(received(pump(device, hub))) == 1
    one, other, name, of = (
        (hub, device, "pi-1#1", "hub") if server else (device, hub, "hub", "pi-1#1")
    )
    for _ in range(8):
        assert other.send(Plane.BULK, of, [b"old"])
    time.sleep(0.2)  # they are there, and not read
    one.renew(Plane.BULK, name)
    end, heard = time.monotonic() + 5.0, []
    while (Plane.BULK, name, [b"new"]) not in heard and time.monotonic() < end:
        other.send(Plane.BULK, of, [b"new"])
        heard += received(pump(one, other, within_s=0.1))
    assert {frames[0] for _, _, frames in heard} == {b"new"}


@pytest.mark.parametrize("who", ["dealer", "router"])
def test_a_backlog_is_bounded_and_arrives_in_order_once_there_is_room(
    net: Net, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setattr(limits, "BACKLOG_BYTES", 4 * MIB)
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    greet(hub, client)
    sender, peer, reader = (client, "hub", hub) if who == "dealer" else (hub, "pi-1#1", client)
    payload = bytes(MIB - 1024)
    taken = 0
    started = time.monotonic()
    for _ in range(400):
        if not sender.send(Plane.BULK, peer, [b"%d" % taken, payload]):
            break
        taken += 1
        sender.receive(0)  # what cannot be sent now must not keep it busy, or block it
    assert time.monotonic() - started < 3.0, "send never blocks"
    assert limits.HIGH_WATER_MARK < taken < 400, "the pipe and the backlog"
    assert sender.counters["backlog full"] == 1
    assert sender.send(Plane.CONTROL, peer, [b"control passes"])
    heard = received(pump(reader, sender, until=counted(taken + 1), within_s=10.0))
    numbers = [int(frames[0]) for plane, _, frames in heard if plane is Plane.BULK]
    assert numbers == list(range(taken))
    assert sender.send(Plane.BULK, peer, [b"again"])
    assert [frames for _, _, frames in received(pump(reader, sender))] == [[b"again"]]


def test_a_backlog_for_a_peer_that_dies_is_dropped_with_a_hint(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    greet(hub, client)
    while not hub.counters["backlog full"]:
        hub.send(Plane.BULK, "pi-1#1", [bytes(MIB)] * 8)
    client.close()
    heard = pump(hub, until=lambda heard: len(heard) >= 2)
    assert set(lost(heard)) == {
        Lost(Plane.CONTROL, "pi-1#1", sockets.LOST),
        Lost(Plane.BULK, "pi-1#1", sockets.NO_ROUTE),
    }
    assert hub.counters["dropped with its peer"] > 0


def test_a_full_pipe_to_one_peer_does_not_spin(net: Net) -> None:
    hub, endpoints = net.server()
    stuck, fine = net.client("pi-1#1", endpoints), net.client("pi-2#1", endpoints)
    greet(hub, stuck, fine)
    while not hub.counters["backlog full"]:
        hub.send(Plane.BULK, "pi-1#1", [bytes(MIB)] * 8)
    before = time.thread_time()
    assert hub.receive(0.5) == []
    assert time.thread_time() - before < 0.25, "POLLOUT of a ROUTER is true for the other peer"
    assert hub.send(Plane.BULK, "pi-2#1", [b"unhindered"])
    assert received(pump(fine, hub)) == [(Plane.BULK, "hub", [b"unhindered"])]


def test_closing_with_linger_sends_what_is_queued(net: Net) -> None:
    hub, endpoints = net.server()
    client = net.client("pi-1#1", endpoints)
    for number in range(20):
        assert client.send(Plane.CONTROL, "hub", [b"%d" % number])
    client.close(linger_s=1.0)  # before the handshake was over
    heard = received(pump(hub, until=counted(20)))
    assert [frames for _, _, frames in heard] == [[b"%d" % number] for number in range(20)]


# --- settings ----------------------------------------------------------------------------------


def test_a_port_in_use_says_which_and_how_to_choose_another(net: Net) -> None:
    _hub, endpoints = net.server()
    port = endpoints[Plane.CONTROL].port
    other = net.transport("hub-2")
    with pytest.raises(ConfigurationError, match=str(port)) as caught:
        other.bind(Plane.CONTROL, HOST, port)
    assert "--port" in caught.value.hint
    assert other.bind(Plane.CONTROL, HOST) != port, "and the transport can go on"


@pytest.mark.parametrize("host", ["192.0.2.250", "no such host", ""])
def test_an_address_that_is_not_ours_cannot_be_bound(net: Net, host: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen"):
        net.transport("hub").bind(Plane.CONTROL, host)


def test_a_bad_endpoint_is_refused_before_anything_is_sent(net: Net) -> None:
    client = net.transport("pi-1#1")
    with pytest.raises(AuthError):
        client.connect(Plane.CONTROL, "hub", Endpoint(HOST, 5555, "not a key"))
    with pytest.raises(ConfigurationError):
        client.connect(Plane.CONTROL, "hub", Endpoint("a b", 5555, net.own.public))
    for port in (0, -1, 99999):
        with pytest.raises(ConfigurationError):
            client.connect(Plane.CONTROL, "hub", Endpoint(HOST, port, net.own.public))
    with pytest.raises(ConfigurationError):
        client.bind(Plane.CONTROL, HOST, 99999)
    assert client.receive(0.0) == []


def test_nothing_of_a_transport_stays_behind() -> None:
    def cycle() -> None:
        made = Net()
        hub, endpoints = made.server()
        greet(hub, made.client("pi-1#1", endpoints))
        for one in made.transports:
            one.close()

    cycle()
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    for _ in range(5):
        cycle()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
