"""Members that turned bad, with raw sockets against a live cluster: what they say is judged by
whose key says it, and nobody else's request or process is theirs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from intruder import Intruder, intruder
from msgspec import structs
from processes import image, small_model, worker_pids

import meshinfer as mi
from cluster.processes import hold_folder
from meshinfer import limits
from meshinfer.errors import ConfigurationError
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import describe, payload_of
from meshinfer.protocol.records import BESIDE_COORDINATOR

ANY = np.zeros((1,), np.float32)
EVIL = 1 << 40
"""An attempt that no coordinator has come to."""
EVIL_BYTES = 256 * limits.MIB


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(2) as made:
        with made.client() as admin:
            admin.deploy("m", small_model(), spread=True)
        yield made


@pytest.fixture
def client(cluster: mi.LocalCluster) -> Iterator[Intruder]:
    with intruder(cluster, "client") as made:
        yield made


def told(client: Intruder) -> tuple[m.Welcome, m.Install]:
    """What a client is told that says it stands beside the coordinator."""
    welcome = client.hello(where=BESIDE_COORDINATOR)
    assert welcome is not None and welcome.head is not None
    array = image()["image"]
    tensors = (describe("image", array),)
    client.say(
        m.Submit(
            request="evil", model="m", version=None, inputs=tensors, picture=False,
            deadline_s=5.0, turn=1,
        )
    )  # fmt: skip
    install = client.hear(m.Install)
    assert install is not None
    return welcome, install


def piece(deployment: int, **fields: object) -> m.Deliver:
    other: dict[str, object] = {"request": "none", "attempt": 0, "consumer": (0, 0), "slot": 0}
    other |= {"id": 1, "tensor": describe("x", ANY)}
    return m.Deliver(deployment=deployment, **{**other, **fields})  # type: ignore[arg-type]


def test_no_piece_of_a_client_ends_a_process(cluster: mi.LocalCluster, client: Intruder) -> None:
    """One word ended the coordinator: a piece of an attempt that never was, attempt 0."""
    welcome, install = told(client)
    assert welcome.head is not None
    with cluster.client() as admin:
        before = {d.device: d.facts for d in admin.devices()}
        for peer in {p.id: p for p in (welcome.head, *install.peers)}.values():
            client.reach(peer)
            for attempt in (0, 1, EVIL):
                message = piece(install.deployment, attempt=attempt)
                client.say(message, payload_of(ANY), to=peer.id)
            client.say(m.Echo(id=7), to=peer.id)
            assert client.hear(m.Echoed, of=peer.id) is not None, f"{peer.id} is gone"
        admin.infer("m", image())
        assert {d.device: d.facts for d in admin.devices()} == before


def awaited(client: Intruder) -> tuple[int, list[tuple[m.Peer, m.Send]]]:
    """The deployment, and which device awaits which piece of the source."""
    _, install = told(client)
    peers = {peer.device: peer for peer in install.peers}
    source = next(program for program in install.programs if program.place[0] < 0)
    return install.deployment, [(peers[s.device], s) for s in source.sends if s.device in peers]


def test_no_client_makes_an_attempt_stale(
    cluster: mi.LocalCluster, client: Intruder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. mallory says to each device that a request is at attempt 2**40, and that it is its head;
    2. who asks for that is answered, at the first attempt."""
    deployment, sends = awaited(client)
    assert sends
    for peer in {peer.id: peer for peer, _ in sends}.values():
        client.reach(peer)
    fields = {"request": "known", "attempt": EVIL}
    for peer, send in sends:
        message = piece(deployment, consumer=send.consumer, slot=send.slot, **fields)
        client.say(message, payload_of(ANY), to=peer.id)
        client.say(m.Echo(id=7), to=peer.id)
        assert client.hear(m.Echoed, of=peer.id) is not None
    with cluster.client() as user:
        user.infer("m", image())  # not the first use of its plan
        monkeypatch.setattr("cluster.client.secrets.token_hex", lambda _: "known")
        result = user.infer("m", image(), deadline_s=10.0)
        assert result.request_id == "known" and result.attempts == 1


def test_pieces_of_requests_that_never_were_fill_no_memory(
    cluster: mi.LocalCluster, client: Intruder
) -> None:
    deployment, sends = awaited(client)
    peer, send = sends[0]
    client.reach(peer)
    pid = dict(zip(cluster.names(), worker_pids(cluster), strict=True))[peer.device]
    large = np.zeros((1 << 18,), np.float32)
    before = psutil.Process(pid).memory_info().rss
    for i in range(EVIL_BYTES // large.nbytes):
        fields = {"request": f"none {i}", "attempt": EVIL, "id": i}
        message = piece(deployment, consumer=send.consumer, slot=send.slot, **fields)
        message = structs.replace(message, tensor=describe("x", large))
        client.say(message, payload_of(large), to=peer.id)
    client.say(m.Echo(id=7), to=peer.id)
    assert client.hear(m.Echoed, of=peer.id, within_s=60.0) is not None
    grown = psutil.Process(pid).memory_info().rss - before
    assert grown < 3 * limits.AHEAD_BYTES_EACH < EVIL_BYTES / 2
    with cluster.client() as user:
        user.infer("m", image())


def test_a_client_elsewhere_is_not_given_the_part_of_a_device(cluster: mi.LocalCluster) -> None:
    """To say that it is beside the coordinator got a client the weights of a plan of one task."""
    with intruder(cluster, "client") as near:
        for source, acts_as in (("127.0.0.2", ""), ("127.0.0.1", "head")):
            for where in (BESIDE_COORDINATOR, f"{socket.gethostname()} 127.0.0.1"):
                far = Intruder(near.ring, near.control, source=source)
                welcome = far.hello(where=where)
                far.close()
                assert welcome is not None and welcome.acts_as == acts_as, (source, where)


def test_a_folder_that_all_may_write_in_keeps_no_keys(tmp_path: Path) -> None:
    """Whoever may put another journal there admits whom they like."""
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigurationError, match="all may write") as caught:
        hold_folder(folder)
    assert "chmod 700" in str(caught.value.hint)
    folder.chmod(0o755)
    os.close(hold_folder(folder))
