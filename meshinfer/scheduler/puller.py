"""Fetches blobs chunk by chunk from the peer that has them; asks again when a chunk stays away.

Pulling bounds what is under way without any state at the sender. Chunks come in the order in which
they were asked for: one that several later ones overtook is asked for at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshinfer import limits
from meshinfer.protocol.messages import Chunk, Want
from meshinfer.scheduler.events import Effect, Plane, Renew, Send, WriteBlob

_PATIENCE_S = (
    limits.ACK_TIMEOUT_S
    + (limits.PULLS_AT_ONCE + 1) * limits.BLOB_WANT_BYTES / limits.SLOWEST_LINK_BYTES_PER_S
)
"""One more than at once: it may have been asked for twice."""
_OVERTAKEN = 3


@dataclass(slots=True)
class _Pull:
    """``gentle``: nobody waits for it, so it must not be in the way of what somebody waits for.
    ``since``: when it last got on, or was begun; ``asked``: when it was last asked for;
    ``overtaken``: chunks of its peer that were asked for later, and are here.
    ``look``: when to look whether its peer sends anything; ``gone``: how often it had not it."""

    peer: str
    total: int | None
    offset: int = 0
    since: float = 0.0
    due: float = 0.0
    complete: bool = False
    gentle: bool = False
    asked: float = 0.0
    overtaken: int = 0
    look: float = 0.0
    gone: int = 0


class Puller:
    """Blobs that are wanted, a few at a time. Mutable: owned by one core."""

    def __init__(self) -> None:
        self._pulls: dict[str, _Pull] = {}
        self._active: dict[str, None] = {}
        self._gentle_from = 0.0
        self._took_s = 0.0  # by a chunk, of late

    def want(
        self,
        digest: str,
        peer: str,
        now: float,
        nbytes: int | None = None,
        *,
        gentle: bool = False,
    ) -> list[Effect]:
        """``nbytes``: its size, if it is known; chunks of one of another size are dropped."""
        known = self._pulls.get(digest)
        if known is None:
            self._pulls[digest] = _Pull(peer, nbytes, gentle=gentle)
        else:
            known.peer, known.gentle = peer, known.gentle and gentle
        return self._fill(now)

    def arrived(
        self, peer: str, chunk: Chunk, data: memoryview, now: float, *, busy: bool = False
    ) -> list[Effect]:
        """Write the chunk that was asked for and ask for the next; anything else is dropped.

        ``busy``: there is other work, so what is gentle pauses longer than the chunk has taken.
        """
        pull = self._pulls.get(chunk.digest)
        if pull is None or pull.peer != peer or pull.complete or chunk.offset != pull.offset:
            return []
        if chunk.total > limits.MODEL_BYTES or not 0 <= len(data) <= chunk.total - chunk.offset:
            return []
        if pull.total not in (None, chunk.total) or (not data and chunk.total):
            return []
        self._took_s = max(now - pull.asked, 0.9 * self._took_s)
        pull.offset += len(data)
        pull.since = now
        effects: list[Effect] = [WriteBlob(chunk.digest, chunk.offset, chunk.total, data)]
        effects += self._overtakes(pull, now)
        pull.complete = pull.offset >= chunk.total
        if busy and pull.gentle:
            self._gentle_from = now + limits.GENTLE_PAUSE_TIMES * (now - pull.asked)
            self._active.pop(chunk.digest, None)
        if pull.complete:
            self._active.pop(chunk.digest, None)
        if chunk.digest not in self._active:
            return effects + self._fill(now)
        return [*effects, self._ask(chunk.digest, now)]

    def gone(self, peer: str, digest: str, now: float) -> list[Effect] | None:
        """A peer says that it has it not, or not for us. Asked once more: that may have been said
        of what was asked for another deployment, before. None: it is said again and again."""
        pull = self._pulls.get(digest)
        if pull is None or pull.peer != peer or digest not in self._active:
            return []
        pull.gone += 1
        if pull.gone >= limits.BLOB_GONE_TIMES:
            self.done(digest)
            return None
        return [self._ask(digest, now)]

    def _overtakes(self, came: _Pull, now: float) -> list[Effect]:
        """What was asked for before, of the same peer, may be lost."""
        effects: list[Effect] = []
        for digest in self._active:
            pull = self._pulls[digest]
            if pull.peer == came.peer and pull.asked < came.asked:
                pull.overtaken += 1
                if pull.overtaken >= _OVERTAKEN:
                    effects.append(self._ask(digest, now))
        return effects

    def done(self, digest: str) -> None:
        """The blob is stored, has failed, or is not wanted any more."""
        self._pulls.pop(digest, None)
        self._active.pop(digest, None)

    def forget_peer(self, peer: str) -> list[str]:
        """Give up what only this peer has; the digests that are lost."""
        gone = [d for d, p in self._pulls.items() if p.peer == peer and not p.complete]
        for digest in gone:
            self.done(digest)
        return gone

    def hasten(self, peer: str, now: float) -> None:
        """A peer's connection was cut: what was asked of it may be lost."""
        for digest in self._active:
            if self._pulls[digest].peer == peer:
                soon = now + limits.RESEND_AFTER_LOSS_S
                self._pulls[digest].due = min(self._pulls[digest].due, soon)

    def clear(self) -> None:
        self._pulls.clear()
        self._active.clear()

    def due(self, now: float) -> tuple[list[Effect], list[str]]:
        """Ask again for what is late; and the digests that never came. A peer that sends nothing at
        all may be behind a connection that carries no more messages, which is made anew then; or it
        was not heard, and is asked once more for what it owes the longest."""
        effects = self._renewals(now)
        failed = []
        for digest in list(self._active):
            pull = self._pulls[digest]
            if pull.due > now:
                continue
            if now - pull.since >= limits.ACK_TRIES * _PATIENCE_S:
                failed.append(digest)
                self.done(digest)
            else:
                effects.append(self._ask(digest, now))
        return effects + self._fill(now), failed

    def _renewals(self, now: float) -> list[Effect]:
        peers = {self._pulls[d].peer for d in self._active if self._pulls[d].look <= now}
        effects: list[Effect] = []
        for peer in sorted(peers):
            pulls = [p for p in map(self._pulls.__getitem__, self._active) if p.peer == peer]
            silent_s = self._silent_s()
            last = max(pull.since for pull in pulls)
            if now >= last + silent_s:
                last = now
                effects.append(Renew(peer))
                oldest = min(pulls, key=lambda pull: pull.since)
                if oldest.asked <= oldest.since:  # a slow link is not to carry it again and again
                    oldest.due = min(oldest.due, now + limits.RESEND_AFTER_LOSS_S)
            for pull in pulls:
                pull.look = last + silent_s
        return effects

    def _silent_s(self) -> float:
        """So long a peer that sends something may seem to send nothing."""
        return limits.ACK_TIMEOUT_S + 2 * self._took_s

    def __len__(self) -> int:
        return len(self._pulls)

    def next_deadline(self) -> float | None:
        """When ``due`` has something to do; what ``done`` made room for is asked for then, too."""
        if not self._pulls:
            return None
        times = [min(self._pulls[d].due, self._pulls[d].look) for d in self._active]
        waiting = self._next()
        if waiting is not None:
            times.append(self._gentle_from if self._pulls[waiting].gentle else 0.0)
        return min(times, default=None)

    def _next(self) -> str | None:
        """What to ask for next, if anything; of what is gentle there is one at a time."""
        if len(self._active) >= limits.PULLS_AT_ONCE:
            return None
        waiting = (d for d, p in self._pulls.items() if d not in self._active and not p.complete)
        gentle = None
        for digest in waiting:
            if not self._pulls[digest].gentle:
                return digest
            gentle = gentle or digest
        return None if any(self._pulls[d].gentle for d in self._active) else gentle

    def _fill(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        while (digest := self._next()) is not None:
            pull = self._pulls[digest]
            if pull.gentle and now < self._gentle_from:
                break
            self._active[digest] = None
            pull.since = now
            effects.append(self._ask(digest, now))
        return effects

    def _ask(self, digest: str, now: float) -> Send:
        pull = self._pulls[digest]
        pull.asked, pull.due, pull.overtaken = now, now + _PATIENCE_S, 0
        pull.look = now + self._silent_s()
        want = Want(digest=digest, offset=pull.offset, length=limits.BLOB_WANT_BYTES)
        return Send(Plane.BULK, pull.peer, want)
