"""The measurement itself: rounds of the baseline and each cluster in turn, and a row of each.

Baseline and clusters never run at the same moment. A round's ratio is its own baseline, the mean
of one run before and one after the clusters, over its own latency.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle

from bench_parts.figures import bound_s, breakdown, middle, spread
from bench_parts.models import Model, make
from bench_parts.page import link_name
from bench_parts.rig import ANSWER_S, Baseline, Counters, Rig, Setup
from meshinfer import limits
from meshinfer.plan import Plan

IN_FLIGHT_A_DEVICE = 2
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


@dataclass(slots=True)
class Series:
    """What the rounds of one cluster (or of its streams) gave."""

    rig: Rig
    objective: str
    made: dict[str, Any]
    clean: bool
    baseline_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    used: list[tuple[Counters, int]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0
    identical: bool = True


class Rigs:
    """Running clusters by setup. ``keep``: for the next model too, instead of fresh ones."""

    def __init__(self, folder: Path, deploy_cores: float, keep: bool) -> None:
        self._folder, self.deploy_cores, self._keep = folder, deploy_cores, keep
        self._running: dict[Setup, Rig] = {}
        self._made = 0

    def get(self, setup: Setup) -> Rig:
        if setup not in self._running:
            self._made += 1
            folder = self._folder / f"rig-{self._made}"
            self._running[setup] = Rig(setup, folder, self.deploy_cores)
        return self._running[setup]

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
            _deployed(rigs.get(setup), model, "latency", [p for _, p in inputs], answers, effort)
            for setup in job.setups
        ]
        for i in range(effort.rounds):
            _round(i, latency, baseline, model, answers)
        streams = []
        if job.streams:
            largest = max(latency, key=lambda s: len(s.rig.setup.cores)).rig
            pictures = [p for _, p in inputs]
            stream = _deployed(largest, model, "throughput", pictures, answers, effort)
            streams.append(stream)
            for _ in range(effort.stream_rounds):
                _stream_round(stream, baseline, model, answers, effort)
        plain = baseline.run(1)
    output_bytes = _output_bytes(model, [*latency, *streams])
    for series in (*latency, *streams):
        row = _row(series, model, baseline, plain, input_bytes, output_bytes)
        say(
            f"  {row['short']}: {row['speedup']['median']:.2f}× of at most "
            f"{row['bound_speedup']:.2f}×, predicted {row['predicted_s'] * 1e3:.0f} ms, "
            f"measured {row['latency_s']['median'] * 1e3:.0f} ms"
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
    say(f"  deployed on {rig.setup.name} for {objective} in {made['deploy_s']:.1f} s")
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


def _output_bytes(model: Model, all_: Sequence[Series]) -> int:
    for series in all_:
        for result in series.results:
            outputs = dict(np.load(series.rig.folder / result["answer"]))
            return sum(int(array.nbytes) for array in outputs.values())
    raise AssertionError("no answers")


# ---------------------------------------------------------------------- rows


def _row(
    series: Series,
    model: Model,
    baseline: Baseline,
    plain: Mapping[str, Any],
    input_bytes: int,
    output_bytes: int,
) -> dict[str, Any]:
    rig, setup = series.rig, series.rig.setup
    ratios = [a / b for a, b in zip(series.baseline_s, series.latency_s, strict=True)]
    alone_s = statistics.median(series.baseline_s)
    latency, speedup = spread(series.latency_s), spread(ratios)
    bound = bound_s(
        alone_s, setup.cores, baseline.cores, setup.link_bits_per_s / 8, input_bytes, output_bytes
    )
    link = link_name(setup.link_bits_per_s)
    stream = series.objective == "throughput"
    short = f"{model.title} · {setup.name} · {link}" + (" · stream" if stream else "")
    frames = sum(n for _, n in series.used)
    per_device = zip(*(used.cpu_s for used, _ in series.used), strict=True)
    ideal = sum(setup.cores) / baseline.cores
    return {
        "name": short,
        "short": short,
        "model": model.name,
        "title": model.title,
        "devices": setup.devices,
        "cores": list(setup.cores),
        "link_bits_per_s": setup.link_bits_per_s,
        "plaintext": setup.plaintext,
        "objective": series.objective,
        "baseline_s": asdict(spread(series.baseline_s)),
        "baseline_threads": baseline.threads,
        "baseline_tried_s": baseline.tried,
        "latency_s": asdict(latency),
        "speedup": asdict(speedup),
        "efficiency": speedup.median / ideal,
        "bound_s": bound,
        "bound_speedup": alone_s / bound,
        "input_bytes": input_bytes,
        "output_bytes": output_bytes,
        "payload_mb": _payload_mb(series.results),
        "wire_mb": sum(sum(u.sent_bytes) for u, _ in series.used) / frames / 1e6,
        "cpu_s": [sum(each) / frames for each in per_device],
        "cpu_even_s": alone_s * baseline.cores / len(setup.cores),
        "idle_cores": rig.idle_cores,
        "answers": series.answers,
        "wrong": 0,  # a wrong one has ended the run
        "identical": series.identical,
        "degraded": sum(r["degraded"] for r in series.results),
        "retried": sum(r["attempts"] > 1 for r in series.results),
        "raw": {"baseline_s": series.baseline_s, "latency_s": series.latency_s},
        **_planned(series, latency.median),
        **_times(series, baseline, alone_s),
        **_memory(series, plain),
    }


def _payload_mb(results: Sequence[Mapping[str, Any]]) -> float:
    """Megabytes of tensors that left devices for others, a frame."""
    sent = [sum(t["sent_bytes"] for t in r["timing"]["tasks"]) for r in results]
    return statistics.median(sent) / 1e6


def _planned(series: Series, measured_s: float) -> dict[str, Any]:
    made = series.made
    plan = Plan.parse(made["plan"])
    expected = made["expected_s"] or 0.0
    latency = series.objective == "latency"
    return {
        "predicted_s": expected,
        "predicted_off": abs(expected / measured_s - 1) if expected and latency else None,
        "predicted_bound": made["bound"],
        "deploy_s": made["deploy_s"],
        "used": len(plan.devices()),
        "stages": len(plan.stages),
        "mode": plan.mode,
        "plans_seen": len({r["plan"] for r in series.results}),
        "plan": made["plan"],
        "report": made["report"],
    }


def _times(series: Series, baseline: Baseline, alone_s: float) -> dict[str, Any]:
    """Where the time of the requests went; only for one at a time."""
    if series.objective == "throughput":
        return {"breakdown": None, "worker_ratio": None}
    cores = series.rig.cores
    parts = [
        breakdown(r["wall_s"], r["timing"], cores, alone_s, baseline.cores).parts()
        for r in series.results
    ]
    alone = len(cores) == 1
    computed = [sum(t["compute_s"] for t in r["timing"]["tasks"]) for r in series.results]
    ratios = [a / b for a, b in zip(series.baseline_s, computed, strict=True)]
    return {
        "breakdown": middle(parts),
        "worker_ratio": asdict(spread(ratios)) if alone else None,
    }


def _memory(series: Series, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks, for a cluster that had deployed nothing before."""
    if not series.clean or series.objective == "throughput":
        return {"memory": None, "memory_share": None}
    workers = series.rig.workers
    most = max(max(each.install, each.serving) for each in workers)
    report = series.made["report"]
    weights = [d["weights_bytes"] for d in report["devices"]] if report else []
    return {
        "memory": {
            "plain": {"idle": plain["idle"], "peak": plain["peak"]},
            "devices": [asdict(each) for each in workers],
            "weights_most": max(weights, default=None),
        },
        "memory_share": most / max(1, plain["peak"] - plain["idle"]),
    }


def say(text: str) -> None:
    """Progress, to stderr, with the seconds since the start."""
    print(f"{time.monotonic() - _BEGAN:5.0f} s  {text}", file=sys.stderr, flush=True)
