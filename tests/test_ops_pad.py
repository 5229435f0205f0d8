"""Pad: any box in any mode, of any type, with pads that add and pads that cut, is the whole's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from boxes import check_any_boxes, check_every_box, check_neighbours, check_some_boxes, load
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

import meshinfer as mi
from meshinfer.geometry import Interval
from meshinfer.ops import BARRIER, rule_of

FEW = settings(max_examples=max(5, settings().max_examples // 8))
MODES = ("constant", "reflect", "edge", "wrap")
SHAPE = (1, 3, 7, 6)


def pad(
    pads: list[int],
    mode: str = "constant",
    opset: int = 19,
    shape: tuple[int, ...] = SHAPE,
    dtype: type = np.float32,
    value: Any = None,
    axes: list[int] | None = None,
) -> ModelProto:
    """A model of one Pad over ``x``; before opset 11 pads and value are attributes."""
    if opset < 11:
        more = {} if value is None else {"value": value}
        return load(
            helper.make_node("Pad", ["x"], ["y"], mode=mode, pads=pads, **more), opset, shape
        )
    tensors = [numpy_helper.from_array(np.array(pads, np.int64), "pads")]
    names = ["x", "pads"]
    if value is not None or axes is not None:
        names.append("" if value is None else "value")
        if value is not None:
            tensors.append(numpy_helper.from_array(np.array(value, dtype), "value"))
    if axes is not None:
        names.append("axes")
        tensors.append(numpy_helper.from_array(np.array(axes, np.int64), "axes"))
    return load(helper.make_node("Pad", names, ["y"], mode=mode), opset, shape, dtype, tensors)


def values(shape: tuple[int, ...] = SHAPE, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if dtype is np.bool_:
        return {"x": rng.random(shape) < 0.5}
    return {"x": (rng.standard_normal(shape) * 50).astype(dtype)}


@pytest.mark.parametrize("mode", MODES)
def test_every_box_is_the_wholes(mode: str) -> None:
    model = pad([0, 1, 3, 2, 0, 0, 4, 5], mode)
    check_every_box(model, values(), identical=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("opset", [2, 9, 10, 11, 13, 18, 21])
def test_every_opset(opset: int, mode: str) -> None:
    if opset < 19 and mode == "wrap":
        pytest.skip("wrap came with opset 19")
    check_some_boxes(pad([0, 0, 2, 1, 0, 0, 1, 3], mode, opset), values(), identical=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64, np.float64, np.bool_])
def test_other_types_and_values(dtype: type) -> None:
    model = pad([0, 1, 2, 0, 0, 1, 0, 3], dtype=dtype, value=1)
    check_some_boxes(model, values(dtype=dtype), identical=True)


def test_axes_and_no_value() -> None:
    check_some_boxes(pad([2, 3, 1, 0], "edge", axes=[3, -2]), values(), identical=True)
    check_some_boxes(pad([2, 3, 1, -2], value=-0.5, axes=[-1, 1]), values(), identical=True)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=max(5, settings().max_examples // 4))
@given(st.data())
def test_any_box_with_any_pads(mode: str, data: st.DataObject) -> None:
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    shape = (number(1, 2), number(1, 3), number(1, 7), number(1, 7))
    pads = []
    for size in shape:  # what is cut leaves one element, what is added stays below what is left
        begin = number(-min(2, size - 1), 3)
        left = size + min(begin, 0)
        end = number(-min(2, left - 1), 3)
        most = 5 if mode == "constant" else left + min(end, 0) - (mode == "reflect")
        pads.append((min(begin, most), min(end, most)))
    flat = [*(p[0] for p in pads), *(p[1] for p in pads)]
    model = pad(flat, mode, shape=shape, value=0.25 if mode == "constant" else None)
    assert all(rule_of(op) is not BARRIER for op in mi.load(model).ops)
    check_any_boxes(model, values(shape), data, identical=True)


@pytest.mark.parametrize("mode", MODES)
@FEW
@given(st.data())
def test_between_two_convolutions(mode: str, data: st.DataObject) -> None:
    check_neighbours(pad([0, 0, 2, 1, 0, 0, 3, 4], mode), values(), data)


def test_a_computed_value_is_read_by_every_part() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Pad", ["x", "pads", "top"], ["y"]),
    ]
    pads = numpy_helper.from_array(np.array([0, 0, 2, 1, 0, 0, 1, 1], np.int64), "pads")
    model = load(nodes[0], 19, SHAPE, np.float32, [pads])
    model.graph.node.append(nodes[1])
    check_some_boxes(model, values(), identical=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_band_inside_reads_itself_and_one_at_the_border_little_more(mode: str) -> None:
    graph = mi.load(pad([0, 0, 3, 3, 0, 0, 3, 3], mode, shape=(1, 2, 60, 60)))
    op, whole = graph.ops[0], graph.whole("y")
    rule = rule_of(op)
    inside = rule.footprint(op, (whole.replace(2, Interval(20, 40)),), None)[0]
    first = rule.footprint(op, (whole.replace(2, Interval(0, 20)),), None)[0]
    assert inside is not None and first is not None
    assert inside[2] == Interval(17, 37)
    assert first[2].size <= (60 if mode == "wrap" else 17)


def test_reflecting_more_than_there_is_runs_whole() -> None:
    graph = mi.load(pad([0, 0, 0, 0, 0, 0, 6, 0], "reflect"))
    assert rule_of(graph.ops[0]) is not BARRIER
