"""Makes tokens, and keeps the one that a worker is to join with in a private file of its own.

It is not handed over as an argument: those of a process are everybody's to read.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final

from cluster.discovery import interface_addresses
from cluster.keyring import Keyring
from cluster.keys import check_fields, read_private, write_private
from meshinfer import limits
from meshinfer.errors import AuthError
from meshinfer.protocol.token import SECRET_BYTES, Role, Token, hash_of, parse_token
from meshinfer.scheduler.ledger import TokenMade

TOKEN_FILE: Final = "token"  # noqa: S105 (its name)
_HINT: Final = "remove it, and give the token again"
_PLACES: Final = 4
FOR_EVER_S: Final = 1e9


def new_secret() -> bytes:
    """Of a token, that means nothing until the coordinator knows its hash."""
    return secrets.token_bytes(SECRET_BYTES)


def given(
    secret: bytes, role: Role, *, ttl_s: float = limits.TOKEN_S, reusable: bool = False
) -> TokenMade:
    """What the coordinator has to know of a token."""
    return TokenMade(hash_of(secret), role, ttl_s, reusable)


def token_for(ring: Keyring, role: Role, secret: bytes, places: tuple[str, ...]) -> Token:
    """Of the cluster of this keyring."""
    coordinator = "" if ring.plaintext else ring.coordinator_public
    return Token(ring.cluster, role, coordinator, secret, places)


def places_of(host: str, join_port: int) -> tuple[str, ...]:
    """Where a join socket of this machine is reached; ``host`` is empty: at all its addresses."""
    hosts = [host] if host else interface_addresses()
    return tuple(f"{each}:{join_port}" for each in hosts[:_PLACES])


def leave_token(state_dir: Path, token: Token) -> None:
    """For the worker that will start in this folder."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(state_dir / TOKEN_FILE, {"token": str(token)})


def left_token(state_dir: Path) -> Token | None:
    """What ``leave_token`` left, if it did."""
    path = state_dir / TOKEN_FILE
    if not path.exists():
        return None
    fields = read_private(path, "token", _HINT)
    check_fields(path, fields, {"token"}, _HINT)
    if not isinstance(fields["token"], str):
        raise AuthError(f"the token in {path} is not text", hint=_HINT)
    return parse_token(fields["token"])


def forget_token(state_dir: Path) -> None:
    """It has served."""
    with suppress(FileNotFoundError):
        (state_dir / TOKEN_FILE).unlink()
