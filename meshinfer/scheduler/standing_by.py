"""Who stands by for the devices of a deployment, and what they have taken over."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from meshinfer.protocol import messages as m


@dataclass(slots=True)
class Spares:
    """Devices that prepare tasks of others, should one of these be lost.

    ``peers``: which, as they were when it was planned; ``told``: to prepare them; ``ready``: they
    have. ``moved``: tasks of devices that were lost since, and who takes them. ``beside``: they
    have room for that beside an older plan, which can serve until then.
    """

    peers: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    ready: set[str] = field(default_factory=set)
    moved: dict[m.Place, str] = field(default_factory=dict)
    beside: bool = True

    @property
    def prepared(self) -> bool:
        """Whether all that stand by are ready to."""
        return self.ready >= self.peers.keys()


def first_ready(program: m.Program, ready: Collection[str], but: Collection[str]) -> str:
    """The first of a task's spare devices that has prepared it; empty where none has."""
    return next((d for d in program.spares if d in ready and d not in but), "")
