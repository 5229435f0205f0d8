"""A whole message that somebody dropped on its way costs seconds, whichever it is.

CURVE keeps the order of messages, and accepts a gap: so one may vanish on a connection that lives.
A cluster lives through all that clusters do, in virtual time, once for each message type and way;
the first of those is lost, and no step may take much longer than where nothing is.
``python tests/test_drops.py`` prints how much longer each took.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

from cores import Cluster, Stuck, _imported, conv_net
from msgspec import structs
from shared import whole

from meshinfer.protocol import messages as m
from meshinfer.protocol.token import hash_of
from meshinfer.scheduler import events as e
from meshinfer.scheduler.client import ClientCore
from meshinfer.scheduler.enrolment import Door
from meshinfer.scheduler.worker import WorkerCore
from meshinfer.simulator.node import Node

BOUND_S = 5.0
WITHIN_S = 200.0
"""Of virtual time, for what never happens."""
HOSTS = {"ann": "", "bob": "0.0.0.0", "cy": "pi-3 h"}
"""Clients, and where they are: away, beside the coordinator, on a device's host."""
KNOWN = tuple(
    m.Admission(key=Cluster.key_of(name), name=name, role=role)  # type: ignore[arg-type]
    for role, names in (("worker", ("head", "pi-1", "pi-2", "pi-3")), ("admin", HOSTS))
    for name in names
)
Key = tuple[str, str, str]
"""A message's type, and what sends and gets it."""
NOT_SAID = {
    "Probe", "Gone", "Ran", "Approve", "ListAdmitted",
    "NotKept", "Doubtful", "Stalled", "Unreachable", "Detour", "Relay", "Who",
    "Join", "Joined", "Wait", "Try",
}  # fmt: skip
"""Not in this story; what is of control is counted as all others are, and strangers ask again."""


def role(node: Node) -> str:
    if isinstance(node.core, ClientCore):
        return "client"
    return "device" if isinstance(node.core, WorkerCore) else "coordinator"


class Lossy(Cluster):
    """Loses one message, the first of a kind and way."""

    def __init__(self, lost: Key | None) -> None:
        self.lost, self.seen = lost, Counter[Key]()
        super().__init__(("pi-1", "pi-2", "pi-3"), (), door=Door(1, KNOWN))

    def _carry(self, sender: Node, receiver: Node, plane: e.Plane, frames: Any, what: Any) -> None:
        key = (type(what.message).__name__, role(sender), role(receiver))
        self.seen[key] += 1
        if key == self.lost and self.seen[key] == 1:
            self.tell_story(lambda: f"{sender} -> {receiver} LOST {what.message}")
            return
        super()._carry(sender, receiver, plane, frames, what)

    def _no_connection(self, sender: Node, receiver: Node, send: e.Send) -> None:
        """A ROUTER drops it."""
        self._no_route(sender, send)


class Life:
    """``took``: each step, in virtual seconds."""

    def __init__(self, lost: Key | None = None) -> None:
        self.took: dict[str, float] = {}
        begun = 100.0  # as in ``Cluster``
        self.cluster = Lossy(lost)
        for step in STEPS:
            step(self)
            now = self.cluster.now
            self.took[step.__name__], begun = now - begun, now

    # --- what is done

    def until(self, holds: Callable[[], object]) -> None:
        self.cluster.settle(lambda: bool(holds()), within=WITHIN_S)

    def pause(self, seconds: float) -> None:
        end = self.cluster.now + seconds
        self.cluster.settle(lambda: self.cluster.now >= end)

    def call(self, question: m.AnyMessage) -> m.AnyMessage:
        """An admin asks."""
        cluster = self.cluster
        name, node = f"call-{next(cluster._order)}", cluster.nodes["ann"]
        asked = structs.replace(question, call=name)  # type: ignore[type-var]
        cluster._handle(node, e.Asked(name, asked, WITHIN_S))
        self.until(lambda: name in node.settled)
        answer = node.settled[name][0].answer
        assert answer is not None and getattr(answer, "failure", None) is None, answer
        return answer

    def deploy(self, name: str = "net", seed: int = 0, plan: str | None = None) -> None:
        call, node = self.cluster.deploy(name, conv_net(seed=seed), plan=plan), "ann"
        self.until(lambda: call in self.cluster.nodes[node].settled)
        (settled,) = self.cluster.nodes[node].settled[call]
        assert settled.failure is None, settled

    def begin(self, *clients: str, model: str = "net") -> list[tuple[str, str]]:
        return [(self.cluster.submit(client=name, model=model), name) for name in clients]

    def answered(self, asked: list[tuple[str, str]], seed: int = 0) -> None:
        for request, client in asked:
            self.cluster.check(request, model=conv_net(seed=seed), client=client)

    def midway(self) -> list[tuple[str, str]]:
        """Requests that have begun, and are not done."""
        asked = self.begin("ann", "bob")
        self.pause(0.012)
        return asked

    # --- what is awaited

    def joined(self) -> bool:
        return all(self.cluster._joined(node) for node in self.cluster.living())

    def planned(self) -> bool:
        """Every device is in the newest plan, and all have prepared what they stand by for."""
        core = self.cluster.core
        model = core.catalogue.find("net", None)
        signature = None if model is None else model.default_signature()
        if model is None or signature is None:
            return False
        made = core.catalogue.serving(model, signature)
        if made is None or set(made.candidates) != set(core.members.ready(self.cluster.now)):
            return False
        return made.spares.told == set(made.spares.peers) == made.spares.ready

    def idle(self) -> bool:
        for node in self.cluster.living():
            if isinstance(node.core, WorkerCore) and not node.core.idle:
                return False
            if isinstance(node.core, ClientCore):
                half = node.core
                if half._requests or half._outbox or not half._computing.idle:
                    return False
        return not self.cluster.core.requests


def clients(life: Life) -> None:
    for name, where in HOSTS.items():
        life.cluster.connect(name, where=where)
    life.until(life.joined)


def first_version(life: Life) -> None:
    life.deploy()


def stand_by(life: Life) -> None:
    life.until(life.planned)


def from_afar(life: Life) -> None:
    life.answered(life.begin("ann"))


def from_beside(life: Life) -> None:
    life.answered(life.begin("bob"))


def checked(life: Life) -> None:
    """Tasks are computed once more."""
    life.cluster.core._answering.checks._draw = lambda: 0.0
    for _ in range(4):
        life.answered(life.begin("ann", "bob"))
    life.cluster.core._answering.checks._draw = lambda: 1.0


def over(life: Life) -> None:
    life.until(life.idle)


def questions(life: Life) -> None:
    life.call(m.ListDevices(call="?"))
    life.call(m.ListModels(call="?"))


def newcomer(life: Life) -> None:
    cluster = life.cluster
    life.call(m.AddToken(call="?", hash=hash_of(b"s"), role="worker", ttl_s=900.0))
    cluster.knock("pi-4", b"s")
    life.until(lambda: cluster.key_of("pi-4") in (cluster.coordinator.gate or ()))
    cluster.join("pi-4")
    life.until(lambda: life.joined() and life.planned())
    life.answered(life.begin("ann", "bob"))


def loss(life: Life) -> None:
    asked = life.midway()
    life.cluster.kill("pi-2")
    life.answered(asked)


def power_cut(life: Life) -> None:
    life.cluster.join("pi-2")
    life.until(lambda: life.joined() and life.planned())
    asked = life.midway()
    life.cluster.kill("pi-2", silent=True)
    life.answered(asked)
    life.cluster.join("pi-2")
    life.until(lambda: life.joined() and life.planned())


def restart(life: Life) -> None:
    asked = life.midway()
    life.cluster.restart_coordinator()
    life.answered(asked)
    life.until(lambda: life.joined() and life.planned())


def cuts(life: Life) -> None:
    asked = life.midway()
    for name in ("pi-3", "ann", "bob"):
        life.cluster.cut(name)
    life.answered(asked)
    life.until(life.joined)


def cancelled(life: Life) -> None:
    for request, client in life.midway():
        life.cluster._handle(life.cluster.nodes[client], e.Cancelled(request))
    life.until(life.idle)


def failing(life: Life) -> None:
    life.cluster.kernel_fault = lambda node, job: "a kernel failed"
    for request, client in life.begin("ann", "bob"):
        assert life.cluster.failure(request, client).error == "InvalidInput"
    life.cluster.kernel_fault = lambda node, job: None


def next_version(life: Life) -> None:
    life.deploy(seed=1)
    life.answered(life.begin("ann", "bob"), seed=1)


def on_device(life: Life) -> None:
    """A client computes itself, until another version serves."""
    node = life.cluster.nodes["cy"]
    for seed in (0, 1):
        graph = _imported(conv_net(seed=seed), None, e.Signature(False, (("x", (1, 3, 12, 10)),)))
        life.deploy("one", seed, plan=str(whole(graph, ["pi-3"], 1)))
        life.until(lambda: not node.granted or life.cluster.now > node.lease)
        for _ in range(20):
            life.answered(life.begin("cy", model="one"), seed)
            life.pause(0.3)
            if node.granted:
                break
        assert node.granted


def drained(life: Life) -> None:
    asked = life.begin("ann", "bob")
    life.cluster.stop("pi-1")
    life.until(lambda: not life.cluster.nodes["pi-1"].here)
    life.answered(asked, seed=1)


def revoked(life: Life) -> None:
    life.call(m.Expel(call="?", id="pi-4"))
    life.answered(life.begin("ann", "bob"), seed=1)
    life.until(life.idle)


def stopped(life: Life) -> None:
    cluster = life.cluster
    cluster.stop("coordinator")
    life.until(lambda: not cluster.coordinator.here)
    if cluster.nodes["pi-4"].here:  # it has not heard that it was revoked
        cluster.kill("pi-4")  # outside the gate ends its connections
    cluster.start_coordinator()
    life.until(life.joined)
    life.answered(life.begin("ann"), seed=1)


STEPS = (
    clients, first_version, stand_by, from_afar, from_beside, over, checked, questions, newcomer,
    loss, power_cut, restart, cuts, cancelled, failing, next_version, on_device, drained, revoked,
    stopped,
)  # fmt: skip


@cache
def undisturbed() -> Life:
    return Life()


def costs(lost: Key) -> tuple[float, str]:
    """How much longer the worst step takes, and which; infinite where it never ends."""
    base = undisturbed().took
    try:
        took = Life(lost).took
    except (Stuck, AssertionError) as error:
        return float("inf"), str(error)[-300:]
    return max((seconds - base[step], step) for step, seconds in took.items())


def test_whichever_message_is_dropped_all_goes_on_within_seconds() -> None:
    seen = undisturbed().cluster.seen
    table = {key: costs(key) for key in sorted(seen)}
    late = {key: cost for key, cost in table.items() if cost[0] > BOUND_S}
    assert not late


def test_all_messages_are_in_that_story() -> None:
    said = {name for name, _, _ in undisturbed().cluster.seen}
    assert {kind.__name__ for kind in get_args(m.AnyMessage)} == said | NOT_SAID
    assert not said & NOT_SAID


if __name__ == "__main__":
    ways = sorted(undisturbed().cluster.seen)
    for cost, way in sorted(((costs(way), way) for way in ways), reverse=True):
        sys.stdout.write(f"{cost[0]:8.2f} s  {way[0]:13} {way[1]} -> {way[2]}, {cost[1]}\n")
