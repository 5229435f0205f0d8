"""What was sent and not yet acknowledged, and when to send it again.

A send that succeeded proves nothing (RELIABILITY: a killed slow receiver loses its inbox). The wait
grows with the bytes under way to a peer, so that a slow link is not taken for a broken one. What a
peer has not acknowledged is bounded in bytes: it has so much credit, and the rest waits here. What
nobody needs any more still takes the credit that it was sent with: it is in the connection, before
all that comes after. (Behind 64 MiB of such pieces, a request waited 121 s on a link of 5 Mbit/s.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain

from meshinfer import limits
from meshinfer.protocol.codec import Buffer
from meshinfer.protocol.messages import Answer, Deliver, Feed, Sample
from meshinfer.scheduler.events import Effect, Note, Plane, Renew, Send

_NEVER = float("inf")
_RENEWED = -1

Numbered = Deliver | Feed | Answer | Sample
"""Messages that are acknowledged by their ``id``."""


@dataclass(frozen=True, slots=True)
class Unacknowledged:
    """A message on its way to ``peer``, first sent at ``since``, due again at ``due``; never while
    it waits for credit. ``heard``: how much the peer had acknowledged when it was last sent;
    ``_RENEWED``: it is to be sent by a new connection."""

    peer: str
    message: Numbered
    payload: Buffer
    since: float
    due: float
    heard: int = 0


class Outbox:
    """Numbers messages, keeps them until their ack. Mutable: owned by one core. ``late``: the peers
    of pieces that the last ``resend_due`` sent again."""

    def __init__(self) -> None:
        self.late: set[str] = set()
        self._waiting: dict[str, deque[int]] = {}
        self._entries: dict[int, Unacknowledged] = {}
        self._forgotten: dict[int, tuple[str, int, float]] = {}
        """Those that nobody needs and that were sent: to whom, how many bytes, when it was due."""
        self._last = 0
        self._under_way: dict[str, int] = {}
        self._heard: dict[str, int] = {}
        self._soonest = _NEVER

    def __len__(self) -> int:
        return len(self._entries)

    def follow(self, other: Outbox) -> None:
        """Use no number of another that was there before: word of those may come late."""
        self._last = max(self._last, other._last)

    def number(self) -> int:
        """The ``id`` of the next message."""
        self._last += 1
        return self._last

    def send(self, peer: str, message: Numbered, payload: Buffer, now: float) -> list[Effect]:
        """Keep a message, which has its number, and send it for the first time: now, or when the
        peer has acknowledged enough of what is under way."""
        if peer in self._waiting or not self._has_credit(peer, payload):
            self._entries[message.id] = Unacknowledged(peer, message, payload, now, _NEVER)
            self._waiting.setdefault(peer, deque()).append(message.id)
            return []
        return [self._send(peer, message, payload, now)]

    def _send(self, peer: str, message: Numbered, payload: Buffer, now: float) -> Send:
        self._under_way[peer] = self._under_way.get(peer, 0) + len(payload)
        due = now + self._patience(peer)
        self._soonest = min(self._soonest, due)
        heard = self._heard.setdefault(peer, 0)
        self._entries[message.id] = Unacknowledged(peer, message, payload, now, due, heard)
        return Send(Plane.BULK, peer, message, payload)

    def _has_credit(self, peer: str, payload: Buffer) -> bool:
        """One message may always be under way, however large."""
        under_way = self._under_way.get(peer, 0)
        return not under_way or under_way + len(payload) <= limits.CREDIT_BYTES

    def _release(self, now: float) -> list[Effect]:
        """Send what waited, as far as there is credit now."""
        effects: list[Effect] = []
        for peer, waiting in list(self._waiting.items()):
            while waiting:
                entry = self._entries[waiting[0]]
                if not self._has_credit(peer, entry.payload):
                    break
                waiting.popleft()
                effects.append(self._send(peer, entry.message, entry.payload, now))
            if not waiting:
                del self._waiting[peer]
        return effects

    def acknowledge(self, peer: str, numbers: Iterable[int]) -> None:
        """By whom they went to: anybody can count."""
        for number in numbers:
            entry = self._entries.get(number)
            if entry is not None and entry.peer == peer:
                self._heard[peer] = self._heard.get(peer, 0) + 1
                self._drop(number)
            elif number in self._forgotten and self._forgotten[number][0] == peer:
                self._heard[peer] = self._heard.get(peer, 0) + 1
                self._return(peer, self._forgotten.pop(number)[1])

    def forget(self, which: Callable[[Numbered], bool]) -> None:
        """Nobody needs these any more: they are not sent again, nor kept."""
        for number in [n for n, e in self._entries.items() if which(e.message)]:
            entry = self._entries[number]
            if entry.due == _NEVER:
                self._drop(number)
            else:
                del self._entries[number]
                self._forgotten[number] = entry.peer, len(entry.payload), entry.due

    def begin_anew(self) -> None:
        """As ``forget``, of all that others wait for; and those who owed word of it may have
        forgotten that they do, so its credit comes back at once."""
        self.forget(lambda message: isinstance(message, Deliver | Sample))
        self._expire_forgotten(_NEVER)

    def hasten(self, peer: str, now: float) -> None:
        """A peer's connection was cut: send again when it may be back, not when it was due.

        Never at once: a send that finds no route reports the loss again.
        """
        soon = now + limits.RESEND_AFTER_LOSS_S
        for number, entry in self._entries.items():
            if entry.peer == peer and soon < entry.due < _NEVER:
                self._entries[number] = replace(entry, due=soon, heard=_RENEWED)
                self._soonest = min(self._soonest, soon)
        for number, (to, nbytes, due) in self._forgotten.items():
            if to == peer and soon < due:  # what was in that connection is in none now
                self._forgotten[number] = to, nbytes, soon
                self._soonest = min(self._soonest, soon)

    def _expire_forgotten(self, now: float) -> None:
        """The slowest link would have carried them by now, or they were lost with their own."""
        for number in [n for n, (_, _, due) in self._forgotten.items() if due <= now]:
            peer, nbytes, _ = self._forgotten.pop(number)
            self._return(peer, nbytes)

    def resend_due(self, now: float) -> tuple[list[Effect], list[Unacknowledged]]:
        """Send again what is overdue, and for the first time what waited for credit; and what is
        given up, since it was overdue for too long.

        A peer that acknowledged nothing since may well be there, behind a connection that carries
        no more messages: with a byte too few, it waits for the rest of one for ever. So it is made
        anew, and used when it is there. A slow link gets more time, for what is half on its way
        begins again then."""
        lost: list[Unacknowledged] = []
        renewed: set[str] = set()
        self.late.clear()
        if now < self._soonest:
            return [], lost
        self._expire_forgotten(now)
        effects = self._release(now)
        for number, entry in list(self._entries.items()):
            if entry.due > now:
                continue
            patience = self._patience(entry.peer)
            if now - entry.since >= limits.ACK_TRIES * patience:
                lost.append(entry)
                self._drop(number)
                continue
            peer, heard = entry.peer, self._heard.get(entry.peer, 0)
            few = self._under_way.get(peer, 0) <= limits.FRAME_BYTES
            if heard == entry.heard and (few or now - entry.since >= 2 * patience):
                if peer not in renewed:
                    renewed.add(peer)
                    said = "acknowledges nothing; its connection begins anew if nothing else comes"
                    effects += [Note("warning", said, {"peer": peer}), Renew(peer)]
                soon = now + limits.RESEND_AFTER_LOSS_S
                self._entries[number] = replace(entry, due=soon, heard=_RENEWED)
                continue
            self._entries[number] = replace(entry, due=now + patience, heard=heard)
            effects.append(Send(Plane.BULK, entry.peer, entry.message, entry.payload))
            if isinstance(entry.message, Deliver):
                self.late.add(entry.peer)
        dues = chain(
            (e.due for e in self._entries.values()), (f[2] for f in self._forgotten.values())
        )
        self._soonest = min(dues, default=_NEVER)
        if lost and self._waiting:
            self._soonest = now  # they made room
        return effects, lost

    def next_deadline(self) -> float | None:
        """Nothing is due before. What was due then may be acknowledged since: each step asks for
        this, and to search for the next one each time costs more than to look once in vain."""
        return self._soonest if self._entries or self._forgotten else None

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number, None)
        if entry is None:
            return
        if entry.due == _NEVER:  # it took no credit
            self._waiting[entry.peer].remove(number)
            if not self._waiting[entry.peer]:
                del self._waiting[entry.peer]
            else:
                self._soonest = 0.0  # what waited behind it may be small enough
            return
        self._return(entry.peer, len(entry.payload))

    def _return(self, peer: str, nbytes: int) -> None:
        """What was under way is so no more."""
        if peer in self._waiting:
            self._soonest = 0.0  # look at once whether there is room
        left = self._under_way.get(peer, 0) - nbytes
        if left:
            self._under_way[peer] = left
        else:
            self._under_way.pop(peer, None)  # peers come and go
            self._heard.pop(peer, None)

    def _patience(self, peer: str) -> float:
        under_way = self._under_way.get(peer, 0)
        return limits.ACK_TIMEOUT_S + under_way / limits.SLOWEST_LINK_BYTES_PER_S
