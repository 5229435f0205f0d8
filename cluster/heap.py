"""What glibc does with memory that is given back, where its own choice costs too much.

One heap for all threads of a process that is to live for months, and nothing large in it:

glibc gives each thread a heap of its own (an *arena*, mallopt(3)), and each keeps the most that it
ever held, in pieces between small things that stay. Where one large block was given back, larger
ones than that are no longer pages of their own but lie in the heap (M_MMAP_THRESHOLD is dynamic):
small things settle in the gaps that pieces of tensors and tables of ids leave, and the next large
one needs new room. glibc reads its variables as a process begins, so who wants others begins anew.

And large blocks that are used again, while a worker prepares one task after another (``Room``).
"""

from __future__ import annotations

import ctypes
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


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h, for mallopt(3)
_NEVER = 2**31 - 1
_USUAL = 32 << 20
"""Larger blocks than that are always pages of their own, unless mallopt says otherwise."""


class Room:
    """Where this process prepares models: what one leaves is kept for the next, until given back.

    A convolution's weights of 38 MB, which onnxruntime holds four times over while it optimises,
    are new pages each time otherwise: of 0.20 s of processor time 0.17 s were the kernel's, and
    with the last one's pages it was 0.05 to 0.11 s. ``memory_bytes`` that models may take: a
    twelfth of it is the largest block that is kept, so four of them are a third. Made before the
    process has threads; where the user has chosen how memory is kept, or another libc does it,
    nothing is done.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._largest = max(_USUAL, min(_NEVER, memory_bytes // 12))
        self._libc: ctypes.CDLL | None = None
        chosen = any(n.startswith("MALLOC_") or n == "GLIBC_TUNABLES" for n in os.environ)
        if sys.platform == "linux" and not chosen:
            libc = ctypes.CDLL(None)
            if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")):
                libc.mallopt(_ARENA_MAX, 1)  # heaps of other threads have 64 MB, and end with them
                self._libc = libc

    def keep(self) -> None:
        """From here on."""
        self._set(self._largest, _NEVER)

    def give_back(self) -> None:
        """To the system: all that is free now, and what will be as glibc does it once a block of
        32 MB was given back."""
        self._set(_USUAL, 2 * _USUAL)
        if self._libc is not None:
            self._libc.malloc_trim(0)

    def _set(self, largest: int, free: int) -> None:
        if self._libc is not None:
            if not self._libc.mallopt(_MMAP_THRESHOLD, largest):  # glibc before 2.36 refuses more
                self._libc.mallopt(_MMAP_THRESHOLD, _USUAL)
            self._libc.mallopt(_TRIM_THRESHOLD, free)
