"""Rules of operators that only move elements: concatenate, cut, permute, reshape, pixel shuffle.

Sources: the ONNX operators Concat, Split, Slice, Transpose, DepthToSpace, SpaceToDepth, Reshape,
Flatten, Squeeze, Unsqueeze. Reshapes keep boxes boxes where groups of axes have equal products:
inside a group only the leading axis is cut, at multiples that both sides share.
"""

from __future__ import annotations

from math import lcm, prod

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only

# --- Concat ---------------------------------------------------------------------------------------


def _concat_axis(op: Op) -> int:
    return int(op.attributes.get("axis", 1)) % len(op.out_shape())


def _concat_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, axis = only(outs), _concat_axis(op)
    found: list[Box | None] = []
    offset = 0
    for position in range(len(op.inputs)):
        size = op.shape(position)[axis]
        part = box[axis].intersect(Interval(offset, offset + size))
        found.append(box.replace(axis, part.shift(-offset)) if part.size > 0 else None)
        offset += size
    return tuple(found)


def _concat_emit(op: Op, job: Emission, e: Emitter) -> None:
    names = [name for name in job.inputs if name]
    e.node("Concat", names, job.outputs, axis=_concat_axis(op))


CONCAT = Rule(footprint=_concat_footprint, emit=_concat_emit)

# --- Split ----------------------------------------------------------------------------------------


def _split_axis(op: Op) -> int:
    return int(op.attributes.get("axis", 0)) % len(op.shape(0))


def _split_offsets(op: Op) -> list[int]:
    axis, offsets = _split_axis(op), [0]
    for position in range(len(op.outputs)):
        offsets.append(offsets[-1] + op.out_shape(position)[axis])
    return offsets


def _split_objection(op: Op) -> str:
    if not all(op.outputs):
        return "an output is left out"
    return "" if not op.has(1) or op.constant(1) is not None else "its sizes are computed"


def _split_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    axis, offsets = _split_axis(op), _split_offsets(op)
    reads = [
        box.replace(axis, box[axis].shift(offset))
        for box, offset in zip(outs, offsets, strict=False)
        if box is not None
    ]
    result = reads[0]
    for other in reads[1:]:
        result = result.hull(other)
    return (result, *(None for _ in op.inputs[1:]))


def _split_emit(op: Op, job: Emission, e: Emitter) -> None:
    data = job.ins[0]
    assert data is not None
    axis, offsets = _split_axis(op), _split_offsets(op)
    for box, name, offset in zip(job.outs, job.outputs, offsets, strict=False):
        if box is not None:
            moved = box.replace(axis, box[axis].shift(offset))
            crop(e, job.inputs[0], data, moved, name)


SPLIT = Rule(
    footprint=_split_footprint,
    emit=_split_emit,
    objection=_split_objection,
    split=lambda op: tuple(i for i in range(len(op.out_shape())) if i != _split_axis(op)),
)


def crop(e: Emitter, source: str, held: Box, wanted: Box, target: str) -> None:
    """Emit nodes that cut ``wanted`` out of a value holding ``held`` (Slice; Identity if equal)."""
    axes = [i for i, (h, w) in enumerate(zip(held, wanted, strict=True)) if h != w]
    if not axes:
        e.node("Identity", [source], [target])
        return
    starts = [wanted[i].start - held[i].start for i in axes]
    stops = [wanted[i].stop - held[i].start for i in axes]
    slice_node(e, source, target, starts, stops, axes, [1] * len(axes))


def slice_node(
    e: Emitter,
    source: str,
    target: str,
    starts: list[int],
    stops: list[int],
    axes: list[int],
    steps: list[int],
) -> None:
    if e.opset < 10:
        assert all(step == 1 for step in steps), "Slice has steps from opset 10"
        e.node("Slice", [source], [target], starts=starts, ends=stops, axes=axes)
        return
    names = [source, e.ints(starts), e.ints(stops), e.ints(axes)]
    if any(step != 1 for step in steps):
        names.append(e.ints(steps))
    e.node("Slice", names, [target])


# --- Slice ----------------------------------------------------------------------------------------


def _slice_ranges(op: Op) -> list[tuple[int, int]]:
    """(first element, step) for each axis, bounds resolved as the ONNX operator does."""
    known = op.graph.memo.get(("slice", op.index))
    if known is None:
        known = op.graph.memo["slice", op.index] = _resolved(op)
    ranges: list[tuple[int, int]] = known
    return ranges


def _resolved(op: Op) -> list[tuple[int, int]]:
    shape = op.shape(0)
    if op.graph.opset < 10:
        starts = list(op.attributes["starts"])
        axes = list(op.attributes.get("axes", range(len(starts))))
        steps = [1] * len(starts)
    else:
        starts = [int(v) for v in _constant(op, 1)]
        axes = [int(v) for v in _constant(op, 3)] if op.has(3) else list(range(len(starts)))
        steps = [int(v) for v in _constant(op, 4)] if op.has(4) else [1] * len(starts)
    ranges = [(0, 1)] * len(shape)
    for start, axis, step in zip(starts, axes, steps, strict=True):
        size = shape[axis]
        start = start + size if start < 0 else start
        ranges[axis % len(shape)] = (
            min(max(start, 0), size if step > 0 else size - 1),
            step,
        )
    return ranges


def _constant(op: Op, position: int) -> list[int]:
    values = op.constant(position)
    assert values is not None
    return [int(v) for v in values.reshape(-1)]


def _slice_objection(op: Op) -> str:
    fixed = op.graph.opset < 10 or all(
        op.constant(i) is not None for i in range(1, len(op.inputs)) if op.has(i)
    )
    return "" if fixed else "its bounds are computed"


def _slice_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    axes = []
    for wanted, (first, step) in zip(only(outs), _slice_ranges(op), strict=True):
        a, b = first + wanted.start * step, first + (wanted.stop - 1) * step
        axes.append(Interval(min(a, b), max(a, b) + 1))
    return (Box(tuple(axes)), *(None for _ in op.inputs[1:]))


def _slice_emit(op: Op, job: Emission, e: Emitter) -> None:
    data = job.ins[0]
    assert data is not None
    starts, stops, axes, steps = [], [], [], []
    for axis, (held, (_, step)) in enumerate(zip(data, _slice_ranges(op), strict=True)):
        if step != 1:
            axes.append(axis)
            steps.append(step)
            starts.append(0 if step > 0 else held.size - 1)
            stops.append(held.size if step > 0 else -held.size - 1)
    if axes:
        slice_node(e, job.inputs[0], job.outputs[0], starts, stops, axes, steps)
    else:
        e.node("Identity", job.inputs[:1], job.outputs)


SLICE = Rule(footprint=_slice_footprint, emit=_slice_emit, objection=_slice_objection)

# --- Transpose ------------------------------------------------------------------------------------


def _permutation(op: Op) -> list[int]:
    rank = len(op.shape(0))
    return list(op.attributes.get("perm", range(rank - 1, -1, -1)))


def _transpose_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box = only(outs)
    axes = [Interval(0, 0)] * len(box)
    for out_axis, in_axis in enumerate(_permutation(op)):
        axes[in_axis] = box[out_axis]
    return (Box(tuple(axes)),)


TRANSPOSE = Rule(footprint=_transpose_footprint)

# --- DepthToSpace, SpaceToDepth -------------------------------------------------------------------


def _block(op: Op) -> int:
    return int(op.attributes["blocksize"])


def _whole_channels(op: Op, box: Box) -> Box:
    return box.replace(1, Interval(0, op.out_shape()[1]))


def _d2s_align(op: Op, outs: Boxes) -> Boxes:
    b, box = _block(op), _whole_channels(op, only(outs))
    for axis in (2, 3):
        box = box.replace(axis, Interval(box[axis].start // b * b, -(-box[axis].stop // b) * b))
    return (box,)


def _d2s_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    b, box = _block(op), only(outs)
    rows, cols = (Interval(box[i].start // b, box[i].stop // b) for i in (2, 3))
    return (Box((box[0], Interval(0, op.shape(0)[1]), rows, cols)),)


def _s2d_align(op: Op, outs: Boxes) -> Boxes:
    return (_whole_channels(op, only(outs)),)


def _s2d_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    b, box = _block(op), only(outs)
    rows, cols = (Interval(box[i].start * b, box[i].stop * b) for i in (2, 3))
    return (Box((box[0], Interval(0, op.shape(0)[1]), rows, cols)),)


DEPTH_TO_SPACE = Rule(footprint=_d2s_footprint, align=_d2s_align, split=lambda op: (0, 2, 3))
SPACE_TO_DEPTH = Rule(footprint=_s2d_footprint, align=_s2d_align, split=lambda op: (0, 2, 3))

# --- Reshape and its kin --------------------------------------------------------------------------

Group = tuple[tuple[int, ...], tuple[int, ...]]
"""Input axes and output axes whose sizes have equal products."""


def axis_groups(source: tuple[int, ...], target: tuple[int, ...]) -> list[Group]:
    """The finest pairing of consecutive axes with equal products.

    Axes of size 1 belong to no group: there is nothing in them to cut. Shapes hold no zeros.
    """
    left = [i for i, size in enumerate(source) if size > 1]
    right = [j for j, size in enumerate(target) if size > 1]
    groups: list[Group] = []
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (a := prod(source[i] for i in ins)) != (b := prod(target[j] for j in outs)):
            if a < b:
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        groups.append((tuple(ins), tuple(outs)))
    return groups


def _leads(op: Op) -> list[tuple[int, int, int, int]]:
    """For each group: leading input axis, leading output axis, elements under one step of each."""
    known = op.graph.memo.get(("leads", op.index))
    if known is None:
        source, target = op.shape(0), op.out_shape()
        known = [
            (ins[0], outs[0], prod(source[i] for i in ins[1:]), prod(target[j] for j in outs[1:]))
            for ins, outs in axis_groups(source, target)
        ]
        op.graph.memo["leads", op.index] = known
    leads: list[tuple[int, int, int, int]] = known
    return leads


def _reshape_objection(op: Op) -> str:
    return "its value is empty" if 0 in (*op.shape(0), *op.out_shape()) else ""


def _reshape_align(op: Op, outs: Boxes) -> Boxes:
    box, result = only(outs), Box.whole(op.out_shape())
    for _, lead, step_in, step_out in _leads(op):
        multiple = lcm(step_in, step_out) // step_out
        start = box[lead].start // multiple * multiple
        stop = min(result[lead].stop, -(-box[lead].stop // multiple) * multiple)
        result = result.replace(lead, Interval(start, stop))
    return (result,)


def _reshape_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, result = only(outs), Box.whole(op.shape(0))
    for lead_in, lead_out, step_in, step_out in _leads(op):
        flat = Interval(box[lead_out].start * step_out, box[lead_out].stop * step_out)
        assert flat.start % step_in == 0 and flat.stop % step_in == 0, f"{op} is not aligned"
        result = result.replace(lead_in, Interval(flat.start // step_in, flat.stop // step_in))
    return (result, *(None for _ in op.inputs[1:]))


def _reshape_emit(op: Op, job: Emission, e: Emitter) -> None:
    e.node("Reshape", [job.inputs[0], e.ints(only(job.outs).shape)], job.outputs)


def _reshape_split(op: Op) -> tuple[int, ...]:
    return tuple(lead for _, lead, _, _ in _leads(op))


RESHAPE = Rule(
    footprint=_reshape_footprint,
    emit=_reshape_emit,
    align=_reshape_align,
    objection=_reshape_objection,
    split=_reshape_split,
)

ROWS: dict[str, Rule] = {
    "Concat": CONCAT,
    "Split": SPLIT,
    "Slice": SLICE,
    "Transpose": TRANSPOSE,
    "DepthToSpace": DEPTH_TO_SPACE,
    "SpaceToDepth": SPACE_TO_DEPTH,
    "Reshape": RESHAPE,
    "Flatten": RESHAPE,
    "Squeeze": RESHAPE,
    "Unsqueeze": RESHAPE,
}
