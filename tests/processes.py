"""What tests know of processes: who is alive, with a bound on every wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
from architectures import Builder
from onnx import ModelProto

import meshinfer as mi
from cluster.tokens import leave_token


def let_in(address: str, keyring: Path, *state_dirs: Path) -> None:
    """Leave tokens to workers that will start with these state folders."""
    with mi.Client(address, keyring=keyring) as client:
        for each in state_dirs:
            leave_token(each, client.admitting.token())


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def eventually(what: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Whether it comes true in time."""
    until = time.monotonic() + within_s
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def worker_pids(cluster: mi.LocalCluster) -> list[int]:
    """Of the worker processes under the living supervisors, in the order of ``names()``."""
    found = []
    for each in cluster._living():
        children = psutil.Process(each.supervisor.pid).children()
        found += [child.pid for child in children]
    return found


def all_pids(cluster: mi.LocalCluster) -> list[int]:
    """Of everything that a cluster has started."""
    coordinator = cluster._coordinator
    assert coordinator is not None
    supervisors = [each.supervisor.pid for each in cluster._living()]
    gates = [] if cluster._gate is None else [cluster._gate.pid]
    return [coordinator.pid, *supervisors, *worker_pids(cluster), *gates]


def none_alive(pids: Sequence[int]) -> bool:
    return not any(alive(pid) for pid in pids)


def descriptors(pid: int | None = None) -> int:
    return len(os.listdir(Path("/proc") / str(pid or "self") / "fd"))


def small_model(size: int = 24, channels: int = 4, seed: int = 0) -> ModelProto:
    """Two convolutions with a pool between them: image [1, 3, size, size] to y."""
    b = Builder(seed)
    x = b.conv(b.input("image", [1, 3, size, size]), 3, channels, 3)
    x = b.maxpool(x, 3, 1, pads=1)
    return b.model([b.rename(b.conv(x, channels, 3, 3), "y")])


def image(size: int = 24, seed: int = 0) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(seed).standard_normal((1, 3, size, size))
    return {"image": pixels.astype(np.float32)}


def growing(seed: int = 0) -> ModelProto:
    """A model whose rows and columns are dynamic."""
    b = Builder(seed)
    x = b.input("image", [1, 3, "rows", "columns"])
    return b.model([b.rename(b.conv(x, 3, 3, 3), "y")])


def pixels(height: int = 24, width: int = 24) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
