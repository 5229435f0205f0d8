"""What the measured processes share: commands in, answers out, a JSON object a line; memory.

Also the other end: ``Peer``, by which the benchmark talks to such a process.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

_STOP_S = 10.0
_TAIL_BYTES = 2000


class Broken(Exception):
    """A measured process ended, was too slow, or reported an error."""


def take_stdout() -> TextIO:
    """The pipe to the benchmark; whatever libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, do: Callable[[dict[str, Any]], Any]) -> None:
    """Answer commands from stdin until it ends; an exception is an answer too."""
    for line in sys.stdin:
        try:
            answer = {"answer": do(json.loads(line))}
        except Exception as error:  # the benchmark says it, and fails
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def memory(pid: int | str = "self") -> tuple[int, int]:
    """Resident bytes of a process now, and at most since ``forget_peak``."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(rest.split()[0]) * 1024
    return found["VmRSS"], found["VmHWM"]


def forget_peak(pid: int | str = "self") -> None:
    """The peak of ``memory`` starts again from now (proc(5): clear_refs, 5)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Peer:
    """A process that answers commands. Use it as a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, name: str) -> None:
        self._process, self._log, self._name = process, log, name
        self._lines = self._read()

    def ask(self, command: dict[str, Any], timeout_s: float) -> Any:
        """The answer to a command. Raises ``Broken``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Broken(f"{self._name} has ended: {self._tail()}") from None
        return self.hear(timeout_s)

    def hear(self, timeout_s: float) -> Any:
        """The next answer. Raises ``Broken``."""
        self._deadline = time.monotonic() + timeout_s
        answer = json.loads(next(self._lines))
        if "error" in answer:
            raise Broken(f"{self._name}: {answer['error']}; {self._tail()}")
        return answer["answer"]

    def close(self) -> None:
        """End it: its stdin first, then SIGTERM, then SIGKILL."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        for stop in (None, self._process.terminate, self._process.kill):
            if stop is not None:
                stop()
            try:
                self._process.wait(timeout=_STOP_S)
                break
            except subprocess.TimeoutExpired:
                continue
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Iterator[bytes]:
        assert self._process.stdout is not None
        pipe, pending = self._process.stdout.fileno(), b""
        while True:
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                yield line
            left_s = self._deadline - time.monotonic()
            if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
                raise Broken(f"{self._name} did not answer in time: {self._tail()}")
            data = os.read(pipe, 1 << 20)
            if not data:
                raise Broken(f"{self._name} has ended: {self._tail()}")
            pending += data

    def _tail(self) -> str:
        try:
            text = self._log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            text = ""
        return f"its log ends with\n{text}" if text else "it wrote no log"
