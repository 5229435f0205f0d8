"""A Builder whose choices Hypothesis draws, and which knows the shape and type of every value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from architectures import Builder
from hypothesis import strategies as st
from onnx import TensorProto, helper

MICROSOFT = "com.microsoft"
FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE


class Net(Builder):
    """A Builder that draws its choices and knows the shape and type of every value."""

    def __init__(self, draw: st.DrawFn, opset: int) -> None:
        super().__init__(draw(st.integers(0, 2**16)), opset)
        self.draw = draw
        self.shape: dict[str, tuple[int, ...]] = {}
        self.type: dict[str, int] = {}

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def rarely(self) -> bool:
        return self.pick(False, False, False, True)

    def coin(self) -> bool:
        return self.draw(st.booleans())

    def know(self, name: str, shape: Sequence[int], dtype: int = FLOAT) -> str:
        self.shape[name], self.type[name] = tuple(shape), dtype
        return name

    def input(self, name: str, shape: Sequence[Any], dtype: int = FLOAT) -> str:
        return self.know(super().input(name, shape, dtype), shape, dtype)

    def const(self, array: Any, name: str | None = None) -> str:
        array = np.asarray(array)
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        return self.know(super().const(array, name), array.shape, dtype)

    def typed(self, name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, self.type[name], self.shape[name])

    def known(self) -> list[onnx.ValueInfoProto]:
        """onnx gives up on the function body of a GroupNormalization, now and then."""
        return [
            self.typed(node.output[0])
            for node in self.nodes
            if node.op_type == "GroupNormalization" and node.output[0] in self.type
        ]

    def normal(self, *shape: int, scale: float = 1.0, dtype: type = np.float32) -> str:
        return self.const((self.rng.standard_normal(shape) * scale).astype(dtype))

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def op(self, op_type: str, inputs: Any, outputs: int = 1, **attrs: Any) -> Any:
        made = super().op(op_type, inputs, outputs, **attrs)
        self._infer(self.nodes[-1])
        return made

    def _infer(self, node: onnx.NodeProto) -> None:
        """The types of a node's outputs, from onnx's inference of that node alone."""
        names = [n for n in node.input if n]
        consts = [self.initializers[n] for n in names if n in self.initializers]
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(n, self.type[n], self.shape[n]) for n in set(names)],
            [onnx.ValueInfoProto(name=n) for n in node.output if n],
            consts,
        )
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=imports)
        for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output:
            tensor = value.type.tensor_type
            if tensor.HasField("shape"):
                shape = [d.dim_value for d in tensor.shape.dim]
                self.know(value.name, shape, tensor.elem_type)


Block = Callable[[Net, str], str]


def axes_op(n: Net, op_type: str, x: str, axes: Sequence[int], since: int, **attrs: Any) -> str:
    """Squeeze, Unsqueeze or a reduction: axes became an input at opset ``since``."""
    if n.opset >= since:
        return str(n.op(op_type, [x, n.ints(*axes)], **attrs))
    return str(n.op(op_type, x, axes=list(axes), **attrs))
