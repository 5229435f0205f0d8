"""A man in the middle of encrypted connections: he can end them, and that is all.

What passes between real workers, and between them and a real coordinator, is flipped, cut, doubled,
reordered, replayed and reflected (``meddler.py``, plain TCP). Every request is answered rightly or
ends typed, nothing wrong is accepted, and every process that was there is there.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest
from architectures import squeezenet1_1
from meddler import KINDS
from oracle import assert_exact
from processes import all_pids, eventually, image

import cluster.local
import meshinfer as mi
from cluster.gate import GateProcess
from meshinfer.errors import MeshInferError

SEED = int(os.environ.get("MESHINFER_MEDDLER_SEED", "1"))
TIMES = 3
"""Of each kind."""
BURST = 6
WITHIN_S = 60.0
MEDDLER = Path(__file__).with_name("meddler.py")
MODEL = squeezenet1_1(64)
IMAGES = [image(64, seed) for seed in range(4)]


class Middle:
    """A cluster whose workers' connections all pass the meddler, and a client beside him."""

    def __init__(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            meddler = partial(GateProcess, subprocess.Popen, str(MEDDLER))
            patch.setattr(cluster.local, "GateProcess", meddler)
            self.cluster = mi.LocalCluster(3, faults=True)
        assert self.cluster._gate is not None
        self.ask = self.cluster._gate.ask
        self.client = self.cluster.client()
        self.client.deploy("net", MODEL, spread=True)

    def close(self) -> None:
        self.client.close()
        self.cluster.close()

    def ready(self) -> bool:
        return sum(d.state == "ready" for d in self.client.devices()) == 4

    def is_whole(self, pids: list[int]) -> None:
        """Everybody who was there is there, and everything works."""
        assert eventually(self.ready, 30.0), [(d.device, d.state) for d in self.client.devices()]
        assert burst(self) == (BURST, 0)
        assert all_pids(self.cluster) == pids

    def tasks_done(self) -> int:
        return sum(d.tasks_done for d in self.client.devices())


@pytest.fixture(scope="module")
def middle() -> Iterator[Middle]:
    made = Middle()
    yield made
    made.close()


def burst(middle: Middle) -> tuple[int, int]:
    """How many of some requests were answered, and how many ended typed."""
    open_: list[Future[mi.Result]] = [
        middle.client.submit("net", IMAGES[i % 4], deadline_s=30.0) for i in range(BURST)
    ]
    right = typed = 0
    for i, future in enumerate(open_):
        try:
            result = future.result(WITHIN_S)
        except MeshInferError:
            typed += 1
        else:
            assert_exact(MODEL, IMAGES[i % 4], result.outputs)
            right += 1
    return right, typed


@pytest.mark.timeout(600)
def test_whatever_is_done_to_the_stream_answers_are_right_or_errors_typed(middle: Middle) -> None:
    rng = random.Random(SEED)
    pids = all_pids(middle.cluster)
    right = typed = 0
    for kind in [kind for kind in KINDS for _ in range(TIMES)]:
        least = rng.choice((1, 1, 200, 4000))
        middle.ask("meddle", kind=kind, seed=rng.randrange(1 << 30), least=least)
        answered = burst(middle)
        right, typed = right + answered[0], typed + answered[1]
    count = middle.ask("done")
    assert count >= len(KINDS) * TIMES * 3 // 4, f"only {count} were meddled with, seed {SEED}"
    assert right > typed * 4, f"{right} answered and {typed} not, seed {SEED}"
    middle.is_whole(pids)


def again(port: int, said: list[bytes], *, waits: bool) -> bytes:
    """Say what somebody said before, to the same port; what is answered."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), timeout=0.2) as connection:
        try:
            for piece in said:
                connection.sendall(piece)
                heard += connection.recv(1 << 16) if waits else b""
            while more := connection.recv(1 << 16):
                heard += more
        except TimeoutError:
            pass
        except OSError:
            heard += b""  # it was ended at once
    return heard


@pytest.mark.parametrize("waits", [False, True])
def test_what_was_said_before_is_worth_nothing(middle: Middle, waits: bool) -> None:
    """Whole connections, as they were seen, said again to whom they were said: the coordinator and
    workers. Nothing is computed for it, and nobody leaves for it."""
    assert burst(middle)[0] == BURST
    pids, records = all_pids(middle.cluster), middle.ask("recorded")
    assert {r["port"] for r in records} >= {int(middle.cluster.address.split(":")[1])}
    before = middle.tasks_done()
    for record in records[-24:]:
        said = [bytes.fromhex(piece) for piece in record["said"]]
        heard = again(record["port"], said, waits=waits)
        assert len(heard) < 1000, "more than a greeting and a handshake"
    assert middle.tasks_done() == before
    middle.is_whole(pids)


def test_pieces_of_one_connection_are_worth_nothing_in_another(middle: Middle) -> None:
    """The head of each connection, then the rest of another."""
    assert burst(middle)[0] == BURST
    pids, records = all_pids(middle.cluster), middle.ask("recorded")[-12:]
    before, rng = middle.tasks_done(), random.Random(SEED)
    for record in records:
        other = rng.choice(records)["said"]
        said = [bytes.fromhex(piece) for piece in (*record["said"][:2], *other[2:])]
        again(record["port"], said, waits=True)
    assert middle.tasks_done() == before
    middle.is_whole(pids)
