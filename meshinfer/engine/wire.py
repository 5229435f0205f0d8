"""Reads and writes what an engine needs of serialised models; workers have no onnx package.

Just enough of the protocol-buffers wire format (protobuf.dev/programming-guides/encoding), and the
names, types and places of a model's external tensors. Field numbers are from onnx.proto3.
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
    for field, graph in fields(model):
        if field != _MODEL_GRAPH or isinstance(graph, int):
            continue
        for inner, tensor in fields(graph):
            if inner == _GRAPH_INITIALIZER and not isinstance(tensor, int):
                found = _tensor(tensor)
                if found is not None:
                    yield found


def _tensor(message: memoryview) -> ExternalTensor | None:
    dims: list[int] = []
    name, data_type, location = "", 0, 0
    entries: dict[str, str] = {}
    for field, value in fields(message):
        if field == _DIMS:
            dims.extend(numbers(value))
        elif field == _DATA_TYPE and isinstance(value, int):
            data_type = value
        elif field == _DATA_LOCATION and isinstance(value, int):
            location = value
        elif field == _NAME and not isinstance(value, int):
            name = bytes(value).decode()
        elif field == _EXTERNAL_DATA and not isinstance(value, int):
            pair = {k: bytes(v).decode() for k, v in fields(value) if not isinstance(v, int)}
            entries[pair.get(_ENTRY_KEY, "")] = pair.get(_ENTRY_VALUE, "")
    if location != 1:
        return None
    offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    if "location" not in entries or offset < 0 or length < -1:
        raise ValueError(f"tensor {name!r} has no place: {entries}")
    return ExternalTensor(name, data_type, tuple(dims), entries["location"], offset, length)


def as_bytes(field: int, value: int | memoryview) -> bytes:
    """A field, serialised, from what ``fields`` gives; not for those of a fixed width."""
    if isinstance(value, int):
        return _as_varint(field << 3) + _as_varint(value)
    return encoded(field, value)


def encoded(field: int, data: bytes | memoryview) -> bytes:
    """A field with a length: a message, a text, or packed numbers."""
    return _as_varint(field << 3 | 2) + _as_varint(len(data)) + bytes(data)


def numbers(value: int | memoryview) -> Iterator[int]:
    """Of a repeated field of numbers: one, or several packed. Negative ones as if without sign."""
    if isinstance(value, int):
        yield value
        return
    position = 0
    while position < len(value):
        number, position = _varint(value, position)
        yield number


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Each field's number and value, in order. Raises ``ValueError`` on broken bytes."""
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


def _as_varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
