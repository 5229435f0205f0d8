"""What one device holds of one request: inputs, pieces that wait, what was begun and done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Array
from meshinfer.scheduler.recipe import Gathering


@dataclass(slots=True)
class Held:
    """One request on this device, under its newest attempt.

    ``made``: what tasks (and the source) have made here for tasks that have several devices.
    ``head``: the peer that is this request's source and sink, if not the plan's own device.
    ``giver`` and ``turn``: the client that gave ``fed``, and how often it had submitted by then.
    ``heard``: when its attempt was first heard of; ``ready``: when the last piece of a task came,
    and how long its device had waited for that with nothing to do.
    """

    since: float
    attempt: int = 0
    deployment: int = -1
    client: str = ""
    head: str = ""
    giver: str = ""
    turn: int = -1
    fed: dict[str, Array] = field(default_factory=dict)
    scattered: bool = False
    pieces: dict[m.Place, Gathering] = field(default_factory=dict)
    begun: set[m.Place] = field(default_factory=set)
    done: list[m.Done] = field(default_factory=list)
    assigned: tuple[m.Assigned, ...] = ()
    heard: float = 0.0
    ready: dict[m.Place, tuple[float, float]] = field(default_factory=dict)
    made: dict[m.Place, Sequence[Array]] = field(default_factory=dict)
    not_kept: set[m.Place] = field(default_factory=set)

    @property
    def kept_bytes(self) -> int:
        """Of what tasks have made here, for tasks that may be assigned again."""
        return sum(array.nbytes for arrays in self.made.values() for array in arrays)

    def routes(self, send: m.Send, assigned: Iterable[m.Assigned] | None = None) -> tuple[str, ...]:
        """The devices that take the task which a send is for, of all that are assigned or of
        these."""
        if not send.others:
            return (send.device,) if assigned is None else ()
        devices = (send.device, *send.others)
        return tuple(
            devices[k]
            for stage, task, k in (self.assigned if assigned is None else assigned)
            if (stage, task) == send.consumer and 0 <= k < len(devices)
        )

    def takes(self, program: m.Program, device: str) -> bool:
        """Whether this device is to run a task in this attempt."""
        return not program.devices or any(
            (stage, task) == program.place and program.devices[k : k + 1] == (device,)
            for stage, task, k in self.assigned
        )

    def renew(self, attempt: int, deployment: int, now: float) -> None:
        """Start over under a newer attempt; what the client fed stays."""
        self.attempt, self.deployment, self.scattered = attempt, deployment, False
        self.assigned, self.heard, self.head = (), now, ""
        self.ready.clear()
        self.made.clear()
        self.not_kept.clear()
        self.pieces.clear()
        self.begun.clear()
        self.done.clear()
