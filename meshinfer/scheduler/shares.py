"""Room that senders share: each may take a part of it, and all together no more than there is; who
has the most gives way, its oldest first; and so does one entry that is more than its part."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from meshinfer import limits
from meshinfer.scheduler.authority import names_of

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bytes and entries: of each sender, and of all."""

    bytes_each: int
    count_each: int
    bytes_in_all: int
    count_in_all: int


_CLIENT = "client-"
"""So begin the names of clients (``token.client_name``), and of no device."""


def of_inputs(granted_bytes: int) -> Bounds:
    """Of inputs on a head, whose host grants so much: for each client what the coordinator lets be
    open, and what may be on its way besides; twice that in all, so that one who invents requests
    pushes nobody's out, be it by many inputs or by a huge one."""
    room = int(granted_bytes * limits.QUEUE_SHARE) if granted_bytes else limits.MESSAGE_BYTES
    each = min(room, limits.QUEUE_BYTES) + limits.CREDIT_BYTES
    return Bounds(each, limits.FED_REQUESTS, 2 * each, 2 * limits.FED_REQUESTS)


def of_ahead(granted_bytes: int) -> Bounds:
    """Of all that waits for the coordinator's word on a device that is granted so much. However
    little that is, nothing honest waits for ever: once there is word, what had no room is sent
    again and taken up at once; and what is alone has room."""
    part = int(granted_bytes * limits.AHEAD_SHARE) if granted_bytes else limits.AHEAD_BYTES
    room = min(part, limits.AHEAD_BYTES)
    each = min(limits.AHEAD_BYTES_EACH, room // 2)
    return Bounds(each, limits.AHEAD_EACH, room, limits.AHEAD)


def _sender_of(peer: str) -> str:
    """All processes that a client's key may have are one sender; so are those of a device."""
    name, beginning = names_of(peer)
    return beginning if name.startswith(_CLIENT) else name


class Shares(Generic[Key]):
    """Mutable: owned by a device's core. The entry that came last has room, as one message may
    always be under way; unless it is more than its sender's part, and there is none beside what is
    there of others. ``gone``: how many entries had to go."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._of: dict[str, OrderedDict[Key, int]] = {}
        self._bytes: dict[str, int] = {}
        self._sender: dict[Key, str] = {}
        self.gone = 0

    def __len__(self) -> int:
        return len(self._sender)

    def __contains__(self, key: Key) -> bool:
        return key in self._sender

    def put(self, key: Key, peer: str, nbytes: int, *, due: bool = False) -> list[Key]:
        """Which entries have to go for this one; or it itself, where that is not ``due``."""
        self.pop(key)
        sender = _sender_of(peer)
        self._of.setdefault(sender, OrderedDict())[key] = nbytes
        self._bytes[sender] = self._bytes.get(sender, 0) + nbytes
        self._sender[key] = sender
        bounds, gone = self._bounds, list[Key]()
        while self._is_over(sender) and (oldest := self._oldest(sender, key)) is not None:
            gone.append(oldest)
            self.pop(oldest)
        most, may_go = bounds.bytes_in_all, not due and nbytes > bounds.bytes_each
        gone += self._shrink(key, self._bytes.__getitem__, self._total, most, may_go=may_go)
        if key in self:
            gone += self._shrink(key, self._count, self.__len__, bounds.count_in_all)
        self.gone += len(gone)
        return gone

    def pop(self, key: Key) -> None:
        """It is there no more, or may not go any more."""
        sender = self._sender.pop(key, None)
        if sender is None:
            return
        self._bytes[sender] -= self._of[sender].pop(key)
        if not self._of[sender]:
            del self._of[sender], self._bytes[sender]

    def clear(self) -> None:
        self._of.clear()
        self._bytes.clear()
        self._sender.clear()

    def _is_over(self, sender: str) -> bool:
        bounds = self._bounds
        many = self._count(sender) > bounds.count_each
        return many or self._bytes[sender] > bounds.bytes_each

    def _shrink(
        self,
        new: Key,
        size: Callable[[str], int],
        total: Callable[[], int],
        most: int,
        *,
        may_go: bool = False,
    ) -> list[Key]:
        """Until all is within a bound, or nothing but the new entry is left, unless it may go."""
        gone: list[Key] = []
        own = self._sender[new]
        while total() > most:
            others = [s for s in self._of if self._oldest(s, new) is not None]
            if not others:
                return gone
            among = self._of if may_go else others
            sender = max(among, key=lambda s: (size(s), s == own))
            oldest = self._oldest(sender, new)
            victim = new if oldest is None else oldest
            gone.append(victim)
            self.pop(victim)
            if victim == new:
                return gone
        return gone

    def _oldest(self, sender: str, but: Key) -> Key | None:
        return next((key for key in self._of[sender] if key != but), None)

    def _count(self, sender: str) -> int:
        return len(self._of[sender])

    def _total(self) -> int:
        return sum(self._bytes.values())
