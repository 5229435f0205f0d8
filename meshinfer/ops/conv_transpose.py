"""Rules of ConvTranspose: which inputs reach an output box, slices of channels and groups, partial
sums.

Source: the ONNX operator ConvTranspose; output ``o`` sums the inputs ``i`` and taps ``k`` with
``o = i*stride + k*dilation - pad_begin``. The weights are [input channels, output channels a group,
kernel]. As for Conv, a part of the input channels (``over``) holds the bias if it starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.kernels import sums_alike
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only


@dataclass(frozen=True, slots=True)
class _Reach:
    """One spatial axis: ``size`` inputs, each reaching ``extent`` outputs from ``i*stride - pad``
    on."""

    size: int
    stride: int
    extent: int
    pad: int

    def reads(self, out: Interval) -> Interval:
        """The inputs that reach these outputs, and those needed to begin and end in the right
        place; never empty. Outputs that no input reaches hold the bias alone."""
        start, stop = out.start + self.pad, out.stop + self.pad
        first = min(start // self.stride, -(-(start - self.extent + 1) // self.stride))
        last = max((stop - 1) // self.stride, -(-(stop - self.extent) // self.stride))
        top = self.size - 1
        return Interval(min(max(first, 0), top), min(max(last, 0), top) + 1)

    def crops(self, out: Interval) -> tuple[int, int, int]:
        """Pads at the beginning and end, and the output padding, for what ``reads`` gives."""
        reads = self.reads(out)
        begin = out.start + self.pad - reads.start * self.stride
        end = (reads.size - 1) * self.stride + self.extent - begin - out.size
        return begin, max(0, end), max(0, -end)


def _reaches(op: Op) -> list[_Reach]:
    spatial, kernel = op.shape(0)[2:], op.shape(1)[2:]
    rank = len(spatial)
    strides = op.attributes.get("strides", [1] * rank)
    dilations = op.attributes.get("dilations", [1] * rank)
    extra = op.attributes.get("output_padding", [0] * rank)
    pads = op.attributes.get("pads", [0] * 2 * rank)
    auto = op.attributes.get("auto_pad", b"NOTSET").decode()
    explicit = auto == "NOTSET" and not op.attributes.get("output_shape")
    found = []
    for i, (size, stride) in enumerate(zip(spatial, strides, strict=True)):
        extent = (kernel[i] - 1) * dilations[i] + 1
        if explicit:
            pad = pads[i]
        else:  # the shape is given, and what is too much is cropped away on both sides
            total = max(0, (size - 1) * stride + extra[i] + extent - op.out_shape()[2 + i])
            pad = total // 2 if auto == "SAME_UPPER" else total - total // 2
        found.append(_Reach(size, stride, extent, pad))
    return found


def _groups(op: Op) -> tuple[int, int, int]:
    """Groups, input channels a group, output channels a group."""
    groups = int(op.attributes.get("group", 1))
    return groups, op.shape(1)[0] // groups, op.shape(1)[1]


def _objection(op: Op) -> str:
    for axis, reach in enumerate(_reaches(op), start=2):
        if reach.pad < 0:
            return "its pads are negative"
        if reach.crops(Interval(0, op.out_shape()[axis]))[2] >= reach.stride:
            return "its output is padded by a stride or more, which onnxruntime refuses"
    return ""


def _align(op: Op, outs: Boxes) -> Boxes:
    box = only(outs)
    groups, inner, per_group = _groups(op)
    first, last = box[1].start // per_group, (box[1].stop - 1) // per_group
    if groups > 1 and first != last:  # part of one group is a plain one; else whole groups only
        box = box.replace(1, Interval(first * per_group, (last + 1) * per_group))
    if op.graph.strict:  # a matrix product of a column for each input position (MLAS, col2im)
        reads = [reach.reads(box[i]).size for i, reach in enumerate(_reaches(op), start=2)]
        if not sums_alike(prod(reads), prod(op.shape(0)[2:]), inner):
            box = Box((*box.axes[:2], *Box.whole(op.out_shape()).axes[2:]))
    return (box,)


def _footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box = only(outs)
    _, in_per_group, out_per_group = _groups(op)
    spatial = [reach.reads(box[i]) for i, reach in enumerate(_reaches(op), start=2)]
    first, last = box[1].start // out_per_group, (box[1].stop - 1) // out_per_group
    channels = (
        Interval(first * in_per_group, (last + 1) * in_per_group) if over is None else over[0]
    )
    of_group = box[1].shift(-first * out_per_group)
    if first != last:
        of_group = Interval(0, out_per_group)
    kernel = [Interval(0, k) for k in op.shape(1)[2:]]
    bias = Box((box[1],)) if op.has(2) and (over is None or over[0].start == 0) else None
    found = (Box((box[0], channels, *spatial)), Box((channels, of_group, *kernel)), bias)
    return found[: len(op.inputs)]


def _emit(op: Op, job: Emission, e: Emitter) -> None:
    box, data = only(job.outs), job.ins[0]
    assert data is not None
    crops = [reach.crops(box[i]) for i, reach in enumerate(_reaches(op), start=2)]
    group = 1 if job.over is not None else data[1].size // _groups(op)[1]
    e.copy(
        op,
        job.inputs if job.inputs[-1] else job.inputs[:-1],
        job.outputs,
        drop=("auto_pad", "output_shape"),
        pads=[c[0] for c in crops] + [c[1] for c in crops],
        output_padding=[c[2] for c in crops],
        group=group,
    )


def _flops(op: Op, outs: Boxes) -> int:
    volume = 2 * only(outs).volume * _groups(op)[1]
    for k, reach in zip(op.shape(1)[2:], _reaches(op), strict=True):
        volume = volume * k // reach.stride or 1
    return volume


def _reduction(op: Op) -> Box | None:
    return Box.of((0, op.shape(1)[0])) if _groups(op)[0] == 1 else None


CONV_TRANSPOSE = Rule(
    footprint=_footprint,
    emit=_emit,
    align=_align,
    objection=_objection,
    reduction=_reduction,
    flops=_flops,
)
