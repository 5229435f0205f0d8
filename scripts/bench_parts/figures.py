"""The arithmetic of the benchmark: spreads, the bound, where time goes, figures to reach. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GIGABIT, FAST_ETHERNET = 1e9, 100e6


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of repeated measurements, in their unit."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Inclusive quartiles, so that they lie within what was measured."""
    if not values:
        raise ValueError("no measurements")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def frame_s(done: Sequence[float], frames: int, around: int) -> float:
    """Seconds a frame of a stream: between an answer and the one ``frames`` later.

    ``done``: when each answer was there, by one clock. The mean of ``around`` such spans, each
    beginning an answer later, the first after ``around`` answers: with as many as there are
    devices, no device is caught at the beginning of a frame more often than at its end.
    """
    at = sorted(done)
    if len(at) < frames + 2 * around:
        raise ValueError(f"{len(at)} answers are too few for spans of {frames}")
    spans = [at[i + frames] - at[i] for i in range(around - 1, 2 * around - 1)]
    return statistics.fmean(spans) / frames


# ---------------------------------------------------------------------- the bound

BOUND_TEXT = (
    "1/T = c₀/W + min( Σ min(cᵢ/W, lᵢ/I, lᵢ/O), l₀/I, l₀/O ), the sum over the devices other than "
    "the first. W: core-seconds of plain onnxruntime; cᵢ: cores of device i; lᵢ: bytes a second of "
    "its link, each way; I, O: bytes of input and answer. The input lies on device 0 and the "
    "answer is wanted there, so whoever does a share of the work gets that share of the input and "
    "gives that share of the answer over its link and over device 0's; shares are those that are "
    "done soonest; computing and both directions overlap perfectly. Halos, weights, headers and "
    "encryption cost nothing in it."
)


def bound_s(
    alone_s: float,
    cores: Sequence[float],
    reference_cores: float,
    link_bytes_per_s: float,
    input_bytes: int,
    output_bytes: int,
) -> float:
    """Seconds a request, or a frame of a stream, takes at least (``BOUND_TEXT``).

    ``alone_s``: plain onnxruntime's on a device of ``reference_cores``; ``cores``: of each device,
    the source's and sink's first.
    """
    work = alone_s * reference_cores
    moving = link_bytes_per_s / max(input_bytes, output_bytes, 1)
    others = sum(min(each / work, moving) for each in cores[1:])
    return 1.0 / (cores[0] / work + min(others, moving))


TOLERANCE = 1.05
BUSY = 1.15


def doubt(
    speedup: float,
    bound_speedup: float,
    *,
    cpu_s: float,
    had_s: float,
    frame_cpu_s: float = 0.0,
    frame_had_s: float = math.inf,
) -> str:
    """Why a figure cannot be true; "" if nothing speaks against it.

    ``cpu_s``: of the processor that the devices used while it was measured; ``had_s``: what their
    shares of it give in that time. ``frame_cpu_s``: what they used for each frame of a stream,
    from its first to its last; ``frame_had_s``: what they have in the time between two frames.
    """
    if speedup > bound_speedup * TOLERANCE:
        return f"{speedup:.2f} × is more than the bound, {bound_speedup:.2f} ×"
    if cpu_s > had_s * TOLERANCE:
        return f"the devices used {cpu_s:.2f} s of CPU and had {had_s:.2f} s: no quota held them"
    if frame_cpu_s > frame_had_s * TOLERANCE:
        return (
            f"a frame takes {frame_cpu_s * 1e3:.0f} ms of CPU, and the devices have "
            f"{frame_had_s * 1e3:.0f} ms between two of them"
        )
    return ""


# ---------------------------------------------------------------------- where time goes


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Seconds of one request, in parts that add up to what the client saw.

    ``even``: plain onnxruntime's work divided by the cores. ``overhead``: what the devices computed
    on average beyond that (recomputed overlap, kernels of other sizes). ``uneven``: what the
    busiest computed beyond the average. ``named``: what its tasks say of other times (fields of
    TaskTime that end in _s). ``rest``: waiting for pieces, sending, Python. ``queue``: before the
    first task started. ``client``: what the coordinator's clock did not see.
    """

    even: float
    overhead: float
    uneven: float
    named: Mapping[str, float]
    rest: float
    queue: float
    client: float

    def parts(self) -> dict[str, float]:
        """In the order of the bars; they add up to the wall time."""
        return {
            "even share": self.even,
            "overhead": self.overhead,
            "unevenness": self.uneven,
            **self.named,
            "rest": self.rest,
            "queue": self.queue,
            "client": self.client,
        }


def breakdown(
    wall_s: float,
    timing: Mapping[str, Any],
    cores: Mapping[str, float],
    alone_s: float,
    reference_cores: float,
) -> Breakdown:
    """Where one request's time went. ``timing``: the client's, as builtins; ``cores``: by device.

    Compute times are in core-seconds divided by the device's cores, hence seconds on its clock.
    """
    computed = dict.fromkeys(cores, 0.0)
    named: dict[str, dict[str, float]] = {}
    for task in timing["tasks"]:
        device = task["device"]
        computed[device] = computed.get(device, 0.0) + task["compute_s"]
        for name, value in task.items():
            if name.endswith("_s") and name != "compute_s":
                of = named.setdefault(device, {})
                key = name.removesuffix("_s").replace("_", " ")
                of[key] = of.get(key, 0.0) + value
    total_cores = sum(cores.values())
    even = alone_s * reference_cores / total_cores
    mean = sum(s * cores.get(d, reference_cores) for d, s in computed.items()) / total_cores
    busiest = max(computed, key=lambda d: (computed[d], d))
    told = named.get(busiest, {})
    inside = timing["total_s"] - timing["queue_s"]
    return Breakdown(
        even=even,
        overhead=mean - even,
        uneven=computed[busiest] - mean,
        named=told,
        rest=inside - computed[busiest] - sum(told.values()),
        queue=timing["queue_s"],
        client=wall_s - timing["total_s"],
    )


def middle(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each part over the requests; what a request lacks counts as 0."""
    names = dict.fromkeys(name for each in parts for name in each)
    return {n: statistics.median([each.get(n, 0.0) for each in parts]) for n in names}


# ---------------------------------------------------------------------- figures to reach


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of issue 4's table. ``figure``: key of a row; ``aim`` None: the row's bound.

    ``most``: the figure should be at most, not at least, so much.
    """

    what: str
    model: str
    devices: str
    link: float | None
    figure: str
    least: float
    aim: float | None
    objective: str = "latency"
    unit: str = "×"
    most: bool = False


GOALS = (
    Goal("VGG-16, 6 devices, 1 Gbit/s", "vgg16", "6", GIGABIT, "speedup", 4.6, 5.4),
    Goal("YOLOv2-16 608², 6, 1 Gbit/s", "yolo608", "6", GIGABIT, "speedup", 4.4, 5.2),
    Goal("VGG-16, 6, 100 Mbit/s", "vgg16", "6", FAST_ETHERNET, "speedup", 3.6, 4.5),
    Goal("YOLOv2-16 608², 6, 100 Mbit/s", "yolo608", "6", FAST_ETHERNET, "speedup", 2.2, None),
    Goal(
        "YOLOv2-16 608², 6: bytes a frame",
        "yolo608",
        "6",
        None,
        "wire_mb",
        8.5,
        5.0,
        unit="MB",
        most=True,
    ),
    Goal("VGG-16, 2, 1 Gbit/s", "vgg16", "2", GIGABIT, "speedup", 1.85, 1.95),
    Goal("VGG-16, 4, 1 Gbit/s", "vgg16", "4", GIGABIT, "speedup", 3.4, 3.8),
    Goal("ResNet-50, 6, 1 Gbit/s", "resnet50", "6", GIGABIT, "speedup", 3.5, 4.8),
    Goal("MobileNetV2, any number, any link", "mobilenet_v2", "*", None, "speedup", 0.97, 2.0),
    Goal("VGG-16, mixed 1:1:½:¼", "vgg16", "mixed", GIGABIT, "speedup", 2.2, 2.55),
    Goal("throughput, 6 devices", "*", "6", None, "speedup", 5.4, 5.8, objective="throughput"),
    Goal("whole model on one worker (its task)", "*", "1", None, "worker_ratio", 0.97, 1.0),
    Goal(
        "YOLOv2-16 608², 6: memory of plain's",
        "yolo608",
        "6",
        None,
        "memory_share",
        1 / 3,
        None,
        unit="",
        most=True,
    ),
    Goal(
        "predicted against measured",
        "*",
        "*",
        None,
        "predicted_off",
        0.20,
        0.10,
        unit="",
        most=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal held against the rows it is about; the worst of them counts. ``state``: "aim",
    "met", "missed", or "not measured"."""

    goal: Goal
    state: str
    measured: float | None = None
    bound: float | None = None
    row: str = ""


def judge(rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """All goals, in the order of the issue. Plaintext and doubtful rows count for none."""
    return [_verdict(goal, [r for r in rows if _is_about(goal, r)]) for goal in GOALS]


def _is_about(goal: Goal, row: Mapping[str, Any]) -> bool:
    return (
        goal.model in ("*", row["model"])
        and goal.devices in ("*", row["devices"])
        and goal.link in (None, row["link_bits_per_s"])
        and goal.objective == row["objective"]
        and not row["plaintext"]
        and not row.get("doubt")
        and row.get(goal.figure) is not None
    )


def _verdict(goal: Goal, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    if not rows:
        return Verdict(goal, "not measured")
    sign = 1 if goal.most else -1
    row = max(rows, key=lambda r: sign * _value(r, goal.figure))
    value = _value(row, goal.figure)
    bound = row.get("bound_speedup") if goal.figure == "speedup" else None
    aim = goal.aim
    if aim is None and goal.figure == "speedup":
        aim = bound
    if aim is not None and sign * value <= sign * aim:
        state = "aim"
    else:
        state = "met" if sign * value <= sign * goal.least else "missed"
    return Verdict(goal, state, value, bound, row["name"])


def _value(row: Mapping[str, Any], figure: str) -> float:
    value = row[figure]
    return float(value["median"] if isinstance(value, Mapping) else value)
