"""The measurement itself: rounds of the baseline and each cluster in turn, and a row of each.

Baseline and clusters never run at the same moment. A round's ratio is its own baseline, the mean
of one run before and one after the clusters, over its own latency.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle

from bench_parts.models import Model, make
from bench_parts.rig import ANSWER_S, Baseline, Rig, Setup
from bench_parts.rows import Series, output_bytes_of, row_of
from meshinfer import limits

IN_FLIGHT_A_DEVICE = 2
_ROOM = 7 / 8  # of the machine, for clusters that start together
_BEGAN = time.monotonic()


@dataclass(frozen=True, slots=True)
class Job:
    """Clusters to measure with one model in the same rounds; ``streams`` adds throughput on
    the largest."""

    model: str
    setups: tuple[Setup, ...]
    streams: bool = False


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. ``frames``: of a stream in each of ``stream_rounds``. ``tries``: of the
    baseline with each number of threads."""

    rounds: int
    stream_rounds: int
    frames: int
    tries: int
    warm_ups: int = 2


class Wrong(Exception):
    """An answer is not the oracle's."""


class Answers:
    """Holds answers against the oracle, each file of answers once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[tuple[Path, int], bool] = {}
        self.count = 0

    def check(self, folder: Path, results: Sequence[Mapping[str, Any]]) -> bool:
        """Whether they are the oracle's bit for bit. Raises ``Wrong``."""
        identical = True
        for result in results:
            key = (folder / result["answer"], result["request"])
            if key not in self._known:
                outputs = dict(np.load(key[0]))
                feeds = self._model.requests[key[1]].feeds
                try:
                    self._known[key] = oracle.assert_exact(self._model.path, feeds, outputs)
                except AssertionError as error:
                    raise Wrong(f"{self._model.title}: {error}") from error
            identical &= self._known[key]
            self.count += 1
        return identical


class Rigs:
    """Running clusters by setup. ``keep``: for the next model too, instead of fresh ones."""

    def __init__(self, folder: Path, deploy_cores: float, keep: bool) -> None:
        self._folder, self.deploy_cores, self._keep = folder, deploy_cores, keep
        self._running: dict[Setup, Rig] = {}
        self._numbers = itertools.count(1)

    def get(self, setups: Sequence[Setup]) -> list[Rig]:
        """Running clusters of these; those that are missing are started, several at once where
        their shares leave the machine some room, so that they do not disturb each other."""
        room, missing = _ROOM * (os.cpu_count() or 1), [s for s in setups if s not in self._running]
        while missing:
            together = [missing.pop(0)]
            while missing and sum(sum(s.cores) for s in (*together, missing[0])) <= room:
                together.append(missing.pop(0))
            with ThreadPoolExecutor(len(together)) as pool:
                for started in [pool.submit(self._start, setup) for setup in together]:
                    started.result()
        return [self._running[setup] for setup in setups]

    def _start(self, setup: Setup) -> None:
        folder = self._folder / f"rig-{next(self._numbers)}"
        rig = self._running[setup] = Rig(setup, folder, self.deploy_cores)
        say(
            f"  {setup.name} up in {rig.start_s:.1f} s ({rig.start_cpu_s:.1f} s of CPU), "
            f"idle at {rig.idle_cores:.1%} of a core"
        )

    def done(self, job: Job) -> None:
        """A job is over."""
        if not self._keep:
            self.close()

    def close(self) -> None:
        rigs = list(self._running.values())
        self._running.clear()
        if rigs:  # each waits for its coordinator to drain
            with ThreadPoolExecutor(len(rigs)) as pool:
                for closed in [pool.submit(rig.close) for rig in rigs]:
                    closed.result()


def measure(job: Job, rigs: Rigs, cores: float, effort: Effort, folder: Path) -> Iterator[Any]:
    """Rows of a job, as builtins. ``cores``: of the baseline's device.

    Raises ``Wrong``, ``Broken`` and MeshInfer's errors.
    """
    model = make(job.model, folder)
    inputs = _saved(model, folder)
    answers = Answers(model)
    input_bytes = model.requests[0].nbytes
    plain_inputs = [p for p, _ in inputs]
    with Baseline(cores, model, plain_inputs, folder, rigs.deploy_cores, effort.tries) as baseline:
        say(f"  plain: {baseline.threads} threads, {min(baseline.tried.values()) * 1e3:.0f} ms")
        latency = [
            _deployed(rig, model, "latency", [p for _, p in inputs], answers, effort)
            for rig in rigs.get(job.setups)
        ]
        for i in range(effort.rounds):
            _round(i, latency, baseline, model, answers)
        for series in latency:  # before streams need more
            series.workers = [replace(each) for each in series.rig.workers]
        streams = []
        if job.streams:
            largest = max(latency, key=lambda s: len(s.rig.setup.cores)).rig
            pictures = [p for _, p in inputs]
            stream = _deployed(largest, model, "throughput", pictures, answers, effort)
            streams.append(stream)
            for _ in range(effort.stream_rounds):
                _stream_round(stream, baseline, model, answers, effort)
        plain = baseline.run(1)
    output_bytes = output_bytes_of(model, [*latency, *streams])
    for series in (*latency, *streams):
        row = row_of(series, model, baseline, plain, input_bytes, output_bytes)
        say(
            f"  {row['short']}: {row['speedup']['median']:.2f}× of at most "
            f"{row['bound_speedup']:.2f}×, predicted "
            + (f"{row['predicted_s'] * 1e3:.0f} ms" if row["predicted_s"] else "nothing")
            + f", measured {row['latency_s']['median'] * 1e3:.0f} ms"
        )
        yield row
    rigs.done(job)


def _saved(model: Model, folder: Path) -> list[tuple[Path, Path]]:
    """(for onnxruntime, for MeshInfer's client) of each picture."""
    found = []
    for i, request in enumerate(model.requests):
        plain, given = (folder / f"{model.name}-{i}-{kind}.npz" for kind in ("plain", "given"))
        np.savez(plain, **dict(request.feeds))
        picture = request.picture
        np.savez(given, **({"picture": picture} if picture is not None else dict(request.feeds)))
        found.append((plain, given))
    return found


def _deployed(
    rig: Rig, model: Model, objective: str, inputs: Sequence[Path], answers: Answers, effort: Effort
) -> Series:
    """Deployed and warm; the first requests are checked but not counted."""
    clean = rig.deployed == 0
    rig.load(model, inputs)
    made = rig.deploy(model, objective)
    series = Series(rig, objective, made, clean)
    for i in range(max(effort.warm_ups, len(model.requests))):
        _keep(series, answers, _infer(rig, model, objective, i), counted=False)
    if objective == "throughput":
        _keep(
            series, answers, _stream(rig, model, 1, len(rig.setup.cores))["results"], counted=False
        )
    say(
        f"  deployed on {rig.setup.name} for {objective} in {made['deploy_s']:.1f} s "
        f"({made['deploy_cpu_s']:.1f} s of CPU)"
    )
    return series


def _infer(rig: Rig, model: Model, objective: str, i: int) -> list[dict[str, Any]]:
    which = i % len(model.requests)
    answer: list[dict[str, Any]] = rig.ask(
        do="infer",
        name=f"{model.name}-{objective}",
        which=[which],
        deadline_s=min(ANSWER_S, limits.REQUEST_DEADLINE_S),
    )
    return answer


def _keep(
    series: Series, answers: Answers, results: list[dict[str, Any]], *, counted: bool = True
) -> None:
    series.identical &= answers.check(series.rig.folder, results)
    series.answers += len(results)
    if counted:
        series.results += results


def _round(
    i: int, all_: Sequence[Series], baseline: Baseline, model: Model, answers: Answers
) -> None:
    """Baseline, each cluster (every second round in reverse), baseline."""
    alone = baseline.run(1)["wall_s"]
    taken = []
    for series in all_ if i % 2 == 0 else all_[::-1]:
        before = series.rig.counters()
        results = _infer(series.rig, model, "latency", i)
        used = series.rig.counters().since(before)
        taken.append((series, results, used))
    alone += baseline.run(1)["wall_s"]
    for series, results, used in taken:
        series.baseline_s.append(statistics.fmean(alone))
        series.latency_s.append(results[0]["wall_s"])
        series.used.append((used, 1))
        _keep(series, answers, results)  # the oracle runs when nothing is measured
        series.rig.read_memory()


def _stream(rig: Rig, model: Model, frames: int, around: int) -> dict[str, Any]:
    answer: dict[str, Any] = rig.ask(
        do="stream",
        name=f"{model.name}-throughput",
        frames=frames,
        around=around,
        in_flight=IN_FLIGHT_A_DEVICE * len(rig.setup.cores),
        deadline_s=min(ANSWER_S, limits.REQUEST_DEADLINE_S),
    )
    return answer


def _stream_round(
    series: Series, baseline: Baseline, model: Model, answers: Answers, effort: Effort
) -> None:
    alone = baseline.run(1)["wall_s"]
    before = series.rig.counters()
    around = IN_FLIGHT_A_DEVICE * len(series.rig.setup.cores)
    found = _stream(series.rig, model, effort.frames, around)
    used = series.rig.counters().since(before)
    alone += baseline.run(1)["wall_s"]
    series.baseline_s.append(statistics.fmean(alone))
    series.latency_s.append(found["frame_s"])
    series.used.append((used, found["frames"]))
    _keep(series, answers, found["results"])
    series.rig.read_memory()


def say(text: str) -> None:
    """Progress, to stderr, with the seconds since the start."""
    print(f"{time.monotonic() - _BEGAN:5.0f} s  {text}", file=sys.stderr, flush=True)
