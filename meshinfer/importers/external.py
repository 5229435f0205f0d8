"""Weights in files of their own: read from the model's folder and from nowhere else, or made so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx

from meshinfer.errors import InvalidInput

MOVED_FROM_BYTES = 1024
_ALIGNMENT = 64  # onnxruntime computes on the mapped bytes


def check_external(proto: onnx.ModelProto, folder: Path | None) -> None:
    """Raise ``InvalidInput`` unless all external data lie inside ``folder`` (links resolved)."""
    for tensor in _tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if folder is None:
            raise InvalidInput(
                f"weight {tensor.name!r} lies in the file {location!r} beside the model",
                hint="give the model's path, so that its folder is known",
            )
        path = (folder / location).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise InvalidInput(
                f"weight {tensor.name!r} lies outside the model's folder, at {location!r}",
                hint="put the weights beside the model and save it with their names",
            )
        if not path.is_file():
            raise InvalidInput(
                f"the file {location!r} of weight {tensor.name!r} is missing",
                hint=f"copy it to {folder}, beside the model",
            )


def move_weights(proto: onnx.ModelProto, file: Path) -> bool:
    """Move the large weights into ``file``, in place; False where some have a file already.

    onnxruntime maps that file. Serialised into the model they cost two copies more, and a second
    for every 200 MB in which no other thread of this process runs (measured on VGG-16).
    """
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in _tensors(proto.graph)):
        return False
    with file.open("wb") as out:
        for tensor in proto.graph.initializer:
            data = tensor.raw_data
            if len(data) < MOVED_FROM_BYTES:
                continue
            out.seek(-out.tell() % _ALIGNMENT, os.SEEK_CUR)
            place = {"location": file.name, "offset": out.tell(), "length": len(data)}
            out.write(data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
    return True


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
