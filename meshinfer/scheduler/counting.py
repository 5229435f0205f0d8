"""How many messages the ends of a control connection have said: who hears of more than have come
knows that some are lost, and begins anew by a hello.

TCP loses none, but somebody in between can, whole ones, and CURVE does not notice. A heartbeat says
how many went each way, and the coordinator says its own number (``Alive``) to whoever is behind.
So it does not matter which are lost, these two included. Counts begin with a hello and its welcome.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs

from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Arrived, Effect, Event, Note, Plane, Send
from meshinfer.scheduler.telling import COORDINATOR

COUNTED = 6
"""The protocol from which on messages are counted."""

_BULK = (m.Want, m.Chunk, m.Gone, m.Ack, m.Probe)
"""What comes to a coordinator by the bulk plane, and has nothing to do with these counts."""


@dataclass(slots=True)
class Tally:
    """Since the hello and the welcome, by one end. ``counts``: so does the other, as it has said;
    ``behind``: not all that was said had come there when it last said so."""

    said: int = 0
    heard: int = 0
    counts: bool = False
    behind: bool = False

    def hears(self, told: int | None) -> bool:
        """A message has come, which may tell how many came before it; whether some are missing.
        More than were told of is nobody's loss."""
        missing = told is not None and told > self.heard
        self.heard = 1 + (self.heard if told is None else told)
        return missing


class Member(ABC):
    """What the cores of devices and clients have in common."""

    def __init__(self) -> None:
        self._tally = Tally()

    @abstractmethod
    def _handle(self, event: Event, now: float) -> list[Effect]: ...

    @abstractmethod
    def _rejoin(self, when: float) -> list[Effect]:
        """Say hello then."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        """The only gate."""
        effects: list[Effect] = []
        if isinstance(event, Arrived) and event.peer == COORDINATOR:
            effects = self._told_so_far(event.message, now)
        effects += self._handle(event, now)
        for i, effect in enumerate(effects):
            if isinstance(effect, Send) and effect.plane is Plane.CONTROL:
                effects[i] = self._counted(effect)
        return effects

    def _told_so_far(self, message: m.AnyMessage, now: float) -> list[Effect]:
        tally = self._tally
        if isinstance(message, m.Welcome):
            tally.heard, tally.counts = 0, message.protocol >= COUNTED
            return []
        told = message.said if isinstance(message, m.Alive) else None
        if not tally.hears(told) or not tally.counts:
            return []
        return [Note("warning", "words of the coordinator were lost", {}), *self._rejoin(now)]

    def _counted(self, send: Send) -> Send:
        tally = self._tally
        if isinstance(send.message, m.Hello):
            tally.said, tally.counts = 0, False
            return send
        if isinstance(send.message, m.Heartbeat) and tally.counts:
            beat = structs.replace(send.message, said=tally.said, heard=tally.heard)
            send = Send(send.plane, send.peer, beat)
        tally.said += 1
        return send


class Tallies:
    """The coordinator's, of each peer that counts. Mutable: owned by its core. ``knows``: whether a
    peer has joined."""

    def __init__(self, knows: Callable[[str], bool]) -> None:
        self._knows = knows
        self._of: dict[str, Tally] = {}
        self._room = 16

    def heard(self, peer: str, message: m.AnyMessage) -> bool:
        """A message has come; whether earlier ones of a peer that has joined are missing."""
        if isinstance(message, m.Hello):
            self._of.pop(peer, None)
            if message.protocol[1] >= COUNTED:
                self._make_room()
                self._of[peer] = Tally()
            return False
        tally = self._of.get(peer)
        if tally is None or isinstance(message, _BULK):
            return False
        if not isinstance(message, m.Heartbeat):
            return tally.hears(None)
        tally.behind = message.heard is not None and message.heard < tally.said
        return tally.hears(message.said) and self._knows(peer)

    def _make_room(self) -> None:
        """Forget those that have left, now and then."""
        if len(self._of) >= self._room:
            self._of = {peer: tally for peer, tally in self._of.items() if self._knows(peer)}
            self._room = 2 * len(self._of) + 16

    def is_behind(self, peer: str) -> bool:
        """Whether to say to a peer how many words were said to it."""
        tally = self._of.get(peer)
        return tally is not None and tally.behind

    def counted(self, effects: list[Effect]) -> list[Effect]:
        """What leaves, with its count where it says one."""
        for i, effect in enumerate(effects):
            if not isinstance(effect, Send) or effect.plane is not Plane.CONTROL:
                continue
            tally = self._of.get(effect.peer)
            if tally is None:
                continue
            if isinstance(effect.message, m.Welcome):
                tally.said = 0
                continue
            if isinstance(effect.message, m.Alive):
                alive = structs.replace(effect.message, said=tally.said)
                effects[i] = Send(effect.plane, effect.peer, alive)
            tally.said += 1
        return effects
