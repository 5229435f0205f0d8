"""Performs what a core asks of its blob store; the same for coordinator, worker and client."""

from __future__ import annotations

from typing import Protocol

from cluster.blobs import BlobStore
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import failure_of
from meshinfer.scheduler.events import (
    BlobsFound,
    BlobWritten,
    FindBlobs,
    Plane,
    Send,
    ServeBlob,
    WriteBlob,
)


class Readable(Protocol):
    """Who has blobs to serve."""

    def read(self, digest: str, offset: int, length: int) -> tuple[bytes, int] | None: ...


StoreEffect = FindBlobs | WriteBlob | ServeBlob


def perform(store: BlobStore, effect: StoreEffect) -> BlobsFound | BlobWritten | Send | None:
    """The event or message that answers the effect; None for a chunk that is not the last."""
    match effect:
        case FindBlobs(purpose, digests):
            return BlobsFound(purpose, store.missing(digests))
        case WriteBlob():
            return _write(store, effect)
        case ServeBlob():
            return serve(store, effect)


def _write(store: BlobStore, effect: WriteBlob) -> BlobWritten | None:
    try:
        whole = store.write(effect.digest, effect.offset, effect.total, effect.data)
    except (OSError, ValueError) as error:
        return BlobWritten(effect.digest, failure_of(error))
    return BlobWritten(effect.digest) if whole else None


def serve(store: Readable, effect: ServeBlob) -> Send:
    """The chunk that was asked for, or word that it is gone."""
    found = store.read(effect.digest, effect.offset, effect.length)
    if found is None:
        return Send(Plane.BULK, effect.peer, m.Gone(digest=effect.digest))
    data, total = found
    chunk = m.Chunk(digest=effect.digest, offset=effect.offset, total=total)
    return Send(Plane.BULK, effect.peer, chunk, data)
