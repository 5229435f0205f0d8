"""Rules of normalisations: the axes that share statistics stay whole, all others can be cut.

Sources: the ONNX operators BatchNormalization (inference), InstanceNormalization,
LayerNormalization, LpNormalization, MeanVarianceNormalization, RMSNormalization; Softmax and
LogSoftmax are joint along their axes just so. onnxruntime's basic optimiser makes
LayerNormalization of means and differences. So that rows can be cut too where statistics are over
rows, ``meshinfer.importers.rewrite`` takes InstanceNormalization and GroupNormalization apart.
"""

from __future__ import annotations

from meshinfer.geometry import Box, Interval, hull
from meshinfer.graph import Op
from meshinfer.ops.pointwise import broadcast_box
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only, only_one_output

# --- BatchNormalization ---------------------------------------------------------------------------


def _batch_objection(op: Op) -> str:
    if op.attributes.get("training_mode", 0):
        return "it trains: its statistics are of the whole batch"
    if op.graph.opset < 7 or not op.attributes.get("spatial", 1):
        return "its statistics are not of channels"
    return only_one_output(op)


def _batch_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box = only(outs)
    channel = Box((box[1] if len(box) > 1 else Interval(0, 1),))
    return (box, channel, channel, channel, channel)


def _first_emit(op: Op, job: Emission, e: Emitter) -> None:
    e.copy(op, job.inputs, job.outputs[:1])


BATCH_NORMALIZATION = Rule(footprint=_batch_footprint, emit=_first_emit, objection=_batch_objection)

# --- joint axes -----------------------------------------------------------------------------------


def _joint_axes(op: Op) -> tuple[int, ...]:
    """The axes along which every element of the output depends on all of the input's."""
    rank = len(op.shape(0))
    if op.type == "InstanceNormalization":
        return tuple(range(2, rank))
    if op.type == "MeanVarianceNormalization":
        return tuple(sorted(int(a) % rank for a in op.attributes.get("axes", (0, 2, 3))))
    softmax = op.type in ("Softmax", "LogSoftmax")
    axis = int(op.attributes.get("axis", 1 if softmax and op.graph.opset < 13 else -1)) % rank
    # Before opset 13 Softmax flattened the value to two axes at ``axis``.
    if op.type == "LpNormalization" or (softmax and op.graph.opset >= 13):
        return (axis,)
    return tuple(range(axis, rank))


def _joint_split(op: Op) -> tuple[int, ...]:
    joint = _joint_axes(op)
    return tuple(i for i in range(len(op.shape(0))) if i not in joint)


def _joint_align(op: Op, outs: Boxes) -> Boxes:
    """All outputs are made for the same places; statistics have size 1 along the joint axes."""
    place = hull(box for box in outs if box is not None)
    joint = _joint_axes(op)
    return tuple(
        None
        if box is None
        else Box(
            tuple(
                Interval(0, op.out_shape(position)[i]) if i in joint else place[i]
                for i in range(len(place))
            )
        )
        for position, box in enumerate(outs)
    )


def _data_box(op: Op, outs: Boxes) -> Box:
    place = next(box for box in outs if box is not None)
    joint = _joint_axes(op)
    return Box(
        tuple(Interval(0, size) if i in joint else place[i] for i, size in enumerate(op.shape(0)))
    )


def _joint_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    data = _data_box(op, outs)
    return tuple(
        broadcast_box(op.shape(i), data) if op.has(i) else None for i in range(len(op.inputs))
    )


def _instance_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    data = _data_box(op, outs)
    return (data, Box((data[1],)), Box((data[1],)))


def _joint_emit(op: Op, job: Emission, e: Emitter) -> None:
    names = list(job.outputs)
    names[0] = names[0] or e.fresh("unread")  # statistics alone may be asked for
    while not names[-1]:
        names.pop()
    e.copy(op, job.inputs, names)


JOINT = Rule(
    footprint=_joint_footprint,
    emit=_joint_emit,
    align=_joint_align,
    split=_joint_split,
)
INSTANCE = Rule(
    footprint=_instance_footprint, emit=_joint_emit, align=_joint_align, split=_joint_split
)

ROWS: dict[str, Rule] = {
    "BatchNormalization": BATCH_NORMALIZATION,
    "InstanceNormalization": INSTANCE,
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax"), JOINT),
    **dict.fromkeys(("LpNormalization", "MeanVarianceNormalization"), JOINT),
}
