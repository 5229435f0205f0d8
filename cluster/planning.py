"""Has models opened and planned for the coordinator's core, in a process of its own, and serves
blobs: beside the loop, which never waits.

The process may be killed at any time: what it worked on is asked again once, of another.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial

import msgspec
import structlog

from cluster import jobs
from cluster.blobs import BlobStore
from cluster.loop import Post, report, start_thread
from cluster.processes import cause_of, end_session, oom_kills
from cluster.storing import perform
from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, MeshInferError
from meshinfer.scheduler.events import (
    Discard,
    Effect,
    FindBlobs,
    MakePlan,
    ModelOpened,
    OpenModel,
    PlanReady,
    ServeBlob,
    WriteBlob,
)

_COMMAND = (sys.executable, "-m", "cluster.planner")
_JOIN_S = 2.0


class PlanningThread:
    """``post`` hands events and messages to the coordinator's loop. ``log_level``, ``log_form``: as
    the coordinator's."""

    def __init__(
        self, store: BlobStore, post: Post, log_level: str = "info", log_form: str = "text"
    ) -> None:
        self._store, self._post = store, post
        self._process = PlannerProcess(store, log_level, log_form)
        self._asked: set[int] = set()  # deployments whose plan somebody wants
        self._now: OpenModel | MakePlan | None = None
        self._jobs: queue.SimpleQueue[Effect | None] = queue.SimpleQueue()
        self._files: queue.SimpleQueue[Effect | None] = queue.SimpleQueue()
        # Planning may take seconds; workers that fetch blobs meanwhile must not wait for it.
        self._threads = [
            start_thread("planning", self._plan_all, post),
            start_thread("files", self._serve_all, post),
        ]

    def put(self, effect: Effect) -> None:
        match effect:
            case MakePlan():
                self._asked.add(effect.deployment)
                self._jobs.put(effect)
            case OpenModel():
                self._jobs.put(effect)
            case Discard(deployment):
                self._asked.discard(deployment)
            case _:
                self._files.put(effect)
                return
        now = self._now
        if isinstance(now, MakePlan) and self._is_moot(now):
            self._process.drop(now.deployment)

    def _is_moot(self, effect: OpenModel | MakePlan) -> bool:
        """Nobody wants it any more, or nobody waits for it and there is something else to do."""
        if not isinstance(effect, MakePlan):
            return False
        beside = effect.share < 1.0 and not self._jobs.empty()
        return beside or effect.deployment not in self._asked

    def close(self) -> None:
        """End the process, and what it works on."""
        self._jobs.put(None)
        self._files.put(None)
        self._process.close()
        for thread in self._threads:
            thread.join(timeout=_JOIN_S)
        self._process.close_pipes()

    def _plan_all(self) -> None:
        while (effect := self._jobs.get()) is not None:
            match effect:
                case OpenModel() | MakePlan():
                    self._now = effect
                    answer = self._process.perform(effect, partial(self._is_moot, effect))
                    self._now = None
                    if answer is None:
                        return
                    if isinstance(answer, PlanReady):
                        self._asked.discard(answer.deployment)
                    self._post(answer)
                case _:
                    raise AssertionError(f"a coordinator cannot plan {effect}")

    def _serve_all(self) -> None:
        while (effect := self._files.get()) is not None:
            match effect:
                case FindBlobs() | WriteBlob() | ServeBlob():
                    answer = perform(self._store, effect)
                    if answer is not None:
                        self._post(answer)
                case _:
                    raise AssertionError(f"a coordinator cannot perform {effect}")


class PlannerProcess:
    """``python -m cluster.planner``, started again when it has ended. One thread has it work; any
    may drop it or close the process."""

    def __init__(self, store: BlobStore, log_level: str, log_form: str) -> None:
        self._store = store
        self._log = (log_level, log_form)
        self._models: dict[str, tuple[str, ...]] = {}  # what the next one must know of
        self._lock = threading.Lock()
        self._closed = False
        (self._process, self._drops), self._oom_kills = self._started(), oom_kills()

    def perform(
        self, effect: OpenModel | MakePlan, is_moot: Callable[[], bool]
    ) -> ModelOpened | PlanReady | None:
        """``is_moot``: whether it need not be done. None once it is closed.

        Whatever becomes of the process ends as a failure of what it was asked.
        """
        job = jobs.Job(plan=effect) if isinstance(effect, MakePlan) else jobs.Job(open=effect)
        try:
            answer = self._asked(job, is_moot)
        except (MeshInferError, msgspec.MsgspecError) as error:
            if isinstance(effect, MakePlan):
                return PlanReady(effect.deployment, failure=report(error))
            return ModelOpened(effect.key, {}, None, report(error))
        if answer is None:
            return None
        if job.open is not None and answer.weights is not None:
            jobs.remember(self._models, job.open.digest, answer.weights)
        return answer.opened or answer.planned

    def drop(self, deployment: int) -> None:
        """A search has become moot: it is given up, if it is what the process works at."""
        with self._lock, contextlib.suppress(OSError):
            jobs.write_drop(self._drops, deployment)
            self._process.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        """End the process, and what it works on; ``perform`` returns."""
        with self._lock:
            self._closed = True
        _kill(self._process)

    def close_pipes(self) -> None:
        """Once nobody can be at ``perform``: who reads from one would hold it."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what could not be written
                pipe.close()
        with self._lock:
            drops, self._drops = self._drops, -1
        with contextlib.suppress(OSError):  # closed before
            os.close(drops)

    def _asked(self, job: jobs.Job, is_moot: Callable[[], bool]) -> jobs.Answer | None:
        cause = ""
        for _ in range(limits.PLANNING_TRIES):
            if self._process.poll() is not None and not self._start_again():
                return None
            if job.plan is not None and is_moot():  # if any was told, it was the process before
                return jobs.Answer(planned=PlanReady(job.plan.deployment, dropped=True))
            answer = self._exchange(job)
            if answer is not None:
                return answer
            if self._closed:
                return None
            cause = self._end()
        raise ClusterUnavailable(
            f"the coordinator's process that plans ended over it, {limits.PLANNING_TRIES} times "
            f"({cause})",
            hint="look at the coordinator's log, and at the memory of its device",
        )

    def _exchange(self, job: jobs.Job) -> jobs.Answer | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            jobs.write(self._process.stdin, job)
            return jobs.read(self._process.stdout, jobs.Answer)
        except (OSError, ValueError):  # it is gone, or closed
            return None

    def _end(self) -> str:
        """Be sure that it has ended, and remove what it was at; why it did."""
        _kill(self._process)
        cause = cause_of(self._process.returncode, self._oom_kills)
        structlog.get_logger().warning("the process that plans ended", cause=cause)
        self._store.sweep()
        return cause

    def _start_again(self) -> bool:
        """False when closed."""
        self.close_pipes()
        before = oom_kills()
        try:
            process, drops = self._started()
        except OSError as error:
            raise ClusterUnavailable(
                f"the coordinator cannot start the process that plans: {error.strerror}",
                hint="look at the memory of its device, and its number of processes",
            ) from error
        with self._lock:
            self._process, self._drops, self._oom_kills = process, drops, before
            closed = self._closed
        if closed:
            _kill(process)
        return not closed

    def _started(self) -> tuple[subprocess.Popen[bytes], int]:
        """The process, and where to write what it need not do any more."""
        heard, drops = os.pipe()
        for end in (heard, drops):
            os.set_blocking(end, False)
        # Blocked until the process can handle it: to be hurried must not kill it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
        try:
            process = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(heard,),
                start_new_session=True,  # Ctrl-C is for its starter, which ends it
            )
        except OSError:
            os.close(drops)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(heard)
        assert process.stdin is not None
        folder, size = str(self._store.folder), self._store.max_bytes
        begin = jobs.Begin(folder, size, self._models, os.getpid(), *self._log, drops=heard)
        with contextlib.suppress(OSError):  # nicer than that already: no user may take it back
            os.setpriority(os.PRIO_PROCESS, process.pid, limits.PLANNING_NICE)
        with contextlib.suppress(OSError):  # it has ended already, as will be seen
            jobs.write(process.stdin, begin)
        return process, drops


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it and what it has started, which may be at work in a folder that is to be swept."""
    if process.returncode is None:
        end_session(process.pid)
    process.wait()
