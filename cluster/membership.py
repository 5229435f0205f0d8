"""What workers and users keep of their membership: a keyring, and where the coordinator was.

A worker's is in its state folder, a user's in one of the user's own. Who has none yet joins.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog

from cluster.config import default_keyring, user_state
from cluster.identity import own_identity
from cluster.joining import TokenVoid, Wish, enrol
from cluster.keyring import KEYRING_FILE, Keyring, read_keyring, write_keyring
from cluster.keys import KeyPair
from cluster.locate import NOT_FOUND_HINT, VARIABLE, Where, find_coordinator, parse_address
from cluster.tokens import forget_token, left_token
from meshinfer.errors import AuthError, ClusterUnavailable, ConfigurationError, InvalidInput
from meshinfer.protocol.token import Token, client_name, parse_token

TOKEN_VARIABLE: Final = "MESHINFER_TOKEN"  # noqa: S105 (its name)
_PLACE_FILE: Final = "place.json"
_MAKE_HINT: Final = "have one made by `meshinfer token` at the coordinator"


# --- workers


def worker_keyring(
    state: Path,
    name: str,
    cluster: str,
    *,
    coordinator: str | None = None,
    coordinator_id: str = "",
    interfaces: Sequence[str] | None = None,
    proxy: str = "",
) -> tuple[Keyring, Where | None]:
    """The keyring of a worker with this state folder, and where the coordinator was last if that
    is known: what it has, or what it gets by joining, for which it waits as long as it takes.

    A token that can never let it in is forgotten, and told so once by an ``AuthError``."""
    token, ring = left_token(state), kept_keyring(state)
    known = ring is not None and (ring.cluster, ring.name) == (cluster, name)
    if token is None and ring is not None and known:
        return ring, _remembered(state)
    if token is not None and token.cluster != cluster:
        raise ConfigurationError(
            f"the token is for the cluster {token.cluster!r}, not {cluster!r}",
            hint=f"start it with --cluster {token.cluster}",
        )
    if token is not None and token.role != "worker":
        error = AuthError(f"the token is for a {token.role}, not for a worker", hint=_MAKE_HINT)
        raise _without_it(state, error, known=known)
    address = coordinator or os.environ.get(VARIABLE)
    wish = Wish(
        cluster=cluster,
        role="worker",
        name=name,
        coordinator=None if token is None else token.coordinator,
        secret=b"" if token is None else token.secret,
        places=_beside(address) if token is None else (*token.places, *_beside(address)),
        coordinator_id=coordinator_id,
        interfaces=interfaces,
        proxy=proxy,
    )
    try:
        ring, where = enrol(own_identity(state), wish)
    except TokenVoid as error:
        raise _without_it(state, error, known=known) from error
    _keep(state / KEYRING_FILE, ring, where)
    forget_token(state)
    structlog.get_logger().info(
        "admitted; from now on it needs no token", cluster=ring.cluster, coordinator=str(where)
    )
    return ring, where


def _without_it(state: Path, error: AuthError, *, known: bool) -> AuthError:
    """Forget a token that is refused for good, or each start would end by it; what to say."""
    forget_token(state)
    then = "goes on with the key that was let in before" if known else "waits to be approved"
    return AuthError(
        f"{error.message}; it is forgotten here",
        hint=f"{error.hint}, and give it with --token; a start without one {then}",
    )


def kept_keyring(state: Path) -> Keyring | None:
    """What a worker with this state folder has joined, if it has."""
    return _kept(state / KEYRING_FILE, own_identity(state))


def _kept(path: Path, key: KeyPair) -> Keyring | None:
    """The keyring there, if it is of this key: one that came with a copied folder is not."""
    if not path.exists():
        return None
    ring = read_keyring(path)
    return ring if ring.key == key else None


def _keep(path: Path, ring: Keyring, where: Where) -> None:
    write_keyring(path, ring)
    with suppress(OSError):  # only a hint, for where mDNS is silent
        path.with_name(_PLACE_FILE).write_bytes(msgspec.json.encode(where))


def _remembered(folder: Path) -> Where | None:
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((folder / _PLACE_FILE).read_bytes(), type=Where)
    return None


def _beside(address: str | None) -> tuple[str, ...]:
    """A join socket is at the port after the coordinator's, unless it was given another."""
    if not address:
        return ()
    host, port = parse_address(address)
    return (f"{host}:{port + 1}",) if port < 65535 else ()


# --- clients and admins elsewhere


def join_as_user(
    token: Token,
    path: Path | None,
    *,
    address: str | None = None,
    interfaces: Sequence[str] | None = None,
    timeout_s: float,
) -> tuple[Keyring, Path]:
    """Have this user's own key admitted, and write the keyring; both."""
    if token.role == "worker":
        raise AuthError(
            "the token is for a worker",
            hint="use it with meshinfer worker --token; for this, meshinfer token --role client",
        )
    folder = user_state(token.cluster)
    key = own_identity(folder)
    path = path or folder / KEYRING_FILE
    if path.exists() and _kept(path, key) is None:
        raise InvalidInput(
            f"{path} is another's keyring: it is not written over",
            hint="give --keyring another path, or move that one away",
        )
    address = address or os.environ.get(VARIABLE)
    wish = Wish(
        cluster=token.cluster,
        role=token.role,
        name=client_name(key.public),
        coordinator=token.coordinator,
        secret=token.secret,
        places=(*token.places, *_beside(address)),
        interfaces=interfaces,
        patience_s=timeout_s,
    )
    ring, where = enrol(key, wish)
    _keep(path, ring, where)
    return ring, path


def find_as_client(
    keyring: Path | None,
    cluster: str,
    token: str | None,
    *,
    address: str | None,
    interfaces: Sequence[str] | None,
    timeout_s: float,
) -> tuple[Keyring, tuple[str, int]]:
    """A client's keyring, and where its coordinator is.

    It is that of the token, which it joins with unless it has; else the file given, else the one
    of this machine's coordinator, or this user's. Raises ``AuthError``, ``ClusterUnavailable``.
    """
    path = keyring or default_keyring(cluster)
    token = token or (None if path.exists() else os.environ.get(TOKEN_VARIABLE))
    if token is None:
        ring = read_keyring(path)
    else:
        ring, path = _of_token(parse_token(token), keyring, address, interfaces, timeout_s)
    found = find_coordinator(
        address,
        ring.cluster,
        timeout_s=timeout_s,
        key=None if ring.plaintext else ring.coordinator_public,
        interfaces=interfaces,
        last=_remembered(path.parent),
    )
    if found is None:
        raise ClusterUnavailable(
            f"no coordinator of cluster {ring.cluster!r} was found over mDNS",
            hint=NOT_FOUND_HINT,
        )
    return ring, found


def _of_token(
    token: Token,
    path: Path | None,
    address: str | None,
    interfaces: Sequence[str] | None,
    timeout_s: float,
) -> tuple[Keyring, Path]:
    folder = user_state(token.cluster)
    known = path or folder / KEYRING_FILE
    kept = _kept(known, own_identity(folder))
    same = kept is not None and token.coordinator in ("", kept.coordinator_public)
    if kept is not None and same and kept.role == token.role:
        return kept, known
    return join_as_user(token, path, address=address, interfaces=interfaces, timeout_s=timeout_s)
