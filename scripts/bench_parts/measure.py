"""The measurement itself: rounds of the baseline and each cluster in turn, and a row of each.

Baseline and clusters never run at the same moment. A round's ratio is its own baseline, the mean
of one run before and one after the clusters, over its own latency. What fails, or is too slow,
costs its own row.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench_parts.answers import Answers, Wrong
from bench_parts.baseline import Baseline
from bench_parts.beside import Beside
from bench_parts.child import Broken
from bench_parts.models import Model, make
from bench_parts.rig import OutOfTime, Patience, Rig, Setup, shared
from bench_parts.rows import Series, failed_row, row_of
from meshinfer import limits
from meshinfer.errors import MeshInferError

IN_FLIGHT_A_DEVICE = 2
_ROOM = 7 / 8  # of the machine, for clusters that start together
_PLAIN_S = 2.0
_MOST_TIMES = 10
_BEGAN = time.monotonic()


@dataclass(frozen=True, slots=True)
class Job:
    """Clusters to measure with one model in the same rounds; ``streams`` adds throughput on
    the largest; ``optional``: where there is time for it."""

    model: str
    setups: tuple[Setup, ...]
    streams: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. ``frames``: of a stream in each of ``stream_rounds``. ``tries``: of the
    baseline with each number of threads. ``beside``: rounds of plain runs beside each other."""

    rounds: int
    stream_rounds: int
    frames: int
    tries: int
    warm_ups: int = 2
    beside: int = 0


class Subject:
    """A model with its pictures as files, its oracle, and its baseline."""

    def __init__(
        self,
        name: str,
        folder: Path,
        cores: float,
        deploy_cores: float,
        effort: Effort,
        patience: Patience,
    ) -> None:
        self.model = make(name, folder)
        plain, self.inputs = zip(*_saved(self.model, folder), strict=True)
        self.answers = Answers(self.model)
        self.baseline = Baseline(
            cores, self.model, plain, folder, deploy_cores, effort.tries, patience
        )
        tried = ", ".join(f"{n}: {s * 1e3:.0f} ms" for n, s in self.baseline.tried.items())
        say(f"  plain, by threads: {tried}")
        self._beside: dict[int, list[float]] = {}
        self._new_beside = partial(
            Beside,
            cores,
            model=self.model,
            inputs=plain,
            folder=folder,
            load_cores=deploy_cores,
            threads=self.baseline.threads,
            patience=patience,
        )

    def beside(self, counts: Sequence[int], rounds: int) -> dict[int, list[float]]:
        """See ``Beside.shares``; of each number of devices once."""
        new = sorted(set(counts) - set(self._beside))
        if new and rounds:
            with self._new_beside(count=new[-1]) as all_:
                self._beside |= all_.shares(new, rounds)
            for count in new:
                share = statistics.median(self._beside[count])
                say(f"  plain on {count} at once: {share:.2f} of its speed alone")
        return self._beside


class Rigs:
    """Running clusters, and the subject of the moment.

    ``share``: these setups are parts of one cluster, which serves all models; other devices than a
    setup's then get no share of a plan. Otherwise each has a cluster of its own for each model.
    """

    def __init__(
        self,
        folder: Path,
        cores: float,
        deploy_cores: float,
        effort: Effort,
        patience: Patience,
        share: Sequence[Setup] = (),
    ) -> None:
        self.patience = patience
        self._folder, self._cores, self._deploy_cores = folder, cores, deploy_cores
        self._effort, self._share = effort, tuple(dict.fromkeys(share))
        self._running: dict[Setup, tuple[Rig, tuple[int, ...]]] = {}
        self._numbers = itertools.count(1)
        self._subject: Subject | None = None

    def subject(self, name: str) -> Subject:
        """The model; another one before is over."""
        if self._subject is None or self._subject.model.name != name:
            self._end_subject()
            self._subject = Subject(
                name, self._folder, self._cores, self._deploy_cores, self._effort, self.patience
            )
        return self._subject

    def get(self, setups: Sequence[Setup]) -> list[tuple[Rig, tuple[int, ...]]]:
        """A running cluster for each, and which devices of it; those that are missing are started,
        several at once where their shares leave the machine some room, so that they do not disturb
        each other."""
        room, missing = _ROOM * (os.cpu_count() or 1), [s for s in setups if s not in self._running]
        if missing and self._share:
            like = [s for s in self._share if s.kind == missing[0].kind]
            cores, members = shared(like)
            rig = self._start(cores, missing[0], "shared")
            self._running |= {setup: (rig, members[setup]) for setup in like}
            return self.get(setups)
        while missing:
            together = [missing.pop(0)]
            while missing and sum(sum(s.cores) for s in (*together, missing[0])) <= room:
                together.append(missing.pop(0))
            with ThreadPoolExecutor(len(together)) as pool:
                starting = {s: pool.submit(self._start, s.cores, s, s.name) for s in together}
                for setup, started in starting.items():
                    self._running[setup] = started.result(), tuple(range(len(setup.cores)))
        return [self._running[setup] for setup in setups]

    def _start(self, cores: Sequence[float], like: Setup, name: str) -> Rig:
        folder = self._folder / f"rig-{next(self._numbers)}"
        rig = Rig(
            cores, like.link_bits_per_s, folder, self.patience, self._deploy_cores, like.plaintext
        )
        say(
            f"  {name} up in {rig.start_s:.1f} s ({rig.start_cpu_s:.1f} s of CPU), "
            f"idle at {rig.idle_cores:.1%} of a core"
        )
        return rig

    def drop(self, rig: Rig, why: str) -> None:
        """A cluster that broke: whoever needs one like it gets another."""
        rig.broken = rig.broken or why
        self._running = {s: found for s, found in self._running.items() if found[0] is not rig}
        rig.close()

    def done(self) -> None:
        """A job is over."""
        if not self._share:
            self.close()

    def close(self) -> None:
        rigs = list({id(rig): rig for rig, _ in self._running.values()}.values())
        self._running.clear()
        self._end_subject()
        if rigs:
            with ThreadPoolExecutor(len(rigs)) as pool:
                for closed in [pool.submit(rig.close) for rig in rigs]:
                    closed.result()

    def _end_subject(self) -> None:
        if self._subject is not None:
            self._subject.baseline.close()
            self._subject = None


def measure(job: Job, rigs: Rigs, effort: Effort) -> Iterator[dict[str, Any]]:
    """Rows of a job, as builtins; of what failed, a row that says why (``failed``).

    Raises what fails before anything is deployed, and ``OutOfTime``.
    """
    subject = rigs.subject(job.model)
    found = dict(zip(job.setups, rigs.get(job.setups), strict=True))
    latency = [Series(setup, "latency", *at) for setup, at in found.items()]
    for series in latency:
        _deploy(series, rigs, subject, effort)
    _rounds(latency, rigs, subject, effort)
    for series in latency:  # before streams need more
        series.workers = [replace(series.rig.workers[i]) for i in series.members]
    all_ = list(latency)
    if job.streams:
        largest = max(latency, key=lambda s: len(s.setup.cores))
        stream = Series(largest.setup, "throughput", largest.rig, largest.members)
        all_.append(stream)
        _stream_rounds(stream, rigs, subject, effort)
    _beside(all_, subject, effort)
    for series in all_:
        if series.failed or not series.latency_s:
            why = series.failed or series.rig.broken or "no round was made"
            yield failed_row(series, subject.model, why)
            continue
        row = row_of(series, subject.model, subject.baseline)
        say(f"  {_said(row)}")
        yield row
    rigs.done()


def _beside(all_: Sequence[Series], subject: Subject, effort: Effort) -> None:
    """What devices of a lab take from each other, for those clusters whose devices are equal."""
    equal = [s for s in all_ if s.latency_s and len(s.setup.cores) > 1 == len(set(s.setup.cores))]
    try:
        found = subject.beside([len(s.setup.cores) for s in equal], effort.beside)
    except (OutOfTime, Broken, MeshInferError) as error:  # a row lacks its second figure, then
        say(f"  no plain runs beside each other: {error}")
        return
    for series in equal:
        series.beside = found.get(len(series.setup.cores), [])


def _said(row: Mapping[str, Any]) -> str:
    expected = f"{row['predicted_s'] * 1e3:.0f} ms" if row["predicted_s"] else "nothing"
    return (
        f"{row['short']}: {row['speedup']['median']:.2f}× of at most "
        f"{row['bound_speedup']:.2f}×, predicted {expected}, "
        f"measured {row['latency_s']['median'] * 1e3:.0f} ms"
        + (f", {row['speedup_beside']:.2f}× beside plain on all" if row["speedup_beside"] else "")
        + (f"; DOUBTFUL: {row['doubt']}" if row["doubt"] else "")
    )


@contextlib.contextmanager
def _apart(series: Series, rigs: Rigs) -> Iterator[None]:
    """What fails in here fails this series, and the others of a cluster that no longer answers.

    When time is over, what the series has got remains.
    """
    try:
        yield
    except OutOfTime as error:
        series.failed = "" if series.latency_s else str(error)
    except (Wrong, Broken, MeshInferError) as error:
        series.failed = f"{type(error).__name__}: {error}"
        say(f"  FAILED on {series.setup.name} for {series.objective}: {series.failed}")
        if not isinstance(error, Wrong):
            rigs.drop(series.rig, f"its cluster was lost with {series.setup.name}")


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


def _deploy(series: Series, rigs: Rigs, subject: Subject, effort: Effort) -> None:
    """Deployed and warm; the first requests are checked but not counted."""
    if not series.lives:
        return
    with _apart(series, rigs):
        rig, model = series.rig, subject.model
        series.clean = rig.deployed == 0
        rig.load(model, subject.inputs)
        series.name = f"{model.name}-{series.objective}-{series.setup.name}"
        series.made = rig.deploy(series.name, model, series.members, objective=series.objective)
        for i in range(max(effort.warm_ups, len(model.requests))):
            _keep(series, subject, _infer(series, subject, i), counted=False)
        rig.rest()
        for i in range(effort.warm_ups):
            _keep(series, subject, _infer(series, subject, i), counted=False)
        say(
            f"  deployed on {series.setup.name} for {series.objective} in "
            f"{series.made['deploy_s']:.1f} s ({series.made['deploy_cpu_s']:.1f} s of CPU)"
        )


def _infer(series: Series, subject: Subject, i: int) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = series.rig.ask(
        do="infer",
        name=series.name,
        which=[i % len(subject.model.requests)],
        deadline_s=_deadline_s(series.rig.patience),
    )
    return answer


def _keep(
    series: Series, subject: Subject, results: list[dict[str, Any]], *, counted: bool = True
) -> None:
    series.identical &= subject.answers.check(series.rig.folder, results)
    series.answers += len(results)
    if counted:
        series.results += results


def _rounds(all_: Sequence[Series], rigs: Rigs, subject: Subject, effort: Effort) -> None:
    """As many rounds as wanted, or as there is time for, but one. Of a short model more, until its
    plain runs took ``_PLAIN_S`` together: each answer is within few of the quota's sleeps."""
    before_s: float | None = None
    plain_s = 0.0
    for i in range(_MOST_TIMES * effort.rounds):
        alive = [s for s in all_ if s.lives]
        if not alive or (i >= effort.rounds and plain_s >= _PLAIN_S):
            return
        plain_s += before_s or 0.0
        try:
            before_s = _round(i, alive, rigs, subject, before_s)
        except OutOfTime as error:
            for series in alive:
                series.failed = "" if series.latency_s else str(error)
            return


def _round(
    i: int, all_: Sequence[Series], rigs: Rigs, subject: Subject, before_s: float | None
) -> float:
    """Baseline (unless it has just run), each cluster (every second round in reverse), baseline;
    seconds of the last."""
    before_s = subject.baseline.run_s() if before_s is None else before_s
    taken = []
    for series in all_ if i % 2 == 0 else all_[::-1]:
        with _apart(series, rigs):
            if series.lives:
                before = series.rig.counters()
                results = _infer(series, subject, i)
                taken.append((series, results, series.rig.counters().since(before)))
    after_s = subject.baseline.run_s()
    for series, results, used in taken:
        with _apart(series, rigs):
            if series.lives:
                _keep(series, subject, results)  # the oracle runs when nothing is measured
                series.rig.read_memory()
                series.add((before_s + after_s) / 2, results[0]["wall_s"], used, 1)
    return after_s


def _stream_rounds(series: Series, rigs: Rigs, subject: Subject, effort: Effort) -> None:
    _deploy(series, rigs, subject, effort)
    around = len(series.setup.cores)
    with _apart(series, rigs):
        for _ in range(effort.stream_rounds if series.lives else 0):
            before_s = subject.baseline.run_s()
            before = series.rig.counters()
            found = _stream(series, effort.frames, around)
            used = series.rig.counters().since(before)
            after_s = subject.baseline.run_s()
            _keep(series, subject, found["results"])
            series.add((before_s + after_s) / 2, found["frame_s"], used, found["frames"])


def _stream(series: Series, frames: int, around: int) -> dict[str, Any]:
    answer: dict[str, Any] = series.rig.ask(
        do="stream",
        name=series.name,
        frames=frames,
        around=around,
        in_flight=IN_FLIGHT_A_DEVICE * len(series.setup.cores),
        deadline_s=_deadline_s(series.rig.patience),
    )
    return answer


def _deadline_s(patience: Patience) -> float:
    """Of a request: its error comes before the benchmark stops waiting for it."""
    return min(0.9 * patience.answer_s, limits.REQUEST_DEADLINE_S)


def say(text: str) -> None:
    """Progress, to stderr, with the seconds since the start."""
    print(f"{time.monotonic() - _BEGAN:5.0f} s  {text}", file=sys.stderr, flush=True)
