"""The cost of one task on one device: operations by kind, bytes, kernels, a fixed overhead.

The roofline's two terms (Williams et al. 2009) are added, not maximised: so they fit single kernels
of ResNet-50 and MobileNetV2 within a few per cent. Pointwise operators that are fused into their
producer move no bytes. ``scripts/bench_profile`` holds predictions against measurements.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import mul

from meshinfer.cost.kinds import OpKind, kind_of
from meshinfer.cost.profile import DeviceProfile
from meshinfer.cost.work import BYTES, KERNELS, NOTHING, Work, work_of
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
_VIEWS = frozenset("Dropout Flatten Identity Reshape Squeeze Unsqueeze".split())
"""Operators that give their input another shape without moving it."""
_BLOCKED_RANK = 4


def glued_to(graph: Graph, op: Op) -> int:
    """Index of the operator that this one should share a stage with; -1 for none.

    That is the last producer of its inputs, for a pointwise operator and for what dequantises.
    """
    last = max((graph.producer.get(n, -1) for n in (*op.inputs, *op.captured) if n), default=-1)
    if last >= 0 and (op.type in GLUED or graph.ops[last].type == "DequantizeLinear"):
        return last
    return -1


def field_work(graph: Graph, field: Field) -> Work:
    """Work of a task's receptive field, recomputed overlap and what crosses its edge included."""
    total = [0.0] * len(NOTHING)
    made = {job.op.index for job in field.jobs}
    for job in field.jobs:
        kind = kind_of(job.op)
        total[kind] += flops_of(job.op, job.outs, job.over)
        total[BYTES] += touched(graph, job.op, job.outs, job.ins, made) + _cropped(
            graph, job, field
        )
        total[KERNELS] += glued_to(graph, job.op) not in made
    total[BYTES] += edge_bytes(_crossing(graph, field))
    return Work(tuple(total), _peak(graph, field))


def op_work(graph: Graph, op: Op) -> Work:
    """Work of a whole operator, its producer in the same stage."""
    outs = tuple(graph.whole(n) if n else None for n in op.outputs)
    ins = tuple(graph.whole(n) if n else None for n in (*op.inputs, *op.captured))
    return job_work(graph, op, outs, ins, None)


def job_work(graph: Graph, op: Op, outs: Boxes, ins: Boxes, over: Box | None) -> Work:
    """Work of an operator for these boxes, its producer in the same stage."""
    flops = whole_flops(graph, op) if rule_of(op) is BARRIER else flops_of(op, outs, over)
    glue = glued_to(graph, op)
    nbytes = touched(graph, op, outs, ins, {glue} if glue >= 0 else frozenset())
    return work_of(kind_of(op), flops, nbytes, kernels=float(glue < 0))


def edge_bytes(nbytes: float) -> float:
    """Bytes moved for values that cross the edge of a stage: read and written once more.

    onnxruntime puts them into its blocked layout and back; measured 4 to 7 % of a stage of
    ResNet-50. Receiving and sending cost their own.
    """
    return 2.0 * nbytes


def _crossing(graph: Graph, field: Field) -> int:
    """Bytes of pictures (4-D values) that come into a task's field or leave it."""
    total = sum(
        graph.nbytes(name, field.needs[name])
        for name in field.fetches
        if len(field.needs[name]) == _BLOCKED_RANK
    )
    last = {name: job.op.index for job in field.jobs for name in job.reads if name}
    for job in field.jobs:
        for name, box in zip(job.op.outputs, job.outs, strict=False):
            leaves = name and (name not in last or graph.last_use.get(name, -1) > last[name])
            if leaves and box is not None and len(box) == _BLOCKED_RANK:
                total += graph.nbytes(name, box)
    return total


def _cropped(graph: Graph, job: Job, field: Field) -> int:
    """Bytes that are copied because an operator reads a part of what is held."""
    return sum(
        2 * graph.nbytes(name, box)
        for name, box in zip(job.reads, job.ins, strict=True)
        if name and box is not None and not graph.is_initializer(name) and field.needs[name] != box
    )


def flops_of(op: Op, outs: Boxes, over: Box | None) -> int:
    """Operations for these outputs, or for a part of the reduction."""
    rule = rule_of(op)
    flops = rule.flops(op, outs)
    whole = rule.reduction(op) if over is not None else None
    return flops if over is None or whole is None else flops * over.volume // whole.volume


def touched(graph: Graph, op: Op, outs: Boxes, ins: Boxes, made: Collection[int]) -> int:
    """Bytes that an operator reads and writes; ``made``: the operators in its stage.

    What is glued to its producer reads only its other inputs, and a view nothing. The weights of a
    product with a vector are in the rate of its kind.
    """
    if op.type in _VIEWS:
        return 0
    glue = glued_to(graph, op)
    skips = kind_of(op) == OpKind.VECTOR
    total = 0
    for name, box in zip((*op.inputs, *op.captured), ins, strict=False):
        if not name or box is None or (skips and graph.is_initializer(name)):
            continue
        if glue not in made or graph.producer.get(name) != glue:
            total += graph.nbytes(name, box)
    if glue not in made:
        for name, box in zip(op.outputs, outs, strict=False):
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
    return variable_seconds(work, profile.unit_costs) + profile.overhead_s


def variable_seconds(work: Work, unit_costs: tuple[float, ...]) -> float:
    """``seconds`` without the fixed cost of a task: linear in the work."""
    total: float = sum(map(mul, work.amounts, unit_costs))
    return total


def whole_flops(graph: Graph, op: Op) -> int:
    """Operations of a whole operator; for a barrier, one an element read or made."""
    rule = rule_of(op)
    if rule is BARRIER:
        names = {n for n in (*op.inputs, *op.outputs) if n and graph.shape(n) is not None}
        return sum(graph.whole(name).volume for name in sorted(names))
    return rule.flops(op, tuple(graph.whole(n) if n else None for n in op.outputs))
