"""Where each output of a Resize reads and with which weights: onnxruntime's float32, axis by axis.

Source: the ONNX operator Resize and onnxruntime's CPU kernels (upsamplebase.h, upsample.cc,
upsample_aa.cc), whose rounding is repeated step by step: coordinates in float32 differ from exact
ones by up to 3e-5 of a pixel, which shows in the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
F = np.float32
NEAR = F(1e-6)
"""This close to the middle between two inputs is the middle (onnxruntime 1.32)."""


@dataclass(frozen=True, slots=True)
class Taps:
    """How one axis is resized: for each of ``m`` outputs the inputs it reads.

    ``index``: [taps, m], inside the axis. ``weight``: [taps, m], float32, or int32 where the kernel
    has fixed-point weights; None where the one input is copied. ``divisor``: [m], what each product
    is divided by, or None. ``outside``: [m], where the extrapolation value stands instead, or None.
    """

    index: Array
    weight: Array | None = None
    divisor: Array | None = None
    outside: Array | None = None


def coordinates(mode: str, outputs: int, inputs: int, scale: F, roi: tuple[F, F]) -> Array:
    """The place on the input axis of each output, float32 [outputs], by the coordinate mode."""
    x, m, n = np.arange(outputs, dtype=F), F(outputs), F(inputs)
    if mode == "asymmetric":
        return x / scale
    if mode == "tf_half_pixel_for_nn":
        return (x + F(0.5)) / scale
    if mode == "align_corners":
        return np.zeros(1, F) if outputs == 1 else x * (n - F(1)) / (m - F(1))
    if mode == "pytorch_half_pixel" and outputs == 1:
        return np.zeros(1, F)
    if mode == "tf_crop_and_resize":
        start, stop = roi
        if outputs == 1:
            return np.array([0.5 * float(start + stop) * float(n - F(1))], F)
        return start * (n - F(1)) + (x * (stop - start) * (n - F(1))) / (m - F(1))
    if mode == "half_pixel_symmetric":
        offset = n / F(2) * (F(1) - m / (scale * n))
        wide = np.float64(offset) + (x.astype(np.float64) + 0.5) / np.float64(scale) - 0.5
        return wide.astype(F)
    return (x + F(0.5)) / scale - F(0.5)


def nearest(where: Array, inputs: int, rounding: str, shrinks: bool) -> Taps:
    """One input for each output; ``rounding`` is nearest_mode, empty before opset 11."""
    if rounding == "floor":
        found = np.floor(where)
    elif rounding == "ceil" or (rounding == "" and shrinks):
        found = np.ceil(where)
    elif rounding == "":
        found = np.trunc(where)
    else:
        apart = where - np.floor(where) - F(0.5)
        tie = np.floor(where) if rounding == "round_prefer_floor" else np.ceil(where)
        closest = np.where(apart < 0, np.floor(where), np.ceil(where))
        found = np.where(np.abs(apart) < NEAR, tie, closest)
    return Taps(np.clip(found.astype(np.int64), 0, inputs - 1)[None])


def linear(where: Array, inputs: int, fixed: bool) -> Taps:
    """Two inputs for each output; ``fixed``: weights in units of 1/1024 (8 bits, channels last)."""
    place = np.clip(where, F(0), F(inputs - 1))
    first = np.minimum(place.astype(np.int64), inputs - 1)
    second = np.minimum(first + 1, inputs - 1)
    if fixed:
        one = (place * F(1024)).astype(np.int32) - first.astype(np.int32) * 1024
        one = np.where(first == second, np.int32(512), one)
        return Taps(np.stack([first, second]), np.stack([1024 - one, one]).astype(np.int32))
    to_first, to_second = np.abs(place - first.astype(F)), np.abs(place - second.astype(F))
    alone = first == second
    weight = np.stack([np.where(alone, F(0.5), to_second), np.where(alone, F(0.5), to_first)])
    return Taps(np.stack([first, second]), weight)


def cubic(where: Array, inputs: int, a: F, exclude_outside: bool, divided: bool) -> Taps:
    """Four inputs for each output (Keys 1981); ``divided``: weights are divided by their sum."""
    floor = np.floor(where)
    s = where - floor
    weight: Array = np.stack(
        [
            ((a * (s + 1) - 5 * a) * (s + 1) + 8 * a) * (s + 1) - 4 * a,
            ((a + 2) * s - (a + 3)) * s * s + 1,
            ((a + 2) * (1 - s) - (a + 3)) * (1 - s) * (1 - s) + 1,
            ((a * (2 - s) - 5 * a) * (2 - s) + 8 * a) * (2 - s) - 4 * a,
        ]
    ).astype(F)
    index = floor.astype(np.int64)[None] + np.arange(-1, 3)[:, None]
    divisor: Array | None = None
    if exclude_outside:
        weight = np.where((index < 0) | (index >= inputs), F(0), weight)
        total = weight[0] + weight[1] + weight[2] + weight[3]
        total = np.where(total == 0, F(1), total)  # 0 only where the extrapolation value stands
        weight, divisor = (weight / total, None) if divided else (weight, total)
    return Taps(np.clip(index, 0, inputs - 1), weight, divisor)


def antialias(
    where: Array,
    inputs: int,
    scale: F,
    a: F | None,
    exclude_outside: bool,
    fixed: bool,
) -> Taps:
    """A window that widens as the image shrinks; cubic with ``a``, else linear.

    ``fixed``: weights in units of 2**-22, for 8-bit types.
    """
    by = F(1) / scale
    half = F(1) if a is None else F(2)
    support = half * by if by >= 1 else half
    narrower = F(1) / by if by >= 1 else F(1)
    rows = []
    for output in range(len(where)):
        centre = F(0.5) + where[output]
        low = int(np.floor(centre - support + F(0.5)))
        high = int(np.floor(centre + support + F(0.5)))
        start, stop = max(low, 0), min(high, inputs)
        if exclude_outside:
            low, high = start, stop
        places = np.arange(low, high).astype(F) - centre + F(0.5)
        weights = _kernel(np.abs(places * narrower), a)
        total = F(0)
        for weight in weights:
            total += weight
        if not exclude_outside:  # what lies outside counts for the border
            before, after = max(0, -low), max(0, high - inputs)
            for i in range(before):
                weights[before] += weights[i]
            for i in range(len(weights) - after, len(weights)):
                weights[len(weights) - after - 1] += weights[i]
            weights = weights[before : len(weights) - after]
        rows.append((start, weights if total == 0 else weights * (F(1) / total)))
    return _window(rows, inputs, fixed)


def _kernel(x: Array, a: F | None) -> Array:
    if a is None:
        return np.where(x < 1, F(1) - x, F(0)).astype(F)
    near = ((a + F(2)) * x - (a + F(3))) * x * x + F(1)
    far = (((x - F(5)) * x + F(8)) * x - F(4)) * a
    return np.where(x < 1, near, np.where(x < 2, far, F(0))).astype(F)


def _window(rows: list[tuple[int, Array]], inputs: int, fixed: bool) -> Taps:
    """Rows of different lengths as one table; what is missing has weight 0."""
    taps = max(len(weights) for _, weights in rows)
    index = np.zeros((taps, len(rows)), np.int64)
    weight = np.zeros((taps, len(rows)), F)
    for output, (start, weights) in enumerate(rows):
        index[:, output] = np.clip(np.arange(start, start + taps), 0, start + len(weights) - 1)
        weight[: len(weights), output] = weights
    if fixed:
        large = weight * F(2**22)
        return Taps(index, np.trunc(large + np.copysign(F(0.5), large)).astype(np.int32))
    return Taps(index, weight)
