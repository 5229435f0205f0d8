"""Nothing lost: workers are killed, crashed and frozen at random while requests are in flight.

Every accepted request is answered once and rightly, or fails typed by its deadline. The seed is
printed with each failure.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from architectures import squeezenet1_1
from oracle import assert_exact
from processes import eventually, image, small_model, worker_pids

import meshinfer as mi

WITHIN_S = 60.0
MODEL = squeezenet1_1(64)
IMAGES = [image(64, seed) for seed in range(4)]


SPEED = 0.2
"""Slow workers, so that most kills meet a request on its way."""


@pytest.fixture(scope="module")
def shared() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(3, speeds=[SPEED] * 3) as made:
        yield made


@pytest.fixture
def cluster(shared: mi.LocalCluster) -> mi.LocalCluster:
    """Three living workers, whatever the test before has left."""
    while len(shared.names()) < 3:
        shared.add(SPEED, wait=len(shared.names()) == 2)
    return shared


def hurt(cluster: mi.LocalCluster, rng: random.Random, working: set[str]) -> str:
    """Kill a worker and add one, or kill its process only; always leaves some to work.

    One of those ``working`` if any lives: one that is still starting has nothing to lose, and where
    processes start slowly a random victim nearly always is.
    """
    names = cluster.names()
    i = rng.choice([i for i, n in enumerate(names) if n in working] or list(range(len(names))))
    if rng.random() < 0.5:
        return f"crash {cluster.crash(i)}"
    killed = cluster.kill(i)
    return f"kill {killed}, add {cluster.add(SPEED, wait=False)}"


def survive(cluster: mi.LocalCluster, seed: int, requests: int, kills: int) -> int:
    """Bursts of requests, a kill in the middle of each; how many took more than one attempt, or
    went on without a device of their plan.

    Three of four kills come once the one before is got over, so that they meet requests at work
    even where a process starts slowly; the others may come in the middle of that.
    """
    rng = random.Random(seed)
    burst = requests // kills
    history: list[str] = []
    retried = 0
    working: set[str] = set()  # by the last answer
    with cluster.client() as client:
        client.deploy("net", MODEL, spread=True)
        open_: deque[tuple[int, Future[mi.Result]]] = deque()

        def settle() -> int:
            number, future = open_.popleft()
            result = future.result(WITHIN_S)
            assert_exact(MODEL, IMAGES[number % 4], result.outputs)
            working.clear()
            working.update(result.timing.compute_s)
            return result.attempts > 1 or result.degraded

        try:
            for first in range(0, requests, burst):
                patient = rng.random() < 0.75
                while open_ and patient and not working & set(cluster.names()):
                    retried += settle()
                while len(open_) > burst:
                    retried += settle()
                for number in range(first, first + burst):
                    image = IMAGES[number % 4]
                    open_.append((number, client.submit("net", image, deadline_s=50)))
                time.sleep(rng.uniform(0, 0.02))
                history.append(f"{first}: {hurt(cluster, rng, working)}")
                working.clear()
            while open_:
                retried += settle()
        except BaseException as error:
            error.add_note("\n".join([f"seed {seed}", *history]))
            raise
        healed = set(cluster.names()) | {"head"}
        assert eventually(lambda: {d.device for d in client.devices()} == healed, 20.0)
    return retried


@pytest.mark.timeout(170)
def test_sixty_requests_survive_twelve_kills(cluster: mi.LocalCluster) -> None:
    assert survive(cluster, seed=1, requests=60, kills=12) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [2, 3])
def test_three_hundred_requests_survive_sixty_kills(cluster: mi.LocalCluster, seed: int) -> None:
    assert survive(cluster, seed, requests=300, kills=60) > 0


@pytest.mark.parametrize("delay_s", [0.02, 0.2])
def test_a_worker_killed_while_a_model_is_deployed_delays_it(
    cluster: mi.LocalCluster, delay_s: float
) -> None:
    """Steps: the deployment is asked for; a worker dies while it is planned or installed."""
    with cluster.client() as client:
        deploying: Future[object] = Future()

        def deploy() -> None:
            try:
                deploying.set_result(client.deploy("net", MODEL, spread=True, timeout_s=WITHIN_S))
            except BaseException as error:
                deploying.set_exception(error)

        thread = threading.Thread(target=deploy)
        thread.start()
        time.sleep(delay_s)
        cluster.kill(0)
        deploying.result(WITHIN_S)
        thread.join(timeout=5)
        result = client.infer("net", IMAGES[0], deadline_s=WITHIN_S)
        assert_exact(MODEL, IMAGES[0], result.outputs)


def test_a_second_kill_during_the_replan_of_the_first_is_survived(
    cluster: mi.LocalCluster,
) -> None:
    with cluster.client() as client:
        client.deploy("net", MODEL, spread=True)
        for pause_s in (0.0, 0.2):
            futures = [client.submit("net", x, deadline_s=WITHIN_S) for x in IMAGES]
            cluster.kill(0)
            time.sleep(pause_s)
            cluster.kill(0)
            for x, future in zip(IMAGES, futures, strict=True):
                assert_exact(MODEL, x, future.result(WITHIN_S).outputs)
            cluster.add(SPEED, wait=False)
            cluster.add(SPEED)


def test_a_worker_frozen_for_three_seconds_costs_no_request(cluster: mi.LocalCluster) -> None:
    with cluster.client() as client:
        client.deploy("net", MODEL, spread=True)
        futures = [client.submit("net", IMAGES[i % 4], deadline_s=WITHIN_S) for i in range(20)]
        name = cluster.pause(0)
        until = time.monotonic() + 3.0
        futures += [client.submit("net", IMAGES[i % 4], deadline_s=WITHIN_S) for i in range(20)]
        for i, future in enumerate(futures):
            assert_exact(MODEL, IMAGES[i % 4], future.result(WITHIN_S).outputs)
        time.sleep(max(0.0, until - time.monotonic()))
        cluster.resume(0)

        def works() -> bool:
            result = client.infer("net", IMAGES[0], deadline_s=WITHIN_S)
            assert_exact(MODEL, IMAGES[0], result.outputs)
            return name in result.timing.compute_s

        assert eventually(works, 20.0)


def test_requests_wait_for_a_worker_when_all_were_killed(cluster: mi.LocalCluster) -> None:
    with cluster.client() as client:
        client.deploy("net", MODEL, spread=True)
        while cluster.names():
            cluster.kill(0)
        patient = [client.submit("net", x, deadline_s=WITHIN_S) for x in IMAGES]
        hasty = client.submit("net", IMAGES[0], deadline_s=0.5)
        assert isinstance(hasty.exception(timeout=10), mi.DeadlineExceeded | mi.ClusterUnavailable)
        cluster.add()
        for x, future in zip(IMAGES, patient, strict=True):
            assert_exact(MODEL, x, future.result(WITHIN_S).outputs)


def test_requests_fail_typed_when_no_worker_comes_back(cluster: mi.LocalCluster) -> None:
    with cluster.client() as client:
        client.deploy("small", small_model())
        while cluster.names():
            cluster.kill(0)
        started = time.monotonic()
        with pytest.raises(mi.ClusterUnavailable) as caught:
            client.infer("small", image(), deadline_s=WITHIN_S)
        assert caught.value.hint and time.monotonic() - started < 15.0


def test_a_worker_that_crashes_again_and_again_is_started_again_each_time(
    cluster: mi.LocalCluster,
) -> None:
    with cluster.client() as client:
        client.deploy("net", MODEL, spread=True)
        for _ in range(3):
            before = worker_pids(cluster)[0]
            cluster.crash(0)
            assert_exact(
                MODEL, IMAGES[1], client.infer("net", IMAGES[1], deadline_s=WITHIN_S).outputs
            )
            assert eventually(
                lambda before=before: any(p != before for p in worker_pids(cluster)[:1]), 15.0
            )
        wanted = {"head", *cluster.names()}
        assert eventually(lambda: {d.device for d in client.devices()} == wanted, 15.0)


def test_a_killed_worker_leaves_no_wrong_answer_behind(cluster: mi.LocalCluster) -> None:
    """Different inputs in flight, so that a piece of another request or attempt would show."""
    rng = np.random.default_rng(7)
    inputs = [{"image": rng.standard_normal((1, 3, 64, 64)).astype(np.float32)} for _ in range(24)]
    with cluster.client() as client:
        client.deploy("net", MODEL, spread=True)
        futures = [client.submit("net", x, deadline_s=WITHIN_S) for x in inputs]
        cluster.crash(0)
        cluster.kill(-1)
        for x, future in zip(inputs, futures, strict=True):
            assert_exact(MODEL, x, future.result(WITHIN_S).outputs)
