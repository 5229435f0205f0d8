"""Rules of Gemm and MatMul: boxes of rows and columns of the product, partial sums over K.

Sources: the ONNX operators Gemm and MatMul (numpy's matmul with batch broadcasting). A column slice
takes just those columns of the weights, so no device needs all of a fully connected layer.
"""

from __future__ import annotations

import onnx_ir as ir

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.pointwise import broadcast_box
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only


def _gemm_k(op: Op) -> int:
    return op.shape(0)[0 if op.attributes.get("transA", 0) else 1]


def _gemm_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    rows, cols = only(outs)
    inner = Interval(0, _gemm_k(op)) if over is None else over[0]
    a = Box((inner, rows) if op.attributes.get("transA", 0) else (rows, inner))
    b = Box((cols, inner) if op.attributes.get("transB", 0) else (inner, cols))
    if not op.has(2):
        return (a, b)
    return (a, b, broadcast_box(op.shape(2), only(outs)) if inner.start == 0 else None)


def _gemm_emit(op: Op, job: Emission, e: Emitter) -> None:
    inputs = job.inputs
    if not inputs[-1]:  # C is required before opset 11
        inputs = inputs[:-1] if e.opset >= 11 else (*inputs[:-1], e.scalar(0.0, op))
    e.copy(op, inputs, job.outputs)


def _adds_exactly(op: Op) -> bool:
    """Whether parts of a sum may be rounded to the type of the whole: half precision may not."""
    return op.graph.dtype(op.outputs[0]) not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _gemm_reduction(op: Op) -> Box | None:
    return Box.of((0, _gemm_k(op))) if _adds_exactly(op) else None


def _gemm_flops(op: Op, outs: Boxes) -> int:
    return 2 * only(outs).volume * _gemm_k(op)


def _gemm_objection(op: Op) -> str:
    old = op.graph.opset < 7
    return "before opset 7 broadcasting was an attribute" if old else _empty_objection(op)


def _empty_objection(op: Op) -> str:
    return "it reads values without elements" if 0 in (*op.shape(0), *op.shape(1)) else ""


GEMM = Rule(
    footprint=_gemm_footprint,
    emit=_gemm_emit,
    objection=_gemm_objection,
    reduction=_gemm_reduction,
    flops=_gemm_flops,
)


def _matmul_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    """A vector on the left has no rows, one on the right no columns; nor has the product then."""
    left, right, axes = op.shape(0), op.shape(1), list(only(outs))
    inner = Interval(0, left[-1]) if over is None else over[0]
    cols = [axes.pop()] if len(right) > 1 else []
    rows = [axes.pop()] if len(left) > 1 else []
    a = broadcast_box(left[:-2], Box(tuple(axes)))
    b = broadcast_box(right[:-2], Box(tuple(axes)))
    return (Box((*a, *rows, inner)), Box((*b, inner, *cols)))


def _matmul_reduction(op: Op) -> Box | None:
    return Box.of((0, op.shape(0)[-1])) if _adds_exactly(op) else None


def _matmul_flops(op: Op, outs: Boxes) -> int:
    return 2 * only(outs).volume * op.shape(0)[-1]


MATMUL = Rule(
    footprint=_matmul_footprint,
    objection=_empty_objection,
    reduction=_matmul_reduction,
    flops=_matmul_flops,
)
