"""Rules of Resize and Upsample: onnxruntime's own kernel on an aligned crop where its coordinates
are the same there, else gathers and weighted sums in that kernel's order.

Source: the ONNX operators Resize and Upsample. Coordinates come from the *whole* image (see
``resize_taps``). Scales and sizes must be constants. A crop is aligned when the kernel, run on the
crop alone, would read the same elements with the same weights: powers of two, mostly.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
import onnx_ir as ir

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.layout import crop
from meshinfer.ops.resize_axes import (
    SMALL,
    Axis,
    antialiased,
    dtype_of,
    mode_of,
    objection,
    resized_axes,
    roi_of,
    scales_of,
)
from meshinfer.ops.resize_taps import Array, F
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only

_PERIOD = 4096
"""Scales p/q with p and q up to this are tried for an aligned crop."""


# --- Which crop, which way ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Crop:
    """One axis of the kernel run on a crop: what it reads and which outputs it makes."""

    reads: Interval
    makes: Interval


def _direct(op: Op, box: Box) -> list[_Crop] | None:
    """A crop of each axis on which onnxruntime's kernel gives the same bits, if there is one."""
    shape, result, axes = op.shape(0), op.out_shape(), resized_axes(op)
    crops = []
    for i, wanted in enumerate(box):
        if i not in axes:
            crops.append(_Crop(wanted, wanted))
        elif wanted == Interval(0, result[i]):
            crops.append(_Crop(Interval(0, shape[i]), wanted))
        else:
            found = None if antialiased(op) else _aligned(axes[i], shape[i], wanted)
            if found is None:
                return None
            crops.append(found)
    changes = any(c.reads.size != c.makes.size for c in crops)
    return crops if changes and (_by_scales(op, crops) or _by_sizes(op, crops)) else None


def _by_scales(op: Op, crops: list[_Crop]) -> bool:
    """Whether the kernel, told the scales, makes of each crop as many outputs as it should."""
    return all(
        int(scale * F(c.reads.size)) == c.makes.size
        for scale, c in zip(scales_of(op), crops, strict=True)
    )


def _by_sizes(op: Op, crops: list[_Crop]) -> bool:
    return op.graph.opset >= 11 and all(
        F(c.makes.size) / F(c.reads.size) == scale
        for scale, c in zip(scales_of(op), crops, strict=True)
    )


def _aligned(axis: Axis, size: int, wanted: Interval) -> _Crop | None:
    """The crop whose own taps are those of the whole, moved; None when rounding differs."""
    ratio = Fraction(float(axis.scale))
    p, q = ratio.numerator, ratio.denominator
    if max(p, q) > _PERIOD:
        return None
    index = axis.taps.index[:, wanted.start : wanted.stop]
    first = min(int(index.min()), wanted.start * q // p) // q * q
    last = max(int(index.max()) + 1, -(-wanted.stop * q // p))
    reads = Interval(first, min(size, -(-last // q) * q))
    makes = Interval(first // q * p, first // q * p + int(axis.scale * F(reads.size)))
    if makes.intersect(wanted) != wanted:
        return None
    own = axis.make(reads.size, makes.size)
    inside, whole = wanted.shift(-makes.start), axis.taps
    if own.outside is not None or not np.array_equal(_cut(own.index, inside) + first, index):
        return None
    same = all(
        (a is None and b is None)
        or (a is not None and b is not None and np.array_equal(_cut(a, inside), _cut(b, wanted)))
        for a, b in ((own.weight, whole.weight), (own.divisor, whole.divisor))
    )
    return _Crop(reads, makes) if same else None


def _cut(values: Array, part: Interval) -> Array:
    return values[..., part.start : part.stop]


def _footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, axes = only(outs), resized_axes(op)
    if box == Box.whole(op.out_shape()):
        return tuple(op.graph.whole(n) if n else None for n in op.inputs)
    rest = (None for _ in op.inputs[1:])
    crops = _direct(op, box)
    if crops is not None:
        return (Box(tuple(c.reads for c in crops)), *rest)
    for i, axis in axes.items():
        index = _cut(axis.taps.index, box[i])
        box = box.replace(i, Interval(int(index.min()), int(index.max()) + 1))
    return (box, *rest)


# --- Emission -------------------------------------------------------------------------------------


def _emit(op: Op, job: Emission, e: Emitter) -> None:
    box = only(job.outs)
    if box == Box.whole(op.out_shape()):
        e.copy(op, job.inputs, job.outputs)
        return
    if not resized_axes(op):
        e.node("Identity", job.inputs[:1], job.outputs)
        return
    crops = _direct(op, box)
    if crops is not None:
        _emit_kernel(op, job, e, crops)
    else:
        _emit_sums(op, job, e)


def _emit_kernel(op: Op, job: Emission, e: Emitter, crops: list[_Crop]) -> None:
    made = Box(tuple(c.makes for c in crops))
    target = e.fresh("resized")
    data = job.inputs[0]
    if e.opset < 9:
        e.copy(op, [data], [target], scales=[float(s) for s in scales_of(op)])
    elif e.opset < 11:
        e.copy(op, [data, e.array(np.array(scales_of(op), F))], [target])
    else:
        rank = len(crops)
        spans = [roi_of(op, i) for i in range(rank)]
        roi = e.array(np.array([*(s[0] for s in spans), *(s[1] for s in spans)], F))
        if _by_scales(op, crops):
            names = [data, roi, e.array(np.array(scales_of(op), F))]
        else:
            # Before opset 13 the scales had to be there, and to be empty.
            names = [data, roi, e.array(np.zeros(0, F)), e.ints(made.shape)]
        e.copy(op, names, [target], drop=("axes", "keep_aspect_ratio_policy"))
    crop(e, target, made, only(job.outs), job.outputs[0])


@dataclass(frozen=True, slots=True)
class _Sums:
    """Emits gathers and weighted sums for one box of a Resize."""

    op: Op
    e: Emitter
    box: Box
    reads: Box

    def part(self, i: int, values: Array) -> str:
        """A constant for the outputs of axis ``i``, shaped to be broadcast along it."""
        shape = [1] * len(self.box)
        shape[i] = self.box[i].size
        return self.e.array(np.ascontiguousarray(_cut(values, self.box[i]).reshape(shape)))

    def gather(self, source: str, i: int, index: Array) -> str:
        places = _cut(index, self.box[i]) - self.reads[i].start
        return self.apply("Gather", source, self.e.array(places), axis=i)

    def apply(self, kind: str, *inputs: str, **attributes: int) -> str:
        target = self.e.fresh(kind.lower())
        self.e.node(kind, inputs, [target], domain="", **attributes)
        return target

    def total(self, terms: list[str]) -> str:
        result = terms[0]
        for term in terms[1:]:
            result = self.apply("Add", result, term)
        return result

    def separate(self, source: str) -> str:
        """The last axis first, each axis a sum over its taps: cubic and antialiased."""
        fixed = dtype_of(self.op) in SMALL and antialiased(self.op)
        for i, axis in reversed(resized_axes(self.op).items()):
            terms = []
            for t, index in enumerate(axis.taps.index):
                term = self.gather(source, i, index)
                if axis.taps.weight is not None:
                    term = self.apply("Mul", term, self.part(i, axis.taps.weight[t]))
                if axis.taps.divisor is not None:
                    term = self.apply("Div", term, self.part(i, axis.taps.divisor))
                terms.append(term)
            source = self.total(terms)
            if fixed:
                source = self.rounded(source)
        return source

    def rounded(self, source: str) -> str:
        """From units of 2**-22 to a byte in the value's type, as after each axis of the kernel."""
        for kind, by in (("Add", 1 << 21), ("Div", 1 << 22), ("Max", 0), ("Min", 255)):
            source = self.apply(kind, source, self.e.array(np.array(by, np.int32)))
        narrow = self.apply("Cast", source, to=ir.DataType[dtype_of(self.op)].value)
        return self.apply("Cast", narrow, to=ir.DataType.INT32.value)

    def corners(self, source: str) -> str:
        """The product of the axes' weights on each corner of the cell: linear."""
        axes = resized_axes(self.op)
        parts = {i: [self.part(i, w) for w in axis.weights()] for i, axis in axes.items()}
        # The last axis first: its gathers copy element by element, and the crop has fewer rows.
        gathered: dict[tuple[int, ...], str] = {(): source}
        terms = []
        for corner in product((0, 1), repeat=len(axes)):
            for k, (i, axis) in reversed(list(enumerate(axes.items()))):
                if corner[k:] not in gathered:
                    gathered[corner[k:]] = self.gather(
                        gathered[corner[k + 1 :]], i, axis.taps.index[corner[k]]
                    )
            factors = [parts[i][t] for i, t in zip(axes, corner, strict=True)]
            weight = factors.pop()
            while factors:
                weight = self.apply("Mul", weight, factors.pop())
            terms.append(self.apply("Mul", weight, gathered[corner]))
        result = self.total(terms)
        if next(iter(axes.values())).weights().dtype == np.int32:
            result = self.apply("Div", result, self.e.array(np.array(1 << 20, np.int32)))
        return result

    def outside(self) -> str:
        """Where the extrapolation value stands: a mask, or empty when nowhere."""
        masks = [
            self.part(i, axis.taps.outside)
            for i, axis in resized_axes(self.op).items()
            if axis.taps.outside is not None
        ]
        result = masks[0] if masks else ""
        for mask in masks[1:]:
            result = self.apply("Or", result, mask)
        return result


def _emit_sums(op: Op, job: Emission, e: Emitter) -> None:
    box, reads = only(job.outs), job.ins[0]
    assert reads is not None
    sums, mode, value = _Sums(op, e, box, reads), mode_of(op), job.inputs[0]
    axes = resized_axes(op)
    weights = [axis.taps.weight for axis in axes.values() if axis.taps.weight is not None]
    own, work = dtype_of(op), "INT32" if any(w.dtype == np.int32 for w in weights) else "FLOAT"
    other = bool(weights) and own != work
    if other:
        value = sums.apply("Cast", value, to=ir.DataType[work].value)
    value = (
        sums.corners(value) if mode == "linear" and not antialiased(op) else sums.separate(value)
    )
    if other:
        value = sums.apply("Cast", value, to=ir.DataType[own].value)
    mask = sums.outside()
    if mask:
        filler = e.array(np.array(op.attributes.get("extrapolation_value", 0.0), F))
        value = sums.apply("Where", mask, filler, value)
    e.node("Identity", [value], job.outputs)


def _flops(op: Op, outs: Boxes) -> int:
    volume = only(outs).volume
    taps = [
        len(axis.taps.index) for axis in resized_axes(op).values() if axis.taps.weight is not None
    ]
    if mode_of(op) == "linear" and not antialiased(op):
        return int(2 * volume * np.prod(taps, initial=1))
    return 2 * volume * max(1, sum(taps))


RESIZE = Rule(footprint=_footprint, emit=_emit, objection=objection, flops=_flops)
