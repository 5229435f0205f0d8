"""The bytes of a model that a user wants to deploy, with its external weights put inside."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from google.protobuf.message import EncodeError

from meshinfer.errors import InvalidInput
from meshinfer.importers import open_model


def model_bytes(model: object) -> bytes:
    """One self-contained ONNX file. Raises ``InvalidInput`` for what is no model."""
    if isinstance(model, bytes):
        return model
    source = open_model(model)  # type: ignore[arg-type]
    external = any(
        t.data_location == onnx.TensorProto.EXTERNAL for t in source.proto.graph.initializer
    )
    if not external and isinstance(model, str | os.PathLike):
        return Path(model).read_bytes()
    if external and source.folder is not None:
        try:
            onnx.load_external_data_for_model(source.proto, str(source.folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise InvalidInput(
                f"its external weights cannot be read: {error}",
                hint="keep the weight files beside the model",
            ) from error
    try:
        return source.proto.SerializeToString()
    except (ValueError, EncodeError) as error:
        raise InvalidInput(
            f"the model does not fit into one file of 2 GB: {error}",
            hint="models above 2 GB are to come; split it or quantise it",
        ) from error
