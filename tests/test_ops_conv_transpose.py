"""ConvTranspose: any box, any slice of channels, any part of the sum is the whole's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from boxes import check_any_boxes, check_every_box, check_neighbours, check_some_boxes, load
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper
from plans import check_exact, plans

import meshinfer as mi
from meshinfer.geometry import Interval
from meshinfer.ops import rule_of

FEW = settings(max_examples=max(5, settings().max_examples // 4))


def transposed(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    channels: int = 4,
    bias: bool = True,
    group: int = 1,
    opset: int = 17,
    **attributes: Any,
) -> ModelProto:
    """A model of one ConvTranspose over ``x``; ``channels`` are the output's."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((shape[1], channels // group, *kernel), np.float32)
    tensors = [numpy_helper.from_array(weight, "w")]
    if bias:
        tensors.append(numpy_helper.from_array(rng.standard_normal(channels, np.float32), "b"))
    names = ["x", *(t.name for t in tensors)]
    node = helper.make_node("ConvTranspose", names, ["y"], group=group, **attributes)
    return load(node, opset, shape, np.float32, tensors)


def values(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(shape, np.float32)}


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "doubled": ((1, 3, 5, 6), (2, 2), {"strides": [2, 2]}),
    "overlapping": ((1, 3, 5, 6), (4, 3), {"strides": [2, 1], "pads": [1, 1, 1, 0]}),
    "gaps": ((1, 2, 4, 5), (1, 2), {"strides": [3, 4], "output_padding": [2, 1]}),
    "dilated": ((1, 2, 5, 5), (3, 2), {"strides": [2, 3], "dilations": [2, 3], "bias": False}),
    "groups": ((1, 6, 4, 5), (3, 3), {"group": 3, "channels": 6, "strides": [2, 2]}),
    "depthwise": ((2, 4, 5, 4), (3, 3), {"group": 4, "strides": [1, 2], "pads": [1, 1, 1, 1]}),
    "more_padding": ((1, 2, 4, 4), (3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1],
                                            "output_padding": [1, 1]}),
    "shape": ((1, 2, 5, 5), (3, 3), {"strides": [2, 2], "output_shape": [10, 10]}),
    "shape_upper": ((1, 2, 5, 5), (3, 3), {"strides": [2, 2], "output_shape": [10, 9],
                                           "auto_pad": "SAME_UPPER"}),
    "same_upper": ((1, 2, 5, 5), (3, 4), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "same_lower": ((1, 2, 5, 5), (3, 4), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    "valid": ((1, 2, 5, 5), (3, 4), {"strides": [2, 2], "auto_pad": "VALID"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_box_is_the_wholes(name: str) -> None:
    shape, kernel, attributes = CASES[name]
    check_every_box(transposed(shape, kernel, **attributes), values(shape))


@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ((2, 3, 9), (4,), {"strides": [3], "pads": [2, 1]}),
        ((1, 3, 9), (2,), {"strides": [2], "dilations": [3], "output_padding": [1]}),
        ((1, 2, 3, 4, 3), (2, 3, 2), {"strides": [2, 1, 2], "pads": [0, 1, 0, 1, 1, 0]}),
    ],
)
def test_one_and_three_axes(
    shape: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    check_some_boxes(transposed(shape, kernel, **attributes), values(shape))


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelProto, tuple[int, ...]]:
    """A two-dimensional ConvTranspose with drawn attributes whose output is not empty."""
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    group = number(1, 3)
    shape = (number(1, 2), group * number(1, 3), number(1, 6), number(1, 6))
    kernel = (number(1, 4), number(1, 4))
    strides, dilations = [number(1, 4), number(1, 4)], [number(1, 3), number(1, 3)]
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    extra = [number(0, s - 1) for s in strides]
    full = [(n - 1) * s + e for n, s, e in zip(shape[2:], strides, extents, strict=True)]
    begins = [number(0, min(e + 1, f - 1)) for e, f in zip(extents, full, strict=True)]
    ends = [number(0, min(e, f - 1 - b)) for e, f, b in zip(extents, full, begins, strict=True)]
    attributes = {"strides": strides, "dilations": dilations, "output_padding": extra}
    pads = [*begins, *ends]
    channels = group * number(1, 3)
    bias = draw(st.booleans())
    return transposed(shape, kernel, channels, bias, group, pads=pads, **attributes), shape


@FEW
@given(models(), st.data())
def test_any_box_of_any_transposed_convolution(
    drawn: tuple[ModelProto, tuple[int, ...]], data: st.DataObject
) -> None:
    model, shape = drawn
    check_any_boxes(model, values(shape), data)


@FEW
@given(models(), st.data())
def test_any_plan_with_partial_sums(
    drawn: tuple[ModelProto, tuple[int, ...]], data: st.DataObject
) -> None:
    model, shape = drawn
    graph = mi.load(model)
    check_exact(model, graph, data.draw(plans(graph)), values(shape))


@pytest.mark.parametrize("name", ["overlapping", "groups", "more_padding"])
@FEW
@given(st.data())
def test_between_two_convolutions(name: str, data: st.DataObject) -> None:
    shape, kernel, attributes = CASES[name]
    check_neighbours(transposed(shape, kernel, **attributes), values(shape), data)


def test_a_band_reads_only_the_rows_that_reach_it_and_a_slice_only_its_weights() -> None:
    graph = mi.load(transposed((1, 8, 50, 4), (4, 4), 8, strides=[2, 2], pads=[1, 1, 1, 1]))
    op, whole = graph.ops[0], graph.whole("y")
    box = whole.replace(2, Interval(20, 40)).replace(1, Interval(2, 5))
    data, weight, bias = rule_of(op).footprint(op, (box,), None)
    assert data is not None and weight is not None and bias is not None
    assert data.shape == (1, 8, 12, 4)
    assert weight.shape == (8, 3, 4, 4)
    assert bias.shape == (3,)
