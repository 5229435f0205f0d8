"""Reads the names, types and places of a model's external tensors; workers have no onnx package.

Just enough of the protocol-buffers wire format (protobuf.dev/programming-guides/encoding) to walk
ModelProto.graph.initializer, field numbers from onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """An initializer whose bytes lie in ``location``; ``data_type`` is ONNX's
    TensorProto.DataType."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def external_tensors(model: memoryview) -> Iterator[ExternalTensor]:
    """The external initializers of a serialised ModelProto. Raises ``ValueError`` on broken
    bytes."""
    for field, graph in _fields(model):
        if field != _MODEL_GRAPH or isinstance(graph, int):
            continue
        for inner, tensor in _fields(graph):
            if inner == _GRAPH_INITIALIZER and not isinstance(tensor, int):
                found = _tensor(tensor)
                if found is not None:
                    yield found


def _tensor(message: memoryview) -> ExternalTensor | None:
    dims: list[int] = []
    name, data_type, location = "", 0, 0
    entries: dict[str, str] = {}
    for field, value in _fields(message):
        if field == _DIMS and isinstance(value, int):
            dims.append(value)
        elif field == _DIMS and not isinstance(value, int):  # packed
            position = 0
            while position < len(value):
                dim, position = _varint(value, position)
                dims.append(dim)
        elif field == _DATA_TYPE and isinstance(value, int):
            data_type = value
        elif field == _DATA_LOCATION and isinstance(value, int):
            location = value
        elif field == _NAME and not isinstance(value, int):
            name = bytes(value).decode()
        elif field == _EXTERNAL_DATA and not isinstance(value, int):
            pair = {k: bytes(v).decode() for k, v in _fields(value) if not isinstance(v, int)}
            entries[pair.get(_ENTRY_KEY, "")] = pair.get(_ENTRY_VALUE, "")
    if location != 1:
        return None
    offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    if "location" not in entries or offset < 0 or length < -1:
        raise ValueError(f"tensor {name!r} has no place: {entries}")
    return ExternalTensor(name, data_type, tuple(dims), entries["location"], offset, length)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        field, kind = key >> 3, key & 7
        if kind == 0:
            number, position = _varint(message, position)
            yield field, number
            continue
        if kind == 2:
            size, position = _varint(message, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        if position + size > len(message):
            raise ValueError("a field runs beyond the end of the message")
        yield field, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError("a broken varint")
        byte = message[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return result, position
        shift += 7
