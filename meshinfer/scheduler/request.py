"""What the coordinator knows of one request: its header, its attempts, its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from meshinfer import limits
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m
from meshinfer.scheduler.catalogue import Deployment, Model
from meshinfer.scheduler.events import Signature


@dataclass(slots=True)
class Question:
    """Which tasks of lost devices are awaited somewhere? ``awaiting``: peers yet to answer."""

    asked: tuple[m.Place, ...]
    awaiting: set[str]
    lacked: set[m.Place] = field(default_factory=set)


@dataclass(slots=True)
class Try:
    """One attempt: the deployment that it runs under, who took what, and the tasks that are done.

    ``head``: the client, where it is itself source and sink; else empty. ``client``: who gets the
    answer. ``assigned``: the devices of each task that had a choice, the first one first.
    ``moved``: tasks of lost or silent devices, and where they go on; ``took``: who ever took one;
    ``untold``: those that nobody awaits, so that nobody may tell of them. ``question``: what all
    were asked about such tasks; ``unasked``: but for these, that were away.
    ``doubted``: when those that owe it were last asked for a sign of life. ``beside``: how many
    others ran as it began. ``all_by``: the device that does all of it, since links keep requests.
    ``left``: devices that are slow, and whose tasks others do from its beginning; ``twice``: tasks
    that were begun elsewhere after it, so that two may have made them.
    """

    deployment: Deployment
    since: float = 0.0
    head: str = ""
    client: str = ""
    assigned: dict[m.Place, tuple[str, ...]] = field(default_factory=dict)
    tasks: dict[m.Place, m.TaskTime] = field(default_factory=dict)
    moved: dict[m.Place, str] = field(default_factory=dict)
    took: set[str] = field(default_factory=set)
    untold: set[m.Place] = field(default_factory=set)
    unasked: set[str] = field(default_factory=set)
    question: Question | None = None
    doubted: float | None = None
    beside: int = 0
    all_by: str = ""
    left: tuple[str, ...] = ()
    twice: set[m.Place] = field(default_factory=set)

    def merges_at(self, peer: str, head: str, client: str) -> bool:
        """Whether a peer is its sink, and its answer goes to the process that asks now."""
        return self.client == client and peer == (self.head or head)

    def peers(self) -> dict[str, str]:
        """Who is to hear of it, by the names in the plan."""
        made = self.deployment
        here = made.members.keys() & self.devices()
        peers = {name: made.members[name] for name in sorted(here)}
        return {**peers, made.head: self.head} if self.head else peers

    def devices(self) -> list[str]:
        """Those that have a part in it: of the plan, but for a head whose place the client took,
        and who took over. Of many that may take a task, those that were given it."""
        made = self.deployment
        own = {
            name
            for name, programs in made.programs.items()
            if any(not p.free or not p.inputs for p in programs)
        }
        own -= {made.head} if self.head else set()
        return sorted(own.union(self.took, *self.assigned.values()))

    def in_order(self) -> list[str]:
        """All that are to begin with it, those first that do not wait for a piece: source and sink,
        and tasks of weights alone."""
        own = ((p, name) for name, each in self.deployment.programs.items() for p in each)
        first = {self.moved.get(p.place, n) for p, n in own if p.model is None or not p.inputs}
        return sorted(self.peers(), key=lambda name: (name not in first, name))

    def has_part(self, name: str, place: m.Place) -> bool:
        """Whether a task is, or was, a device's to do in this attempt."""
        devices = self.deployment.takers.get(place, ())
        its = name in self.assigned.get(place, devices[:1]) or name in self.took
        return its and name in devices

    def made_once(self, program: m.Program) -> bool:
        """Whether all that a task was given had one maker; else, should one of two lie, nobody
        knows by whose piece the task was computed."""
        read = {piece.producer for value in program.inputs for piece in value.pieces}
        copied = any(len(self.assigned.get(p, ())) > 1 for p in read)
        return not copied and not read & self.twice

    @property
    def all_told(self) -> bool:
        """Whether the times of all tasks are in that are to come."""
        return len(self.tasks.keys() | self.untold) >= self.deployment.tasks

    @property
    def plan(self) -> str:
        """The deployment's, with tasks that have moved where they are now."""
        return moved(self.deployment.plan, tuple(sorted(self.moved.items())))

    def on_wire(self) -> tuple[m.Assigned, ...]:
        """The assignment as messages carry it."""
        made = self.deployment
        choices = made.choices
        chosen = tuple(
            (*place, choices[place].index(device))
            for place, devices in self.assigned.items()
            for device in devices
        )
        if not self.moved:
            return chosen
        programs = {p.place: p for each in made.programs.values() for p in each}
        to = self.moved.items()
        return (*chosen, *((*place, programs[place].devices.index(name)) for place, name in to))


@dataclass(slots=True)
class Request:
    """One accepted request. ``deployment`` is None while it waits for one. ``nbytes``: its inputs'.

    ``merged``: when the sink has sent the answer, and under which attempt; ``outcome``: its digest.
    ``lost``: devices that were lost while it ran there, and how that was seen, last at ``hurt_at``.
    ``crashes``: the processes that its tasks ended, by those that came after them; ``together``: no
    one device can hold it, as was found at this attempt.
    ``losses``: how many devices were; ``unheard``: those whose next process has not said why yet;
    ``held_until``: it may have ended them, and waits to hear of it. ``since``: its first attempt,
    or the first one without a device whose results are wrong.
    """

    header: m.Submit
    client: str
    model: Model
    signature: Signature
    submitted: float
    deadline: float
    turn: int
    nbytes: int = 0
    attempt: int = 0
    deployment: Deployment | None = None
    started: float | None = None
    merged: tuple[float, int] | None = None
    outcome: str = ""
    kernel_failures: int = 0
    tried: dict[int, Try] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    hurt_at: float = 0.0
    losses: int = 0
    unheard: set[str] = field(default_factory=set)
    crashes: dict[str, str] = field(default_factory=dict)
    together: int | None = None
    held_until: float = 0.0
    since: int = 0

    @property
    def alone(self) -> bool:
        """Whether it may run only on one device, and no other request under its plan."""
        return len(self.crashes) >= limits.CRASHES_TOGETHER and self.together is None

    @property
    def causes(self) -> str:
        return "; ".join(self.crashes.values())

    @property
    def id(self) -> str:
        return self.header.request

    def start(self, *, again: bool = False) -> m.Start:
        """What all with a part in its attempt are told."""
        tried = self.tried[self.attempt]
        return m.Start(
            request=self.id,
            attempt=self.attempt,
            deployment=tried.deployment.number,
            client=self.client,
            assigned=tried.on_wire(),
            head=tried.head,
            again=again,
        )

    @property
    def waiting(self) -> bool:
        return self.deployment is None and self.merged is None

    @property
    def runs(self) -> bool:
        return self.deployment is not None and self.merged is None


def told_by(
    open_: Mapping[str, Request], peer: str, word: m.TaskFailed | m.Unreachable | m.NotKept
) -> Request | None:
    """The request whose present attempt this tells of, if its sender has a part in it."""
    request = open_.get(word.request)
    if request is None or request.deployment is None or request.attempt != word.attempt:
        return None
    return request if peer in request.tried[request.attempt].peers().values() else None


@lru_cache(maxsize=16)
def moved(plan: str, tasks: tuple[tuple[m.Place, str], ...]) -> str:
    """The text of a plan, with some of its tasks on other devices."""
    if not tasks:
        return plan
    parsed, to = Plan.parse(plan), dict(tasks)
    stages = []
    for s, stage in enumerate(parsed.stages):
        places = ((task, to.get((s, t))) for t, task in enumerate(stage.tasks))
        tasks_now = (replace(task, devices=(DeviceId(d),)) if d else task for task, d in places)
        stages.append(replace(stage, tasks=tuple(tasks_now)))
    return str(replace(parsed, stages=tuple(stages)))


@dataclass(frozen=True, slots=True)
class Answered:
    """An outcome that was given. ``head``: who sent, or has, the tensors; ``client``: for whom."""

    reply: m.Reply
    head: str
    client: str = ""

    def reaches(self, peer: str, head: str) -> bool:
        """Whether the tensors are at, or on their way to, a peer that asks once more. Those for a
        process that has ended are lost with it: its successor's are computed again."""
        return peer == self.client and self.head in (peer, head)
