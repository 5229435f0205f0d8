"""A worker does with 256 MiB beside its share of a model: no more is in the limit of its device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.lab import DeviceSpec, Lab
from meshinfer import limits

MODEL = Path(__file__).parent.parent / "cluster" / "data" / "upscale.onnx"
WORKER_BYTES = 256 << 20
SHARE_BYTES = 10 << 20
"""No more than what its plan says: 19 to 26 MB, and 0 to 7 MB for tasks of others."""
WORKING_BYTES = (WORKER_BYTES + SHARE_BYTES) * 17 // 20
"""Of its own that a worker may hold once it has computed, of these 279 MB: 136 to 188 MB were
measured, and the kernel's caches beside them go where there is no room."""
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
    share = {each.device: each.peak_bytes + each.spare_bytes for each in d.report.devices}
    computed = sorted({device for r in done for device in r.timing.compute_s})
    print(json.dumps([share, computed]))
"""


@pytest.mark.root
@pytest.mark.timeout(300)
def test_a_worker_does_with_256_mib_beside_its_share(lab_here: None) -> None:
    small = [DeviceSpec(f"small-{i}", 0.4, WORKER_BYTES + SHARE_BYTES) for i in range(3)]
    with Lab([DeviceSpec("first", 0.5), *small]) as lab:
        share, computed = upscaled(lab)
        names = [device.name for device in small]
        assert all(share[name] > SHARE_BYTES for name in names)
        assert set(names) <= set(computed)
        used = [lab.usage(i) for i in range(1, 4)]
        assert [each.oom_kills for each in used] == [0] * 3
        assert max(each.anonymous_bytes for each in used) < WORKING_BYTES


@pytest.mark.root
@pytest.mark.timeout(300)
def test_a_worker_of_200_mib_grants_little_and_lives(lab_here: None) -> None:
    """It once granted 136 MB of them, and was killed."""
    small = [DeviceSpec(f"small-{i}", 0.4, 200 << 20) for i in range(3)]
    with Lab([DeviceSpec("first", 0.5), *small]) as lab:
        share, _ = upscaled(lab)
        assert all(share.get(each.name, 0) <= (200 << 20) - limits.WORKER_BYTES for each in small)
        assert [lab.usage(i).oom_kills for i in range(1, 4)] == [0] * 3


def upscaled(lab: Lab) -> tuple[dict[str, int], list[str]]:
    """Bytes of each device's share, its spare tasks included, and who has computed."""
    running = lab.start_cluster()
    asks = [sys.executable, "-c", USER, str(MODEL)]
    user = lab.spawn(0, asks, env=running.environment, stdout=subprocess.PIPE, text=True, cwd="/")
    said, _ = user.communicate(timeout=LONG_S)
    share, computed = json.loads(said)
    return share, computed
