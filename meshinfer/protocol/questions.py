"""What a client may ask of the coordinator beside its requests, and the answers."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshinfer import limits
from meshinfer.protocol.records import DeviceInfo, Message, ModelInfo, Name


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
