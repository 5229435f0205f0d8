"""Measures this device on its own engine: floating-point operations a second of a convolution.

The probe is a 3x3 convolution of 32 channels (``data/probe.onnx``, weights as an input), a size
that fits small caches; the best of a few runs, because a shared machine only ever makes it slower.
"""

from __future__ import annotations

import platform
import socket
import time
from importlib.resources import files

import numpy as np
import onnxruntime as ort
import psutil

import meshinfer
from meshinfer.protocol.messages import Facts

_CHANNELS, _SIZE, _KERNEL = 32, 64, 3
_FLOPS = 2 * _CHANNELS * _CHANNELS * _KERNEL * _KERNEL * _SIZE * _SIZE
_RUNS, _LONGEST_S = 12, 0.5


def measure_flops(threads: int) -> float:
    """FLOP/s of the probe at this number of threads; takes up to half a second."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = files("cluster").joinpath("data/probe.onnx").read_bytes()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {
        "x": np.ones((1, _CHANNELS, _SIZE, _SIZE), np.float32),
        "w": np.ones((_CHANNELS, _CHANNELS, _KERNEL, _KERNEL), np.float32),
    }
    session.run(None, feeds)
    best, started = float("inf"), time.perf_counter()
    for _ in range(_RUNS):
        before = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - before)
        if time.perf_counter() - started > _LONGEST_S:
            break
    return _FLOPS / best


def facts(*, threads: int, flops_per_s: float, engine: str, computes: bool = True) -> Facts:
    """What this device says of itself when it joins."""
    return Facts(
        host=socket.gethostname(),
        cores=psutil.cpu_count(logical=True) or 1,
        memory_bytes=psutil.virtual_memory().total,
        architecture=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        engine=engine,
        version=meshinfer.__version__,
        threads=threads,
        flops_per_s=flops_per_s,
        computes=computes,
    )
