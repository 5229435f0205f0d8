"""What the coordinator knows of one request: its header, its attempts, its outcome."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.catalogue import Deployment, Model
from meshinfer.scheduler.events import Signature


@dataclass(slots=True)
class Try:
    """One attempt: the deployment that it runs under, who took what, and the tasks that are done.

    ``head``: the client, where it is itself source and sink; else empty. ``assigned``: the devices
    of each task that had a choice, the first one first.
    """

    deployment: Deployment
    since: float = 0.0
    head: str = ""
    assigned: dict[m.Place, tuple[str, ...]] = field(default_factory=dict)
    tasks: dict[m.Place, m.TaskTime] = field(default_factory=dict)

    def peers(self) -> dict[str, str]:
        """Who is to hear of it, by the names in the plan."""
        members = self.deployment.members
        return {**members, self.deployment.head: self.head} if self.head else dict(members)

    def devices(self) -> list[str]:
        """Those of the plan but for a head whose place the client took."""
        members = self.deployment.members
        return [name for name in members if not self.head or name != self.deployment.head]

    def on_wire(self) -> tuple[m.Assigned, ...]:
        """The assignment as messages carry it."""
        choices = self.deployment.choices
        return tuple(
            (*place, choices[place].index(device))
            for place, devices in self.assigned.items()
            for device in devices
        )


@dataclass(slots=True)
class Request:
    """One accepted request. ``deployment`` is None while it waits for one.

    ``merged``: when the sink has sent the answer, and under which attempt; ``outcome``: its digest.
    ``lost``: devices that were lost while it ran there, and how that was seen. ``crashes``: of
    attempts, the process that its task ended; ``together``: no one device can hold it.
    ``held_until``: it ran alone and its device was lost; why is to be told.
    """

    header: m.Submit
    client: str
    model: Model
    signature: Signature
    submitted: float
    deadline: float
    turn: int
    attempt: int = 0
    deployment: Deployment | None = None
    started: float | None = None
    merged: tuple[float, int] | None = None
    outcome: str = ""
    kernel_failures: int = 0
    tried: dict[int, Try] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    crashes: dict[int, str] = field(default_factory=dict)
    together: bool = False
    held_until: float = 0.0

    @property
    def alone(self) -> bool:
        """Whether it may run only on one device, and no other request under its plan."""
        return len(self.crashes) >= limits.CRASHES_PER_REQUEST - 1 and not self.together

    @property
    def causes(self) -> str:
        return "; ".join(each for _, each in sorted(self.crashes.items()))

    @property
    def id(self) -> str:
        return self.header.request

    @property
    def waiting(self) -> bool:
        return self.deployment is None and self.merged is None

    @property
    def runs(self) -> bool:
        return self.deployment is not None and self.merged is None

    def grace_ends(self) -> float | None:
        """Until when a merged answer waits for the times of its tasks."""
        return None if self.merged is None else self.merged[0] + limits.TIMING_GRACE_S


@dataclass(frozen=True, slots=True)
class Answered:
    """An outcome that was given. ``head``: the peer that sent, or has, the tensors."""

    reply: m.Reply
    head: str
