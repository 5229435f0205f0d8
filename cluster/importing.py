"""Lets onnxruntime work on a user's model in a process of its own: what it does there ends as a
graph or as a typed error, whether it refuses the model, crashes, hangs or wants all memory.

One process stays and has everything loaded (0.8 s); it forks for each model (10 ms). The fork is
bound in memory, file size and time by the kernel, and ends with its starter.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec

from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, InvalidInput
from meshinfer.importers.blocked import Blocked
from meshinfer.protocol.codec import error_of, failure_of
from meshinfer.protocol.messages import Failure

_ANSWER = "answer.json"


class _Job(msgspec.Struct, frozen=True):
    folder: str
    weights: str


class _Answer(msgspec.Struct, frozen=True):
    blocked: Blocked | None = None
    failure: Failure | None = None


class Importer:
    """``meshinfer.importers.optimise.Optimise`` in another process. Owned by one thread."""

    def __init__(self) -> None:
        self._closed = False
        self._process = self._start()

    def __call__(self, folder: Path, weights: Path) -> Blocked:
        """Raises ``InvalidInput`` for a model that is refused or too much, ``ClusterUnavailable``
        when closed."""
        job = _Job(str(folder), str(weights))
        status = self._ask(job)
        if status is None and not self._closed:  # killed by somebody
            self._reap()
            self._process = self._start()
            status = self._ask(job)
        if status is None:
            raise ClusterUnavailable(
                "the process that imports models has ended", hint="start the coordinator again"
            )
        try:
            answer = msgspec.json.decode((folder / _ANSWER).read_bytes(), type=_Answer)
        except (OSError, msgspec.MsgspecError):
            raise _crashed(status) from None
        if answer.failure is not None:
            raise error_of(answer.failure)
        assert answer.blocked is not None
        return answer.blocked

    def close(self) -> None:
        """End the process, and what it works on; from any thread."""
        self._closed = True
        self._reap()

    def _reap(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.importing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for its starter, which ends it; who ends that can still find its session.
            process_group=0,
        )

    def _ask(self, job: _Job) -> int | None:
        """How the fork ended (``os.waitpid``); None if nobody is there to fork."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(job) + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError):  # it is gone, or closed
            line = b""
        return int(line) if line else None


def _crashed(status: int) -> InvalidInput:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGALRM:
        return InvalidInput(
            f"onnxruntime works on the model for more than {limits.IMPORT_S:g} s",
            hint="look for huge sizes in its constants and attributes",
        )
    how = signal.Signals(number).name if number else "without a word"
    return InvalidInput(
        f"onnxruntime crashes on the model ({how})",
        hint="check it with onnx.checker, and load it in plain onnxruntime",
    )


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Fork for each job until there are no more, or nobody is left who waits for it."""
    from meshinfer.importers.optimise import optimise as optimise  # for all forks at once

    for line in requests:
        job = msgspec.json.decode(line, type=_Job)
        over, kept_open = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _run(job)
            finally:
                os._exit(0)
        os.close(kept_open)  # the fork's alone now: closed when it ends, in whatever way
        left = _is_left(requests, over)
        if left:
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if left:
            return
        os.close(over)
        answers.write(b"%d\n" % status)
        answers.flush()


def _is_left(requests: IO[bytes], over: int) -> bool:
    """Wait for the end of a fork; whether who asks has ended before it."""
    ends = select.poll()
    ends.register(over, select.POLLIN)
    ends.register(requests, 0)  # only that its other end is closed
    return over not in dict(ends.poll())


def _run(job: _Job) -> None:
    from meshinfer.importers.optimise import optimise

    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # onnxruntime prints; the streams carry jobs
        os.dup2(nothing, stream)
    folder, weights = Path(job.folder), Path(job.weights)
    try:
        _bound(folder)
        answer = _Answer(optimise(folder, weights))
    except MemoryError:
        failure = InvalidInput(
            "onnxruntime wants too much memory for the model",
            hint="look for huge sizes in its constants and attributes",
        )
        answer = _Answer(failure=failure_of(failure))
    except Exception as error:
        answer = _Answer(failure=failure_of(error))
    part = folder / f"{_ANSWER}.part"
    part.write_bytes(msgspec.json.encode(answer))
    part.rename(folder / _ANSWER)


def _bound(folder: Path) -> None:
    from meshinfer.importers.optimise import weights_nbytes

    nbytes = weights_nbytes(folder)
    most = limits.IMPORT_BYTES + limits.IMPORT_COPIES * nbytes
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (most, most))
    signal.alarm(int(limits.IMPORT_S + nbytes / limits.IMPORT_BYTES_PER_S))


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
