"""What the kernel grants this process of its machine: processor quota and memory (cgroup v1, v2).

A container's or a lab device's limits are its group's or one of its parents'; the machine's own
numbers are only what they are cut from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from meshinfer import limits

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_UNLIMITED_BYTES = 1 << 60
LOOK_S = 1.0
"""From one look at a quota that may change to the next."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Processors granted: ``cores`` (may be a fraction) in every ``period_s``."""

    cores: float
    period_s: float


def cpu_quota(root: Path = CGROUPS, own: Path = OWN) -> Quota | None:
    """The tightest processor quota that holds here; None without one."""
    found = [q for folder in _folders("cpu", root, own) if (q := _quota(folder)) is not None]
    return min(found, key=lambda q: q.cores, default=None)


class Lasting:
    """How long a task takes on a device that goes on computing, by its processor time.

    Who has rested has more of its quota left and does a short task faster than it could do many: a
    device with 0.35 of a processor that waited for a slow one was seen to take 0.45 of the time. As
    a pace that would be wrong the moment that it gets more to do.
    ``threads`` of the engine, all as busy as the one whose time is told; the quota is looked at now
    and then, for it may change.
    """

    def __init__(self, threads: int, look: Callable[[], Quota | None] | None = None) -> None:
        self._threads, self._look = threads, look or cpu_quota
        self._times, self._next_look = 1.0, 0.0

    def seconds(self, cpu_s: float, now: float) -> float:
        """``cpu_s``: of one of the threads."""
        if now >= self._next_look:
            quota = self._look()
            self._times = 1.0 if quota is None else max(1.0, self._threads / quota.cores)
            self._next_look = now + LOOK_S
        return cpu_s * self._times


def memory_limit(root: Path = CGROUPS, own: Path = OWN) -> int:
    """Bytes that this process and what it starts may have: the machine's, or a group's if less."""
    limits = [psutil.virtual_memory().total]
    for folder in _folders("memory", root, own):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):  # above high it crawls
            value = _number(_read(folder / name))
            if value is not None and 0 < value < _UNLIMITED_BYTES:
                limits.append(value)
    return min(limits)


def memory_left(limit: int) -> int:
    """Bytes of a limit that this process has not taken itself: its code and its libraries."""
    return max(0, limit - int(psutil.Process().memory_info().rss))


def memory_for_shares(has: int) -> int:
    """Bytes that models may take of what a worker has. Never 0, which means that nobody said: who
    has no room grants one byte."""
    return max(1, has - limits.WORKER_BYTES)


def _quota(folder: Path) -> Quota | None:
    both = _read(folder / "cpu.max").split()
    if len(both) == 2:
        most, period = _number(both[0]), _number(both[1])
    else:
        most = _number(_read(folder / "cpu.cfs_quota_us"))
        period = _number(_read(folder / "cpu.cfs_period_us"))
    if most is None or period is None or most <= 0 or period <= 0:
        return None
    return Quota(most / period, period * 1e-6)


def _folders(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Folders of our group and its parents, of both versions; the mount's root where a namespace
    hides our own."""
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = (
            [root / controller, root / controllers] if controllers else [root, root / "unified"]
        )
        for mount in mounts:
            parts = Path(path.lstrip("/")).parts
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield folder


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
