"""How much is open, in requests and in bytes; what is refused for it, and when to come again.

Inputs of clients that are their own source and sink lie with them: only those count that the head
holds. The pace of answers, as measured, says how long a refused client should wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import prod

import numpy as np

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.heads import Heads
from meshinfer.scheduler.membership import Membership
from meshinfer.scheduler.request import Request


class Load:
    """Mutable: owned by the coordinator's core. ``open_`` is a view of the open requests."""

    def __init__(self, open_: Mapping[str, Request], members: Membership, heads: Heads) -> None:
        self._open = open_
        self._members, self._heads = members, heads
        self._answers: deque[float] = deque(maxlen=limits.PACE_ANSWERS)

    def answered(self, now: float) -> None:
        """A request was answered."""
        self._answers.append(now)

    def many(self) -> m.Failure | None:
        """Why nothing at all is accepted now."""
        if len(self._open) < limits.QUEUE_REQUESTS:
            return None
        return self._full(f"{len(self._open)} requests are open already")

    def large(self, message: m.Submit, client: str) -> m.Failure | None:
        """Why a request that could be served is not accepted for its size: now, or never."""
        if self._heads.stands(client):
            return None
        nbytes, room = nbytes_of(message), self._room
        if nbytes > room:
            return m.Failure(
                error="NotEnoughMemory",
                message=f"its inputs have {nbytes} bytes; the coordinator's host holds {room}",
                hint="submit from a device of the cluster, or give smaller inputs",
            )
        held = sum(r.nbytes for r in self._open.values() if not self._heads.stands(r.client))
        if not held or held + nbytes <= min(room, limits.QUEUE_BYTES):
            return None
        return self._full(f"{held} bytes of inputs wait already")

    def _full(self, what: str) -> m.Failure:
        return m.Failure(
            error="QueueFull",
            message=what,
            hint="wait for answers before submitting more: client.map does it",
            retry_after_s=self._retry_after_s(),
        )

    @property
    def _room(self) -> int:
        """Bytes of inputs that the head may hold: a part of what its host grants."""
        head = self._members.head
        granted = 0 if head is None else head.hello.facts.memory_bytes
        return int(granted * limits.QUEUE_SHARE) if granted else limits.MESSAGE_BYTES

    def _retry_after_s(self) -> float:
        """Until an eighth of what is open is answered, at the pace of the last answers."""
        if len(self._answers) < 2:
            return limits.RETRY_AFTER_S
        pace_s = (self._answers[-1] - self._answers[0]) / (len(self._answers) - 1)
        wanted = pace_s * max(1, len(self._open) // 8)
        return min(max(wanted, limits.RETRY_AFTER_LEAST_S), limits.RETRY_AFTER_MOST_S)


def nbytes_of(message: m.Submit) -> int:
    """Of a request's inputs, whose types are known to be ours."""
    return sum(prod(t.shape) * np.dtype(t.dtype).itemsize for t in message.inputs)
