"""What was sent and not yet acknowledged, and when to send it again.

A send that succeeded proves nothing (RELIABILITY: a killed slow receiver loses its inbox). The wait
grows with the bytes under way to a peer, so that a slow link is not taken for a broken one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol.codec import Buffer
from meshinfer.protocol.messages import Answer, Deliver, Feed
from meshinfer.scheduler.events import Effect, Plane, Send

Numbered = Deliver | Feed | Answer
"""Messages that are acknowledged by their ``id``."""


@dataclass(frozen=True, slots=True)
class _Entry:
    peer: str
    request: str
    message: Numbered
    payload: Buffer
    due: float
    tries: int


class Outbox:
    """Numbers messages, keeps them until their ack. Mutable: owned by one core."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._entries)

    def send(self, peer: str, request: str, message: Numbered, payload: Buffer, now: float) -> Send:
        """Number the message, keep it, and send it for the first time."""
        self._last += 1
        message = structs.replace(message, id=self._last)
        due = now + self._patience(peer, len(payload))
        self._entries[self._last] = _Entry(peer, request, message, payload, due, 1)
        return Send(Plane.BULK, peer, message, payload)

    def acknowledge(self, number: int) -> None:
        self._entries.pop(number, None)

    def forget_request(self, request: str) -> None:
        self._drop(lambda entry: entry.request == request)

    def forget_peer(self, peer: str) -> None:
        self._drop(lambda entry: entry.peer == peer)

    def resend_to(self, peer: str, now: float) -> list[Effect]:
        """All that is open for a peer, at once: its connection was cut and comes back."""
        open_ = [n for n, e in self._entries.items() if e.peer == peer]
        return self._again([n for n in open_ if self._entries[n].tries < limits.ACK_TRIES], now)

    def resend_due(self, now: float) -> tuple[list[Effect], list[str]]:
        """What is overdue; and the peers that did not acknowledge after the last try."""
        due = [n for n, e in self._entries.items() if e.due <= now]
        lost = [n for n in due if self._entries[n].tries >= limits.ACK_TRIES]
        peers = sorted({self._entries[n].peer for n in lost})
        for number in lost:
            del self._entries[number]
        return self._again([n for n in due if n in self._entries], now), peers

    def next_deadline(self) -> float | None:
        return min((e.due for e in self._entries.values()), default=None)

    def _again(self, numbers: list[int], now: float) -> list[Effect]:
        effects: list[Effect] = []
        for number in numbers:
            entry = self._entries[number]
            due = now + self._patience(entry.peer, 0)
            self._entries[number] = replace(entry, due=due, tries=entry.tries + 1)
            effects.append(Send(Plane.BULK, entry.peer, entry.message, entry.payload))
        return effects

    def _patience(self, peer: str, more: int) -> float:
        under_way = sum(len(e.payload) for e in self._entries.values() if e.peer == peer) + more
        return limits.ACK_TIMEOUT_S + under_way / limits.SLOWEST_LINK_BYTES_PER_S

    def _drop(self, which: Callable[[_Entry], bool]) -> None:
        for number in [n for n, e in self._entries.items() if which(e)]:
            del self._entries[number]
