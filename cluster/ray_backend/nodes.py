"""The devices of a Ray cluster: one actor on each node that Ray says is alive and has room for it.

``look`` is one step of bringing that about, and never waits for a node: what Ray starts late joins
late. One thread looks; any may ask, or tell of an actor that is lost.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from cluster.ray_backend.actor import NodeActor
from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Candidate

HEAD = "head"
"""This process in plans: source and sink."""
STARTING = ("starting", "started", "measuring")
"""States of a node that may yet be ready."""
SIGNS = "signs"
"""A thread of an actor that answers while another computes."""
_ECHOES = 8
_LONG_ECHOES = 4
_ECHO_BYTES = (128 << 10, 1 << 20)
"""Both above what Ray sends within a call (100 KB)."""
_ECHO_S = 10.0


@dataclass(frozen=True, slots=True)
class Asks:
    """What each actor asks of its node, as Ray counts it. It computes with as many threads as whole
    processors."""

    cpus: float = 1.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    def lacking(self, has: Mapping[str, float]) -> str:
        """What a node never has, in words; empty if it may have room."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return ", ".join(
            f"it has {has.get(name, 0.0):g} {name}, {amount:g} asked for"
            for name, amount in wanted.items()
            if amount > has.get(name, 0.0)
        )

    def __str__(self) -> str:
        more = "".join(f", {amount:g} {name}" for name, amount in self.resources.items())
        return f"{self.cpus:g} CPU" + (f", {self.gpus:g} GPU" if self.gpus else "") + more


@dataclass(slots=True)
class Node:
    """``state``: starting, started, measuring, ready, excluded or dead; ``cause``: why.
    ``awaits``: a reference that tells when the next state is there; ``lost_by``: how an actor was
    lost last."""

    name: str
    id: str
    has: Mapping[str, float]
    state: str = "starting"
    cause: str = ""
    actor: Any = None
    actor_id: str = ""
    awaits: Any = None
    host: str = ""
    facts: m.Facts = field(default_factory=m.Facts)
    link: m.Link | None = None
    since: float = 0.0
    until: float = 0.0
    lost_by: str = ""
    deaths: list[float] = field(default_factory=list)
    tasks_done: int = 0


class Nodes:
    """Mutable, under ``changed``, which is notified of what others may wait for."""

    def __init__(self, ray: Any, asks: Asks, changed: threading.Condition) -> None:
        self._ray, self.asks, self._changed = ray, asks, changed
        self.own = ray.get_runtime_context().get_node_id()
        self.all: dict[str, Node] = {}
        self.changed_at = self.idle_since = time.monotonic()

    # --- asking, under the lock

    def ready(self) -> dict[str, Node]:
        return {name: n for name, n in sorted(self.all.items()) if n.state == "ready"}

    def candidates(self) -> tuple[Candidate, ...]:
        """For the planner. Who shares Ray's node with us shares its memory: nothing crosses a
        link."""
        return tuple(Candidate(n.name, n.facts, n.link, host=n.id) for n in self.ready().values())

    def is_current(self, name: str, actor: Any) -> bool:
        node = self.all.get(name)
        return node is not None and node.state == "ready" and node.actor is actor

    def starting(self) -> list[str]:
        """Those of which it is not known yet whether they will compute."""
        return [n.name for n in self.all.values() if n.state in STARTING]

    def left_out(self) -> list[str]:
        """Who does not compute and why, a line each."""
        return [
            f"{n.name} is left out: {n.cause or f'it has not started {self.asks} yet'}"
            for n in sorted(self.all.values(), key=lambda n: n.name)
            if n.state in ("starting", "excluded")
        ]

    # --- one step

    def look(self) -> None:
        """What Ray says is alive, and what has come of what was started. Raises what Ray does."""
        infos = {i["NodeID"]: i for i in self._ray.nodes() if i["Alive"]}
        now = time.monotonic()
        with self._changed:
            known = {n.id: n for n in self.all.values()}
            for id_, info in infos.items():
                if id_ not in known:
                    self._add(id_, info, now)
            for node in known.values():
                if node.id not in infos and node.state != "dead":
                    self._to(node, "dead", "Ray says that the node is dead")
            for name in [
                n.name
                for n in self.all.values()
                if n.state == "dead" and now > n.since + limits.LOST_SHOWN_S
            ]:
                del self.all[name]
            todo = [n for n in self.all.values() if n.state not in ("dead", "ready")]
        for node in todo:
            self._step(node, now)

    def lost(self, name: str, actor: Any, why: str) -> None:
        """An actor is gone; another is started if its node is still there. Under the lock."""
        node = self.all.get(name)
        if node is None or node.actor is not actor or node.state == "dead":
            return
        now = time.monotonic()
        recent = [t for t in node.deaths if now < t + limits.STRIKES_WITHIN_S]
        node.deaths = [*recent, now]
        node.until = now + (limits.QUARANTINE_S if len(node.deaths) >= limits.STRIKES else 0.0)
        self._to(node, "excluded", why)

    def exclude(self, name: str, why: str) -> None:
        """It cannot do its part for a while. Under the lock."""
        node = self.all[name]
        node.until = time.monotonic() + limits.EXCLUDED_S
        self._to(node, "excluded", why)

    def end(self, patience_s: float) -> None:
        """Let every actor tidy up, and end it."""
        actors = [n.actor for n in self.all.values() if n.actor is not None]
        try:
            asked = [actor.end.remote() for actor in actors]
            if asked:
                self._ray.wait(asked, num_returns=len(asked), timeout=patience_s)
        finally:
            for actor in actors:
                self._ray.kill(actor)

    # --- inside

    def _add(self, id_: str, info: Mapping[str, Any], now: float) -> None:
        host = re.sub(r"[^A-Za-z0-9_.\-]", "-", info["NodeManagerHostname"])[:64]
        node = Node(f"{host}-{id_[:8]}", id_, info["Resources"], since=now)
        self.all[node.name] = node
        lacking = self.asks.lacking(node.has)
        if lacking:
            node.until = float("inf")
            self._to(node, "excluded", lacking)

    def _to(self, node: Node, state: str, cause: str = "") -> None:
        """The one place where a state changes. Under the lock."""
        was, node.state, node.cause = node.state, state, cause
        node.since = time.monotonic()
        if state in ("dead", "excluded"):
            node.lost_by = cause
            if node.actor is not None:
                self._ray.kill(node.actor)
            node.actor = node.awaits = None
        if "ready" in (was, state) and was != state:
            self.changed_at = node.since
            if not self.ready():
                self.idle_since = node.since
        self._changed.notify_all()

    def _step(self, node: Node, now: float) -> None:
        """Ray's calls are made without the lock: they may take a while."""
        try:
            match node.state:
                case "excluded" if now >= node.until:
                    with self._changed:
                        self._to(node, "starting")
                case "starting" if node.actor is None:
                    node.actor = self._start(node)
                    node.awaits = node.actor.where.remote()
                case "starting" | "measuring" if self._is_there(node.awaits):
                    self._advance(node, self._ray.get(node.awaits))
                case "started" if not self._is_measured_beside(node):
                    node.awaits = node.actor.measure.remote()
                    with self._changed:
                        self._to(node, "measuring")
        except self._ray.exceptions.RayError as error:
            with self._changed:
                if node.state != "dead":
                    node.until = now + limits.EXCLUDED_S
                    self._to(node, "excluded", _first_line(error))

    def _advance(self, node: Node, answer: Any) -> None:
        if node.state == "starting":
            node.host, node.actor_id = answer
            state = "started"
        else:
            facts = msgspec.msgpack.decode(answer, type=m.Facts)
            memory = int(node.has.get("memory", 0)) or facts.memory_bytes
            call_s, node.link = self._measured_link(node)
            node.facts = msgspec.structs.replace(
                facts,
                memory_bytes=min(memory, facts.memory_bytes or memory),
                overhead_s=max(facts.overhead_s, call_s),
            )
            state = "ready"
        with self._changed:
            if node.actor is not None:  # nobody has told that it is lost meanwhile
                self._to(node, state)

    def _start(self, node: Node) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        group = self._ray.remote(concurrency_groups={SIGNS: 1})
        make = group(NodeActor).options(
            num_cpus=self.asks.cpus,
            num_gpus=self.asks.gpus,
            resources=dict(self.asks.resources) or None,
            max_restarts=0,
            max_task_retries=0,
            allow_out_of_order_execution=True,  # what waits for a piece holds up nobody
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        return make.remote(self.asks.threads)

    def _is_there(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])

    def _is_measured_beside(self, node: Node) -> bool:
        """They would disturb each other."""
        return any(n.state == "measuring" and n.host == node.host for n in self.all.values())

    def _measured_link(self, node: Node) -> tuple[float, m.Link | None]:
        """Seconds that a call takes, there and back; and what its link with our node carries."""
        call_s = min(self._echoed(node.actor, None) for _ in range(_ECHOES))
        if node.id == self.own:
            return call_s, None
        took = []
        for nbytes in _ECHO_BYTES:
            piece = np.ones(nbytes, np.uint8)
            took.append(min(self._echoed(node.actor, piece) for _ in range(_LONG_ECHOES)) / 2)
        short, long = took
        slope = max((long - short) / (_ECHO_BYTES[1] - _ECHO_BYTES[0]), long / _ECHO_BYTES[1] / 10)
        latency_s = max(0.0, short - call_s / 2 - _ECHO_BYTES[0] * slope)
        return call_s, m.Link(peer=HEAD, bytes_per_s=1.0 / slope, latency_s=latency_s)

    def _echoed(self, actor: Any, piece: np.ndarray | None) -> float:
        before = time.perf_counter()
        self._ray.get(actor.echo.remote(piece), timeout=_ECHO_S)
        return time.perf_counter() - before


def _first_line(error: BaseException) -> str:
    """Of the root of what Ray tells: some of its texts are whole tracebacks."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [repr(cause)]
    return f"{type(cause).__name__}: {lines[0]}"[: limits.CAUSE_CHARS]
