"""The coordinator's process is killed, with real workers, files and clients: nothing is lost.

That schedules of all kinds end well is ``test_restart_core.py``; here it is the real disk.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import psutil
import pytest
from architectures import Builder, squeezenet1_1
from onnx import ModelProto
from oracle import assert_exact
from processes import eventually, image, small_model

import meshinfer as mi
from cluster.blobs import BlobStore
from cluster.journal import FILE, Journal
from meshinfer import limits
from meshinfer.scheduler.ledger import Ended

WITHIN_S = 60.0
MODEL = squeezenet1_1(64)
IMAGES = [image(64, seed) for seed in range(4)]


@pytest.fixture
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(2, speeds=[0.3, 0.3]) as made:
        yield made


@pytest.fixture(scope="module")
def shared() -> Iterator[mi.LocalCluster]:
    """For tests that leave it well; each has model names of its own."""
    with mi.LocalCluster(2, speeds=[0.3, 0.3]) as made:
        yield made


def state(cluster: mi.LocalCluster) -> Path:
    return cluster._folder / "coordinator"


def written_down(cluster: mi.LocalCluster) -> Journal:
    """The journal of a coordinator that is killed for it; close it before it starts again."""
    assert cluster._coordinator is not None
    cluster._coordinator.kill()
    cluster._coordinator.wait()
    return Journal(state(cluster) / FILE)


@pytest.mark.timeout(170)
def test_each_request_gets_one_right_answer_while_the_coordinator_is_killed(
    cluster: mi.LocalCluster,
) -> None:
    """Steps: requests all the while; four kills at random moments; then the journal is read."""
    rng = random.Random(3)
    answered: set[str] = set()
    with cluster.client() as client:
        client.deploy("net", MODEL, spread=True)
        futures: list[tuple[int, Future[mi.Result]]] = []
        for kill in range(4):
            for number in range(10 * kill, 10 * kill + 10):
                x = IMAGES[number % 4]
                futures.append((number, client.submit("net", x, deadline_s=WITHIN_S)))
                time.sleep(rng.uniform(0, 0.02))
            cluster.restart_coordinator()
        for number, future in futures:
            result = future.result(WITHIN_S)
            assert_exact(MODEL, IMAGES[number % 4], result.outputs)
            assert result.model_version == 1
            answered.add(result.request_id)
        assert len(answered) == len(futures)
        time.sleep(2 * limits.JOURNAL_DELAY_S + limits.HEARTBEAT_S)  # for the last outcomes
    journal = written_down(cluster)
    assert answered <= set(journal.ledger.requests)
    ends = [e for e in journal.ledger.requests.values() if isinstance(e, Ended)]
    assert all(end.failure is None and end.outcome for end in ends) and len(ends) >= 10
    assert journal.ledger.starts == 6
    journal.close()


def test_a_client_that_comes_after_the_restart_finds_what_was_deployed(
    shared: mi.LocalCluster,
) -> None:
    spec = mi.ImageSpec(input="image", scale=1 / 255)
    with shared.client() as client:
        client.deploy("first", MODEL, spread=True)
        client.deploy("second", small_model(), image=spec)
        client.deploy("second", small_model(seed=1), image=spec)
        before = [(x.name, x.version, x.digest, x.image, x.current) for x in client.models()]
    shared.restart_coordinator()
    with shared.client() as client:
        after = [(x.name, x.version, x.digest, x.image, x.current) for x in client.models()]
        assert after == before
        assert_exact(MODEL, IMAGES[0], client.infer("first", IMAGES[0]).outputs)
        old = client.infer("second", image(), version=1)
        assert_exact(small_model(), image(), old.outputs)
        assert client.deploy("second", small_model(seed=2)).version == 3


def heavy(seed: int = 0) -> ModelProto:
    """Eight megabytes of weights, in one file."""
    b = Builder(seed)
    x = b.conv(b.input("image", [1, 3, 24, 24]), 3, 512, 3)
    x = b.conv(x, 512, 456, 3)
    return b.model([b.rename(b.conv(x, 456, 3, 1), "y")])


@pytest.mark.timeout(170)
def test_a_model_whose_load_is_killed_at_each_tenth_is_whole_in_the_end(
    cluster: mi.LocalCluster,
) -> None:
    """Steps: the client sends eight megabytes; at each tenth of them the coordinator is killed."""
    model = heavy()
    total = len(model.SerializeToString())
    blobs = state(cluster) / "blobs"
    with cluster.client() as client:
        for tenth in range(1, 10, 2):
            deployed: Future[mi.Deployment] = Future()

            def deploy(name: str = f"net-{tenth}", to: Future[mi.Deployment] = deployed) -> None:
                try:
                    to.set_result(client.deploy(name, heavy(), timeout_s=WITHIN_S))
                except BaseException as error:
                    to.set_exception(error)

            for file in blobs.iterdir():  # nothing that could be found here
                if file.is_file():
                    file.unlink()
            thread = threading.Thread(target=deploy)
            thread.start()
            until = time.monotonic() + 20.0
            while time.monotonic() < until and not deployed.done():
                found = list(blobs.iterdir())
                sizes = [f.stat().st_size for f in found if f.exists() and f.is_file()]
                if sum(sizes) >= total * tenth / 10:
                    break
                time.sleep(0.001)
            cluster.restart_coordinator()
            assert deployed.result(WITHIN_S).version == 1
            thread.join(timeout=5)
            result = client.infer(f"net-{tenth}", image(), deadline_s=WITHIN_S)
            assert_exact(model, image(), result.outputs)


def test_a_damaged_model_file_is_not_served_after_a_restart(shared: mi.LocalCluster) -> None:
    with shared.client() as client:
        client.deploy("damaged", small_model(seed=8))
        client.deploy("good", small_model(seed=9))
        (digest,) = [x.digest for x in client.models() if x.name == "damaged"]
        path = state(shared) / "blobs" / digest
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        shared.restart_coordinator()
        with pytest.raises(mi.ModelNotFound, match="damaged") as caught:
            client.infer("damaged", image(), deadline_s=WITHIN_S)
        assert "again" in caught.value.hint
        assert_exact(small_model(seed=9), image(), client.infer("good", image()).outputs)
        assert client.deploy("damaged", small_model(seed=8)).version == 2
        assert_exact(small_model(seed=8), image(), client.infer("damaged", image()).outputs)


def test_a_blob_that_was_damaged_since_is_not_given_to_anybody(tmp_path: Path) -> None:
    """What an earlier process wrote is looked at before its first byte leaves."""
    import hashlib

    data = np.random.default_rng(0).bytes(3 << 20)
    digest = hashlib.sha256(data).hexdigest()
    BlobStore(tmp_path).put(digest, data)
    assert BlobStore(tmp_path).read(digest, 5, 10) == (data[5:15], len(data))
    damaged = bytearray(data)
    damaged[-1] ^= 4
    (tmp_path / digest).write_bytes(damaged)
    time.sleep(0.02)
    store = BlobStore(tmp_path)
    assert store.read(digest, 0, 10) is None
    assert store.missing((digest,)) == (digest,)


@pytest.mark.timeout(120)
def test_a_coordinator_whose_disk_is_full_refuses_in_words_and_goes_on_when_there_is_room(
    shared: mi.LocalCluster,
) -> None:
    """By the limit of its process on the size of files, which may be changed as it runs."""
    assert shared._coordinator is not None
    process = psutil.Process(shared._coordinator.pid)
    with shared.client() as client:
        client.deploy("net", MODEL, spread=True)
        client.infer("net", IMAGES[0])
        soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (1024, hard))
        refused = 0
        for _ in range(5):
            with pytest.raises(mi.ClusterUnavailable, match="journal") as caught:
                client.infer("net", IMAGES[0], deadline_s=WITHIN_S)
            assert "room" in caught.value.hint
            refused += 1
        process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))

        def answers() -> bool:
            try:
                result = client.infer("net", IMAGES[0], deadline_s=WITHIN_S)
            except mi.ClusterUnavailable:
                return False
            assert_exact(MODEL, IMAGES[0], result.outputs)
            return True

        assert refused == 5 and eventually(answers, 20.0)
        assert shared._coordinator.poll() is None


@pytest.mark.timeout(120)
def test_a_model_that_the_coordinator_s_disk_does_not_take_fails_in_words(
    shared: mi.LocalCluster,
) -> None:
    assert shared._coordinator is not None
    process = psutil.Process(shared._coordinator.pid)
    with shared.client() as client:
        soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (500_000, hard))
        with pytest.raises(mi.ClusterUnavailable, match="disk") as caught:
            client.deploy("too-heavy", heavy(), timeout_s=WITHIN_S)
        assert "room" in caught.value.hint
        process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))
        assert client.deploy("too-heavy", heavy(), timeout_s=WITHIN_S).version == 1
        assert_exact(heavy(), image(), client.infer("too-heavy", image()).outputs)
