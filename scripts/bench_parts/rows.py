"""A row of figures from what the rounds of one cluster gave. Pure, but for reading one answer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bench_parts.baseline import Baseline
from bench_parts.figures import BUSY, bound_s, breakdown, doubt, middle, spread
from bench_parts.models import Model
from bench_parts.page import link_name
from bench_parts.rig import Counters, Rig, Setup, WorkerMemory
from meshinfer.plan import Plan


@dataclass(slots=True)
class Series:
    """What the rounds of one setup gave, on these devices of a cluster, or its streams."""

    setup: Setup
    objective: str
    rig: Rig
    members: tuple[int, ...]
    name: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    clean: bool = False
    failed: str = ""
    baseline_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    used: list[tuple[Counters, int]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0
    identical: bool = True
    workers: list[WorkerMemory] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    @property
    def lives(self) -> bool:
        """Whether there is anything to measure still."""
        return not self.failed and not self.rig.broken

    @property
    def cores(self) -> dict[str, float]:
        """By the device's name in the cluster."""
        names = [self.rig.names[i] for i in self.members]
        return dict(zip(names, self.setup.cores, strict=True))

    def add(self, baseline_s: float, latency_s: float, used: Counters, frames: int) -> None:
        """One round."""
        self.baseline_s.append(baseline_s)
        self.latency_s.append(latency_s)
        self.used.append((used, frames))


def failed_row(series: Series, model: Model, why: str) -> dict[str, Any]:
    """What is known of a row that was not measured."""
    return {
        "name": _name(series, model),
        "model": model.name,
        "devices": series.setup.devices,
        "link_bits_per_s": series.setup.link_bits_per_s,
        "objective": series.objective,
        "failed": why,
    }


def _name(series: Series, model: Model) -> str:
    link = link_name(series.setup.link_bits_per_s)
    stream = " · stream" if series.objective == "throughput" else ""
    return f"{model.title} · {series.setup.name} · {link}{stream}"


def row_of(series: Series, model: Model, baseline: Baseline) -> dict[str, Any]:
    """A row as bench.json has it."""
    setup = series.setup
    input_bytes, output_bytes = model.requests[0].nbytes, output_bytes_of(series)
    ratios = [a / b for a, b in zip(series.baseline_s, series.latency_s, strict=True)]
    alone_s = statistics.median(series.baseline_s)
    latency, speedup = spread(series.latency_s), spread(ratios)
    bound = bound_s(
        alone_s, setup.cores, baseline.cores, setup.link_bits_per_s / 8, input_bytes, output_bytes
    )
    short = _name(series, model)
    frames = sum(n for _, n in series.used)
    cpu_s = [sum(used.cpu_s[i] for used, _ in series.used) / frames for i in series.members]
    sent = sum(used.sent_bytes[i] for used, _ in series.used for i in series.members)
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
        "beside": asdict(spread(series.beside)) if series.beside else None,
        "speedup_beside": speedup.median / statistics.median(series.beside)
        if series.beside
        else None,
        "efficiency": speedup.median / ideal,
        "bound_s": bound,
        "bound_speedup": alone_s / bound,
        "input_bytes": input_bytes,
        "output_bytes": output_bytes,
        "payload_mb": _payload_mb(series.results),
        "wire_mb": sent / frames / 1e6,
        "cpu_s": cpu_s,
        "cpu_even_s": alone_s * baseline.cores / len(setup.cores),
        "plain_share": baseline.share,
        "plain_busy": baseline.share * BUSY < 1,
        "doubt": _doubt(series, speedup.median, alone_s / bound, cpu_s),
        "idle_cores": series.rig.idle_cores,
        "profiles": series.rig.profiles,
        "answers": series.answers,
        "wrong": 0,  # a wrong one has ended the run
        "identical": series.identical,
        "degraded": sum(r["degraded"] for r in series.results),
        "retried": sum(r["attempts"] > 1 for r in series.results),
        "raw": {"baseline_s": series.baseline_s, "latency_s": series.latency_s},
        **_planned(series),
        **_times(series, baseline, alone_s),
        **_memory(series, baseline.last),
    }


def _doubt(
    series: Series, speedup: float, bound_speedup: float, frame_cpu_s: Sequence[float]
) -> str:
    total = sum(series.setup.cores)
    stream = series.objective == "throughput"
    return doubt(
        speedup,
        bound_speedup,
        cpu_s=sum(used.cpu_s[i] for used, _ in series.used for i in series.members),
        had_s=total * sum(used.at_s for used, _ in series.used),
        frame_cpu_s=sum(frame_cpu_s) if stream else 0.0,
        frame_had_s=total * statistics.median(series.latency_s),
    )


def _payload_mb(results: Sequence[Mapping[str, Any]]) -> float:
    """Megabytes of tensors that left devices for others, a frame."""
    sent = [sum(t["sent_bytes"] for t in r["timing"]["tasks"]) for r in results]
    return statistics.median(sent) / 1e6


def _planned(series: Series) -> dict[str, Any]:
    """The last plan that answered. What was expected is held against requests under the plan of
    the deployment, not under one that took over as devices turned out faster or slower."""
    made, texts = series.made, series.rig.ask(do="plans")
    last = texts[series.results[-1]["plan"]]
    plan = Plan.parse(last)
    expected = made["expected_s"] or None  # a picture's plan is made when it comes, untold
    under = [
        r["wall_s"] for r in series.results if "wall_s" in r and texts[r["plan"]] == made["plan"]
    ]
    against = statistics.median(under) if under else None
    return {
        "predicted_s": expected,
        "predicted_against_s": against,
        "predicted_off": abs(expected / against - 1) if expected and against else None,
        "predicted_bound": made["bound"],
        "deploy_s": made["deploy_s"],
        "deploy_cpu_s": made["deploy_cpu_s"],
        "used": len(plan.devices()),
        "stages": len(plan.stages),
        "mode": plan.mode,
        "plans_seen": len({r["plan"] for r in series.results}),
        "plan": last,
        "plan_deployed": made["plan"],
        "report": made["report"],
    }


def _times(series: Series, baseline: Baseline, alone_s: float) -> dict[str, Any]:
    """Where the time of the requests went; only for one at a time."""
    if series.objective == "throughput":
        return {"breakdown": None, "compute_s": None, "worker_ratio": None}
    cores = series.cores
    parts = [
        breakdown(r["wall_s"], r["timing"], cores, alone_s, baseline.cores).parts()
        for r in series.results
    ]
    alone = len(cores) == 1
    computed = [sum(t["compute_s"] for t in r["timing"]["tasks"]) for r in series.results]
    ratios = [a / b for a, b in zip(series.baseline_s, computed, strict=True)]
    return {
        "breakdown": middle(parts),
        "compute_s": [
            statistics.median([_computed(r, device) for r in series.results]) for device in cores
        ],
        "worker_ratio": asdict(spread(ratios)) if alone else None,
    }


def _computed(result: Mapping[str, Any], device: str) -> float:
    tasks = result["timing"]["tasks"]
    return sum(float(t["compute_s"]) for t in tasks if t["device"] == device)


def _memory(series: Series, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks, for a cluster that had deployed nothing before."""
    if not series.clean or series.objective == "throughput":
        return {"memory": None, "memory_share": None}
    workers = series.workers
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


def output_bytes_of(series: Series) -> int:
    """Of one answer."""
    outputs = dict(np.load(series.rig.folder / series.results[0]["answer"], allow_pickle=False))
    return sum(int(array.nbytes) for array in outputs.values())
