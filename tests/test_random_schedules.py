"""Random delays, deaths, cuts and joins: every accepted request gets one outcome, right or typed.

A quarter of the seeds is calm, and those never need a second attempt. In a third the plans are of
tasks that any device may take; in half the client is its own source and sink. To replay
seed 17: ``cd tests && python -c 'import test_random_schedules as t; t.run(17)'``.
"""

from __future__ import annotations

import random

import pytest
from cores import Cluster, Stuck, image, random_delay
from shared import bands_for_all

from meshinfer.errors import BY_NAME
from meshinfer.protocol import messages as m

SEEDS, CHUNK, QUICK = 400, 50, 24
NAMES = ("pi-1", "pi-2", "pi-3")


def misfortune(cluster: Cluster, rng: random.Random) -> None:
    """One fault, or one recovery."""
    here = [n.name for n in cluster.workers() if n.name != "head"]
    gone = [n for n in NAMES if n not in here]
    match rng.choice(["kill", "silent", "cut", "join", "join", "head", "stop", "client"]):
        case "kill" | "silent" as how if here:
            cluster.kill(rng.choice(here), silent=how == "silent")
        case "cut" if here:
            cluster.cut(rng.choice(here))
        case "join" if gone:
            cluster.join(rng.choice(gone))
        case "head" if rng.random() < 0.3:
            cluster.cut("head")
        case "stop" if here:
            cluster.stop(rng.choice(here))
        case "client" if rng.random() < 0.5:
            cluster.cut("ann")


def run(seed: int) -> int:
    """One seed; returns how many requests were answered right."""
    rng = random.Random(seed)
    calm = seed % 4 == 0
    workers = NAMES[: rng.randint(1, 3)]
    delay = random_delay(seed, rng.choice([0.001, 0.02, 0.2]))
    cluster = Cluster(workers, delay=delay, beside=seed % 8 > 3)
    cluster.planner = bands_for_all if seed % 3 == 1 else None
    cluster.deployed()
    asked: dict[str, int] = {}
    for _ in range(rng.randint(2, 6)):
        number = rng.randrange(4)
        asked[cluster.submit(image(number), deadline_s=60.0)] = number
        if not calm:
            for _ in range(rng.randint(0, 3)):
                cluster.pass_time(rng.choice([0.0, 0.005, 0.05, 0.5]))
                misfortune(cluster, rng)
        cluster.pass_time(rng.choice([0.0, 0.002, 0.02, 0.3]))
    right = 0
    for request, number in asked.items():
        reply = cluster.reply(request)
        if reply.failure is None:
            cluster.check(request, image(number))
            right += 1
        else:
            assert not calm and reply.failure.error in BY_NAME, reply
            assert reply.failure.error in ("ClusterUnavailable", "WorkerLost", "DeadlineExceeded")
        assert not calm or reply.attempts == 1, reply
    cluster.pass_time(12.0)  # who wants to leave has left
    for name in NAMES:  # heal, then all is well within 10 s
        if name not in [n.name for n in cluster.workers()]:
            cluster.join(name)
    cluster.pass_time(8.0)
    last = cluster.check(cluster.submit(image(9)), image(9))
    assert last.attempts == 1
    cluster.check_idle()
    devices = cluster.ask(m.ListDevices).answer
    assert isinstance(devices, m.Devices)
    assert [d.state for d in devices.devices] == ["ready"] * 4
    return right


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_schedules(request: pytest.FixtureRequest, first: int) -> None:
    """The first seeds of the chunk; all with --full."""
    right = 0
    for seed in range(first, first + (CHUNK if request.config.getoption("--full") else QUICK)):
        try:
            right += run(seed)
        except (AssertionError, Stuck, KeyError) as error:
            raise AssertionError(
                f"seed {seed}: (cd tests && python -c "
                f"'import test_random_schedules as t; t.run({seed})')\n{error}"
            ) from error
    assert right > 0
