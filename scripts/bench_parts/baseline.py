"""Plain onnxruntime in a lab of its own: what each cluster is held against."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_parts.child import Peer
from bench_parts.models import Model
from bench_parts.rig import Patience, lifted, spawn
from cluster.lab import DeviceSpec, Lab


def spawn_plain(
    lab: Lab, device: int, model: Model, inputs: Sequence[Path], threads: int, log: Path
) -> Peer:
    """Start plain onnxruntime on the whole model."""
    options = {
        "model": str(model.path),
        "inputs": [str(p) for p in inputs],
        "threads": threads,
    }
    return spawn(lab, "plain.py", options, log, device)


def await_plain(peer: Peer, patience: Patience) -> None:
    """Until it has loaded the model, and run it once: the first run touches all the memory."""
    assert peer.hear(patience.start_s) == "ready"
    peer.ask({"run": 1}, patience.answer_s)


class Baseline:
    """Plain onnxruntime on one device of its own, with the better of 1 and 2 threads."""

    def __init__(
        self,
        cores: float,
        model: Model,
        inputs: Sequence[Path],
        folder: Path,
        load_cores: float,
        tries: int,
        patience: Patience,
    ) -> None:
        self.cores, self.model = cores, model
        self.shares: list[float] = []
        self.last: dict[str, Any] = {}
        self._patience = patience
        self._stack = contextlib.ExitStack()
        try:
            lab = self._stack.enter_context(Lab([DeviceSpec("plain", cores)]))
            folder.mkdir(parents=True, exist_ok=True)
            tried: dict[int, tuple[float, Peer]] = {}
            for threads in (1, 2):
                log = folder / f"plain-{threads}.log"
                with lifted(lab, load_cores):
                    peer = self._stack.enter_context(
                        spawn_plain(lab, 0, model, inputs, threads, log)
                    )
                    await_plain(peer, patience)
                tried[threads] = min(peer.ask({"run": tries}, patience.answer_s)["wall_s"]), peer
            self.tried = {threads: best_s for threads, (best_s, _) in tried.items()}
            self.threads = min(tried, key=lambda n: tried[n][0])
            for threads, (_, peer) in tried.items():
                if threads != self.threads:
                    peer.close()
            self._peer = tried[self.threads][1]
        except BaseException:
            self._stack.close()
            raise

    def run(self) -> dict[str, Any]:
        """Once; see ``Plain.do``. ``last`` has it, and ``shares`` what part of its share of the
        processor it got: less than 1 where the machine had no time for it."""
        answer: dict[str, Any] = self._peer.ask({"run": 1}, self._patience.answer_s)
        self.last = answer
        self.shares.append(answer["cpu_s"][0] / (answer["wall_s"][0] * self.cores))
        return answer

    def run_s(self) -> float:
        """Once; seconds by the clock."""
        return float(self.run()["wall_s"][0])

    @property
    def share(self) -> float:
        """The median of ``shares``."""
        return statistics.median(self.shares)

    def close(self) -> None:
        self._stack.close()
