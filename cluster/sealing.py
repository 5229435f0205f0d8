"""Blobs at rest on a worker, encrypted: of use only with a key that is not on the same medium.

It is for the memory card that is stolen or thrown away. The key is in memory only, so that what an
earlier process has stored is of no use to anybody, or in a file that the user keeps elsewhere
(another medium; systemd's LoadCredential). It does not help against who can read the memory of the
running worker, which computes with the weights.

Each piece of a file is sealed by ChaCha20-Poly1305, which is fast without AES instructions as well,
with a random nonce, and bound to the blob and to its place there. onnxruntime loads from files, so
what is loaded lies unsealed in a file system in memory meanwhile, and its optimised weights for as
long as they are used: the kernel can swap them, but not drop and read them again as otherwise. Swap
on the card has to be off, or in memory (zram).
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from cluster.blobs import BlobStore
from meshinfer import limits
from meshinfer.errors import AuthError, ConfigurationError

if TYPE_CHECKING:
    from meshinfer.protocol.codec import Buffer

_MAGIC = b"meshinfer sealed 1\n"
_LENGTH = struct.Struct("<I")
_NONCE_BYTES, _TAG_BYTES = 12, 16
_DIGEST_CHARS = 64
_KEY_BYTES = (32, 4096)
"""A key file's, least and most: what is in it is stretched to a key."""
_IN_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mounts")


class Sealed:
    """Files under a key. A piece is its length, a nonce, and its bytes with their tag."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        self._cipher = ChaCha20Poly1305(key)

    def append(self, path: Path, offset: int, data: memoryview) -> None:
        """Write what comes next; at 0, begin anew. One out of its order is found when read."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, bytes(data), _place(path, offset))
        with path.open("ab" if offset else "wb") as file:
            if not offset:
                file.write(_MAGIC)
            file.write(_LENGTH.pack(len(data)) + nonce + sealed)

    def blocks(self, path: Path) -> Iterator[bytes]:
        """What was written, piece by piece. Raises ``OSError`` where it was not written with this
        key, for this blob, and in this order."""
        from cryptography.exceptions import InvalidTag

        offset = 0
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise _broken(path)
            while head := file.read(_LENGTH.size):
                size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else -1
                if not 0 <= size <= limits.BLOB_CHUNK_BYTES:
                    raise _broken(path)
                nonce, sealed = file.read(_NONCE_BYTES), file.read(size + _TAG_BYTES)
                try:
                    block = self._cipher.decrypt(nonce, sealed, _place(path, offset))
                except (InvalidTag, ValueError) as error:  # ValueError: it ends too soon
                    raise _broken(path) from error
                offset += len(block)
                yield block


def _place(path: Path, offset: int) -> bytes:
    """Which piece of which blob: its file may have more to its name while it is written."""
    return f"{path.name[:_DIGEST_CHARS]} {offset}".encode()


def _broken(path: Path) -> OSError:
    return OSError(errno.EBADMSG, "not sealed with this key, or damaged", str(path))


class SealedStore(BlobStore):
    """Blobs sealed on the disk, and in ``loading``, a folder in memory, while they are loaded."""

    def __init__(self, folder: Path, key: bytes, loading: Path) -> None:
        super().__init__(folder, sole=True, files=Sealed(key))
        self.loading = loading

    @contextmanager
    def opened(self, digests: Iterable[str]) -> Iterator[None]:
        """As ``BlobStore.opened``; what is written there is verified as it is."""
        written: list[Path] = []
        try:
            for digest in digests:
                path = self.loading / digest
                written.append(path)
                self._unseal(digest, path)
            yield
        finally:
            for path in written:
                path.unlink(missing_ok=True)

    def _unseal(self, digest: str, path: Path) -> None:
        total = hashlib.sha256()
        with path.open("wb") as file:
            try:
                for block in self._files.blocks(self.path(digest)):
                    total.update(block)
                    file.write(block)
            except OSError as error:
                if error.errno not in (errno.EBADMSG, errno.ENOENT):  # no room in memory
                    raise
                raise self._damaged(digest) from error
        if total.hexdigest() != digest:
            raise self._damaged(digest)

    def load(self, digest: str) -> bytes:
        try:
            return super().load(digest)
        except OSError as error:
            if error.errno not in (errno.EBADMSG, errno.ENOENT):
                raise
            raise self._damaged(digest) from error

    def read(self, digest: str, offset: int, length: int) -> tuple[Buffer, int] | None:
        """A sealed store serves nobody."""
        return None


def sealed_store(state: Path, key_file: str) -> SealedStore:
    """The store of a worker that seals its blobs; with an empty ``key_file`` under a key that ends
    with this process. What lies there and cannot be opened with the key is removed."""
    folder = state / "blobs"
    key = _key_of(Path(key_file), state) if key_file else secrets.token_bytes(32)
    store = SealedStore(folder, key, _loading_folder(state))
    removed = 0
    for path in folder.iterdir():
        if path.is_file() and (not key_file or not _is_sealed(path)):
            path.unlink()
            removed += 1
    if removed:
        log = structlog.get_logger()
        log.info("blobs of before removed, as they cannot be used", files=removed)
    return store


def _is_sealed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _key_of(path: Path, state: Path) -> bytes:
    """The key that a file stands for. Raises typed errors where it would not protect anything."""
    hint = "make one with: head -c 32 /dev/urandom > FILE; chmod 600 FILE; on another medium"
    try:
        inside = path.resolve(strict=True).is_relative_to(state.resolve())
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            data = file.read(_KEY_BYTES[1] + 1)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the key of the blobs, {path}: {error.strerror}", hint=hint
        ) from error
    if inside:
        raise ConfigurationError(
            f"the key of the blobs, {path}, lies beside what it protects", hint=hint
        )
    if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
        raise AuthError(
            f"{path} can be read or written by other users (mode {found.st_mode & 0o777:03o})",
            hint=f"chmod 600 {path}",
        )
    if not _KEY_BYTES[0] <= len(data) <= _KEY_BYTES[1]:
        raise ConfigurationError(
            f"the key of the blobs, {path}, has not {_KEY_BYTES[0]} to {_KEY_BYTES[1]} bytes",
            hint=hint,
        )
    if found.st_dev == state.stat().st_dev:
        log = structlog.get_logger()
        log.warning("the key of the blobs is on the same disk as they are", key=str(path))
    return hashlib.sha256(b"meshinfer blobs 1\0" + data).digest()


def _loading_folder(state: Path) -> Path:
    """A folder of ours in memory, empty, until this process ends; one that was killed leaves it for
    the next to remove."""
    for folder in loading_folders(state):
        if not _is_in_memory(folder.parent):
            continue
        try:
            if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder)
            folder.mkdir(mode=0o700)  # fails if it is there and is another user's
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        except OSError as error:
            raise ConfigurationError(
                f"cannot make the folder {folder}: {error.strerror}",
                hint="remove it, or see whose it is",
            ) from error
        return folder
    raise ConfigurationError(
        "blobs cannot be encrypted here: there is no file system in memory to load them from",
        hint="mount a tmpfs at /dev/shm, or run without --encrypt-blobs",
    )


def loading_folders(state: Path) -> tuple[Path, ...]:
    """Where that of a worker with this state folder may be."""
    name = hashlib.sha256(str(state.resolve()).encode()).hexdigest()[:16]
    memory = "/dev/shm"  # noqa: S108 (the folder is ours, 0700, or there is an error)
    bases = (memory, os.environ.get("XDG_RUNTIME_DIR", ""))
    return tuple(Path(base) / f"meshinfer-{os.getuid()}-{name}" for base in bases if base)


def _is_in_memory(path: Path) -> bool:
    """Whether the file system of a folder, by the longest mount point above it, is in memory."""
    path = path.resolve()
    found = ("", "")
    for line in _MOUNTS.read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        if path.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return path.is_dir() and found[1] in _IN_MEMORY
