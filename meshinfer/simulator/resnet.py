"""ResNet-50 (He et al. 2015, with the stride on the 3x3 convolution) as a file to plan and to send:
its real shapes and bytes, and weights that mean nothing, since no kernel runs."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

INPUT, OUTPUT = "image", "logits"


class _Net:
    """BatchNormalization is in the convolutions already, as importing would have it."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []

    def op(self, kind: str, *inputs: str, **attributes: list[int]) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [name], name)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self.nodes.append(node)
        return name

    def weight(self, *shape: int) -> str:
        """Each has bytes of its own, or equal ones would travel once."""
        name = f"weight_{len(self.weights)}"
        filled = np.full(shape, 1e-3 * (len(self.weights) + 1), np.float32)
        self.weights.append(numpy_helper.from_array(filled, name))
        return name

    def conv(self, x: str, cin: int, cout: int, kernel: int, stride: int = 1) -> str:
        pads = [kernel // 2] * 4
        weight, bias = self.weight(cout, cin, kernel, kernel), self.weight(cout)
        return self.op("Conv", x, weight, bias, pads=pads, strides=[stride] * 2)

    def bottleneck(self, x: str, cin: int, inner: int, stride: int) -> str:
        y = self.op("Relu", self.conv(x, cin, inner, 1))
        y = self.op("Relu", self.conv(y, inner, inner, 3, stride))
        y = self.conv(y, inner, 4 * inner, 1)
        if stride != 1 or cin != 4 * inner:
            x = self.conv(x, cin, 4 * inner, 1, stride)
        return self.op("Relu", self.op("Add", y, x))


def resnet50(side: int = 224, channels: int = 64) -> bytes:
    """The bytes of the model; fewer ``channels`` than 64 make a thinner one."""
    net = _Net()
    x = net.op("Relu", net.conv(INPUT, 3, channels, 7, 2))
    x = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    width = channels
    for level, repeats in enumerate((3, 4, 6, 3)):
        inner = channels << level
        for i in range(repeats):
            x = net.bottleneck(x, width, inner, 2 if level and not i else 1)
            width = 4 * inner
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    net.nodes.append(helper.make_node("Gemm", [x, net.weight(width, 1000)], [OUTPUT], "gemm"))
    image = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [1, 3, side, side])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [1, 1000])
    graph = helper.make_graph(net.nodes, "resnet50", [image], [logits], net.weights)
    opsets = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
