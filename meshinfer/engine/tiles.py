"""Tiles of the same layers differ in paddings and sizes: what is optimised once serves them all.

onnxruntime's optimiser turns a convolution's weights into another layout, copies them four times
and writes them to a file, for each tile anew: 0.1 to 0.2 s of processor time for 38 MB. What it
makes of a tile is known once it has made it of another one, where no operator is that it treats by
sizes. The weights are then those of the first, in memory; tests hold this against the optimiser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256

from meshinfer.engine.wire import as_bytes, encoded, fields, numbers

_FUSED = frozenset("Relu LeakyRelu Clip Sigmoid Tanh HardSigmoid Identity".split())
"""With what makes their input."""
_SUMS = frozenset(("Add", "Sum"))
_LAYERS = _FUSED | _SUMS | frozenset("Conv MaxPool AveragePool Concat".split())
_GRAPH = 7
_NODE, _INPUT, _OUTPUT, _VALUE_INFO = 1, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTS = 1, 8
_INFO_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_VALUE = 2, 1, 2, 1, 1
_OUTER_AXES = 2
"""Batch and channels: tiles of the same layers have all of both."""

_NAMED = re.compile(r"(.*?)_nchwc(?:_token_\d+)?$", re.DOTALL)
"""How onnxruntime names an operator in its blocked layout: what was its output's name, and this."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A submodel. ``layers``: a digest of all that tiles of the same layers have in common;
    ``pads``: attribute, serialised, of what makes which value; ``fused``: that value, by the
    name of what is fused with it; ``ends``: the graph's inputs and outputs, serialised."""

    layers: str
    pads: dict[str, bytes]
    fused: dict[str, str]
    ends: tuple[bytes, ...]


def tile_of(model: bytes) -> Tile | None:
    """None where an operator is in it that may be optimised by its sizes, or for the broken."""
    try:
        return _tile_of(memoryview(model))
    except (ValueError, IndexError):
        return None


def _tile_of(model: memoryview) -> Tile | None:
    common, ends, sums, ones = sha256(), list[bytes](), False, False
    pads, fused = dict[str, bytes](), dict[str, str]()
    for field, value in fields(model):
        if field != _GRAPH or isinstance(value, int):
            common.update(as_bytes(field, value))
            continue
        for inner, message in fields(value):
            if inner == _NODE and not isinstance(message, int):
                node = _Node.of(message)
                if node.domain or node.op not in _LAYERS:
                    return None
                if node.pads is not None:
                    pads[node.outputs[0]] = bytes(node.pads)
                sums |= node.op in _SUMS
                if node.op in _FUSED:
                    read = node.inputs[0]
                    fused[node.outputs[0]] = fused.get(read, read)
                common.update(encoded(_NODE, node.others))
            elif inner in (_INPUT, _OUTPUT) and not isinstance(message, int):
                ends.append(encoded(inner, message))
                sized = _without_sizes(message)
                ones |= sized != _without_sizes(message, ones=False)
                common.update(encoded(inner, sized))
            else:
                common.update(as_bytes(inner, message))
    if sums and ones:  # maybe of two values of which one is repeated along the other
        return None
    return Tile(common.hexdigest(), pads, fused, tuple(ends))


def optimised_as(made: bytes, first: Tile, tile: Tile) -> bytes | None:
    """What the optimiser makes of ``tile``, given what it ``made`` of another of the same layers;
    None where it cannot be told."""
    if first.pads.keys() != tile.pads.keys():
        return None
    left = dict(first.pads)
    found = bytearray()
    for field, value in fields(memoryview(made)):
        if field != _GRAPH or isinstance(value, int):
            found += as_bytes(field, value)
            continue
        graph = bytearray()
        for inner, message in fields(value):
            if inner in (_INPUT, _OUTPUT, _VALUE_INFO):
                continue
            if inner == _NODE and not isinstance(message, int):
                node = _Node.of(message)
                if node.pads is not None:
                    name = next((n for n in node.may_make(first.fused) if n in left), "")
                    if not name or _ints(memoryview(left.pop(name))) != _ints(node.pads):
                        return None
                    message = memoryview(node.others + encoded(_NODE_ATTRIBUTE, tile.pads[name]))
            graph += as_bytes(inner, message)
        found += encoded(_GRAPH, bytes(graph) + b"".join(tile.ends))
    return None if left else bytes(found)


@dataclass(slots=True)
class _Node:
    """``others``: all but its paddings, serialised."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    pads: memoryview | None
    others: bytes

    @classmethod
    def of(cls, message: memoryview) -> _Node:
        text = {_NODE_OP: "", _NODE_DOMAIN: "", _NODE_NAME: ""}
        inputs, outputs, others = list[str](), list[str](), bytearray()
        pads = None
        for field, value in fields(message):
            if not isinstance(value, int):
                if field == _NODE_ATTRIBUTE and _name(value) == "pads":
                    pads = value
                    continue
                if field in (_NODE_INPUT, _NODE_OUTPUT):
                    names = inputs if field == _NODE_INPUT else outputs
                    names.append(bytes(value).decode())
                if field in text:
                    text[field] = bytes(value).decode()
            others += as_bytes(field, value)
        op, domain, name = text[_NODE_OP], text[_NODE_DOMAIN], text[_NODE_NAME]
        return cls(op, domain, name, tuple(inputs), tuple(outputs), pads, bytes(others))

    def may_make(self, fused: Mapping[str, str]) -> Iterator[str]:
        """Names of what it makes, by its own name and its output's, in the submodel: it may be
        fused with what follows it there."""
        named = _NAMED.match(self.name)
        for name in (*self.outputs[:1], *([] if named is None else [named[1]])):
            yield name
            if name in fused:
                yield fused[name]


def _ints(attribute: memoryview) -> list[int]:
    found = (numbers(value) for field, value in fields(attribute) if field == _ATTRIBUTE_INTS)
    return [number for each in found for number in each]


def _name(attribute: memoryview) -> str:
    names = [v for field, v in fields(attribute) if field == _ATTRIBUTE_NAME]
    return bytes(names[0]).decode() if names and not isinstance(names[0], int) else ""


def _without_sizes(info: memoryview, *, ones: bool = True) -> bytes:
    """A ValueInfoProto in which a size of a tile says at most whether it is 1, which may be
    repeated along another."""
    return _changed(info, (_INFO_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE), ones)


def _changed(message: memoryview, path: tuple[int, ...], ones: bool) -> bytes:
    if not path:
        return _sizes(message, ones)
    found = bytearray()
    for field, value in fields(message):
        if field == path[0] and not isinstance(value, int):
            value = memoryview(_changed(value, path[1:], ones))
        found += as_bytes(field, value)
    return bytes(found)


def _sizes(shape: memoryview, ones: bool) -> bytes:
    dims = [value for field, value in fields(shape) if field == _SHAPE_DIM]
    found = [b"" if isinstance(dim, int) else bytes(dim) for dim in dims]
    one = bytes((_DIM_VALUE << 3, 1))
    sizes = (dim if ones and dim == one else b"" for dim in found[_OUTER_AXES:])
    kept = [*found[:_OUTER_AXES], *sizes]
    return b"".join(encoded(_SHAPE_DIM, dim) for dim in kept)
