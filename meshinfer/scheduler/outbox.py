"""What was sent and not yet acknowledged, and when to send it again.

A send that succeeded proves nothing (RELIABILITY: a killed slow receiver loses its inbox). The wait
grows with the bytes under way to a peer, so that a slow link is not taken for a broken one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from meshinfer import limits
from meshinfer.protocol.codec import Buffer
from meshinfer.protocol.messages import Answer, Deliver, Feed
from meshinfer.scheduler.events import Effect, Plane, Send

Numbered = Deliver | Feed | Answer
"""Messages that are acknowledged by their ``id``."""


@dataclass(frozen=True, slots=True)
class Unacknowledged:
    """A message on its way to ``peer``, first sent at ``since``, due again at ``due``."""

    peer: str
    message: Numbered
    payload: Buffer
    since: float
    due: float


class Outbox:
    """Numbers messages, keeps them until their ack. Mutable: owned by one core."""

    def __init__(self) -> None:
        self._entries: dict[int, Unacknowledged] = {}
        self._last = 0
        self._under_way: dict[str, int] = {}
        self._soonest = float("inf")

    def __len__(self) -> int:
        return len(self._entries)

    def follow(self, other: Outbox) -> None:
        """Use no number of another that was there before: word of those may come late."""
        self._last = max(self._last, other._last)

    def number(self) -> int:
        """The ``id`` of the next message."""
        self._last += 1
        return self._last

    def send(self, peer: str, message: Numbered, payload: Buffer, now: float) -> Send:
        """Keep a message, which has its number, and send it for the first time."""
        self._under_way[peer] = self._under_way.get(peer, 0) + len(payload)
        due = now + self._patience(peer)
        self._soonest = min(self._soonest, due)
        self._entries[message.id] = Unacknowledged(peer, message, payload, now, due)
        return Send(Plane.BULK, peer, message, payload)

    def acknowledge(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._drop(number)

    def forget(self, which: Callable[[Numbered], bool]) -> None:
        """Nobody needs these any more."""
        for number in [n for n, e in self._entries.items() if which(e.message)]:
            self._drop(number)

    def hasten(self, peer: str, now: float) -> None:
        """A peer's connection was cut: send again when it may be back, not when it was due.

        Never at once: a send that finds no route reports the loss again.
        """
        soon = now + limits.RESEND_AFTER_LOSS_S
        for number, entry in self._entries.items():
            if entry.peer == peer and entry.due > soon:
                self._entries[number] = replace(entry, due=soon)
                self._soonest = min(self._soonest, soon)

    def resend_due(self, now: float) -> tuple[list[Effect], list[Unacknowledged]]:
        """Send again what is overdue; and what is given up, since it was so for too long."""
        effects: list[Effect] = []
        lost: list[Unacknowledged] = []
        if now < self._soonest:
            return effects, lost
        for number, entry in list(self._entries.items()):
            if entry.due > now:
                continue
            patience = self._patience(entry.peer)
            if now - entry.since >= limits.ACK_TRIES * patience:
                lost.append(entry)
                self._drop(number)
                continue
            self._entries[number] = replace(entry, due=now + patience)
            effects.append(Send(Plane.BULK, entry.peer, entry.message, entry.payload))
        self._soonest = min((e.due for e in self._entries.values()), default=float("inf"))
        return effects, lost

    def next_deadline(self) -> float | None:
        """Nothing is due before. What was due then may be acknowledged since: each step asks for
        this, and to search for the next one each time costs more than to look once in vain."""
        return self._soonest if self._entries else None

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number, None)
        if entry is None:
            return
        left = self._under_way.get(entry.peer, 0) - len(entry.payload)
        if left:
            self._under_way[entry.peer] = left
        else:
            self._under_way.pop(entry.peer, None)  # peers come and go

    def _patience(self, peer: str) -> float:
        under_way = self._under_way.get(peer, 0)
        return limits.ACK_TIMEOUT_S + under_way / limits.SLOWEST_LINK_BYTES_PER_S
