"""Rules of elementwise operators with ONNX's multidirectional broadcasting, and of channel affines.

Source: ONNX "Broadcasting in ONNX"; BatchNormalization (inference); Softmax and LayerNormalization,
whose axes stay whole (onnxruntime's basic optimiser makes the latter of means and differences).
"""

from __future__ import annotations

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
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


ELEMENTWISE = Rule(footprint=_broadcast, objection=_old)


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


def _norm_objection(op: Op) -> str:
    if op.attributes.get("training_mode", 0) or op.graph.opset < 9:
        return "it trains: its statistics are of the whole batch"
    return only_one_output(op)


def _norm_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box = only(outs)
    channel = Box((box[1] if len(box) > 1 else Interval(0, 1),))
    return (box, channel, channel, channel, channel)


def _norm_emit(op: Op, job: Emission, e: Emitter) -> None:
    e.copy(op, job.inputs, job.outputs[:1])


BATCH_NORMALIZATION = Rule(footprint=_norm_footprint, emit=_norm_emit, objection=_norm_objection)


def _joint_axes(op: Op) -> tuple[int, ...]:
    """The axes along which every element of the output depends on all of the input's."""
    rank = len(op.out_shape())
    layer = op.type == "LayerNormalization"
    default = -1 if layer or op.graph.opset >= 13 else 1
    axis = int(op.attributes.get("axis", default)) % rank
    # Before opset 13 Softmax flattened the value to two axes at ``axis``.
    return (axis,) if not layer and op.graph.opset >= 13 else tuple(range(axis, rank))


def _joint_align(op: Op, outs: Boxes) -> Boxes:
    box = only(outs)
    for axis in _joint_axes(op):
        box = box.replace(axis, Interval(0, op.out_shape()[axis]))
    return (box,)


def _joint_split(op: Op) -> tuple[int, ...]:
    whole = _joint_axes(op)
    return tuple(i for i in range(len(op.out_shape())) if i not in whole)


def _joint_emit(op: Op, job: Emission, e: Emitter) -> None:
    e.copy(op, job.inputs, job.outputs[:1])


JOINT = Rule(
    footprint=_broadcast,
    emit=_joint_emit,
    align=_joint_align,
    objection=only_one_output,
    split=_joint_split,
)

ROWS: dict[str, Rule] = {
    **dict.fromkeys(UNARY, ELEMENTWISE),
    **dict.fromkeys(BROADCASTING, ELEMENTWISE),
    "Dropout": DROPOUT,
    "BatchNormalization": BATCH_NORMALIZATION,
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization"), JOINT),
}
