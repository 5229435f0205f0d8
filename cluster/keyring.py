"""What a holder keeps of its membership: whom it trusts, and the pair that it is admitted with.

The coordinator's pair is in no keyring: its state folder alone has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from cluster.keys import (
    KeyPair,
    check_fields,
    generate_keypair,
    key_of,
    make_folder,
    pair_fields,
    pair_of,
    read_private,
    write_private,
)
from meshinfer import limits
from meshinfer.errors import AuthError, ConfigurationError
from meshinfer.protocol.token import ROLES, Role, client_name

log = structlog.get_logger(__name__)

_CLUSTER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_COORDINATOR_FILE: Final = "coordinator.json"
KEYRING_FILE: Final = "keyring.json"
_JOIN_HINT: Final = (
    "join with a token that is made on the coordinator's machine: `meshinfer token` for meshinfer "
    "worker, `meshinfer token --role client` for meshinfer join"
)


@dataclass(frozen=True, slots=True)
class Keyring:
    """One holder's membership: ``key`` is its own pair, which the coordinator of ``cluster``, known
    by ``coordinator_public``, admits under ``name`` (``token.client_name`` unless a device's).

    ``plaintext``: this cluster does without encryption, to measure what it costs; its keys then
    protect nothing. Only a keyring says so, never a peer.
    """

    cluster: str
    coordinator_public: str
    key: KeyPair
    role: Role
    name: str
    plaintext: bool = False


def check_cluster_name(cluster: str) -> str:
    """The name itself, or ConfigurationError: it must fit into an mDNS label and a file name."""
    if len(cluster) > limits.CLUSTER_NAME_CHARS or not _CLUSTER_NAME.fullmatch(cluster):
        raise ConfigurationError(
            f"{cluster!r} cannot be the name of a cluster",
            hint=f"use 1 to {limits.CLUSTER_NAME_CHARS} letters, digits, '-' or '_' "
            "with a letter or digit first",
        )
    return cluster


def new_keyring(cluster: str, *, plaintext: bool = False) -> tuple[Keyring, KeyPair]:
    """The keyring of a new cluster's first admin, and the coordinator's own pair."""
    own = generate_keypair()
    return _of_admin(check_cluster_name(cluster), own, generate_keypair(), plaintext), own


def write_keyring(path: Path | str, keyring: Keyring) -> None:
    """Write it so that only the owner can read it, and so that a crash leaves old or new."""
    write_private(
        Path(path),
        {
            "cluster": keyring.cluster,
            "coordinator_public": keyring.coordinator_public,
            "key": pair_fields(keyring.key),
            "role": keyring.role,
            "name": keyring.name,
            **_plain_fields(keyring.plaintext),
        },
    )


def read_keyring(path: Path | str) -> Keyring:
    """Read a keyring. AuthError: missing, damaged or readable by others.

    ConfigurationError: there, but cannot be opened.
    """
    path = Path(path)
    fields = read_private(path, "keyring", _JOIN_HINT)
    if "member" in fields:
        raise AuthError(
            f"{path} is of an older release, where all devices had one key", hint=_JOIN_HINT
        )
    expected = {"cluster", "coordinator_public", "key", "role", "name"}
    check_fields(path, _without_plain(fields), expected, _JOIN_HINT)
    for what in ("cluster", "name"):
        if not isinstance(fields[what], str):
            raise AuthError(f"the {what} in {path} is not text", hint=_JOIN_HINT)
    if fields["role"] not in ROLES:
        raise AuthError(f"the role in {path} is none of {', '.join(ROLES)}", hint=_JOIN_HINT)
    if not 0 < len(fields["name"]) <= limits.NAME_CHARS:
        raise AuthError(f"the name in {path} is empty or too long", hint=_JOIN_HINT)
    return Keyring(
        check_cluster_name(fields["cluster"]),
        key_of(path, "coordinator_public", fields["coordinator_public"], _JOIN_HINT),
        pair_of(path, "key", fields["key"], _JOIN_HINT),
        fields["role"],
        fields["name"],
        _is_plaintext(path, fields, _JOIN_HINT),
    )


def load_or_create_coordinator(
    state_dir: Path, cluster: str, *, plaintext: bool = False
) -> tuple[Keyring, KeyPair]:
    """The keyring of this host's admin, and the coordinator's own pair, the same over restarts.

    ``coordinator.json`` has both; ``keyring.json`` beside it is the admin's, and is written anew
    when it is missing or damaged. A folder of another cluster is refused, and so is one of an
    encrypted cluster for ``plaintext``, or the other way.
    """
    check_cluster_name(cluster)
    own_path, ring_path = state_dir / _COORDINATOR_FILE, state_dir / KEYRING_FILE
    lost_hint = f"restore it from a backup, or empty {state_dir} to start a new cluster"
    make_folder(state_dir)
    if not own_path.exists():
        if ring_path.exists():  # it speaks of a coordinator: never replaced by a stranger's
            raise AuthError(f"{ring_path} is there, but {own_path} is not", hint=lost_hint)
        ring, own = new_keyring(cluster, plaintext=plaintext)
        _write_coordinator(own_path, ring, own)
        write_keyring(ring_path, ring)
        log.info("cluster keys created", cluster=cluster, keyring=str(ring_path))
        return ring, own
    ring, own = _read_coordinator(own_path, lost_hint)
    if ring.cluster != cluster:
        raise ConfigurationError(
            f"{state_dir} belongs to the cluster {ring.cluster!r}, not {cluster!r}",
            hint=f"start with --cluster {ring.cluster}, or choose another state folder",
        )
    if ring.plaintext != plaintext:
        kinds = "encrypted", "without encryption"
        raise ConfigurationError(
            f"{state_dir} belongs to a cluster that is {kinds[not plaintext]}, "
            f"and this one is to be {kinds[plaintext]}",
            hint="its keys are not used for both: choose another --cluster or --state-dir",
        )
    try:
        intact = read_keyring(ring_path) == ring
    except AuthError:
        intact = False
    if not intact:
        log.warning("the admin's keyring was missing or damaged: written anew", path=str(ring_path))
        write_keyring(ring_path, ring)
    return ring, own


def _of_admin(cluster: str, own: KeyPair, key: KeyPair, plaintext: bool) -> Keyring:
    return Keyring(cluster, own.public, key, "admin", client_name(key.public), plaintext)


def _write_coordinator(path: Path, ring: Keyring, own: KeyPair) -> None:
    write_private(
        path,
        {
            "cluster": ring.cluster,
            "key": pair_fields(own),
            "admin": pair_fields(ring.key),
            **_plain_fields(ring.plaintext),
        },
    )


def _read_coordinator(path: Path, hint: str) -> tuple[Keyring, KeyPair]:
    fields = read_private(path, "coordinator's key", hint)
    renewed = "member" in fields and "admin" not in fields
    if renewed:
        # Of an older release: devices elsewhere have that pair, so it makes nobody an admin.
        fields["admin"] = pair_fields(generate_keypair())
        del fields["member"]
    check_fields(path, _without_plain(fields), {"cluster", "key", "admin"}, hint)
    if not isinstance(fields["cluster"], str):
        raise AuthError(f"the cluster in {path} is not text", hint=hint)
    own = pair_of(path, "key", fields["key"], hint)
    admin = pair_of(path, "admin", fields["admin"], hint)
    plaintext = _is_plaintext(path, fields, hint)
    ring = _of_admin(check_cluster_name(fields["cluster"]), own, admin, plaintext)
    if renewed:
        log.warning("each device now has a key of its own: let them join again, with a token")
        _write_coordinator(path, ring, own)
    return ring, own


def _plain_fields(plaintext: bool) -> dict[str, bool]:
    """Only where there is no encryption does a file speak of it."""
    return {"plaintext": True} if plaintext else {}


def _without_plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "plaintext"}


def _is_plaintext(path: Path, fields: dict[str, Any], hint: str) -> bool:
    if fields.get("plaintext", True) is not True:
        raise AuthError(f"plaintext in {path} is not true: leave it out instead", hint=hint)
    return "plaintext" in fields
