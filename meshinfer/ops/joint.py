"""Rules of operators with joint axes: along these each element of the output depends on all of the
input's, so they stay whole, and boxes cut the others.

Sources: the ONNX operators ArgMax, ArgMin, CumSum, Hardmax, OneHot, ReverseSequence, TopK.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from meshinfer.geometry import Box, Interval, hull
from meshinfer.graph import Op
from meshinfer.ops.rule import Boxes, EmitFn, FootprintFn, Rule, copy_node, nothing, only


def joint(
    axes: Callable[[Op], tuple[int, ...]],
    footprint: FootprintFn,
    *,
    emit: EmitFn = copy_node,
    objection: Callable[[Op], str] = nothing,
) -> Rule:
    """A rule whose outputs keep ``axes`` whole; all outputs have the same shape."""

    def align(op: Op, outs: Boxes) -> Boxes:
        found = []
        for box in outs:
            for axis in axes(op) if box is not None else ():
                assert box is not None
                box = box.replace(axis, Interval(0, op.out_shape()[axis]))
            found.append(box)
        return tuple(found)

    def split(op: Op) -> tuple[int, ...]:
        return tuple(i for i in range(len(op.out_shape())) if i not in axes(op))

    return Rule(footprint=footprint, emit=emit, align=align, objection=objection, split=split)


# --- CumSum, Hardmax, ReverseSequence -------------------------------------------------------------


def _along(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    """The same box of the first input; of what else there is (an axis, a count), all."""
    return (only(outs), *(op.graph.whole(n) if n else None for n in op.inputs[1:]))


def _cumsum_axes(op: Op) -> tuple[int, ...]:
    axis = op.constant(1)
    assert axis is not None
    return (int(axis.reshape(-1)[0]) % len(op.shape(0)),)


CUMSUM = joint(
    _cumsum_axes,
    _along,
    objection=lambda op: "" if op.constant(1) is not None else "its axis is computed",
)


def _hardmax_axes(op: Op) -> tuple[int, ...]:
    rank, new = len(op.shape(0)), op.graph.opset >= 13
    axis = int(op.attributes.get("axis", -1 if new else 1)) % rank
    return (axis,) if new else tuple(range(axis, rank))  # it flattened the value to two axes


HARDMAX = joint(_hardmax_axes, _along)


def _sequence_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box = only(outs)
    return (box, Box((box[int(op.attributes.get("batch_axis", 1))],)))


REVERSE_SEQUENCE = joint(lambda op: (int(op.attributes.get("time_axis", 0)),), _sequence_footprint)

# --- ArgMax, ArgMin, TopK, OneHot: the axis is another one in the output --------------------------


def _arg_axis(op: Op) -> int:
    return int(op.attributes.get("axis", 0)) % len(op.shape(0))


def _arg_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    axes, axis = list(only(outs).axes), _arg_axis(op)
    if op.attributes.get("keepdims", 1):
        del axes[axis]
    axes.insert(axis, Interval(0, op.shape(0)[axis]))
    return (Box(tuple(axes)),)


ARG = joint(lambda op: (_arg_axis(op),) if op.attributes.get("keepdims", 1) else (), _arg_footprint)


def _top_axis(op: Op) -> int:
    return int(op.attributes.get("axis", -1)) % len(op.shape(0))


def _top_align(op: Op, outs: Boxes) -> Boxes:
    """Values and their indices, always both, of every place that is asked for."""
    axis = _top_axis(op)
    box = hull(b for b in outs if b is not None)
    box = box.replace(axis, Interval(0, op.out_shape()[axis]))
    return (box, box)


def _top_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    axis = _top_axis(op)
    return _along(op, (only(outs).replace(axis, Interval(0, op.shape(0)[axis])),), over)


TOP_K = replace(joint(lambda op: (_top_axis(op),), _top_footprint), align=_top_align)


def _hot_axis(op: Op) -> int:
    return int(op.attributes.get("axis", -1)) % len(op.out_shape())


def _hot_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    axes = list(only(outs).axes)
    del axes[_hot_axis(op)]
    return _along(op, (Box(tuple(axes)),), over)


ONE_HOT = joint(lambda op: (_hot_axis(op),), _hot_footprint)

ROWS: dict[str, Rule] = {
    "CumSum": CUMSUM,
    "Hardmax": HARDMAX,
    "ReverseSequence": REVERSE_SEQUENCE,
    "ArgMax": ARG,
    "ArgMin": ARG,
    "TopK": TOP_K,
    "OneHot": ONE_HOT,
}
