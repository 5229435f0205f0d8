"""What runs on a Ray node: one actor a node holds sessions, weights once, and runs tasks.

Called with numpy arrays and msgpack of our own types, and answers with those: no other object of
ours is pickled. A plain class; ``nodes`` makes Ray's actor of it.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import numpy as np
import platformdirs

from cluster import profiler
from cluster.blobs import BlobStore
from cluster.processor import instruction_set
from cluster.results import closed_error
from meshinfer.engine import EngineError
from meshinfer.engine import Prepared as PreparedModel
from meshinfer.engine.ort import OrtEngine
from meshinfer.errors import ConfigurationError, MeshInferError
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Array, failure_of, payload_of
from meshinfer.scheduler.calls import results_of
from meshinfer.scheduler.recipe import Cut, Gathering, Recipe


class Ran(msgspec.Struct, frozen=True):
    """What one call took: seconds of computing, and bytes of each result; or why it failed. Empty:
    a task before it failed."""

    compute_s: float = 0.0
    nbytes: tuple[int, ...] = ()
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class _Held:
    """A program that is prepared."""

    recipe: Recipe
    results: tuple[Cut, ...]
    session: PreparedModel


class NodeActor:
    """One device. Calls come one after another."""

    def __init__(self, threads: int) -> None:
        # There only while something is prepared: whoever kills us leaves nothing behind.
        self._folder = Path(tempfile.gettempdir()) / f"meshinfer-ray-{secrets.token_hex(8)}"
        self._engine = OrtEngine(self._folder, threads, instruction_set())
        self._threads, self._over = threads, False
        self._sessions: WeakValueDictionary[str, PreparedModel] = WeakValueDictionary()
        self._held: dict[tuple[int, int, int], _Held] = {}

    def where(self) -> tuple[str, str]:
        """This machine, for devices on one are measured one after another; and Ray's name for this
        actor, which its errors tell."""
        import ray

        return socket.gethostname(), ray.get_runtime_context().get_actor_id() or ""

    def measure(self) -> bytes:
        """``Facts``, measured as a worker daemon measures itself."""
        folder = platformdirs.user_cache_path("meshinfer") / "ray"
        try:
            measured = profiler.measured_once(folder, self._engine.name, self._threads)
        except OSError:  # no home to write to, as in many containers
            measured = profiler.measure(self._threads)
        facts = profiler.facts(threads=self._threads, engine=self._engine.name, measured=measured)
        return msgspec.msgpack.encode(facts)

    def echo(self, piece: Array | None = None) -> Array | None:
        """What a call takes, and what a link does."""
        return piece

    def lacks(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """Submodels, by SHA-256, that are not loaded."""
        return tuple(digest for digest in models if digest not in self._sessions)

    def keep(self, digest: str, data: Array) -> bytes:
        """A submodel or a weight for ``prepare``; the failure, if any."""
        if self._over:
            return _told(closed_error())
        try:
            BlobStore(self._folder, shared=True).put(digest, payload_of(data))
        except (OSError, ValueError, ConfigurationError) as error:
            return _told(error)
        return b""

    def prepare(self, deployment: int, programs: bytes) -> bytes:
        """Load what ``keep`` brought, beside what is loaded already; the failure, if any."""
        try:
            for program in msgspec.msgpack.decode(programs, type=tuple[m.Program, ...]):
                recipe = Recipe.of(program)
                held = _Held(recipe, results_of(recipe), self._session(program))
                self._held[deployment, *program.place] = held
        except (EngineError, OSError, MemoryError) as error:
            return _told(
                MeshInferError(
                    f"cannot prepare a task: {error}", hint="look at this node's disk and memory"
                )
            )
        except Exception as error:
            return _told(error)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # all is loaded, or mapped
        return b""

    def forget(self, deployment: int) -> None:
        for key in [key for key in self._held if key[0] == deployment]:
            del self._held[key]

    def run(self, deployment: int, place: m.Place, slots: tuple[int, ...], *pieces: Array) -> Any:
        """One task: ``Ran``, and behind it the results that others read, as arrays."""
        held = self._held[deployment, *place]
        if any(piece is None for piece in pieces):
            return _answer(Ran(failed=""), [None] * len(held.results))
        gathering = Gathering(held.recipe)
        try:
            for slot, piece in zip(slots, pieces, strict=True):
                if not gathering.put(slot, piece):
                    raise EngineError(f"piece {slot} has shape {piece.shape}")
            before = time.perf_counter()
            outputs = held.session.run(gathering.inputs())
            compute_s = time.perf_counter() - before
        except EngineError as error:
            return _answer(Ran(failed=str(error)), [None] * len(held.results))
        made = [np.asarray(cut.sent(outputs), order="C") for cut in held.results]
        return _answer(Ran(compute_s, tuple(array.nbytes for array in made)), made)

    def end(self) -> None:
        """Leave nothing behind, nor take anything any more; the caller ends the process."""
        self._over = True
        self._held.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _session(self, program: m.Program) -> PreparedModel:
        assert program.model is not None
        session = self._sessions.get(program.model)
        if session is None:
            session = self._engine.prepare((self._folder / program.model).read_bytes())
            self._sessions[program.model] = session
        return session


def _told(error: BaseException) -> bytes:
    return msgspec.msgpack.encode(failure_of(error))


def _answer(ran: Ran, results: list[Any]) -> Any:
    """As Ray wants it: a tuple, unless there is but one thing to return."""
    told = msgspec.msgpack.encode(ran)
    return (told, *results) if results else told
