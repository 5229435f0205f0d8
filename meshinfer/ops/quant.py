"""Rules of quantised operators: each reads what its float kin reads, and scales and zero points.

Sources: the ONNX operators QuantizeLinear, DequantizeLinear, QLinearConv, ConvInteger,
QLinearMatMul, MatMulInteger, DynamicQuantizeLinear; onnxruntime's QLinear* and their kin (domain
com.microsoft). Sums of integers are exact: those that stay int32 have partial sums, others none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.conv import CONV
from meshinfer.ops.joint import joint
from meshinfer.ops.layout import CONCAT
from meshinfer.ops.matmul import GEMM, MATMUL
from meshinfer.ops.pointwise import ELEMENTWISE, broadcast_box
from meshinfer.ops.pool import POOL
from meshinfer.ops.reduce import REDUCE
from meshinfer.ops.rule import (
    Boxes,
    Emission,
    EmitFn,
    Emitter,
    Rule,
    copy_node,
    no_reduction,
    nothing,
    only,
)

# --- QuantizeLinear, DequantizeLinear -------------------------------------------------------------


def _block(op: Op) -> int:
    """Elements that share a scale along ``axis``; 0 when a scale is not for a block (opset 21)."""
    return int(op.attributes.get("block_size", 0))


def _axis(op: Op) -> int:
    return int(op.attributes.get("axis", 1)) % len(op.shape(0))


def _parameter(op: Op, position: int, out: Box, axis: int) -> Box:
    """The box of a scale or zero point: of one element, one for each slice, or broadcasting."""
    shape = op.shape(position)
    if prod(shape) == 1:
        return Box.whole(shape)
    return Box((out[axis],)) if len(shape) == 1 else broadcast_box(shape, out)


def _linear_objection(op: Op) -> str:
    for name in (*op.inputs, *op.outputs):
        dtype = op.graph.dtype(name) if name else None
        if dtype is not None and (dtype.name.startswith("FLOAT8") or dtype.itemsize < 1):
            return f"numpy has no {dtype.name}, so that it cannot be cut"
    return ""


def _linear_align(op: Op, outs: Boxes) -> Boxes:
    box, block = only(outs), _block(op)
    if not block:
        return (box,)
    axis = _axis(op)
    start, stop = box[axis].start // block * block, -(-box[axis].stop // block) * block
    return (box.replace(axis, Interval(start, min(stop, op.out_shape()[axis]))),)


def _linear_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, block = only(outs), _block(op)
    found: list[Box | None] = [box]
    for position in range(1, len(op.inputs)):  # a scale of one element and its zero point: any rank
        axis = _axis(op)
        if not op.has(position):
            found.append(None)
        elif block:
            blocks = Interval(box[axis].start // block, -(-box[axis].stop // block))
            found.append(box.replace(axis, blocks))
        else:
            found.append(_parameter(op, position, box, axis))
    return tuple(found)


def _linear_emit(op: Op, job: Emission, e: Emitter) -> None:
    names = [name for name in job.inputs if name]
    if _needs_point(op):
        names.append(e.scalar(0, op))
    e.copy(op, names, job.outputs)


def _needs_point(op: Op) -> bool:
    """Whether onnxruntime would go wrong on a crop behind this node.

    It puts a QuantizeLinear with the same inputs behind a Slice of what DequantizeLinear makes
    (QDQPropagation); before opset 21 one without a zero point makes uint8, and negative values are
    lost.
    """
    signed = op.graph.numpy_dtype(op.inputs[0]).kind == "i"
    alone = op.type == "DequantizeLinear" and not op.has(2) and prod(op.shape(1)) == 1
    return alone and signed and op.graph.opset < 21


LINEAR = Rule(
    footprint=_linear_footprint,
    emit=_linear_emit,
    align=_linear_align,
    objection=_linear_objection,
)

# --- operators that are a float operator over quantised values ------------------------------------

Positions = tuple[int, ...]


def _plain(op: Op, op_type: str, data: Positions) -> Op:
    """The same node as its float kin: only the data inputs, without scales and zero points."""
    names = tuple(op.inputs[i] if op.has(i) else "" for i in data)
    while names and not names[-1]:
        names = names[:-1]
    return replace(op, type=op_type, inputs=names)


def quantised(
    kin: Rule,
    op_type: str,
    data: Positions | Callable[[Op], Positions],
    *,
    along: Mapping[int, int] | None = None,
    emit: EmitFn = copy_node,
    exact: bool = False,
    objection: Callable[[Op], str] = nothing,
) -> Rule:
    """The rule of an operator that reads what ``kin``, the rule of ``op_type``, reads.

    ``data``: positions of the inputs that ``kin`` knows; the others are scales and zero points.
    ``along``: position of a parameter -> axis of the output that it may run along. ``exact``: its
    sums are integers, so that parts of them may be added. ``emit`` is given the plain node.
    """

    def positions(op: Op) -> Positions:
        return data(op) if callable(data) else data

    def plain(op: Op) -> Op:
        return _plain(op, op_type, positions(op))

    def footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
        read = dict(zip(positions(op), kin.footprint(plain(op), outs, over), strict=False))
        return tuple(
            None
            if not op.has(i)
            else read.get(i)
            if i in positions(op)
            else _parameter(op, i, only(outs), (along or {}).get(i, 0))
            for i in range(len(op.inputs))
        )

    def emit_plain(op: Op, job: Emission, e: Emitter) -> None:
        emit(plain(op), job, e)

    return Rule(
        footprint=footprint,
        emit=emit_plain,
        align=lambda op, outs: kin.align(plain(op), outs),
        objection=lambda op: objection(op) or kin.objection(plain(op)),
        split=lambda op: kin.split(plain(op)),
        reduction=(lambda op: kin.reduction(plain(op))) if exact else no_reduction,
        flops=lambda op, outs: kin.flops(plain(op), outs),
    )


def _channels_last(op: Op) -> str:
    return "its channels are the last axis" if op.attributes.get("channels_last", 0) else ""


CONV_INTEGER = quantised(CONV, "Conv", (0, 1), along={3: 1}, emit=CONV.emit, exact=True)
QLINEAR_CONV = quantised(
    CONV, "Conv", (0, 3, 8), along={4: 1, 5: 1}, emit=CONV.emit, objection=_channels_last
)


def _vector(first: int, second: int) -> Callable[[Op], str]:
    """The parameters of rows and columns would lie along axes that a vector's product lacks."""

    def objection(op: Op) -> str:
        least = min(len(op.shape(first)), len(op.shape(second)))
        return "" if least >= 2 else "it multiplies a vector"

    return objection


MATMUL_INTEGER = quantised(
    MATMUL, "MatMul", (0, 1), along={2: -2, 3: -1}, exact=True, objection=_vector(0, 1)
)
QLINEAR_MATMUL = quantised(
    MATMUL, "MatMul", (0, 3), along={1: -2, 2: -2, 4: -1, 5: -1}, objection=_vector(0, 3)
)
QGEMM = quantised(GEMM, "Gemm", (0, 3, 6), along={4: 1, 5: 1})
MATMUL_INTEGER_TO_FLOAT = quantised(
    MATMUL,
    "MatMul",
    (0, 1),
    along={2: -2, 3: -1, 4: -2, 5: -1, 6: -1},
    objection=_vector(0, 1),
)
UNARY = quantised(ELEMENTWISE, "Sigmoid", (0,))
BINARY = quantised(ELEMENTWISE, "Add", (0, 3))
WHERE = quantised(ELEMENTWISE, "Where", (0, 1, 4))
AVERAGE_POOL = quantised(POOL, "AveragePool", (0,), emit=POOL.emit, objection=_channels_last)
GLOBAL_AVERAGE_POOL = quantised(REDUCE, "GlobalAveragePool", (0,), objection=_channels_last)

# --- QLinearConcat: the output's scale and zero point, then three inputs for each value -----------


def _concatenated(op: Op) -> Positions:
    return tuple(range(2, len(op.inputs), 3))


_CONCAT = quantised(CONCAT, "Concat", _concatenated)


def _concat_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    boxes = _CONCAT.footprint(op, outs, over)
    kept = {i + k for i in _concatenated(op) if boxes[i] is not None for k in range(3)} | {0, 1}
    return tuple(box if i in kept else None for i, box in enumerate(boxes))


def _concat_emit(op: Op, job: Emission, e: Emitter) -> None:
    names = list(job.inputs[:2])
    for i in _concatenated(op):
        if job.inputs[i]:
            names += job.inputs[i : i + 3]
    e.copy(op, names, job.outputs)


QLINEAR_CONCAT = replace(_CONCAT, footprint=_concat_footprint, emit=_concat_emit)

# --- QLinearSoftmax, DynamicQuantizeMatMul, DynamicQuantizeLinear ---------------------------------


def _softmax_axes(op: Op) -> tuple[int, ...]:
    rank = len(op.shape(0))
    axis = int(op.attributes.get("axis", -1)) % rank
    return (axis,) if int(op.attributes.get("opset", 1)) >= 13 else tuple(range(axis, rank))


def _softmax_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    return (only(outs), *(op.graph.whole(n) if n else None for n in op.inputs[1:]))


QLINEAR_SOFTMAX = joint(_softmax_axes, _softmax_footprint)


def _columns_align(op: Op, outs: Boxes) -> Boxes:
    """All rows: what is quantised on the way is scaled by the smallest and largest of them all."""
    shape = op.out_shape()
    return (Box((*Box.whole(shape[:-1]), only(outs)[-1])),)


_DYNAMIC = quantised(MATMUL, "MatMul", (0, 1), along={2: -1, 3: -1, 4: -1})
DYNAMIC_QUANTIZE_MATMUL = replace(
    _DYNAMIC, align=_columns_align, split=lambda op: (len(op.out_shape()) - 1,)
)


def _of_the_whole(op: Op) -> str:
    return "its scale is that of the smallest and the largest element of all"


DYNAMIC_QUANTIZE_LINEAR = Rule(
    footprint=lambda op, outs, over: (op.graph.whole(op.inputs[0]),), objection=_of_the_whole
)

ROWS: dict[str, Rule] = {
    "QuantizeLinear": LINEAR,
    "DequantizeLinear": LINEAR,
    "DynamicQuantizeLinear": DYNAMIC_QUANTIZE_LINEAR,
    "ConvInteger": CONV_INTEGER,
    "QLinearConv": QLINEAR_CONV,
    "MatMulInteger": MATMUL_INTEGER,
    "QLinearMatMul": QLINEAR_MATMUL,
    "com.microsoft:QuantizeLinear": LINEAR,
    "com.microsoft:DequantizeLinear": LINEAR,
    "com.microsoft:QGemm": QGEMM,
    "com.microsoft:MatMulIntegerToFloat": MATMUL_INTEGER_TO_FLOAT,
    "com.microsoft:DynamicQuantizeMatMul": DYNAMIC_QUANTIZE_MATMUL,
    "com.microsoft:QLinearAdd": BINARY,
    "com.microsoft:QLinearMul": BINARY,
    "com.microsoft:QLinearSigmoid": UNARY,
    "com.microsoft:QLinearLeakyRelu": UNARY,
    "com.microsoft:QLinearWhere": WHERE,
    "com.microsoft:QLinearAveragePool": AVERAGE_POOL,
    "com.microsoft:QLinearGlobalAveragePool": GLOBAL_AVERAGE_POOL,
    "com.microsoft:QLinearConcat": QLINEAR_CONCAT,
    "com.microsoft:QLinearSoftmax": QLINEAR_SOFTMAX,
}
