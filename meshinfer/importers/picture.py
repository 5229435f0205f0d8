"""Puts an image spec's arithmetic in front of a model, so that uint8 pixels travel and not
floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from meshinfer.errors import InvalidInput
from meshinfer.image import ImageSpec


def with_image_input(proto: onnx.ModelProto, spec: ImageSpec) -> None:
    """Replace input ``spec.input`` (float) by uint8 [1, H, W, C] pixels, in place.

    H and W stay open. Computes ``(pixels * scale - mean) / std`` in float32 as numpy would.
    """
    _check_named("input", spec.input, proto)
    value = next(v for v in proto.graph.input if v.name == spec.input)
    elem_type = value.type.tensor_type.elem_type
    inner = f"{spec.input}/tensor"
    _rename(proto.graph, spec.input, inner)
    nodes = _prefix(proto, spec, inner, elem_type)
    for node in reversed(nodes):
        proto.graph.node.insert(0, node)
    picture = helper.make_tensor_value_info(
        spec.input, TensorProto.UINT8, [1, "height", "width", spec.channels]
    )
    value.CopyFrom(picture)


def check_image(proto: onnx.ModelProto, spec: ImageSpec) -> None:
    """Raise ``InvalidInput`` where a spec speaks of an input or output that the model lacks."""
    _check_named("input", spec.input, proto)
    if spec.output is not None:
        _check_named("output", spec.output, proto)


def _check_named(what: str, name: str, proto: onnx.ModelProto) -> None:
    kept = {t.name for t in proto.graph.initializer}  # IR < 4 has them among the inputs
    values = proto.graph.input if what == "input" else proto.graph.output
    names = [v.name for v in values if what == "output" or v.name not in kept]
    if name not in names:
        raise InvalidInput(
            f"the image spec names the {what} {name!r}, which the model does not have",
            hint=f"its {what}s are {names}",
        )


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let all that reads a value read another, in subgraphs as well (they may not shadow a
    name)."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, old, new)
                for output in inner.output:
                    if output.name == old:
                        output.name = new


def _prefix(
    proto: onnx.ModelProto, spec: ImageSpec, target: str, elem_type: int
) -> list[onnx.NodeProto]:
    nodes: list[onnx.NodeProto] = []
    current = spec.input

    def then(
        op_type: str,
        *constants: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
        **attributes: Any,
    ) -> None:
        nonlocal current
        names: list[str] = []
        for constant in constants:
            name = f"{target}/{len(nodes)}.{len(names)}"
            proto.graph.initializer.append(numpy_helper.from_array(constant, name))
            names.append(name)
        output = f"{target}/{len(nodes)}"
        nodes.append(helper.make_node(op_type, [current, *names], [output], **attributes))
        current = output

    if spec.layout == "NCHW":
        then("Transpose", perm=[0, 3, 1, 2])
    channel = 1 if spec.layout == "NCHW" else 3
    if spec.colour == "BGR":
        ends = np.array([-(1 << 31)])
        then("Slice", np.array([-1]), ends, np.array([channel]), np.array([-1]))
    then("Cast", to=elem_type)
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    shape = [1, 1, 1, 1]
    shape[channel] = spec.channels
    if spec.scale != 1:
        then("Mul", np.array(spec.scale, dtype))
    if any(spec.mean):
        then("Sub", np.array(spec.mean[: spec.channels], dtype).reshape(shape))
    if any(v != 1 for v in spec.std):
        then("Div", np.array(spec.std[: spec.channels], dtype).reshape(shape))
    nodes[-1].output[0] = target
    return nodes
