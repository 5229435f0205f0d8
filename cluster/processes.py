"""Small facts about processes: why one ended, and not outliving the one that started us."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.5


def cause_of(returncode: int, oom_before: int) -> str:
    """Why a child ended, in words: its exit code, its signal, or the kernel for want of memory."""
    if returncode >= 0:
        return f"exit code {returncode}"
    name = signal.Signals(-returncode).name
    if -returncode == signal.SIGKILL and oom_kills() > oom_before:
        return f"{name}, out of memory"
    return name


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory, in our cgroup or at all."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return 0


def watch_parent(on_orphaned: Callable[[], None]) -> None:
    """Call back when the process that started us is gone (we have another parent)."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        on_orphaned()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
