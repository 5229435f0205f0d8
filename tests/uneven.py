"""Running clusters of three and of six uneven devices, shared by many models one after another."""

from __future__ import annotations

import contextlib
from collections import Counter

import meshinfer as mi

SPEEDS = {3: (1.0, 0.5, 0.25), 6: (1.0, 1.0, 0.5, 0.5, 0.25, 0.25)}
MODELS = 10
WEIGHTS = 1 << 30
"""A cluster keeps what was deployed on it: after so many models or bytes a fresh one is started. A
model with more bytes than this is alone on the machine."""


class Clusters:
    """One running cluster a size, started when it is asked for. Use it as a context manager."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[mi.LocalCluster, mi.Client]] = {}
        self._models: Counter[int] = Counter()
        self._weights: Counter[int] = Counter()

    def client(self, devices: int, nbytes: int) -> mi.Client:
        """Of a cluster of so many devices, for a model with weights of so many bytes."""
        full = self._models[devices] >= MODELS or self._weights[devices] + nbytes > WEIGHTS
        for other in list(self._running):
            if nbytes > WEIGHTS or (full and other == devices):
                self.stop(other)
        if devices not in self._running:
            cluster = mi.LocalCluster(devices, speeds=SPEEDS[devices])
            try:
                self._running[devices] = cluster, cluster.client()
            except BaseException:
                cluster.close()
                raise
        self._models[devices] += 1
        self._weights[devices] += nbytes
        return self._running[devices][1]

    def stop(self, devices: int) -> None:
        """End this cluster, as after a failure: the next model gets a fresh one."""
        self._models[devices] = self._weights[devices] = 0
        if devices in self._running:
            cluster, client = self._running.pop(devices)
            with contextlib.suppress(Exception):
                client.close()
            cluster.close()

    def __enter__(self) -> Clusters:
        return self

    def __exit__(self, *_: object) -> None:
        for devices in list(self._running):
            self.stop(devices)
