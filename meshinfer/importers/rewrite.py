"""Normalisations over rows and columns, taken apart so that rows can be tiled.

InstanceNormalization becomes a mean, a mean of squared differences and one product and sum for each
element, in the order of onnxruntime's kernel: with the sums computed whole it has the kernel's bits
(but for one in the last place where rows times columns are odd). A variance in one pass, as sums
and sums of squares, lost 5.8e-4 at mean 5, deviation 0.1.

GroupNormalization is in one pass all the same, because the operator's function body is, which is
what onnxruntime computes (3e-3 off at mean 5, deviation 0.1, 512 rows and columns: whoever does
better disagrees with it by as much). Its means are not computed as partial sums, see
``meshinfer.ops.reduce``. torch exports it so from opset 21; before, as a reshape of groups to rows,
an InstanceNormalization and a reshape back. Either way a group becomes an axis of its own here, so
that rows and columns stay what they are and the devices can cut them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]

_APART = ("InstanceNormalization", "GroupNormalization")


def take_apart(file: Path) -> None:
    """Replace the normalisations of a model's main graph whose float input has a known shape.

    The shapes of its inputs must be fixed. Its weights may lie in other files: none is read. What
    is malformed stays for onnxruntime to refuse.
    """
    model = onnx.load(file, load_external_data=False)
    if any(node.op_type in _APART and not node.domain for node in model.graph.node):
        _Rewriting(model).run()
        file.write_bytes(model.SerializeToString())


class _Rewriting:
    """The nodes of a graph on their way from old to new."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.opset = next((o.version for o in model.opset_import if not o.domain), 1)
        self.shapes = _float_shapes(model)
        self.nodes: list[onnx.NodeProto] = []
        self.made = {n for node in model.graph.node for n in node.output}
        self.by_output = {n: node for node in model.graph.node for n in node.output}
        self.split: dict[str, str] = {}  # a value of groups -> the same with channels apart

    def run(self) -> None:
        for node in self.graph.node:
            if not node.domain and node.op_type in _APART and node.input[0] in self.shapes:
                self._normalise(node)
            elif node.op_type == "Reshape" and node.input[0] in self.split:
                self._reshape_back(node)
            else:
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(_read(self.nodes, self.graph))

    def _normalise(self, node: onnx.NodeProto) -> None:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        epsilon = np.float32(attributes.get("epsilon", 1e-5))
        shape, groups = self.shapes[node.input[0]], int(attributes.get("num_groups", 0))
        known = len(node.input) == 3 and all(node.input) and len(node.output) == 1
        if not known or len(shape) < 3:
            self.nodes.append(node)
        elif node.op_type == "InstanceNormalization":
            self._instance(node, shape, epsilon)
        elif groups > 0 and shape[1] % groups == 0 and attributes.get("stash_type", 1) == 1:
            self._group(node, shape, groups, epsilon)
        else:
            self.nodes.append(node)

    def _instance(self, node: onnx.NodeProto, shape: Shape, epsilon: np.float32) -> None:
        x, scale, bias = node.input
        (y,) = node.output
        apart = self._grouped_source(x, shape)
        if apart is not None:
            x, shape = self._reshape(apart[0], apart[1], x), apart[1]
        channel = (shape[1], *[1] * (len(shape) - 2))
        scale, bias = self._reshape(scale, channel, y), self._reshape(bias, channel, y)
        mean = self._mean(x, len(shape), y)
        apart_by = self._op("Sub", x, mean, near=y)
        variance = self._mean(self._op("Mul", apart_by, apart_by, near=y), len(shape), y)
        deviation = self._op(
            "Sqrt", self._op("Add", variance, self._float(epsilon, y), near=y), near=y
        )
        inverse = self._op("Div", self._float(np.float32(1), y), deviation, near=y)
        factor = self._op("Mul", inverse, scale, near=y)
        shift = self._op("Sub", bias, self._op("Mul", mean, factor, near=y), near=y)
        scaled = self._op("Mul", x, factor, near=y)
        if apart is None:
            self._op("Add", scaled, shift, out=y)
            return
        self.split[y] = self._op("Add", scaled, shift, near=y)
        self._reshape(self.split[y], self.shapes[node.input[0]], y, out=y)

    def _group(self, node: onnx.NodeProto, shape: Shape, groups: int, epsilon: np.float32) -> None:
        x, scale, bias = node.input
        (y,) = node.output
        apart = (shape[0], groups, shape[1] // groups, *shape[2:])
        x = self._reshape(x, apart, y)
        mean = self._mean(x, len(apart), y)
        squares = self._mean(self._op("Mul", x, x, near=y), len(apart), y)
        variance = self._op("Sub", squares, self._op("Mul", mean, mean, near=y), near=y)
        deviation = self._op(
            "Sqrt", self._op("Add", variance, self._float(epsilon, y), near=y), near=y
        )
        normal = self._op("Div", self._op("Sub", x, mean, near=y), deviation, near=y)
        if self.opset >= 21:  # its scale is of channels, before of groups
            normal, apart = self._reshape(normal, shape, y), shape
        sizes = (apart[1], *[1] * (len(apart) - 2))
        scale, bias = self._reshape(scale, sizes, y), self._reshape(bias, sizes, y)
        scaled = self._op("Mul", scale, normal, near=y)
        if apart is shape:
            self._op("Add", scaled, bias, out=y)
        else:
            self._reshape(self._op("Add", scaled, bias, near=y), shape, y, out=y)

    def _grouped_source(self, x: str, shape: Shape) -> tuple[str, Shape] | None:
        """What was reshaped to give groups as rows of ``x``, and its shape with groups apart."""
        node = self.by_output.get(x)
        if len(shape) != 3 or node is None or node.op_type != "Reshape":
            return None
        source = self.shapes.get(node.input[0], ())
        grouped = len(source) > 3 and source[0] == shape[0] and source[1] % shape[1] == 0
        if not grouped or prod(source) != prod(shape):
            return None
        return node.input[0], (shape[0], shape[1], source[1] // shape[1], *source[2:])

    def _reshape_back(self, node: onnx.NodeProto) -> None:
        """A reshape of groups that are apart, directly to what it wants."""
        y = node.output[0]
        if y in self.shapes:
            self._reshape(self.split[node.input[0]], self.shapes[y], y, out=y)
        else:
            self.nodes.append(node)

    # Nodes.

    def _op(
        self, op_type: str, *inputs: str, near: str = "", out: str = "", **attributes: Any
    ) -> str:
        out = out or self._fresh(f"{near}/{op_type}")
        self.nodes.append(helper.make_node(op_type, list(inputs), [out], **attributes))
        return out

    def _mean(self, x: str, rank: int, near: str) -> str:
        axes = list(range(2, rank))
        if self.opset >= 18:
            return self._op("ReduceMean", x, self._ints(axes, near), near=near, keepdims=1)
        return self._op("ReduceMean", x, near=near, axes=axes, keepdims=1)

    def _reshape(self, x: str, shape: Sequence[int], near: str, out: str = "") -> str:
        return self._op("Reshape", x, self._ints(shape, near), near=near, out=out)

    def _ints(self, values: Sequence[int], near: str) -> str:
        return self._tensor(np.asarray(values, np.int64), near)

    def _float(self, value: np.float32, near: str) -> str:
        return self._tensor(np.asarray(value, np.float32), near)

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], near: str) -> str:
        name = self._fresh(f"{near}/const")
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _fresh(self, hint: str) -> str:
        index = 0
        while (name := f"{hint}~{index}") in self.made:
            index += 1
        self.made.add(name)
        return name


def _read(nodes: Sequence[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes without those reshapes that nobody reads any more."""
    read = {v.name for v in graph.output} | {n for node in nodes for n in _inputs(node)}
    return [n for n in nodes if n.op_type != "Reshape" or n.domain or n.output[0] in read]


def _inputs(node: onnx.NodeProto) -> list[str]:
    """What a node reads, with all names that its subgraphs read."""
    graphs = [g for a in node.attribute for g in (a.g, *a.graphs)]
    inner = [n for g in graphs for i in g.node for n in _inputs(i)]
    return [*node.input, *inner, *(v.name for g in graphs for v in g.output)]


def _float_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Static shapes of the float values, as far as onnx can tell them."""
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    for node in asked.graph.node:  # onnx does not know what a GroupNormalization makes
        if node.op_type == "GroupNormalization" and not node.domain:
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(asked, data_prop=True).graph
    except Exception:  # onnx refuses some models that onnxruntime runs: they stay as they are
        return {}
    found: dict[str, Shape] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        known = tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims)
        if known and tensor.elem_type == TensorProto.FLOAT and all(d.dim_value > 0 for d in dims):
            found[value.name] = tuple(d.dim_value for d in dims)
    return found
