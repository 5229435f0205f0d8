"""Tells systemd that a daemon is ready, alive, and what it does: sd_notify(3), without a library.

A daemon says ``enable``; in any other process, and without a service manager, the rest does
nothing. Until it is ready it asks for more time to start, time and again; from then on it feeds the
watchdog. Both stop as soon as one of the loops that it named is silent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

VARIABLE = "NOTIFY_SOCKET"
_WATCHDOG = "WATCHDOG_USEC"
_STARTING_EVERY_S, _START_S = 5.0, 60
_A_WATCHDOG = 3.0
"""How often it is fed within its time."""


class Manager:
    """The service manager at the other end. ``parts``: the loops that all have to be alive.

    ``every_s``: how often it is told. Any thread may tell; one a part.
    """

    def __init__(self, address: str, every_s: float, parts: Sequence[str]) -> None:
        self._address, self._every_s = address, every_s
        self._beats = dict.fromkeys(parts, 0.0)
        self._due, self._status, self._ready = 0.0, "", False

    def alive(self, part: str, status: str, ready: bool, now: float) -> None:
        """As ``alive`` below, at a time."""
        self._beats[part] = now
        lines = []
        if status and status != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        if ready and not self._ready:
            self._ready, self._due = True, 0.0
            lines.append("READY=1")
        living = all(now - beat <= self._every_s for beat in self._beats.values())
        if now >= self._due and (living or not self._ready):
            self._due = now + self._every_s / 2  # as two beats and a look may miss each other
            lines.append("WATCHDOG=1")
            if not self._ready:
                lines.append(f"EXTEND_TIMEOUT_USEC={_START_S * 1_000_000}")
        if lines:
            self.say(lines)

    def say(self, lines: Sequence[str]) -> None:
        """One datagram. If nobody takes it, the service manager will draw its conclusions."""
        import socket  # only where there is somebody to tell

        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end,
        ):
            end.setblocking(False)
            end.sendto("\n".join(lines).encode(), address)


_manager: Manager | None = None


def enable(parts: Sequence[str] = ("loop",), *, of_another: bool = False) -> None:
    """This process is the daemon that the service manager has started, or that one's child.

    ``of_another``: no, another program has started it. What it and its children say is not of that
    program's service.
    """
    global _manager
    if of_another:
        for name in (VARIABLE, _WATCHDOG, "WATCHDOG_PID"):
            os.environ.pop(name, None)
    address, microseconds = os.environ.get(VARIABLE, ""), os.environ.get(_WATCHDOG, "")
    every_s = _STARTING_EVERY_S
    if microseconds.isdecimal() and int(microseconds):
        every_s = min(every_s, int(microseconds) * 1e-6 / _A_WATCHDOG)
    _manager = Manager(address, every_s, parts) if address.startswith(("/", "@")) else None


def alive(status: str = "", *, ready: bool = False, part: str = "loop") -> None:
    """This part is still at work; ``status`` says at what, and ``ready`` that the service is up."""
    if _manager is not None:
        _manager.alive(part, status, ready, time.monotonic())


def stopping(why: str = "draining") -> None:
    """It is about to end."""
    if _manager is not None:
        _manager.say(("STOPPING=1", f"STATUS={why}"))
