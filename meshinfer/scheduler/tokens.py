"""The tokens that were made: by their hashes, what each is good for, and until when.

Times are the core's. A token that is spent or has expired is kept as long as there is room, so
that it stays spent, should the same be made again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshinfer import limits
from meshinfer.protocol.token import Role
from meshinfer.scheduler.ledger import TokenMade


@dataclass(slots=True)
class _Token:
    role: Role
    expires: float
    reusable: bool
    maker: str
    void: bool
    used: bool = False

    def good(self, now: float) -> bool:
        return not self.void and not self.used and now < self.expires


class Tokens:
    """Mutable: owned by the enrolment. Bounded by ``limits.TOKENS``."""

    def __init__(self) -> None:
        self._tokens: dict[str, _Token] = {}

    def restore(self, entries: Iterable[TokenMade], now: float) -> None:
        """What the ledger has; of each its time remains."""
        for entry in entries:
            self._put(entry, now)

    def __contains__(self, hash_: str) -> bool:
        return hash_ in self._tokens

    def room(self, now: float) -> str | None:
        """Which token a new one takes the place of, empty if of none; None if there is no room."""
        if len(self._tokens) < limits.TOKENS:
            return ""
        return next((h for h, token in self._tokens.items() if not token.good(now)), None)

    def add(self, entry: TokenMade, now: float) -> None:
        self._tokens.pop(entry.instead_of, None)
        self._put(entry, now)

    def remove(self, hash_: str) -> None:
        self._tokens.pop(hash_, None)

    def _put(self, entry: TokenMade, now: float) -> None:
        expires = now + entry.ttl_s
        maker, spent = entry.maker, entry.spent
        self._tokens[entry.hash] = _Token(entry.role, expires, entry.reusable, maker, spent)

    def role_of(self, hash_: str, now: float) -> Role | None:
        """For what a token is good now; None if it is wrong, has expired or is spent."""
        token = self._tokens.get(hash_)
        return None if token is None or not token.good(now) else token.role

    def use(self, hash_: str) -> None:
        """Somebody is admitted by it: unless it is reusable, nobody else will be."""
        token = self._tokens[hash_]
        token.used = not token.reusable

    def unuse(self, hash_: str) -> None:
        """That could not be written down, and so is not so."""
        if hash_ in self._tokens:
            self._tokens[hash_].used = False

    def void(self, hash_: str, maker: str) -> None:
        """A key is expelled: what let it in lets nobody in, nor what it has made."""
        for name, token in self._tokens.items():
            if name == hash_ or token.maker == maker:
                token.void = True
