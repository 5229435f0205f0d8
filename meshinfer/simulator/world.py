"""Nodes with the real cores, joined by links with virtual time; each message by the real codec.

Only what shells do is made here: sockets are queues, disks are dicts, kernels take virtual time.
Nothing happens at the same time twice, so a run is the same each time that it is run.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import xxhash

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Buffer
from meshinfer.protocol.records import BESIDE_COORDINATOR
from meshinfer.protocol.token import Role
from meshinfer.scheduler import events as e
from meshinfer.scheduler.client import ClientCore
from meshinfer.scheduler.coordinator import CoordinatorCore
from meshinfer.scheduler.enrolment import Door
from meshinfer.scheduler.ledger import Ledger
from meshinfer.scheduler.on_device import OwnTask
from meshinfer.scheduler.worker import COORDINATOR, WorkerCore
from meshinfer.simulator.node import BULK, AnyCore, Clock, Node, Timing, honest_ends
from meshinfer.simulator.shells import Shells

_LIST_S = 1e-4
_COPIED = 64 << 10
"""Payloads below this are copied as they are sent; larger ones are the empty bytes of echoes."""


class World(Shells):
    """A coordinator, its own device, workers and clients, and the time. Subclasses say what
    kernels and plans come to, and may get in the way of messages (``_carry``). ``door``: as the
    coordinator's; None: nobody has a key."""

    def __init__(
        self,
        timing: Timing,
        delay: Callable[[], float],
        *,
        now: float,
        door: Door | None = None,
    ) -> None:
        self.now = now
        self.door = door
        self.timing = timing
        self.nodes: dict[str, Node] = {}
        self.sent: Counter[str] = Counter()
        self.search: int | None = None
        self.log = xxhash.xxh3_64()
        """Of all that happened: the same on every replay."""
        self._delay = delay
        self._events: list[tuple[float, int, Node, e.Event]] = []
        self._order = itertools.count()
        self._link_free: dict[tuple[str, str, str], float] = {}
        self._due: dict[Node, float] = {}
        self._incarnations: Counter[str] = Counter()
        self._made_at: dict[str, float] = {}
        """When each token came to be on disk."""
        self.ledger = Ledger()
        """What is on the coordinator's disk; it outlives the coordinator."""
        self.coordinator = self._coordinator(self._peer(COORDINATOR, "1"))

    # --- members

    def _peer(self, name: str, incarnation: str) -> m.Peer:
        return m.Peer(device=name, incarnation=incarnation, host="h", port=1, key=self.key_of(name))

    @staticmethod
    def key_of(name: str) -> str:
        """All that one user or device ever runs has one key."""
        return hashlib.sha256(name.encode()).hexdigest()[:40]

    def knock(self, name: str, secret: bytes = b"", role: Role = "worker") -> None:
        """By whom nobody knows yet; the answer goes to ``_stranger_told``."""
        join = m.Join(cluster="home", name=name, role=role, protocol=m.PROTOCOL, secret=secret)
        self.tell_story(lambda: f"KNOCK by {name}")
        knocked = e.Knocked(name, self.key_of(name), join)
        self.post(self.coordinator, knocked, self.timing.latency_s)

    def _stranger_told(self, name: str, message: m.AnyMessage) -> None:
        """What is told to who knocked."""

    def _clock(self, name: str) -> Clock:
        return Clock()

    def _node(self, name: str, peer: str, core: AnyCore) -> Node:
        return Node(name, peer, core)

    def _coordinator(self, bulk: m.Peer) -> Node:
        """It begins with what was written to its disk."""
        self.ledger.starts += 1
        ledger = deepcopy(self.ledger)
        for hash_, token in ledger.tokens.items():
            left = max(0.0, token.ttl_s - (self.now - self._made_at[hash_]))
            ledger.tokens[hash_] = replace(token, ttl_s=left)
        core = CoordinatorCore("home", "0", bulk, self.door, ledger, self._chance)
        return self._add(COORDINATOR, bulk.id, core)

    def _chance(self) -> float:
        return 1.0  # chosen to be checked is nothing

    def _add(self, name: str, peer: str, core: AnyCore) -> Node:
        before = self.nodes.get(name)
        if before is not None:
            self._due.pop(before, None)
        node = self._node(name, peer, core)
        node.clock = self._clock(name)
        if name == COORDINATOR and before is not None:
            node.blobs = before.blobs
        self.nodes[name] = node
        self._handle(node, e.Ticked())
        return node

    def hello(self, name: str, role: str = "worker", **changes: object) -> m.Hello:
        """What the next process of this name says first."""
        self._incarnations[name] += 1
        incarnation = str(self._incarnations[name])
        fields = {
            "role": role,
            "device": name,
            "incarnation": incarnation,
            "cluster": "home",
            "protocol": m.PROTOCOL,
            "bulk": self._peer(name, incarnation) if role == "worker" else None,
            "facts": m.Facts(flops_per_s=1e9, host=name),
        }
        return m.Hello(**{**fields, **changes})  # type: ignore[arg-type]

    def join(self, name: str, facts: m.Facts | None = None, **changes: object) -> Node:
        """Start a worker process of this name; its disk keeps what an earlier one stored."""
        if facts is not None:
            changes["facts"] = facts
        hello = self.hello(name, **changes)  # type: ignore[arg-type]
        before = self.nodes.get(name)
        node = self._add(name, f"{name}#{hello.incarnation}", WorkerCore(hello))
        if before is not None:
            node.blobs = before.blobs
        return node

    def connect(self, name: str, *, beside: bool = False, **changes: object) -> Node:
        """Start a client; ``beside`` the coordinator it is source and sink itself."""
        where = BESIDE_COORDINATOR if beside else ""
        changes = {"where": where, **changes}
        hello = self.hello(name, "client", **changes)
        return self._add(name, f"{name}#{hello.incarnation}", ClientCore(hello))

    def kill(self, name: str, *, silent: bool = False) -> None:
        """SIGKILL; ``silent``: nobody is told, as when its cable is pulled."""
        node = self.nodes[name]
        node.alive = False
        self._due.pop(node, None)
        self.tell_story(lambda: f"KILL {node}")
        if not silent:
            self._gone(node)

    def _gone(self, node: Node) -> None:
        """Its connections are reset."""
        self._reset(node, self.timing.latency_s)

    def _reset(self, node: Node, latency_s: float) -> None:
        """All that were connected to it hear so."""
        for other in self.living():
            if other is self.coordinator:
                self.post(other, e.PeerLost(node.id, "reset"), latency_s)
            elif node is self.coordinator:
                self.post(other, e.PeerLost(COORDINATOR, "reset"), latency_s)
            elif node.id in other.links:
                self.post(other, e.PeerLost(node.id, "reset", plane=e.Plane.BULK), latency_s)

    def stop(self, name: str) -> None:
        """SIGTERM."""
        self.tell_story(lambda: f"STOP {name}")
        self._handle(self.nodes[name], e.StopRequested())

    def restart_coordinator(self) -> None:
        """Killed and started again: it remembers what was written to its disk."""
        self.kill(COORDINATOR)
        self.start_coordinator()

    def start_coordinator(self) -> None:
        self._incarnations[COORDINATOR] += 1
        bulk = self._peer(COORDINATOR, str(self._incarnations[COORDINATOR] + 1))
        self.coordinator = self._coordinator(bulk)

    def living(self) -> list[Node]:
        return [n for n in self.nodes.values() if n.here]

    def workers(self) -> list[Node]:
        return [n for n in self.living() if isinstance(n.core, WorkerCore)]

    def clients(self) -> list[Node]:
        return [n for n in self.living() if isinstance(n.core, ClientCore)]

    def joined(self, node: Node) -> bool:
        """Whether both it and the coordinator think so."""
        match node.core:
            case WorkerCore():
                return node.core.joined and self.core.members.by_peer(node.id) is not None
            case ClientCore():
                return node.id in self.core.members.clients
            case _:
                return True

    @property
    def core(self) -> CoordinatorCore:
        """The coordinator's."""
        assert isinstance(self.coordinator.core, CoordinatorCore)
        return self.coordinator.core

    # --- the links

    def post(self, node: Node, event: e.Event, after: float) -> None:
        heapq.heappush(self._events, (self.now + after, next(self._order), node, event))

    def take_back(self, which: Callable[[Node, e.Arrived], bool]) -> None:
        """Messages that are under way never arrive."""
        self._events = [
            entry
            for entry in self._events
            if not (isinstance(entry[3], e.Arrived) and which(entry[2], entry[3]))
        ]
        heapq.heapify(self._events)

    def _receiver(self, sender: Node, send: e.Send) -> Node | None:
        if send.peer == COORDINATOR and sender is not self.coordinator:
            found: Node | None = self.coordinator
        else:
            found = next((n for n in self.nodes.values() if n.id == send.peer), None)
        return found if found is not None and found.here else None

    def _send(self, sender: Node, send: e.Send) -> None:
        if send.plane is e.Plane.JOIN:
            self.tell_story(lambda: f"{sender} -> stranger {send.peer} {send.message}")
            self._stranger_told(send.peer, send.message)
            return
        receiver = self._receiver(sender, send)
        frames = [f if len(f) >= _COPIED else bytes(f) for f in self._encoded(sender, send)]
        self.log.update(frames[0])
        assert len(frames[0]) <= limits.CONTROL_FRAME_BYTES
        if receiver is None:
            self.tell_story(lambda: f"{sender} -> {send.peer} (gone) {send.message}")
            self._no_route(sender, send)
            return
        control = send.plane is e.Plane.CONTROL
        assert control is not isinstance(send.message, BULK), f"{send.message} on {send.plane}"
        if control:
            assert self.coordinator in (sender, receiver)
        elif receiver.id not in sender.links and sender.id not in receiver.links:
            self._no_connection(sender, receiver, send)
            return
        if not self._let_in(sender, receiver, control=control):
            self.tell_story(lambda: f"{sender} -> {receiver} (NOT LET IN) {send.message}")
            self._not_let_in(sender, receiver, send)
            return
        message, payload = self._decoded(receiver, frames)
        assert message == send.message, "the codec changed it"
        self.sent[type(message).__name__] += 1
        self.tell_story(lambda: f"{sender} -> {receiver} {message}")
        self._carry(sender, receiver, send.plane, frames, e.Arrived("", message, payload))

    def _no_route(self, sender: Node, send: e.Send) -> None:
        """Nobody of that name is there."""
        self.sent["no route"] += 1

    def _no_connection(self, sender: Node, receiver: Node, send: e.Send) -> None:
        """There is such a node, and neither has connected to the other."""
        raise AssertionError(f"no connection from {sender} to {receiver} for {send.message}")

    def _let_in(self, sender: Node, receiver: Node, *, control: bool) -> bool:
        """Whether who has connected is on the list of who is connected to."""
        if self.door is None:
            return True
        bound, connects = receiver, sender
        if sender is self.coordinator if control else receiver.id not in sender.links:
            bound, connects = sender, receiver
        if bound.gate is None and isinstance(bound.core, ClientCore):
            return True  # it binds nothing
        return bound.gate is not None and self.key_of(connects.name) in bound.gate

    def _not_let_in(self, sender: Node, receiver: Node, send: e.Send) -> None:
        """A coordinator refuses; a device has maybe not heard of who it is yet."""
        if receiver is self.coordinator:
            lost = e.PeerLost(COORDINATOR, "refused", refused=True, plane=send.plane)
            self.post(sender, lost, self.timing.latency_s)

    def _carry(
        self, sender: Node, receiver: Node, plane: e.Plane, frames: list[Buffer], what: e.Arrived
    ) -> None:
        """Between the codec and the receiver; here nothing is in the way."""
        self._deliver(sender, receiver, plane, what.message, what.payload, 0.0)

    def _deliver(self, sender: Node, receiver: Node, plane: e.Plane, message: m.AnyMessage,
                 payload: memoryview, extra: float) -> None:  # fmt: skip
        """In order on each connection, as TCP does. A list draws no time of its own, so that seeds
        are what they were before there were lists; what it waits for, it waits for."""
        link = (sender.id, receiver.id, plane)
        took = _LIST_S if isinstance(message, m.Admitted) else self._delay()
        at = max(self.now + took + extra, self._link_free.get(link, 0.0))
        self._link_free[link] = at
        self._arrive(at, sender, receiver, plane, message, payload)

    def _arrive(self, at: float, sender: Node, receiver: Node, plane: e.Plane,
                message: m.AnyMessage, payload: memoryview) -> None:  # fmt: skip
        control = plane is e.Plane.CONTROL and sender is self.coordinator
        peer = COORDINATOR if control else sender.id
        event = e.Arrived(peer, message, payload, honest_ends(message))
        heapq.heappush(self._events, (at, next(self._order), receiver, event))

    # --- effects

    def _handle(self, node: Node, event: e.Event, at_least: float = 0.0) -> None:
        if not node.here:
            return
        node.last = now = max(node.last, node.clock.local(self.now), at_least)
        self.log.update(f"{now!r} {node.id} {type(event).__name__}".encode())
        for effect in node.core.handle(event, now):
            if node.stopped is not None or not node.alive:
                return  # killed between two effects
            self._perform(node, effect)
        gone = node.stopped is not None or not node.alive
        due = None if gone else node.core.next_deadline()
        if due is None:
            self._due.pop(node, None)
        else:
            node.due = due
            self._due[node] = node.clock.world(due)

    def _record(self, node: Node, effect: e.Record) -> None:
        super()._record(node, effect)
        for hash_ in self.ledger.tokens:
            self._made_at.setdefault(hash_, self.now)

    def _perform(self, node: Node, effect: e.Effect) -> None:
        match effect:
            case e.Send():
                self._send(node, effect)
            case e.Connect(peer):
                node.links.add(peer.id)
            case e.Disconnect(peer_id):
                node.links.discard(peer_id)
            case e.Admit(members):
                node.gate = frozenset(member.key for member in members)
            case e.Note():
                node.notes.append(effect)
                self.tell_story(lambda: f"    {node} notes: {effect.text} {dict(effect.fields)}")
            case e.Stop():
                node.stopped = effect
                self._due.pop(node, None)
                self._gone(node)
                self.tell_story(lambda: f"    {node} stops: {effect.failure}")
            case e.Resolve(request):
                node.resolved.setdefault(request, []).append(effect)
                self.tell_story(lambda: f"    {node} resolves {request}: {effect.reply}")
            case e.Settle(call):
                node.settled.setdefault(call, []).append(effect)
            case e.Granted(deployment, task):
                assert isinstance(task, OwnTask)
                node.granted[deployment] = task
            case e.Lease(until):
                node.lease = until
            case _:
                self._work(node, effect)

    # --- time

    def step(self) -> None:
        """The next message, event or timer."""
        node = min(self._due, key=self._due.__getitem__, default=None)
        assert node is not None or self._events, "nothing will ever happen again"
        if self._events and (node is None or self._events[0][0] <= self._due[node]):
            at, order, receiver, event = heapq.heappop(self._events)
            if at < receiver.frozen_until and receiver.here:
                heapq.heappush(self._events, (receiver.frozen_until, order, receiver, event))
                return
            self.now = max(self.now, at)
            self._handle(receiver, event)
            return
        assert node is not None
        if self._due[node] < node.frozen_until:
            self._due[node] = node.frozen_until
            return
        self.now = max(self.now, self._due[node])
        self._handle(node, e.Ticked(), node.due)
        assert node not in self._due or node.due > node.last, f"{node} ticks for ever"

    # --- stories

    @abstractmethod
    def tell_story(self, line: Callable[[], str]) -> None:
        """Something happened; whoever keeps a story asks for the words."""
