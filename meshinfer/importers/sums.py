"""Which sums onnxruntime computes inside a convolution's kernel, so that tiles compute them there too.

A convolution that adds onto another value rounds differently from one whose result is added
afterwards (up to 5e-7 here). onnxruntime decides by what else is in the graph; a tile must decide
as the whole model does. Asked of onnxruntime itself: its fully optimised graph tells.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

_SUMS = ("Add", "Sum")
_BLOCKED = re.compile(r"(.*)_nchwc(?:_token_\d+)?$")
"""How onnxruntime names a convolution in its blocked layout: the output's name and this."""


def fused_sums(model: ir.Model, file: Path) -> dict[str, int]:
    """For each sum that is computed inside a convolution: its name, and which operand that is.

    ``model`` was read from ``file``. Empty where the processor has no blocked layout (Arm).
    """
    candidates = _candidates(model)
    if not candidates:
        return {}
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
    for node in onnx.load(target, load_external_data=False).graph.node:
        named = _BLOCKED.match(node.name)
        if node.op_type == "Conv" and len(node.input) > 3 and node.input[3] and named:
            found.update([candidates[named[1]]] if named[1] in candidates else [])
    return found


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


def bring_together(model: ir.Model, sums: dict[str, int]) -> None:
    """Move each such convolution to right before its sum, so that no plan cuts between them."""
    for node in list(model.graph):
        position = sums.get(node.outputs[0].name or "") if node.outputs else None
        if position is None:
            continue
        value = node.inputs[position]
        made = value.producer() if value is not None else None
        if made is not None and made.graph is model.graph:
            model.graph.remove(made)
            model.graph.insert_before(node, made)
