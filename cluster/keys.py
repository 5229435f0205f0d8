"""A CURVE key pair, and the files that hold one: whole or not there, and only their owner's."""

from __future__ import annotations

import json
import os
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zmq
from zmq.utils import z85

from meshinfer import limits
from meshinfer.errors import AuthError, ConfigurationError

_KEY_CHARS: Final = 40  # Z85 of 32 bytes


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, both halves Z85 text of 40 characters."""

    public: str
    secret: str = field(repr=False)


def generate_keypair() -> KeyPair:
    """A fresh pair from libsodium's random source."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode("ascii"), secret.decode("ascii"))


def make_folder(state_dir: Path) -> None:
    """A state folder that only its owner looks into, unless it is there. ``ConfigurationError``."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot create the state folder {state_dir}: {error.strerror}",
            hint="choose another state folder, or fix its permissions",
        ) from error


def is_key(text: object) -> bool:
    """Whether this is the Z85 form of 32 bytes."""
    if not isinstance(text, str) or len(text) != _KEY_CHARS or not text.isascii():
        return False
    try:
        return z85.encode(z85.decode(text)) == text.encode("ascii")
    except Exception:  # z85 raises KeyError, struct.error or ValueError, by the kind of damage
        return False


def write_private(path: Path, fields: dict[str, Any]) -> None:
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


def read_private(path: Path, what: str, hint: str) -> dict[str, Any]:
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


def check_fields(path: Path, fields: dict[str, Any], expected: set[str], hint: str) -> None:
    if set(fields) - {"plaintext"} != expected:
        raise AuthError(
            f"{path} must have exactly the fields {', '.join(sorted(expected))}", hint=hint
        )


def key_of(path: Path, name: str, value: object, hint: str) -> str:
    if not is_key(value):  # the value may be a secret: it is not repeated
        raise AuthError(f"{name} in {path} is not a key of {_KEY_CHARS} Z85 characters", hint=hint)
    return str(value)


def pair_fields(pair: KeyPair) -> dict[str, str]:
    return {"public": pair.public, "secret": pair.secret}


def pair_of(path: Path, name: str, value: object, hint: str) -> KeyPair:
    if not isinstance(value, dict) or set(value) != {"public", "secret"}:
        raise AuthError(f"{name} in {path} is not a pair of public and secret", hint=hint)
    public = key_of(path, f"{name}.public", value["public"], hint)
    secret = key_of(path, f"{name}.secret", value["secret"], hint)
    if zmq.curve_public(secret.encode("ascii")) != public.encode("ascii"):
        raise AuthError(f"the halves of {name} in {path} do not fit together", hint=hint)
    return KeyPair(public, secret)
