"""The exactness check can fail: it catches each mistake planted on one small model, and finds no
other.

Each mistake patches one thing, as a slip in the code would, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import Builder
from onnx import ModelProto
from plans import check_exact

import meshinfer as mi
from meshinfer import executor, lower, mapreduce
from meshinfer.geometry import Box, Interval, Window, split_even
from meshinfer.graph import Graph, Op
from meshinfer.identity import DeviceId
from meshinfer.ops import TABLE, Boxes, layout, matmul, rule_of
from meshinfer.plan import Plan, Shard, Stage, Task

Array = np.ndarray[Any, Any]


def network() -> ModelProto:
    """Padded convs, a padded max-pool and mean with negative values, a mean over all, two Gemms."""
    b = Builder(3)
    x = b.conv(b.input("image", [1, 3, 13, 13]), 3, 6, 3)
    x = b.maxpool(x, 3, 1, 1)
    x = b.silu(b.conv(x, 6, 6, 3, pads=[1, 0, 2, 1]))
    x = b.avgpool(x, 3, 1, 1, count_include_pad=True)
    x = b.rename(b.conv(x, 6, 6, 1), "map")
    y = b.gemm(b.relu(b.gemm(b.flatten(b.gap(x)), 6, 60)), 60, 5)
    return b.model([x, b.rename(y, "logits")])


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return network()


def image() -> dict[str, Array]:
    """Mostly negative, so that a zero for padding wins a maximum."""
    rng = np.random.default_rng(4)
    return {"image": (rng.standard_normal((1, 3, 13, 13)) - 0.3).astype(np.float32)}


def tiled(graph: Graph) -> Plan:
    """A stage an op. Two tasks hold every other band of rows or channels; sums are in two parts."""
    stages = []
    for op in graph.ops:
        (name,) = graph.live_outputs(op.index, op.index + 1)
        summed = rule_of(op).reduction(op) is not None and small(graph, name)
        shards = parts_of(graph, op) if summed else bands(graph, name)
        tasks = tuple(
            Task((DeviceId(f"pi-{i}"),), tuple(held))
            for i, held in enumerate((shards[::2], shards[1::2]))
        )
        stages.append(Stage(op.index, op.index + 1, tasks))
    return Plan(graph.digest, DeviceId("pi-0"), DeviceId("pi-1"), tuple(stages))


def small(graph: Graph, name: str) -> bool:
    """A vector, or a map of one place."""
    return len(graph.whole(name)) < 3 or graph.whole(name)[2].size == 1


def bands(graph: Graph, name: str) -> list[Shard]:
    whole = graph.whole(name)
    axis = 1 if small(graph, name) else 2
    return [Shard(name, whole.replace(axis, part)) for part in split_even(whole[axis].size, 4)]


def parts_of(graph: Graph, op: Op) -> list[Shard]:
    """The whole value as two parts of its sum, each in two slices of its channels."""
    (name,) = op.outputs
    over, slices = rule_of(op).reduction(op), split_even(graph.whole(name)[1].size, 2)
    assert over is not None
    return [
        Shard(name, graph.whole(name).replace(1, columns), over.replace(0, half))
        for half in split_even(over[0].size, 2)
        for columns in slices
    ]


def check(model: ModelProto) -> None:
    """What the property test checks; the graph is new, since it remembers digests of weights."""
    graph = mi.load(model)
    check_exact(model, graph, tiled(graph), image())


Plant = Callable[[pytest.MonkeyPatch], None]


def short_halo(patch: pytest.MonkeyPatch) -> None:
    """The last row of the halo is missing: emitted as padding instead."""
    right, padding = Window.footprint, Window.padding

    def footprint(self: Window, out: Interval) -> Interval:
        box = right(self, out)
        inner = box.stop < self.size and box.size > 1
        return Interval(box.start, box.stop - 1) if inner else box

    def pads(self: Window, out: Interval) -> tuple[int, int]:
        begin, end = padding(self, out)
        return begin, end + right(self, out).stop - footprint(self, out).stop

    patch.setattr(Window, "footprint", footprint)
    patch.setattr(Window, "padding", pads)


def zeros_in_max_pool(patch: pytest.MonkeyPatch) -> None:
    """The padding of a max-pool is made of zeros before it, not of minus infinity by it."""

    def edit(nodes: list[onnx.NodeProto], self: Any) -> None:
        for i, node in enumerate(nodes):
            if node.op_type != "MaxPool":
                continue
            pads = next(a for a in node.attribute if a.name == "pads")
            b0, b1, e0, e1 = pads.ints
            pads.ints[:] = [0, 0, 0, 0]
            padded = self.fresh("padded")
            amounts = self.ints([0, 0, b0, b1, 0, 0, e0, e1])
            nodes.insert(i, onnx.helper.make_node("Pad", [node.input[0], amounts], [padded]))
            node.input[0] = padded
            return

    edited_submodels(patch, edit)


def dropped_bias(patch: pytest.MonkeyPatch) -> None:
    """A Conv loses its bias."""

    def edit(nodes: list[onnx.NodeProto], self: Any) -> None:
        for node in nodes:
            if node.op_type == "Conv" and len(node.input) == 3:
                del node.input[2]

    edited_submodels(patch, edit)


def edited_submodels(
    patch: pytest.MonkeyPatch, edit: Callable[[list[onnx.NodeProto], Any], None]
) -> None:
    right = lower._Lowering._model

    def model(self: Any, *arguments: Any) -> onnx.ModelProto:
        edit(self.nodes, self)
        return right(self, *arguments)

    patch.setattr(lower._Lowering, "_model", model)


def doubled_part(patch: pytest.MonkeyPatch) -> None:
    """The first part of a sum is added twice."""
    patched_reduce(patch, lambda pieces: [*pieces, pieces[0]] if over(pieces) else pieces)


def lost_part(patch: pytest.MonkeyPatch) -> None:
    """The last part of a sum never arrives, and nobody notices."""
    patched_reduce(patch, lambda pieces: pieces[:-1] if over(pieces) else pieces)


def swapped_tiles(patch: pytest.MonkeyPatch) -> None:
    """Two tiles of one shape change places at the merge."""

    def swap(pieces: Sequence[tuple[Shard, Array]]) -> list[tuple[Shard, Array]]:
        first, second, *_ = [*pieces, None, None]
        if over(pieces) or first is None or second is None or first[1].shape != second[1].shape:
            return list(pieces)
        return [(first[0], second[1]), (second[0], first[1]), *pieces[2:]]

    patched_reduce(patch, swap)


def over(pieces: Sequence[tuple[Shard, Array]]) -> bool:
    return pieces[0][0].over is not None


def patched_reduce(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    right = mapreduce.reduce
    patch.setattr(executor, "reduce", lambda box, pieces: right(box, change(pieces)))


def bias_in_every_part(patch: pytest.MonkeyPatch) -> None:
    """Each part of a Gemm's sum adds the bias, not the first alone."""
    right = matmul.GEMM.footprint

    def footprint(op: Op, outs: Boxes, part: Box | None) -> Boxes:
        return (*right(op, outs, part)[:2], right(op, outs, None)[2])

    patch.setitem(TABLE, "Gemm", replace(matmul.GEMM, footprint=footprint))


def crop_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """A crop lies one element too early where it can."""
    right = layout.slice_node

    def slice_node(e: Any, source: str, target: str, starts: Any, stops: Any, *more: Any) -> None:
        early = [(a - 1, b - 1) if a > 0 else (a, b) for a, b in zip(starts, stops, strict=True)]
        right(e, source, target, [a for a, _ in early], [b for _, b in early], *more)

    patch.setattr(layout, "slice_node", slice_node)


def stale_weights(patch: pytest.MonkeyPatch) -> None:
    """A channel slice of a weight is that of another box: the first channels, for every task."""
    right = Graph.weight_bytes

    def weight_bytes(self: Graph, value: str, box: Box) -> memoryview:
        return right(self, value, box.replace(0, Interval(0, box[0].size)))

    patch.setattr(Graph, "weight_bytes", weight_bytes)


def uncounted_padding(patch: pytest.MonkeyPatch) -> None:
    """An average at the edge does not count its padding."""

    def edit(nodes: list[onnx.NodeProto], self: Any) -> None:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.name == "count_include_pad":
                    attribute.i = 0

    edited_submodels(patch, edit)


PLANTS: tuple[Plant, ...] = (
    short_halo,
    zeros_in_max_pool,
    dropped_bias,
    doubled_part,
    lost_part,
    swapped_tiles,
    bias_in_every_part,
    crop_off_by_one,
    stale_weights,
    uncounted_padding,
)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_mistake_gives_a_wrong_answer_that_is_caught(
    plant: Plant, model: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"error .* > tolerance"):
        check(model)


def test_without_a_mistake_the_same_plan_is_exact(model: ModelProto) -> None:
    check(model)


def test_the_plan_has_all_that_a_mistake_can_break(model: ModelProto) -> None:
    graph = mi.load(model)
    shards = [s for stage in tiled(graph).stages for task in stage.tasks for s in task.outputs]
    assert any(shard.over is not None for shard in shards)
    kinds = {op.type for op in graph.ops}
    assert {"Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "Gemm"} <= kinds
