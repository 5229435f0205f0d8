"""Many devices, measured: the real cores, codec and planner in virtual time, and what they take of
a processor. The command is ``scripts/simulate --devices``."""

from __future__ import annotations

import gc
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.blobs import BlobStore
from cluster.planning import PlannerProcess
from meshinfer.errors import InvalidInput
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import digest_of
from meshinfer.protocol.token import hash_of
from meshinfer.scheduler import events as e
from meshinfer.scheduler.ledger import TokenMade
from meshinfer.simulator.crowd import BYTES_PER_S, HEAD, Crowd, Meter, Planned
from meshinfer.simulator.resnet import INPUT, resnet50

COUNTS = (8, 64, 250, 1000)
MOST = 1000
"""The list of who is admitted has room for 1024 keys, users among them."""
OBJECTIVES = ("latency", "throughput")
SIDE, CHANNELS = 224, 64
JOIN_WITHIN_S, SETTLE_S, REST_S = 1.0, 3.0, 20.0
REQUESTS, IN_FLIGHT, ROUNDS = 20, 32, 4
_WITHIN_S = 3600.0
_SECRET = b"s" * 32
_ALWAYS = frozenset(
    """Heartbeat Alive Ticked MeasureLink LinkMeasured Echo Echoed Probe Admitted""".split()
)
"""Messages, and other events, that come whether or not anything is asked."""


@dataclass(slots=True)
class Load:
    """Of the coordinator: messages and bytes that it heard and said, and seconds of a processor.
    In all, for each second of virtual time, or for each request."""

    heard: float
    said: float
    heard_bytes: float
    said_bytes: float
    cpu_s: float


@dataclass(slots=True)
class Served:
    """A model planned for one objective, and requests under that plan.

    ``plan_s``: of the wall clock, ``search_s``: of a processor. ``used``: devices that compute.
    ``install``: in all, ``longest`` its longest message; ``weights_bytes``: what all devices have
    to fetch. ``request``: for each, ``between``: its messages between devices and client;
    ``link_bytes``: over the link of the coordinator's host, where the client is; ``per_s``: in
    virtual time, ``IN_FLIGHT`` at a time, or one after another for latency.
    """

    objective: str
    plan_s: float
    search_s: float
    used: int
    tasks: int
    install: Load
    longest: int
    weights_bytes: int
    request: Load
    between: float
    link_bytes: float
    per_s: float


@dataclass(slots=True)
class Row:
    """So many devices. ``joining``: all within a second; ``measuring_s``: until their links are
    known, one after another; ``rest``: each second; ``admission``: of one more, by a token."""

    devices: int
    joining: Load
    measuring_s: float
    rest: Load
    admission: Load
    served: list[Served] = field(default_factory=list)


class Plans:
    """The process that plans, as a coordinator has it, and the wall clock."""

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore(folder)
        self._process = PlannerProcess(self.store, "warning", "text")
        self.made: list[tuple[e.PlanReady, float]] = []

    def __call__(self, effect: e.OpenModel | e.MakePlan) -> Planned:
        begun = time.monotonic()
        answer = self._process.perform(effect, lambda: False)
        took = time.monotonic() - begun
        assert answer is not None and answer.failure is None, answer
        if isinstance(answer, e.PlanReady) and answer.plan:
            self.made.append((answer, took))
        return answer, took

    def blob(self, digest: str) -> bytes:
        return self.store.path(digest).read_bytes()

    def close(self) -> None:
        self._process.close()
        self._process.close_pipes()


class Measured:
    """One number of devices, and a model whose bytes the store has."""

    def __init__(self, devices: int, plans: Plans, model: bytes, side: int) -> None:
        self._plans, self._model, self._side = plans, model, side
        token = TokenMade(hash_of(_SECRET), "worker", 1e9, reusable=True)
        self.crowd = Crowd(devices, plans, plans.blob, time.thread_time, tokens=(token,))
        self._pass(SETTLE_S)

    def row(self, objectives: Sequence[str]) -> Row:
        crowd = self.crowd
        joining = self._load(self._join_all)
        since = crowd.now
        self._measure_links()
        measuring_s = crowd.now - since
        rest = self._load(lambda: self._pass(REST_S), REST_S)
        row = Row(len(crowd.devices), joining, measuring_s, rest, self._load(self._admit_one))
        row.served += [self._serve(objective) for objective in objectives]
        return row

    # --- time

    def _pass(self, seconds: float) -> None:
        end = self.crowd.now + seconds
        while self.crowd.now < end:
            self.crowd.step()

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        end = self.crowd.now + _WITHIN_S
        while not holds():
            assert self.crowd.now < end, f"{what}: not within {_WITHIN_S} s"
            self.crowd.step()

    def _load(self, run: Callable[[], None], per: float = 1.0, *, asked: bool = False) -> Load:
        """What the coordinator did meanwhile. ``asked``: but for what always comes."""
        gc.collect()
        gc.disable()  # the heap is that of all nodes, and a coordinator has its own alone
        before = self.crowd.meter.copy()
        try:
            run()
        finally:
            gc.enable()
        return load_of(self.crowd.meter.since(before), per, _ALWAYS if asked else frozenset())

    # --- what happens

    def _join_all(self) -> None:
        """As after a power cut."""
        crowd, devices = self.crowd, self.crowd.devices
        since, members = crowd.now, crowd.core.members.devices
        for i, name in enumerate(devices):
            when = since + JOIN_WITHIN_S * i / len(devices)
            while crowd.now < when:
                crowd.step()
            crowd.join_device(name)
        self._until(lambda: len(members) > len(devices), "joining")
        self._until(lambda: all(map(crowd.joined, crowd.living())), "joining")

    def _measure_links(self) -> None:
        members = self.crowd.core.members.devices
        head = members[HEAD].links
        while not all(name in head for name in self.crowd.devices):
            self._pass(1.0)
        self._pass(SETTLE_S)

    def _admit_one(self) -> None:
        """One more knocks with a token: everybody is told of its key."""
        crowd = self.crowd
        before = len(crowd.core.admitted)
        crowd.knock("pi-new", _SECRET)
        self._until(lambda: len(crowd.core.admitted) > before, "admission")

    def _serve(self, objective: str) -> Served:
        """Devices fetch the weights of a plan for latency; of one for throughput, which is for all,
        they have them already, and only count."""
        crowd = self.crowd
        crowd.warm = objective != "latency"
        crowd.forget_blobs()
        crowd.meter.longest.clear()
        digest = hashlib.sha256(self._model).hexdigest()
        call = crowd.deploy(self._model, digest, objective)
        install = self._load(
            lambda: self._until(lambda: call in crowd.user.settled, "deploying"), asked=True
        )
        (answer,) = crowd.user.settled[call]
        assert isinstance(answer.answer, m.Deployed) and answer.answer.failure is None, answer
        self._fetch_spares()
        most, count = (1, REQUESTS) if objective == "latency" else (IN_FLIGHT, IN_FLIGHT * ROUNDS)
        self._ask(call, most, most)  # links are up, and usual times known
        since, between, link = crowd.now, crowd.between, crowd.link_bytes["here"]
        request = self._load(lambda: self._ask(call, most, count), count, asked=True)
        made, plan_s = self._plans.made[-1]
        plan = Plan.parse(made.plan)
        return Served(
            objective=objective,
            plan_s=plan_s,
            search_s=made.search_s,
            used=len({d for s in plan.stages for t in s.tasks for d in t.devices}),
            tasks=sum(len(s.tasks) for s in plan.stages),
            install=install,
            longest=crowd.meter.longest["Install"],
            weights_bytes=sum(crowd.fetched_bytes.values()),
            request=request,
            between=(crowd.between - between) / count,
            link_bytes=(crowd.link_bytes["here"] - link) / count,
            per_s=count / (crowd.now - since),
        )

    def _fetch_spares(self) -> None:
        """Spare devices prepare as well, once a model serves."""
        heard, before = self.crowd.meter.heard, -1
        while heard["Want"] != before:
            before = heard["Want"]
            self._pass(SETTLE_S)

    def _ask(self, model: str, most: int, count: int) -> None:
        """So many requests, so many at a time."""
        crowd, resolved = self.crowd, self.crowd.user.resolved
        arrays = {INPUT: np.zeros((1, 3, self._side, self._side), np.float32)}
        body, waiting, left = digest_of(arrays), set[str](), count

        def answered() -> bool:
            return not waiting.isdisjoint(resolved)

        while waiting or left:
            while left and len(waiting) < most:
                waiting.add(crowd.submit(model, arrays, body))
                left -= 1
            self._until(answered, "answers")
            for request in sorted(waiting & resolved.keys()):
                reply = resolved[request][0].reply
                assert isinstance(reply, m.Reply) and reply.failure is None, reply
                waiting.remove(request)


def load_of(meter: Meter, per: float = 1.0, without: frozenset[str] = frozenset()) -> Load:
    """The sums of a meter, but for some kinds, divided."""

    def total(counted: Mapping[str, float]) -> float:
        return sum(n for kind, n in counted.items() if kind not in without) / per

    counters = (meter.heard, meter.said, meter.heard_bytes, meter.said_bytes, meter.seconds)
    return Load(*[total(counted) for counted in counters])


def measure(
    counts: Sequence[int],
    *,
    side: int = SIDE,
    channels: int = CHANNELS,
    objectives: Sequence[str] = OBJECTIVES,
) -> Iterator[Row]:
    """A row for each number of devices. Raises ``InvalidInput`` for one that no cluster has."""
    wrong = [count for count in counts if not 1 <= count <= MOST]
    if wrong:
        raise InvalidInput(
            f"{wrong[0]} devices cannot be simulated", hint=f"ask for 1 to {MOST} devices"
        )
    with tempfile.TemporaryDirectory(prefix="meshinfer-crowd-") as folder:
        plans = Plans(Path(folder))
        try:
            model = resnet50(side, channels)
            plans.store.put(hashlib.sha256(model).hexdigest(), model)
            for count in counts:
                yield Measured(count, plans, model, side).row(objectives)
        finally:
            plans.close()


HEADINGS = (
    "| devices | joining: CPU s, MB said | links known after s | at rest, each s: heard, said, KB,"
    " CPU ms | one more key: messages, MB, CPU ms |",
    "| devices, for | planning s (CPU s) | devices used, tasks | install: messages, longest KB, "
    "CPU s | weights GB | a request: heard, said, KB, CPU ms | between devices, MB by the client's "
    "link | requests/s |",
)


def lines(row: Row) -> tuple[str, ...]:
    """A line of the first table, and those of the second."""
    rest, more = row.rest, row.admission
    first = (
        f"| {row.devices} | {row.joining.cpu_s:.2f}, {row.joining.said_bytes / 1e6:.1f} "
        f"| {row.measuring_s:.0f} "
        f"| {rest.heard:.0f}, {rest.said:.0f}, {(rest.heard_bytes + rest.said_bytes) / 1e3:.0f}, "
        f"{rest.cpu_s * 1e3:.1f} "
        f"| {more.said:.0f}, {more.said_bytes / 1e6:.2f}, {more.cpu_s * 1e3:.1f} |"
    )
    return (first, *(_line(row.devices, s) for s in row.served))


def _line(devices: int, s: Served) -> str:
    asked, install = s.request, s.install
    return (
        f"| {devices}, {s.objective} | {s.plan_s:.1f} ({s.search_s:.1f}) | {s.used}, {s.tasks} "
        f"| {install.said:.0f}, {s.longest / 1e3:.0f}, {install.cpu_s:.2f} "
        f"| {s.weights_bytes / 1e9:.2f} "
        f"| {asked.heard:.1f}, {asked.said:.1f}, "
        f"{(asked.heard_bytes + asked.said_bytes) / 1e3:.1f}, {asked.cpu_s * 1e3:.2f} "
        f"| {s.between:.1f}, {s.link_bytes / 1e6:.2f} | {s.per_s:.1f} |"
    )


def tell(counts: Sequence[int], say: Callable[[str], None], side: int = SIDE) -> None:
    """Two tables, as they are measured."""
    say(
        f"ResNet-50 at {side} (float32), links of {BYTES_PER_S * 8 / 1e9:g} Gbit/s, virtual time; "
        "CPU: of the coordinator's core and codec, without sockets and encryption"
    )
    say(HEADINGS[0])
    served: list[str] = []
    for row in measure(counts, side=side):
        first, *others = lines(row)
        say(first)
        served += others
    for line in (HEADINGS[1], *served):
        say(line)
