"""Many devices, measured: the real cores, codec and planner in virtual time, and what they take of
a processor. See ``scripts/simulate --devices``."""

from __future__ import annotations

import copy
import gc
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cluster.blobs import BlobStore
from cluster.planning import PlannerProcess
from meshinfer import limits
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m
from meshinfer.protocol.token import hash_of
from meshinfer.scheduler import events as e
from meshinfer.scheduler.ledger import TokenMade
from meshinfer.simulator.crowd import HEAD, HERE, USER, Crowd, Meter, Planned
from meshinfer.simulator.resnet import INPUT, resnet50

REST_S, REQUESTS, IN_FLIGHT = 10.0, 20, 32
JOIN_WITHIN_S = 1.0
SETTLE_S = 3.0
_WITHIN_S = 3600.0
_SECRET = b"s" * 32

AT_REST = frozenset(
    """Heartbeat Alive Ticked MeasureLink LinkMeasured Echo Echoed Probe Admitted Recorded""".split()
)
"""Messages, and other events, that come whether or not anything is asked."""


@dataclass(slots=True)
class Traffic:
    """Of the coordinator, over ``seconds`` of virtual time or for so many requests, divided by
    these: messages both ways, bytes both ways, and seconds of a processor."""

    heard: float
    said: float
    heard_bytes: float
    said_bytes: float
    cpu_s: float


@dataclass(slots=True)
class Served:
    """One objective: what a plan took, and requests under it. ``plan_s``: of the wall clock,
    ``search_s``: of a processor; ``used``: devices that compute; ``ready_s``: from deploying until
    it serves, in virtual time. ``workers``: messages among devices and head, a request."""

    objective: str
    plan_s: float
    search_s: float
    used: int
    tasks: int
    plan_bytes: int
    install: Traffic
    largest_install: int
    weights_bytes: int
    ready_s: float
    request: Traffic
    latency_s: float
    per_s: float
    workers: float
    user_bytes: float


@dataclass(slots=True)
class Row:
    """What so many devices come to. ``joining`` and ``admission`` are totals: of all that join
    within a second, and of one more that is admitted by a token."""

    devices: int
    joining: Traffic
    joined_s: float
    rest: Traffic
    rest_link_bytes: float
    admission: Traffic
    served: list[Served] = field(default_factory=list)


class Plans:
    """The process that plans, as a coordinator has it, and the wall clock."""

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore(folder)
        self._process = PlannerProcess(self.store, "warning", "text")
        self.made: e.PlanReady | None = None
        self.took_s = 0.0

    def __call__(self, effect: e.OpenModel | e.MakePlan) -> Planned:
        begun = time.monotonic()
        answer = self._process.perform(effect, lambda: False)
        took = time.monotonic() - begun
        assert answer is not None and answer.failure is None, answer
        if isinstance(answer, e.PlanReady) and answer.plan:
            self.made, self.took_s = answer, took
        return answer, took

    def blob(self, digest: str) -> bytes:
        return self.store.path(digest).read_bytes()

    def close(self) -> None:
        self._process.close()
        self._process.close_pipes()


class Measured:
    """One number of devices. ``model``: its bytes, which the store has by ``digest``."""

    def __init__(self, devices: int, plans: Plans, model: bytes, side: int) -> None:
        self._plans, self._model, self._side = plans, model, side
        self._digest = hashlib.sha256(model).hexdigest()
        token = TokenMade(hash_of(_SECRET), "worker", 1e9, reusable=True)
        self.crowd = Crowd(devices, plans, plans.blob, time.thread_time, tokens=(token,))
        self.run_for(SETTLE_S)

    # --- time

    def run_for(self, seconds: float) -> None:
        crowd = self.crowd
        end = crowd.now + seconds
        while crowd.now < end:
            crowd.step()

    def until(self, holds: Callable[[], bool], what: str) -> None:
        crowd = self.crowd
        end = crowd.now + _WITHIN_S
        while not holds():
            assert crowd.now < end, f"{what}: not within {_WITHIN_S} s"
            crowd.step()

    def metered(self, run: Callable[[], None], per: float | None = None,
                asked_only: bool = False) -> Traffic:  # fmt: skip
        """What the coordinator did meanwhile, divided by ``per``, or by the seconds that passed."""
        gc.collect()
        gc.disable()  # the heap is that of all nodes
        before, since = copy.deepcopy(self.crowd.meter), self.crowd.now
        run()
        gc.enable()
        found = self.crowd.meter.since(before)
        return traffic(found, per or self.crowd.now - since, asked_only=asked_only)

    # --- what is measured

    def row(self, objectives: Sequence[str]) -> Row:
        crowd = self.crowd
        since = crowd.now
        joining = self.metered(self._join_all, 1.0)
        joined_s = crowd.now - since
        self.run_for(SETTLE_S)
        before = self._link_bytes()
        rest = self.metered(lambda: self.run_for(REST_S))
        link = (self._link_bytes() - before) / REST_S
        admission = self.metered(self._admit_one, 1.0, asked_only=False)
        row = Row(len(crowd.devices), joining, joined_s, rest, link, admission)
        row.served += [self.serve(objective) for objective in objectives]
        return row

    def _link_bytes(self) -> float:
        """That went out of the coordinator's host over its link."""
        return sum(n for what, n in self.crowd.link_bytes.items() if what.startswith("here "))

    def _join_all(self) -> None:
        """All within a second, as after a power cut: hellos, welcomes, lists of who is admitted."""
        crowd, devices = self.crowd, self.crowd.devices
        since = crowd.now
        for i, name in enumerate(devices):
            self._until_time(since + JOIN_WITHIN_S * i / len(devices))
            crowd.join_device(name)
        members = crowd.core.members.devices
        self.until(lambda: len(members) > len(devices), "joining")
        self.until(lambda: all(crowd.joined(n) for n in crowd.living()), "joining")

    def _until_time(self, when: float) -> None:
        while self.crowd.now < when:
            self.crowd.step()

    def _admit_one(self) -> None:
        """One more knocks with a token: everybody is told of its key."""
        crowd = self.crowd
        before = len(crowd.core.admitted)
        crowd.knock("pi-new", _SECRET)
        self.until(lambda: len(crowd.core.admitted) > before, "admission")
        self.run_for(0.01)

    def serve(self, objective: str) -> Served:
        crowd, plans = self.crowd, self._plans
        crowd.warm = objective != "latency"
        crowd.fetched_bytes.clear()
        since, before = crowd.now, copy.deepcopy(crowd.meter)
        call = crowd.deploy(self._model, self._digest, objective)
        install = self.metered(lambda: self.until(lambda: call in crowd.user.settled, "deploying"), 1.0,
                               asked_only=True)
        (answer,) = crowd.user.settled[call]
        assert isinstance(answer.answer, m.Deployed) and answer.answer.failure is None, answer
        assert plans.made is not None
        made, ready_s = plans.made, crowd.now - since
        self.run_for(max(SETTLE_S, limits.SPARES_AFTER_S))  # spare devices prepare
        count = crowd.meter.since(before)
        largest = count.said_bytes["Install"] / max(1, count.said["Install"])
        self._ask(call, IN_FLIGHT if objective != "latency" else 1)  # inputs are known, links up
        return self._served(objective, call, made, ready_s, install, int(largest))

    def _served(self, objective: str, call: str, made: e.PlanReady, ready_s: float,
                install: Traffic, largest: int) -> Served:  # fmt: skip
        crowd = self.crowd
        plan = Plan.parse(made.plan)
        most = 1 if objective == "latency" else IN_FLIGHT
        count = REQUESTS if objective == "latency" else 4 * IN_FLIGHT
        since, between, link = crowd.now, crowd.between, self._link_bytes()
        asked = self.metered(lambda: self._ask(call, most, count), float(count), asked_only=True)
        took = crowd.now - since
        return Served(
            objective=objective,
            plan_s=self._plans.took_s,
            search_s=made.search_s,
            used=len({d for s in plan.stages for t in s.tasks for d in t.devices}),
            tasks=sum(len(s.tasks) for s in plan.stages),
            plan_bytes=len(made.plan),
            install=install,
            largest_install=largest,
            weights_bytes=sum(crowd.fetched_bytes.values()),
            ready_s=ready_s,
            request=asked,
            latency_s=took / count * most,
            per_s=count / took,
            workers=(crowd.between - between) / count,
            user_bytes=(self._link_bytes() - link) / count,
        )

    def _ask(self, model: str, most: int, count: int = 4) -> None:
        """So many requests, so many at a time."""
        crowd = self.crowd
        arrays = {INPUT: np.zeros((1, 3, self._side, self._side), np.float32)}
        body = crowd.digest(arrays)
        open_: list[str] = []
        left = count
        while open_ or left:
            while left and len(open_) < most:
                open_.append(crowd.submit(model, arrays, body))
                left -= 1
            resolved = crowd.user.resolved
            self.until(lambda: any(r in resolved for r in open_), "answers")  # noqa: B023
            for request in [r for r in open_ if r in resolved]:
                (outcome,) = resolved[request]
                assert isinstance(outcome.reply, m.Reply)
                assert outcome.reply.failure is None, outcome.reply.failure
                open_.remove(request)


def traffic(meter: Meter, per: float, *, asked_only: bool) -> Traffic:
    """``asked_only``: without what comes whether or not anything is asked."""

    def total(counted: dict[str, float] | dict[str, int]) -> float:
        return sum(n for kind, n in counted.items() if not asked_only or kind not in AT_REST) / per

    return Traffic(
        total(meter.heard),
        total(meter.said),
        total(meter.heard_bytes),
        total(meter.said_bytes),
        total(meter.seconds),
    )


def measure(counts: Sequence[int], side: int, channels: int, objectives: Sequence[str]) -> list[Row]:
    """A row for each number of devices."""
    with tempfile.TemporaryDirectory(prefix="meshinfer-crowd-") as folder:
        plans = Plans(Path(folder))
        try:
            model = resnet50(side, channels)
            plans.store.put(hashlib.sha256(model).hexdigest(), model)
            return [Measured(n, plans, model, side).row(objectives) for n in counts]
        finally:
            plans.close()


def main(counts: Sequence[int], side: int) -> int:
    for row in measure(counts, side, 64, ("latency", "throughput")):
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
    return 0
