"""A worker does with 256 MiB beside its share of a model: no more is in the limit of its device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.lab import DeviceSpec, Lab

MODEL = Path(__file__).parent.parent / "cluster" / "data" / "upscale.onnx"
WORKER_BYTES = 256 << 20
SHARE_BYTES = 10 << 20
"""Less than what its plan says: 26 MB, and 6 MB for tasks of others."""
LONG_S = 150.0

USER = """
import json, sys
import numpy as np
import meshinfer as mi
with mi.Client(timeout_s=60) as client:
    shape = (1, 3, 300, 451)
    d = client.deploy("net", sys.argv[1], shapes={"image": shape}, spread=True)
    x = np.random.default_rng(0).random(shape, np.float32)
    done = [client.infer("net", {"image": x}, deadline_s=60) for _ in range(5)]
    held = min(each.peak_bytes for each in d.report.devices)
    print(json.dumps([held, [[r.degraded, sorted(r.timing.compute_s)] for r in done]]))
"""


@pytest.mark.root
@pytest.mark.timeout(300)
def test_a_worker_does_with_256_mib_beside_its_share(lab_here: None) -> None:
    small = [DeviceSpec(f"small-{i}", 0.4, WORKER_BYTES + SHARE_BYTES) for i in range(3)]
    with Lab([DeviceSpec("first", 0.5), *small]) as lab:
        running = lab.start_cluster()
        asks = [sys.executable, "-c", USER, str(MODEL)]
        user = lab.spawn(
            0, asks, env=running.environment, stdout=subprocess.PIPE, text=True, cwd="/"
        )
        said, _ = user.communicate(timeout=LONG_S)
        held, done = json.loads(said)
        assert held > SHARE_BYTES
        assert [lab.usage(i).oom_kills for i in range(4)] == [0] * 4
        assert done == [[False, ["first", "small-0", "small-1", "small-2"]]] * 5
