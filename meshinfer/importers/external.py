"""Weights in files of their own are read from the model's folder, and from nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from meshinfer.errors import InvalidInput


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


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
