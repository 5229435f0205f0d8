"""One simulated cluster: the network with kernels, plans and users, and what checkers look at."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.engine import EngineError
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import describe, digest_of
from meshinfer.protocol.token import Role
from meshinfer.scheduler import events as e
from meshinfer.scheduler.checks import PROVEN, SUSPECT
from meshinfer.scheduler.enrolment import Door
from meshinfer.scheduler.worker import COORDINATOR
from meshinfer.simulator.copies import Copies
from meshinfer.simulator.granted import Granted
from meshinfer.simulator.kernels import Array, Kernels
from meshinfer.simulator.models import STYLES, Made, graph_of, made
from meshinfer.simulator.network import Noise
from meshinfer.simulator.node import Clock, Node, Timing
from meshinfer.simulator.streams import Streams
from meshinfer.simulator.word import Word

HEAD = "head"
KNOWN: Mapping[Role, tuple[str, ...]] = {
    "worker": (HEAD, "pi-1", "pi-2", "pi-3", "pi-4", "pi-8", "pi-9"),
    "admin": ("ann", "bob"),
}
MODEL = "net"
BAD_INPUT, POISON = 6, 7
"""Inputs that fail every kernel, and that end every process whose kernel is given them."""
_BACK_S = 0.7


@dataclass(slots=True)
class Asked:
    """A request as its user knows it. ``life``: which process of the client asked."""

    request: str
    client: str
    life: str
    seed: int
    at: float
    deadline_s: float
    datas: tuple[bytes, ...]
    """The models that may answer: the one that served, and those that were being deployed."""
    cancelled: bool = False
    here: bool = False
    """Its client computes it itself."""
    outcomes: list[tuple[float, e.Resolve]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Mishap:
    """A fault: what, to whom, from when until when."""

    what: str
    since: float
    until: float


class Simulation(Copies):
    """``kernels`` outlive it. ``clocks``: rates differ by up to a tenth."""

    def __init__(
        self, streams: Streams, timing: Timing, noise: Noise, kernels: Kernels, *, clocks: bool
    ) -> None:
        self.kernels = kernels
        self.asked: list[Asked] = []
        self.mishaps: list[Mishap] = []
        self.slow: dict[str, float] = {}
        self.hung: dict[str, float] = {}
        """Until when nothing that a machine begins to compute is done."""
        self.kernel_errors = 0.0
        """The chance of each task to fail."""
        self.kernel_failures: Counter[str] = Counter()
        self.deaths: defaultdict[tuple[str, str], Counter[int]] = defaultdict(Counter)
        """Processes that each attempt has ended, by request and the coordinator's process."""
        self._ended: dict[str, m.Ended] = {}
        self.liar, self.lies = "", 0.0
        """A device whose results are wrong, and how often."""
        self.found: list[tuple[float, str, bool]]
        """Devices that work no more for that, since when, and whether it is proven; a coordinator
        that starts again knows of none."""
        self.accused: list[tuple[str, bool]] = []
        """All that ever were."""
        self.disk_full_until = 0.0
        self.disk_refused: set[str] = set()
        """Coordinators that were told that their disk is full."""
        self.unwritten: list[str] = []
        """Ids that were answered, and were not on disk."""
        self.granted = Granted(self)
        self.word = Word()
        self.styles: tuple[str, ...] = STYLES
        self.spares = True
        """Whether devices prepare tasks of others, for the loss of one."""
        self.resent = 0
        self.wrong: list[tuple[str, str]] = []
        """What kernels noticed, and of which request."""
        self.computed: defaultdict[str, list[float]] = defaultdict(list)
        """When tasks of each request were begun."""
        self.cancelled_at: dict[str, float] = {}
        self._begun: set[tuple[str, str, int, m.Place]] = set()
        self.datas: list[bytes] = []
        """Models in the order in which they were deployed."""
        self.serving: list[bytes] = []
        """Of those, which may serve a request that is submitted now."""
        self.served_until: dict[bytes, float] = {}
        """When it was told that the others do not serve any more."""
        self._clocks: dict[str, Clock] = {}
        self._clock_rates = clocks
        self._made: dict[int, tuple[bytes, Made]] = {}
        self._by_seed: dict[str, int] = {}
        self._numbers: set[tuple[str, str, int]] = set()
        self._calls = 0
        self.on_deployed: Callable[[m.Deployed], None] = lambda answer: None
        self.on_stranger_told: Callable[[m.AnyMessage], None] = lambda answer: None
        super().__init__(streams, timing, noise, Door(1, self._known()))
        self.join(HEAD, self.head_facts())

    def _known(self) -> tuple[m.Admission, ...]:
        """Those that are admitted from the start; users are admins."""
        return tuple(
            m.Admission(key=self.key_of(name), name=name, role=role)
            for role, names in KNOWN.items()
            for name in names
        )

    def _stranger_told(self, name: str, message: m.AnyMessage) -> None:
        self.on_stranger_told(message)

    @staticmethod
    def head_facts() -> m.Facts:
        return m.Facts(computes=False, head=True, host="h")

    def _clock(self, name: str) -> Clock:
        """Of a machine: its processes share it, and it goes on when they end."""
        machine = COORDINATOR if name == HEAD else name
        if machine not in self._clocks:
            rng = self.streams["clocks"]
            offset, rate = rng.uniform(10.0, 1e5), rng.uniform(0.9, 1.1)
            self._clocks[machine] = Clock(offset, rate if self._clock_rates else 1.0)
        return self._clocks[machine]

    # --- users

    def deploy(self, client: str, kind: int, version: int, data: bytes) -> str:
        """Ask to deploy; returns the call."""
        digest = hashlib.sha256(data).hexdigest()
        node = self.nodes[client]
        node.blobs[digest] = data
        self.datas.append(data)
        self.serving.append(data)
        self._calls += 1
        call = f"call-{self._calls}"
        message = m.Deploy(call=call, name=MODEL, digest=digest, nbytes=len(data))
        self.tell_story(lambda: f"DEPLOY {call} by {node}")
        self._handle(node, e.Asked(call, message, 120.0))
        return call

    def ask_for(self, client: str, question: Callable[..., m.AnyMessage], **said: object) -> str:
        """Returns the call."""
        self._calls += 1
        call = f"call-{self._calls}"
        self._handle(self.nodes[client], e.Asked(call, question(call=call, **said), 30.0))
        return call

    def submit(self, client: str, seed: int, deadline_s: float, request: str) -> Asked:
        """One request, or the same one once more by another process of the client."""
        node = self.nodes[client]
        arrays = self.kernels.inputs(self.datas[0], seed)
        self._by_seed[request] = seed
        header = m.Submit(
            request=request,
            model=MODEL,
            version=None,
            inputs=tuple(describe(n, a) for n, a in arrays.items()),
            picture=False,
            deadline_s=deadline_s,
            body=digest_of(arrays),
        )
        before = (a.datas for a in self.asked if a.request == request)
        datas = tuple(dict.fromkeys((*self.serving, *(d for each in before for d in each))))
        asked = Asked(request, client, node.id, seed, self.now, deadline_s, datas)
        self.asked.append(asked)
        self.tell_story(lambda: f"SUBMIT {request} by {node}, {deadline_s:.2f} s")
        if seed == POISON or not self.granted.runs(node, asked, header, arrays):
            self._handle(node, e.Submitted(request, header, arrays))
        return asked

    def served_within(self, seconds: float) -> list[bytes]:
        """Models that served so shortly ago."""
        return [d for d, until in self.served_until.items() if self.now - until <= seconds]

    def cancel(self, asked: Asked) -> None:
        asked.cancelled = True
        self.cancelled_at[asked.request] = self.now
        self.tell_story(lambda: f"CANCEL {asked.request}")
        self._handle(self.nodes[asked.client], e.Cancelled(asked.request))

    @property
    def open(self) -> list[Asked]:
        """What somebody still waits for."""
        lives = {n.id for n in self.clients()}
        return [a for a in self.asked if not a.outcomes and not a.cancelled and a.life in lives]

    # --- effects

    def _handle(self, node: Node, event: e.Event, at_least: float = 0.0) -> None:
        self.word.heard(node, event)
        super()._handle(node, event, at_least)
        taken = self.word.taken()
        if taken is not None:
            self.wrong.append((f"{node} takes a piece of attempt {taken.attempt}", taken.request))

    def _perform(self, node: Node, effect: e.Effect) -> None:
        super()._perform(node, effect)
        if node.name == COORDINATOR:
            self.word.said(effect)
        match effect:
            case e.Resolve(request):
                for asked in self.asked:
                    if (asked.request, asked.life) == (request, node.id):
                        asked.outcomes.append((self.now, effect))
                reply = effect.reply
                assert isinstance(reply, m.Reply)
                if reply.failure is None and request not in self.ledger.requests:
                    self.unwritten.append(request)
            case e.Lease():
                self.granted.told(node)
            case e.Send(_, _, m.Ran() as ran):
                self.granted.counted[node.id] += ran.count
            case e.Note(_, "joined" | "coordinator lost"):  # it has forgotten what it had begun
                self._begun = {key for key in self._begun if key[0] != node.id}
            case e.Note(_, text, fields) if text in (PROVEN, SUSPECT):
                proven = text == PROVEN
                self.accused.append((str(fields["device"]), proven))
                self.found.append((self.now, *self.accused[-1]))
            case e.Settle(_, m.Deployed() as answer) if answer.failure is None:
                self.on_deployed(answer)
            case e.Send(_, _, m.Deliver() | m.Feed() | m.Answer() as message):
                key = (node.id, type(message).__name__, message.id)
                self.resent += key in self._numbers
                self._numbers.add(key)
            case _:
                pass

    def _seconds(self, node: Node, job: e.Compute) -> float:
        if not job.request:  # a try; it draws nothing, so that seeds are what they were
            return self.timing.compute_s * self.slow.get(node.name, 1.0)
        spread = 0.5 + self.streams["kernels"].random()
        took = self.timing.compute_s * spread * self.slow.get(node.name, 1.0)
        if self._by_seed[job.request] == POISON:
            self.at(self.now + took / 2, lambda: self._die_of(node, job))
        return took + max(0.0, self.hung.get(node.name, 0.0) - self.now)

    def _die_of(self, node: Node, job: e.Compute) -> None:
        """A request ends the process that computes it; its supervisor starts the next."""
        if not node.here:
            return
        self.tell_story(lambda: f"FAULT poison: {job.request} ends {node}")
        self.deaths[job.request, self.coordinator.id][job.attempt] += 1
        self.mishaps.append(Mishap("poison", self.now, self.now + _BACK_S))
        why = "ended by signal SIGSEGV"
        self._ended[node.name] = m.Ended(
            cause=why, request=job.request, attempt=job.attempt, place=job.place
        )
        self.kill(node.name)
        self.at(self.now + _BACK_S, lambda: self.nodes[node.name].here or self.join(node.name))

    def join(self, name: str, facts: m.Facts | None = None, **changes: object) -> Node:
        """As in a world; its hello tells how the process before ended."""
        ended = self._ended.pop(name, None)
        return super().join(name, facts, **({} if ended is None else {"ended": ended}), **changes)

    def _disk(self, record: e.Record) -> m.Failure | None:
        if self.now >= self.disk_full_until:
            return None
        self.disk_refused.add(self.coordinator.id)
        return m.Failure(
            error="ClusterUnavailable",
            message="the coordinator cannot write its journal: database or disk is full",
            hint="make room on the disk",
            retry_after_s=limits.JOURNAL_RETRY_S,
        )

    def _prepare(self, node: Node, effect: e.Prepare) -> e.Prepared:
        data, plan = self.plan_by_number(effect.deployment, *effect.programs)
        found = {}
        for program in effect.programs:
            assert program.model is not None
            assert {program.model, *program.weights} <= set(node.blobs), "a blob is not here"
            found[program.place] = self.kernels.prepare(data, plan, program)
        node.prepared.setdefault(effect.deployment, {}).update(found)
        return e.Prepared(effect.deployment)

    def plan_by_number(self, number: int, *programs: m.Program) -> tuple[bytes, Made]:
        """Where a coordinator has taken it up from its journal, it has another number."""
        if number not in self._made:
            models = {program.model for program in programs}
            found = (x for x in self._made.values() if models <= set(x[1].blobs))
            made = self.core.catalogue.deployments.get(number)
            exact = (x for x in self._made.values() if made and x[1].text == made.plan)
            self._made[number] = next(exact, None) or next(found)
        return self._made[number]

    def _compute(self, node: Node, job: e.Compute, took: float) -> e.Computed:
        prepared = node.prepared[job.deployment][job.place]
        seed, ids = self._by_seed[job.request], (job.request, job.attempt, job.place)
        self.computed[job.request].append(self.now)
        key = (node.id, job.request, job.attempt, job.place)
        if key in self._begun and not job.again:
            why = f"{node} computes {job.place} of {job.request} once more"
            self.wrong.append((why, job.request))
            self.tell_story(lambda: f"    ONCE MORE {why}")
        if not job.again:
            self._begun.add(key)
        if self.fails(seed):
            self.kernel_failures[job.request] += 1
            self.mishaps.append(Mishap("kernel error", self.now, self.now))
            return e.Computed(*ids, (), 0.0, "a kernel failed", job.again)
        before = len(self.kernels.wrong)
        try:
            outputs = self.kernels.run(prepared, job.inputs, seed)
        except EngineError as error:
            return e.Computed(*ids, (), 0.0, str(error), job.again)
        if len(self.kernels.wrong) > before:
            why = f"{node} {job.request}: {self.kernels.wrong[-1]}"
            self.wrong.append((why, job.request))
            self.tell_story(lambda: f"    WRONG INPUT {why}")
        if node.name == self.liar and self.streams["lies"].random() < self.lies:
            self.tell_story(lambda: f"    LIE {node} {job.place} of {job.request}")
            outputs = tuple(a + 1 for a in outputs)
        return e.Computed(*ids, outputs, took, again=job.again)

    def _chance(self) -> float:
        """As it is outside; more is checked where somebody lies, since seeds are short."""
        drawn: float = self.streams["checks"].random()
        return drawn**3 if self.liar else drawn

    def _coordinator(self, bulk: m.Peer) -> Node:
        self.found = []
        return super()._coordinator(bulk)

    def fails(self, seed: int) -> bool:
        """Whether a kernel raises, given this input."""
        by_chance = self.kernel_errors > 0.0
        return seed == BAD_INPUT or (
            by_chance and self.streams["errors"].random() < self.kernel_errors
        )

    def _open(self, node: Node, effect: e.OpenModel) -> e.ModelOpened:
        graph = graph_of(node.blobs[effect.digest])
        inputs = {n: ("<f4", graph.shape(n)) for n in graph.inputs}
        outputs = dict.fromkeys(graph.outputs, graph.inputs)
        return e.ModelOpened(effect.key, inputs, None, outputs=outputs)

    def _plan(self, node: Node, effect: e.MakePlan) -> e.PlanReady:
        data = node.blobs[effect.digest]
        names = tuple(c.device for c in effect.candidates)
        rng = self.streams["plans"]
        style = rng.choice(self.styles)
        if effect.present is not None and rng.random() < 0.5:
            return e.PlanReady(effect.deployment, kept=True, search_s=self.timing.plan_s)
        plan = made(data, names, effect.head, style, self.spares)
        self.tell_story(lambda: f"    plan {effect.deployment}: {style} on {names}")
        self._made[effect.deployment] = (data, plan)
        for digest, blob in plan.blobs.items():
            node.blobs.setdefault(digest, blob)
        expected = {
            (program.place, device): self.timing.compute_s
            for own, programs in plan.programs.items()
            for program in programs
            for device in ((own, *program.spares) if program.model is not None else ())
        }
        return e.PlanReady(
            effect.deployment,
            plan.text,
            plan.programs,
            plan.report,
            window=plan.window,
            expected=expected,
            search_s=self.timing.plan_s,
        )

    # --- what checkers ask

    def data_of(self, plan: str) -> bytes | None:
        """The model that a plan is of."""
        return next((d for d in self.datas if graph_of(d).digest in plan.split("\n", 1)[0]), None)

    def is_right(self, asked: Asked, data: bytes, outputs: dict[str, Array]) -> bool:
        return self.kernels.is_right(data, asked.seed, outputs)
