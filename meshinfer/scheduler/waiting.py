"""Who waits to be approved, and whom an id means.

Strangers fill it: it is bounded, and who does not ask again is forgotten, but nobody pushes out who
was there before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.token import device_id
from meshinfer.scheduler.turned_away import ambiguous, nobody


@dataclass(slots=True)
class _Waiter:
    name: str
    since: float
    heard: float


class WaitingRoom:
    """Mutable: owned by the enrolment. By their keys; all of them are devices."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiter] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._waiting

    def asks(self, key: str, name: str, now: float) -> bool:
        """It asks, maybe again, maybe under another name; False if there is no room."""
        self._forget(now)
        waiter = self._waiting.get(key)
        if waiter is None:
            if len(self._waiting) >= limits.WAITING_KEYS:
                return False
            waiter = self._waiting[key] = _Waiter(name, now, now)
        waiter.name, waiter.heard = name, now
        return True

    def leave(self, key: str) -> None:
        self._waiting.pop(key, None)

    def names(self, now: float) -> dict[str, str]:
        """By their keys."""
        self._forget(now)
        return {key: waiter.name for key, waiter in self._waiting.items()}

    def listed(self, now: float) -> tuple[m.Waiting, ...]:
        self._forget(now)
        return tuple(
            m.Waiting(id=device_id(key), name=w.name, role="worker", waits_s=now - w.since)
            for key, w in self._waiting.items()
        )

    def _forget(self, now: float) -> None:
        for key, waiter in list(self._waiting.items()):
            if now - waiter.heard > limits.WAITS_S:
                del self._waiting[key]


def one_of(id_: str, keys: Iterable[str]) -> str | m.Failure:
    """The only key with this id, or whose id begins so; or why that is nobody."""
    wanted = plain(id_)
    if len(wanted) < limits.ID_CHARS_LEAST:
        return nobody(id_, short=True)
    found = [key for key in keys if plain(device_id(key)).startswith(wanted)]
    if len(found) > 1:
        return ambiguous(id_, map(device_id, found))
    return found[0] if found else nobody(id_)


def plain(id_: str) -> str:
    return id_.strip().lower().replace("-", "")
