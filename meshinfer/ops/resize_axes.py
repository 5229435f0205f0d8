"""What a Resize or Upsample asks for: its scales, and on each axis the taps of its kernel.

Source: the ONNX operators Resize and Upsample (opsets 7 to 19), and what onnxruntime makes of them:
which axes its kernels walk, and which types and shapes they take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from meshinfer.graph import Op
from meshinfer.ops.resize_taps import (
    Array,
    F,
    Taps,
    antialias,
    coordinates,
    cubic,
    linear,
    nearest,
)

SMALL = ("UINT8", "INT8")


def mode_of(op: Op) -> str:
    return str(op.attributes.get("mode", b"nearest").decode())


def transform_of(op: Op) -> str:
    if op.graph.opset < 11:
        return "asymmetric"
    return str(op.attributes.get("coordinate_transformation_mode", b"half_pixel").decode())


def antialiased(op: Op) -> bool:
    return bool(op.attributes.get("antialias", 0))


def _given(op: Op, name: str) -> Array | None:
    """The constant ``roi``, ``scales`` or ``sizes``; None when it is left out or empty."""
    if op.graph.opset < 11:
        if name != "scales":
            return None
        if op.graph.opset < 9:
            return np.array(op.attributes["scales"], F)
        return op.constant(1)
    value = op.constant({"roi": 1, "scales": 2, "sizes": 3}[name])
    return value if value is not None and value.size else None


def _named_axes(op: Op) -> list[int]:
    rank = len(op.shape(0))
    return [int(a) % rank for a in op.attributes.get("axes", range(rank))]


def scales_of(op: Op) -> list[F]:
    """The scale of each axis, float32, as onnxruntime finds it."""
    shape, axes = op.shape(0), _named_axes(op)
    result = [F(1)] * len(shape)
    scales, sizes = _given(op, "scales"), _given(op, "sizes")
    if scales is not None:
        for axis, scale in zip(axes, scales, strict=True):
            result[axis] = F(scale)
        return result
    assert sizes is not None
    for axis, size in zip(axes, sizes, strict=True):
        result[axis] = F(size) / F(shape[axis])
    policy = op.attributes.get("keep_aspect_ratio_policy", b"stretch").decode()
    if policy != "stretch":
        chosen = [result[axis] for axis in axes]
        one = min(chosen) if policy == "not_larger" else max(chosen)
        for axis in axes:
            result[axis] = one
    return result


def roi_of(op: Op, axis: int) -> tuple[F, F]:
    roi, axes = _given(op, "roi"), _named_axes(op)
    if roi is None or axis not in axes:
        return F(0), F(1)
    return F(roi[axes.index(axis)]), F(roi[len(axes) + axes.index(axis)])


def _walked_axes(op: Op) -> tuple[int, ...]:
    """The axes that onnxruntime's kernel walks with taps; the others are copied."""
    rank, scales = len(op.shape(0)), scales_of(op)
    if mode_of(op) == "nearest":
        return tuple(i for i in range(rank) if scales[i] != 1 or rank == 1)
    if rank == 4 and scales[1] != 1:
        return (1, 2)
    found = {2: (0, 1), 3: (0, 1, 2), 4: (2, 3), 5: (2, 3, 4)}[rank]
    if antialiased(op):  # its kernel copies along an axis that keeps its size
        return tuple(i for i in found if op.shape(0)[i] != op.out_shape()[i])
    return found


@dataclass(frozen=True, eq=False, slots=True)
class Axis:
    """One resized axis: ``make(inputs, outputs)`` gives the kernel's taps for such an axis."""

    scale: F
    make: Callable[[int, int], Taps]
    taps: Taps

    def weights(self) -> Array:
        """The weights of the taps, which an interpolating mode has."""
        assert self.taps.weight is not None
        return self.taps.weight


def resized_axes(op: Op) -> dict[int, Axis]:
    """The resized axes of a node, worked out once; none where the value is only copied."""
    key = ("resize", op.index)
    if key not in op.graph.memo:
        shape, result = op.shape(0), op.out_shape()
        found = {}
        for axis in _walked_axes(op) if shape != result else ():
            scale, make = scales_of(op)[axis], _maker(op, axis)
            found[axis] = Axis(scale, make, make(shape[axis], result[axis]))
        op.graph.memo[key] = found
    axes: dict[int, Axis] = op.graph.memo[key]
    return axes


def _maker(op: Op, axis: int) -> Callable[[int, int], Taps]:
    mode, transform = mode_of(op), transform_of(op)
    scale, roi = scales_of(op)[axis], roi_of(op, axis)
    a = F(op.attributes.get("cubic_coeff_a", -0.75))
    exclude = bool(op.attributes.get("exclude_outside", 0))
    small = dtype_of(op) in SMALL
    rounding = ""
    if op.graph.opset >= 11:
        rounding = op.attributes.get("nearest_mode", b"round_prefer_floor").decode()
    axes = _walked_axes(op)

    def make(inputs: int, outputs: int) -> Taps:
        where = coordinates(transform, outputs, inputs, scale, roi)
        if scale == 1 and not (mode == "nearest" and len(op.shape(0)) == 1):
            where = np.arange(outputs, dtype=F)
        if mode == "nearest":
            taps = nearest(where, inputs, rounding, bool(scale < 1))
        elif antialiased(op):
            taps = antialias(
                where, inputs, scale, a if mode == "cubic" else None, exclude, fixed=small
            )
        elif mode == "linear":
            taps = linear(where, inputs, fixed=small and axes == (1, 2))
        else:
            taps = cubic(where, inputs, a, exclude, divided=axis == axes[-1])
        if transform != "tf_crop_and_resize":
            return taps
        return replace(taps, outside=(where < 0) | (where > inputs - 1))

    return make


def dtype_of(op: Op) -> str:
    dtype = op.graph.dtype(op.inputs[0])
    assert dtype is not None
    return dtype.name


def objection(op: Op) -> str:
    if op.graph.opset < 7:
        return "before opset 7 its scales had other names"
    fixed = [op.constant(i) is not None for i in range(1, len(op.inputs)) if op.has(i)]
    if not all(fixed):
        return "its scales or sizes are computed"
    if _given(op, "scales") is None and _given(op, "sizes") is None:
        return "it has neither scales nor sizes"
    mode, rank, scales, dtype = mode_of(op), len(op.shape(0)), scales_of(op), dtype_of(op)
    cropped = transform_of(op) == "tf_crop_and_resize"
    if cropped and (dtype != "FLOAT" or antialiased(op)):
        return "it crops while it resizes, and is antialiased or of no float type"
    if mode == "nearest":
        return ""
    if rank not in (2, 3, 4, 5) or dtype not in ("FLOAT", "FLOAT16", "INT32", *SMALL):
        return f"onnxruntime has no {mode} kernel for it"
    if rank == 4 and scales[1] != 1 and mode == "cubic" and not antialiased(op):
        return "it is cubic with channels last"
    if antialiased(op) and (dtype in ("INT32", "FLOAT16") or (rank == 3 and scales[0] != 1)):
        return "its antialiasing is of a kind whose rounding is not known"
    return ""
