"""A world with faults in its links: what TCP can do to messages, and a little more.

A connection of the control plane loses nothing silently: it breaks, and both ends hear of it; but
somebody in between may drop a word of it. On
the bulk plane single messages are lost, doubled, damaged and overtaken as well, since senders
there repeat what is not acknowledged. A silent partition holds what is under way; ZMTP heartbeats
break a control connection after 1.5 s of it, TCP_MAXRT one of the bulk plane after 3 s.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Buffer, ProtocolError, decode
from meshinfer.scheduler import events as e
from meshinfer.scheduler.enrolment import Door
from meshinfer.scheduler.worker import COORDINATOR
from meshinfer.simulator.node import BULK, Node, Timing
from meshinfer.simulator.streams import Streams
from meshinfer.simulator.world import World

CONTROL_CUT_S = limits.SILENT_MOST_S
BULK_CUT_S = 3.0
_RESET_S = 0.001


@dataclass(slots=True)
class Noise:
    """What may happen to a message, each by its probability; ``slowest_s``: of a message's time."""

    loss: float = 0.0
    double: float = 0.0
    overtake: float = 0.0
    damage: float = 0.0
    slowest_s: float = 0.005


@dataclass(slots=True)
class Block:
    """Nothing passes one way. ``broken``: planes whose connection broke meanwhile."""

    until: float
    broken: set[e.Plane]


@dataclass(frozen=True, slots=True)
class Held:
    """A message that waits for a partition's end."""

    sender: Node
    receiver: Node
    plane: e.Plane
    what: e.Arrived


class Network(World):
    """``noise`` and the methods here are what faults are made of. Subclasses make the kernels."""

    def __init__(
        self, streams: Streams, timing: Timing, noise: Noise, door: Door | None = None
    ) -> None:
        self.streams = streams
        self.noise = noise
        self.keeps_story = False
        self.story: deque[tuple[float, str]] = deque(maxlen=200_000)
        self.damaged = self.swallowed = 0
        self.deaf: set[tuple[str, str]] = set()
        self.words_to_lose = 0
        """So many of what is said next, but for heartbeats, never come."""
        self.on_word_lost: Callable[[], None] = lambda: None
        self._blocks: dict[tuple[str, str], Block] = {}
        self._held: defaultdict[tuple[str, str], list[Held]] = defaultdict(list)
        self._undelivered: list[tuple[Node, e.Send]] = []
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self._draw = {
            name: streams[name].random for name in ("loss", "double", "overtake", "damage")
        }
        super().__init__(timing, self._latency, now=0.0, door=door)

    def _latency(self) -> float:
        return 1e-4 + self.noise.slowest_s * self.streams["delay"].random() ** 4

    # --- time

    def at(self, when: float, do: Callable[[], object]) -> None:
        """Do something in the world at a time."""
        self._later.append((when, len(self._later), do))
        self._later.sort(key=lambda entry: entry[:2], reverse=True)

    def step(self) -> None:
        if self._later:
            when, _, do = self._later[-1]
            soonest = self._events[0][0] if self._events else when
            if when <= min(soonest, min(self._due.values(), default=when)):
                self._later.pop()
                self.now = max(self.now, when)
                do()
                return
        super().step()

    # --- messages

    def _carry(
        self,
        sender: Node,
        receiver: Node,
        plane: e.Plane,
        frames: Sequence[Buffer],
        what: e.Arrived,
    ) -> None:
        block = self._blocks.get((sender.name, receiver.name))
        if block is not None:
            self._wait(block, Held(sender, receiver, plane, what))
        elif plane is e.Plane.CONTROL and self._is_dropped(what.message):
            self.tell_story(lambda: "    ... DROPPED")
            self.on_word_lost()
        elif plane is e.Plane.CONTROL:
            self._deliver(sender, receiver, plane, what.message, what.payload, 0.0)
        else:
            self._bulk(sender, receiver, frames, what)

    def _is_dropped(self, message: m.AnyMessage) -> bool:
        dropped = self.words_to_lose > 0 and not isinstance(message, m.Heartbeat | m.Alive)
        self.words_to_lose -= dropped
        return dropped

    def _bulk(
        self, sender: Node, receiver: Node, frames: Sequence[Buffer], what: e.Arrived
    ) -> None:
        noise, draw = self.noise, self._draw
        message, payload = what.message, what.payload
        if (sender.id, receiver.id) in self.deaf:
            self.swallowed += 1
            self.tell_story(lambda: "    ... SWALLOWED")
            return
        if draw["loss"]() < noise.loss:
            self.tell_story(lambda: "    ... LOST")
            return
        if draw["damage"]() < noise.damage and len(payload):
            self._damage(frames)
            return
        if draw["double"]() < noise.double:
            self.tell_story(lambda: "    ... TWICE")
            self._deliver(sender, receiver, e.Plane.BULK, message, payload, 0.0)
        if draw["overtake"]() < noise.overtake:
            self.tell_story(lambda: "    ... OUT OF TURN")
            late = self.streams["overtake by"].random() * 10 * noise.slowest_s
            at = self.now + self._delay() + late
            self._arrive(at, sender, receiver, e.Plane.BULK, message, payload)
            return
        self._deliver(sender, receiver, e.Plane.BULK, message, payload, 0.0)

    def _damage(self, frames: Sequence[Buffer]) -> None:
        """A bit of a payload flips: the receiver's shell drops what does not match its checksum."""
        rng = self.streams["damage where"]
        frame = rng.randrange(1, len(frames))
        data = bytearray(frames[frame])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            decode([*frames[:frame], bytes(data), *frames[frame + 1 :]])
        except ProtocolError:
            self.damaged += 1
            self.tell_story(lambda: "    ... DAMAGED, and dropped")
            return
        raise AssertionError("the codec takes a damaged payload")

    def _no_route(self, sender: Node, send: e.Send) -> None:
        """A ROUTER knows at once that nobody of that name is connected."""
        super()._no_route(sender, send)
        if send.peer == COORDINATOR:  # a DEALER keeps a few for when it is connected again
            if sum(n is sender for n, _ in self._undelivered) < limits.HIGH_WATER_MARK:
                self._undelivered.append((sender, send))
            return
        if sender is self.coordinator or send.plane is e.Plane.BULK:
            lost = e.PeerLost(send.peer, "no route", plane=send.plane)
            if send.peer not in sender.links:
                self.post(sender, lost, 0.0)

    def _no_connection(self, sender: Node, receiver: Node, send: e.Send) -> None:
        """As if it were not there."""
        self.tell_story(lambda: f"{sender} -> {receiver} (NOT CONNECTED) {send.message}")
        self._no_route(sender, send)

    def _not_let_in(self, sender: Node, receiver: Node, send: e.Send) -> None:
        """Who may be let in yet tries again, as libzmq does; what it has to say waits."""
        super()._not_let_in(sender, receiver, send)
        if self.coordinator not in (sender, receiver):
            self.at(self.now + limits.RECONNECT_MS / 1e3, lambda: self._send_again(sender, send))

    def _send_again(self, sender: Node, send: e.Send) -> None:
        if sender.here:
            self._send(sender, send)

    # --- partitions

    def block(self, sender: str, receiver: str, seconds: float) -> None:
        """Nothing from one node to another for so long; what is sent meanwhile waits, or is lost
        with its connection."""
        until = self.now + seconds
        self._blocks[sender, receiver] = block = Block(until, set())
        self.tell_story(lambda: f"BLOCK {sender} -> {receiver} for {seconds:.2f} s")
        if COORDINATOR in (sender, receiver) and seconds > CONTROL_CUT_S:
            self.at(self.now + CONTROL_CUT_S, lambda: self._break_control(sender, receiver, block))
        if seconds > BULK_CUT_S:
            self.at(self.now + BULK_CUT_S, lambda: self._break_bulk(sender, receiver, block))
        self.at(until, lambda: self._unblock(sender, receiver, block))

    def _break_control(self, sender: str, receiver: str, block: Block) -> None:
        if self._blocks.get((sender, receiver)) is block:
            self.cut(receiver if sender == COORDINATOR else sender)
            block.broken.add(e.Plane.CONTROL)
            back = self._blocks.setdefault((receiver, sender), Block(block.until, set()))
            back.broken.add(e.Plane.CONTROL)  # without one way no connection comes about
            if back.until == block.until:
                self.at(block.until, lambda: self._unblock(receiver, sender, back))

    def _break_bulk(self, sender: str, receiver: str, block: Block) -> None:
        if self._blocks.get((sender, receiver)) is not block:
            return
        waiting = self._held[sender, receiver]
        lost = [held for held in waiting if held.plane is e.Plane.BULK]
        block.broken.add(e.Plane.BULK)
        if lost:
            self._held[sender, receiver] = [h for h in waiting if h.plane is not e.Plane.BULK]
            self.tell_story(lambda: f"BULK {sender} -> {receiver} breaks, {len(lost)} lost")
            self._bulk_lost(lost[0].sender, lost[0].receiver)

    def _bulk_lost(self, sender: Node, receiver: Node) -> None:
        """Who connected hears of it; who is connected to does not."""
        if receiver.id in sender.links:
            self.post(sender, e.PeerLost(receiver.id, "reset", plane=e.Plane.BULK), 0.0)
        elif sender.id in receiver.links:
            self.post(receiver, e.PeerLost(sender.id, "reset", plane=e.Plane.BULK), 0.0)

    def _wait(self, block: Block, held: Held) -> None:
        """Sockets that connect keep a few messages for the next connection; others drop them."""
        queue = self._held[held.sender.name, held.receiver.name]
        if held.plane in block.broken:
            control = held.plane is e.Plane.CONTROL
            connects = (
                held.receiver.name == COORDINATOR
                if control
                else held.receiver.id in held.sender.links
            )
            if not connects:
                self.tell_story(lambda: "    ... NO ROUTE")
                peer = held.receiver.id
                self.post(held.sender, e.PeerLost(peer, "no route", plane=held.plane), 0.0)
                return
            if sum(h.plane is held.plane for h in queue) >= limits.HIGH_WATER_MARK:
                self.tell_story(lambda: "    ... NO ROOM")
                return
        self.tell_story(lambda: "    ... WAITS")
        queue.append(held)

    def _unblock(self, sender: str, receiver: str, block: Block) -> None:
        if self._blocks.get((sender, receiver)) is not block:
            return
        del self._blocks[sender, receiver]
        self.tell_story(lambda: f"UNBLOCK {sender} -> {receiver}")
        late = self.streams["reconnect"].uniform(0.0, 0.3)
        for held in self._held.pop((sender, receiver), []):
            if held.sender.here and held.receiver.here:
                what = held.what
                self._deliver(
                    held.sender, held.receiver, held.plane, what.message, what.payload, late
                )

    # --- connections and processes

    def cut(self, name: str) -> None:
        """The control connection breaks, and is made anew: what was on its way is lost."""
        node = self.nodes[name]
        self.tell_story(lambda: f"CUT {node}")

        def is_lost(to: Node, event: e.Arrived) -> bool:
            if isinstance(event.message, BULK):
                return False
            there = to is node and event.peer == COORDINATOR
            return there or (to is self.coordinator and event.peer == node.id)

        self.take_back(is_lost)
        for pair in ((name, COORDINATOR), (COORDINATOR, name)):
            kept = [h for h in self._held.get(pair, []) if h.plane is not e.Plane.CONTROL]
            if pair in self._held:
                self._held[pair] = kept
        reset = self.streams["reset"]
        self.post(self.coordinator, e.PeerLost(node.id, "reset"), reset.uniform(0.0, 0.002))
        self.post(node, e.PeerLost(COORDINATOR, "reset"), reset.uniform(0.0, 0.002))

    def cut_bulk(self, sender: str, receiver: str) -> None:
        """A bulk connection breaks: what was on its way is lost."""
        one, other = self.nodes[sender], self.nodes[receiver]
        self.tell_story(lambda: f"CUT BULK {one} -> {other}")
        self.take_back(
            lambda to, event: (
                isinstance(event.message, BULK)
                and (
                    (to is other and event.peer == one.id) or (to is one and event.peer == other.id)
                )
            )
        )
        self._bulk_lost(one, other)

    def deafen(self, sender: str, receiver: str) -> None:
        """A stream has lost a byte: what follows is never a whole message again, until the
        connection is made anew."""
        one, other = self.nodes[sender], self.nodes[receiver]
        self.tell_story(lambda: f"DEAF {one} -> {other}")
        self.deaf.add((one.id, other.id))

    def _renew(self, node: Node, peer: str) -> None:
        self.deaf -= {(node.id, peer), (peer, node.id)}
        other = next((n for n in self.nodes.values() if n.id == peer), None)
        if other is not None and other.here:
            self.cut_bulk(node.name, other.name)

    def _gone(self, node: Node) -> None:
        """Its connections are reset: what it sent last may be lost with it."""
        reset_s = _RESET_S + self.streams["reset"].random() * 0.01
        last = self.now + reset_s
        self._events = [
            entry
            for entry in self._events
            if not (
                isinstance(entry[3], e.Arrived)
                and entry[0] > last
                and (
                    entry[3].peer == node.id
                    or (node is self.coordinator and entry[3].peer == COORDINATOR)
                )
            )
        ]
        heapq.heapify(self._events)
        self._reset(node, reset_s)

    def start_coordinator(self) -> None:
        super().start_coordinator()
        waiting, self._undelivered = self._undelivered, []
        for node, send in waiting:
            if node.here:
                self._send(node, send)

    def power_off(self, name: str) -> None:
        """Its cable is pulled: nobody is told, heartbeats of connections notice."""
        self.kill(name, silent=True)
        node = self.nodes[name]
        self.at(self.now + CONTROL_CUT_S, lambda: self._gone(node))

    def freeze(self, name: str, seconds: float) -> None:
        """SIGSTOP and SIGCONT. Connections of the control plane do not last longer than 1.5 s."""
        node = self.nodes[name]
        until = max(node.frozen_until, self.now + seconds)
        self._move_parked(node, until)
        node.frozen_until = until
        self.tell_story(lambda: f"FREEZE {node} for {seconds:.2f} s")
        if seconds > CONTROL_CUT_S:
            names = [n.name for n in self.living()] if node is self.coordinator else [name]
            for each in names:
                if each != COORDINATOR:
                    self.at(self.now + CONTROL_CUT_S, lambda each=each: self._cut_if(each, node))  # type: ignore[misc]

    def _move_parked(self, node: Node, when: float) -> None:
        """What came while a node was frozen waits until its end; that is another now."""
        before = node.frozen_until
        self._events = [
            (when if to is node and at == before else at, order, to, event)
            for at, order, to, event in self._events
        ]
        heapq.heapify(self._events)

    def _cut_if(self, name: str, frozen: Node) -> None:
        if self.nodes[name].here and frozen.here and self.now < frozen.frozen_until:
            self.cut(name)

    def heal(self) -> None:
        """No noise, no partition, nobody frozen."""
        self.tell_story(lambda: "HEAL")
        self.noise = Noise(slowest_s=self.noise.slowest_s)
        for (sender, receiver), block in list(self._blocks.items()):
            self._unblock(sender, receiver, block)
        for node in self.nodes.values():
            self._move_parked(node, self.now)
            if node.frozen_until > self.now and node in self._due:
                self._due[node] = node.clock.world(node.due)
            node.frozen_until = 0.0

    # --- stories

    def tell_story(self, line: Callable[[], str]) -> None:
        if self.keeps_story:
            self.story.append((self.now, line()))
