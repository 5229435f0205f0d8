"""Pools that round up, written as onnxruntime computes them: it drops a window that starts in
padding.

onnx's shape inference counts that window before opset 22, so that a value would be declared larger
than it is. Attributes are changed such that all agree; the elements computed stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from meshinfer.geometry import Interval, Window

_POOLS = ("MaxPool", "AveragePool", "LpPool")


@dataclass(frozen=True, slots=True)
class _Axis:
    window: Window
    declared: int

    @property
    def real(self) -> int:
        """The number of windows that start inside the value or its leading padding."""
        starts_beyond = (
            self.declared - 1
        ) * self.window.stride >= self.window.size + self.window.pad_begin
        return self.declared - 1 if starts_beyond and self.declared > 1 else self.declared

    @property
    def pad_end(self) -> int:
        """Trailing padding that the last real window reads."""
        return self.window.padding(Interval(0, self.real))[1]


def trim_pools(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Rewrite, in place, the first pool whose declared size is not the real one; whether there was
    one.

    Only the first, since the shapes of what follows it change.
    """
    return any(
        _trim(node, shapes[node.input[0]][2:])
        for node in model.graph.node
        if node.op_type in _POOLS and node.domain in ("", "ai.onnx") and node.input[0] in shapes
    )


def _trim(node: onnx.NodeProto, spatial: Sequence[int]) -> bool:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if not attributes.get("ceil_mode", 0) or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return False
    axes = _axes(attributes, spatial)
    if all(axis.real == axis.declared for axis in axes):
        return False
    ends = [axis.pad_end for axis in axes]
    counted = node.op_type == "AveragePool" and attributes.get("count_include_pad", 0)
    beyond = any(end > axis.window.pad_end for end, axis in zip(ends, axes, strict=True))
    fits = all(end < axis.window.kernel for end, axis in zip(ends, axes, strict=True))
    ceil = int(beyond and (bool(counted) or not fits))
    if ceil:  # what lies beyond the declared padding must not count: leave it to ceil_mode
        ends = [min(end, axis.window.pad_end) for end, axis in zip(ends, axes, strict=True)]
    pads = [axis.window.pad_begin for axis in axes] + ends
    if ceil and pads == list(attributes.get("pads", [0] * len(pads))):
        return False  # a stride beyond the kernel next to counted padding: no attributes say it
    kept = [a for a in node.attribute if a.name not in ("pads", "ceil_mode")]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.append(helper.make_attribute("pads", pads))
    node.attribute.append(helper.make_attribute("ceil_mode", ceil))
    return True


def _axes(attributes: Mapping[str, Sequence[int]], spatial: Sequence[int]) -> list[_Axis]:
    rank = len(spatial)
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    pads = attributes.get("pads", [0] * 2 * rank)
    axes = []
    for i, size in enumerate(spatial):
        window = Window(
            size, attributes["kernel_shape"][i], strides[i], dilations[i], pads[i], pads[i + rank]
        )
        free = size + window.pad_begin + window.pad_end - window.extent
        axes.append(_Axis(window, -(-free // window.stride) + 1))
    return axes
