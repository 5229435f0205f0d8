"""Rules of operators with joint axes: along these each element of the output depends on all of the
input's, so they stay whole, and boxes cut the others.

Sources: the ONNX operators ArgMax, ArgMin, CumSum, Hardmax, ReverseSequence, TopK, Trilu.
"""

from __future__ import annotations

from collections.abc import Callable

from meshinfer.geometry import Interval
from meshinfer.graph import Op
from meshinfer.ops.rule import Boxes, EmitFn, FootprintFn, Rule, copy_node, nothing


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
