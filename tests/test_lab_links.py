"""A link that becomes slow, in the lab: transfers notice it, and its device gets nothing more."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import yolov2
from oracle import assert_exact
from test_lab import LONG_S, python

from cluster.lab import DeviceSpec, Lab

SIZE = 256
"""Of 160 the first device does it all in 31 to 40 ms, the second, messages included, in 24: on a
machine that is busy as they measure themselves that is no sure gain."""
SLOW_BITS_PER_S = 6e6
"""On it the input alone takes 1 s, many times as long as the first device does it all."""
TIMES = 100

USER = """
import json, sys
import numpy as np
import meshinfer as mi
inputs = dict(np.load(sys.argv[2]))
with mi.Client() as client:
    client.deploy("net", sys.argv[1])
    for line in sys.stdin:
        result = client.infer("net", inputs)
        np.savez(sys.argv[3], **result.outputs)
        links = [d.link.bytes_per_s for d in client.devices() if d.device == "b" and d.link]
        print(json.dumps({"b": "task b" in str(result.plan), "links": links}), flush=True)
"""


def until(ask: Callable[[], dict[str, Any]], holds: Callable[[dict[str, Any]], bool]) -> bool:
    """Within so many answers, each of which is looked at."""
    return any(holds(ask()) for _ in range(TIMES))


@pytest.mark.root
def test_a_link_that_becomes_slow_is_noticed_and_its_device_left(
    lab_here: None, tmp_path: Path
) -> None:
    model = yolov2(SIZE, width=0.5)
    inputs = {"image": np.random.default_rng(0).random((1, 3, SIZE, SIZE), np.float32)}
    files = [str(tmp_path / name) for name in ("net.onnx", "in.npz", "out.npz")]
    onnx.save(model, files[0])
    np.savez(files[1], **inputs)
    specs = [DeviceSpec("a", 0.5), DeviceSpec("b", 1.0)]
    with Lab(specs) as lab:
        running = lab.start_cluster()
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        spawned = lab.spawn(0, python(USER, *files), env=running.environment, **pipes)
        with spawned as user:  # whatever fails, its pipes are closed

            def ask() -> dict[str, Any]:
                assert user.stdin is not None and user.stdout is not None
                user.stdin.write("\n")
                user.stdin.flush()
                said = user.stdout.readline()
                assert said, f"ended with {user.wait(LONG_S)}"
                assert_exact(model, inputs, dict(np.load(files[2])))
                found: dict[str, Any] = json.loads(said)
                return found

            for _ in range(20):  # until it is known how long it takes
                ask()
            assert until(ask, lambda said: said["b"]), (
                "b is twice as fast and its link costs little"
            )
            lab.set_link(1, SLOW_BITS_PER_S)
            assert until(ask, lambda said: not said["b"])
            assert until(ask, lambda said: max(said["links"]) < SLOW_BITS_PER_S)
            user.communicate(timeout=LONG_S)
