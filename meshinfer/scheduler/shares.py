"""Room that senders share: each may take a part of it, and all together no more than there is; who
has the most gives way, its oldest first."""

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


def of_inputs(granted_bytes: int) -> Bounds:
    """Of inputs on a head, whose host grants so much: for each client what the coordinator lets be
    open, and what may be on its way besides; twice that in all, so that one who invents requests
    pushes nobody's out."""
    room = int(granted_bytes * limits.QUEUE_SHARE) if granted_bytes else limits.MESSAGE_BYTES
    each = min(room, limits.QUEUE_BYTES) + limits.CREDIT_BYTES
    return Bounds(each, limits.FED_REQUESTS, 2 * each, 2 * limits.FED_REQUESTS)


class Shares(Generic[Key]):
    """Mutable: owned by a device's core. The entry that came last always has room, as one message
    may always be under way. ``gone``: how many entries had to go."""

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

    def put(self, key: Key, peer: str, nbytes: int) -> list[Key]:
        """Which entries have to go for this one. All processes that a client's key may have are one
        sender."""
        self.pop(key)
        sender = names_of(peer)[1]
        self._of.setdefault(sender, OrderedDict())[key] = nbytes
        self._bytes[sender] = self._bytes.get(sender, 0) + nbytes
        self._sender[key] = sender
        bounds, gone = self._bounds, list[Key]()
        while self._is_over(sender) and (oldest := self._oldest(sender, key)) is not None:
            gone.append(oldest)
            self.pop(oldest)
        gone += self._shrink(key, self._bytes.__getitem__, self._total, bounds.bytes_in_all)
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
        self, new: Key, size: Callable[[str], int], total: Callable[[], int], most: int
    ) -> list[Key]:
        """Until all is within a bound, or nothing but the new entry is left."""
        gone: list[Key] = []
        while total() > most:
            others = (s for s in self._of if self._oldest(s, new) is not None)
            sender = max(others, key=lambda s: (size(s), s == self._sender[new]), default=None)
            oldest = None if sender is None else self._oldest(sender, new)
            if oldest is None:
                return gone
            gone.append(oldest)
            self.pop(oldest)
        return gone

    def _oldest(self, sender: str, but: Key) -> Key | None:
        return next((key for key in self._of[sender] if key != but), None)

    def _count(self, sender: str) -> int:
        return len(self._of[sender])

    def _total(self) -> int:
        return sum(self._bytes.values())
