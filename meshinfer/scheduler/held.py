"""What one device holds of one request: inputs, pieces that wait, what was begun and done."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Array
from meshinfer.scheduler.recipe import Gathering


@dataclass(slots=True)
class Held:
    """One request on this device, under its newest attempt.

    ``giver`` and ``turn``: the client that gave ``fed``, and how often it had submitted by then.
    """

    since: float
    attempt: int = 0
    deployment: int = -1
    client: str = ""
    giver: str = ""
    turn: int = -1
    fed: dict[str, Array] = field(default_factory=dict)
    scattered: bool = False
    pieces: dict[m.Place, Gathering] = field(default_factory=dict)
    begun: set[m.Place] = field(default_factory=set)
    done: list[m.Done] = field(default_factory=list)

    def renew(self, attempt: int, deployment: int) -> None:
        """Start over under a newer attempt; what the client fed stays."""
        self.attempt, self.deployment, self.scattered = attempt, deployment, False
        self.pieces.clear()
        self.begun.clear()
        self.done.clear()
