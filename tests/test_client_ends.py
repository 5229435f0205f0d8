"""How the client ends: closed, leaking nothing, with no coordinator, worker or right key."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from architectures import squeezenet1_1
from processes import descriptors, eventually, growing, image, pixels, small_model

import meshinfer as mi
from cluster.keyring import new_keyring, write_keyring
from meshinfer import limits

MODEL, IMAGE = small_model(), image()
SPEC = mi.ImageSpec(input="image", output="y", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
WITHIN_S = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(2) as made:
        yield made


@pytest.fixture(scope="module")
def client(cluster: mi.LocalCluster) -> Iterator[mi.Client]:
    with cluster.client() as made:
        made.deploy("small", MODEL)
        made.deploy("photo", small_model(), image=SPEC)
        yield made


def test_a_closed_client_says_so(cluster: mi.LocalCluster, client: mi.Client) -> None:
    mine = cluster.client()
    futures = [mine.submit("small", IMAGE) for _ in range(5)]
    mine.close()
    mine.close()
    for future in futures:
        error = future.exception(timeout=5)
        assert error is None or isinstance(error, mi.ClusterUnavailable)
    for call in (lambda: mine.submit("small", IMAGE), mine.models, mine.devices):
        with pytest.raises(mi.ClusterUnavailable, match="closed"):
            call()
    with pytest.raises(mi.ClusterUnavailable, match="closed"):
        mine.deploy("small", MODEL)


def test_a_client_may_be_closed_by_a_callback(cluster: mi.LocalCluster, client: mi.Client) -> None:
    mine = cluster.client()
    closed = threading.Event()

    def close(_: Future[mi.Result]) -> None:
        mine.close()
        closed.set()

    mine.submit("small", IMAGE).add_done_callback(close)
    assert closed.wait(10)
    mine._thread.join(timeout=5)
    assert not mine._thread.is_alive()


def test_a_defect_in_the_clients_loop_fails_what_is_open(
    cluster: mi.LocalCluster, client: mi.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster.client() as mine:

        def broken(*_: object) -> None:
            raise ZeroDivisionError("planted")

        future = mine.submit("small", image(seed=9))
        monkeypatch.setattr(mine._loop._core, "handle", broken)
        error = future.exception(timeout=10)
        assert error is None or "planted" in str(error)
        assert eventually(lambda: not mine._thread.is_alive())
        with pytest.raises(mi.MeshInferError, match="planted"):  # as long as it is used
            mine.infer("small", IMAGE)


def test_many_requests_leak_nothing(cluster: mi.LocalCluster, client: mi.Client) -> None:
    assert cluster._coordinator is not None
    processes = [psutil.Process(), psutil.Process(cluster._coordinator.pid)]

    def use(count: int) -> None:
        for result in client.map("photo", [pixels()] * count, max_in_flight=8):
            assert result.outputs["y"].shape == (1, 3, 24, 24)

    def state() -> list[tuple[int, int, int]]:
        gc.collect()
        return [(p.memory_info().rss, p.num_threads(), descriptors(p.pid)) for p in processes]

    use(60)
    before = state()
    use(200)
    for (rss, threads, files), (rss_then, threads_then, files_then) in zip(
        state(), before, strict=True
    ):
        assert rss - rss_then < 16 << 20
        assert threads <= threads_then
        assert files <= files_then


def test_clients_that_come_and_go_leave_nothing(cluster: mi.LocalCluster) -> None:
    assert cluster._coordinator is not None
    coordinator = cluster._coordinator.pid

    def use() -> None:
        with cluster.client() as mine:
            mine.devices()

    use()
    before = threading.active_count(), descriptors(), descriptors(coordinator)
    for _ in range(8):
        use()
    assert threading.active_count() <= before[0]
    assert descriptors() <= before[1]
    assert eventually(lambda: descriptors(coordinator) <= before[2])


# --- who is not there


def test_a_cluster_without_workers_says_so() -> None:
    with mi.LocalCluster(0) as empty, empty.client() as mine:
        mine.deploy("growing", growing())
        patient = mine.submit("growing", IMAGE, deadline_s=WITHIN_S)
        with pytest.raises(mi.DeadlineExceeded):
            mine.infer("growing", IMAGE, deadline_s=0.5)
        with pytest.raises(mi.ClusterUnavailable, match="no worker") as caught:
            mine.deploy("small", MODEL, timeout_s=WITHIN_S)
        assert "meshinfer worker" in caught.value.hint
        with pytest.raises(mi.ClusterUnavailable, match="no worker"):
            patient.result(WITHIN_S)
        empty.add()
        assert mine.infer("growing", IMAGE, deadline_s=WITHIN_S).outputs


def test_no_coordinator_is_unavailable(tmp_path: Path) -> None:
    ring, _ = new_keyring("nobody")
    write_keyring(tmp_path / "ring.json", ring)
    for options in ({"address": "127.0.0.1:9"}, {"interfaces": ["127.0.0.1"]}):
        with pytest.raises(mi.ClusterUnavailable) as caught:
            mi.Client(**options, keyring=tmp_path / "ring.json", timeout_s=1.0)
        assert "meshinfer coordinator" in caught.value.hint


def test_a_wrong_or_missing_keyring_is_an_auth_error(
    cluster: mi.LocalCluster, tmp_path: Path
) -> None:
    stranger, _ = new_keyring(cluster.cluster)
    real = json.loads(cluster.keyring.read_text())
    write_keyring(tmp_path / "stranger.json", stranger)
    mixed = tmp_path / "mixed.json"  # the coordinator's key is right, the holder's is not
    write_keyring(mixed, replace(stranger, coordinator_public=real["coordinator_public"]))
    for path in (tmp_path / "stranger.json", mixed, tmp_path / "missing.json"):
        with pytest.raises(mi.AuthError) as caught:
            mi.Client(cluster.address, keyring=path, timeout_s=10.0)
        assert caught.value.hint


def test_a_killed_coordinator_fails_what_is_open_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice: what was asked before, and what is asked once it is known to be silent."""
    with mi.LocalCluster(1, speeds=[0.02]) as mine, mine.client() as client:
        client.deploy("slow", squeezenet1_1(96))
        x = {"image": np.zeros((1, 3, 96, 96), np.float32)}
        futures = [client.submit("slow", x) for _ in range(30)]
        assert mine._coordinator is not None
        mine._coordinator.kill()
        monkeypatch.setattr(limits, "COORDINATOR_SILENT_S", 3.0)  # for the client, which is here
        started = time.monotonic()
        errors = [future.exception(timeout=15) for future in futures]
        assert time.monotonic() - started < 12.0
        assert all(isinstance(e, mi.ClusterUnavailable) or e is None for e in errors)
        assert any(errors)
        with pytest.raises(mi.ClusterUnavailable):
            client.infer("slow", x)
