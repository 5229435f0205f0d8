"""What onnxruntime computes otherwise in its blocked layout (NCHWc), so that tiles do it likewise.

A convolution that adds onto another value rounds differently from one whose result is added
afterwards (up to 5e-7 here), and so does a normalisation that becomes a convolution. onnxruntime
decides by what else is in the graph; a tile must do as the whole model does. Asked of onnxruntime
itself: its fully optimised graph tells.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from meshinfer.onnxrt import ort

_SUMS = ("Add", "Sum")
_CONVOLUTION = re.compile(r"(.*?)(_bn)?_nchwc(?:_token_\d+)?$")
"""How onnxruntime names a convolution in that layout: what was its output's name, and this."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """``sums``: those computed inside a convolution, and which operand that is. ``norms``: batch
    normalisations computed as depthwise convolutions. By the names of their outputs."""

    sums: dict[str, int]
    norms: frozenset[str] = frozenset()


def find_blocked(model: ir.Model, file: Path) -> Blocked:
    """``model`` was read from ``file``. Nothing is found where the processor has no such layout
    (Arm)."""
    sums, norms = _candidates(model), _normalisations(model)
    if not sums and not norms:
        return Blocked({})
    target = file.with_name("blocked.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    for key, value in (
        ("disable_prepacking", "1"),  # it never runs
        ("optimized_model_external_initializers_file_name", "blocked"),
        ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
    ):
        options.add_session_config_entry(f"session.{key}", value)
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found: dict[str, int] = {}
    converted: set[str] = set()
    for node in onnx.load(target, load_external_data=False).graph.node:
        named = _CONVOLUTION.match(node.name)
        if node.op_type != "Conv" or not named:
            continue
        if len(node.input) > 3 and node.input[3] and named[1] in sums:
            found.update([sums[named[1]]])
        if named[2] and named[1] in norms:
            converted.add(named[1])
    return Blocked(found, frozenset(converted))


def _candidates(model: ir.Model) -> dict[str, tuple[str, int]]:
    """By the name of a convolution's output that only a sum reads: the sum, which operand it is."""
    found: dict[str, tuple[str, int]] = {}
    for node in model.graph:
        if node.op_type not in _SUMS or len(node.inputs) != 2 or not node.outputs[0].name:
            continue
        for position, value in enumerate(node.inputs):
            made = value.producer() if value is not None else None
            if made is None or made.op_type != "Conv" or value is None or not value.name:
                continue
            if len(value.uses()) == 1 and not value.is_graph_output():
                found[value.name] = (node.outputs[0].name, position)
    return found


def _normalisations(model: ir.Model) -> set[str]:
    return {
        node.outputs[0].name
        for node in model.graph
        if node.op_type == "BatchNormalization" and node.outputs[0].name
    }


def arrange_blocked(model: ir.Model, blocked: Blocked) -> None:
    """Write such normalisations as the convolutions that they become; move each convolution that
    adds to right before its sum, so that no plan cuts between them."""
    for node in list(model.graph):
        name = node.outputs[0].name if node.outputs else None
        if name in blocked.norms:
            _as_convolution(model.graph, node)
        position = blocked.sums.get(name or "")
        if position is None:
            continue
        value = node.inputs[position]
        made = value.producer() if value is not None else None
        if made is not None and made.graph is model.graph:
            model.graph.remove(made)
            model.graph.insert_before(node, made)


def _as_convolution(graph: ir.Graph, node: ir.Node) -> None:
    """A depthwise convolution of size 1, its weights worked out in float32 as onnxruntime does."""
    data, *statistics = node.inputs
    arrays = [_array(value) for value in statistics]
    if data is None or any(array is None or array.dtype != np.float32 for array in arrays):
        return
    scale, bias, mean, variance = (np.asarray(array) for array in arrays)
    attribute = node.attributes.get("epsilon")
    epsilon = np.float32(attribute.as_float() if attribute is not None else 1e-5)
    factor = scale / np.sqrt(variance + epsilon)
    name, channels = node.outputs[0].name, len(scale)
    weights = _initializer(graph, f"{name}/factor", factor.reshape(channels, 1, 1, 1))
    shift = _initializer(graph, f"{name}/shift", bias - mean * factor)
    made = ir.Node(
        "",
        "Conv",
        [data, weights, shift],
        [ir.AttrInt64("group", channels), ir.AttrInt64s("kernel_shape", [1, 1])],
        outputs=None,
        num_outputs=1,
        name=f"{node.name}/convolution",
    )
    old, new = node.outputs[0], made.outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def _array(value: ir.Value | None) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def _initializer(
    graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.register_initializer(value)
    return value
