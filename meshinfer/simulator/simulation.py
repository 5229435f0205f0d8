"""One simulated cluster: the network with kernels, plans and users, and what checkers look at."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from meshinfer.engine import EngineError
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import describe, digest_of
from meshinfer.scheduler import events as e
from meshinfer.scheduler.worker import COORDINATOR
from meshinfer.simulator.kernels import Array, Kernels
from meshinfer.simulator.models import STYLES, Made, graph_of, made
from meshinfer.simulator.network import Network, Noise
from meshinfer.simulator.node import Clock, Node, Timing
from meshinfer.simulator.streams import Streams

HEAD = "head"
MODEL = "net"


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
    outcomes: list[tuple[float, e.Resolve]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Mishap:
    """A fault: what, to whom, from when until when."""

    what: str
    since: float
    until: float


class Simulation(Network):
    """``kernels`` outlive it. ``clocks``: rates differ by up to a tenth."""

    def __init__(
        self, streams: Streams, timing: Timing, noise: Noise, kernels: Kernels, *, clocks: bool
    ) -> None:
        self.kernels = kernels
        self.asked: list[Asked] = []
        self.mishaps: list[Mishap] = []
        self.slow: dict[str, float] = {}
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
        self._clocks: dict[str, Clock] = {}
        self._clock_rates = clocks
        self._made: dict[int, tuple[bytes, Made]] = {}
        self._by_seed: dict[str, int] = {}
        self._numbers: set[tuple[str, str, int]] = set()
        self._calls = 0
        self.on_deployed: Callable[[m.Deployed], None] = lambda answer: None
        super().__init__(streams, timing, noise)
        self.join(HEAD, self.head_facts())

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

    def ask_for(self, client: str, question: type[m.ListDevices]) -> str:
        self._calls += 1
        call = f"call-{self._calls}"
        self._handle(self.nodes[client], e.Asked(call, question(call=call), 30.0))
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
        self._handle(node, e.Submitted(request, header, arrays))
        return asked

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

    def _perform(self, node: Node, effect: e.Effect) -> None:
        super()._perform(node, effect)
        match effect:
            case e.Resolve(request):
                for asked in self.asked:
                    if (asked.request, asked.life) == (request, node.id):
                        asked.outcomes.append((self.now, effect))
            case e.Note(_, "joined" | "coordinator lost"):  # it has forgotten what it had begun
                self._begun = {key for key in self._begun if key[0] != node.id}
            case e.Settle(_, m.Deployed() as answer) if answer.failure is None:
                self.on_deployed(answer)
            case e.Send(_, _, m.Deliver() | m.Feed() | m.Answer() as message):
                key = (node.id, type(message).__name__, message.id)
                self.resent += key in self._numbers
                self._numbers.add(key)
            case _:
                pass

    def _seconds(self, node: Node, job: e.Compute) -> float:
        spread = 0.5 + self.streams["kernels"].random()
        return self.timing.compute_s * spread * self.slow.get(node.name, 1.0)

    def _prepare(self, node: Node, effect: e.Prepare) -> e.Prepared:
        data, plan = self._plan_of(effect)
        found = {}
        for program in effect.programs:
            assert program.model is not None
            assert {program.model, *program.weights} <= set(node.blobs), "a blob is not here"
            found[program.place] = self.kernels.prepare(data, plan, program)
        node.prepared[effect.deployment] = found
        return e.Prepared(effect.deployment)

    def _plan_of(self, effect: e.Prepare) -> tuple[bytes, Made]:
        """Where a coordinator has taken it up from its journal, it has another number."""
        if effect.deployment not in self._made:
            models = {program.model for program in effect.programs}
            found = (x for x in self._made.values() if models <= set(x[1].blobs))
            made = self.core.catalogue.deployments.get(effect.deployment)
            exact = (x for x in self._made.values() if made and x[1].text == made.plan)
            self._made[effect.deployment] = next(exact, None) or next(found)
        return self._made[effect.deployment]

    def _compute(self, node: Node, job: e.Compute, took: float) -> e.Computed:
        prepared = node.prepared[job.deployment][job.place]
        seed = self._by_seed[job.request]
        self.computed[job.request].append(self.now)
        key = (node.id, job.request, job.attempt, job.place)
        if key in self._begun:
            why = f"{node} computes {job.place} of {job.request} once more"
            self.wrong.append((why, job.request))
            self.tell_story(lambda: f"    ONCE MORE {why}")
        self._begun.add(key)
        before = len(self.kernels.wrong)
        try:
            outputs = self.kernels.run(prepared, job.inputs, seed)
        except EngineError as error:
            return e.Computed(job.request, job.attempt, job.place, (), 0.0, str(error))
        if len(self.kernels.wrong) > before:
            why = f"{node} {job.request}: {self.kernels.wrong[-1]}"
            self.wrong.append((why, job.request))
            self.tell_story(lambda: f"    WRONG INPUT {why}")
        return e.Computed(job.request, job.attempt, job.place, outputs, took)

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
            for device, programs in plan.programs.items()
            for program in programs
            if program.model is not None
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
