"""Runs what was granted to a client in the thread that asks: no other process has a part in it.

``meshinfer.scheduler.on_device`` decides what may run here, and when no longer.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import assert_never

from cluster import results
from cluster.blobs import BlobStore
from cluster.loop import Post
from cluster.processor import instruction_set
from cluster.results import Result
from cluster.storing import StoreThread
from meshinfer.engine import Engine, EngineError
from meshinfer.engine import Prepared as PreparedModel
from meshinfer.errors import DeadlineExceeded
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Array
from meshinfer.scheduler.events import (
    Discard,
    Event,
    FindBlobs,
    Granted,
    Lease,
    Prepare,
    Prepared,
    RanHere,
    Send,
    Stop,
    WriteBlob,
)
from meshinfer.scheduler.on_device import OwnTask

OwnEffect = FindBlobs | WriteBlob | Granted | Discard | Lease


class OnDevice:
    """``perform`` belongs to the client's I/O thread, ``infer`` to any. A folder for weights is
    made when something is granted; so is the engine, for onnxruntime is heavy to import."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._storing: StoreThread | None = None
        self._threads = 1
        self._until = 0.0
        self._coming: dict[int, OwnTask] = {}
        self._ready: dict[int, tuple[OwnTask, PreparedModel]] = {}
        self._ran: dict[int, tuple[int, float]] = {}
        self._engine = cache(self._make_engine)

    def perform(self, effect: OwnEffect) -> None:
        match effect:
            case FindBlobs() | WriteBlob():
                self._store().put(effect)
            case Granted(deployment, task):
                assert isinstance(task, OwnTask)
                self._threads = task.grant.threads
                with self._lock:
                    self._coming[deployment] = task
                self._store().put(Prepare(deployment, (task.grant.program,)))
            case Discard(deployment):
                with self._lock:
                    self._coming.pop(deployment, None)
                    self._ready.pop(deployment, None)
                self._store().put(effect)
            case Lease(until):
                self._until = until
                with self._lock:
                    ran, self._ran = self._ran, {}
                for deployment, (count, compute_s) in ran.items():
                    self._post(RanHere(deployment, count, compute_s / count))
            case _:
                assert_never(effect)

    def close(self) -> None:
        """Nothing is answered here any more. Once no effects come."""
        self._until = 0.0
        if self._storing is not None and self._folder is not None:
            self._storing.close()
            self._folder.cleanup()

    def infer(
        self,
        model: str,
        data: object,
        outputs: tuple[str, ...] | None,
        version: int | None,
        deadline_s: float,
    ) -> Result | None:
        """The answer, if this process may give it and is not at another; else None. Raises
        ``InvalidInput``, ``DeadlineExceeded``."""
        started = time.monotonic()
        with self._lock:
            known = [pair for pair in self._ready.values() if pair[0].grant.model == model]
        if not known or started >= self._until or not self._turn.acquire(blocking=False):
            return None  # several at once are for the cluster
        try:
            for task, session in known:
                inputs = _inputs(task, data, version, outputs)
                if inputs is not None:
                    return self._run(task, session, inputs, outputs, started, deadline_s)
            return None
        except EngineError:  # a device may manage, or tell why not
            return None
        finally:
            self._turn.release()

    def _run(
        self,
        task: OwnTask,
        session: PreparedModel,
        inputs: Mapping[str, Array],
        wanted: tuple[str, ...] | None,
        started: float,
        deadline_s: float,
    ) -> Result:
        before = time.perf_counter()
        arrays = task.run(inputs, session.run)
        compute_s = time.perf_counter() - before
        number = task.grant.deployment
        with self._lock:
            count, total_s = self._ran.get(number, (0, 0.0))
            self._ran[number] = (count + 1, total_s + compute_s)
        total_s = time.monotonic() - started
        if total_s > deadline_s:
            raise DeadlineExceeded(
                f"the answer took {total_s:.3g} s, more than {deadline_s:.3g} s",
                hint="give a longer deadline_s, or look at meshinfer devices",
            )
        reply = task.reply(secrets.token_hex(12), total_s, compute_s)
        return results.result_of(task.grant.model, reply, arrays, wanted)

    # --- loading

    def _store(self) -> StoreThread:
        if self._storing is None:
            self._folder = tempfile.TemporaryDirectory(prefix="meshinfer-on-device-")
            self._blobs = BlobStore(Path(self._folder.name), sole=True)
            self._storing = StoreThread(self._blobs, self._engine, self._told)
        return self._storing

    def _make_engine(self) -> Engine:
        from meshinfer.engine.ort import OrtEngine

        return OrtEngine(self._blobs.folder, self._threads, instruction_set())

    def _told(self, item: Event | Send | Stop) -> None:
        """From the thread that stores and loads."""
        if not isinstance(item, Prepared):
            self._post(item)
            return
        with self._lock:
            task = self._coming.pop(item.deployment, None)
            if task is None or item.failure is not None:
                return
            if self._engine().name != task.grant.engine:
                return  # other bits than the device's
            (session,) = self._store().prepared[item.deployment].values()
            self._ready[item.deployment] = (task, session)
            if not self._coming:  # loaded, or mapped: its files are needed no more
                program = task.grant.program
                for digest in (program.model or "", *program.weights):
                    self._blobs.path(digest).unlink(missing_ok=True)


def _inputs(
    task: OwnTask, data: object, version: int | None, outputs: tuple[str, ...] | None
) -> Mapping[str, Array] | None:
    """What a request gives, as arrays, if the task is for such requests. Not copied: nobody gets to
    change them before the answer is there."""
    grant = task.grant
    if isinstance(data, Mapping):
        arrays, picture = results.input_arrays(data, None, copy=False)
    elif grant.outputs is not None:  # the model may have inputs that the grant does not name
        return None
    else:
        info = m.ModelInfo(
            name=grant.model,
            version=grant.version,
            digest="",
            current=True,
            inputs=tuple(tensor.name for tensor in grant.inputs),
            outputs=(),
            image=grant.image,
            plans=(),
        )
        arrays, picture = results.input_arrays(data, info, copy=False)
    if not task.serves(version, results.describe_inputs(arrays), picture, outputs):
        return None
    return arrays
