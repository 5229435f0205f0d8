"""Joins the real cores by a fake link with virtual time; real messages, real plans, real kernels.

Every message passes through the codec, so that each send is also a receive. Only sockets, threads,
disks and the clock are fake: blobs are dicts, computing is instant and takes virtual time.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from oracle import assert_exact

from meshinfer.cost import DeviceProfile, timeline
from meshinfer.cost.expected import expected_seconds, is_better
from meshinfer.engine import EngineError
from meshinfer.engine.ort import OrtEngine, OrtPrepared
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.image import ImageSpec
from meshinfer.importers import inputs_needed, load, open_model
from meshinfer.legality import as_asked, validate
from meshinfer.plan import Plan
from meshinfer.planner import Block, axes_of, build, find_spares, pins_of
from meshinfer.programs import Programs, make_programs
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Buffer, decode, describe, digest_of, encode, failure_of
from meshinfer.protocol.report import Report
from meshinfer.report import report_of, with_spares
from meshinfer.scheduler import events as e
from meshinfer.scheduler.client import ClientCore
from meshinfer.scheduler.enrolment import Door
from meshinfer.scheduler.worker import COORDINATOR, WorkerCore
from meshinfer.simulator.node import AnyCore, Node, Timing
from meshinfer.simulator.world import World

LATENCY_S, COMPUTE_S, PLAN_S, DISK_S = 0.001, 0.005, 0.02, 0.001
STEPS = 60_000
Planner = Callable[[Graph, Sequence[str]], Plan]
Matches = Callable[["Node", "Node", m.AnyMessage], bool]
Outputs = tuple[np.ndarray, ...]


# --- Models -------------------------------------------------------------------------------------


@cache
def conv_net(size: tuple[int, int] | None = (12, 10), seed: int = 0) -> bytes:
    """Two convolutions with a residual and a second output that is a mean; ``None``: any size."""
    rng = np.random.default_rng(seed)
    rows, columns = size or ("rows", "columns")

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) * 0.4, name)

    pads = [1, 1, 1, 1]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], pads=pads),
        helper.make_node("Sigmoid", ["a"], ["s"]),
        helper.make_node("Conv", ["s", "w2", "b2"], ["c"], pads=pads),
        helper.make_node("Add", ["c", "s"], ["y"]),
        helper.make_node("GlobalAveragePool", ["y"], ["mean"]),
    ]
    shape = [1, 3, rows, columns]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, rows, columns]),
            helper.make_tensor_value_info("mean", TensorProto.FLOAT, [1, 8, 1, 1]),
        ],
        [weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("w2", 8, 8, 3, 3), weight("b2", 8)],
    )
    opsets = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def image(seed: int = 0, size: tuple[int, int] = (12, 10)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((1, 3, *size)).astype(np.float32)}


# --- What the shells do, remembered over all tests ------------------------------------------------


@cache
def _imported(model: bytes, spec: str | None, signature: e.Signature):  # type: ignore[no-untyped-def]
    picture = None if spec is None else ImageSpec.from_json(spec)
    shapes = dict(signature.shapes)
    return load(model, shapes=shapes, image=picture, outputs=signature.outputs)


@cache
def _planned(
    model: bytes, spec: str | None, signature: e.Signature, names: tuple[str, ...], head: str,
    text: str | None, slowdowns: tuple[float, ...], planner: Planner | None = None,
    half_transfers: bool = False, spares: bool = True,
) -> tuple[str, Programs, Report, Plan]:  # fmt: skip
    graph = as_asked(_imported(model, spec, signature), half_transfers=half_transfers)
    if text is None and planner is not None:
        plan = planner(graph, names)
    elif text is None:
        plan = banded(graph, names, head, [1.0 / each for each in slowdowns])
    else:
        plan = Plan.parse(text)
    validate(graph, plan)
    report = report_of(graph, plan, timeline(graph, plan, []))
    profiles = [DeviceProfile(DeviceId(name), 1e9) for name in names]
    found = find_spares(graph, plan, profiles if spares else [], pins_of(graph, plan, profiles, {}))
    return str(plan), make_programs(graph, plan, found.devices), with_spares(report, found), plan


def banded(
    graph: Graph, names: Sequence[str], head: str, speeds: Sequence[float] | None = None
) -> Plan:
    """Bands of rows over all devices, cut after every second op: halos, and gathers to the sink."""
    cuts = [0, *(c for c in graph.cut_points if c % 2 == 0), len(graph.ops)]
    blocks = [Block(a, b, None) for a, b in itertools.pairwise(cuts)]
    shares = dict(zip(map(DeviceId, names), speeds or [1.0] * len(names), strict=True))
    return build(graph, axes_of(graph), blocks, shares, (DeviceId(head), DeviceId(head)))


class _Engine:
    """One engine for all devices: sessions by the digest of their submodel."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="meshinfer-cores-")
        self._engine = OrtEngine(Path(self.folder.name))
        self._sessions: dict[str, OrtPrepared] = {}

    def keep(self, digest: str, data: bytes) -> None:
        path = Path(self.folder.name) / digest
        if not path.exists():
            path.write_bytes(data)

    def session(self, digest: str, model: bytes) -> OrtPrepared:
        if digest not in self._sessions:
            self._sessions[digest] = self._engine.prepare(model)
        return self._sessions[digest]


@cache
def _engine() -> _Engine:
    return _Engine()


# --- Nodes ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Device(Node):
    """A node whose kernels are real."""

    def run_here(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the only deployment that was granted to this client answers."""
        (task,) = self.granted.values()
        program = task.grant.program
        assert program.model is not None
        assert {program.model, *program.weights} <= set(self.blobs), "a blob is not here"
        session = _engine().session(program.model, self.blobs[program.model])
        return task.run(inputs, session.run)


class Stuck(AssertionError):
    """What was awaited did not happen; the text is the story."""


class Cluster(World):
    """A coordinator, a head, workers and clients. ``delay`` draws the time a message takes.
    ``beside``: clients are on the coordinator's host, and so source and sink themselves."""

    def __init__(
        self,
        workers: Sequence[str] = ("pi-1", "pi-2"),
        clients: Sequence[str] = ("ann",),
        *,
        delay: Callable[[], float] = lambda: LATENCY_S,
        head: bool = True,
        beside: bool = False,
        door: Door | None = None,
    ) -> None:
        self.beside = beside
        self.story: deque[tuple[float, str]] = deque(maxlen=20_000)
        self.plans_asked = 0
        self.kernel_fault: Callable[[Node, e.Compute], str | None] = lambda node, job: None
        self.forge: Callable[[Node, e.Compute, Outputs], Outputs] = lambda node, job, made: made
        """What devices say that their tasks made."""
        self.draw: Callable[[], float] = lambda: 1.0
        """By which the coordinator chooses tasks to be checked: none."""
        self.slowness: dict[str, float] = {}
        """How many times longer a task takes on a device; 1 where not said."""
        self.lasting: dict[str, float] = {}
        """How many times longer yet it would take if the device went on computing."""
        self.works: dict[tuple[int, m.Place, str], float] = {}
        """What tasks take on devices as they say they are; with ``by_work``, do take."""
        self.by_work = False
        self.planner: Planner | None = None
        """What makes plans where none is given; None: bands, each on one device."""
        self.spares = True
        """Whether devices prepare tasks of others, for the loss of one."""
        self.plan_s = PLAN_S
        self.prepare_s = 0.0
        """What it takes a device to prepare tasks, if more than its disk."""
        self.plan_fault: Callable[[e.MakePlan], m.Failure | None] = lambda effect: None
        self.severed: set[frozenset[str]] = set()
        """Pairs of nodes between which all is lost, silently."""
        self.disk: Callable[[e.Record], m.Failure | None] = lambda record: None
        """Why something cannot be written, if so."""
        self._rules: list[tuple[Matches, Callable[[], object] | None, float]] = []
        super().__init__(Timing(LATENCY_S, COMPUTE_S, PLAN_S, DISK_S), delay, now=100.0, door=door)
        if head:
            self.join("head", m.Facts(computes=False, head=True, host="h"))
        for name in workers:
            self.join(name)
        for name in clients:
            self.connect(name)
        if head:
            self.settle(lambda: all(self._joined(n) for n in self.living()))

    # --- members

    def _node(self, name: str, peer: str, core: AnyCore) -> Node:
        return Device(name, peer, core)

    def connect(self, name: str, **changes: object) -> Node:  # type: ignore[override]
        """Start a client, beside the coordinator where all are."""
        return super().connect(name, beside=self.beside, **changes)

    def cut(self, name: str) -> None:
        """The control connection breaks and is made anew: what was on its way is lost."""
        node = self.nodes[name]
        self.tell_story(lambda: f"CUT {node}")
        self.take_back(
            lambda to, event: (
                (to is node and event.peer == COORDINATOR)
                or (to is self.coordinator and event.peer == node.id)
            )
        )
        self.post(self.coordinator, e.PeerLost(node.id, "reset"), 0.0)
        self.post(node, e.PeerLost(COORDINATOR, "reset"), 0.0)

    def _joined(self, node: Node) -> bool:
        match node.core:
            case WorkerCore():
                return node.core.joined
            case ClientCore():
                return node.id in self.core.members.clients
            case _:
                return True

    # --- what a user does

    def deploy(self, name: str = "net", model: bytes | None = None, *, client: str = "ann",
               announce: str | None = None, timeout_s: float = 60.0,
               **fields: object) -> str:  # fmt: skip
        """Ask to deploy; returns the call."""
        data = conv_net() if model is None else model
        digest = hashlib.sha256(data).hexdigest() if announce is None else announce
        node = self.nodes[client]
        node.blobs[digest] = data
        call = f"call-{next(self._order)}"
        message = m.Deploy(call=call, name=name, digest=digest, nbytes=len(data), **fields)  # type: ignore[arg-type]
        self._handle(node, e.Asked(call, message, timeout_s))
        return call

    def deployed(
        self, name: str = "net", model: bytes | None = None, **fields: object
    ) -> m.Deployed:
        """Deploy and wait."""
        call = self.deploy(name, model, **fields)
        answer = self.answer(call)
        assert isinstance(answer.answer, m.Deployed) and answer.failure is None, answer
        return answer.answer

    def answer(self, call: str) -> e.Settle:
        found = [n.settled for n in self.nodes.values() if n.settled is not None]
        self.settle(lambda: any(call in settled for settled in found))
        (only,) = next(settled[call] for settled in found if call in settled)
        return only

    def ask(
        self, question: type[m.ListDevices] | type[m.ListModels], client: str = "ann"
    ) -> e.Settle:
        call = f"call-{next(self._order)}"
        self._handle(self.nodes[client], e.Asked(call, question(call=call), 10.0))
        return self.answer(call)

    def submit(self, arrays: Mapping[str, np.ndarray] | None = None, model: str = "net", *,
               client: str = "ann", deadline_s: float = 30.0, request: str | None = None,
               version: int | None = None, picture: bool = False,
               outputs: tuple[str, ...] | None = None) -> str:  # fmt: skip
        """Submit a request; returns its id."""
        arrays = image() if arrays is None else arrays
        request = request or f"request-{next(self._order)}"
        header = m.Submit(
            request=request,
            model=model,
            version=version,
            inputs=tuple(describe(n, a) for n, a in arrays.items()),
            picture=picture,
            deadline_s=deadline_s,
            outputs=outputs,
            body=digest_of(arrays),
        )
        self._handle(self.nodes[client], e.Submitted(request, header, arrays))
        return request

    def outcome(self, request: str, client: str = "ann") -> e.Resolve:
        """Wait for the outcome; there is exactly one."""
        resolved = self.nodes[client].resolved
        self.settle(lambda: request in resolved, about=request)
        (only,) = resolved[request]
        return only

    def reply(self, request: str, client: str = "ann") -> m.Reply:
        reply = self.outcome(request, client).reply
        assert isinstance(reply, m.Reply)
        return reply

    def failure(self, request: str, client: str = "ann") -> m.Failure:
        found = self.reply(request, client).failure
        assert found is not None, "it was answered"
        return found

    def check(self, request: str, arrays: Mapping[str, np.ndarray] | None = None,
              model: bytes | None = None, client: str = "ann") -> m.Reply:  # fmt: skip
        """Wait for the answer and hold it against plain onnxruntime; returns the reply."""
        outcome = self.outcome(request, client)
        reply = outcome.reply
        assert isinstance(reply, m.Reply) and reply.failure is None, reply
        source = conv_net() if model is None else model
        assert_exact(source, image() if arrays is None else arrays, outcome.arrays)
        return reply

    # --- faults

    def when(self, matches: Matches, then: Callable[[], object]) -> None:
        """Do something as the next such message is sent (the message itself goes out)."""
        self._rules.append((matches, then, 0.0))

    def drop(self, matches: Matches) -> None:
        """Lose the next such message."""
        self._rules.append((matches, None, 0.0))

    def delay(self, matches: Matches, seconds: float) -> None:
        """Let the next such message take so long; later ones on that link wait behind it."""
        self._rules.append((matches, None, seconds))

    # --- the link

    def inject(self, node: Node, peer: str, message: m.AnyMessage, payload: bytes = b"") -> None:
        """A message out of nowhere."""
        decoded, body = decode([bytes(f) for f in encode(message, payload or None)])
        self._handle(node, e.Arrived(peer, decoded, body))

    def _carry(
        self, sender: Node, receiver: Node, plane: e.Plane, frames: list[Buffer], what: e.Arrived
    ) -> None:
        message, payload = what.message, what.payload
        if frozenset((sender.name, receiver.name)) in self.severed:
            self.tell_story(lambda: "    ... SEVERED")
            return
        extra = 0.0
        for rule in list(self._rules):
            matches, then, seconds = rule
            if matches(sender, receiver, message):
                self._rules.remove(rule)
                if then is None and not seconds:
                    self.tell_story(lambda: "    ... LOST")
                    return
                extra += seconds
                if then is not None:
                    self._rules.append((_never, None, 0.0))
                    self._deliver(sender, receiver, plane, message, payload, extra)
                    then()
                    return
        self._deliver(sender, receiver, plane, message, payload, extra)

    # --- effects

    def _chance(self) -> float:
        return self.draw()

    def _search_s(self) -> float:
        return self.plan_s

    def _disk(self, record: e.Record) -> m.Failure | None:
        return self.disk(record)

    def _seconds(self, node: Node, job: e.Compute) -> float:
        work = self.works.get((job.deployment, job.place, node.name), COMPUTE_S)
        return self.slowness.get(node.name, 1.0) * (work if self.by_work else COMPUTE_S)

    def _store(self, node: Node, digest: str, data: bytes) -> None:
        super()._store(node, digest, data)
        _engine().keep(digest, data)

    def _work(self, node: Node, effect: e.Effect) -> None:
        if self.prepare_s and isinstance(effect, e.Prepare):
            self.post(node, self._prepare(node, effect), self.prepare_s)
        else:
            super()._work(node, effect)

    def _prepare(self, node: Node, effect: e.Prepare) -> e.Prepared:
        try:
            found = {}
            for program in effect.programs:
                assert program.model is not None
                assert {program.model, *program.weights} <= set(node.blobs), "a blob is not here"
                session = _engine().session(program.model, node.blobs[program.model])
                found[program.place] = session
            node.prepared.setdefault(effect.deployment, {}).update(found)
            return e.Prepared(effect.deployment)
        except EngineError as error:
            return e.Prepared(effect.deployment, failure_of(error))

    def _compute(self, node: Node, job: e.Compute, took: float) -> e.Computed:
        error = self.kernel_fault(node, job)
        if error is not None:
            return e.Computed(job.request, job.attempt, job.place, (), 0.0, error, job.again)
        session = node.prepared[job.deployment][job.place]
        outputs = self.forge(node, job, tuple(session.run(job.inputs)))
        lasting_s = took * self.lasting.get(node.name, 0.0)
        return e.Computed(
            job.request,
            job.attempt,
            job.place,
            outputs,
            took,
            again=job.again,
            lasting_s=lasting_s,
        )

    def _open(self, node: Node, effect: e.OpenModel) -> e.ModelOpened:
        try:
            source = open_model(node.blobs[effect.digest])
            spec = effect.image or (None if source.image is None else source.image.to_json())
            inputs = {v.name: _input(v) for v in source.inputs}
            outputs = inputs_needed(source.proto)
            return e.ModelOpened(effect.key, inputs, spec, outputs=outputs)
        except Exception as error:
            return e.ModelOpened(effect.key, {}, None, failure_of(error))

    def _plan(self, node: Node, effect: e.MakePlan) -> e.PlanReady:
        names = tuple(c.device for c in effect.candidates)
        slow = [f"{c.device} {c.slowdown:.2f}" for c in effect.candidates if c.slowdown != 1.0]
        self.tell_story(lambda: f"    plans {effect.deployment} on {names}, slow are {slow}")
        self.plans_asked += 1
        failure = self.plan_fault(effect)
        if failure is not None:
            return e.PlanReady(effect.deployment, failure=failure)
        try:
            spec = effect.image if effect.signature.picture else None
            model = node.blobs[effect.digest]
            text, programs, report, plan = _planned(
                model, spec, effect.signature, names, effect.head, effect.plan,
                tuple(round(c.slowdown, 2) for c in effect.candidates), self.planner,
                effect.half_transfers, self.spares,
            )  # fmt: skip
            for digest, data in programs.blobs.items():
                if digest not in node.blobs:
                    node.blobs[digest] = bytes(data())
            profiles = [
                DeviceProfile(DeviceId(c.device), speed, 1e5 / speed)
                for c in effect.candidates
                for speed in [c.facts.flops_per_s / c.slowdown]
            ]
            graph = _imported(model, spec, effect.signature)
            if effect.present is not None:
                present = Plan.parse(effect.present)
                if not is_better(graph, plan, present, profiles, effect.objective):
                    return e.PlanReady(effect.deployment, kept=True, search_s=self.plan_s)
            expected = expected_seconds(graph, plan, profiles, programs.spares)
            for (place, device), seconds in expected.items():
                slowdown = next(c.slowdown for c in effect.candidates if c.device == device)
                self.works[effect.deployment, place, device] = seconds / slowdown
            return e.PlanReady(
                effect.deployment, text, programs.by_device, report,
                window=plan.window, expected=expected, search_s=self.plan_s,
            )  # fmt: skip
        except Exception as error:
            return e.PlanReady(effect.deployment, failure=failure_of(error))

    # --- time

    def settle(self, until: Callable[[], bool], *, within: float = 400.0, about: str = "") -> None:
        """Go on until something holds; fail with the story when it does not come about."""
        end = self.now + within
        for _ in range(STEPS):
            if until():
                return
            if self.now > end:
                break
            self.step()
            self.check_invariants()
        raise Stuck(f"after {within} s or {STEPS} steps:\n{self.tell(about)}")

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        self.post(self.coordinator, e.Ticked(), seconds)
        self.settle(lambda: self.now >= end, within=seconds + 1.0)

    def check_invariants(self) -> None:
        core = self.core
        running = [r for r in core.requests.values() if r.deployment is not None]
        counts = Counter(r.deployment.number for r in running)
        for made in core.catalogue.deployments.values():
            assert counts[made.number] <= made.most_running + 1
        for request in running:
            assert request.deployment.number in core.catalogue.deployments, "runs on a retired one"
        for made in core.catalogue.deployments.values():
            for name, peer in made.members.items():
                assert core.members.devices[name].peer == peer, "a member that has left"

    def check_idle(self) -> None:
        """A while later nothing is left of any request, anywhere."""
        self.pass_time(1.5)
        assert not self.core.requests, self.tell()
        for node in self.workers():
            assert isinstance(node.core, WorkerCore)
            if not node.core.idle:
                half = node.core._computing
                held = (half._requests, half.running, half._queue, half.outbox._entries)
                raise AssertionError(f"{node} holds {str(held)[:2000]}:\n{self.tell()}")
        for node in self.living():
            if isinstance(node.core, ClientCore):
                assert not node.core._requests and not node.core._outbox, self.tell()
                assert node.core._computing.idle, self.tell()

    # --- stories

    def tell_story(self, line: Callable[[], str]) -> None:
        self.story.append((self.now, line()))

    def tell(self, about: str = "") -> str:
        """What happened, or what happened to one request."""
        quiet = ("Heartbeat", "Alive")
        lines = [
            f"{at:9.4f} {line[:300]}"
            for at, line in self.story
            if not any(word in line for word in quiet)
            and (not about or about in line or "request='" not in line)
        ]
        return "\n".join(lines[-200:])


def _never(sender: Node, receiver: Node, message: m.AnyMessage) -> bool:
    return False


def _input(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | None, ...] | None]:
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).newbyteorder("<").str
    return dtype, tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)


def kind(*types: type, to: str = "", by: str = "", **fields: object) -> Matches:
    """Matches messages of these types, between these nodes, with these fields."""

    def matches(sender: Node, receiver: Node, message: m.AnyMessage) -> bool:
        return (
            isinstance(message, types)
            and (not to or receiver.name == to)
            and (not by or sender.name == by)
            and all(getattr(message, name) == value for name, value in fields.items())
        )

    return matches


def random_delay(seed: int, longest: float) -> Callable[[], float]:
    """Delays between a tenth of a millisecond and ``longest``, mostly short."""
    rng = random.Random(seed)
    return lambda: 1e-4 + longest * rng.random() ** 4
