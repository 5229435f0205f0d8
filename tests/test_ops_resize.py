"""Resize and Upsample: every box, in every mode, is the whole image's bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from boxes import (
    check_any_boxes,
    check_boxes,
    check_every_box,
    check_neighbours,
    check_some_boxes,
    load,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

import meshinfer as mi
from meshinfer.geometry import Interval
from meshinfer.ops import BARRIER, rule_of, why_barrier

FEW = settings(max_examples=max(5, settings().max_examples // 8))
TRANSFORMS = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_crop_and_resize",
)
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def resize(
    shape: tuple[int, ...],
    opset: int = 19,
    dtype: type = np.float32,
    op: str = "Resize",
    scales: Any = None,
    sizes: Any = None,
    roi: Any = None,
    **attributes: Any,
) -> ModelProto:
    """A model of one Resize over ``x``; before opset 11 there is no roi and there are no sizes."""
    tensors, names = [], ["x"]
    if opset >= 11:
        tensors.append(helper.make_tensor("roi", TensorProto.FLOAT, [len(roi or [])], roi or []))
        names += ["roi", "scales" if scales is not None else ""]
    elif opset >= 9:
        names.append("scales")
    if scales is not None and opset >= 9:
        tensors.append(helper.make_tensor("scales", TensorProto.FLOAT, [len(scales)], scales))
    if sizes is not None:
        tensors.append(helper.make_tensor("sizes", TensorProto.INT64, [len(sizes)], sizes))
        names.append("sizes")
    if opset < 9:
        attributes["scales"] = [float(s) for s in scales]
    return load(helper.make_node(op, names, ["y"], **attributes), opset, shape, dtype, tensors)


def pixels(shape: tuple[int, ...], dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return rng.integers(max(info.min, -5000), min(info.max, 5000), shape, dtype, endpoint=True)
    return rng.standard_normal(shape).astype(dtype)


CASES = {
    "nearest_2": {"scales": [1, 1, 2, 2], "mode": "nearest", "nearest_mode": "floor"},
    "nearest_odd": {"scales": [1, 1, 1.7, 0.6], "mode": "nearest"},
    "nearest_every_axis": {"scales": [2, 1.4, 0.7, 3], "mode": "nearest", "nearest_mode": "ceil"},
    "linear_2": {"scales": [1, 1, 2, 2], "mode": "linear"},
    "linear_4_half": {"scales": [1, 1, 4, 0.5], "mode": "linear"},
    "linear_3": {"scales": [1, 1, 3, 3], "mode": "linear"},
    "linear_odd": {"scales": [1, 1, 1.7, 0.6], "mode": "linear"},
    "linear_one_axis": {"scales": [1, 1, 1, 1.6], "mode": "linear"},
    "linear_channels_last": {"scales": [1, 1.7, 2.3, 1], "mode": "linear"},
    "linear_sizes": {"sizes": [1, 3, 17, 13], "mode": "linear"},
    "linear_sizes_8": {"sizes": [1, 3, 72, 56], "mode": "linear"},
    "cubic_2": {"scales": [1, 1, 2, 2], "mode": "cubic"},
    "cubic_odd": {"scales": [1, 1, 1.7, 0.6], "mode": "cubic", "cubic_coeff_a": -0.5},
    "cubic_inside": {"scales": [1, 1, 1.7, 0.6], "mode": "cubic", "exclude_outside": 1},
    "smooth_linear": {"scales": [1, 1, 0.4, 0.7], "mode": "linear", "antialias": 1},
    "smooth_cubic": {"scales": [1, 1, 0.4, 1.3], "mode": "cubic", "antialias": 1},
    "smooth_inside": {"scales": [1, 1, 0.6, 0.3], "mode": "cubic", "antialias": 1,
                      "exclude_outside": 1},
    "smooth_one_axis": {"sizes": [1, 3, 9, 3], "mode": "linear", "antialias": 1},
    "not_larger": {"sizes": [20, 9], "axes": [2, 3], "mode": "linear",
                       "keep_aspect_ratio_policy": "not_larger"},
    "not_smaller": {"sizes": [20, 9], "axes": [2, 3], "mode": "nearest",
                        "keep_aspect_ratio_policy": "not_smaller"},
    "axes": {"scales": [2.5], "axes": [3], "mode": "linear"},
    "align": {"scales": [1, 1, 1.7, 2], "mode": "linear",
                  "coordinate_transformation_mode": "align_corners"},
    "crop": {"scales": [1, 1, 1.7, 0.8], "mode": "linear", "extrapolation_value": 9.5,
                 "coordinate_transformation_mode": "tf_crop_and_resize",
                 "roi": [0, 0, 0.2, -0.3, 1, 1, 0.9, 1.2]},
    "same": {"scales": [1, 1, 1.05, 1.02], "mode": "linear"},
}  # fmt: skip
SHAPE = (1, 3, 9, 7)


@pytest.mark.parametrize("name", CASES)
def test_every_box_is_the_wholes_bit_for_bit(name: str) -> None:
    check_every_box(resize(SHAPE, **CASES[name]), {"x": pixels(SHAPE)}, identical=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@FEW
@given(st.data())
def test_any_box_is_the_wholes_in_every_coordinate_mode(
    mode: str, transform: str, data: st.DataObject
) -> None:
    draw = data.draw
    shape = (1, draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    scale = [
        max(draw(st.sampled_from([2, 3, 4, 0.5, 1.5, 1, 8]) | st.floats(0.3, 5)), 1.01 / n)
        for n in shape[2:]
    ]
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": transform}
    if mode == "nearest":
        attributes["nearest_mode"] = draw(st.sampled_from(ROUNDINGS))
    if mode == "cubic":
        attributes["exclude_outside"] = draw(st.integers(0, 1))
        attributes["cubic_coeff_a"] = draw(st.sampled_from([-0.75, -0.5]))
    if transform == "tf_crop_and_resize":
        attributes["extrapolation_value"] = draw(st.sampled_from([0.0, 7.5]))
        attributes["roi"] = [0, 0, 0.1, -0.2, 1, 1, draw(st.sampled_from([0.9, 1.3])), 1]
    model = resize(shape, scales=[1, 1, *scale], **attributes)
    check_any_boxes(model, {"x": pixels(shape)}, data, identical=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.float16])
@pytest.mark.parametrize("name", ["linear_odd", "linear_channels_last", "linear_2", "nearest_odd"])
def test_other_types_are_equal_too(name: str, dtype: type) -> None:
    model = resize(SHAPE, dtype=dtype, **CASES[name])
    check_some_boxes(model, {"x": pixels(SHAPE, dtype)}, identical=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("name", ["smooth_linear", "smooth_cubic", "smooth_inside"])
def test_antialiased_bytes_are_equal(name: str, dtype: type) -> None:
    model = resize(SHAPE, dtype=dtype, **CASES[name])
    check_some_boxes(model, {"x": pixels(SHAPE, dtype)}, identical=True)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((7, 5), [1.7, 2]),
        ((2, 3, 9), [1, 1, 2]),
        ((2, 3, 9), [1, 1, 1.3]),
        ((4, 5, 6), [1.5, 0.6, 2]),
        ((1, 2, 3, 5, 4), [1, 1, 2, 0.7, 1.5]),
        ((1, 2, 3, 4, 4), [1, 1, 2, 2, 2]),
    ],
)
def test_vectors_matrices_and_volumes(
    shape: tuple[int, ...], scales: list[float], mode: str
) -> None:
    model = resize(shape, scales=scales, mode=mode)
    check_some_boxes(model, {"x": pixels(shape)}, identical=True)


@pytest.mark.parametrize(
    ("op", "opset"), [("Upsample", 7), ("Upsample", 9), ("Resize", 10), ("Resize", 11)]
)
@pytest.mark.parametrize("scales", [[1, 1, 2, 2], [1, 1, 1.7, 2.3], [1, 1, 3, 1]])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_older_opsets(op: str, opset: int, scales: list[float], mode: str) -> None:
    model = resize(SHAPE, opset, op=op, scales=scales, mode=mode)
    check_some_boxes(model, {"x": pixels(SHAPE)}, identical=True)


@pytest.mark.parametrize("opset", [13, 18])
def test_sizes_in_opsets_between(opset: int) -> None:
    model = resize(SHAPE, opset, sizes=[1, 3, 20, 14], mode="linear")
    check_some_boxes(model, {"x": pixels(SHAPE)}, identical=True)


@pytest.mark.parametrize("name", ["linear_2", "linear_odd", "nearest_odd", "cubic_odd"])
@FEW
@given(st.data())
def test_between_two_convolutions(name: str, data: st.DataObject) -> None:
    check_neighbours(resize(SHAPE, **CASES[name]), {"x": pixels(SHAPE)}, data)


@pytest.mark.parametrize("scale", [1.7, 3.0, 0.6, 2.0, 0.3])
def test_a_band_far_down_a_long_image_keeps_the_wholes_coordinates(scale: float) -> None:
    """Exact coordinates would be off by 3e-5 of a pixel there."""
    shape = (1, 1, 3000, 4)
    model = resize(shape, scales=[1, 1, scale, 2], mode="linear")
    graph = mi.load(model)
    whole = graph.whole("y")
    boxes = [whole.replace(2, Interval(whole[2].stop - n, whole[2].stop - n + 9)) for n in (9, 77)]
    check_boxes(model, {"x": pixels(shape)}, boxes, identical=True)


def test_a_band_reads_only_its_rows() -> None:
    for scale, most in ((2.0, 12), (1.7, 14)):
        graph = mi.load(resize((1, 4, 100, 100), scales=[1, 1, scale, scale], mode="linear"))
        op, whole = graph.ops[0], graph.whole("y")
        reads = rule_of(op).footprint(op, (whole.replace(2, Interval(60, 80)),), None)[0]
        assert reads is not None
        assert reads[2].size <= most


def test_what_cannot_be_followed_is_a_barrier_that_says_why() -> None:
    graph = mi.load(resize((3, 9, 7), scales=[2, 1.5, 2], mode="linear", antialias=1))
    assert rule_of(graph.ops[0]) is BARRIER
    assert "rounding" in why_barrier(graph.ops[0])
