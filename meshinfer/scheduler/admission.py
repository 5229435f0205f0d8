"""Whether a request can be served: the model is there, the tensors fit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from math import prod

import msgspec
import numpy as np
import xxhash

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import DTYPES
from meshinfer.scheduler.catalogue import Catalogue, Model
from meshinfer.scheduler.events import Signature

_NAMED = 8
"""How many models a hint names."""

_LISTED = 32
"""How many outputs a hint names."""


def refuse(catalogue: Catalogue, message: m.Submit) -> m.Failure | None:
    """Why the request can never be served as it is; None when it can."""
    model = catalogue.find(message.model, message.version)
    if model is None:
        known = get_close_matches(message.model, sorted(catalogue.models), _NAMED, cutoff=0.0)
        what = message.model if message.version is None else f"{message.model} v{message.version}"
        text = f"no model {what!r} is deployed"
        hint = f"deployed are, likest first, {known}" if known else "deploy it: client.deploy"
        if message.model in catalogue.lost:
            text, hint = catalogue.lost[message.model], "deploy it again"
        return m.Failure(error="ModelNotFound", message=text, hint=hint)
    return _outputs(model, message) or _tensors(model, message)


def same_body(one: m.Submit, other: m.Submit) -> bool:
    """Whether two submits of one id ask for the same, of the same tensors."""
    return _asked(one) == _asked(other)


def body_of(message: m.Submit) -> str:
    """What ``same_body`` compares, as 128 bits in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(_asked(message)))


def _asked(message: m.Submit) -> tuple[object, ...]:
    of = message
    return of.model, of.version, of.picture, of.inputs, of.outputs, of.body


def refuse_deploy(catalogue: Catalogue, message: m.Deploy) -> m.Failure | None:
    """Why a model is not even fetched; None when it is."""
    if message.strict and message.half_transfers:
        return _invalid(
            "strict=True keeps every bit, half_transfers=True rounds what devices exchange",
            "ask for one of them",
        )
    nbytes = message.nbytes + sum(weight.nbytes for weight in message.weights)
    if nbytes > limits.MODEL_BYTES:
        return _invalid(
            f"the model has {nbytes} bytes, more than {limits.MODEL_BYTES}", "use a smaller model"
        )
    names = {*catalogue.models, *(o.name for o in catalogue.opening.values())}
    coming = sum(sum(o.blobs.values()) for o in catalogue.opening.values())
    many = message.name not in names and len(names) >= limits.MODELS
    full = len(catalogue.opening) >= limits.OPEN_DEPLOYS
    if many or full or coming + nbytes > limits.DEPLOYING_BYTES:
        return m.Failure(
            error="QueueFull",
            message=f"{len(names)} models are deployed, {len(catalogue.opening)} are on their way",
            hint="deploy later, or under a name that is in use",
            retry_after_s=10.0,
        )
    return None


def refuse_model(model: Model) -> m.Failure | None:
    """Why a model that was opened cannot be served; None when it can."""
    unknown = sorted(set(model.shapes) - set(model.inputs))
    if unknown:
        return _invalid(
            f"shapes were given for {unknown}", f"{model.name}'s inputs are {sorted(model.inputs)}"
        )
    for kind, names in (("input", model.inputs), ("output", model.outputs)):
        long = [name for name in names if not 0 < len(name) <= limits.NAME_CHARS]
        if long:
            return _invalid(
                f"the {kind} {long[0][:60]!r}... has a name of {len(long[0])} characters",
                f"rename it to at most {limits.NAME_CHARS}",
            )
    return None


def signature_of(model: Model, message: m.Submit) -> Signature:
    """Of an accepted request. What its outputs do not need makes no difference."""
    asked = None if message.outputs is None else set(message.outputs)
    outputs = tuple(name for name in model.outputs if asked is None or name in asked)
    exits = None if asked is None or len(outputs) == len(model.outputs) else outputs
    needed = set(model.inputs) if exits is None else _needed(model, exits)
    shapes = tuple(sorted((t.name, t.shape) for t in message.inputs if t.name in needed))
    return Signature(message.picture, shapes, exits)


def _needed(model: Model, outputs: Iterable[str]) -> set[str]:
    return {name for output in outputs for name in model.outputs[output]}


def _outputs(model: Model, message: m.Submit) -> m.Failure | None:
    unknown = [name for name in message.outputs or () if name not in model.outputs]
    if unknown or message.outputs == ():
        return _invalid(
            f"{model.name} has no output {unknown[0]!r}" if unknown else "no output is asked for",
            f"its outputs are {list(model.outputs)[:_LISTED]}",
        )
    return None


def _tensors(model: Model, message: m.Submit) -> m.Failure | None:
    inputs = dict(model.inputs)
    if message.picture:
        if model.image is None:
            return _invalid(
                f"{model.name} takes arrays, not pictures", "deploy it with image=ImageSpec(...)"
            )
        spec = json.loads(model.image)
        channels = 1 if spec.get("colour") == "GRAY" else 3
        inputs[spec["input"]] = ("|u1", (1, None, None, channels))
    given = {t.name for t in message.inputs}
    needed = set(inputs) if message.outputs is None else _needed(model, message.outputs)
    if not needed <= given <= set(inputs) or len(given) != len(message.inputs):
        asked = "" if message.outputs is None else f", {sorted(needed)} are needed"
        return _invalid(
            f"{model.name} was given the inputs {sorted(t.name for t in message.inputs)}",
            f"its inputs are {sorted(inputs)}{asked}",
        )
    for tensor in message.inputs:
        dtype, dims = inputs[tensor.name]
        if tensor.dtype != dtype or dtype not in DTYPES:
            return _invalid(
                f"input {tensor.name!r} has type {tensor.dtype}, {model.name} wants {dtype}",
                f"convert it with array.astype('{dtype}')"
                if dtype in DTYPES
                else "tensors of this type cannot travel",
            )
        if dims is not None and not _fits(tensor.shape, dims):
            wanted = [d if d is not None else "any" for d in dims]
            return _invalid(
                f"input {tensor.name!r} has shape {list(tensor.shape)}, "
                f"{model.name} wants {wanted}",
                "resize the array to the model's shape",
            )
        nbytes = prod(tensor.shape) * np.dtype(dtype).itemsize
        if nbytes > limits.MESSAGE_BYTES:
            return _invalid(
                f"input {tensor.name!r} has {nbytes} bytes, more than {limits.MESSAGE_BYTES}",
                "give a smaller array",
            )
    return None


def _fits(shape: tuple[int, ...], dims: tuple[int | None, ...]) -> bool:
    return len(shape) == len(dims) and all(
        d is None or d == s for s, d in zip(shape, dims, strict=True)
    )


def _invalid(message: str, hint: str) -> m.Failure:
    return m.Failure(error="InvalidInput", message=message, hint=hint)


def unavailable(message: str, hint: str) -> m.Failure:
    return m.Failure(error="ClusterUnavailable", message=message, hint=hint, retry_after_s=5.0)


def other_body(message: m.Submit) -> m.Reply:
    failure = m.Failure(
        error="InvalidInput",
        message=f"the id {message.request!r} belongs to another request",
        hint="give each request an id of its own",
    )
    return m.Reply(request=message.request, failure=failure)
