"""Rules of elementwise operators with ONNX's multidirectional broadcasting.

Source: ONNX "Broadcasting in ONNX".
"""

from __future__ import annotations

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.kernels import reordered
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only, only_one_output

UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor "
    "Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu "
    "Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu"
).split()
BROADCASTING = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Clip Div Equal Greater GreaterOrEqual Less "
    "LessOrEqual Max Mean Min Mod Mul Or Pow PRelu Sub Sum Where Xor"
).split()


def broadcast_box(shape: tuple[int, ...], out: Box) -> Box:
    """The box of an input of this shape that a box of the broadcast output reads."""
    tail = out.axes[len(out) - len(shape) :]
    return Box(
        tuple(Interval(0, 1) if size == 1 else axis for size, axis in zip(shape, tail, strict=True))
    )


def _old(op: Op) -> str:
    return "" if op.graph.opset >= 7 else "before opset 7 broadcasting was an attribute"


def _broadcast(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box = only(outs)
    return tuple(
        broadcast_box(op.shape(i), box) if op.has(i) else None for i in range(len(op.inputs))
    )


def _in_one_kernel(op: Op, outs: Boxes) -> Boxes:
    if op.graph.strict and op.outputs[0] in op.graph.sums:
        return (reordered(only(outs), op.out_shape()[1]),)
    return outs


ELEMENTWISE = Rule(footprint=_broadcast, align=_in_one_kernel, objection=_old)
ALONE = Rule(footprint=_broadcast)
"""Of one input, so that no opset has another broadcasting for it."""


def _dropout_objection(op: Op) -> str:
    training = op.constant(2)
    quiet = not op.has(2) or (training is not None and not bool(training))
    if not quiet or op.graph.opset < 7:
        return "it drops elements at random"
    return only_one_output(op)


def _dropout_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    return (only(outs), *(None for _ in op.inputs[1:]))


def _dropout_emit(op: Op, job: Emission, e: Emitter) -> None:
    e.node("Identity", job.inputs[:1], job.outputs[:1])


DROPOUT = Rule(footprint=_dropout_footprint, emit=_dropout_emit, objection=_dropout_objection)


ROWS: dict[str, Rule] = {
    **dict.fromkeys(UNARY, ALONE),
    **dict.fromkeys(BROADCASTING, ELEMENTWISE),
    "Dropout": DROPOUT,
}
