"""Measures this device in a process of its own: what the engine takes for that, the worker would
hold for ever (11 MB)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from cluster import processes, profiler, telemetry


class _Asked(msgspec.Struct, frozen=True):
    folder: str
    engine: str
    threads: int
    plaintext: bool
    log_level: str
    log_form: str
    parent: int


def measured_apart(
    folder: Path, engine: str, threads: int, *, plaintext: bool, log_level: str, log_form: str
) -> profiler.Measured:
    """As ``profiler.measured_once``. If the measuring process dies, this one ends as it did, so
    that the supervisor sees why."""
    asked = _Asked(str(folder), engine, threads, plaintext, log_level, log_form, os.getpid())
    command = [sys.executable, "-m", "cluster.measuring", msgspec.json.encode(asked).decode()]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode < 0:
        signal.signal(-done.returncode, signal.SIG_DFL)
        signal.raise_signal(-done.returncode)
    if done.returncode:
        raise SystemExit(done.returncode)
    return msgspec.json.decode(done.stdout, type=profiler.Measured)


def main(text: str) -> None:
    """``python -m cluster.measuring ASKED``: the numbers as JSON on stdout."""
    asked = msgspec.json.decode(text, type=_Asked)
    telemetry.configure(asked.log_level, asked.log_form, name="measuring")
    processes.watch_parent(asked.parent, lambda: os._exit(0))
    found = profiler.measured_once(
        Path(asked.folder), asked.engine, asked.threads, plaintext=asked.plaintext
    )
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main(sys.argv[1])
