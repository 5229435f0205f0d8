"""Which of many ZeroMQ sockets have something to say: asks only those of which that is not known.

``zmq_poll`` asks each of its sockets twice a wait, at two system calls each: a device of a plan on
six devices has sixteen, and spent a fifth of its loop's processor time there. A socket's descriptor
is readable while it has commands to process, so the kernel tells which to ask. But a send processes
them too, and then a message may be there of which the descriptor says no more: such a socket is *in
doubt*, and asked before the next wait.
"""

from __future__ import annotations

import math
import selectors
from typing import Final

import zmq

from cluster.sockets import POLLIN, Socket, events_of
from cluster.waking import Waker

_POLLOUT: Final = int(zmq.POLLOUT)


class Readiness:
    """Of one thread, which owns the sockets. ``waker``: ends a wait from any other."""

    def __init__(self, waker: Waker) -> None:
        self._waker = waker
        self._selector = selectors.DefaultSelector()
        self._selector.register(waker.heard, selectors.EVENT_READ, None)
        self._doubted: set[Socket] = set()
        self._full: set[Socket] = set()
        self.woken = False

    def add(self, socket: Socket) -> None:
        self._selector.register(int(socket.getsockopt(zmq.FD)), selectors.EVENT_READ, socket)
        self._doubted.add(socket)

    def remove(self, socket: Socket) -> None:
        """Before it is closed."""
        self._selector.unregister(int(socket.getsockopt(zmq.FD)))
        self._doubted.discard(socket)
        self._full.discard(socket)

    def doubt(self, *sockets: Socket) -> None:
        """They were sent by, or not read to their end."""
        self._doubted.update(sockets)

    def await_room(self, socket: Socket, *, full: bool) -> None:
        """Whether a wait also ends when it can be sent by again."""
        (self._full.add if full else self._full.discard)(socket)

    def wait(self, timeout_s: float) -> set[Socket]:
        """Those that may have something to say, after waiting for one. They have to be read until
        they have no more, or doubted. ``woken``: whether the waker ended it."""
        found: set[Socket] = set()
        room = False
        for each in self._doubted | self._full if self._full else self._doubted:
            events = events_of(each)
            if events & POLLIN:
                found.add(each)
            if events & _POLLOUT and each in self._full:
                room = True
        self._doubted.clear()
        wait_s = 0.0 if found or room else math.ceil(timeout_s * 1000) / 1000
        self.woken = False
        for key, _ in self._selector.select(wait_s):
            if key.data is None:
                self._waker.hear()
                self.woken = True
            else:
                found.add(key.data)
        return found

    def close(self) -> None:
        self._selector.close()
        self._waker.close()
