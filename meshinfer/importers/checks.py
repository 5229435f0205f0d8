"""What is wrong with a model, in words that name the node or the tensor; asked before and after
onnxruntime.

Before: where it crashes, or says "the graph is not acyclic" and no more. After: what it would only
refuse when the model runs, now that all shapes are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod

import onnx
import onnx_ir as ir
from onnx import numpy_helper

from meshinfer import limits
from meshinfer.errors import InvalidInput
from meshinfer.graph import CONSTANT_ELEMENTS, Graph, Op

_EXPORT = "export the model again, and look at it with onnx.checker"
_VARIADIC = frozenset("Max Min Mean Sum Concat".split())


def check_model(proto: onnx.ModelProto) -> None:
    """Names, cycles and tensors. Raises ``InvalidInput``."""
    graph = proto.graph
    if not graph.output:
        raise InvalidInput("the model has no outputs", hint=_EXPORT)
    _check_graph(graph, frozenset(), 0)
    _check_cycles(graph)
    for tensor in tensors_of(proto):
        check_tensor(tensor)
    _check_sizes(graph)


def tensors_of(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors, wherever they are: none may name a file that nobody has looked at."""
    yield from _of_graph(proto.graph)
    for function in proto.functions:
        yield from _of_attributes(function.attribute_proto)
        yield from _of_nodes(function.node)
    for training in proto.training_info:
        yield from _of_graph(training.initialization)
        yield from _of_graph(training.algorithm)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (*attribute.sparse_tensors, attribute.sparse_tensor):
            if sparse.HasField("values") or sparse.HasField("indices"):
                yield from (sparse.values, sparse.indices)
        for inner in _subgraphs(attribute):
            yield from _of_graph(inner)


def _subgraphs(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


# --- names ----------------------------------------------------------------------------------------


def title(node: onnx.NodeProto) -> str:
    """How messages call a node."""
    return f"node {(node.name or (node.output[0] if node.output else '?'))!r} ({node.op_type})"


def _check_graph(graph: onnx.GraphProto, outer: frozenset[str], depth: int) -> None:
    """Every name is defined once, and before it is meant: in this graph, or around it."""
    if depth > limits.SUBGRAPH_DEPTH:
        raise InvalidInput(f"its subgraphs are {depth} deep", hint=_EXPORT)
    _check_text(graph)
    made: dict[str, str] = {}
    for value in graph.input:
        _define(made, value.name, "the graph's inputs")
    weights: dict[str, str] = {}
    names = [t.name for t in graph.initializer]
    names += [t.values.name for t in graph.sparse_initializer]
    for name in names:
        _define(weights, name, "the initializers")
    for node in graph.node:
        for name in node.output:
            if name:
                if name in weights:
                    _define(dict(weights), name, title(node))
                _define(made, name, title(node))
    known = outer.union(made, weights)
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise InvalidInput(
                    f"{title(node)} reads {name!r}, which nothing makes", hint=_EXPORT
                )
        _check_crashes(node)
        for attribute in node.attribute:
            for inner in _subgraphs(attribute):
                _check_graph(inner, known, depth + 1)
    for value in graph.output:
        if value.name not in known:
            raise InvalidInput(f"nothing makes the output {value.name!r}", hint=_EXPORT)


def _check_text(graph: onnx.GraphProto) -> None:
    """protobuf gives bytes for what is no UTF-8."""
    texts = [graph.name, *(t.name for t in graph.initializer)]
    for value in (*graph.input, *graph.output, *graph.value_info):
        texts += [value.name, *(d.dim_param for d in value.type.tensor_type.shape.dim)]
    for node in graph.node:
        texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
        texts += [a.name for a in node.attribute]
    for text in texts:
        if isinstance(text, bytes):
            raise InvalidInput(f"the name {text[:60]!r} is no UTF-8", hint=_EXPORT)


def _define(made: dict[str, str], name: str, where: str) -> None:
    if not name:
        raise InvalidInput(f"a value without a name is among {where}", hint=_EXPORT)
    if name in made:
        raise InvalidInput(
            f"{name!r} is defined twice: by {made[name]} and by {where}", hint=_EXPORT
        )
    made[name] = where


def _check_crashes(node: onnx.NodeProto) -> None:
    """What ends, or holds up, the process inside onnxruntime 1.32; found by fuzzing."""
    if node.domain not in ("", "ai.onnx"):
        return
    parts = next((a.i for a in node.attribute if a.name == "num_outputs"), len(node.output))
    if node.op_type == "Split" and parts != len(node.output):
        raise InvalidInput(
            f"{title(node)} has num_outputs {parts} and {len(node.output)} outputs", hint=_EXPORT
        )
    if node.op_type in _VARIADIC and "" in node.input:
        raise InvalidInput(f"{title(node)} leaves out an input that it needs", hint=_EXPORT)
    batch = next((a.i for a in node.attribute if a.name == "batch_dims"), 0)
    kernel = next((a.ints for a in node.attribute if a.name == "kernel_shape"), ())
    if prod(kernel) > limits.WINDOW_ELEMENTS:
        raise InvalidInput(f"{title(node)} has the kernel_shape {list(kernel)}", hint=_EXPORT)
    if node.op_type == "GatherND" and batch < 0:
        raise InvalidInput(f"{title(node)} has batch_dims {batch}", hint=_EXPORT)


_SIZES = {
    "ConstantOfShape": (0,), "Expand": (1,), "Pad": (1,), "Resize": (2, 3), "Tile": (1,),
    "Upsample": (1,),
}  # fmt: skip
"""Inputs that say how large an output becomes, by the operator."""


def _check_sizes(graph: onnx.GraphProto) -> None:
    """onnxruntime 1.32 aborts where a constant makes a value's size overflow."""
    known = {t.name: t for t in graph.initializer if prod(t.dims) <= CONSTANT_ELEMENTS}
    for node in graph.node:
        for position in _SIZES.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ():
            name = node.input[position] if position < len(node.input) else ""
            if name not in known or is_external(known[name]):
                continue
            values = numpy_helper.to_array(known[name])
            if values.dtype.kind not in "iuf":
                continue
            bounded = (values >= -limits.MODEL_BYTES) & (values <= limits.MODEL_BYTES)
            if not bounded.all():
                raise InvalidInput(f"{title(node)} has the sizes {values.tolist()}", hint=_EXPORT)


def is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _check_cycles(graph: onnx.GraphProto) -> None:
    """No node may wait for itself. (In subgraphs onnxruntime says so, if without the name.)"""
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    waits: list[set[int]] = []
    readers: dict[int, list[int]] = {}
    for i, node in enumerate(graph.node):
        waits.append({maker[name] for name in _reads(node) if name in maker})
        for other in waits[-1]:
            readers.setdefault(other, []).append(i)
    ready = [i for i, before in enumerate(waits) if not before]
    done = 0
    while ready:
        done += 1
        current = ready.pop()
        for reader in readers.get(current, ()):
            waits[reader].discard(current)
            if not waits[reader]:
                ready.append(reader)
    if done < len(waits):
        at = next(i for i, before in enumerate(waits) if before)
        path: dict[int, None] = {}
        while at not in path:
            path[at] = None
            at = min(waits[at])
        circle = list(path)[list(path).index(at) :]
        names = ", ".join(title(graph.node[i]) for i in circle[:4])
        raise InvalidInput(f"the graph has a cycle: {names} wait for each other", hint=_EXPORT)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for inner in _subgraphs(attribute):
            yield from (value.name for value in inner.output)
            for each in inner.node:
                yield from _reads(each)


# --- tensors --------------------------------------------------------------------------------------

_TYPED = {  # data_type -> (field, values that an element takes there)
    **{ir.DataType[n]: ("float_data", k) for n, k in (("FLOAT", 1), ("COMPLEX64", 2))},
    **{ir.DataType[n]: ("double_data", k) for n, k in (("DOUBLE", 1), ("COMPLEX128", 2))},
    ir.DataType.INT64: ("int64_data", 1),
    **{ir.DataType[n]: ("uint64_data", 1) for n in ("UINT32", "UINT64")},
    ir.DataType.STRING: ("string_data", 1),
}


def tensor_nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes that its type and shape ask for; 0 for strings. Raises ``InvalidInput``."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype is ir.DataType.UNDEFINED:
        raise InvalidInput(
            f"tensor {tensor.name!r} has the element type {tensor.data_type}, which does not exist",
            hint=_EXPORT,
        )
    elements = prod(tensor.dims)
    if min(tensor.dims, default=0) < 0 or elements > limits.MODEL_BYTES:
        raise InvalidInput(
            f"tensor {tensor.name!r} has the shape {list(tensor.dims)}", hint=_EXPORT
        )
    return 0 if dtype is ir.DataType.STRING else (elements * dtype.bitwidth + 7) // 8


def check_tensor(tensor: onnx.TensorProto) -> None:
    """Raise ``InvalidInput`` unless the tensor's own bytes, or values, are those of its shape."""
    wanted = tensor_nbytes(tensor)
    if is_external(tensor):
        return  # its file is looked at where the folder is known
    if tensor.HasField("raw_data"):
        have = len(tensor.raw_data)
        if have != wanted or tensor.data_type == onnx.TensorProto.STRING:
            raise InvalidInput(
                f"tensor {tensor.name!r} of shape {list(tensor.dims)} has {have} bytes instead of "
                f"{wanted}",
                hint=_EXPORT,
            )
        return
    name, each = _TYPED.get(ir.DataType(tensor.data_type), ("int32_data", 1))
    values = prod(tensor.dims) * each
    bits = ir.DataType(tensor.data_type).bitwidth if tensor.data_type != 8 else 8
    if bits < 8:
        values = (prod(tensor.dims) * bits + 7) // 8  # packed
    have = len(getattr(tensor, name))
    if have != values:
        raise InvalidInput(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} has {have} values in {name} "
            f"instead of {values}",
            hint=_EXPORT,
        )


# --- nodes, once their shapes are known -----------------------------------------------------------


def check_nodes(graph: Graph) -> None:
    """Raise ``InvalidInput`` for a node that cannot run on the shapes that reach it."""
    for op in graph.ops:
        for name in op.outputs:
            shape = graph.shape(name) if name else None
            if shape is not None and min(shape, default=0) < 0:
                raise _unfit(op, f"its output {name!r} would have the shape {list(shape)}")
            if shape is not None and prod(shape) > limits.MODEL_BYTES:
                raise _unfit(op, f"its output {name!r} would have {prod(shape):.1e} elements")
        check = _CHECKS.get(op.type) if op.domain == "" else None
        if check is None or graph.shape(op.inputs[0]) is None:
            continue
        why = check(op)
        if why:
            raise _unfit(op, why)


def _unfit(op: Op, why: str) -> InvalidInput:
    name = op.proto.name or op.outputs[0]
    return InvalidInput(
        f"node {name!r} ({op.type}) cannot run: {why}",
        hint="check the node's attributes and the shapes of the inputs",
    )


def _window(op: Op) -> str:
    shape = op.graph.shape(op.outputs[0])
    if shape is not None and 0 in shape[2:] and 0 not in op.shape():
        return f"of {list(op.shape())} nothing is left, its output is {list(shape)}"
    return ""


def _conv(op: Op) -> str:
    weights = 3 if op.type == "QLinearConv" else 1
    kernel = op.graph.shape(op.inputs[weights]) if op.has(weights) else None
    if kernel is None or len(kernel) < 3 or len(op.shape()) != len(kernel):
        return "" if kernel is None else f"input {list(op.shape())} and weights {list(kernel)}"
    group, channels = op.attributes.get("group", 1), op.shape()[1]
    transposed = op.type == "ConvTranspose"
    if group < 1 or kernel[0] % group or channels % group:
        return f"group {group} does not divide {channels} channels and {kernel[0]} filters"
    reads = kernel[0] if transposed else kernel[1] * group
    if reads != channels:
        return f"its weights {list(kernel)} with group {group} read {reads} channels of {channels}"
    declared = op.attributes.get("kernel_shape")
    if declared is not None and tuple(declared) != kernel[2:]:
        return f"kernel_shape is {list(declared)}, its weights are {list(kernel)}"
    return _window(op)


def _transpose(op: Op) -> str:
    perm, rank = op.attributes.get("perm"), len(op.shape())
    if perm is not None and sorted(perm) != list(range(rank)):
        return f"perm {list(perm)} is no permutation of {rank} axes"
    return ""


def _reshape(op: Op) -> str:
    made = op.graph.shape(op.outputs[0])
    if made is not None and prod(made) != prod(op.shape()):
        return f"{list(op.shape())} does not fit into {list(made)}"
    target = op.constant(1)
    if made is None and target is not None and (target < -1).any():
        return f"its target is {target.tolist()}"
    return ""


def _gather(op: Op) -> str:
    indices, axis, rank = op.constant(1), op.attributes.get("axis", 0), len(op.shape())
    if not -rank <= axis < rank:
        return f"axis {axis} of {rank} axes"
    size = op.shape()[axis]
    if (
        indices is not None
        and indices.size
        and not (-size <= indices.min() <= indices.max() < size)
    ):
        return f"its indices reach from {indices.min()} to {indices.max()}, the axis has {size}"
    return ""


def _split(op: Op) -> str:
    axis, rank = op.attributes.get("axis", 0), len(op.shape())
    parts = op.constant(1) if op.has(1) else op.attributes.get("split")
    if not -rank <= axis < rank:
        return f"axis {axis} of {rank} axes"
    if parts is not None and (min(parts, default=0) < 0 or sum(parts) != op.shape()[axis]):
        return f"its parts {list(map(int, parts))} do not add up to {op.shape()[axis]}"
    return ""


_CHECKS: Mapping[str, Callable[[Op], str]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "QLinearConv"), _conv),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _window),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Gather": _gather,
    "Split": _split,
}
