"""Coarse costs of candidate blocks: one band walked backwards stands for all bands of a split.

A walk from a cut towards the front meets every block that ends there, so a table of all blocks
costs one walk a cut. What the sampled band computes beyond its share is the overlap of every band.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshinfer.cost import Work, glued_to, op_work
from meshinfer.cost.model import GLUED, job_work
from meshinfer.geometry import Box, Interval
from meshinfer.graph import Graph, Op
from meshinfer.ops import BARRIER, is_random, rule_of
from meshinfer.planner.axes import Axes, Kind
from meshinfer.planner.bands import Cutting, between, cutting, groups_of

HEAVY = frozenset(
    (
        "Conv ConvTranspose ConvInteger QLinearConv Gemm QGemm MatMul MatMulInteger QLinearMatMul "
        "Einsum MatMulIntegerToFloat DynamicQuantizeMatMul MaxPool AveragePool QLinearAveragePool "
        "GlobalAveragePool QLinearGlobalAveragePool GlobalMaxPool LpPool Resize Upsample"
    ).split()
)
"""Operators before which a cut is cheap: nothing is fused across it."""


_INTERPOLATING = ("Resize", "Upsample")
"""Computed in the layout that a convolution before it leaves, and rounded as that one does."""


@dataclass(frozen=True, slots=True)
class Read:
    """A value that a block reads: bytes of all of it, of the sampled band's part, and of what that
    lacks if the value lies in bands of each kind."""

    value: str
    total: int
    need: int
    missing: Mapping[Kind, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One band of a block: its work, recomputation included, and what it reads.

    ``size``, ``inner``: lengths of the axes along which the main output is cut; ``share``: the
    band's of it.
    """

    size: int
    inner: int
    share: float
    work: Work
    reads: tuple[Read, ...]


@dataclass(frozen=True, slots=True)
class Sums:
    """Work of ops ``[0, i)`` computed whole, for every ``i``; its FLOPs; how many are heavy."""

    work: tuple[Work, ...]
    flops: tuple[float, ...]
    heavy: tuple[int, ...]


def sums_of(graph: Graph) -> Sums:
    """Prefix sums over the graph."""
    work, heavy = [Work()], [0]
    for op in graph.ops:
        work.append(work[-1] + op_work(graph, op))
        heavy.append(heavy[-1] + (op.type in HEAVY))
    return Sums(tuple(work), tuple(w.flops for w in work), tuple(heavy))


def clean_cuts(graph: Graph, axes: Axes) -> tuple[int, ...]:
    """Cut points that part no operator from one that onnxruntime fuses with it.

    Kept are those before a heavy operator, around a barrier and where bands stop being bands. In a
    long graph that offers none of these nearby, others are kept too.
    """
    glued, scales = _dequantised(graph), _scales(graph)
    for first, product in scales.items():
        glued.update(range(first + 1, product + 1))
    for op in graph.ops:
        last = -1 if op.index in scales else glued_to(graph, op)
        if last < 0 and op.type in _INTERPOLATING:
            last = graph.producer.get(op.inputs[0], -1)
        if last >= 0 and not _apart(graph, op, graph.ops[last]):
            glued.update(range(last + 1, op.index + 1))
    barrier = [rule_of(op) is BARRIER for op in graph.ops]
    kept = []
    for cut in graph.cut_points:
        if cut in glued:
            continue
        op = graph.ops[cut]
        wanted = op.type in HEAVY or op.type == "DequantizeLinear" or cut in scales
        if wanted or barrier[cut] or barrier[cut - 1] or cut not in axes.follows:
            kept.append(cut)
    return tuple(kept)


def _scales(graph: Graph) -> dict[int, int]:
    """By the index of a multiplication with one constant: the matrix product that reads it.

    onnxruntime takes such a scale into the product (MatMulScaleFusion) and rounds otherwise where
    it stands alone: of an attention's query and key, a cut before the first leaves both inside.
    """
    found: dict[int, int] = {}
    for op in graph.ops:
        for name in op.inputs if op.type == "MatMul" else ():
            made = graph.producer.get(name, -1)
            if made >= 0 and _is_scale(graph, graph.ops[made]):
                found[made] = op.index
    return found


def _is_scale(graph: Graph, op: Op) -> bool:
    if op.type not in ("Mul", "Div") or op.index - glued_to(graph, op) > 12:
        return False
    factors = op.inputs[op.type == "Div" :]
    return any(graph.is_initializer(n) and graph.whole(n).volume == 1 for n in factors)


def _dequantised(graph: Graph) -> set[int]:
    """Cuts where a dequantised value is alive that some operator behind them reads.

    Only quantised values are exchanged: they are a quarter of the bytes, and onnxruntime makes one
    kernel of an operator with the DequantizeLinear before it and the QuantizeLinear behind it.
    """
    last: dict[str, int] = {}
    for op in graph.ops:
        last.update(dict.fromkeys((*op.inputs, *op.captured), op.index))
    return {
        cut
        for op in graph.ops
        if op.type == "DequantizeLinear"
        for cut in range(op.index + 1, last.get(op.outputs[0], 0) + 1)
    }


def _apart(graph: Graph, op: Op, last: Op) -> bool:
    """Whether glue does not hold: far apart, so that it would forbid every cut between."""
    loose = op.type in _INTERPOLATING or op.type in GLUED - {"QuantizeLinear"}
    return loose and op.index - last.index > 12


def middle(kind: Kind, parts: int) -> tuple[float, float, float, float]:
    """The fractions of both axes that a device in the middle gets, of so many equal ones."""
    groups = groups_of(kind, parts)
    return (*_middle(len(groups)), *_middle(groups[len(groups) // 2]))


def _middle(parts: int) -> tuple[float, float]:
    return (0.5, 1.0) if parts == 2 else (0.5 - 0.5 / parts, 0.5 + 0.5 / parts)


def _cell(cut: Cutting, at: tuple[float, float, float, float]) -> tuple[Interval, Interval]:
    return between(cut.size, *at[:2]), between(cut.inner_size, *at[2:])


Cells = dict[tuple[str, int], dict[Kind, Box]]
"""The part of a value that the device in the middle of so many holds, for each kind of split."""


def samples(
    graph: Graph,
    axes: Axes,
    stop: int,
    starts: Sequence[int],
    kind: Kind,
    parts: int,
    cells: Cells,
) -> dict[int, Sample]:
    """A sample for each block ``[start, stop)`` that can be cut this way into ``parts``.

    ``starts`` descend from ``stop``; ``cells`` is filled and reused.
    """
    at = middle(kind, parts)
    needs: dict[str, Box] = {}
    outside: dict[str, None] = {}  # values that are read so far and made before this op
    parts_of: dict[str, Box] = {}  # which part of its sum, for partial sums
    found: dict[int, Sample] = {}
    work = Work()
    main: tuple[int, int, float] = (0, 0, 1.0)
    largest = -1
    wanted = set(starts)
    for op in reversed(graph.ops[min(starts, default=stop) : stop]):
        for name in op.outputs:
            outside.pop(name, None)
        for name in op.outputs:
            if not name or graph.last_use.get(name, -1) < stop:
                continue
            cut = cutting(graph, axes, name, kind, stop)
            if cut is None:
                return found
            outer, inner = _cell(cut, at)
            shard = cut.part(graph, name, outer, inner)
            if shard.over is not None:
                parts_of[name] = shard.over
            needs[name] = needs[name].hull(shard.box) if name in needs else shard.box
            if graph.nbytes(name) > largest:
                largest = graph.nbytes(name)
                share = outer.size * inner.size / (cut.size * cut.inner_size)
                main = (cut.size, cut.inner_size, share)
        if is_random(op):
            return found
        asked = tuple(needs.get(n) if n else None for n in op.outputs)
        if any(box is not None for box in asked):
            rule = rule_of(op)
            over = parts_of.get(op.outputs[0])
            outs = rule.align(op, asked)
            ins = rule.footprint(op, outs, over)
            work += job_work(graph, op, outs, ins, over)
            for name, read in zip((*op.inputs, *op.captured), ins, strict=False):
                if name and read is not None:
                    needs[name] = needs[name].hull(read) if name in needs else read
                    if not graph.is_initializer(name):
                        outside[name] = None
        if op.index in wanted and main[0]:
            reads = _reads(graph, axes, {name: needs[name] for name in outside}, parts, cells)
            found[op.index] = Sample(*main, work, reads)
    return found


def _reads(
    graph: Graph, axes: Axes, needs: Mapping[str, Box], parts: int, cells: Cells
) -> tuple[Read, ...]:
    reads = []
    for value, box in needs.items():
        key = (value, parts)
        if key not in cells:
            cells[key] = _held(graph, axes, value, parts)
        need, volume = graph.nbytes(value, box), box.volume
        missing = dict.fromkeys(axes.kinds(parts), need)
        for kind, held in cells[key].items():
            missing[kind] -= need * _common(held, box) // volume
        reads.append(Read(value, graph.nbytes(value), need, missing))
    return tuple(reads)


def _held(graph: Graph, axes: Axes, value: str, parts: int) -> dict[Kind, Box]:
    found: dict[Kind, Box] = {}
    for kind in axes.kinds(parts):
        axis, inner = axes.of(value, kind), axes.inner(value, kind)
        if axis is not None and (kind != "rows" or value not in axes.sums):
            cut = Cutting(axis, graph.whole(value), inner)
            found[kind] = cut.part(graph, value, *_cell(cut, middle(kind, parts))).box
    return found


def _common(one: Box, other: Box) -> int:
    volume = 1
    for (a, b), (c, d) in zip(one.axes, other.axes, strict=True):
        volume *= max(0, (b if b < d else d) - (a if a > c else c))
    return volume
