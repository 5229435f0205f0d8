"""The cost of one task on one device: its operations, the bytes it touches, a fixed overhead.

The roofline's two terms (Williams et al. 2009) are added, not maximised: the cautious choice, not
yet held against measurements. Pointwise operators fused into their producer move no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshinfer.cost.profile import DeviceProfile
from meshinfer.geometry import Box
from meshinfer.graph import Graph, Op
from meshinfer.halo import Field, Job
from meshinfer.ops import BARRIER, Boxes, rule_of

GLUED = frozenset(
    (
        "Add BatchNormalization Cast Celu Clip Div Elu Erf Gelu HardSigmoid HardSwish Identity "
        "LeakyRelu Max Min Mish Mul PRelu Pow QLinearAdd QLinearLeakyRelu QLinearMul "
        "QLinearSigmoid QuantizeLinear Relu Selu Sigmoid Softplus Sqrt Sub Sum Tanh"
    ).split()
)
"""Operators that belong to the one before them: fused by onnxruntime, or bound by memory alone."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one task takes, on any device. ``peak_bytes``: most bytes of values held at once."""

    flops: int = 0
    nbytes: int = 0
    peak_bytes: int = 0


def glued_to(graph: Graph, op: Op) -> int:
    """Index of the operator that this one should share a stage with; -1 for none.

    That is the last producer of its inputs, for a pointwise operator and for what dequantises.
    """
    last = max((graph.producer.get(n, -1) for n in (*op.inputs, *op.captured) if n), default=-1)
    if last >= 0 and (op.type in GLUED or graph.ops[last].type == "DequantizeLinear"):
        return last
    return -1


def field_work(graph: Graph, field: Field) -> Work:
    """Operations and bytes of a task's receptive field, recomputed overlap included."""
    flops = nbytes = 0
    made = {job.op.index for job in field.jobs}
    for job in field.jobs:
        flops += flops_of(job.op, job.outs, job.over)
        nbytes += _touched(graph, job, made)
    return Work(flops, nbytes, _peak(graph, field))


def flops_of(op: Op, outs: Boxes, over: Box | None) -> int:
    """Operations for these outputs, or for a part of the reduction."""
    rule = rule_of(op)
    flops = rule.flops(op, outs)
    whole = rule.reduction(op) if over is not None else None
    return flops if over is None or whole is None else flops * over.volume // whole.volume


def _touched(graph: Graph, job: Job, made: set[int]) -> int:
    glue = glued_to(graph, job.op)
    total = 0
    for name, box in zip(job.reads, job.ins, strict=True):
        if name and box is not None and (glue not in made or graph.producer.get(name) != glue):
            total += graph.nbytes(name, box)
    if glue not in made:
        for name, box in zip(job.op.outputs, job.outs, strict=False):
            if name and box is not None:
                total += graph.nbytes(name, box)
    return total


def _peak(graph: Graph, field: Field) -> int:
    """Most bytes of values (not weights) alive at once while the jobs run in order."""
    last: dict[str, int] = {}
    for i, job in enumerate(field.jobs):
        last.update({name: i for name in job.reads if name})
    weights = set(field.weights)
    alive = {name: graph.nbytes(name, field.needs[name]) for name in field.fetches}
    now = peak = sum(alive.values())
    for i, job in enumerate(field.jobs):
        for name, box in zip(job.op.outputs, job.outs, strict=False):
            if name and box is not None and name not in alive:
                alive[name] = graph.nbytes(name, box)
                now += alive[name]
        peak = max(peak, now)
        for name in dict.fromkeys(job.reads):
            if name and last[name] == i and name in alive and name not in weights:
                now -= alive[name] if graph.last_use.get(name, -1) <= job.op.index else 0
    return peak


def seconds(work: Work, profile: DeviceProfile) -> float:
    """Time of one task on this device. Infinite where it cannot compute."""
    if not profile.able:
        return float("inf")
    return (
        work.flops / profile.flops_per_s
        + work.nbytes / profile.copy_bytes_per_s
        + profile.overhead_s
    )


def whole_flops(graph: Graph, op: Op) -> int:
    """Operations of a whole operator; for a barrier, one an element read or made."""
    rule = rule_of(op)
    if rule is BARRIER:
        names = {n for n in (*op.inputs, *op.outputs) if n and graph.shape(n) is not None}
        return sum(graph.whole(name).volume for name in sorted(names))
    return rule.flops(op, tuple(graph.whole(n) if n else None for n in op.outputs))
