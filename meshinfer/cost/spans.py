"""What a timeline is made of: tasks and transfers with their times, and what each device does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshinfer.cost.model import field_work
from meshinfer.cost.work import Work
from meshinfer.geometry import Box
from meshinfer.graph import Graph
from meshinfer.halo import Field
from meshinfer.identity import DeviceId
from meshinfer.transfers import TaskRef


@dataclass(frozen=True, slots=True)
class TaskSpan:
    """One task on its device, in seconds from the arrival of the request."""

    ref: TaskRef
    device: DeviceId
    start_s: float
    end_s: float
    work: Work


@dataclass(frozen=True, slots=True)
class TransferSpan:
    """All that one task gives another, in one message; ``end_s``: its arrival, latency included."""

    producer: TaskRef
    consumer: TaskRef
    sender: DeviceId
    receiver: DeviceId
    nbytes: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What one device does for one request, on average where requests go to different devices.

    ``peak_bytes``: its weights for the whole plan and the values of its largest task.
    """

    id: DeviceId
    busy_s: float
    bytes_sent: int
    bytes_received: int
    weight_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """A plan's predicted course. ``bound``: what takes most of its critical path, in words."""

    total_s: float
    tasks: tuple[TaskSpan, ...]
    transfers: tuple[TransferSpan, ...]
    devices: tuple[DeviceUse, ...]
    bound: str
    bottleneck_s: float

    def use(self, device: DeviceId) -> DeviceUse:
        """What this device does; nothing, if it is not in the plan."""
        for found in self.devices:
            if found.id == device:
                return found
        return DeviceUse(device, 0.0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Load:
    """What a task takes and holds on any device. ``weights``: a number for each box of an
    initializer, the same for the same box, and its bytes."""

    work: Work
    weights: Mapping[int, int]


Boxes = dict[tuple[str, Box], int]
"""Boxes of initializers, numbered as they come."""

Message = tuple[TaskRef, TaskRef, int, int]
"""Producer, consumer, bytes, and how many of these bytes cross a link: fewer, where float32 goes as
float16. Processors are charged for all of them: what converting takes is about what is saved on
encryption (``halves``)."""


def load_of(graph: Graph, field: Field, numbers: Boxes) -> Load:
    """The load of a task with this field."""
    weights = {}
    for name in field.weights:
        key = (name, field.needs[name])
        weights[numbers.setdefault(key, len(numbers))] = graph.nbytes(*key)
    return Load(field_work(graph, field), weights)
