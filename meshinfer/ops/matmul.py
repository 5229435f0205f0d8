"""Rules of Gemm, MatMul and Einsum: boxes of the product, partial sums over what is summed away.

Sources: the ONNX operators Gemm, MatMul (numpy's matmul with batch broadcasting) and Einsum (each
letter is an axis). A column slice takes just those columns of the weights, so no device needs all
of a fully connected layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx_ir as ir

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.pointwise import broadcast_box
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only


def _gemm_k(op: Op) -> int:
    return op.shape(0)[0 if op.attributes.get("transA", 0) else 1]


def _no_single_row(op: Op, outs: Boxes, rows: Sequence[int]) -> Boxes:
    """In a strict graph, unless the whole has but one row along these axes: MLAS has a kernel for
    one row (SgemmKernelM1), which adds otherwise. Packed weights, of two axes, go without it."""
    box, size = only(outs), op.out_shape()
    packed = op.graph.is_initializer(op.inputs[1]) and len(op.shape(1)) == 2
    several = [axis for axis in rows if size[axis] > 1]
    if packed or not several or not op.graph.strict or any(box[axis].size > 1 for axis in several):
        return outs
    start = min(box[several[-1]].start, size[several[-1]] - 2)
    return (box.replace(several[-1], Interval(start, start + 2)),)


def _gemm_align(op: Op, outs: Boxes) -> Boxes:
    return _no_single_row(op, outs, (0,))


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
    align=_gemm_align,
    emit=_gemm_emit,
    objection=_gemm_objection,
    reduction=_gemm_reduction,
    flops=_gemm_flops,
)


def _matmul_align(op: Op, outs: Boxes) -> Boxes:
    """A matrix on the right makes one product: all axes of the left but the last are its rows."""
    left, right = len(op.shape(0)), len(op.shape(1))
    if left < 2 or right < 2:
        return outs
    last = len(only(outs)) - 2
    return _no_single_row(op, outs, range(last + 1) if right == 2 else (last,))


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
    align=_matmul_align,
    objection=_empty_objection,
    reduction=_matmul_reduction,
    flops=_matmul_flops,
)

# --- Einsum ---------------------------------------------------------------------------------------


def _terms(op: Op) -> tuple[list[str], str]:
    """The letters of each input and of the output."""
    equation = op.attributes["equation"].decode().replace(" ", "")
    left, arrow, out = equation.partition("->")
    if not arrow:  # those that come once, in order of the alphabet
        out = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    return left.split(","), out


def _sizes(op: Op) -> dict[str, int]:
    found: dict[str, int] = {}
    for i, term in enumerate(_terms(op)[0]):
        for letter, size in zip(term, op.shape(i), strict=True):
            found[letter] = max(size, found.get(letter, 0))
    return found


def _summed(op: Op) -> list[str]:
    terms, out = _terms(op)
    return [letter for letter in dict.fromkeys("".join(terms)) if letter not in out]


def _einsum_objection(op: Op) -> str:
    terms, _ = _terms(op)
    if any("." in term for term in terms):
        return "its equation has an ellipsis"
    if any(0 in op.shape(i) for i in range(len(op.inputs))):
        return "it reads values without elements"
    sizes = _sizes(op)
    shapes = [tuple(sizes[letter] for letter in term) for term in terms]
    same = all(shape == op.shape(i) for i, shape in enumerate(shapes))
    return "" if same else "a letter of its equation has two sizes"


def _einsum_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    terms, out = _terms(op)
    ranges = {letter: Interval(0, size) for letter, size in _sizes(op).items()}
    ranges.update(zip(out, only(outs), strict=True))
    if over is not None:
        ranges.update(zip(_summed(op), over, strict=True))
    return tuple(Box(tuple(ranges[letter] for letter in term)) for term in terms)


def _einsum_reduction(op: Op) -> Box | None:
    summed, sizes = _summed(op), _sizes(op)
    return Box.whole([sizes[c] for c in summed]) if summed and _adds_exactly(op) else None


def _einsum_flops(op: Op, outs: Boxes) -> int:
    sizes = _sizes(op)
    return 2 * only(outs).volume * prod(sizes[letter] for letter in _summed(op))


EINSUM = Rule(
    footprint=_einsum_footprint,
    objection=_einsum_objection,
    reduction=_einsum_reduction,
    flops=_einsum_flops,
)
