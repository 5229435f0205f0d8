"""Operators that pick, repeat or order elements by index: any box is plain onnxruntime's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import oracle
import pytest
from architectures import Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto
from plans import check_text, check_transfers, plans

import meshinfer as mi
from meshinfer.geometry import Box, Interval, split_even
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.ops import BARRIER, rule_of, why_barrier
from meshinfer.plan import Plan, Shard, Stage, Task

PI = DeviceId("pi-1")
INT64 = TensorProto.INT64


def ints(b: Builder, values: Any) -> str:
    return b.const(np.array(values, np.int64))


def whole_numbers(b: Builder, name: str, shape: list[int], low: int, high: int) -> str:
    """An int64 input; ``inputs_of`` reads its range from the name."""
    return b.input(f"{name}:{low}:{high}", shape, INT64)


def gather(axis: int, indices: Any, shape: tuple[int, ...] = (3, 5, 4)) -> Callable[[Builder], str]:
    return lambda b: b.op("Gather", [b.input("x", shape), ints(b, indices)], axis=axis)


def embedding(b: Builder) -> str:
    table = b.const(b.rng.standard_normal((11, 6)).astype(np.float32))
    return b.op("Gather", [table, whole_numbers(b, "words", [2, 5], -11, 11)])


def large_gather(b: Builder) -> str:
    """More indices than are read as a constant."""
    return b.op("Gather", [b.input("x", [4, 3]), ints(b, b.rng.integers(0, 4, (40, 30)))])


def elements(axis: int) -> Callable[[Builder], str]:
    shape = [3, 2, 4]
    return lambda b: b.op(
        "GatherElements",
        [b.input("x", [3, 5, 4]), whole_numbers(b, "places", [3, 5, 4], -shape[axis] + 1, 2)],
        axis=axis,
    )


def gather_nd(batch: int) -> Callable[[Builder], str]:
    return lambda b: b.op(
        "GatherND",
        [b.input("x", [2, 3, 4, 5]), whole_numbers(b, "places", [2, 3, 2], -2, 2)],
        **({"batch_dims": batch} if batch else {}),
    )


def scatter(axis: int, size: tuple[int, ...]) -> Callable[[Builder], str]:
    def build(b: Builder) -> str:
        places = np.stack([b.rng.permutation(4)[: size[axis]] for _ in range(64)])
        fitted = np.resize(places, (*size[:axis], *size[axis + 1 :], size[axis]))
        updates = b.input("updates", list(size))
        x = b.input("x", [4, 5, 4])
        return b.op(
            "ScatterElements", [x, ints(b, np.moveaxis(fitted, -1, axis)), updates], axis=axis
        )

    return build


def scatter_nd(b: Builder) -> str:
    places = ints(b, [[0, 1], [2, 3], [-1, -4]])
    return b.op("ScatterND", [b.input("x", [3, 4, 5, 2]), places, b.input("updates", [3, 5, 2])])


def expand(b: Builder) -> str:
    return b.op("Expand", [b.input("x", [3, 1, 4]), ints(b, [2, 1, 5, 1])])


def tile(b: Builder) -> str:
    return b.op("Tile", [b.input("x", [2, 3, 4]), ints(b, [1, 3, 2])])


def trilu(upper: int, k: int | None) -> Callable[[Builder], str]:
    def build(b: Builder) -> str:
        inputs = [b.input("x", [2, 5, 7]), *([] if k is None else [ints(b, k)])]
        return b.op("Trilu", inputs, upper=upper)

    return build


def cumsum(axis: int, **attributes: int) -> Callable[[Builder], str]:
    return lambda b: b.op("CumSum", [b.input("x", [3, 5, 4]), ints(b, axis)], **attributes)


def reverse(batch: int, time: int) -> Callable[[Builder], str]:
    return lambda b: b.op(
        "ReverseSequence",
        [b.input("x", [4, 4, 3]), ints(b, [1, 4, 2, 3])],
        batch_axis=batch,
        time_axis=time,
    )


def arg(kind: str, axis: int, keep: int, last: int = 0) -> Callable[[Builder], str]:
    return lambda b: b.op(
        kind, b.input("x", [3, 5, 4]), axis=axis, keepdims=keep, select_last_index=last
    )


def top(axis: int, largest: int = 1) -> Callable[[Builder], Any]:
    return lambda b: b.op(
        "TopK", [b.input("x", [3, 5, 4]), ints(b, [2])], 2, axis=axis, largest=largest
    )


def one_hot(axis: int) -> Callable[[Builder], str]:
    return lambda b: b.op(
        "OneHot",
        [
            whole_numbers(b, "classes", [3, 4], -6, 6),
            ints(b, 6),
            b.const(np.array([-1, 2], np.float32)),
        ],
        axis=axis,
    )


def hardmax(axis: int) -> Callable[[Builder], str]:
    return lambda b: b.op("Hardmax", b.input("x", [3, 5, 4]), axis=axis)


CASES: dict[str, Callable[[Builder], Any]] = {
    "gather a row": gather(0, 1),
    "gather rows backwards": gather(1, [4, 2, 0]),
    "gather a matrix of columns": gather(-1, [[0, -1, 2], [3, 3, 1]]),
    "gather a cube": gather(1, np.arange(8).reshape(2, 2, 2) % 5),
    "embedding": embedding,
    "gather many": large_gather,
    "gather elements, first axis": elements(0),
    "gather elements, last axis": elements(-1),
    "gather nd": gather_nd(0),
    "gather nd in a batch": gather_nd(1),
    "scatter elements": scatter(0, (2, 5, 4)),
    "scatter fewer elements": scatter(2, (3, 2, 3)),
    "scatter nd": scatter_nd,
    "expand": expand,
    "tile": tile,
    "upper triangle": trilu(1, None),
    "upper triangle above": trilu(1, 2),
    "lower triangle below": trilu(0, -1),
    "cumulative sum": cumsum(1),
    "cumulative sum backwards": cumsum(-1, reverse=1, exclusive=1),
    "reverse sequence": reverse(0, 1),
    "reverse sequence, time first": reverse(1, 0),
    "largest": arg("ArgMax", 1, 1),
    "smallest, dropped": arg("ArgMin", -1, 0, 1),
    "largest of the first, dropped": arg("ArgMax", 0, 0),
    "top": top(1),
    "bottom": top(-1, 0),
    "one hot": one_hot(-1),
    "one hot, axis 0": one_hot(0),
    "hardmax": hardmax(-1),
    "hardmax of channels": hardmax(1),
}


def built(name: str, opset: int = 17) -> ModelProto:
    b = Builder(7, opset)
    made = CASES[name](b)
    return b.model([made] if isinstance(made, str) else list(made))


def inputs_of(model: ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    found = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == INT64:
            _, low, high = value.name.split(":")
            found[value.name] = rng.integers(int(low), int(high), shape)
        else:  # few different values, so that there are ties
            found[value.name] = (rng.integers(-4, 5, shape) / 2).astype(np.float32)
    return found


def split_along(whole: Box, axes: tuple[int, ...], parts: int) -> list[Box]:
    boxes = [whole]
    for axis in axes:
        ranges = [r for r in split_even(whole[axis].size, parts) if r.size]
        boxes = [box.replace(axis, r) for box in boxes for r in ranges]
    return boxes


def assert_boxes(model: ModelProto, graph: Graph, boxes: dict[str, list[Box]]) -> None:
    """One task a box, all outputs' boxes of one position in one task."""
    count = max(len(found) for found in boxes.values())
    tasks = [
        Task((PI,), tuple(Shard(n, found[i]) for n, found in boxes.items() if i < len(found)))
        for i in range(count)
    ]
    plan = Plan(graph.digest, PI, PI, (Stage(0, len(graph.ops), tuple(tasks)),))
    mi.validate(graph, plan)
    inputs = inputs_of(model)
    assert oracle.assert_exact(model, inputs, mi.run_plan(graph, plan, inputs))


@pytest.mark.parametrize("name", CASES)
def test_an_operator_follows_a_rule_in_two_and_three_parts_along_each_axis_and_pair(
    name: str,
) -> None:
    model = built(name)
    graph = mi.load(model)
    assert [why_barrier(op) for op in graph.ops if rule_of(op) is BARRIER] == []
    rank = len(graph.whole(graph.outputs[0]))
    for axes in [(a,) for a in range(rank)] + list(combinations(range(rank), 2)):
        for parts in (2, 3) if len(axes) == 1 else (2,):
            assert_boxes(
                model, graph, {n: split_along(graph.whole(n), axes, parts) for n in graph.outputs}
            )


@pytest.mark.parametrize("name", CASES)
def test_single_elements_can_be_asked_for(name: str) -> None:
    """The first, a middle and the last element, and the rest of the value around them."""
    model = built(name)
    graph = mi.load(model)
    boxes: dict[str, list[Box]] = {}
    for value in graph.outputs:
        rest, found = graph.whole(value), []
        for axis, size in enumerate(rest.shape):  # peel one element off the middle of each axis
            at = rest[axis].start + size // 2
            for a, b in ((rest[axis].start, at), (at + 1, rest[axis].stop)):
                if a < b:
                    found.append(rest.replace(axis, Interval(a, b)))
            rest = rest.replace(axis, Interval(at, at + 1))
        boxes[value] = [*found, rest]
    assert_boxes(model, graph, boxes)


@settings(max_examples=max(40, settings().max_examples))
@given(st.data())
def test_any_plan_of_these_operators_gives_the_same_bits(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CASES)))
    model = built(name, data.draw(st.sampled_from((17, 21))))
    graph = mi.load(model)
    plan = data.draw(plans(graph))
    check_text(plan)
    mi.validate(graph, plan)
    check_transfers(graph, plan)
    inputs = inputs_of(model)
    assert oracle.assert_exact(model, inputs, mi.run_plan(graph, plan, inputs))


def test_constant_indices_tell_how_much_is_read() -> None:
    graph = mi.load(built("gather rows backwards"))
    op = graph.ops[0]
    box = graph.whole(graph.outputs[0]).replace(1, Interval(1, 3))
    assert rule_of(op).footprint(op, (box,), None)[0] == Box.of((0, 3), (0, 3), (0, 4))


def test_what_a_rule_cannot_cut_says_why() -> None:
    b = Builder(0)
    axis, x = b.input("axis", [], INT64), b.input("x", [2, 3])
    model = b.model([b.op("CumSum", [x, axis]), b.op("Trilu", [x, axis]), b.op("NonZero", x)])
    whys = {op.type: why_barrier(op) for op in mi.load(model).ops}
    assert whys["CumSum"] == "its axis is computed"
    assert whys["Trilu"] == "its diagonal is computed"
    assert whys["NonZero"] == "NonZero has no rule"
