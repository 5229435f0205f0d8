"""Pools and LRN: any window, padded, rounded up, dilated or strided, in any box is the whole's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from boxes import check_any_boxes, check_neighbours, check_some_boxes, load
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper

import meshinfer as mi
from meshinfer.geometry import Interval
from meshinfer.ops import BARRIER, rule_of, why_barrier

FEW = settings(max_examples=max(5, settings().max_examples // 4))


def one(op: str, shape: tuple[int, ...], opset: int = 22, **attributes: Any) -> ModelProto:
    return load(helper.make_node(op, ["x"], ["y"], **attributes), opset, shape)


def values(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(shape, np.float32)}


@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize("op", ["AveragePool", "MaxPool", "LpPool"])
@FEW
@given(st.data())
def test_any_box_of_any_pool(op: str, dilated: bool, data: st.DataObject) -> None:
    def pair(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(2)]

    kernel, size = pair(1, 4), pair(1, 10)
    begins, ends = ([data.draw(st.integers(0, k - 1)) for k in kernel] for _ in range(2))
    dilations = pair(1, 3) if dilated else [1, 1]
    free = zip(size, begins, ends, kernel, dilations, strict=True)
    assume(all(s + b + e > (k - 1) * d for s, b, e, k, d in free))
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": pair(1, 5),
        "pads": [*begins, *ends],
        "ceil_mode": data.draw(st.integers(0, 1)),
    }
    if dilated:
        attributes["dilations"] = dilations
    if op == "AveragePool":
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
    if op == "LpPool":
        attributes["p"] = data.draw(st.integers(1, 3))
    shape = (1, 2, *size)
    model = one(op, shape, **attributes)
    why = [why_barrier(o) for o in mi.load(model).ops if rule_of(o) is BARRIER]
    assert why == [] or (dilated and attributes["ceil_mode"])
    check_any_boxes(model, values(shape), data)


@pytest.mark.parametrize("opset", [2, 11, 18])
def test_older_p_norms(opset: int) -> None:
    model = one("LpPool", (2, 2, 7, 6), opset, kernel_shape=[3, 2], strides=[2, 1], p=2)
    check_some_boxes(model, values((2, 2, 7, 6)))


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_local_response_normalisation_reads_a_halo_of_channels(size: int) -> None:
    shape = (1, 9, 4, 5)
    model = one("LRN", shape, size=size, alpha=0.3, beta=0.6, bias=1.5)
    check_some_boxes(model, values(shape))
    graph = mi.load(model)
    op, box = graph.ops[0], graph.whole("y").replace(1, Interval(4, 5))
    reads = rule_of(op).footprint(op, (box,), None)[0]
    assert reads is not None
    assert reads[1].size == size


@FEW
@given(st.data())
def test_response_normalisation_between_two_convolutions(data: st.DataObject) -> None:
    shape = (1, 6, 5, 5)
    check_neighbours(one("LRN", shape, size=3), values(shape), data)


@pytest.mark.parametrize("op", ["GlobalLpPool", "GlobalMaxPool"])
def test_global_pools(op: str) -> None:
    check_some_boxes(one(op, (2, 5, 4, 3), 13), values((2, 5, 4, 3)))
