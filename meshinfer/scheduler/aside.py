"""Messages of attempts that the coordinator has not told of here: kept aside, within bounds, until
it does. Nothing else comes of them before, since any member may invent an attempt.

They are not acknowledged: what has to go, or waits for too long, is sent again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Effect, Note
from meshinfer.scheduler.shares import Shares

Word = TypeVar("Word", m.Deliver, m.Sample)
AheadKey = tuple["Aside[Any]", str, int]
"""Of an entry in the room that all that waits on a device shares: where it is kept, its peer and
its number."""


@dataclass(frozen=True, slots=True)
class Early(Generic[Word]):
    """A message that came before word of its attempt."""

    peer: str
    message: Word
    payload: memoryview
    since: float


class Aside(Generic[Word]):
    """Mutable: owned by a device's core. ``shares``: the room, of this and of others."""

    def __init__(self, shares: Shares[AheadKey]) -> None:
        self._shares = shares
        self._kept: dict[str, dict[AheadKey, Early[Word]]] = {}
        self._request: dict[AheadKey, str] = {}

    def __len__(self) -> int:
        return len(self._request)

    def put(self, peer: str, message: Word, payload: memoryview, now: float) -> list[Effect]:
        """Keep one, if there is room; of what has to go for it, some is told of."""
        key = (self, peer, message.id)
        self._pop(key)
        self._request[key] = message.request
        self._kept.setdefault(message.request, {})[key] = Early(peer, message, payload, now)
        before = self._shares.gone
        for gone in self._shares.put(key, peer, len(payload)):
            gone[0]._pop(gone)
        return noted(before, self._shares.gone, {"request": message.request, "peer": peer})

    def take(self, request: str) -> list[Early[Word]]:
        """All that is kept of a request, in the order in which it came."""
        found = list(self._kept.get(request, {}).items())
        for key, _ in found:
            self._pop(key)
        return [early for _, early in found]

    def expire(self, now: float) -> None:
        """What waits for too long goes: its attempt is over, or never was."""
        for key, request in list(self._request.items()) if self._request else ():
            if now - self._kept[request][key].since <= limits.AHEAD_S:
                return  # nor any that came later
            self._pop(key)

    def clear(self) -> None:
        for key in list(self._request):
            self._pop(key)

    def _pop(self, key: AheadKey) -> None:
        request = self._request.pop(key, None)
        if request is None:
            return
        self._shares.pop(key)
        del self._kept[request][key]
        if not self._kept[request]:
            del self._kept[request]


def noted(before: int, gone: int, fields: dict[str, object]) -> list[Effect]:
    """Say how much had to go, whenever that has doubled: who sends it shall not fill the log."""
    if gone.bit_length() == before.bit_length():
        return []
    text = "what came of requests that nobody has told of had to go"
    return [Note("warning", text, {**fields, "in_all": gone})]
