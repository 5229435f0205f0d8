"""What the coordinator and the process that plans say to each other: frames over two pipes.

Length first, then msgpack. Effects and events are those of the cores, checked against their types.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, TypeVar

import msgspec

from meshinfer import limits
from meshinfer.scheduler.events import MakePlan, ModelOpened, OpenModel, PlanReady

_LENGTH_BYTES = 8
_NUMBER_BYTES = 8
_READ_BYTES = 1 << 16  # all that a pipe holds
_T = TypeVar("_T")


class Begin(msgspec.Struct, frozen=True):
    """The first frame. ``folder``, ``max_bytes``: of the blobs. ``models``: those opened before,
    with the files of their weights; oldest first. ``parent``: the process to end with. ``drops``:
    where numbers of searches come that nobody wants, each before a SIGUSR1."""

    folder: str
    max_bytes: int
    models: Mapping[str, tuple[str, ...]]
    parent: int
    log_level: str
    log_form: str
    drops: int


class Job(msgspec.Struct, frozen=True):
    """One of the two."""

    open: OpenModel | None = None
    plan: MakePlan | None = None


class Answer(msgspec.Struct, frozen=True):
    """One of the two. ``weights``: the files of those of a model, if it could be opened."""

    opened: ModelOpened | None = None
    planned: PlanReady | None = None
    weights: tuple[str, ...] | None = None


def remember(models: dict[str, tuple[str, ...]], digest: str, weights: tuple[str, ...]) -> None:
    """A model was opened; newest last, and the oldest are forgotten."""
    models.pop(digest, None)
    models[digest] = weights
    for old in list(models)[: -limits.MODELS * limits.VERSIONS_PER_MODEL]:
        del models[old]


def write(stream: IO[bytes], item: msgspec.Struct) -> None:
    """Raises ``OSError`` or ``ValueError`` when nobody reads, or the stream is closed."""
    body = msgspec.msgpack.encode(item)
    stream.write(len(body).to_bytes(_LENGTH_BYTES, "little"))
    stream.write(body)
    stream.flush()


def read(stream: IO[bytes], kind: type[_T]) -> _T | None:
    """The next frame; None at the end of the stream, also amid a frame.

    Raises ``msgspec.MsgspecError`` for what is no such thing."""
    head = stream.read(_LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    if len(head) < _LENGTH_BYTES or len(body := stream.read(length)) < length:
        return None
    return msgspec.msgpack.decode(body, type=kind)


def write_drop(pipe: int, deployment: int) -> None:
    """Raises ``OSError`` when nobody reads, or nobody has for long."""
    os.write(pipe, deployment.to_bytes(_NUMBER_BYTES, "little"))


def read_drops(pipe: int) -> list[int]:
    """Those that are there now; ``pipe`` does not block."""
    try:
        data = os.read(pipe, _READ_BYTES)
    except BlockingIOError:
        return []
    starts = range(0, len(data), _NUMBER_BYTES)
    return [int.from_bytes(data[i : i + _NUMBER_BYTES], "little") for i in starts]
