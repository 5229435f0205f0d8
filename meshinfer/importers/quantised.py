"""Quantised models arranged so that only quantised values are exchanged, and no bit changes by it.

onnxruntime makes one kernel of an operator with the DequantizeLinear before it and the
QuantizeLinear behind it, and decides by what stands next to them; a tile must decide as the whole
model does. What is rewritten here gives the same bits as before, wherever it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

_UINT8 = ir.DataType.UINT8
_LARGE = 3
"""Axes of a value that is worth to be cut where its smallest and largest element are looked for."""


def arrange(model: ir.Model) -> None:
    """Rewrite a model in place; arranging it once more changes nothing."""
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            _make_unsigned(model.graph, node)
        elif node.op_type == "DequantizeLinear":
            _bring_to_reader(model.graph, node)
        elif node.op_type == "DynamicQuantizeLinear" and node.domain == "":
            _measure_apart(model, node)


def _make_unsigned(graph: ir.Graph, quantise: ir.Node) -> None:
    """An int8 value between a pair becomes uint8, its zero point larger by 128, as in onnxruntime.

    On x86 onnxruntime has kernels for uint8 only and rewrites such pairs (QDQS8ToU8Transformer,
    which wants one reader and equal zero points), which it cannot where a cut parts them.
    """
    value = quantise.outputs[0]
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "DequantizeLinear":
        return
    reader = uses[0].node
    points = [_zero_point(node) for node in (quantise, reader)]
    if points[0] is None or points[0] != points[1] or reader.graph is not graph:
        return
    old = quantise.inputs[2]
    assert old is not None and old.const_value is not None
    name = f"{old.name}/unsigned"
    if name not in graph.initializers:
        point = np.full(old.const_value.shape.numpy(), points[0] + 128, np.uint8)
        tensor = ir.tensor(point, name=name)
        new = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(point.shape)
        )
        new.const_value = tensor
        graph.register_initializer(new)
    for node in (quantise, reader):
        node.replace_input_with(2, graph.initializers[name])
    value.type = ir.TensorType(ir.DataType.UINT8)


def _zero_point(node: ir.Node) -> int | None:
    """The zero point of a node if it is one constant int8."""
    value = node.inputs[2] if len(node.inputs) == 3 else None
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    point = value.const_value.numpy()
    return int(point.reshape(-1)[0]) if point.dtype == np.int8 and point.size == 1 else None


def _bring_to_reader(graph: ir.Graph, dequantise: ir.Node) -> None:
    """Right before its only reader, so that its float output is alive at no cut."""
    value = dequantise.outputs[0]
    readers = {use.node for use in value.uses()}
    if len(readers) != 1 or value.is_graph_output():
        return
    reader = readers.pop()
    if reader.graph is graph:
        graph.remove(dequantise)
        graph.insert_before(reader, dequantise)


def _measure_apart(model: ir.Model, dynamic: ir.Node) -> None:
    """DynamicQuantizeLinear as two reductions, the arithmetic of its scale, and QuantizeLinear.

    Its scale is that of the smallest and the largest element of all, so that it could not be cut.
    The extremes of each row can: a handful of numbers to exchange. The arithmetic is the ONNX
    operator's, in float32, step by step as onnxruntime's kernel takes it.
    """
    x = dynamic.inputs[0]
    if x is None or x.shape is None or len(x.shape) < _LARGE:
        return
    write = _Writer(model, dynamic)
    rank = len(x.shape)
    apart = [1, rank - 1] if rank > _LARGE else [rank - 1]
    rows = [write.extreme(kind, x, apart, keep=True) for kind in ("ReduceMin", "ReduceMax")]
    low = write.extreme("ReduceMin", rows[0], range(rank), keep=False)
    high = write.extreme("ReduceMax", rows[1], range(rank), keep=False)
    zero, most = write.number(0.0), write.number(255.0)
    low, high = write.node("Min", low, zero), write.node("Max", high, zero)
    step = write.node("Div", write.node("Sub", high, low), most)
    flat = write.node("Equal", high, low, dtype=ir.DataType.BOOL)
    scale = write.node("Where", flat, write.number(1.0), step)
    point = write.node("Sub", zero, write.node("Div", low, scale))
    point = write.node("Round", write.node("Clip", point, zero, most))
    point = write.node("Cast", point, dtype=_UINT8, attributes={"to": int(_UINT8)})
    y = write.node("QuantizeLinear", x, scale, point, dtype=_UINT8, shape=x.shape)
    for old, new in zip(dynamic.outputs, (y, scale, point), strict=False):
        name = old.name
        old.name = f"{name}/dynamic"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name or new.name
    model.graph.remove(dynamic, safe=True)


class _Writer:
    """Inserts nodes before another, each with the type of its one output."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.graph, self.before = model.graph, before
        self.opset = model.opset_imports.get("", 1)
        self.stem = before.outputs[0].name
        self.count = 0

    def node(
        self,
        op_type: str,
        *inputs: ir.Value,
        dtype: ir.DataType = ir.DataType.FLOAT,
        shape: ir.Shape | None = None,
        attributes: Mapping[str, int | Sequence[int]] | None = None,
    ) -> ir.Value:
        name = self._fresh()
        made = ir.node(op_type, inputs, attributes=dict(attributes or {}), name=name)
        value = made.outputs[0]
        value.name, value.type = name, ir.TensorType(dtype)
        value.shape = ir.Shape(()) if shape is None else shape
        self.graph.insert_before(self.before, made)
        return value

    def extreme(self, kind: str, x: ir.Value, axes: Sequence[int], *, keep: bool) -> ir.Value:
        """ReduceMin or ReduceMax; its axes became an input at opset 18."""
        assert x.shape is not None
        shape = ir.Shape([1 if a in axes else n for a, n in enumerate(x.shape)] if keep else ())
        if self.opset >= 18:
            inputs = (x, self._constant(np.array(axes, np.int64)))
            return self.node(kind, *inputs, shape=shape, attributes={"keepdims": int(keep)})
        attributes: dict[str, int | Sequence[int]] = {"keepdims": int(keep), "axes": list(axes)}
        return self.node(kind, x, shape=shape, attributes=attributes)

    def number(self, value: float) -> ir.Value:
        return self._constant(np.array(value, np.float32))

    def _constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        name = self._fresh()
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value

    def _fresh(self) -> str:
        self.count += 1
        return f"{self.stem}/dynamic/{self.count}"
