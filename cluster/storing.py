"""Performs what a core asks of its blob store, and loads models, for all processes."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol
from weakref import WeakValueDictionary

import structlog

from cluster.blobs import BlobDamaged, BlobStore
from cluster.heap import Room
from cluster.loop import Post, report, start_thread
from meshinfer.engine import Engine, EngineError
from meshinfer.engine import Prepared as PreparedModel
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Buffer, failure_of
from meshinfer.scheduler.events import (
    BlobsFound,
    BlobWritten,
    Discard,
    Effect,
    FindBlobs,
    Plane,
    Prepare,
    Prepared,
    Send,
    ServeBlob,
    WriteBlob,
)

ROOM_KEPT_S = 5.0
"""After a model was prepared, until its room is given back: longer than the pause from one spare
task to the next, in which requests run."""


class Readable(Protocol):
    """Who has blobs to serve."""

    def read(self, digest: str, offset: int, length: int) -> tuple[Buffer, int] | None: ...


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
    """The chunk that was asked for, or word that it is gone. With the last one, it is logged that
    this device or client has got the blob."""
    found = store.read(effect.digest, effect.offset, effect.length)
    if found is None:
        return Send(Plane.BULK, effect.peer, m.Gone(digest=effect.digest))
    data, total = found
    chunk = m.Chunk(digest=effect.digest, offset=effect.offset, total=total)
    if effect.model and effect.offset + len(data) >= total:
        name, _, incarnation = effect.peer.partition("#")
        fields = {"device": name, "incarnation": incarnation, "model": effect.model}
        log = structlog.get_logger()
        log.info("blob handed out", **fields, blob=effect.digest[:12], bytes=total)
    return Send(Plane.BULK, effect.peer, chunk, data)


class StoreThread:
    """Performs what touches the disk or loads models, one after another. ``engine``: where it comes
    from; asked in this thread, at the first model. ``room``: where models are prepared."""

    def __init__(
        self,
        store: BlobStore,
        engine: Callable[[], Engine] | None,
        post: Post,
        room: Room | None = None,
    ) -> None:
        self._store, self._engine, self._post, self._room = store, engine, post, room
        self._room_until = 0.0
        self._queue: queue.SimpleQueue[Effect | None] = queue.SimpleQueue()
        self._sessions: WeakValueDictionary[str, PreparedModel] = WeakValueDictionary()
        self.prepared: dict[int, dict[m.Place, PreparedModel]] = {}
        self._thread = start_thread("store", self._run, post)

    def put(self, effect: Effect) -> None:
        self._queue.put(effect)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while (effect := self._next()) is not None:
            match effect:
                case FindBlobs() | WriteBlob():
                    answer = perform(self._store, effect)
                    if answer is not None:
                        self._post(answer)
                case Prepare(deployment, programs):
                    self._post(Prepared(deployment, self._prepare(deployment, programs)))
                case Discard(deployment):
                    self._discard(deployment)
                case _:
                    raise AssertionError(f"a worker cannot perform {effect}")

    def _next(self) -> Effect | None:
        if self._room is not None and self._room_until:
            with suppress(queue.Empty):
                return self._queue.get(timeout=max(0.0, self._room_until - time.monotonic()))
            self._room.give_back()
            self._room_until = 0.0
        return self._queue.get()

    def _prepare(self, deployment: int, programs: tuple[m.Program, ...]) -> m.Failure | None:
        if self._room is not None:
            self._room.keep()
        try:
            made = {p.place: self._session(p) for p in programs}
            self.prepared.setdefault(deployment, {}).update(made)
            self._store.trim()
            return None
        except BlobDamaged as error:
            return m.Failure(
                error="ConfigurationError",
                message=f"not loaded: {error}",
                hint="it is fetched anew; if this happens again, look at this device's disk, and "
                "at who can write to its state folder",
            )
        except (EngineError, OSError, MemoryError) as error:
            return m.Failure(
                error="ConfigurationError",
                message=f"cannot prepare a task: {error}",
                hint="look at this device's log, disk and memory",
            )
        except Exception as error:
            return report(error)
        finally:
            self._room_until = time.monotonic() + ROOM_KEPT_S

    def _discard(self, deployment: int) -> None:
        if self.prepared.pop(deployment, None) is not None and self._engine is not None:
            self._engine().give_back()

    def _session(self, program: m.Program) -> PreparedModel:
        assert program.model is not None and self._engine is not None
        session = self._sessions.get(program.model)
        if session is None:
            engine = self._engine()
            with self._store.opened(program.weights):
                session = engine.prepare(self._store.load(program.model))
            self._sessions[program.model] = session
        return session
