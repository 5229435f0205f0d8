"""Rules of means and sums over axes: whole, or as partial sums that are added at the merge.

Sources: the ONNX operators GlobalAveragePool, ReduceMean, ReduceSum and their kin. The box ``over``
spans the reduced axes of the input, in order. A part of a mean is its sum divided by the *whole*
count, so that merging is adding. Maxima have no partial form here: their axes stay whole.

Sums in another order round otherwise, and a difference makes the rounding larger. So there are no
partial sums where onnxruntime's own rounding of such a sum would pass the oracle's tolerance.
Measured (float32, error of a normalisation whose statistics are partial sums): 2e-6 up to 512 x 512
at mean 0 or 1, deviation 1, and 1e-5 from 1023 x 1023; at mean 5, deviation 0.1, 7e-6 at 181 x 181,
1e-5 from 256 x 256 and 2e-5 at 512 x 512. onnxruntime itself is as far from the truth each time.
"""

from __future__ import annotations

from math import prod

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.kernels import filled
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only

_SUMS = ("GlobalAveragePool", "ReduceMean", "ReduceSum")
_FLOATS = ("FLOAT", "DOUBLE")

PARTIAL_ELEMENTS = 1 << 18
"""A mean or sum of more elements is computed whole."""
CENTRING_ELEMENTS = 1 << 15
"""So is a mean that is subtracted from what it is the mean of, if it is of more elements: its
rounding grows by mean / deviation."""


def _axes(op: Op) -> tuple[int, ...]:
    """The reduced axes of the input, ascending."""
    rank = len(op.shape(0))
    if op.type.startswith("Global"):
        return tuple(range(2, rank))
    axes = op.attributes.get("axes")
    if axes is None and op.has(1):
        constant = op.constant(1)
        assert constant is not None
        axes = constant.reshape(-1).tolist()
    if not axes:
        return () if op.attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(int(a) % rank for a in axes))


def _keeps(op: Op) -> bool:
    return op.type.startswith("Global") or bool(op.attributes.get("keepdims", 1))


def _objection(op: Op) -> str:
    if op.has(1) and op.constant(1) is None:
        return "its axes are computed"
    return "it reads a value without elements" if 0 in op.shape(0) else ""


def _align(op: Op, outs: Boxes) -> Boxes:
    """A strict mean of channels adds otherwise where they fill onnxruntime's blocks.

    A variance in one pass is made for the whole batch and all groups at once, where they are of
    no multiple of four elements: onnxruntime adds four at a time, from multiples of 16 bytes."""
    if op.type == "GlobalAveragePool" and op.graph.strict:
        box = only(outs)
        return (box.replace(1, filled(box[1], op.shape(0)[1])),)
    odd = prod(op.shape(0)[axis] for axis in _axes(op)) % 4 != 0
    return (Box.whole(op.out_shape()),) if odd and _most_elements(op) == 0 else outs


def _footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, axes, keeps = only(outs), _axes(op), _keeps(op)
    kept = iter(box.axes)
    ranges = []
    for axis, size in enumerate(op.shape(0)):
        if axis in axes:
            if keeps:
                next(kept)
            ranges.append(Interval(0, size) if over is None else over[axes.index(axis)])
        else:
            ranges.append(next(kept))
    return (Box(tuple(ranges)), *(None for _ in op.inputs[1:]))


def _emit(op: Op, job: Emission, e: Emitter) -> None:
    if job.over is None:
        names = [job.inputs[0]]
        if op.has(1):
            names.append(e.ints(_axes(op)))
        e.copy(op, names, job.outputs)
        return
    axes, keeps = _axes(op), int(_keeps(op))
    divide = op.type != "ReduceSum"
    target = e.fresh("sum") if divide else job.outputs[0]
    if e.opset >= 13:
        names = [job.inputs[0], e.ints(axes)]
        e.node("ReduceSum", names, [target], keepdims=keeps)
    else:
        e.node("ReduceSum", job.inputs[:1], [target], keepdims=keeps, axes=list(axes))
    if divide:
        count = prod(op.shape(0)[a] for a in axes)
        e.node("Div", [target, e.scalar(float(count), op)], job.outputs)


def _reduction(op: Op) -> Box | None:
    dtype = op.graph.dtype(op.inputs[0])
    axes = _axes(op)
    # Partial sums need a floating type wide enough that their order hardly shows.
    if op.type not in _SUMS or not axes or dtype is None or dtype.name not in _FLOATS:
        return None
    over = Box.whole([op.shape(0)[a] for a in axes])
    return over if dtype.name == "DOUBLE" or over.volume <= _most_elements(op) else None


def _most_elements(op: Op) -> int:
    """How many elements partial sums may have in float, by what is done with their sum."""
    key = ("most elements", op.index)
    if key not in op.graph.memo:
        op.graph.memo[key] = _found_elements(op)
    return int(op.graph.memo[key])


def _found_elements(op: Op) -> int:
    x, y = op.inputs[0], op.outputs[0]
    readers = [other for other in op.graph.ops[op.index + 1 :] if y in other.inputs]
    for other in readers:
        squared = other.type == "Mul" and all(name == y for name in other.inputs)
        if squared or (other.type == "Sub" and other.inputs[0] == y):
            return 0  # a variance in one pass: mean of squares less square of mean
    centring = any(other.type == "Sub" and x in other.inputs for other in readers)
    return CENTRING_ELEMENTS if centring else PARTIAL_ELEMENTS


def _split(op: Op) -> tuple[int, ...]:
    axes = _axes(op)
    if _keeps(op):
        return tuple(i for i in range(len(op.shape(0))) if i not in axes)
    return tuple(range(len(op.out_shape())))


def _flops(op: Op, outs: Boxes) -> int:
    read = _footprint(op, outs, None)[0]
    return read.volume if read is not None else 0


REDUCE = Rule(
    footprint=_footprint,
    emit=_emit,
    align=_align,
    objection=_objection,
    split=_split,
    reduction=_reduction,
    flops=_flops,
)

ROWS: dict[str, Rule] = dict.fromkeys(
    (
        *_SUMS,
        "GlobalMaxPool",
        "GlobalLpPool",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceLogSum",
        "ReduceLogSumExp",
    ),
    REDUCE,
)
