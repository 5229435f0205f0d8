"""Types and shapes of all values of an imported model: onnx's inference, then onnxruntime's for
the rest.

onnx knows its own operators only; onnxruntime knows all that it loads, but must be asked for each
value as an output of a session.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import TensorProto, TypeProto, helper

from meshinfer.importers.pools import trim_pools
from meshinfer.onnxrt import ort

_TENSOR = re.compile(r"tensor\((\w+)\)")
_ELEMENTS = {
    "float": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "double": TensorProto.DOUBLE,
    "string": TensorProto.STRING,
    "bool": TensorProto.BOOL,
    **{
        f"{sign}int{bits}": TensorProto.DataType.Value(f"{sign}int{bits}".upper())
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


def infer_types(path: Path) -> None:
    """Write the types of all values into the model file at ``path`` (its weights stay beside
    it)."""
    plain = onnx.load(path, load_external_data=False)
    model = _inferred(plain)
    while trim_pools(plain, _shapes(model)):  # ends: each pass settles at least one pool
        for output in plain.graph.output:
            if output.type.HasField("tensor_type"):
                output.type.tensor_type.ClearField("shape")
        del plain.graph.value_info[:]
        model = _inferred(plain)
    known = {v.name for v in (*model.graph.value_info, *model.graph.output) if _complete(v)}
    missing = [n for node in model.graph.node for n in node.output if n and n not in known]
    if missing:
        _ask_onnxruntime(model, missing, path)
    onnx.save(model, path)


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # onnx refuses some models that onnxruntime runs; its word does not count
        return model


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values if _complete(v)
    }


def _complete(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)


def _ask_onnxruntime(model: onnx.ModelProto, names: list[str], path: Path) -> None:
    asking = onnx.ModelProto()
    asking.CopyFrom(model)
    del asking.graph.output[:]
    asking.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    question = path.with_name("types.onnx")
    onnx.save(asking, question)
    session = ort.InferenceSession(
        str(question), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    infos = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
    for found in session.get_outputs():
        info = infos.get(found.name)
        if info is None:
            info = model.graph.value_info.add(name=found.name)
        kind = _type_of(found.type, found.shape)
        if kind is not None:
            info.type.CopyFrom(kind)


def _type_of(text: str, shape: list[int | str | None] | None) -> TypeProto | None:
    match = _TENSOR.fullmatch(text)
    if match is not None and match[1] in _ELEMENTS:
        # Its word for an unknown rank is the one for a scalar, [], so that says nothing.
        return helper.make_tensor_type_proto(_ELEMENTS[match[1]], shape or None)
    inner = re.fullmatch(r"seq\((.*)\)", text)
    if inner is not None and (element := _type_of(inner[1], None)) is not None:
        return helper.make_sequence_type_proto(element)
    return None  # optional and map types: the value stays inside its stage
