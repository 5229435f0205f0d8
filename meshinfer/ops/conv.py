"""Rules of Conv: windows over the spatial axes, slices of channels and groups, partial sums.

Source: the ONNX operator Conv. Output channels are sliced with the weights' first axis, groups with
both; a split over input channels (``over``) gives partial sums, of which the part that starts at 0
holds the bias.
"""

from __future__ import annotations

from math import prod

from meshinfer.geometry import Box, Interval, Window
from meshinfer.graph import Op
from meshinfer.ops.kernels import BLOCK, in_blocks, reordered, sums_alike
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only


def explicit_pads(
    op: Op, spatial: tuple[int, ...], extents: list[int], strides: list[int]
) -> list[int]:
    """``pads`` as begins then ends, ``auto_pad`` resolved (ONNX Conv, attribute auto_pad)."""
    rank = len(spatial)
    auto = op.attributes.get("auto_pad", b"NOTSET").decode()
    if auto == "NOTSET":
        return list(op.attributes.get("pads", [0] * 2 * rank))
    if auto == "VALID":
        return [0] * 2 * rank
    begins, ends = [], []
    for size, extent, stride in zip(spatial, extents, strides, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + extent - size)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return begins + ends


def windows(op: Op, kernel: tuple[int, ...]) -> list[Window]:
    """One window for each spatial axis of a convolution or pooling over input 0, remembered."""
    key = ("windows", op.index, kernel)
    if key not in op.graph.memo:
        op.graph.memo[key] = _windows(op, kernel)
    found: list[Window] = op.graph.memo[key]
    return found


def _windows(op: Op, kernel: tuple[int, ...]) -> list[Window]:
    spatial = op.shape(0)[2:]
    rank = len(spatial)
    strides = list(op.attributes.get("strides", [1] * rank))
    dilations = list(op.attributes.get("dilations", [1] * rank))
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = explicit_pads(op, spatial, extents, strides)
    return [
        Window(spatial[i], kernel[i], strides[i], dilations[i], pads[i], pads[i + rank])
        for i in range(rank)
    ]


def align_spatial(op: Op, box: Box, wins: list[Window]) -> Box:
    for axis, window in enumerate(wins, start=2):
        box = box.replace(axis, window.touching(box[axis]))
    return box


def _kernel(op: Op) -> tuple[int, ...]:
    return op.shape(1)[2:]


def _groups(op: Op) -> tuple[int, int, int]:
    """Groups, input channels a group, output channels a group."""
    groups = int(op.attributes.get("group", 1))
    return groups, op.shape(1)[1], op.shape(1)[0] // groups


def _align(op: Op, outs: Boxes) -> Boxes:
    box = align_spatial(op, only(outs), windows(op, _kernel(op)))
    groups, in_per_group, per_group = _groups(op)
    channels = box[1]
    first, last = channels.start // per_group, (channels.stop - 1) // per_group
    if first == last and (in_per_group % BLOCK or per_group % BLOCK):
        # A lone group of several is a plain convolution, which onnxruntime computes in another
        # layout, and rounds otherwise, than groups that do not fill its blocks.
        first, last = (first - 1, last) if first > 0 else (first, min(1, groups - 1))
    if groups > 1 and first != last:  # part of one group is a plain conv; else whole groups only
        box = box.replace(1, Interval(first * per_group, (last + 1) * per_group))
    if not op.graph.strict:
        return (box,)
    if in_blocks(op):
        box = reordered(box, op.shape(1)[0]) if in_per_group == 1 < groups else box
    else:
        whole = Box.whole((*box.shape[:2], *op.out_shape()[2:]))
        columns, most = (prod(each.shape[2:]) for each in (box, whole))
        if not sums_alike(columns, most, prod(op.shape(1)[1:])):
            box = Box((*box.axes[:2], *whole.axes[2:]))
    return (box,)


def _footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box = only(outs)
    groups, in_per_group, out_per_group = _groups(op)
    spatial = [w.footprint(box[i]) for i, w in enumerate(windows(op, _kernel(op)), start=2)]
    inner = Interval(0, in_per_group) if over is None else over[0]
    if groups == 1:
        channels = inner
    else:
        first, last = box[1].start // out_per_group, (box[1].stop - 1) // out_per_group
        channels = Interval(first * in_per_group, (last + 1) * in_per_group)
    weights = Box((box[1], inner, *(Interval(0, k) for k in _kernel(op))))
    data = Box((box[0], channels, *spatial))
    bias = Box((box[1],)) if op.has(2) and inner.start == 0 else None
    return (data, weights, bias)[: len(op.inputs)]


def _emit(op: Op, job: Emission, e: Emitter) -> None:
    box, data = only(job.outs), job.ins[0]
    assert data is not None
    _, in_per_group, _ = _groups(op)
    pads = [w.padding(box[i]) for i, w in enumerate(windows(op, _kernel(op)), start=2)]
    group = 1 if job.over is not None else data[1].size // in_per_group
    inputs = job.inputs if job.inputs[-1] else job.inputs[:-1]
    e.copy(
        op,
        inputs,
        job.outputs,
        drop=("auto_pad",),
        pads=[p[0] for p in pads] + [p[1] for p in pads],
        group=group,
    )


def _flops(op: Op, outs: Boxes) -> int:
    volume = only(outs).volume
    for k in op.shape(1)[1:]:
        volume *= k
    return 2 * volume


def _reduction(op: Op) -> Box | None:
    return Box.of((0, op.shape(1)[1])) if _groups(op)[0] == 1 else None


CONV = Rule(footprint=_footprint, emit=_emit, align=_align, reduction=_reduction, flops=_flops)
