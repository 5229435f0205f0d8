"""A model that a user wants to deploy becomes a small file and its weights, each by its SHA-256.

So a model may have any size, weights that have not changed since its last version do not travel
again, and no more than one weight is in memory twice.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import EncodeError

from cluster.offers import Offer, Put
from meshinfer import limits
from meshinfer.errors import InvalidInput
from meshinfer.image import ImageSpec
from meshinfer.importers import Source, from_torch, is_torch_module, open_model
from meshinfer.importers.checks import is_external, tensors_of
from meshinfer.importers.external import Segment, name_weights
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m


def model_and_shapes(
    model: object, example: object, shapes: Mapping[str, Sequence[int]] | None
) -> tuple[object, dict[str, tuple[int, ...]] | None]:
    """What to offer, and the shapes to fix. A torch module is exported here, with its example."""
    if is_torch_module(model):
        return Source(from_torch(model, example, shapes=shapes), None), None
    if example is not None and not isinstance(example, Mapping):
        raise InvalidInput(
            f"an example was given with {type(model).__name__}, which is no torch module",
            hint="leave it out, or give {input name: array} to fix dynamic shapes",
        )
    fixed = {str(k): tuple(np.shape(v)) for k, v in (example or {}).items()}
    fixed |= {k: tuple(v) for k, v in (shapes or {}).items()}
    return model, fixed or None


def offer_model(model: object, put: Put, least: int = limits.WEIGHT_FILE_BYTES) -> Offer:
    """What to send of a model. ``put`` keeps the bytes of what lies in no file of its own.

    ``least``: bytes of a weight that travels by itself. Raises ``InvalidInput`` for what is no
    model, for weights that are not there, and for a model that is too large without its weights.
    """
    source = open_model(model)  # type: ignore[arg-type]
    proto = source.proto
    if isinstance(model, onnx.ModelProto):  # the caller's, which stays as it is
        proto = onnx.ModelProto()
        proto.CopyFrom(source.proto)
    outside = any(is_external(tensor) for tensor in tensors_of(proto))
    weights: dict[str, int] = {}
    files: dict[str, Segment] = {}
    for digest, where in name_weights(proto, source.folder, least):
        if isinstance(where, Segment):
            weights[digest], files[digest] = where.nbytes, where
        elif digest not in weights:
            weights[digest] = len(where)
            put(digest, where)
    if len(weights) > limits.WEIGHT_FILES:
        raise InvalidInput(
            f"the model has {len(weights)} weights of {least} bytes and more; "
            f"{limits.WEIGHT_FILES} are the most",
            hint="join some of its weights",
        )
    data = _bytes(proto) if weights or outside else _given(model, proto)
    digest = hashlib.sha256(data).hexdigest()
    put(digest, data)
    return Offer(digest, len(data), weights, files)


def deploy_message(
    name: str,
    offer: Offer,
    shapes: dict[str, tuple[int, ...]] | None,
    *,
    plan: Plan | str | None,
    image: ImageSpec | None,
    memory: int | Mapping[str, int] | None,
    pin: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> m.Deploy:
    """What ``Client.deploy`` was asked for, as a message; ``options``: its other fields."""
    return m.Deploy(
        call=secrets.token_hex(12),
        name=name,
        digest=offer.digest,
        nbytes=offer.nbytes,
        weights=tuple(m.Blob(digest=d, nbytes=n) for d, n in offer.weights.items()),
        plan=None if plan is None else str(plan),
        image=None if image is None else image.to_json(),
        shapes=shapes,
        pin=None if pin is None else {v: tuple(names) for v, names in pin.items()},
        memory=memory if memory is None or isinstance(memory, int) else dict(memory),
        **options,
    )


def _given(model: object, proto: onnx.ModelProto) -> bytes:
    if isinstance(model, bytes):
        return model
    if isinstance(model, str | os.PathLike):
        return Path(model).read_bytes()
    return _bytes(proto)


def _bytes(proto: onnx.ModelProto) -> bytes:
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (ValueError, EncodeError) as error:
        raise InvalidInput(
            f"the model does not fit into one file of 2 GB without its large weights: {error}",
            hint="save it with its weights as external data, and give its path",
        ) from error
