"""Quantised models tile as they are, bit for bit: from onnxruntime's quantiser, and drawn ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import oracle
import pytest
from architectures import Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from net import FLOAT, MICROSOFT, Net
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from plans import check_text, check_transfers, plans
from test_planner import PI0, devices

import meshinfer as mi
from meshinfer.geometry import Interval, split_weighted
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.importers.quantised import arrange
from meshinfer.ops import BARRIER, rule_of, why_barrier
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.planner import axes_of, make_plan
from meshinfer.planner.estimate import clean_cuts

SHAPE = (1, 3, 30, 27)
UINT8, INT8 = TensorProto.UINT8, TensorProto.INT8


def load(model: ModelProto) -> Graph:
    return mi.load(model).as_strict()


def assert_same_bits(model: ModelProto, graph: Graph, plan: Plan, inputs: Any) -> None:
    mi.validate(graph, plan)
    answer = mi.run_plan(graph, plan, inputs)
    assert oracle.assert_exact(model, inputs, answer), "within the tolerance, but not bit for bit"


# -- models from onnxruntime's quantiser -----------------------------------------------------------


def small_cnn() -> ModelProto:
    """Residual block, depthwise convolution, squeeze and excite, both pools, concat, classifier."""
    b = Builder(3)
    y = b.relu(b.bn(b.conv(b.input("x", SHAPE), 3, 8, 3, 1, 1), 8))
    z = b.relu(b.bn(b.conv(y, 8, 8, 3, 1, 1), 8))
    z = b.bn(b.conv(z, 8, 8, 3, 1, 1), 8)
    y = b.relu(b.add(y, z))
    d = b.clip(b.bn(b.conv(y, 8, 8, 3, 1, 1, groups=8), 8), 0, 6)
    s = b.relu(b.conv(b.gap(d), 8, 4, 1))
    d = b.op("Mul", [d, b.op("Sigmoid", b.conv(s, 4, 8, 1))])
    window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    c = b.concat(b.op("MaxPool", d, **window), b.op("AveragePool", d, **window))
    c = b.leaky_relu(b.conv(c, 16, 12, 3, 2, 1))
    out = b.op("Softmax", b.gemm(b.flatten(b.gap(c)), 12, 5), axis=1)
    return b.model([b.rename(out, "classes"), b.rename(c, "map")])


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Random pictures from which the quantiser learns ranges."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.pictures: Iterator[dict[str, np.ndarray]] = iter(
            [{"x": rng.standard_normal(SHAPE, np.float32)} for _ in range(3)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.pictures, None)


@cache
def int8_model(kind: str, signed: bool, per_channel: bool, folded: bool) -> ModelProto:
    """``folded``: BatchNormalization is folded before the quantiser sees the model, as it asks."""
    logging.getLogger().setLevel(logging.ERROR)
    with TemporaryDirectory() as name:
        given, made = Path(name) / "given.onnx", Path(name) / "made.onnx"
        onnx.save(small_cnn(), given)
        if folded:
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.optimized_model_filepath = str(given)
            ort.InferenceSession(small_cnn().SerializeToString(), options)
        if kind == "dynamic":
            weights = QuantType.QInt8 if signed else QuantType.QUInt8
            quantize_dynamic(given, made, weight_type=weights, per_channel=per_channel)
        else:
            quantize_static(
                given,
                made,
                Calibration(),
                quant_format=QuantFormat[kind],
                per_channel=per_channel,
                activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        return onnx.load(made)


def bands(graph: Graph, shares: list[float]) -> Plan:
    """Row bands of these shares, cut by hand at every clean cut; what has no rows runs whole."""
    axes = axes_of(graph)
    stages = []
    for start, stop in pairwise([0, *clean_cuts(graph, axes), len(graph.ops)]):
        tasks: dict[int, list[Shard]] = {}
        for value in graph.live_outputs(start, stop):
            axis, whole = axes.of(value, "rows"), graph.whole(value)
            if axis is None:
                tasks.setdefault(0, []).append(Shard(value, whole))
                continue
            for i, part in enumerate(split_weighted(whole[axis].size, shares)):
                if part.size:
                    tasks.setdefault(i, []).append(Shard(value, whole.replace(axis, part)))
        found = [Task((DeviceId(f"pi-{i}"),), tuple(tasks[i])) for i in sorted(tasks)]
        stages.append(Stage(start, stop, tuple(found)))
    return Plan(graph.digest, PI0, PI0, tuple(stages))


# (format, int8 activations, a scale for each channel, BatchNormalization folded before);
# of the dynamic ones unsigned weights only: onnxruntime has no ConvInteger of int8 weights.
KINDS = [
    ("QDQ", False, False, True),
    ("QDQ", False, True, False),
    ("QDQ", True, False, False),
    ("QDQ", True, True, True),
    ("QOperator", False, True, True),
    ("QOperator", True, False, False),
    ("dynamic", False, False, True),
    ("dynamic", False, False, False),
]


@pytest.mark.parametrize(("kind", "signed", "per_channel", "folded"), KINDS)
def test_an_int8_model_of_the_quantiser_tiles_bit_for_bit(
    kind: str, signed: bool, per_channel: bool, folded: bool
) -> None:
    model = int8_model(kind, signed, per_channel, folded)
    graph = load(model)
    x = {"x": np.random.default_rng(5).standard_normal(SHAPE, np.float32)}
    planned = make_plan(graph, devices(3), PI0, PI0, spread=True).plan
    assert len(planned.devices()) == 3
    by_hand = bands(graph, [5, 3, 2])
    assert len(planned.stages) > 3 and len(by_hand.stages) > 5
    for plan in (planned, by_hand):
        assert_same_bits(model, graph, plan, x)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])
def test_no_map_of_an_int8_model_meets_a_barrier(kind: tuple[str, bool, bool, bool]) -> None:
    """Of a fully connected layer's input the scale is computed whole."""
    graph = load(int8_model(*kind))
    barriers = [op for op in graph.ops if rule_of(op) is BARRIER]
    assert all(op.type == "DynamicQuantizeLinear" and len(op.shape()) == 2 for op in barriers)
    assert all("smallest" in why_barrier(op) for op in barriers)


def test_only_quantised_values_cross_a_clean_cut_of_a_quantised_model() -> None:
    """The answers apart, which are floats: a skip connection's is dequantised where it is read."""
    graph = load(int8_model(*KINDS[3]))
    cuts = clean_cuts(graph, axes_of(graph))
    assert len(cuts) > 10
    for cut in cuts:
        alive = [name for name in graph.live(cut) if name not in graph.outputs]
        assert {graph.numpy_dtype(name) for name in alive} <= {np.dtype("uint8"), np.dtype("int8")}


@pytest.mark.parametrize("kind", [KINDS[3], KINDS[6]], ids=lambda kind: kind[0])
def test_arranging_a_model_again_changes_nothing(kind: tuple[str, bool, bool, bool]) -> None:
    graph = load(int8_model(*kind))
    digest = graph.digest
    arrange(graph.model)
    assert Graph(graph.model, graph.sums).digest == digest


# -- drawn networks of quantised operators ---------------------------------------------------------
# Their sums are of integers and what is rounded is rounded once, so that all plans agree in bits.


class Quantised(Net):
    """A Net whose values are all uint8 or all int8, with scales that keep them in range."""

    def __init__(self, draw: st.DrawFn) -> None:
        # onnxruntime 1.32 refuses a Slice behind DequantizeLinear of int8 at opset 21, anywhere:
        # its QDQPropagation and QDQS8ToU8 make a QuantizeLinear of two different types.
        signed, opset = draw(st.sampled_from(((True, 17), (False, 17), (False, 21))))
        super().__init__(draw, opset)
        self.element = np.int8 if signed else np.uint8
        self.quantised_by: dict[str, tuple[list[str], dict[str, int]]] = {}

    def scale(self, *shape: int) -> str:
        return self.const((self.rng.random(shape) * 0.04 + 0.02).astype(np.float32))

    def point(self, *shape: int, element: Any = None) -> str:
        element = element or self.element
        low = 100 if element == np.uint8 else -20
        return self.const(self.rng.integers(low, low + 40, shape).astype(element))

    def pair(self) -> list[str]:
        return [self.scale(), self.point()]

    def quantise(self, y: str, pair: list[str], axes: dict[str, int]) -> str:
        """Remembered: onnxruntime takes it for granted that a pair undoes what it did."""
        x = str(self.op("QuantizeLinear", [y, *pair], **axes))
        self.quantised_by[x] = (pair, axes)
        return x

    def bytes(self, *shape: int, element: Any = None) -> str:
        info = np.iinfo(element or self.element)
        values = self.rng.integers(info.min, info.max, shape, endpoint=True)
        return self.const(values.astype(info.dtype))

    def made(self, name: str, shape: tuple[int, ...], element: Any = None) -> str:
        """What onnx cannot type: an output of an operator of onnxruntime's."""
        dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(element or self.element))
        return self.know(name, shape, dtype)

    def microsoft(
        self, kind: str, inputs: list[str], shape: Any, element: Any = None, **a: Any
    ) -> str:
        name = Builder.op(self, kind, inputs, domain=MICROSOFT, **a)
        return self.made(name, tuple(shape), element)


def windowed(n: Quantised, x: str) -> dict[str, Any]:
    k = [n.number(1, min(3, s)) for s in n.shape[x][2:]]
    pads = [n.number(0, a - 1) for a in (*k, *k)]
    return {"kernel_shape": k, "pads": pads, "strides": [n.number(1, 2), n.number(1, 2)]}


def weights(n: Quantised, x: str, attributes: dict[str, Any], element: Any) -> tuple[str, int]:
    channels = n.shape[x][1]
    groups = n.pick(1, channels)
    attributes["group"] = groups
    out = groups * n.number(1, 3)
    shape = (out, channels // groups, *attributes["kernel_shape"])
    return n.bytes(*shape, element=element), out


def qlinear_conv(n: Quantised, x: str) -> str:
    attributes = windowed(n, x)
    element = np.int8 if n.element == np.int8 else n.pick(np.int8, np.uint8)
    w, out = weights(n, x, attributes, element)
    each = (out,) if n.coin() else ()
    points = n.const(np.zeros(each, element)) if each else n.point(element=element)
    inputs = [x, *n.pair(), w, n.scale(*each), points, *n.pair()]
    bias = [n.const(n.rng.integers(-5000, 5000, out).astype(np.int32))] if n.coin() else []
    return str(n.op("QLinearConv", [*inputs, *bias], **attributes))


def conv_integer(n: Quantised, x: str) -> str:
    """Of unsigned values; its int32 sums are scaled and quantised again."""
    if n.element == np.int8:
        return qlinear_conv(n, x)
    attributes = windowed(n, x)
    w, _ = weights(n, x, attributes, np.uint8)
    points = n.pick([], [n.point()], [n.point(), n.point()], ["", n.point()])
    y = n.op("ConvInteger", [x, w, *points], **attributes)
    y = n.op("Mul", [n.op("Cast", y, to=FLOAT), n.const(np.float32(2**-12))])
    return n.quantise(y, n.pair(), {})


def requantise(n: Quantised, x: str) -> str:
    """With a scale for all, for each slice of an axis, or for each block of one."""
    axis, shape = n.pick(1, 2, 3, -1, -3), list(n.shape[x])
    scales: tuple[int, ...] = ()
    axes = {}
    kind = n.pick("all", "each", "blocks" if n.opset >= 21 else "each")
    if kind == "each":
        scales, axes = (shape[axis],), {"axis": axis}
    elif kind == "blocks":
        block = n.number(1, shape[axis])
        shape[axis] = -(-shape[axis] // block)
        scales, axes = tuple(shape), {"axis": axis % 4, "block_size": block}
    given = n.quantised_by.get(x, ([n.scale(*scales), *n.pick([], [n.point(*scales)])], axes))
    y = n.op("DequantizeLinear", [x, *given[0]], **given[1])
    return n.quantise(y, [n.scale(*scales), n.point(*scales)], axes)


def pointwise(n: Quantised, x: str) -> str:
    batch, c, h, w = shape = n.shape[x]
    kind = n.pick("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearWhere")
    if kind in ("QLinearSigmoid", "QLinearLeakyRelu"):
        return n.microsoft(kind, [x, *n.pair(), *n.pair()], shape)
    other = n.bytes(*n.pick((), (c, 1, 1), (w,), (h, 1), (batch, c, h, w)))
    if kind == "QLinearWhere":
        mask = n.const(n.rng.random((c, 1, w)) < 0.5)
        return n.microsoft(kind, [mask, x, *n.pair(), other, *n.pair(), *n.pair()], shape)
    operands = [[x, *n.pair()], [other, *n.pair()]]
    if n.coin():
        operands.reverse()
    return n.microsoft(kind, [*operands[0], *operands[1], *n.pair()], shape)


def squeeze(n: Quantised, x: str) -> str:
    """A global mean, multiplied back."""
    shape = n.shape[x]
    y = n.microsoft("QLinearGlobalAveragePool", [x, *n.pair(), *n.pair()], (*shape[:2], 1, 1))
    return n.microsoft("QLinearMul", [x, *n.pair(), y, *n.pair(), *n.pair()], shape)


def qlinear_pool(n: Quantised, x: str) -> str:
    attributes = windowed(n, x)
    if n.coin():
        return str(n.op("MaxPool", x, **attributes))
    size = [
        (s + attributes["pads"][i] + attributes["pads"][i + 2] - k) // d + 1
        for i, (s, k, d) in enumerate(
            zip(n.shape[x][2:], attributes["kernel_shape"], attributes["strides"], strict=True)
        )
    ]
    counted = {"count_include_pad": n.number(0, 1)}
    shape = (*n.shape[x][:2], *size)
    return n.microsoft(
        "QLinearAveragePool", [x, *n.pair(), *n.pair()], shape, **attributes, **counted
    )


def qlinear_concat(n: Quantised, x: str) -> str:
    axis = n.pick(1, 2, 3, -1)
    shape = list(n.shape[x])
    shape[axis] *= 2
    other = n.op("Transpose", n.op("Transpose", x, perm=[1, 0, 2, 3]), perm=[1, 0, 2, 3])
    return n.microsoft(
        "QLinearConcat", [*n.pair(), x, *n.pair(), other, *n.pair()], shape, axis=axis
    )


def qlinear_softmax(n: Quantised, x: str) -> str:
    point = n.const(n.element(0 if n.element == np.uint8 else -128))
    scale = n.const(np.float32(1 / 256))
    axis = n.pick(1, 2, 3, -1)
    inputs = [x, *n.pair(), scale, point]
    return n.microsoft("QLinearSoftmax", inputs, n.shape[x], axis=axis, opset=n.pick(11, 13))


BLOCKS = (
    qlinear_conv, conv_integer, requantise, pointwise, squeeze, qlinear_pool, qlinear_concat,
    qlinear_softmax,
)  # fmt: skip


def products(n: Quantised, x: str) -> str:
    """One of the matrix products; ``x`` is [batch, channels, rows, k]."""
    batch, c, h, k = n.shape[x]
    cols = n.number(1, 5)
    each = n.pick((), (cols,))
    kind = n.pick("QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm")
    signed = np.int8 if n.element == np.int8 else n.pick(np.int8, np.uint8)
    if kind == "QGemm":
        flat = n.op("Reshape", [x, n.ints(-1, k)])
        transposed = n.number(0, 1)
        w = n.bytes(*((cols, k) if transposed else (k, cols)), element=signed)
        bias = n.pick([""], [n.const(n.rng.integers(-500, 500, cols).astype(np.int32))])
        rest = n.pick([], n.pair())
        inputs = [flat, *n.pair(), w, n.scale(*each), n.const(np.zeros(each, signed)), *bias, *rest]
        element = n.element if rest else np.float32
        return n.microsoft(kind, inputs, (batch * c * h, cols), element, transB=transposed)
    w = n.bytes(k, cols, element=signed)
    point = n.const(np.zeros(each, signed))
    if kind == "QLinearMatMul":
        return str(n.op(kind, [x, *n.pair(), w, n.scale(*each), point, *n.pair()]))
    if kind == "MatMulInteger":
        return str(n.op(kind, [x, w, *n.pick([], [n.point()], [n.point(), point])]))
    bias = n.pick([], [n.normal(cols)])
    inputs = [x, w, n.scale(), n.scale(*each), n.point(), point, *bias]
    return n.microsoft(kind, inputs, (batch, c, h, cols), np.float32)


def drawn(data: st.DataObject, blocks: tuple[Any, ...]) -> tuple[ModelProto, dict[str, Any]]:
    n = Quantised(data.draw)
    shape = (n.pick(1, 2), n.number(1, 4), n.number(1, 9), n.number(1, 9))
    x = n.input("x", shape, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(n.element)))
    for _ in range(n.number(1, 3)):
        x = n.pick(*blocks)(n, x)
    info = np.iinfo(n.element)
    pixels = n.rng.integers(info.min, info.max, shape, endpoint=True).astype(n.element)
    return n.model([n.typed(x), *([n.typed(products(n, x))] if n.coin() else [])]), {"x": pixels}


def check_any_plan(data: st.DataObject, model: ModelProto, inputs: dict[str, Any]) -> None:
    graph = load(model)
    assert [why_barrier(op) for op in graph.ops if why_barrier(op)] == []
    plan = data.draw(plans(graph))
    check_text(plan)
    mi.validate(graph, plan)
    check_transfers(graph, plan)
    assert_same_bits(model, graph, plan, inputs)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_any_plan_of_a_quantised_operator_gives_the_same_bits(block: Any) -> None:
    @settings(max_examples=max(8, settings().max_examples // 8))
    @given(st.data())
    def same(data: st.DataObject) -> None:
        check_any_plan(data, *drawn(data, (block,)))

    same()


@settings(max_examples=max(20, settings().max_examples // 2))
@given(st.data())
def test_any_plan_of_a_network_of_quantised_operators_gives_the_same_bits(
    data: st.DataObject,
) -> None:
    check_any_plan(data, *drawn(data, BLOCKS))


# -- single cases ----------------------------------------------------------------------------------


def in_parts(graph: Graph, axis: int, parts: int) -> Plan:
    """All in one stage, each output in even parts along an axis."""
    tasks: dict[int, list[Shard]] = {}
    for name in graph.outputs:
        whole = graph.whole(name)
        for i, part in enumerate(split_weighted(whole[axis].size, [1.0] * parts)):
            tasks.setdefault(i, []).append(Shard(name, whole.replace(axis, part)))
    stage = Stage(0, len(graph.ops), tuple(Task((PI0,), tuple(t)) for t in tasks.values()))
    return Plan(graph.digest, PI0, PI0, (stage,))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_product_that_quantises_on_the_way_is_split_along_its_columns(axis: int) -> None:
    b = Builder(2)
    weight = b.const(b.rng.integers(-99, 99, (6, 7)).astype(np.int8))
    scale = b.const((b.rng.random(7) * 0.1).astype(np.float32))
    inputs = [b.input("x", [2, 5, 6]), weight, scale, b.const(np.zeros(7, np.int8))]
    bias = b.const(b.rng.standard_normal(7).astype(np.float32))
    y = b.op("DynamicQuantizeMatMul", [*inputs, bias], domain=MICROSOFT)
    model = b.model([onnx.helper.make_tensor_value_info(y, FLOAT, [2, 5, 7])])
    graph = load(model)
    assert rule_of(graph.ops[0]).split(graph.ops[0]) == (2,)
    x = {"x": np.random.default_rng(0).standard_normal((2, 5, 6), np.float32)}
    assert_same_bits(model, graph, in_parts(graph, axis, 2), x)


@pytest.mark.parametrize("value", [0.0, -1.5, None])
def test_the_scale_of_a_dynamic_quantisation_is_that_of_all_rows(value: float | None) -> None:
    """Where all elements are equal, too: a range without a width has the scale 1."""
    b = Builder(2)
    y = b.op("DynamicQuantizeLinear", b.input("x", [1, 3, 8, 5]), 3)
    model = b.model(list(y))
    graph = load(model)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 5), np.float32)
    x = x if value is None else np.full_like(x, value)
    assert_same_bits(model, graph, bands(graph, [3, 1, 2]), {"x": x})


def test_a_crop_behind_int8_without_a_zero_point_keeps_negative_values() -> None:
    """onnxruntime put a QuantizeLinear of uint8 behind the crop."""
    b = Builder(2)
    scale = b.const(np.float32(0.05))
    y = b.op("DequantizeLinear", [b.input("x", [1, 2, 6, 4], INT8), scale])
    model = b.model([b.rename(y, "y")])
    graph = load(model)
    top, middle, end = (
        Shard("y", graph.whole("y").replace(2, Interval(*rows)))
        for rows in ((0, 1), (1, 5), (5, 6))
    )
    stage = Stage(0, 1, (Task((PI0,), (top, end)), Task((PI0,), (middle,))))
    x = np.random.default_rng(0).integers(-128, 128, (1, 2, 6, 4)).astype(np.int8)
    assert_same_bits(model, graph, Plan(graph.digest, PI0, PI0, (stage,)), {"x": x})


@pytest.mark.parametrize("element", [np.uint16, np.int16])
def test_a_model_of_sixteen_bits_tiles_bit_for_bit(element: type) -> None:
    b = Builder(2, 21)
    pair = [b.const(np.float32(0.001)), b.const(element(7))]
    weight = b.const(b.rng.integers(-60, 60, (4, 3, 3, 3)).astype(np.int8))
    weight = b.op("DequantizeLinear", [weight, b.const(np.float32(0.01)), b.const(np.int8(0))])
    x = b.op("QuantizeLinear", [b.input("x", [1, 3, 9, 8]), *pair])
    y = b.op("Conv", [b.op("DequantizeLinear", [x, *pair]), weight], pads=[1, 1, 1, 1])
    y = b.op("DequantizeLinear", [b.op("QuantizeLinear", [y, *pair]), *pair])
    model = b.model([b.rename(y, "y")])
    graph = load(model)
    arrays = {"x": np.random.default_rng(0).standard_normal((1, 3, 9, 8), np.float32)}
    assert_same_bits(model, graph, bands(graph, [3, 1, 2]), arrays)


def test_types_that_numpy_lacks_are_barriers_that_say_so() -> None:
    b = Builder(2, 21)
    zero = onnx.helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    b.initializers["zero"] = zero
    pair = [b.const(np.float32(0.1)), "zero"]
    x = b.op("QuantizeLinear", [b.input("x", [1, 3]), *pair])
    graph = load(b.model([b.rename(b.op("DequantizeLinear", [x, *pair]), "y")]))
    assert {why_barrier(op) for op in graph.ops} == {
        "numpy has no FLOAT8E4M3FN, so that it cannot be cut"
    }
