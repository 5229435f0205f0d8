"""Types and shapes of all values of an imported model: onnx's inference, then onnxruntime's for the rest.

onnx knows its own operators only; onnxruntime knows all that it loads, but must be asked for each value
as an output of a session.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import TensorProto, TypeProto, helper

_TENSOR = re.compile(r"tensor\((\w+)\)")
_ELEMENTS = {
    "float": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "double": TensorProto.DOUBLE,
    "string": TensorProto.STRING,
    "bool": TensorProto.BOOL,
    **{
        f"{sign}int{bits}": getattr(TensorProto, f"{sign}int{bits}".upper())
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


def infer_types(path: Path) -> None:
    """Write the types of all values into the model file at ``path`` (its weights stay beside it)."""
    model = onnx.load(path, load_external_data=False)
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # onnx refuses some models that onnxruntime runs; its word does not count
        pass
    known = {v.name for v in (*model.graph.value_info, *model.graph.output) if _complete(v)}
    missing = [n for node in model.graph.node for n in node.output if n and n not in known]
    if missing:
        _ask_onnxruntime(model, missing, path)
    onnx.save(model, path)


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
    session = ort.InferenceSession(str(question), options, providers=["CPUExecutionProvider"])
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
        return helper.make_tensor_type_proto(_ELEMENTS[match[1]], shape)
    inner = re.fullmatch(r"seq\((.*)\)", text)
    if inner is not None and (element := _type_of(inner[1], None)) is not None:
        return helper.make_sequence_type_proto(element)
    return None  # optional and map types: the value stays inside its stage
