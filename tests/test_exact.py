"""Any plan of any network gives plain onnxruntime's answer: random networks, random plans, one
oracle."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from architectures import Builder
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from net import Net
from networks import BARRIERS, HEADS, OPSETS, TILED, Network, networks
from onnx import ModelProto, TensorProto, helper
from plans import check_exact, check_text, check_transfers, plans

import meshinfer as mi
from meshinfer.geometry import Box, Interval, split_even
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.ops import BARRIER, rule_of
from meshinfer.plan import Plan, Shard, Stage, Task

MANY = settings(max_examples=8 * settings().max_examples)
PI = DeviceId("pi-1")


def check(network: Network, data: st.DataObject) -> None:
    """One drawn plan of a network passes every check."""
    graph = mi.load(network.model)
    plan = data.draw(plans(graph))
    mi.validate(graph, plan)
    check_text(plan)
    check_transfers(graph, plan)
    check_exact(network.model, graph, plan, network.inputs)


@MANY
@given(networks(), st.data())
def test_any_plan_of_any_network_is_exact(network: Network, data: st.DataObject) -> None:
    check(network, data)


@given(networks(barriers=False), st.data())
def test_two_plans_of_a_network_agree_to_the_last_step(
    network: Network, data: st.DataObject
) -> None:
    check(network, data)
    check(network, data)


BLOCKS = {block.__name__: block for block in (*TILED, *BARRIERS)}


@pytest.mark.parametrize("name", BLOCKS)
def test_any_plan_of_a_network_of_one_kind_of_block_is_exact(name: str) -> None:
    @settings(max_examples=max(5, settings().max_examples // 8))
    @given(st.data())
    def exact(data: st.DataObject) -> None:
        n = Net(data.draw, data.draw(st.sampled_from(OPSETS)))
        shape = (n.pick(1, 2), n.number(1, 5), n.number(1, 9), n.number(1, 9))
        x = n.input("image", shape)
        y = BLOCKS[name](n, n.op("Tanh", BLOCKS[name](n, x)))
        model = n.model([n.typed(y)])
        check(Network(model, {"image": n.rng.standard_normal(shape, np.float32)}), data)

    exact()


def test_the_networks_hold_every_operator_that_has_a_rule_of_its_own() -> None:
    """What is never drawn is never tested: counted, so that a block cannot fall out unseen."""
    tiled: Counter[str] = Counter()

    @seed(1)
    @settings(
        max_examples=400,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(networks())
    def count(network: Network) -> None:
        graph = mi.load(network.model)
        tiled.update(op.type for op in graph.ops if rule_of(op) is not BARRIER)

    count()
    wanted = (
        "Conv MaxPool AveragePool Gemm MatMul Concat Split Slice Transpose DepthToSpace Reshape "
        "BatchNormalization Softmax GlobalAveragePool GlobalMaxPool ReduceMean ReduceSum ReduceMax "
        "Flatten Unsqueeze Add Mul Sub PRelu LeakyRelu Clip Sigmoid Cast Greater SpaceToDepth"
    ).split()
    assert [name for name in wanted if tiled[name] == 0] == []
    assert len(HEADS) == 6


# -- single cases, each once a mistake ---------------------------------------------------------


def whole_stage(graph: Graph, shards: list[Shard]) -> Plan:
    """All ops in one stage, all shards in one task, besides the other outputs as a whole."""
    live = [v for v in graph.live_outputs(0, len(graph.ops)) if v not in {s.value for s in shards}]
    outputs = (*shards, *(Shard(v, graph.whole(v)) for v in live))
    stage = Stage(0, len(graph.ops), (Task((PI,), outputs),))
    return Plan(graph.digest, PI, PI, (stage,))


def check_shards(model: ModelProto, shape: tuple[int, ...], shards: list[Shard]) -> None:
    graph = mi.load(model)
    plan = whole_stage(graph, shards)
    mi.validate(graph, plan)
    check_transfers(graph, plan)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    check_exact(model, graph, plan, {"x": values})


def test_an_input_that_is_an_output_keeps_its_name_and_goes_to_the_sink() -> None:
    b = Builder(0)
    x = b.input("x", [2, 3])
    same = helper.make_tensor_value_info(x, TensorProto.FLOAT, [2, 3])
    check_shards(b.model([b.rename(b.relu(x), "y"), same]), (2, 3), [])


def test_one_task_may_hold_complete_and_partial_shards_of_a_value() -> None:
    b = Builder(0)
    y = b.op("MatMul", [b.input("x", [4, 6]), b.const(np.ones((6, 2), np.float32))])
    model = b.model([b.rename(y, "y")])
    halves = [Shard("y", Box.of((0, 2), (0, 2)), Box.of(half)) for half in ((0, 3), (3, 6))]
    check_shards(model, (4, 6), [*halves, Shard("y", Box.of((2, 4), (0, 2)))])


@pytest.mark.parametrize("opset", [9, 17])
def test_one_task_may_hold_all_parts_of_a_sum(opset: int) -> None:
    """Two nodes of one name were refused; C of a Gemm is required before opset 11."""
    b = Builder(0, opset)
    model = b.model([b.rename(b.gemm(b.input("x", [3, 8]), 8, 5), "y")])
    parts = [Shard("y", Box.of((0, 3), (0, 5)), Box((r,))) for r in split_even(8, 3)]
    check_shards(model, (3, 8), parts)


def test_a_partial_sum_over_outputs_that_read_only_padding_is_cropped() -> None:
    b = Builder(0)
    x = b.input("x", [1, 4, 3, 3])
    model = b.model([b.rename(b.conv(x, 4, 2, 2, pads=3, bias=True), "y")])
    whole = mi.load(model).whole("y")
    first, rest = whole.replace(2, Interval(0, 1)), whole.replace(2, Interval(1, whole[2].stop))
    parts = [Shard("y", box, Box((r,))) for r in split_even(4, 2) for box in (first, rest)]
    check_shards(model, (1, 4, 3, 3), parts)


def test_a_value_without_elements_crosses_a_cut() -> None:
    b = Builder(0)
    bounds = [b.const(np.array([n])) for n in (2, 2, 1)]
    empty = b.op("Relu", b.op("Slice", [b.input("x", [1, 4, 2]), *bounds]))
    model = b.model([b.rename(b.op("Concat", [empty, "x"], axis=1), "y"), b.rename(empty, "none")])
    graph = mi.load(model)
    stages = []
    for i in range(len(graph.ops)):
        live = graph.live_outputs(i, i + 1)
        stages.append(
            Stage(i, i + 1, (Task((PI,), tuple(Shard(v, graph.whole(v)) for v in live)),))
        )
    plan = Plan(graph.digest, PI, PI, tuple(stages))
    check_transfers(graph, plan)
    check_exact(model, graph, plan, {"x": np.ones((1, 4, 2), np.float32)})


def test_a_scalar_weight_stays_a_scalar() -> None:
    """A weight of one axis instead of none gave Gather's result one axis more."""
    b = Builder(0)
    row = b.op("Gather", [b.relu(b.input("x", [3, 4])), b.const(np.array(1))], axis=0)
    check_shards(b.model([b.rename(row, "y")]), (3, 4), [])


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("opset", [13, 17])
def test_a_layer_normalization_is_split_along_its_other_axes(opset: int, axis: int) -> None:
    """Before opset 17 it is one that onnxruntime's optimiser makes of means and differences."""
    b = Builder(0, opset)
    x, shape = b.input("x", [2, 5, 6]), (2, 5, 6)
    scale, bias = (b.const(np.linspace(0.5, 1.5, 6, dtype=np.float32)) for _ in range(2))
    if opset >= 17:
        y = b.op("LayerNormalization", [x, scale, bias], axis=axis)
    else:
        axes = list(range(axis % 3, 3))
        apart = b.op("Sub", [x, b.op("ReduceMean", x, axes=axes)])
        square = b.op("Pow", [apart, b.const(np.array(2, np.float32))])
        variance = b.op("ReduceMean", square, axes=axes)
        deviation = b.op("Sqrt", b.op("Add", [variance, b.const(np.array(1e-5, np.float32))]))
        y = b.add(b.op("Mul", [b.op("Div", [apart, deviation]), scale]), bias)
    model = b.model([b.rename(y, "y")])
    graph = mi.load(model)
    assert all(rule_of(op) is not BARRIER for op in graph.ops)
    whole = graph.whole("y")
    for cut in (0, 1, 2):
        parts = [whole.replace(cut, part) for part in split_even(shape[cut], 2)]
        check_shards(model, shape, [Shard("y", part) for part in parts])
