"""One process of a simulation: a core, its clock, and what its shell would hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.client import ClientCore
from meshinfer.scheduler.coordinator import CoordinatorCore
from meshinfer.scheduler.on_device import OwnTask
from meshinfer.scheduler.worker import WorkerCore

BULK = (
    m.Deliver, m.Feed, m.Answer, m.Sample, m.Ack, m.Echo, m.Echoed, m.Want, m.Chunk, m.Gone,
    m.Relay,
)  # fmt: skip
"""Messages of the bulk plane; all others are of the control plane."""

AnyCore = CoordinatorCore | WorkerCore | ClientCore


def honest_ends(message: m.AnyMessage) -> tuple[str, str]:
    """Of the connection that a message comes by: of a client that is where it says."""
    address = message.where.rpartition(" ")[2] if isinstance(message, m.Hello) else ""
    return address, address


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of virtual time that a message, a kernel, a search and a disk take."""

    latency_s: float = 0.001
    compute_s: float = 0.005
    plan_s: float = 0.02
    disk_s: float = 0.001


@dataclass(slots=True)
class Clock:
    """A node's monotonic clock: where it stood when the world's stood at 0, and how fast it is."""

    offset: float = 0.0
    rate: float = 1.0

    def local(self, world: float) -> float:
        return self.offset + world * self.rate

    def world(self, local: float) -> float:
        return (local - self.offset) / self.rate


@dataclass(eq=False)
class Node:
    """One process: a core and what its shell would hold. ``frozen_until``: it is stopped; ``due``:
    its next tick, and ``last``: its last event, by its own clock."""

    name: str
    id: str
    core: AnyCore
    clock: Clock = field(default_factory=Clock)
    alive: bool = True
    stopped: e.Stop | None = None
    frozen_until: float = 0.0
    last: float = 0.0
    due: float = 0.0
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, bytearray] = field(default_factory=dict)
    prepared: dict[int, dict[m.Place, Any]] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)
    notes: list[e.Note] = field(default_factory=list)
    resolved: dict[str, list[e.Resolve]] = field(default_factory=dict)
    settled: dict[str, list[e.Settle]] = field(default_factory=dict)
    granted: dict[int, OwnTask] = field(default_factory=dict)
    lease: float = 0.0
    gate: frozenset[str] | None = None
    """Keys that may connect; None until it is told of any."""

    @property
    def here(self) -> bool:
        return self.alive and self.stopped is None

    def __str__(self) -> str:
        return self.id
