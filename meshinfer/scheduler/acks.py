"""Acknowledgements wait a moment for company: a piece for the peer carries them, or one message.

A message costs more than the few bytes in it, on a slow device most of all. Senders wait for
seconds before they send again, so that a short delay changes nothing; much data is told of at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Effect, Plane, Send


@dataclass(slots=True)
class _Waiting:
    """What one peer has sent and not been told of; ``due``: when it is."""

    due: float
    ids: list[int] = field(default_factory=list)
    nbytes: int = 0


class AckBox:
    """Mutable: owned by one core, which sends what is due as it ticks, and the rest as it stops."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._soonest = float("inf")

    def __len__(self) -> int:
        return sum(len(w.ids) for w in self._waiting.values())

    def add(self, peer: str, number: int, nbytes: int, now: float) -> None:
        """A message of ``nbytes`` has arrived; its sender keeps it until it is told."""
        waiting = self._waiting.get(peer)
        if waiting is None:
            waiting = self._waiting[peer] = _Waiting(now + limits.ACK_DELAY_S)
            self._soonest = min(self._soonest, waiting.due)
        waiting.ids.append(number)
        waiting.nbytes += nbytes
        if len(waiting.ids) >= limits.ACKS_AT_ONCE or waiting.nbytes >= limits.ACK_BYTES:
            waiting.due = min(waiting.due, now)
            self._soonest = min(self._soonest, waiting.due)

    def take(self, peer: str) -> tuple[int, ...]:
        """What a piece that goes to this peer now can carry along."""
        waiting = self._waiting.pop(peer, None)
        if waiting is None:
            return ()
        ids = tuple(waiting.ids)
        if len(ids) > limits.ACKS_AT_ONCE:
            self._waiting[peer] = waiting
            waiting.ids = waiting.ids[limits.ACKS_AT_ONCE :]
        return ids[: limits.ACKS_AT_ONCE]

    def due(self, now: float) -> list[Effect]:
        """Tell those peers whose time has come."""
        if now < self._soonest:
            return []
        effects = self._tell([peer for peer, w in self._waiting.items() if w.due <= now])
        self._soonest = min((w.due for w in self._waiting.values()), default=float("inf"))
        return effects

    def flush(self) -> list[Effect]:
        """Tell everybody, since nobody will be here to do it later."""
        return self._tell(list(self._waiting))

    def next_deadline(self) -> float | None:
        """Nothing is due before; as with ``Outbox``, what was due then may have gone since."""
        return self._soonest if self._waiting else None

    def _tell(self, peers: Iterable[str]) -> list[Effect]:
        return [
            Send(Plane.BULK, peer, m.Ack(ids=ids))
            for peer in peers
            for ids in _in_parts(tuple(self._waiting.pop(peer).ids), limits.ACKS_AT_ONCE)
        ]


def _in_parts(ids: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    return [ids[i : i + most] for i in range(0, len(ids), most)]
