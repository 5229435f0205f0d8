"""What the emulation takes: plain onnxruntime on several devices at once, against on one alone.

Boards share nothing; devices of a lab share caches, memory and cores' other halves. What whole
models lose to each other by that, parts of one do as well, whoever divides it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_parts.baseline import await_plain, spawn_plain
from bench_parts.child import Peer
from bench_parts.models import Model
from bench_parts.rig import Patience, lifted
from cluster.lab import DeviceSpec, Lab

_RUNS = 2
"""Of each device at a time: they begin together, and end nearly so."""


class Beside:
    """The model whole on each of ``count`` devices of ``cores`` cores. A context manager."""

    def __init__(
        self,
        cores: float,
        count: int,
        model: Model,
        inputs: Sequence[Path],
        threads: int,
        folder: Path,
        load_cores: float,
        patience: Patience,
    ) -> None:
        self._patience, self._stack = patience, contextlib.ExitStack()
        try:
            lab = self._stack.enter_context(
                Lab([DeviceSpec(f"plain-{i}", cores) for i in range(count)])
            )
            with lifted(lab, load_cores):
                self._peers = [
                    self._stack.enter_context(
                        spawn_plain(lab, i, model, inputs, threads, folder / f"beside-{i}.log")
                    )
                    for i in range(count)
                ]
                for peer in self._peers:
                    await_plain(peer, patience)
            self._pool = self._stack.enter_context(ThreadPoolExecutor(count))
        except BaseException:
            self._stack.close()
            raise

    def shares(self, counts: Sequence[int], rounds: int) -> dict[int, list[float]]:
        """Of each number of devices, in each round: a run alone, the mean of one before and one
        after, over the mean of so many devices' at once; 1 if they do not notice each other."""
        found: dict[int, list[float]] = {count: [] for count in counts}
        before_s = self._seconds(1)
        for i in range(rounds):
            together_s = {n: self._seconds(n) for n in (counts if i % 2 == 0 else counts[::-1])}
            after_s = self._seconds(1)
            for count, seconds in together_s.items():
                found[count].append((before_s + after_s) / 2 / seconds)
            before_s = after_s
        return found

    def _seconds(self, count: int) -> float:
        return fmean(self._pool.map(self._run_s, self._peers[:count]))

    def _run_s(self, peer: Peer) -> float:
        answer: dict[str, Any] = peer.ask({"run": _RUNS}, self._patience.answer_s)
        return fmean(answer["wall_s"])

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
