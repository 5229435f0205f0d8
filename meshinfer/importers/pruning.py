"""What a model's outputs need: an early exit is the model without all that lies behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx

from meshinfer.errors import InvalidInput


def keep_outputs(proto: onnx.ModelProto, outputs: Sequence[str]) -> set[str]:
    """Drop, in place, all that these outputs do not need; the names of the inputs that went.

    Done before anything is folded or fused, so that the rest is optimised as a model of its own.
    Raises ``InvalidInput`` for a name that is no output, and when none is given.
    """
    graph = proto.graph
    check_outputs("the model", outputs, [v.name for v in graph.output])
    nodes, values = _needed(graph, outputs)
    for index in reversed(range(len(graph.node))):
        if index not in nodes:
            del graph.node[index]
    dropped = {v.name for v in graph.input if v.name not in values}
    for values_of, named in (
        (graph.initializer, values),
        (graph.input, values),
        (graph.value_info, values),
        (graph.output, set(outputs)),
    ):
        for index in reversed(range(len(values_of))):
            if values_of[index].name not in named:
                del values_of[index]
    for index in reversed(range(len(graph.sparse_initializer))):
        if graph.sparse_initializer[index].values.name not in values:
            del graph.sparse_initializer[index]
    return dropped


def check_outputs(model: str, asked: Sequence[str], known: Sequence[str]) -> None:
    """Raise ``InvalidInput`` unless these are outputs of the model, and at least one."""
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise InvalidInput(
            f"{model} has no output {unknown[0]!r}" if unknown else "no output is asked for",
            hint=f"its outputs are {list(known)}",
        )


def inputs_needed(proto: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """For each output of a model, the inputs that it depends on."""
    weights = {t.name for t in proto.graph.initializer}
    inputs = [v.name for v in proto.graph.input if v.name not in weights]
    found = {}
    for output in proto.graph.output:
        _, values = _needed(proto.graph, (output.name,))
        found[output.name] = tuple(name for name in inputs if name in values)
    return found


def _needed(graph: onnx.GraphProto, outputs: Iterable[str]) -> tuple[set[int], set[str]]:
    """The indices of the nodes behind these values, and all values on the way."""
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    nodes: set[int] = set()
    values = set(outputs)
    open_ = list(values)
    while open_:
        index = maker.get(open_.pop())
        if index is None or index in nodes:
            continue
        nodes.add(index)
        values.update(name for name in graph.node[index].output if name)
        read = set(_reads(graph.node[index]))
        values |= read
        open_ += read
    return nodes, values


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, and whatever is named inside its subgraphs: some of it is outer."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from (value.name for value in inner.output)
            for each in inner.node:
                yield from _reads(each)
