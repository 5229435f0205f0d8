"""Pieces that go by the head, where two devices do not reach each other: who does, and until when.

A device tells the coordinator that a peer is late to acknowledge; both are then told whose bulk
socket to go by. An echo of their own, sent straight, finds out when the straight way is back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Connect, Effect, Note, Plane, Send
from meshinfer.scheduler.membership import Membership
from meshinfer.scheduler.telling import told

_FIRST = 1 << 48
"""Echoes of detours have numbers from this one on; those of links are below."""


@dataclass(slots=True)
class _Way:
    """``via``: the peer that relays; ``number``: of the last straight echo; ``next_at``: of the
    next."""

    via: str
    next_at: float
    number: int = 0


class Detours:
    """A device's half. Mutable: owned by a worker's core."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._relay = ""
        self._ways: dict[str, _Way] = {}
        self._asked: dict[str, float] = {}
        self._number = _FIRST

    def late(self, peers: Iterable[str], now: float) -> list[Effect]:
        """These did not acknowledge pieces in time: ask for another way."""
        asks: list[Effect] = []
        for peer in sorted(peers):
            if peer in self._ways or now < self._asked.get(peer, 0.0):
                continue
            self._asked = {p: at for p, at in self._asked.items() if now < at}
            self._asked[peer] = now + limits.DETOUR_ASKED_S
            asks.append(told(m.Stalled(peer=peer)))
        return asks

    def begin(self, message: m.Detour, now: float) -> list[Effect]:
        """The coordinator says how to go."""
        self.trust(message.via)
        self._go_by(message.peer.id, message.via.id, now)
        return [Connect(message.via)]

    def trust(self, head: m.Peer | None) -> None:
        """The coordinator names its head: what this relays is from whom it says, since it looks."""
        if head is not None:
            self._relay = head.id

    def _go_by(self, peer: str, via: str, now: float) -> None:
        if peer not in self._ways:
            self._ways[peer] = _Way(via, now + limits.DETOUR_PROBE_S)
        self._ways[peer].via = via
        while len(self._ways) > limits.DEVICES:
            del self._ways[next(iter(self._ways))]

    def goes(self, peer: str) -> bool:
        """Whether pieces for a peer take a detour."""
        return peer in self._ways

    def redirect(self, effects: list[Effect]) -> list[Effect]:
        """Pieces and their acknowledgements, on the way that they must go."""
        return [self._redirected(effect) for effect in effects] if self._ways else effects

    def _redirected(self, effect: Effect) -> Effect:
        if not isinstance(effect, Send) or not isinstance(effect.message, m.Deliver | m.Ack):
            return effect
        way = self._ways.get(effect.peer)
        if way is None:
            return effect
        relay = m.Relay(to=effect.peer, origin=self._own, message=effect.message)
        return Send(Plane.BULK, way.via, relay, effect.payload)

    def pass_on(self, peer: str, message: m.Relay, payload: memoryview) -> list[Effect]:
        """The head's part. Whoever gets it believes the head, so it looks who says so."""
        if message.origin != peer or message.to == peer:
            return [Note("warning", "it relays nothing for others", {"peer": peer})]
        return [Send(Plane.BULK, message.to, message, payload)]

    def is_for_us(self, peer: str, message: m.Relay, now: float) -> bool:
        """Whether it is a message for this device, by its head: the answers go back that way."""
        if message.to != self._own or peer != self._relay:
            return False
        self._go_by(message.origin, peer, now)
        return True

    def echoed(self, peer: str, number: int) -> list[Effect]:
        """A straight echo has come back: so does what is sent straight."""
        way = self._ways.get(peer)
        if way is None or way.number != number:
            return []
        del self._ways[peer]
        return [told(m.Stalled(peer=peer, over=True))]

    def due(self, now: float) -> list[Effect]:
        """Try the straight way."""
        effects: list[Effect] = []
        for peer, way in self._ways.items():
            if now >= way.next_at:
                self._number += 1
                way.number, way.next_at = self._number, now + limits.DETOUR_PROBE_S
                effects.append(Send(Plane.BULK, peer, m.Echo(id=way.number)))
        return effects

    def next_deadline(self) -> float | None:
        if not self._ways:
            return None
        return min((way.next_at for way in self._ways.values()), default=None)

    def reset(self) -> None:
        """The coordinator is gone, or knows nothing any more."""
        self._ways.clear()
        self._asked.clear()


def detour(members: Membership, peer: str, message: m.Stalled) -> list[Effect]:
    """The coordinator's half: a device does not hear from another, or does again."""
    device, other, head = members.by_peer(peer), members.by_peer(message.peer), members.head
    if device is None or other is None:
        return []
    pair = (min(device.name, other.name), max(device.name, other.name))
    fields = {"device": device.name, "other": other.name}
    if message.over:
        if not members.apart.pop(pair, False):
            return []
        return [Note("info", "two devices reach each other again", fields)]
    if head is None or head in (device, other):
        return []
    ways = [
        Send(Plane.CONTROL, device.peer, m.Detour(peer=other.bulk, via=head.bulk)),
        Send(Plane.CONTROL, other.peer, m.Detour(peer=device.bulk, via=head.bulk)),
    ]
    if pair in members.apart:
        return [*ways]
    members.apart[pair] = True
    note = Note(
        "warning", "two devices do not reach each other, their pieces go by the head", fields
    )
    return [note, *ways]
