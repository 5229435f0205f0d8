"""What a client has for the coordinator to fetch: a model, and weights where they lie already.

Weights in files of the user's are read from there, piece by piece; what else there is lies in a
folder of our own meanwhile. Only what the coordinator lacks is asked for.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.blobs import BlobStore

if TYPE_CHECKING:
    from meshinfer.importers.external import Segment
    from meshinfer.protocol.codec import Buffer


@dataclass(frozen=True, slots=True)
class Offer:
    """A model to deploy. ``weights``: bytes of each by its SHA-256; ``files``: where some lie."""

    digest: str
    nbytes: int
    weights: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, Segment] = field(default_factory=dict)


Put = Callable[[str, bytes], None]
"""Keeps bytes by their SHA-256 for as long as the offer is held."""


class Offers:
    """Readable like a ``BlobStore``. Deploying threads share it with the one that serves."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._files: dict[str, Segment] = {}
        self._holders: Counter[str] = Counter()

    def read(self, digest: str, offset: int, length: int) -> tuple[Buffer, int] | None:
        """Bytes of a blob and its whole size; None when it is not here."""
        with self._lock:
            segment = self._files.get(digest)
        if segment is None:
            return self._store.read(digest, offset, length)
        try:
            return segment.read(offset, length), segment.nbytes
        except OSError:
            return None

    @contextlib.contextmanager
    def held(self, make: Callable[[Put], Offer]) -> Iterator[Offer]:
        """Serve what ``make`` offers meanwhile."""
        held: list[str] = []

        def hold(digest: str) -> None:
            held.append(digest)
            with self._lock:
                self._holders[digest] += 1

        def put(digest: str, data: bytes) -> None:
            hold(digest)
            self._store.put(digest, data)

        try:
            offer = make(put)
            for digest, segment in offer.files.items():
                hold(digest)
                with self._lock:
                    self._files[digest] = segment
            yield offer
        finally:
            for digest in held:
                self._drop(digest)

    def _drop(self, digest: str) -> None:
        with self._lock:
            self._holders[digest] -= 1
            if not self._holders[digest]:
                del self._holders[digest]
                self._files.pop(digest, None)
                self._store.remove(digest)
