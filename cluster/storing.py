"""Performs what a core asks of its blob store, and loads models, for all processes."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol
from weakref import WeakValueDictionary

import structlog

from cluster.blobs import BlobDamaged, BlobStore
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

_CLOSE_S = 5.0
_NICE = 5
"""A task that computes meanwhile gets three parts of four, and not one of two."""


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
    from; asked in this thread, at the first model.

    Models for which nobody waits are loaded by a thread beside it, one session at a time, so that
    what somebody waits for never waits for more than that one. ``stands_back``: that thread leaves
    most of the processor to tasks; not where sessions have threads of their own, for those would
    have its low priority for ever.
    """

    def __init__(
        self,
        store: BlobStore,
        engine: Callable[[], Engine] | None,
        post: Post,
        *,
        stands_back: bool = False,
    ) -> None:
        self._store, self._engine, self._post = store, engine, post
        self._stands_back = stands_back
        self._queue: queue.SimpleQueue[Effect | None] = queue.SimpleQueue()
        self._later: queue.SimpleQueue[Prepare | Discard | None] = queue.SimpleQueue()
        self._sessions: WeakValueDictionary[str, PreparedModel] = WeakValueDictionary()
        self._one, self._free = threading.Lock(), threading.Event()
        self._free.set()
        self._gone: set[int] = set()  # discarded, and the other thread is not there yet
        self.prepared: dict[int, dict[m.Place, PreparedModel]] = {}
        self._thread = start_thread("store", self._run, post)
        self._beside: threading.Thread | None = None

    def put(self, effect: Effect) -> None:
        if isinstance(effect, Prepare) and effect.gentle:
            if self._beside is None:
                self._beside = start_thread("spares", self._run_beside, self._post)
            self._later.put(effect)
            return
        if isinstance(effect, Discard) and self._beside is not None:
            self._gone.add(effect.deployment)
            self._later.put(effect)
        self._queue.put(effect)

    def close(self) -> None:
        self._queue.put(None)
        self._later.put(None)
        for thread in (self._thread, self._beside):
            if thread is not None:
                thread.join(timeout=_CLOSE_S)

    def _run(self) -> None:
        while (effect := self._queue.get()) is not None:
            match effect:
                case FindBlobs() | WriteBlob():
                    answer = perform(self._store, effect)
                    if answer is not None:
                        self._post(answer)
                case Prepare():
                    self._free.clear()
                    self._load(effect)
                    self._free.set()
                case Discard():
                    self._load(effect)
                case _:
                    raise AssertionError(f"a worker cannot perform {effect}")

    def _run_beside(self) -> None:
        if self._stands_back:
            _stand_back()
        while (effect := self._later.get()) is not None:
            self._load(effect)
            if isinstance(effect, Discard):
                self._gone.discard(effect.deployment)

    def _load(self, effect: Prepare | Discard) -> None:
        if isinstance(effect, Prepare):
            failure = self._prepare(effect)
            self._post(Prepared(effect.deployment, failure))
        else:
            self._discard(effect.deployment)

    def _prepare(self, effect: Prepare) -> m.Failure | None:
        try:
            made = {}
            for program in effect.programs:
                if effect.gentle:
                    self._free.wait()
                    if effect.deployment in self._gone:
                        return None
                made[program.place] = self._session(program)
            self.prepared[effect.deployment] = made
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

    def _discard(self, deployment: int) -> None:
        if self.prepared.pop(deployment, None) is not None and self._engine is not None:
            self._engine().give_back()

    def _session(self, program: m.Program) -> PreparedModel:
        assert program.model is not None and self._engine is not None
        with self._one:
            session = self._sessions.get(program.model)
            if session is None:
                engine = self._engine()
                with self._store.opened(program.weights):
                    session = engine.prepare(self._store.load(program.model))
                self._sessions[program.model] = session
        return session


def _stand_back() -> None:
    """On Linux each thread has a priority of its own."""
    if sys.platform == "linux":
        who = os.PRIO_PROCESS, threading.get_native_id()
        with suppress(OSError):
            os.setpriority(*who, os.getpriority(*who) + _NICE)
