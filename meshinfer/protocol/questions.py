"""What a client may ask of the coordinator beside its requests, and the answers."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshinfer import limits
from meshinfer.protocol.board import Board
from meshinfer.protocol.records import (
    Count,
    Facts,
    Label,
    Link,
    Message,
    ModelInfo,
    Name,
    Record,
    Seconds,
    Text,
    Word,
)


class DeviceInfo(Record, frozen=True):
    """A device as ``meshinfer devices`` shows it. ``link``: to the coordinator's own device;
    ``links``: to others that it has sent to; ``where``: the same for those on one host;
    ``port``: of its bulk socket.

    ``state``: ready, suspect, excluded, quarantined, draining or dead; ``cause``: why it is so, or
    how its last process ended; ``returns_s``: until it is ready again by itself. ``computing``:
    what its compute thread does, for ``computing_s``; ``stale_tasks``: those that nobody wanted any
    more when they were done, which were dropped. ``blobs``: how many submodels and weights it was
    handed since it joined; ``board``: how warm it is, if it tells.
    """

    device: Name
    state: Word
    facts: Facts
    heard_s: Seconds
    computing: Label = ""
    tasks_done: Count = 0
    link: Link | None = None
    links: Annotated[tuple[Link, ...], Meta(max_length=limits.DEVICES)] = ()
    where: Text = ""
    cause: Text = ""
    returns_s: Seconds = 0.0
    computing_s: Seconds = 0.0
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    stale_tasks: Count = 0
    blobs: Count = 0
    board: Board | None = None


class ListDevices(Message, frozen=True):
    """``lost``: those too that died of late, with the cause."""

    call: Name
    lost: bool = False


class Devices(Message, frozen=True):
    """Answer to ``ListDevices``."""

    call: Name
    devices: Annotated[tuple[DeviceInfo, ...], Meta(max_length=limits.LISTED)]


class ListModels(Message, frozen=True):
    """Which models are deployed?"""

    call: Name


class Models(Message, frozen=True):
    """Answer to ``ListModels``."""

    call: Name
    models: Annotated[tuple[ModelInfo, ...], Meta(max_length=limits.LISTED)]
