"""Members that turned bad, with raw sockets against a live cluster: what they say is judged by
whose key says it, and nobody else's request or process is theirs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from intruder import Intruder, intruder
from processes import image, small_model

import meshinfer as mi
from cluster.processes import hold_folder
from meshinfer.errors import ConfigurationError
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import describe, payload_of
from meshinfer.protocol.records import BESIDE_COORDINATOR

ANY = np.zeros((1,), np.float32)


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
    tensor = describe("x", ANY)
    return m.Deliver(id=1, deployment=deployment, tensor=tensor, **{**other, **fields})  # type: ignore[arg-type]


def test_no_piece_of_a_client_ends_a_process(cluster: mi.LocalCluster, client: Intruder) -> None:
    """One word ended the coordinator: a piece of an attempt that never was, attempt 0."""
    welcome, install = told(client)
    assert welcome.head is not None
    with cluster.client() as admin:
        before = {d.device: d.facts for d in admin.devices()}
        for peer in {p.id: p for p in (welcome.head, *install.peers)}.values():
            client.reach(peer)
            for assigned in ((), ((0, 0, 0),)):
                message = piece(install.deployment, assigned=assigned)
                client.say(message, payload_of(ANY), to=peer.id)
            client.say(m.Echo(id=7), to=peer.id)
            assert client.hear(m.Echoed, of=peer.id) is not None, f"{peer.id} is gone"
        admin.infer("m", image())
        assert {d.device: d.facts for d in admin.devices()} == before


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
