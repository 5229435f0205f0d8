"""One heap for all threads of a process that is to live for months, and nothing large in it.

glibc gives each thread a heap of its own (an *arena*, mallopt(3)), and each keeps the most that it
ever held, in pieces between small things that stay. Where one large block was given back, larger
ones than that are no longer pages of their own but lie in the heap (M_MMAP_THRESHOLD is dynamic):
small things settle in the gaps that pieces of tensors and tables of ids leave, and the next large
one needs new room. glibc reads its variables as a process begins, so who wants others begins anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress

_MARK = "MESHINFER_ONE_HEAP"
ONE = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(64 << 10), _MARK: "1"}
"""For the environment of a process that is to have one heap."""


def environment_of(module: str) -> dict[str, str]:
    """Of a daemon that this process starts: a coordinator is to have one heap; which cluster this
    process itself uses is nothing to it."""
    own = {k: v for k, v in os.environ.items() if k != "MESHINFER_COORDINATOR"}
    return _told(own) if module == "cluster.coordinator" else own


def share_one() -> None:
    """Begin this process anew with one heap, unless it has been begun so, or its user has chosen
    how many: the same process, by its id, its arguments, and what it has open but for what Python
    opened. For the main thread, before anything is under way. What it starts later has as many
    heaps as if this process had never been told."""
    if sys.platform != "linux":
        return
    if _MARK in os.environ:
        for name in ONE:
            os.environ.pop(name, None)
    elif (told := _told(os.environ)) != os.environ:
        with suppress(OSError):  # with more heaps, then
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], told)


def _told(environment: Mapping[str, str]) -> dict[str, str]:
    """With ``ONE``, unless the user has chosen any of it."""
    return {**environment, **({} if ONE.keys() & environment.keys() else ONE)}
