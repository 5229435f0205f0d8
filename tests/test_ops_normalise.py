"""Normalisations, reductions and products are exact in any parts, at every opset and as far as
float32 goes."""

from __future__ import annotations

from itertools import product
from typing import Any

import backend
import numpy as np
import pytest
from architectures import Builder
from onnx import ModelProto, TensorProto, helper
from oracle import assert_exact, error, reference
from plans import check_exact

import meshinfer as mi
from meshinfer.geometry import split_even
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.ops import BARRIER, rule_of
from meshinfer.ops import reduce as reductions
from meshinfer.plan import Plan, Shard, Stage, Task

PI = DeviceId("pi-1")
C = 4


def in_bands(graph: Graph, parts: int, sums: bool = True) -> Plan:
    """A stage an operator: maps in bands of rows, statistics as sums over bands, else whole."""
    stages: list[Stage] = []
    for op in graph.ops:
        live = graph.live_outputs(op.index, op.index + 1)
        shards = [shard for name in live for shard in bands(graph, name, parts, sums)]
        if shards:
            start = stages[-1].stop if stages else 0
            tasks = tuple(Task((PI,), (shard,)) for shard in shards)
            stages.append(Stage(start, op.index + 1, tasks))
    return Plan(graph.digest, PI, PI, tuple(stages))


def bands(graph: Graph, name: str, parts: int, sums: bool) -> list[Shard]:
    op, whole = graph.ops[graph.producer[name]], graph.whole(name)
    over = rule_of(op).reduction(op) if sums else None
    if over is not None and over[-2:][0].size >= parts:
        axis = max(len(over) - 2, 0)
        ranges = split_even(over[axis].size, parts)
        return [Shard(name, whole, over.replace(axis, part)) for part in ranges]
    axis = len(whole) - 2
    if len(whole) < 3 or whole[axis].size < parts:
        return [Shard(name, whole)]
    return [Shard(name, whole.replace(axis, r)) for r in split_even(whole[axis].size, parts)]


def model_of(op_type: str, opset: int, shape: tuple[int, ...], **attrs: Any) -> ModelProto:
    """A normalisation of x with scale and bias, their size by the operator's rules."""
    groups = op_type == "GroupNormalization" and opset < 21
    b = Builder(0, 21 if groups else opset)  # onnx's checker refuses the one of opset 18 by now
    x = b.input("x", shape)
    size = attrs["num_groups"] if groups else shape[1]
    scale = b.const(np.linspace(0.5, 1.5, size, dtype=np.float32))
    bias = b.const(np.linspace(-1, 1, size, dtype=np.float32))
    inputs = [x, scale, bias] if op_type.startswith(("Instance", "Group")) else [x]
    y = b.rename(b.op(op_type, inputs, **attrs), "y")
    if op_type == "GroupNormalization":  # onnx does not infer its type
        model = b.model([helper.make_tensor_value_info(y, TensorProto.FLOAT, shape)])
        model.opset_import[0].version = opset
        return model
    return b.model([y])


def as_rows(opset: int, shape: tuple[int, ...], groups: int) -> ModelProto:
    """Group normalisation as torch exports it before opset 21; the groups are an output too."""
    b = Builder(0, opset)
    rows = b.op("Reshape", [b.input("x", shape), b.const(np.array([0, groups, -1]))])
    ones = [b.const(np.full(groups, value, np.float32)) for value in (1, 0)]
    normal = b.op("InstanceNormalization", [rows, *ones])
    y = b.op("Reshape", [normal, b.const(np.array([0, shape[1], *shape[2:]]))])
    y = b.op("Mul", [y, b.const(np.linspace(0.5, 1.5, shape[1], dtype=np.float32)[:, None, None])])
    return b.model([b.rename(y, "y")])


def values(shape: tuple[int, ...], mean: float = 1, deviation: float = 1) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(1).standard_normal(shape)
    return {"x": (noise * deviation + mean).astype(np.float32)}


NORMALISATIONS = {
    "instance-11": ("InstanceNormalization", 11, {}),
    "instance-21": ("InstanceNormalization", 21, {}),
    "group-18": ("GroupNormalization", 18, {"num_groups": 2}),
    "group-21": ("GroupNormalization", 21, {"num_groups": 2}),
}


# -- statistics over rows, rows in bands ---------------------------------------------------------


@pytest.mark.parametrize("kind", NORMALISATIONS)
@pytest.mark.parametrize("parts", [1, 3, 5])
@pytest.mark.parametrize("shape", [(1, C, 7, 9), (2, C, 8, 5)])
def test_rows_are_cut_though_the_statistics_are_over_rows(
    kind: str, parts: int, shape: tuple[int, ...]
) -> None:
    op_type, opset, attrs = NORMALISATIONS[kind]
    model = model_of(op_type, opset, shape, **attrs)
    graph = mi.load(model)
    assert all(rule_of(op) is not BARRIER for op in graph.ops)
    last = graph.ops[-1]
    assert len(shape) - 2 in rule_of(last).split(last)
    check_exact(model, graph, in_bands(graph, parts), values(shape))


@pytest.mark.parametrize("opset", [13, 18])
def test_groups_that_were_reshaped_to_rows_keep_their_rows_and_columns(opset: int) -> None:
    shape = (2, 6, 7, 8)
    model = as_rows(opset, shape, 3)
    graph = mi.load(model)
    ranks = {len(graph.whole(name)) for name in graph.produced(0, len(graph.ops))}
    assert 3 not in ranks, "a value whose rows and columns are one axis"
    check_exact(model, graph, in_bands(graph, 3), values(shape))


def test_all_normalisations_of_a_chain_are_taken_apart() -> None:
    """onnx does not infer what a GroupNormalization makes, so not what lies behind it either."""
    b, shape = Builder(0, 21), (1, 4, 6, 7)
    y = b.input("x", shape)
    chain: list[tuple[str, dict[str, int]]]
    chain = [("Group", {"num_groups": 2}), ("Instance", {}), ("Group", {"num_groups": 4})]
    for op_type, attrs in chain:
        ones = [b.const(np.linspace(0.5, 1.5, 4, dtype=np.float32)) for _ in range(2)]
        y = b.relu(b.op(f"{op_type}Normalization", [y, *ones], **attrs))
    out = helper.make_tensor_value_info(b.rename(y, "y"), TensorProto.FLOAT, shape)
    weights = list(b.initializers.values())
    # Not by b.model, which infers all types.
    body = helper.make_graph(b.nodes, "chain", b.inputs, [out], weights)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    graph = mi.load(model)
    assert all(rule_of(op) is not BARRIER for op in graph.ops)
    assert "InstanceNormalization" not in {op.type for op in graph.ops}
    check_exact(model, graph, in_bands(graph, 3), values(shape))


def test_groups_as_rows_are_still_there_for_who_else_reads_them() -> None:
    model = as_rows(17, (1, 4, 6, 6), 2)
    normal = model.graph.node[1]
    model.graph.output.append(helper.make_tensor_value_info(normal.output[0], 1, [1, 2, 72]))
    graph = mi.load(model)
    check_exact(model, graph, in_bands(graph, 2), values((1, 4, 6, 6)))


@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("size", [31, 181, 400])
@pytest.mark.parametrize("kind", ["instance-21", "group-18", "group-21"])
def test_large_maps_far_from_zero_stay_within_the_tolerance(
    kind: str, size: int, mean: float
) -> None:
    """Deviation 0.1: at mean 5 the rounding of a mean grows fifty times."""
    op_type, opset, attrs = NORMALISATIONS[kind]
    model = model_of(op_type, opset, (1, C, size, size), **attrs)
    graph = mi.load(model)
    inputs = values((1, C, size, size), mean, 0.1)
    check_exact(model, graph, in_bands(graph, 3), inputs)


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_with_whole_statistics_the_bits_are_nearly_those_of_the_kernel(kind: str) -> None:
    op_type, opset, attrs = NORMALISATIONS[kind]
    model = model_of(op_type, opset, (1, C, 64, 64), **attrs)
    inputs = values((1, C, 64, 64), 5, 0.1)
    graph = mi.load(model)
    made = mi.run_plan(graph, in_bands(graph, 4, sums=False), inputs)
    assert error(made["y"], reference(model, inputs)["y"]) < 2e-6


def summed_apart(graph: Graph) -> list[bool]:
    return [
        rule_of(op).reduction(op) is not None
        for op in graph.ops
        if op.type in ("ReduceMean", "GlobalAveragePool")
    ]


def test_only_means_that_can_bear_it_are_summed_in_parts() -> None:
    small, large = (1, C, 64, 64), (1, C, 256, 256)
    instance = [mi.load(model_of("InstanceNormalization", 17, s)) for s in (small, large)]
    assert [summed_apart(g) for g in instance] == [[True, True], [False, True]]
    group = mi.load(model_of("GroupNormalization", 21, small, num_groups=2))
    assert summed_apart(group) == [False, False]
    pool = [mi.load(model_of("GlobalAveragePool", 17, (1, C, n, n))) for n in (512, 513)]
    assert [summed_apart(g) for g in pool] == [[True], [False]]
    assert reductions.CENTRING_ELEMENTS < 256 * 256 < reductions.PARTIAL_ELEMENTS


@pytest.mark.parametrize(
    ("op_type", "wrong"),
    [
        ("GroupNormalization", "inputs"),
        ("GroupNormalization", "scale"),
        ("InstanceNormalization", "inputs"),
        ("InstanceNormalization", "scale"),
    ],
)
def test_a_malformed_normalisation_is_refused_in_words(op_type: str, wrong: str) -> None:
    attrs = {"num_groups": 2} if op_type.startswith("Group") else {}
    model = model_of(op_type, 21, (1, C, 3, 3), **attrs)
    node = next(n for n in model.graph.node if n.op_type == op_type)
    if wrong == "inputs":
        del node.input[2]
    else:
        for tensor in model.graph.initializer:
            tensor.CopyFrom(helper.make_tensor(tensor.name, 1, [7], [0.0] * 7))
    with pytest.raises(mi.InvalidInput):
        mi.load(model)


def test_half_precision_keeps_its_node_and_is_cut_along_channels() -> None:
    b = Builder(0, 17)
    x = b.op("Cast", b.input("x", [1, C, 5, 5]), to=10)
    ones = [b.const(np.linspace(0.5, 1, C, dtype=np.float16)) for _ in range(2)]
    y = b.op("Cast", b.op("InstanceNormalization", [x, *ones]), to=1)
    model = b.model([b.rename(y, "y")])
    case = backend.own("half", model, values((1, C, 5, 5)))
    assert backend.run(case).how == "passed"
    graph = mi.load(model)
    assert "InstanceNormalization" in {op.type for op in graph.ops}


# -- single operators, by the harness: every tiling, single elements, partial sums -----------------


def passes(model: ModelProto, inputs: dict[str, np.ndarray]) -> None:
    outcome = backend.run(backend.own("own", model, inputs))
    assert outcome.how == "passed", outcome


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("asked", [(0,), (0, 1), (1, 2), (0, 1, 2)])
def test_a_layer_normalization_is_cut_with_its_statistics(
    axis: int, asked: tuple[int, ...]
) -> None:
    b = Builder(0, 17)
    shape = (2, 3, 4)
    tail = shape[axis:]
    x, scale, bias = b.input("x", shape), *(b.const(np.ones(tail, np.float32)) for _ in range(2))
    made = b.op("LayerNormalization", [x, scale, bias], 3, axis=axis)
    model = b.model([b.rename(made[i], f"y{i}") for i in asked])
    passes(model, values(shape))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [1, -1])
def test_an_lp_normalization_keeps_its_axis_whole(axis: int, p: int) -> None:
    passes(model_of("LpNormalization", 17, (2, 3, 4), axis=axis, p=p), values((2, 3, 4)))


@pytest.mark.parametrize("axes", [(0, 2, 3), (1, 2, 3)])
def test_a_mean_variance_normalization_keeps_its_axes_whole(axes: tuple[int, ...]) -> None:
    shape = (2, 3, 4, 5)
    passes(model_of("MeanVarianceNormalization", 13, shape, axes=axes), values(shape))


@pytest.mark.parametrize("opset", [9, 11, 13, 21])
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 1, 2])
def test_a_softmax_of_any_opset_keeps_its_axes_whole(
    kind: str, opset: int, axis: int | None
) -> None:
    attrs = {} if axis is None else {"axis": axis}
    passes(model_of(kind, opset, (2, 3, 4), **attrs), values((2, 3, 4)))


REDUCTIONS = "Mean Sum Max Min Prod L1 L2 SumSquare LogSum LogSumExp".split()


@pytest.mark.parametrize("opset", [9, 13, 18])
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_a_reduction_of_any_opset_is_cut_along_what_it_keeps(kind: str, opset: int) -> None:
    as_input = opset >= (13 if kind == "Sum" else 18)
    for axes, keepdims in product(((1,), (-1, 0), None), (0, 1)):
        b = Builder(0, opset)
        x = b.input("x", (2, 3, 5))
        inputs, attrs = [x], {"keepdims": keepdims}
        if axes is not None and as_input:
            inputs.append(b.const(np.array(axes)))
        elif axes is not None:
            attrs["axes"] = list(axes)
        model = b.model([b.rename(b.op(f"Reduce{kind}", inputs, **attrs), "y")])
        noise = np.random.default_rng(0).random((2, 3, 5), np.float32)
        passes(model, {"x": noise + np.float32(0.5)})


@pytest.mark.parametrize("noop", [0, 1])
@pytest.mark.parametrize("given", [True, False])
def test_a_reduction_without_axes_reduces_all_or_nothing(noop: int, given: bool) -> None:
    b = Builder(0, 18)
    inputs = [b.input("x", (2, 3, 5)), *([b.const(np.zeros(0, np.int64))] if given else [])]
    y = b.op("ReduceSum", inputs, noop_with_empty_axes=noop, keepdims=1)
    passes(b.model([b.rename(b.op("Neg", y), "y")]), values((2, 3, 5)))


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 4, 3)])
def test_a_global_pool_is_cut_along_batch_and_channels(kind: str, shape: tuple[int, ...]) -> None:
    passes(model_of(kind, 17, shape), values(shape))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((5,), (5,)),
        ((5,), (5, 3)),
        ((4, 5), (5,)),
        ((5,), (2, 5, 3)),
        ((2, 1, 4, 5), (5,)),
        ((2, 1, 4, 5), (3, 5, 2)),
    ],
)
def test_a_product_with_vectors_is_cut_and_summed_in_parts(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    b = Builder(0, 17)
    y = b.op("MatMul", [b.input("x", left), b.input("w", right)])
    other = np.random.default_rng(2).standard_normal(right, np.float32)
    passes(b.model([b.rename(y, "y")]), {**values(left), "w": other})


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nchw,dc->ndhw", [(1, 3, 4, 5), (6, 3)]),
        ("bhid,bhjd->bhij", [(2, 2, 3, 4), (2, 2, 5, 4)]),
        ("ij, jk", [(3, 4), (4, 2)]),
        ("ijk->kj", [(2, 3, 4)]),
        ("ij->", [(3, 4)]),
        ("bi,ij,bj->b", [(2, 3), (3, 4), (2, 4)]),
        ("zya,a", [(2, 3, 4), (4,)]),
        ("iij->ij", [(3, 3, 2)]),
    ],
)
def test_an_einsum_is_cut_along_its_letters(equation: str, shapes: list[tuple[int, ...]]) -> None:
    b, rng = Builder(0, 17), np.random.default_rng(3)
    names = [b.input(f"x{i}", shape) for i, shape in enumerate(shapes)]
    model = b.model([b.rename(b.op("Einsum", names, equation=equation), "y")])
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    passes(model, dict(zip(names, arrays, strict=True)))


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_a_product_over_nothing_is_zeros(kind: str) -> None:
    b = Builder(0, 17)
    y = b.op(kind, [b.input("x", (3, 0)), b.const(np.zeros((0, 2), np.float32))])
    model = b.model([b.rename(y, "y")])
    graph = mi.load(model)
    inputs = {"x": np.zeros((3, 0), np.float32)}
    plan = backend.one_task(graph)
    assert_exact(model, inputs, mi.run_plan(graph, plan, inputs))


def test_half_precision_products_are_never_summed_in_parts() -> None:
    b = Builder(0, 17)
    x = b.op("Cast", b.input("x", (4, 6)), to=10)
    y = b.op("MatMul", [x, b.const(np.ones((6, 2), np.float16))])
    graph = mi.load(b.model([b.rename(b.op("Cast", y, to=1), "y")]))
    products = [op for op in graph.ops if op.type == "MatMul"]
    half = [op for op in products if graph.numpy_dtype(op.outputs[0]) == np.float16]
    assert all(rule_of(op).reduction(op) is None for op in half)
