"""C23 with real processes: a worker that answers wrong is found, quarantined and named; one that
only rounds otherwise works on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import oracle
import pytest
from processes import eventually, image, small_model

import meshinfer as mi
from cluster.local import LOOPBACK, _of_this_machine
from cluster.tokens import leave_token
from cluster.worker import WorkerOptions

LIAR = Path(__file__).resolve().parent / "liar.py"
NAME = "liar"
PICTURES = 4


@contextmanager
def with_a(kind: str, share: float, folder: Path) -> Iterator[mi.Client]:
    """A cluster of three, one of them such a worker, with a model spread over it."""
    with mi.LocalCluster(2) as cluster, cluster.client(timeout_s=60.0) as client:
        leave_token(folder, client.admitting.token())
        options = WorkerOptions(
            name=NAME,
            cluster=cluster.cluster,
            state_dir=str(folder),
            coordinator=cluster.address,
            interfaces=(LOOPBACK,),
            measured=_of_this_machine(1),
            log_level="error",
            parent=os.getpid(),
        )
        told = json.dumps(msgspec.to_builtins(options))
        worker = subprocess.Popen([sys.executable, str(LIAR), kind, str(share), told])
        try:
            assert eventually(lambda: NAME in {d.device for d in client.devices()}, 30.0)
            client.deploy("net", small_model(), spread=True)
            yield client
        finally:
            worker.kill()
            worker.wait(10.0)


def states(client: mi.Client) -> dict[str, str]:
    return {d.device: d.state for d in client.devices()}


def answers(client: mi.Client, count: int, until: str = "") -> list[bool]:
    """Whether each of so many is right; fewer, once a device is in this state."""
    model, inputs = small_model(), [image(seed=i) for i in range(PICTURES)]
    truths = [oracle.reference(model, each) for each in inputs]
    right = []
    for i in range(count):
        which = i % PICTURES
        outputs = client.infer("net", inputs[which]).outputs
        right.append(oracle.error(outputs["y"], truths[which]["y"]) <= 1e-5)
        if until and i % 5 == 0 and until in states(client).values():
            break
    return right


@pytest.mark.parametrize(("share", "most"), [(1.0, 300), (0.1, 3000)], ids=["always", "a tenth"])
def test_a_liar_is_found_and_all_answers_are_right_then(
    share: float, most: int, tmp_path: Path
) -> None:
    with with_a("wrong", share, tmp_path) as client:
        before = answers(client, most, until="quarantined")
        assert states(client)[NAME] == "quarantined", f"{len(before)} answers"
        assert [name for name, state in states(client).items() if state != "ready"] == [NAME]
        assert not all(before)
        assert all(answers(client, 200))
        found = next(d for d in client.devices() if d.device == NAME)
        assert "its results differ from those of worker-" in found.cause
        result = client.infer("net", image())
        assert result.degraded and NAME not in {task.device for task in result.timing.tasks}


def test_a_device_that_rounds_otherwise_is_no_liar(tmp_path: Path) -> None:
    with with_a("noise", 1.0, tmp_path) as client:
        before = time.monotonic()
        assert all(answers(client, 300)) and time.monotonic() > before
        assert set(states(client).values()) == {"ready"}
