"""A TCP connection that libzmq holds, by the number of its descriptor: looked at, and ended.

The number may be another's at any time, of this program or of who uses us. So a connection is known
by both its ends, and one whose ends are others is never touched.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# Where a connection has only few packets under way, as with most of our messages, one that is lost
# time and again is resent every 200 ms, not after 200, 400, 800 ms (RFC 6298 doubles; Linux,
# Documentation/networking/tcp-thin.txt). All that comes behind it waits for it.
_TCP_THIN_LINEAR_TIMEOUTS: Final = 16
_BYTES_RECEIVED_AT: Final = 128  # tcpi_bytes_received of struct tcp_info (linux/tcp.h)
_SILENT_BYTES: Final = 64 * 1024  # acknowledgements and heartbeats are less, tensors are more

Ends = tuple[tuple[str, int], tuple[str, int]]


@dataclass(slots=True, eq=False)
class Connection:
    """``ends``: our address and theirs; None: it had gone before it was looked at.
    ``spoiled``: we ended it."""

    number: int
    ends: Ends | None
    spoiled: bool = False
    _received: int = -1

    @classmethod
    def at(cls, number: int) -> Connection:
        """One that has just come about."""
        made = cls(number, None)
        with _open(number) as found, contextlib.suppress(OSError):
            if found is not None and found.family == socket.AF_INET:
                made.ends = (found.getsockname(), found.getpeername())
                found.setsockopt(socket.IPPROTO_TCP, _TCP_THIN_LINEAR_TIMEOUTS, 1)
        return made

    def hosts(self) -> tuple[str, str]:
        """Their address and ours, without the ports; empty where nobody knows."""
        return ("", "") if self.ends is None else (self.ends[1][0], self.ends[0][0])

    def is_bound_to(self, port: int) -> bool:
        """Whether our end is at this port."""
        return self.ends is not None and self.ends[0][1] == port

    def end(self, *, if_silent: bool = False) -> None:
        """Shut it down; libzmq's I/O thread then closes it. ``if_silent``: only if next to nothing
        has come by it since this was last asked: what would have been said by now may stand behind
        much else, and that would begin again from its first byte."""
        with _open(self.number) as found, contextlib.suppress(OSError, struct.error):
            if found is None or self.spoiled or not self._is(found):
                return
            if if_silent and not self._is_silent(found):
                return
            found.shutdown(socket.SHUT_RDWR)
            self.spoiled = True

    def _is_silent(self, found: socket.socket) -> bool:
        """The first time not: nothing is known of before."""
        before = self._received
        told = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED_AT + 8)
        (self._received,) = struct.unpack_from("=Q", told, _BYTES_RECEIVED_AT)
        return before >= 0 and self._received - before < _SILENT_BYTES

    def _is(self, found: socket.socket) -> bool:
        return (found.getsockname(), found.getpeername()) == self.ends


@contextlib.contextmanager
def _open(number: int) -> Iterator[socket.socket | None]:
    found: socket.socket | None = None
    with contextlib.suppress(OSError):
        own = os.dup(number)
        try:
            found = socket.socket(fileno=own)
        except OSError:
            os.close(own)
    try:
        yield found
    finally:
        if found is not None:
            found.close()
