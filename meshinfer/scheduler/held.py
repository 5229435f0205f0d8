"""What one device holds of one request: inputs, pieces that wait, what was begun and done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from meshinfer.protocol import messages as m
from meshinfer.scheduler.authority import names_of
from meshinfer.scheduler.events import Array
from meshinfer.scheduler.recipe import Gathering, Recipe


@dataclass(slots=True)
class Held:
    """One request on this device, under its newest attempt.

    ``done``: own tasks that are not told of yet, of all that are ``finished``.
    ``made``: what tasks (and the source) have made here for tasks that have several devices;
    ``kept_bytes``: of tasks.
    ``head``: the peer that is this request's source and sink, if not the plan's own device.
    ``giver`` and ``turn``: the client that gave ``fed``, and how often it had submitted by then.
    ``heard``: when its attempt, or the first piece of it, came; ``ready``: when the last piece of a
    task came, and how long its device had waited for that with nothing to do.
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
    finished: int = 0
    assigned: tuple[m.Assigned, ...] = ()
    heard: float = 0.0
    ready: dict[m.Place, tuple[float, float]] = field(default_factory=dict)
    made: dict[m.Place, Sequence[Array]] = field(default_factory=dict)
    kept_bytes: int = 0
    not_kept: set[m.Place] = field(default_factory=set)

    def may_give(self, peer: str) -> bool:
        """Whether inputs may come from a peer: once it has begun, from its client's holder alone,
        whose next process may ask again."""
        return not self.client or names_of(peer)[1] == names_of(self.client)[1]

    def take(self, peer: str, turn: int, name: str, array: Array) -> bool:
        """An input, unless its giver has given it anew since; those of another turn are dropped."""
        if peer == self.giver and turn < self.turn:
            return False
        if (peer, turn) != (self.giver, self.turn):
            self.giver, self.turn = peer, turn
            self.fed.clear()
        self.fed[name] = array
        return True

    def runs(self, attempt: int, deployment: int) -> bool:
        """Whether this is what it is at now."""
        return (self.attempt, self.deployment) == (attempt, deployment)

    def keep(self, place: m.Place, arrays: Sequence[Array], nbytes: int) -> None:
        """Until the release, for devices that take a task which reads it later."""
        self.made[place] = arrays
        self.kept_bytes += nbytes

    def routes(self, send: m.Send, assigned: Iterable[m.Assigned] | None = None) -> tuple[str, ...]:
        """The devices that take the task which a send is for, of all that are assigned or of
        these."""
        if not send.others or (send.spare and not self.assigned):
            return (send.device,) if assigned is None else ()
        devices = (send.device, *send.others)
        found = tuple(
            devices[k]
            for stage, task, k in (self.assigned if assigned is None else assigned)
            if (stage, task) == send.consumer and 0 <= k < len(devices)
        )
        return found or ((send.device,) if send.spare and assigned is None else ())

    def takes(self, program: m.Program, device: str) -> bool:
        """Whether this device is to run a task in this attempt."""
        taken = [k for *place, k in self.assigned if tuple(place) == program.place]
        if not taken:
            return program.is_own(device)
        return any(program.devices[k : k + 1] == (device,) for k in taken)

    def has_tasks(self, programs: Iterable[m.Program], device: str) -> bool:
        """Whether this device is to run any of these in this attempt."""
        return any(p.model is not None and self.takes(p, device) for p in programs)

    def finish(self, done: m.Done, programs: Iterable[m.Program], device: str) -> list[m.Done]:
        """A task of its own is done; all that are not told yet, once it is the last of those that
        no other has taken: the answer cannot come before it."""
        self.done.append(done)
        self.finished += 1
        own = (p for p in programs if p.model is not None and p.is_own(device))
        if self.finished < sum(self.takes(program, device) for program in own):
            return []
        last, self.done = self.done, []
        return last

    def lacks(self, recipes: Mapping[m.Place, Recipe], device: str) -> set[m.Place]:
        """The tasks from which those of this device that have not begun still await a piece."""
        found: set[m.Place] = set()
        for place, recipe in recipes.items():
            if place in self.begun or not self.takes(recipe.program, device):
                continue
            missing = (self.pieces.get(place) or Gathering(recipe)).missing
            pieces = (piece for value in recipe.program.inputs for piece in value.pieces)
            found |= {piece.producer for piece in pieces if piece.slot in missing}
        return found

    def renew(self, attempt: int, deployment: int, now: float) -> None:
        """Start over under a newer attempt; what the client fed stays."""
        self.attempt, self.deployment, self.scattered = attempt, deployment, False
        self.assigned, self.heard, self.head = (), now, ""
        self.ready.clear()
        self.made.clear()
        self.kept_bytes = 0
        self.not_kept.clear()
        self.pieces.clear()
        self.begun.clear()
        self.done.clear()
        self.finished = 0
