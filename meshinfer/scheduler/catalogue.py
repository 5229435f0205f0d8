"""What is deployed: model versions, and for each input signature the plan that serves it.

A deployment is planned, installed on its devices, ready, and at last retired; a new one is made
beside the old and takes over when it is ready, so no request meets half a plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.changes import Drift, Links
from meshinfer.scheduler.events import Signature
from meshinfer.scheduler.ledger import Published
from meshinfer.scheduler.standing_by import Spares

Inputs = Mapping[str, tuple[str, tuple[int | None, ...] | None]]
Outputs = Mapping[str, tuple[str, ...]]
"""The inputs that each output depends on."""


@dataclass(slots=True)
class Call:
    """A client that awaits the answer to its ``Deploy``."""

    peer: str
    name: str
    since: float


@dataclass(slots=True)
class Model:
    """One version of a model. ``call`` is open until its first plan is ready. ``version``: 0 until
    it is on disk that it is ``reserved`` for this model. ``deploy``: all that was asked.

    ``blobs``: bytes of the model and of the weights beside it, by digest; ``missing``: to come.
    ``answer``: what was said, if the client did not hear it; ``used_at``: a request of it began.
    """

    key: int
    name: str
    digest: str
    blobs: Mapping[str, int]
    image: str | None
    plan: str | None
    objective: str
    spread: bool
    strict: bool
    shapes: Mapping[str, tuple[int, ...]]
    call: Call | None
    asked: Call
    deploy: m.Deploy
    pin: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    memory: Mapping[str, int] | int | None = None
    half_transfers: bool = False
    answer: m.Deployed | None = None
    version: int = 0
    reserved: int = 0
    used_at: float = 0.0
    inputs: Inputs = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    opened: bool = False
    signatures: list[Signature] = field(default_factory=list)
    unprepared: dict[Signature, tuple[str, ...]] = field(default_factory=dict)

    def asked_for(self, signature: Signature) -> Signature:
        """Remember it as the latest, and return the one object for it, so that rules need not
        compare shapes. Exits do not push out what answers with all outputs."""
        if signature in self.signatures:
            signature = self.signatures.pop(self.signatures.index(signature))
        self.signatures.append(signature)
        self.unprepared = {s: n for s, n in self.unprepared.items() if s in self.signatures}
        whole = [s for s in self.signatures if s.outputs is None]
        exits = [s for s in self.signatures if s.outputs is not None]
        self.signatures = [*whole[-limits.SHAPES_PER_MODEL :], *exits[-limits.EXITS_PER_MODEL :]]
        return signature

    def default_signature(self) -> Signature | None:
        """The signature of the fixed shapes; None while an input is dynamic."""
        shapes = []
        for name, (_, dims) in self.inputs.items():
            fixed = self.shapes.get(name)
            if fixed is None and (dims is None or None in dims):
                return None
            shapes.append((name, fixed or tuple(d for d in dims or () if d is not None)))
        return Signature(False, tuple(sorted(shapes)))


class Phase(Enum):
    """Of a deployment."""

    PLANNING = "planning"
    INSTALLING = "installing"
    READY = "ready"
    RETIRED = "retired"


@dataclass(slots=True)
class Deployment:
    """A plan for a (model, signature), on the devices named by their incarnation.

    ``factors``: how much slower than its profile each device was when it was planned. ``given``: by
    the user. ``takers``: the devices that have each task; ``choices``: of each that may go to any.
    ``expected``: seconds of each task on each device that may get it. ``window``: requests in
    flight, as the plan says. ``drift``, ``links``: what has changed since. ``in_vain``: how often
    another plan was looked for since, and was no better. ``search_s``: of the coordinator's
    processor that the last search took; ``share``: of it that it may. ``asked``: requests since.
    ``head``: the device that is source and sink, where the client is not. ``tasks``: of a request.
    ``ready_at``: since when it serves. ``alone``: the one request that runs under it; it does not.
    """

    number: int
    model: Model
    signature: Signature
    members: dict[str, str]
    candidates: tuple[str, ...]
    since: float
    phase: Phase = Phase.PLANNING
    plan: str = ""
    report: m.Report | None = None
    programs: Mapping[str, tuple[m.Program, ...]] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    takers: Mapping[m.Place, tuple[str, ...]] = field(default_factory=dict)
    choices: Mapping[m.Place, tuple[str, ...]] = field(default_factory=dict)
    expected: Mapping[tuple[m.Place, str], float] = field(default_factory=dict)
    window: int = 1
    factors: Mapping[str, float] = field(default_factory=dict)
    given: bool = False
    drift: Drift = field(default_factory=Drift)
    links: Links = field(default_factory=Links)
    in_vain: int = 0
    search_s: float = 0.0
    share: float = 1.0
    asked: int = 0
    head: str = ""
    alone: str = ""
    ready_at: float = 0.0
    spares: Spares = field(default_factory=Spares)
    tasks: int = 0

    def held(self, name: str) -> tuple[int, int]:
        """Bytes that a device is expected to hold at most: of its own, and of others' tasks."""
        known = self.report.devices if self.report else ()
        return next(((d.peak_bytes, d.spare_bytes) for d in known if d.device == name), (0, 0))

    def room(self, name: str, memory_bytes: int) -> int:
        """Bytes that a device which grants so many may hold of it; 0 where nothing bounds it."""
        given = self.model.memory
        budget = given.get(name) if isinstance(given, Mapping) else given
        return min((room for room in (memory_bytes, budget) if room), default=0)

    def take_on(self, plan: Mapping[str, tuple[m.Program, ...]]) -> None:
        """Its programs; of all that might have been, theirs are its members and who stands by for
        one. Of an earlier coordinator's plan, one that stood by may not have come back."""
        self.run_by(plan)
        self.takers = {p.place: p.devices or (name,) for name, each in plan.items() for p in each}
        programs = (p for each in plan.values() for p in each)
        spares = sorted({name for p in programs for name in p.spares} & self.members.keys())
        self.spares.peers = {name: self.members[name] for name in spares}
        self.members = {name: self.members[name] for name in (*self.programs, *spares)}

    def only_spare(self, name: str) -> bool:
        """Whether a device has nothing but what it prepares for others; none while planned."""
        return bool(self.programs) and name not in self.programs

    def spare_programs(self, name: str) -> tuple[m.Program, ...]:
        """Those of others that a device prepares, should one of these be lost."""
        return tuple(p for each in self.programs.values() for p in each if name in p.spares)

    @property
    def idle(self) -> frozenset[str]:
        """Devices that might have tasks of it, and have none."""
        return frozenset(self.candidates) - self.programs.keys()

    @property
    def longest_s(self) -> float:
        """What its longest task is expected to take: on its own device or two that stand by."""
        names = {p: every if p in self.choices else every[:3] for p, every in self.takers.items()}
        taken = ((place, name) for place, each in names.items() for name in each)
        return max((self.expected.get(each, 0.0) for each in taken), default=0.0)

    @property
    def kind(self) -> Hashable:
        """What its tasks' times are compared within: one model for one signature."""
        return (self.model.key, self.signature)

    @property
    def rounded(self) -> bool:
        """Whether float32 goes as float16 somewhere under this plan."""
        sent = (s for ps in self.programs.values() for program in ps for s in program.sends)
        return self.model.half_transfers and any(send.half for send in sent)

    def seconds(self, place: m.Place, device: str) -> float | None:
        """Of a task, as expected when it was planned; None where nothing is known."""
        return self.expected.get((place, device))

    def paced(self, factors: Mapping[str, float]) -> None:
        """The same plan, with times expected by other factors."""
        scale = {d: f / self.factors.get(d, 1.0) for d, f in factors.items()}
        self.expected = {key: s * scale.get(key[1], 1.0) for key, s in self.expected.items()}
        self.factors, self.drift = factors, self.drift.settled()

    @property
    def most_running(self) -> int:
        """Requests that may run under it at once."""
        return min(max(self.window, limits.RUNNING_REQUESTS), limits.WINDOW)

    def run_by(self, programs: Mapping[str, tuple[m.Program, ...]]) -> None:
        """The devices' programs, from now on. What is asked for each reply is counted once."""
        self.programs = programs
        self.tasks = len({p.place for each in programs.values() for p in each if p.model})


@dataclass(slots=True)
class Catalogue:
    """Mutable: owned by the coordinator's core. ``opening``: on their way to their version.
    ``resuming``: published by an earlier coordinator, to be opened; ``lost``: why some of a name
    could not be."""

    models: dict[str, list[Model]] = field(default_factory=dict)
    opening: dict[int, Model] = field(default_factory=dict)
    deployments: dict[int, Deployment] = field(default_factory=dict)
    _last_model: int = 0
    first_deployment: int = 0
    _deployments_made: int = 0
    resuming: dict[int, Model] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    _newest_version: Counter[str] = field(default_factory=Counter)

    def asked(self, peer: str, call: str) -> Model | None:
        """The model that this very call opened."""
        return next(
            (o for o in self.all_models() if (o.asked.peer, o.asked.name) == (peer, call)), None
        )

    def open(self, message: m.Deploy, peer: str, now: float) -> Model:
        call = Call(peer, message.call, now)
        model = self._new(message, call)
        model.call = call
        self.opening[model.key] = model
        return model

    def resume(self, entry: Published, now: float) -> Model:
        """A version that an earlier coordinator had; it is opened before it is planned."""
        model = self._new(entry.deploy, Call(entry.peer, entry.deploy.call, now))
        model.version, model.reserved = entry.version, entry.version
        model.inputs, model.outputs, model.image = entry.inputs, entry.outputs, entry.image
        self.models.setdefault(model.name, []).append(model)
        self._newest_version[model.name] = model.version
        self.resuming[model.key] = model
        return model

    def _new(self, message: m.Deploy, asked: Call) -> Model:
        self._last_model += 1
        return Model(
            key=self._last_model,
            name=message.name,
            digest=message.digest,
            blobs={message.digest: message.nbytes, **{w.digest: w.nbytes for w in message.weights}},
            image=message.image,
            plan=message.plan,
            objective=message.objective,
            spread=message.spread,
            strict=message.strict,
            pin=message.pin or {},
            memory=message.memory,
            half_transfers=message.half_transfers,
            shapes=dict(message.shapes or {}),
            call=None,
            asked=asked,
            deploy=message,
        )

    def reserve(self, model: Model) -> None:
        """Give the model the next version of its name, which it becomes when it is published."""
        model.reserved = self._newest_version[model.name] + 1
        self._newest_version[model.name] = model.reserved

    def publish(self, model: Model) -> None:
        """The model becomes the current version of its name."""
        self.opening.pop(model.key, None)
        model.version = model.reserved
        versions = self.models.setdefault(model.name, [])
        versions.append(model)
        del versions[: -limits.VERSIONS_PER_MODEL]

    def withdraw(self, model: Model, why: str) -> None:
        """A version that cannot come back."""
        self.resuming.pop(model.key, None)
        self.lost[model.name] = why
        self.models[model.name].remove(model)
        if not self.models[model.name]:
            del self.models[model.name]

    def find(self, name: str, version: int | None) -> Model | None:
        versions = self.models.get(name, [])
        if version is None:
            return versions[-1] if versions else None
        return next((v for v in versions if v.version == version), None)

    def all_models(self, *asked: Model) -> list[Model]:
        """Those on their way, all versions that are kept, and older ones that are ``asked`` yet."""
        kept = (v for versions in self.models.values() for v in versions)
        return list({each.key: each for each in (*self.opening.values(), *kept, *asked)}.values())

    def new_deployment(
        self,
        model: Model,
        signature: Signature,
        members: dict[str, str],
        names: tuple[str, ...],
        now: float,
    ) -> Deployment:
        self._deployments_made += 1
        number = self.first_deployment + self._deployments_made
        made = Deployment(number, model, signature, members, names, now)
        self.deployments[made.number] = made
        return made

    def serving(self, model: Model, signature: Signature) -> Deployment | None:
        """The newest ready deployment."""
        return self._newest(model, signature, (Phase.READY,))

    def running(self, model: Model, signature: Signature, now: float) -> Deployment | None:
        """What requests run under: a newer one not before it can bear a loss, as the older can, or
        who does all of that has prepared this, or has tried to for long enough."""
        found = self._all(model, signature, (Phase.READY,))
        if len(found) < 2 or found[-1].spares.prepared or not found[-1].spares.beside:
            return found[-1] if found else None
        new, one = found[-1], found[-2].drift.by_one
        wait_s = limits.RETREAT_SPARES_S if one in new.spares.peers else limits.SPARES_WAIT_S
        waits = one not in new.spares.ready and now < new.ready_at + wait_s
        return found[-2] if waits else new

    def alone(self, request: str) -> Deployment | None:
        """The plan on one device of a request that may run on no more, once it is ready."""
        made = next((d for d in self.deployments.values() if d.alone == request), None)
        return made if made is not None and made.phase is Phase.READY else None

    def coming(self, model: Model, signature: Signature) -> Deployment | None:
        """The one that is being planned or installed."""
        return self._newest(model, signature, (Phase.PLANNING, Phase.INSTALLING))

    def _newest(
        self, model: Model, signature: Signature, phases: tuple[Phase, ...]
    ) -> Deployment | None:
        return next(reversed(self._all(model, signature, phases)), None)

    def _all(
        self, model: Model, signature: Signature, phases: tuple[Phase, ...]
    ) -> list[Deployment]:
        return [
            d
            for d in self.deployments.values()
            if d.model is model and d.signature == signature and d.phase in phases and not d.alone
        ]

    @property
    def searching(self) -> bool:
        """Whether a search takes so much of the coordinator's device that its tasks slow down."""
        made = self.deployments.values()
        return any(d.phase is Phase.PLANNING and d.share > limits.SEARCH_SHARE for d in made)

    def infos(self) -> tuple[m.ModelInfo, ...]:
        """All versions; plan texts as long as they fit into one message."""
        room = limits.LISTED_PLANS_BYTES
        found = []
        for name, versions in sorted(self.models.items()):
            for model in versions:
                plans = []
                for made in self.deployments.values():
                    if made.model is model and made.phase is Phase.READY:
                        room -= len(made.plan)
                        plans.append(made.plan if room >= 0 else "(too long to list)")
                info = m.ModelInfo(
                    name=name,
                    version=model.version,
                    digest=model.digest,
                    current=model is versions[-1],
                    inputs=tuple(model.inputs),
                    outputs=tuple(model.outputs),
                    image=model.image,
                    plans=tuple(plans),
                )
                found.append(info)
        return tuple(found)


def with_notes(report: m.Report, notes: tuple[str, ...]) -> m.Report:
    """A report with more notes in front, within its bounds."""
    cut = tuple(note[: limits.REPORT_LINE_CHARS] for note in notes)
    more: m.Report = structs.replace(report, notes=(*cut, *report.notes)[: limits.REPORT_ENTRIES])
    return more
