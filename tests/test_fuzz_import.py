"""Whatever is done to a model, importing it ends as a graph or as ``InvalidInput``, soon and small.

Through the process in which a coordinator has onnxruntime work: 1 of 2500 mutants ends it.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import pytest
from architectures import Builder
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)  # fmt: skip

from cluster.importing import Importer
from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, InvalidInput
from meshinfer.importers import load

SIZES = (
    0, 1, -1, 2, 3, -2, 7, 64, 1000, 2**20, 2**28, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40,
    2**62, 2**63 - 1, -(2**63),
)  # fmt: skip
FLOATS = (0.0, -1.0, 1e38, -1e38, 1e-30, float("nan"), float("inf"))
TEXTS = (b"", b"NOTSET", b"SAME_UPPER", b"VALID", b"linear", b"reflect", b"\xff", b"x" * 1000)
OPERATORS = sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain == ""})
GROWTH_BYTES = 600 << 20
EXAMPLES = 4 * settings.default.max_examples if settings.default else 200


@pytest.fixture(scope="module")
def importer() -> Iterator[Importer]:
    made = Importer()
    yield made
    made.close()


# -- seeds -----------------------------------------------------------------------------------------


def convolutions() -> ModelProto:
    b = Builder(0)
    x = b.relu(b.bn(b.conv(b.input("x", [1, 4, 8, 8]), 4, 4, 3, groups=2), 4))
    x = b.add(b.conv(x, 4, 4, 3, auto_pad="SAME_UPPER"), b.maxpool(x, 3, 1, 1))
    weights = b.const(np.ones((4, 2, 2, 2), np.float32))
    x = b.op("ConvTranspose", [b.avgpool(x, 2, 2), weights], strides=[2, 2])
    return b.model([b.rename(b.gemm(b.flatten(b.gap(x)), 2, 3), "y")])


def layout() -> ModelProto:
    b = Builder(0)
    x = b.input("x", [1, 4, 6, 6])
    x = b.depth_to_space(b.space_to_depth(x, 2), 2)
    x = b.op("Pad", [x, b.const(np.array([0, 0, 1, 1, 0, 0, 1, 1]))])
    scales = b.const(np.array([1, 1, 1.5, 2], np.float32))
    x = b.op("Resize", [x, "", scales], mode="linear")
    ends = [b.const(np.array(v)) for v in ([0, 1], [9, 9], [2, 3], [1, 2])]
    x = b.op("Transpose", b.op("Slice", [x, *ends]), perm=[0, 2, 3, 1])
    parts = b.op("Split", [x, b.const(np.array([1, 3]))], 2, axis=3)
    x = b.op("Reshape", [b.concat(*parts, axis=3), b.const(np.array([0, -1, 2]))])
    x = b.op("Gather", [x, b.const(np.array([1, 0]))], axis=2)
    return b.model([b.rename(b.op("Softmax", x, axis=-1), "y")])


def constants() -> ModelProto:
    """What onnxruntime computes on import."""
    b = Builder(0)
    x = b.input("x", [1, 3])
    made = b.op("ConstantOfShape", b.const(np.array([2, 3])))
    made = b.op("Expand", [made, b.const(np.array([2, 2, 3]))])
    made = b.op("Tile", [made, b.const(np.array([1, 2, 1]))])
    made = b.op("Pad", [made, b.const(np.array([0, 0, 0, 1, 0, 0]))])
    ends = [b.const(np.array(v, np.float32)) for v in (0, 3, 1)]
    made = b.add(made, b.op("Range", ends))
    made = b.op("MatMul", [made, b.const(np.ones((3, 3), np.float32))])
    hot = [b.const(np.array(v)) for v in ([0, 2], 3, [0, 1])]
    top = b.op("ReduceMax", b.op("OneHot", hot), keepdims=0)
    made = b.add(made, b.op("Cast", top, to=TensorProto.FLOAT))
    return b.model([b.rename(b.add(x, b.op("ReduceMax", made, keepdims=0)), "y")])


def branches() -> ModelProto:
    b = Builder(0)
    x = b.input("x", [2, 3])
    value = helper.make_tensor_value_info("v", TensorProto.FLOAT, [2, 3])
    body = helper.make_graph([helper.make_node("Tanh", [x], ["v"])], "then", [], [value])
    above = b.op("Greater", [b.op("ReduceMean", x, keepdims=0), b.const(np.float32(0))])
    made = b.op("If", above, then_branch=body, else_branch=body)
    return b.model(
        [b.rename(b.op("LayerNormalization", [made, b.const(np.ones(3, np.float32))]), "y")]
    )


def quantised() -> ModelProto:
    b = Builder(0)
    scale, zero = b.const(np.float32(0.1)), b.const(np.uint8(128))
    x = b.op("QuantizeLinear", [b.input("x", [1, 2, 5, 5]), scale, zero])
    weights = b.const(np.ones((2, 2, 3, 3), np.uint8))
    x = b.op("QLinearConv", [x, scale, zero, weights, scale, zero, scale, zero])
    return b.model([b.rename(b.op("DequantizeLinear", [x, scale, zero]), "y")])


SEEDS = tuple(make() for make in (convolutions, layout, constants, branches, quantised))


# -- mutations -------------------------------------------------------------------------------------


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


class Mutator:
    """One change to a model, in place; every choice is ``choose``'s."""

    def __init__(self, model: ModelProto, choose: random.Random) -> None:
        self.model, self.r = model, choose
        found = list(graphs(model.graph))
        self.nodes = [n for g in found for n in g.node]
        self.attributes = [a for n in self.nodes for a in n.attribute]
        self.tensors = [t for g in found for t in g.initializer]
        self.values = [v for g in found for v in (*g.input, *g.output, *g.value_info)]
        self.names = [t.name for t in self.tensors] + [v.name for v in self.values]
        self.names += [name for n in self.nodes for name in n.output] + ["", "nowhere"]

    def mutate(self) -> None:
        kinds: Sequence[tuple[Callable[[], None], Sequence[object]]] = (
            (self.attribute, self.attributes), (self.attribute, self.attributes),
            (self.kind, self.attributes), (self.reads, self.nodes), (self.writes, self.nodes),
            (self.operator, self.nodes), (self.tensor, self.tensors),
            (self.element, self.tensors), (self.element, self.tensors),
            (self.value, self.values), (self.version, "v"), (self.order, self.nodes),
            (self.twice, self.nodes),
        )  # fmt: skip
        self.r.choice([change for change, of in kinds if of])()

    def attribute(self) -> None:
        a = self.r.choice(self.attributes)
        if a.type == AttributeProto.INT:
            a.i = self.r.choice(SIZES)
        elif a.type == AttributeProto.INTS and a.ints:
            at = self.r.randrange(len(a.ints))
            if self.r.random() < 0.2:
                del a.ints[at]
            elif self.r.random() < 0.2:
                a.ints.append(self.r.choice(SIZES))
            else:
                a.ints[at] = self.r.choice(SIZES)
        elif a.type == AttributeProto.FLOAT:
            a.f = self.r.choice(FLOATS)
        elif a.type == AttributeProto.STRING:
            a.s = self.r.choice(TEXTS)

    def kind(self) -> None:
        self.r.choice(self.attributes).type = self.r.randrange(12)

    def reads(self) -> None:
        node = self.r.choice(self.nodes)
        if node.input and self.r.random() < 0.6:
            node.input[self.r.randrange(len(node.input))] = self.r.choice(self.names)
        elif node.input and self.r.random() < 0.5:
            del node.input[self.r.randrange(len(node.input))]
        else:
            node.input.append(self.r.choice(self.names))

    def writes(self) -> None:
        node = self.r.choice(self.nodes)
        choice = self.r.randrange(4)
        if choice == 0 and node.output:
            node.output[self.r.randrange(len(node.output))] = self.r.choice(self.names)
        elif choice == 1 and node.output:
            del node.output[self.r.randrange(len(node.output))]
        elif choice == 2:
            node.output.append("another")
        elif node.attribute:
            del node.attribute[self.r.randrange(len(node.attribute))]

    def operator(self) -> None:
        self.r.choice(self.nodes).op_type = self.r.choice(OPERATORS)

    def tensor(self) -> None:
        t = self.r.choice(self.tensors)
        choice = self.r.randrange(5)
        if choice == 0 and t.dims:
            t.dims[self.r.randrange(len(t.dims))] = self.r.choice(SIZES)
        elif choice == 1:
            t.dims.append(self.r.choice(SIZES))
        elif choice == 2:
            t.raw_data = self.r.randbytes(self.r.choice((0, 1, 4, 8, 16)))
        elif choice == 3:
            t.data_type = self.r.randrange(28)
        else:
            t.data_location = TensorProto.EXTERNAL
            key = self.r.choice(("location", "offset", "length"))
            t.external_data.add(
                key=key, value=self.r.choice(("/etc/passwd", "../x", "-1", "9" * 40))
            )

    def element(self) -> None:
        t = self.r.choice(self.tensors)
        try:
            array = numpy_helper.to_array(t).copy()
        except Exception:
            return  # a mutation before this one broke it
        if array.size and array.dtype.kind in "iuf":
            values = SIZES if array.dtype.kind != "f" else (*FLOATS, 2.0**31, 2.0**40)
            flat = array.reshape(-1)
            with np.errstate(over="ignore", invalid="ignore"):
                flat[self.r.randrange(flat.size)] = np.array(self.r.choice(values)).astype(
                    flat.dtype
                )
            t.CopyFrom(numpy_helper.from_array(array, t.name))

    def value(self) -> None:
        tensor = self.r.choice(self.values).type.tensor_type
        if tensor.shape.dim and self.r.random() < 0.5:
            self.r.choice(tensor.shape.dim).dim_value = self.r.choice(SIZES)
        elif self.r.random() < 0.5:
            tensor.elem_type = self.r.randrange(30)
        else:
            tensor.shape.dim.add(dim_value=self.r.choice(SIZES))

    def version(self) -> None:
        if self.r.random() < 0.7:
            self.model.opset_import[0].version = self.r.choice((0, 1, 5, 9, 13, 22, 28, 99, -1))
        else:
            self.model.ir_version = self.r.choice((0, 1, 3, 4, 9, 14, 99))

    def order(self) -> None:
        nodes = list(self.model.graph.node)
        self.r.shuffle(nodes)
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def twice(self) -> None:
        self.model.graph.node.append(self.r.choice(self.nodes))


def mutant(seed: ModelProto, choose: random.Random) -> ModelProto:
    model = ModelProto()
    model.CopyFrom(seed)
    for _ in range(choose.choice((1, 1, 2, 4))):
        Mutator(model, choose).mutate()
    return model


# -- the property ----------------------------------------------------------------------------------


def imported(importer: Importer, model: ModelProto | bytes) -> bool:
    """Import it; whether it became a graph. Fails for any other end than that and InvalidInput."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        graph = load(model, through=importer)
        assert len(graph.digest) == 64
        assert all(op.outputs for op in graph.ops)
        refusal = None
    except InvalidInput as error:
        refusal = error
    assert refusal is None or (refusal.message and refusal.hint)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < GROWTH_BYTES, f"{grown} bytes"
    assert time.monotonic() - started < limits.IMPORT_S + 30
    return refusal is None


@pytest.mark.parametrize("seed", SEEDS, ids=lambda s: s.graph.node[0].op_type)
def test_a_seed_is_a_graph(importer: Importer, seed: ModelProto) -> None:
    assert imported(importer, seed)


@pytest.mark.timeout(3600)
@settings(max_examples=EXAMPLES)
@given(st.sampled_from(range(len(SEEDS))), st.integers(0, 2**32))
def test_a_changed_model_is_a_graph_or_refused(importer: Importer, seed: int, choice: int) -> None:
    imported(importer, mutant(SEEDS[seed], random.Random(choice)))


@pytest.mark.timeout(3600)
@settings(max_examples=EXAMPLES // 2)
@given(st.sampled_from(range(len(SEEDS))), st.integers(0, 2**32))
def test_flipped_bytes_are_a_graph_or_refused(importer: Importer, seed: int, choice: int) -> None:
    r = random.Random(choice)
    data = bytearray(SEEDS[seed].SerializeToString())
    for _ in range(r.randint(1, 6)):
        data[r.randrange(len(data))] = r.randrange(256)
    imported(importer, bytes(data[: r.choice((len(data), len(data), r.randrange(len(data))))]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_changed_operator_tests_are_graphs_or_refused(importer: Importer) -> None:
    """The ONNX project's own cases, their inputs made constants so that onnxruntime computes."""
    from onnx.backend.test.case.node import collect_testcases

    r = random.Random(0)
    cases = [c for c in collect_testcases(None) if c.model is not None and c.data_sets]
    for _ in range(10 * settings.default.max_examples if settings.default else 500):
        case = r.choice(cases)
        model = mutant(computable(case.model, case.data_sets[0][0], r), r)
        if model.ByteSize() < 200_000:
            imported(importer, model)


def computable(model: ModelProto, inputs: Sequence[object], choose: random.Random) -> ModelProto:
    """The model with some of its inputs as constants, so that onnxruntime computes on import."""
    made = ModelProto()
    made.CopyFrom(model)
    for value, array in zip(model.graph.input, inputs, strict=False):
        if isinstance(array, np.ndarray) and choose.random() < 0.6:
            made.graph.initializer.append(numpy_helper.from_array(array, value.name))
            made.graph.input.remove(value)
    return made


@pytest.mark.parametrize("op_type", ["ConstantOfShape", "Expand", "Tile", "Pad", "Range"])
@pytest.mark.parametrize("size", [2**24, 2**28, 2**31, 2**40, 2**62])
def test_a_giant_constant_is_never_made(importer: Importer, op_type: str, size: int) -> None:
    b = Builder(0)
    x, one = b.input("x", [1]), b.const(np.ones(1, np.float32))
    sizes = {"Pad": [size, 0]}.get(op_type, [size])
    inputs = {
        "ConstantOfShape": [b.const(np.array(sizes))],
        "Range": [b.const(np.float32(v)) for v in (0, size, 1)],
    }.get(op_type, [one, b.const(np.array(sizes))])
    made = b.op("ReduceMax", b.op(op_type, inputs), keepdims=0)
    graph = helper.make_graph(
        [*b.nodes, helper.make_node("Add", [x, made], ["y"])], "giant", b.inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [*b.initializers.values()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    started = time.monotonic()
    imported(importer, model)
    assert time.monotonic() - started < 20


def test_many_large_constants_end_at_the_bound_of_memory(importer: Importer) -> None:
    """Each may be folded, all together may not."""
    b = Builder(0)
    x = b.input("x", [1])
    shape = b.const(np.array([limits.FOLDED_BYTES // 4]))
    for i in range(40):
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [i])
        x = b.add(x, b.op("ReduceMax", b.op("ConstantOfShape", shape, value=value), keepdims=0))
    model = b.model([b.rename(x, "y")])
    started = time.monotonic()
    imported(importer, model)
    assert time.monotonic() - started < limits.IMPORT_S


def small(nodes: Sequence[NodeProto], *tensors: TensorProto, **more: object) -> ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(tensors))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **more)


def doubling(depth: int, *, again: bool = False) -> ModelProto:
    """Functions each of which calls the next one twice; ``again``: the last calls the first."""
    made = []
    for i in range(depth):
        function = FunctionProto(name=f"F{i}", domain="d", input=["a"], output=["b"])
        function.opset_import.extend([helper.make_opsetid("", 17), helper.make_opsetid("d", 1)])
        other = f"F{i + 1}" if i + 1 < depth else "F0"
        if i + 1 < depth or again:
            function.node.append(helper.make_node(other, ["a"], ["t"], domain="d"))
            function.node.append(helper.make_node(other, ["t"], ["b"], domain="d"))
        else:
            function.node.append(helper.make_node("Relu", ["a"], ["b"]))
        made.append(function)
    return small([helper.make_node("F0", ["x"], ["y"], domain="d")], functions=made)


def product(rows: int, columns: int, inner: int) -> ModelProto:
    """A product of two constants, as it is written in 200 bytes."""
    ends = [numpy_helper.from_array(np.array(v), n) for v, n in
            (([rows, inner], "m"), ([inner, columns], "n"))]  # fmt: skip
    nodes = [helper.make_node("Expand", ["one", n], [n + n]) for n in "mn"]
    nodes.append(helper.make_node("MatMul", ["mm", "nn"], ["p"]))
    nodes.append(helper.make_node("ReduceMax", ["p"], ["top"], keepdims=0))
    nodes.append(helper.make_node("Add", ["x", "top"], ["y"]))
    return small(nodes, numpy_helper.from_array(np.ones(1, np.float32), "one"), *ends)


def endless() -> ModelProto:
    """A loop of 2^62 turns over constants."""
    value = helper.make_tensor_value_info
    ends = [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, [])]
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Add", ["v", "v"], ["w"])],
        "body",
        [*ends, value("v", TensorProto.FLOAT, [1])],
        [value("d", TensorProto.BOOL, []), value("w", TensorProto.FLOAT, [1])],
    )
    loop = helper.make_node("Loop", ["turns", "on", "one"], ["l"], body=body)
    constants = (np.array(1 << 62), "turns"), (np.array(True), "on"), (np.ones(1, "f"), "one")
    tensors = [numpy_helper.from_array(array, name) for array, name in constants]
    return small([loop, helper.make_node("Add", ["x", "l"], ["y"])], *tensors)


def nested(depth: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on; in wire format, as ``onnx`` would
    not write it."""
    data = b""
    for field in (6, 5, 1) * depth + (7,):
        length, prefix = len(data), bytearray((field << 3 | 2,))
        while length > 127:
            prefix.append(length & 127 | 128)
            length >>= 7
        data = bytes((*prefix, length)) + data
    return data


@pytest.mark.parametrize(
    "model",
    [doubling(8), doubling(3, again=True), doubling(1, again=True), product(60_000, 60_000, 1),
     endless(), nested(20), nested(200), nested(5000)],
    ids=["functions", "circle", "itself", "product", "loop", "deep", "deeper", "deepest"],
)  # fmt: skip
def test_a_small_model_that_means_much_ends_soon(
    importer: Importer, model: ModelProto | bytes
) -> None:
    started = time.monotonic()
    imported(importer, model)
    assert time.monotonic() - started < 20


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "model", [doubling(31), product(8000, 8000, 8000)], ids=["functions", "product"]
)
def test_a_small_model_that_takes_for_ever_is_stopped(
    importer: Importer, model: ModelProto
) -> None:
    imported(importer, model)


def test_an_importer_that_was_killed_is_there_again() -> None:
    importer = Importer()
    try:
        importer._process.kill()
        assert imported(importer, SEEDS[0])
    finally:
        importer.close()
    with pytest.raises(ClusterUnavailable):
        load(SEEDS[0], through=importer)
