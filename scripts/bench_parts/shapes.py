"""The five shapes of a plan on a small device and a server: what is picked against what is best.

Every shape is forced in turn (``plan=``), and measured in the same rounds as what the planner picks
by itself: one picture at a time, and as a stream.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import meshinfer as mi
from bench_parts.child import Broken
from bench_parts.figures import spread
from bench_parts.measure import Answers, Wrong, say
from bench_parts.models import Model, make
from bench_parts.rig import Patience, Rig
from meshinfer.cost import DeviceProfile
from meshinfer.cost.timeline import timeline
from meshinfer.errors import MeshInferError
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.planner import make_plan
from meshinfer.protocol.messages import DeviceInfo
from meshinfer.scheduler.profiles import profile_of

CORES = (0.25, 1.0)
LINKS_MBIT = (5.0, 20.0, 100.0)
MODELS = ("mobilenet_v2", "yolo416")
WITHIN = 1.10
_HEAD = DeviceId("head")
_IN_FLIGHT = 4
_FRAMES = 4
_HOPELESS = 2.5  # times the soonest one's expected time: not worth measuring


@dataclass(slots=True)
class Forced:
    """A plan with what it took. ``expected_s``: of one request, or between two frames."""

    shape: str
    plan: Plan
    expected_s: float
    name: str = ""
    wall_s: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.wall_s)


def shapes(
    folder: Path,
    patience: Patience,
    rounds: int,
    links: Sequence[float] = LINKS_MBIT,
    names: Sequence[str] = MODELS,
) -> Iterator[dict[str, Any]]:
    """A row for each link, model and objective."""
    models = [make(name, folder) for name in names]
    for mbit in links:
        rig = Rig(CORES, mbit * 1e6, folder / f"rig-{mbit:g}", patience, 2.0)
        try:
            for model in models:
                answers = Answers(model)
                rig.load(model, _inputs(model, folder))
                for objective in ("latency", "throughput"):
                    say(f"{model.name}, {mbit:g} Mbit/s, {objective}")
                    row = _measured(rig, model, objective, answers, rounds)
                    yield {"model": model.name, "link_mbit": mbit, "objective": objective, **row}
        finally:
            rig.close()


def _inputs(model: Model, folder: Path) -> list[Path]:
    files = [folder / f"{model.name}-{i}.npz" for i in range(len(model.requests))]
    for path, request in zip(files, model.requests, strict=True):
        np.savez(path, **dict(request.feeds))
    return files


def _measured(
    rig: Rig, model: Model, objective: str, answers: Answers, rounds: int
) -> dict[str, Any]:
    picked = rig.deploy(f"{model.name}-{objective}", model, objective=objective)
    plan = Plan.parse(picked["plan"])
    graph, known = mi.load(str(model.path)), profiles(rig.profiles)
    expected_s = expected(graph, known, objective, plan)
    all_ = [Forced("picked", plan, expected_s, f"{model.name}-{objective}")]
    all_ += _worth(force(graph, known, objective))
    for each in all_[1:]:
        each.name = f"{model.name}-{objective}-{each.shape}"
        plan = replace(each.plan, window=1 if objective == "latency" else _IN_FLIGHT)
        with _apart(each):
            rig.deploy(each.name, model, plan=str(plan), objective=objective)
    for i in range(-1, rounds):
        for each in all_:
            with _apart(each):
                if not each.failed:
                    _once(rig, model, each, objective, answers, i)
    return _row(all_)


@contextlib.contextmanager
def _apart(each: Forced) -> Iterator[None]:
    """What fails in here fails this plan only."""
    try:
        yield
    except (Broken, Wrong, MeshInferError) as error:
        each.failed = f"{type(error).__name__}: {error}"
        say(f"  FAILED: {each.shape}: {each.failed}")


def _once(rig: Rig, model: Model, each: Forced, objective: str, answers: Answers, i: int) -> None:
    """One round; the first, -1, warms up."""
    deadline_s = 0.9 * rig.patience.answer_s
    if objective == "latency":
        which = [i % len(model.requests)]
        found = rig.ask(do="infer", name=each.name, which=which, deadline_s=deadline_s)
        took_s = found[0]["wall_s"]
    elif i < 0:
        return
    else:
        sizes = {"frames": _FRAMES, "around": len(CORES), "in_flight": _IN_FLIGHT}
        told = rig.ask(do="stream", name=each.name, **sizes, deadline_s=deadline_s)
        found, took_s = told["results"], told["frame_s"]
    answers.check(rig.folder, found)
    if i >= 0:
        each.wall_s.append(took_s)


def _row(all_: Sequence[Forced]) -> dict[str, Any]:
    done = [each for each in all_ if each.wall_s and not each.failed]
    picked, others = all_[0], [each for each in done if each.shape != "picked"]
    if not others:
        raise Broken("none of the five shapes could be measured")
    best = min(others, key=lambda each: each.median_s)
    ratio = picked.median_s / best.median_s if picked in done else None
    for each in done:
        took_ms, expected_ms = each.median_s * 1e3, each.expected_s * 1e3
        say(f"  {each.shape:<12} {took_ms:7.0f} ms, expected {expected_ms:.0f}")
    return {
        "picked": shape_of(picked.plan),
        "best": best.shape,
        "ratio": ratio,
        "within": ratio is not None and (ratio <= WITHIN or _same(picked.plan, best.plan)),
        "measured": {
            each.shape: {
                "s": spread(each.wall_s).median if each.wall_s else None,
                "raw_s": each.wall_s,
                "expected_s": each.expected_s,
                "plan": str(each.plan),
                "failed": each.failed,
            }
            for each in all_
        },
    }


def _same(a: Plan, b: Plan) -> bool:
    """Whether two measurements differ by noise alone."""
    return a.stages == b.stages


def said(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row."""
    lines = [
        f"{'model':<14}{'Mbit/s':>7}{'objective':>12}  {'picked':<12}{'best of five':<14}ratio"
    ]
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"{row['model']:<14}{row['link_mbit']:>7g}{row['objective']:>12}  {row['picked']:<12}"
            f"{row['best']:<14}{ratio}{'' if row['within'] else '  MORE THAN 10 % OFF'}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------- plans


def profiles(devices: Sequence[Mapping[str, Any]]) -> list[DeviceProfile]:
    """Of the small device, the server and the head beside the first, as the coordinator has them:
    ``devices`` as the client lists them."""
    found = [msgspec.convert(each, DeviceInfo) for each in devices]
    made = [
        profile_of(d.device, d.facts, d.link, host="near" if d.device == "pi-0" else "far")
        for d in found
        if d.facts.computes
    ]
    near = next(p for p in made if p.host == "near")
    return [*made, replace(near, id=_HEAD, computes=False, host="near")]


def expected(graph: Graph, known: Sequence[DeviceProfile], objective: str, plan: Plan) -> float:
    """Seconds of one request, or between two frames."""
    found = timeline(graph, plan, known)
    return found.total_s if objective == "latency" else found.bottleneck_s


def force(graph: Graph, known: Sequence[DeviceProfile], objective: str) -> list[Forced]:
    """The soonest plan of each shape, as the cost model expects it."""
    near, far = (p.id for p in known if p.computes)

    ends = len(graph.ops)
    split = [whole(graph, (0, cut, near), (cut, ends, far)) for cut in graph.cut_points]
    tiled = make_plan(graph, known, _HEAD, _HEAD, spread=True, objective="latency").plan
    found = [
        ("on-device", [whole(graph, (0, ends, near))]),
        ("offload", [whole(graph, (0, ends, far))]),
        ("split", split),
        ("tiling", [tiled] if shape_of(tiled) == "tiling" else []),
    ]
    if objective == "throughput":
        found.append(("pipeline", [replace(plan, window=_IN_FLIGHT) for plan in split]))
        found[2] = ("split", sorted(split, key=lambda p: timeline(graph, p, known).total_s)[:1])
    takes = partial(expected, graph, known, objective)
    best = [(shape, min(plans, key=takes)) for shape, plans in found if plans]
    return [Forced(shape, plan, takes(plan)) for shape, plan in best]


def whole(graph: Graph, *stages: tuple[int, int, DeviceId]) -> Plan:
    """Each stage (start, stop, device) whole on one device."""
    return Plan(
        graph.digest,
        _HEAD,
        _HEAD,
        tuple(
            Stage(
                start,
                stop,
                (
                    Task(
                        (device,),
                        tuple(Shard(v, graph.whole(v)) for v in graph.live_outputs(start, stop)),
                    ),
                ),
            )
            for start, stop, device in stages
        ),
    )


def shape_of(plan: Plan) -> str:
    """Which of the five a plan is; "whole" for whole requests to whoever is free."""
    devices = plan.devices()
    tasks = [task for stage in plan.stages for task in stage.tasks]
    if any(len(task.devices) > 1 for task in tasks):
        return "whole"
    if len(devices) == 1:
        return "on-device" if devices[0] == "pi-0" else "offload"
    if any(len(stage.tasks) > 1 for stage in plan.stages):
        return "tiling"
    return "pipeline" if plan.window > 1 else "split"


def _worth(found: Sequence[Forced]) -> list[Forced]:
    """Without those that are expected to take many times as long as the soonest."""
    soonest = min(each.expected_s for each in found)
    return [each for each in found if each.expected_s <= _HOPELESS * soonest]
