"""Ends one thread's wait for its sockets, from any other thread."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Waker:
    """A socket pair, because the selectors of all systems take one; the lock keeps ``wake`` from
    writing to a descriptor that ``close`` gave back (reentrant: ``wake`` in a signal handler)."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._send, self.heard = socket.socketpair()
        self._send.setblocking(False)
        self.heard.setblocking(False)

    def wake(self) -> None:
        # full: it wakes anyway; closed: nobody waits
        with self._lock, suppress(OSError):
            self._send.send(b"\0")

    def hear(self) -> None:
        """That was why the wait ended."""
        self.heard.recv(4096)  # what is left over only wakes once more

    def close(self) -> None:
        with self._lock:
            self._send.close()
            self.heard.close()
