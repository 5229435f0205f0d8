"""What people have becomes a graph, or ``InvalidInput`` that says what to do next."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import Builder
from onnx import ModelProto, TensorProto, helper, numpy_helper
from plans import check_exact

import meshinfer as mi
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.image import ImageSpec
from meshinfer.importers import check_image, open_model
from meshinfer.plan import Plan, Shard, Stage, Task

PI = DeviceId("pi-1")
Array = np.ndarray[Any, Any]


def on_one_device(graph: Graph) -> Plan:
    live = graph.live_outputs(0, len(graph.ops))
    task = Task((PI,), tuple(Shard(v, graph.whole(v)) for v in live))
    return Plan(graph.digest, PI, PI, (Stage(0, len(graph.ops), (task,)),))


def run(graph: Graph, **inputs: Array) -> dict[str, Array]:
    return mi.run_plan(graph, on_one_device(graph), inputs)


def refused(why: str, call: Callable[[], object]) -> None:
    with pytest.raises(InvalidInput, match=why) as caught:
        call()
    assert caught.value.hint


def dense(rows: int | str = 2) -> ModelProto:
    b = Builder(0)
    return b.model([b.rename(b.gemm(b.input("x", [rows, 300]), 300, 4), "y")])


# -- refusals ------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(dense().SerializeToString()[:1500])
    refused("half.onnx is no ONNX model, or is truncated", lambda: mi.load(path))


@pytest.mark.parametrize("data", [b"", b"\x00" * 40, b"GIF89a" * 30])
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    refused("no ONNX model|holds no graph", lambda: mi.load(data))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused("cannot read .*none.onnx", lambda: mi.load(tmp_path / "none.onnx"))


def test_a_thing_that_is_no_model_is_refused() -> None:
    refused("int is no model", lambda: mi.load(3))  # type: ignore[arg-type]


def test_an_unknown_operator_is_refused_in_onnxruntimes_words() -> None:
    model = dense()
    model.graph.node[0].op_type = "Gemmm"
    refused("onnxruntime .* refuses the model: .*Gemmm", lambda: mi.load(model))


def test_a_dynamic_shape_must_be_given() -> None:
    refused(r"'x' has the dynamic shape \['n', 300\]", lambda: mi.load(dense("n")))
    graph = mi.load(dense("n"), shapes={"x": (5, 300)})
    assert run(graph, x=np.ones((5, 300), np.float32))["y"].shape == (5, 4)
    assert mi.load(dense("n"), {"x": np.ones((7, 300), np.float32)}).shape("y") == (7, 4)


@pytest.mark.parametrize("shape", [(2, 299), (2,), (2, 300, 1), (-1, 300)])
def test_a_shape_that_the_model_does_not_have_is_refused(shape: tuple[int, ...]) -> None:
    refused("'x' has shape .* the model wants", lambda: mi.load(dense("n"), shapes={"x": shape}))


def test_a_shape_of_no_input_is_refused() -> None:
    refused("no input 'z'", lambda: mi.load(dense(), shapes={"z": (1,)}))


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({"x": np.ones((2, 299), np.float32)}, r"shape \(2, 299\), the model wants \(2, 300\)"),
        ({"x": np.ones((2, 300), np.float64)}, "type float64, the model wants float32"),
        ({}, r"\['x'\] are missing"),
        ({"x": np.ones((2, 300), np.float32), "z": np.ones(1)}, r"\['z'\] are not of the model"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(inputs: dict[str, Array], why: str) -> None:
    graph = mi.load(dense())
    refused(why, lambda: run(graph, **inputs))


def test_an_output_that_is_no_tensor_is_refused() -> None:
    b = Builder(0)
    parts = b.op("SplitToSequence", b.input("x", [1, 4]), axis=1)
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    output = helper.make_value_info(parts, helper.make_sequence_type_proto(element))
    refused("is of sequence_type", lambda: mi.load(b.model([output])))


# -- refusals that name the node or the tensor -----------------------------------------------------


def node(op_type: str, *constants: Array, opset: int = 17, **attributes: Any) -> ModelProto:
    """One node called "bad" that reads x [1, 4, 8, 8] and these constants."""
    b = Builder(0, opset)
    inputs = [b.input("x", [1, 4, 8, 8]), *(b.const(each) for each in constants)]
    made = helper.make_node(op_type, inputs, ["y"], name="bad", **attributes)
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["z"]), made], "g", b.inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [*b.initializers.values()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


KERNEL = np.zeros((4, 4, 3, 3), np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (node("MaxPool", kernel_shape=[0, 0]), "positive"),
        (node("MaxPool", kernel_shape=[2]), "incorrect size"),
        (node("MaxPool", kernel_shape=[2, 2], strides=[0, 1]), "strides"),
        (node("MaxPool", kernel_shape=[20, 20]), "shape"),
        (node("AveragePool", kernel_shape=[3, 2**31]), "kernel_shape"),
        (node("Conv", KERNEL, strides=[0, 1]), "strides"),
        (node("Conv", KERNEL, strides=[-1, 1]), "strides"),
        (node("Conv", KERNEL, dilations=[0, 1]), "dilations"),
        (node("Conv", KERNEL, pads=[-1, 0, 0, 0]), "pads"),
        (node("Conv", KERNEL, pads=[2**40] * 4), "elements"),
        (node("Conv", KERNEL, group=0), "group 0"),
        (node("Conv", KERNEL, group=3), "group 3 does not divide 4"),
        (node("Conv", KERNEL, kernel_shape=[5, 5]), "kernel_shape|incompatible"),
        (node("Conv", KERNEL[:, :3]), "3 channels of 4"),
        (node("Conv", np.zeros((4, 4, 20, 20), np.float32)), "shape"),
        (node("Transpose", perm=[0, 0, 1, 2]), "perm"),
        (node("Transpose", perm=[0, 1, 2, 7]), "perm"),
        (node("Transpose", perm=[0, 1]), "no permutation of 4 axes"),
        (node("Softmax", axis=9), "axis"),
        (node("Flatten", axis=9), "axis"),
        (node("Split", ints(1, 1), axis=1), "[Ss]plit"),
        (node("Gather", ints(77)), "77"),
        (node("Gather", ints(0), axis=9), "axis"),
        (node("Reshape", ints(3, 3)), r"does not fit into \[3, 3\]"),
        (node("Reshape", ints(-1, -1)), "-1"),
        (node("Resize", np.zeros(0, np.float32), np.array([1, 1, -1, 1], np.float32)), "[Ss]cale"),
        (node("Resize", np.zeros(0, np.float32), np.ones(4, np.float32), mode="x"), "mode"),
        (node("LRN", size=0), "size"),
        (node("Mean"), ""),
        (node("Relu", wrong=3), "wrong"),
        (node("MaxPool", kernel_shape="text"), "kernel_shape"),
        (node("MaxPool"), "kernel_shape"),
        (node("Rumpelstilzchen"), "Rumpelstilzchen"),
        (node("Rumpelstilzchen", domain="elsewhere"), "elsewhere"),
        (node("Not"), "type|Type"),
        (node("Add", ints(1)), "type"),
    ],
    ids=lambda value: value.graph.node[1].op_type if isinstance(value, ModelProto) else None,
)
def test_a_node_that_cannot_run_is_refused_by_its_name(model: ModelProto, why: str) -> None:
    if model.graph.node[1].op_type == "Mean":
        model.graph.node[1].input.append("")  # onnxruntime 1.32 ends the process on it
    refused(rf"(?s)\bbad\b.*({why})|({why}).*\bbad\b", lambda: mi.load(model))


def chain(*nodes: tuple[str, list[str], list[str]]) -> ModelProto:
    made = [
        helper.make_node(op_type, inputs, outputs, name=f"n{i}")
        for i, (op_type, inputs, outputs) in enumerate(nodes)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph(made, "g", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            chain(("Add", ["x", "b"], ["a"]), ("Neg", ["a"], ["b"]), ("Neg", ["b"], ["y"])),
            "cycle: node 'n0' .* node 'n1'",
        ),
        (chain(("Add", ["x", "y"], ["y"])), "cycle: node 'n0'"),
        (chain(("Add", ["x", "nowhere"], ["y"])), "'n0' .* reads 'nowhere'"),
        (
            chain(("Neg", ["x"], ["a"]), ("Abs", ["x"], ["a"]), ("Neg", ["a"], ["y"])),
            "'a' is defined twice: by node 'n0' .* and by node 'n1'",
        ),
        (chain(("Neg", ["x"], ["x"]), ("Neg", ["x"], ["y"])), "'x' is defined twice"),
        (chain(("Neg", ["x"], ["a"])), "nothing makes the output 'y'"),
    ],
)
def test_names_that_make_no_graph_are_refused(model: ModelProto, why: str) -> None:
    refused(why, lambda: mi.load(model))


def test_nodes_need_not_be_in_order() -> None:
    """onnxruntime sorts them, so it is its word that counts."""
    graph = mi.load(chain(("Neg", ["a"], ["y"]), ("Abs", ["x"], ["a"])))
    assert [op.type for op in graph.ops] == ["Abs", "Neg"]


def test_a_name_that_a_subgraph_does_not_know_is_refused() -> None:
    b = Builder(0)
    x = b.input("x", [2])
    value = helper.make_tensor_value_info("v", TensorProto.FLOAT, [2])
    body = helper.make_graph([helper.make_node("Neg", ["x"], ["v"])], "body", [], [value])
    above = b.op("Greater", [b.op("ReduceMean", x, keepdims=0), b.const(np.float32(0))])
    model = b.model([b.rename(b.op("If", above, then_branch=body, else_branch=body), "y")])
    mi.load(model)
    model.graph.node[-1].attribute[0].g.node[0].input[0] = "nowhere"
    refused("reads 'nowhere'", lambda: mi.load(model))


def dims(tensor: TensorProto, *sizes: int) -> None:
    del tensor.dims[:]
    tensor.dims.extend(sizes)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: setattr(t, "raw_data", b"\0" * 8), "has 8 bytes instead of 4800"),
        (lambda t: setattr(t, "raw_data", b"\0" * 4804), "has 4804 bytes instead of 4800"),
        (lambda t: t.ClearField("raw_data"), "has 0 values in float_data instead of 1200"),
        (lambda t: (t.ClearField("raw_data"), t.float_data.extend([1, 2])), "has 2 values"),
        (lambda t: dims(t, -4, 300), r"has the shape \[-4, 300\]"),
        (lambda t: dims(t, 2**60, 2**60), "has the shape"),
        (lambda t: setattr(t, "data_type", 77), "element type 77"),
        (lambda t: setattr(t, "data_type", 0), "element type 0"),
    ],
)
def test_a_tensor_whose_bytes_are_not_its_shapes_is_refused(
    change: Callable[[TensorProto], object], why: str
) -> None:
    model = dense()
    change(model.graph.initializer[0])
    refused(f"tensor '{model.graph.initializer[0].name}' .*{why}", lambda: mi.load(model))


def test_a_tensor_in_an_attribute_is_looked_at_as_well() -> None:
    model = chain(("Constant", [], ["a"]), ("Add", ["x", "a"], ["y"]))
    value = numpy_helper.from_array(np.zeros(2, np.float32), "value")
    value.raw_data = b"123"
    model.graph.node[0].attribute.append(helper.make_attribute("value", value))
    refused("tensor 'value' .* 3 bytes instead of 8", lambda: mi.load(model))


@pytest.mark.parametrize(
    ("versions", "why"),
    [({"opset": 99}, "opset"), ({"opset": 0}, "version"), ({"ir": 99}, "IR version|ir_version")],
)
def test_versions_that_onnxruntime_does_not_know_are_refused(
    versions: dict[str, int], why: str
) -> None:
    model = dense()
    model.opset_import[0].version = versions.get("opset", 17)
    model.ir_version = versions.get("ir", 10)
    refused(f"(?si){why}", lambda: mi.load(model))


@pytest.mark.parametrize("shape", [(1, -4), (2**40, 2**40)])
def test_an_input_of_an_absurd_shape_is_refused(shape: tuple[int, int]) -> None:
    model = chain(("Neg", ["x"], ["y"]))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    model.graph.input[0].CopyFrom(value)
    refused("input 'x' has the shape", lambda: mi.load(model))


def test_what_never_ends_or_is_too_large_is_not_even_read(tmp_path: Path) -> None:
    refused("is no ONNX file", lambda: mi.load("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    refused("is no ONNX file", lambda: mi.load(tmp_path / "pipe"))
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(3 << 30)
    refused("is no ONNX file: 3221225472 bytes", lambda: mi.load(tmp_path / "holes"))
    refused("cannot read", lambda: mi.load("nul\0byte.onnx"))


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    refused("cannot read", lambda: mi.load(tmp_path))


# -- external weights ----------------------------------------------------------------------------


def with_external(folder: Path, location: str, data: bytes | None) -> Path:
    """A model whose one weight lies at ``location``; ``data`` is written there."""
    model = dense()
    tensor = model.graph.initializer[0]
    if data is not None:
        (folder / location).write_bytes(data)
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def weight_bytes() -> bytes:
    return bytes(dense().graph.initializer[0].raw_data)


def test_a_model_is_the_same_however_it_is_given_and_left_as_it_is(tmp_path: Path) -> None:
    """Its weights are moved into a file for the import: of what is ours, never of what is given."""
    model = dense()
    data = model.SerializeToString()
    path = tmp_path / "dense.onnx"
    path.write_bytes(data)
    source = open_model(data)
    assert len({mi.load(each).digest for each in (model, data, path, source, source)}) == 1
    assert model.SerializeToString() == source.proto.SerializeToString() == data


def test_external_weights_are_read_beside_the_path(tmp_path: Path) -> None:
    path = with_external(tmp_path, "weights.bin", weight_bytes())
    graph = mi.load(str(path))
    (tmp_path / "weights.bin").unlink()  # what was imported needs no file any more
    x = np.random.default_rng(0).standard_normal((2, 300), np.float32)
    check_exact(dense(), graph, on_one_device(graph), {"x": x})


@pytest.mark.parametrize("kind", ["up", "absolute", "link"])
def test_external_weights_outside_the_folder_are_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(weight_bytes())
    location = {"up": "../secret", "absolute": str(secret), "link": "link"}[kind]
    if kind == "link":
        (folder / "link").symlink_to(secret)
    path = with_external(folder, location, None)
    refused("outside the model's folder", lambda: mi.load(path))


def tensor_outside(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(dims=[8], values=values, indices=indices)


def place_of(where: str, bad: TensorProto) -> ModelProto:
    """A model with this tensor in one of the places where a tensor can be."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    four = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    indices = numpy_helper.from_array(np.arange(4, dtype=np.int64), "")
    constant, function = helper.make_node("Constant", [], ["w"]), onnx.FunctionProto()
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["b"])], "b", [], [y])
    branch.output[0].name = "b"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    match where:
        case "sparse values":
            model.graph.sparse_initializer.append(sparse(bad, indices))
        case "sparse indices":
            model.graph.sparse_initializer.append(sparse(four, bad))
        case "sparse attribute":
            constant.attribute.add(name="sparse_value", sparse_tensor=sparse(bad, indices))
            model.graph.node.insert(0, constant)
        case "attribute":
            constant.attribute.add(name="value", t=bad)
            model.graph.node.insert(0, constant)
        case "list attribute":
            constant.attribute.add(name="values", tensors=[bad])
            model.graph.node.insert(0, constant)
        case "subgraph" | "sparse in a subgraph":
            if where == "subgraph":
                branch.initializer.append(bad)
            else:
                branch.sparse_initializer.append(sparse(bad, indices))
            model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=branch))
        case "function" | "function's default":
            function.name, function.domain = "F", "d"
            if where == "function":
                constant.attribute.add(name="value", t=bad)
                function.node.append(constant)
            else:
                function.attribute_proto.add(name="v", t=bad)
            model.functions.append(function)
        case "training":
            model.training_info.add().algorithm.initializer.append(bad)
    return model


@pytest.mark.parametrize(
    "where",
    "sparse values|sparse indices|sparse attribute|attribute|list attribute|subgraph|"
    "sparse in a subgraph|function|function's default|training".split("|"),
)
def test_no_tensor_of_any_kind_names_a_file_outside(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    path = folder / "model.onnx"
    path.write_bytes(place_of(where, tensor_outside("../secret")).SerializeToString())
    refused("weight 'w' lies outside the model's folder", lambda: mi.load(path))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device", "loop"])
def test_only_a_file_has_weights(tmp_path: Path, kind: str) -> None:
    """A pipe would never end; /dev/zero has all weights."""
    path, at = with_external(tmp_path, "w", None), tmp_path / "w"
    if kind == "pipe":
        os.mkfifo(at)
    elif kind == "device":
        path = with_external(tmp_path, "/dev/zero", None)
    elif kind == "folder":
        at.mkdir()
    else:
        at.symlink_to("/dev/zero" if kind == "link to a device" else at)
    outside = "missing" if kind in ("pipe", "folder") else "lies "
    refused(outside, lambda: mi.load(path))


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    path = with_external(tmp_path, "there", weight_bytes())
    os.rename(tmp_path / "there", tmp_path / "blob")
    (tmp_path / "there").symlink_to("blob")
    assert mi.load(path).ops


@pytest.mark.parametrize(
    "location", ["a/../../secret", "./../secret", "sub/../../secret", "..", "/"]
)
def test_no_detour_leads_outside(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(weight_bytes())
    refused("outside|missing", lambda: mi.load(with_external(folder, location, None)))


def test_a_missing_weight_file_is_refused(tmp_path: Path) -> None:
    path = with_external(tmp_path, "gone.bin", None)
    refused("the file 'gone.bin' of weight .* is missing", lambda: mi.load(path))


def test_external_weights_of_bytes_are_never_read_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_external(tmp_path, "weights.bin", weight_bytes()).read_bytes()
    monkeypatch.chdir(tmp_path)
    refused("lies in the file 'weights.bin'", lambda: mi.load(data))


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (("offset", "-1"), "has the offset '-1'"),
        (("offset", "one"), "has the offset 'one'"),
        (("offset", "9" * 40), "has the offset '999"),
        (("offset", "9" * 19), "ends at byte"),
        (("offset", str(2**63)), "ends at byte"),
        (("offset", "\u0663"), "has the offset"),
        (("offset", "0x10"), "has the offset '0x10'"),
        (("length", "-4800"), "has the length '-4800'"),
        (("length", "9" * 5000), "has the length '999"),
        (("location", "w" * 5000), "lies at"),
        (("location", "WEIGHTS.BIN"), "missing"),
        (("offset", "64"), "ends at byte 4864 of 'weights.bin', which has 4800"),
        (("length", "4796"), "has 4796 bytes in 'weights.bin' instead of 4800"),
        (("length", str(2**62)), "instead of 4800"),
        (("location", "nul\0byte"), "lies at"),
        (("location", ""), "missing"),
        (("location", "."), "missing"),
    ],
)
def test_external_data_that_are_not_the_tensors_are_refused(
    tmp_path: Path, entry: tuple[str, str], why: str
) -> None:
    path = with_external(tmp_path, "weights.bin", weight_bytes())
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    kept = [e for e in tensor.external_data if e.key != entry[0]]
    del tensor.external_data[:]
    tensor.external_data.extend(kept)
    tensor.external_data.add(key=entry[0], value=entry[1])
    path.write_bytes(model.SerializeToString())
    refused(f"weight '{tensor.name}'.*{why}", lambda: mi.load(path))


# -- what must be understood -----------------------------------------------------------------------


def test_initializers_may_be_listed_as_inputs() -> None:
    model = dense()
    for tensor in model.graph.initializer:
        model.graph.input.add().CopyFrom(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    graph = mi.load(model)
    assert graph.inputs == ("x",)
    x = np.random.default_rng(0).standard_normal((2, 300), np.float32)
    check_exact(dense(), graph, on_one_device(graph), {"x": x})


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize("opset", [11, 17, 22])
def test_a_window_that_starts_in_padding_is_dropped_as_onnxruntime_does(
    op_type: str, counted: int, opset: int
) -> None:
    """onnx's inference counts it before opset 22: 6 rows here, where 5 are computed; twice."""
    b = Builder(0, opset)
    x = b.input("x", [1, 2, 10, 11])
    count = {"count_include_pad": counted} if op_type == "AveragePool" else {}
    for _ in range(2):
        x = b.op(
            op_type, x, kernel_shape=[2, 3], strides=[2, 2], pads=[0, 0, 1, 0], ceil_mode=1, **count
        )
    model = b.model([b.rename(b.op("Neg", x), "y")])
    graph = mi.load(model)
    assert graph.shape(graph.ops[0].outputs[0]) == (1, 2, 5, 5)
    whole = graph.whole("y")
    tasks = [
        Task((PI,), (Shard("y", whole.replace(2, type(whole[2])(i, i + 1))),))
        for i in range(whole[2].size)
    ]
    plan = Plan(graph.digest, PI, PI, (Stage(0, len(graph.ops), tuple(tasks)),))
    values = np.random.default_rng(0).standard_normal((1, 2, 10, 11), np.float32) - 1
    # The model declares the larger size, of which onnxruntime warns and which it then ignores.
    check_exact(model, graph, plan, {"x": values})


# -- image specs -----------------------------------------------------------------------------------


def identity(layout: str) -> ModelProto:
    shape = [1, 3, "h", "w"] if layout == "NCHW" else [1, "h", "w", 3]
    b = Builder(0)
    b.input("image", [1, 3, 5, 7] if layout == "NCHW" else [1, 5, 7, 3])
    made = b.model([b.rename(b.op("Identity", "image"), "y")])
    for value in (made.graph.input[0], made.graph.output[0]):
        dims = [d if isinstance(d, int) else None for d in shape]
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, dims))
    return made


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ImageSpec("picture"), "input 'picture'"),
        (ImageSpec("y"), "input 'y'"),
        (ImageSpec("image", output="image"), "output 'image'"),
    ],
)
def test_a_spec_of_what_the_model_lacks_is_refused(spec: ImageSpec, words: str) -> None:
    model = identity("NCHW")
    check_image(model, ImageSpec("image", output="y"))
    refused(words, lambda: check_image(model, spec))


@pytest.mark.parametrize("colour", ["RGB", "BGR"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_image_prefix_is_numpys_arithmetic_bit_for_bit(layout: str, colour: str) -> None:
    spec = ImageSpec("image", layout, colour, 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    graph = mi.load(identity(layout), shapes={"image": (1, 5, 7, 3)}, image=spec)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), np.uint8)
    given = pixels[..., ::-1] if colour == "BGR" else pixels
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    expected = (given.astype(np.float32) * np.float32(1 / 255) - mean) / std
    if layout == "NCHW":
        expected = expected.transpose(0, 3, 1, 2)
    assert run(graph, image=pixels)["y"].tobytes() == np.ascontiguousarray(expected).tobytes()


def test_an_image_that_a_subgraph_captures_is_the_tensor_and_not_the_pixels() -> None:
    b = Builder(0)
    x = b.input("image", [1, 3, 4, 4])
    value = helper.make_tensor_value_info("scaled", TensorProto.FLOAT, [1, 3, 4, 4])
    body = helper.make_graph([helper.make_node("Add", [x, x], ["scaled"])], "body", [], [value])
    above = b.op("Greater", [b.op("ReduceMean", x, keepdims=0), b.const(np.float32(-1))])
    model = b.model([b.rename(b.op("If", above, then_branch=body, else_branch=body), "y")])
    graph = mi.load(model, shapes={"image": (1, 4, 4, 3)}, image=ImageSpec("image", scale=0.5))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    expected = pixels.astype(np.float32).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(run(graph, image=pixels)["y"], expected)


def test_an_image_spec_of_no_input_is_refused() -> None:
    refused("names the input 'photo'", lambda: mi.load(identity("NCHW"), image=ImageSpec("photo")))


def test_a_weight_that_is_an_output_comes_out() -> None:
    model = dense()
    model.graph.initializer.append(numpy_helper.from_array(np.arange(3.0), "table"))
    model.graph.output.append(helper.make_tensor_value_info("table", TensorProto.DOUBLE, [3]))
    x = np.ones((2, 300), np.float32)
    graph = mi.load(model)
    check_exact(model, graph, on_one_device(graph), {"x": x})


def test_what_onnxruntime_does_not_know_the_rank_of_is_no_scalar() -> None:
    """A Loop's value may change its shape in every round, so nothing behind it is tiled."""
    b = Builder(0)
    shape = [1, 2, 4, 4]
    x = b.input("x", shape)
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "ab"]
    flags = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("go", "on")]
    body = helper.make_graph(
        [helper.make_node("Tanh", ["a"], ["b"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), flags[0], tensors[0]],
        [flags[1], tensors[1]],
    )
    rounds = b.op("Loop", [b.const(np.array(3)), b.const(np.array(True)), x], body=body)
    y = helper.make_tensor_value_info(b.rename(b.relu(rounds), "y"), TensorProto.FLOAT, shape)
    model = b.model([y])
    graph = mi.load(model)
    assert graph.shape(rounds) is None
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    stages = tuple(
        Stage(i, i + 1, (Task((PI,), tuple(Shard(v, graph.whole(v)) for v in live)),))
        for i in range(len(graph.ops))
        if (live := graph.live_outputs(i, i + 1))
    )
    check_exact(model, graph, Plan(graph.digest, PI, PI, stages), {"x": values})
