"""How onnxruntime's CPU kernels add, as far as a tile must know to add in the whole value's order.

A *strict* graph's rules grow a box until its kernel rounds as the whole's does. Source: MLAS
(onnxruntime/core/mlas/lib: convolve.cpp, sgemm.cpp) and core/optimizer/nchwc_transformer.cc, for
processors with AVX-512 (blocks of 16 channels) and with AVX2 (of 8), which one rule serves; on Arm
there are none.
"""

from __future__ import annotations

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op

BLOCK = 16
"""Channels that the blocked layout (NCHWc) holds together."""
_SMALL_BLOCK = 8
_REORDERED = 4
"""Channels must be a multiple of this to be put into that layout."""
_STRIDE = 128
_LEAST_STRIDE = 16


def in_blocks(op: Op) -> bool:
    """Whether a Conv is computed in the blocked layout, where each output adds by itself."""
    if len(op.shape(1)) != 4:
        return False
    groups, inner = int(op.attributes.get("group", 1)), op.shape(1)[1]
    outer = op.shape(1)[0]
    if groups == 1:
        return inner < _SMALL_BLOCK or inner % _REORDERED == 0
    depthwise = inner == 1 and outer == groups
    whole_blocks = inner % BLOCK == 0 and (outer // groups) % BLOCK == 0
    return outer % _REORDERED == 0 and (depthwise or whole_blocks)


def reordered(box: Box, size: int) -> Box:
    """Channels grown to what can be put into the blocked layout, if all of them can."""
    if size % _REORDERED:
        return box
    start, stop = box[1].start // _REORDERED, -(-box[1].stop // _REORDERED)
    return box.replace(1, Interval(start * _REORDERED, stop * _REORDERED))


def filled(channels: Interval, size: int) -> Interval:
    """Grown to channels that fill the layout's blocks, of 8 and of 16, just if all ``size`` do."""
    start, stop = channels
    if size % BLOCK == 0:
        return Interval(start // BLOCK * BLOCK, -(-stop // BLOCK) * BLOCK)
    grain = 1
    if size % _SMALL_BLOCK == 0:
        grain = _SMALL_BLOCK
        start, stop = start // grain * grain, -(-stop // grain) * grain
    if (stop - start) % (BLOCK if grain > 1 else _SMALL_BLOCK) == 0:
        start, stop = (start, stop + grain) if stop < size else (start - grain, stop)
    return Interval(start, stop)


def sums_alike(columns: int, whole: int, inner: int) -> bool:
    """Whether a matrix product of so many columns adds its ``inner`` products in the same blocks
    as one of ``whole`` columns: few columns go with longer blocks."""
    return _block(columns, inner) == _block(whole, inner)


def _block(columns: int, inner: int) -> int:
    stride, block = _STRIDE, _STRIDE
    while columns < inner and stride > _LEAST_STRIDE and stride // 2 >= columns:
        stride, block = stride // 2, block * 2
    return min(block, inner)
