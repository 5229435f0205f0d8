"""Rules of operators that pick, repeat, mask or place elements by index.

Sources: the ONNX operators Gather, GatherElements, GatherND, ScatterElements, ScatterND, Expand,
Tile, Trilu. An axis that indices point into stays whole; constant indices tell how much of it is
read. All other axes are cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.joint import joint
from meshinfer.ops.pointwise import broadcast_box
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only

Array = np.ndarray[Any, Any]


def _axis(op: Op) -> int:
    return int(op.attributes.get("axis", 0)) % len(op.shape(0))


def _whole(op: Op, position: int) -> Box | None:
    return op.graph.whole(op.inputs[position]) if op.has(position) else None


# --- Gather ---------------------------------------------------------------------------------------


def _picked(op: Op, box: Box) -> Array | None:
    """The constant indices behind a box of the output, none negative; None when computed."""
    indices = op.constant(1)
    if indices is None:
        return None
    indices = np.where(indices < 0, indices + op.shape(0)[_axis(op)], indices)
    part = _of_indices(op, box)
    picked: Array = indices[part.within(Box.whole(indices.shape))]
    return picked


def _of_indices(op: Op, box: Box) -> Box:
    axis = _axis(op)
    return Box(box.axes[axis : axis + len(op.shape(1))])


def _gather_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, axis, size = only(outs), _axis(op), op.shape(0)[_axis(op)]
    before, after = box.axes[:axis], box.axes[axis + len(op.shape(1)) :]
    picked = _picked(op, box)
    if picked is None:
        return (Box((*before, Interval(0, size), *after)), _of_indices(op, box))
    read = Interval(int(picked.min()), int(picked.max()) + 1)
    return (Box((*before, read, *after)), None)


def _gather_emit(op: Op, job: Emission, e: Emitter) -> None:
    box, data, axis = only(job.outs), job.ins[0], _axis(op)
    assert data is not None
    picked = _picked(op, box)
    if picked is None:
        e.copy(op, job.inputs, job.outputs)
        return
    flat = e.ints([int(i) - data[axis].start for i in picked.reshape(-1)])
    target = job.outputs[0] if picked.ndim == 1 else e.fresh("picked")
    e.node("Gather", [job.inputs[0], flat], [target], axis=axis)
    if picked.ndim != 1:
        e.node("Reshape", [target, e.ints(box.shape)], job.outputs)


def _gather_objection(op: Op) -> str:
    indices = op.constant(1)
    if indices is None:
        return ""
    size = op.shape(0)[_axis(op)]
    inside = bool(((indices >= -size) & (indices < size)).all())
    return "" if inside else "an index of it lies outside its axis"


GATHER = Rule(footprint=_gather_footprint, emit=_gather_emit, objection=_gather_objection)


def _elements_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, axis = only(outs), _axis(op)
    return (box.replace(axis, Interval(0, op.shape(0)[axis])), box)


GATHER_ELEMENTS = Rule(footprint=_elements_footprint)


def _nd_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, data, indices = only(outs), op.shape(0), op.shape(1)
    batch, depth = int(op.attributes.get("batch_dims", 0)), indices[-1]
    pointed = Box.whole(data[batch : batch + depth])
    tail = box.axes[len(indices) - 1 :]
    places = Box((*box.axes[: len(indices) - 1], Interval(0, depth)))
    return (Box((*box.axes[:batch], *pointed, *tail)), places)


GATHER_ND = Rule(footprint=_nd_footprint)

# --- ScatterElements, ScatterND -------------------------------------------------------------------


def _scatter_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, axis, shape = only(outs), _axis(op), op.shape(1)
    changed = box.replace(axis, Interval(0, shape[axis])).intersect(Box.whole(shape))
    return (box, None, None) if changed.empty else (box, changed, changed)


def _scatter_emit(op: Op, job: Emission, e: Emitter) -> None:
    if job.inputs[1]:
        e.copy(op, job.inputs, job.outputs)
    else:  # the updates are smaller than the value and end before this box
        e.node("Identity", job.inputs[:1], job.outputs)


SCATTER_ELEMENTS = joint(lambda op: (_axis(op),), _scatter_footprint, emit=_scatter_emit)


def _pointed(op: Op) -> tuple[int, ...]:
    """The leading axes, which the indices of ScatterND point into."""
    return tuple(range(op.shape(1)[-1]))


def _scatter_nd_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, indices = only(outs), op.shape(1)
    updates = Box((*Box.whole(indices[:-1]), *box.axes[indices[-1] :]))
    return (box, _whole(op, 1), updates)


SCATTER_ND = joint(_pointed, _scatter_nd_footprint)

# --- Expand, Tile ---------------------------------------------------------------------------------


def _expand_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    return (broadcast_box(op.shape(0), only(outs)), None)


def _expand_emit(op: Op, job: Emission, e: Emitter) -> None:
    e.node("Expand", [job.inputs[0], e.ints(only(job.outs).shape)], job.outputs)


EXPAND = Rule(footprint=_expand_footprint, emit=_expand_emit)


def _tile_align(op: Op, outs: Boxes) -> Boxes:
    """Inside one copy any range; across copies, whole copies."""
    box = only(outs)
    for axis, (wanted, size) in enumerate(zip(box, op.shape(0), strict=True)):
        first, last = wanted.start // size, (wanted.stop - 1) // size
        if first != last:
            box = box.replace(axis, Interval(first * size, (last + 1) * size))
    return (box,)


def _tile_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    axes = []
    for wanted, size in zip(only(outs), op.shape(0), strict=True):
        moved = wanted.shift(-(wanted.start // size * size))
        axes.append(Interval(moved.start, min(moved.stop, size)))
    return (Box(tuple(axes)), None)


def _tile_emit(op: Op, job: Emission, e: Emitter) -> None:
    read = job.ins[0]
    assert read is not None
    repeats = [out.size // r.size for out, r in zip(only(job.outs), read, strict=True)]
    e.node("Tile", [job.inputs[0], e.ints(repeats)], job.outputs)


def _tile_objection(op: Op) -> str:
    return "" if op.graph.opset >= 6 else "before opset 6 it tiled one axis"


TILE = Rule(
    footprint=_tile_footprint, emit=_tile_emit, align=_tile_align, objection=_tile_objection
)

# --- Trilu ----------------------------------------------------------------------------------------


def _trilu_emit(op: Op, job: Emission, e: Emitter) -> None:
    box, diagonal = only(job.outs), op.constant(1)
    shift = 0 if diagonal is None else int(diagonal.reshape(-1)[0])
    # The same diagonal, counted from this box's corner.
    shift += box[-2].start - box[-1].start
    e.copy(op, [job.inputs[0], e.ints([shift])], job.outputs)


def _trilu_objection(op: Op) -> str:
    return "its diagonal is computed" if op.has(1) and op.constant(1) is None else ""


TRILU = Rule(
    footprint=lambda op, outs, over: (only(outs), None)[: len(op.inputs)],
    emit=_trilu_emit,
    objection=_trilu_objection,
)

ROWS: dict[str, Rule] = {
    "Gather": GATHER,
    "GatherElements": GATHER_ELEMENTS,
    "GatherND": GATHER_ND,
    "ScatterElements": SCATTER_ELEMENTS,
    "Scatter": SCATTER_ELEMENTS,
    "ScatterND": SCATTER_ND,
    "Expand": EXPAND,
    "Tile": TILE,
    "Trilu": TRILU,
}
