"""Keys, and who may connect: a peer without an admitted key gets no session, ever.

Every socket that binds is a CURVE server with a key of its own, every socket that connects is a
CURVE client with the cluster's *member* key. The keyring holds what a device needs to join: the
member pair and the coordinator's public key. (Tokens and approval of single devices come later.)
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog
import zmq
from zmq.utils import z85

from meshinfer import limits
from meshinfer.errors import AuthError, ConfigurationError

log = structlog.get_logger(__name__)

_KEY_CHARS: Final = 40  # Z85 of 32 bytes
_CLUSTER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_COORDINATOR_FILE: Final = "coordinator.json"
_KEYRING_FILE: Final = "keyring.json"
_COPY_HINT: Final = (
    "start meshinfer coordinator, or copy keyring.json from the state folder of the one that runs"
)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, both halves Z85 text of 40 characters."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Keyring:
    """All that a device needs to join: whom to trust, and the key that admits it.

    ``plaintext``: this cluster does without encryption, to measure what it costs; its keys then
    protect nothing. Only a keyring says so, never a peer.
    """

    cluster: str
    coordinator_public: str
    member: KeyPair
    plaintext: bool = False


def generate_keypair() -> KeyPair:
    """A fresh pair from libsodium's random source."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode("ascii"), secret.decode("ascii"))


def is_key(text: object) -> bool:
    """Whether this is the Z85 form of 32 bytes."""
    if not isinstance(text, str) or len(text) != _KEY_CHARS or not text.isascii():
        return False
    try:
        return z85.encode(z85.decode(text)) == text.encode("ascii")
    except Exception:  # z85 raises KeyError, struct.error or ValueError, by the kind of damage
        return False


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
    """A new cluster's keyring, and the coordinator's own pair (which is in no keyring)."""
    coordinator = generate_keypair()
    ring = Keyring(check_cluster_name(cluster), coordinator.public, generate_keypair(), plaintext)
    return ring, coordinator


def write_keyring(path: Path | str, keyring: Keyring) -> None:
    """Write it so that only the owner can read it, and so that a crash leaves old or new."""
    _write_private(
        Path(path),
        {
            "cluster": keyring.cluster,
            "coordinator_public": keyring.coordinator_public,
            "member": _pair_fields(keyring.member),
            **_plain_fields(keyring.plaintext),
        },
    )


def read_keyring(path: Path | str) -> Keyring:
    """Read a keyring. AuthError: missing, damaged or readable by others.

    ConfigurationError: there, but cannot be opened.
    """
    path = Path(path)
    fields = _read_private(path, "keyring", _COPY_HINT)
    _check_fields(path, fields, {"cluster", "coordinator_public", "member"}, _COPY_HINT)
    if not isinstance(fields["cluster"], str):
        raise AuthError(f"the cluster in {path} is not text", hint=_COPY_HINT)
    return Keyring(
        check_cluster_name(fields["cluster"]),
        _key_of(path, "coordinator_public", fields["coordinator_public"], _COPY_HINT),
        _pair_of(path, "member", fields["member"], _COPY_HINT),
        _is_plaintext(path, fields, _COPY_HINT),
    )


def load_or_create_coordinator(
    state_dir: Path, cluster: str, *, plaintext: bool = False
) -> tuple[Keyring, KeyPair]:
    """The coordinator's identity, the same over restarts, and the keyring file to share.

    ``coordinator.json`` has everything and stays there; ``keyring.json`` beside it is what devices
    get, and is written anew when it is missing or damaged. A folder of another cluster is refused,
    and so is one of an encrypted cluster for ``plaintext``, or the other way.
    """
    check_cluster_name(cluster)
    own_path, ring_path = state_dir / _COORDINATOR_FILE, state_dir / _KEYRING_FILE
    lost_hint = f"restore it from a backup, or empty {state_dir} to start a new cluster"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot create the state folder {state_dir}: {error.strerror}",
            hint="choose another state folder, or fix its permissions",
        ) from error
    if not own_path.exists():
        if ring_path.exists():  # it admits devices somewhere: never replaced by a stranger's
            raise AuthError(f"{ring_path} is there, but {own_path} is not", hint=lost_hint)
        ring, own = new_keyring(cluster, plaintext=plaintext)
        _write_private(
            own_path,
            {
                "cluster": cluster,
                "key": _pair_fields(own),
                "member": _pair_fields(ring.member),
                **_plain_fields(plaintext),
            },
        )
        write_keyring(ring_path, ring)
        log.info("cluster keys created", cluster=cluster, keyring=str(ring_path))
        return ring, own
    fields = _read_private(own_path, "coordinator's key", lost_hint)
    _check_fields(own_path, fields, {"cluster", "key", "member"}, lost_hint)
    if fields["cluster"] != cluster:
        raise ConfigurationError(
            f"{state_dir} belongs to the cluster {fields['cluster']!r}, not {cluster!r}",
            hint=f"start with --cluster {fields['cluster']}, or choose another state folder",
        )
    if _is_plaintext(own_path, fields, lost_hint) != plaintext:
        kinds = "encrypted", "without encryption"
        raise ConfigurationError(
            f"{state_dir} belongs to a cluster that is {kinds[not plaintext]}, "
            f"and this one is to be {kinds[plaintext]}",
            hint="its keys are not used for both: choose another --cluster or --state-dir",
        )
    own = _pair_of(own_path, "key", fields["key"], lost_hint)
    member = _pair_of(own_path, "member", fields["member"], lost_hint)
    ring = Keyring(cluster, own.public, member, plaintext)
    try:
        intact = read_keyring(ring_path) == ring
    except AuthError:
        intact = False
    if not intact:
        log.warning(
            "the keyring to share was missing or damaged: written anew", path=str(ring_path)
        )
        write_keyring(ring_path, ring)
    return ring, own


# --- private files --------------------------------------------------------------------------


def _write_private(path: Path, fields: dict[str, Any]) -> None:
    """JSON with mode 0600, complete or not there at all (temporary file, fsync, rename)."""
    text = json.dumps(fields, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                os.fchmod(file.fileno(), 0o600)  # whatever the umask says
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename itself durable
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {path}: {error.strerror}",
            hint="check the folder's permissions and free space",
        ) from error


def _read_private(path: Path, what: str, hint: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            # The permissions of the open file, not of the path: nobody can swap it in between.
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise AuthError(
                    f"{path} can be read or written by other users (mode {mode & 0o777:03o})",
                    hint=f"chmod 600 {path}",
                )
            data = file.read(limits.KEY_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise AuthError(f"there is no {what} at {path}", hint=hint) from error
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}", hint="check its permissions and owner"
        ) from error
    if len(data) > limits.KEY_FILE_BYTES:
        raise AuthError(f"{path} is too large to be a {what}", hint=hint)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AuthError(f"{path} is not JSON", hint=hint) from error
    if not isinstance(fields, dict):
        raise AuthError(f"{path} is not a JSON object", hint=hint)
    return fields


def _check_fields(path: Path, fields: dict[str, Any], expected: set[str], hint: str) -> None:
    if set(fields) - {"plaintext"} != expected:
        raise AuthError(
            f"{path} must have exactly the fields {', '.join(sorted(expected))}", hint=hint
        )


def _key_of(path: Path, name: str, value: object, hint: str) -> str:
    if not is_key(value):  # the value may be a secret: it is not repeated
        raise AuthError(f"{name} in {path} is not a key of {_KEY_CHARS} Z85 characters", hint=hint)
    return str(value)


def _plain_fields(plaintext: bool) -> dict[str, bool]:
    """Only where there is no encryption does a file speak of it."""
    return {"plaintext": True} if plaintext else {}


def _is_plaintext(path: Path, fields: dict[str, Any], hint: str) -> bool:
    if fields.get("plaintext", True) is not True:
        raise AuthError(f"plaintext in {path} is not true: leave it out instead", hint=hint)
    return "plaintext" in fields


def _pair_fields(pair: KeyPair) -> dict[str, str]:
    return {"public": pair.public, "secret": pair.secret}


def _pair_of(path: Path, name: str, value: object, hint: str) -> KeyPair:
    if not isinstance(value, dict) or set(value) != {"public", "secret"}:
        raise AuthError(f"{name} in {path} is not a pair of public and secret", hint=hint)
    public = _key_of(path, f"{name}.public", value["public"], hint)
    secret = _key_of(path, f"{name}.secret", value["secret"], hint)
    if zmq.curve_public(secret.encode("ascii")) != public.encode("ascii"):
        raise AuthError(f"the halves of {name} in {path} do not fit together", hint=hint)
    return KeyPair(public, secret)


# --- the gate -------------------------------------------------------------------------------


class Gatekeeper:
    """Answers libzmq's ZAP requests of one context, in a thread: which keys may connect.

    libzmq asks on every new connection, by inproc. Servers set ZAP_ENFORCE_DOMAIN, so when this
    thread is gone, nobody is admitted. Connections that exist are not asked about again: the
    transport drops what a revoked key still sends. ``allow`` and ``revoke`` work from any thread.
    """

    DOMAIN: Final = "meshinfer"
    _ADDRESS: Final = "inproc://zeromq.zap.01"

    def __init__(self, context: zmq.Context[Any], allowed: Iterable[str]) -> None:
        self._allowed = frozenset(allowed)  # replaced as a whole, never changed
        self._change = threading.Lock()
        # libzmq asks as a REQ would; ROUTER, unlike REP, stays usable after a bad request.
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        try:
            self._socket.bind(self._ADDRESS)
        except zmq.ZMQError:
            self._socket.close()
            raise
        self._stop_send, self._stop_receive = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="gatekeeper", daemon=True)
        self._thread.start()

    def allow(self, public: str) -> None:
        """Admit this key from the next connection on."""
        with self._change:
            self._allowed |= {public}

    def revoke(self, public: str) -> None:
        """Refuse this key from the next connection on."""
        with self._change:
            self._allowed -= {public}

    def is_allowed(self, public: str) -> bool:
        """Whether this key is admitted now."""
        return public in self._allowed

    def stop(self) -> None:
        """End the thread and close its socket; from then on every connection is refused."""
        if self._stop_send.fileno() < 0:
            return
        self._stop_send.close()
        self._thread.join(timeout=5.0)
        self._stop_receive.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_receive, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._stop_receive.fileno() in ready:
                    return
                if self._socket in ready:
                    self._answer_one()
        except zmq.ContextTerminated:
            pass
        except Exception as error:
            log.error("the gatekeeper died; every connection is refused now", error=repr(error))
        finally:
            self._socket.close()

    def _answer_one(self) -> None:
        request = self._socket.recv_multipart()
        try:
            public = self._judge(request)
        except Exception as error:  # a bug here must refuse this one, not stop the gate
            # No traceback: console renderers add local variables, slowly, and the peer waits.
            log.error("a connection was refused because judging it failed", error=repr(error))
            public = None
        if len(request) < 4:
            return  # nothing to answer to; the handshake times out, which is a refusal
        # Envelope and request id are repeated; the user id is the key, for the transport to check.
        verdict = (b"200", b"OK", public.encode()) if public else (b"400", b"key not admitted", b"")
        self._socket.send_multipart([request[0], b"", b"1.0", request[3], *verdict, b""])

    def _judge(self, request: list[bytes]) -> str | None:
        """The caller's public key if it may connect. Request: ZeroMQ RFC 27, after the envelope."""
        if len(request) != 9:
            return None
        _route, empty, version, _id, domain, _address, _identity, mechanism, key = request
        if (empty, version, mechanism) != (b"", b"1.0", b"CURVE"):
            return None
        if domain != self.DOMAIN.encode() or len(key) != 32:
            return None
        public = z85.encode(key).decode("ascii")
        return public if public in self._allowed else None
