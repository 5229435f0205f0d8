"""A folder of blobs named by their SHA-256: written by rename, verified before they count.

Models, submodels and weights are blobs. Threads and processes may share a folder, but chunks of one
blob are written by one of them. What was not used for a while makes room when the folder grows
beyond its bound. How the bytes lie in a file is ``Files``' to say: plain here, or sealed.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import mmap
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from meshinfer import limits
from meshinfer.errors import ConfigurationError

if TYPE_CHECKING:
    from meshinfer.protocol.codec import Buffer

READ_BYTES = 1 << 20
_OWN_PAGES_BYTES = 64 << 10
_KEEP_S = 1200.0
"""Whoever found a blob here may rely on it for so long; longer than any deployment may take."""


class BlobDamaged(Exception):
    """A blob's file has other bytes than when it was stored; it is gone now."""


class Files(Protocol):
    """How blobs lie in files. Both raise ``OSError``."""

    def append(self, path: Path, offset: int, data: memoryview) -> None:
        """Write what comes next; at 0, begin anew."""

    def blocks(self, path: Path) -> Iterator[bytes]:
        """What was written, piece by piece."""


class Plain:
    """As they are."""

    def append(self, path: Path, offset: int, data: memoryview) -> None:
        with path.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(data)

    def blocks(self, path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                yield block


class BlobStore:
    """Content-addressed files under ``folder``, which is made if need be.

    ``shared``: another process has the folder open, and what is half written there is its own.
    ``durable``: what came in chunks is there after a power cut, too, as nobody else may have it.
    ``sole``: no other process ever has it open, so a file that has changed at all since it was
    verified is verified anew before it is used. ``loading``: where files lie while they are loaded.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int = limits.BLOB_STORE_BYTES,
        *,
        shared: bool = False,
        durable: bool = False,
        sole: bool = False,
        files: Files | None = None,
    ) -> None:
        self._durable, self._sole = durable, sole
        self.folder = self.loading = folder
        self.max_bytes = max_bytes
        self._files: Files = files or Plain()
        # Each is looked for on the disk before it counts. The last that were used: others are
        # verified anew, for every plan adds some that are soon of no use.
        self._verified: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._since = time.time()  # beside the files' own times
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigurationError(
                f"cannot make the folder {folder}: {error.strerror}",
                hint="choose another state folder with --state-dir",
            ) from error
        if shared:
            return
        for part in folder.glob("*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
        self.sweep()  # the lock on the state folder makes it ours

    def sweep(self) -> None:
        """Remove what a process that was killed left of its work: folders, and whole blobs that it
        was about to put. Nobody else may be at such work."""
        for left in self.folder.glob("*-*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def path(self, digest: str) -> Path:
        return self.folder / digest

    def missing(self, digests: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are not here; a damaged file counts as missing and is written anew."""
        return tuple(digest for digest in digests if not self._whole(digest))

    def put(self, digest: str, data: bytes | memoryview) -> None:
        """Store a whole blob. Raises ``OSError`` when the disk does not take it."""
        if self._whole(digest):
            return
        part = self.folder / f"{digest}-{os.getpid()}-{threading.get_ident()}"  # others may put it
        view = memoryview(data).cast("B")
        try:
            # In steps: one long call would stop a throttled device.
            for start in range(0, max(1, len(view)), READ_BYTES):
                self._files.append(part, start, view[start : start + READ_BYTES])
            self._admit(digest, part)
        finally:
            part.unlink(missing_ok=True)

    def write(self, digest: str, offset: int, total: int, data: memoryview) -> bool:
        """Add a chunk; True when the blob is whole.

        Raises ``ValueError`` when the whole is not what its name says, ``OSError`` for the disk.
        """
        part = self._part(digest)
        self._files.append(part, offset, data)
        if offset + len(data) < total:
            return False
        if self._durable:
            _sync(part)
        self._admit(digest, part)
        if self._durable:
            _sync(self.folder)
        return True

    def remove(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)
        self._verified.pop(digest, None)

    def load(self, digest: str) -> bytes:
        """A whole blob, whose bytes themselves are verified. Raises ``BlobDamaged``, ``OSError``"""
        data = b"".join(self._files.blocks(self.path(digest)))
        if hashlib.sha256(data).hexdigest() != digest:
            raise self._damaged(digest)
        return data

    @contextmanager
    def opened(self, digests: Iterable[str]) -> Iterator[None]:
        """Their files lie in ``loading`` meanwhile, and were verified since they last changed.
        Raises ``BlobDamaged``."""
        for digest in digests:
            if not self._whole(digest):
                raise self._damaged(digest)
        yield

    def _damaged(self, digest: str) -> BlobDamaged:
        self.remove(digest)
        return BlobDamaged(f"the file of blob {digest[:12]} was changed or is gone")

    def read(self, digest: str, offset: int, length: int) -> tuple[Buffer, int] | None:
        """Bytes of a blob and its whole size; None when it is not here, or was damaged since an
        earlier process wrote it."""
        try:
            old = digest not in self._verified and self.path(digest).stat().st_mtime < self._since
            if old and not self._whole(digest):
                self.remove(digest)
                return None
            with self.path(digest).open("rb", buffering=0) as file:
                total = os.fstat(file.fileno()).st_size
                file.seek(offset)
                return _piece(file, max(0, min(length, total - offset))), total
        except OSError:
            return None

    def _part(self, digest: str) -> Path:
        return self.folder / f"{digest}.part"

    def _admit(self, digest: str, part: Path) -> None:
        if self._digest(part) != digest:
            part.unlink(missing_ok=True)
            raise ValueError("its bytes are not those of its SHA-256")
        os.replace(part, self.path(digest))
        self._note(digest)

    def _digest(self, path: Path) -> str:
        total = hashlib.sha256()
        for block in self._files.blocks(path):
            total.update(block)
        return total.hexdigest()

    def _whole(self, digest: str) -> bool:
        path = self.path(digest)
        try:
            known = self._verified.get(digest)
            if known is not None and self._sole and known != _identity(path):
                known = None
            if known is None and self._digest(path) != digest:
                return False
            with self._locked():
                os.utime(path)  # used now
            self._note(digest)
        except OSError:
            self._verified.pop(digest, None)
            return False
        return True

    def _note(self, digest: str) -> None:
        self._verified[digest] = _identity(self.path(digest))
        self._verified.move_to_end(digest)
        if len(self._verified) > limits.BLOBS_VERIFIED:
            self._verified.popitem(last=False)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else, in any process, finds or trims meanwhile."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _remove_unused(self, path: Path, since: float) -> bool:
        with self._locked():
            try:
                if path.stat().st_mtime > since:  # found just now
                    return False
            except OSError:
                return False
            path.unlink(missing_ok=True)
        self._verified.pop(path.name, None)
        return True

    def trim(self, keep: Collection[str] = ()) -> None:
        """Remove what was used longest ago until the folder fits; never what was used just now."""
        found = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except OSError:
                continue
            if path.is_file():
                found.append((status.st_mtime, status.st_size, path))
        size = sum(each[1] for each in found)
        newest = time.time() - _KEEP_S  # beside the files' own times, which are wall clock as well
        for used, nbytes, path in sorted(found):
            if size <= self.max_bytes or used > newest:
                return
            if path.name not in keep and self._remove_unused(path, newest):
                size -= nbytes


def _piece(file: io.FileIO, nbytes: int) -> Buffer:
    """What comes next in a file. Many large pieces are on their way at once and then none for long:
    in pages of their own they go back to the kernel, while the allocator would keep them, for the
    small things between them."""
    if nbytes < _OWN_PAGES_BYTES:
        return file.read(nbytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    view = memoryview(mmap.mmap(-1, nbytes, flags=flags))
    return view[: file.readinto(view)].toreadonly()


def _identity(path: Path) -> tuple[int, ...]:
    """Another one whenever the file is written to, replaced, or its times are set."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
