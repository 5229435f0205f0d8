"""Small facts about processes: why one ended, not outliving its starter, one a state folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from meshinfer.errors import ConfigurationError

_POLL_S = 0.2
_END_POLL_S = 0.005
_END_S = 10.0


_OUTSIDERS = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
"""Signals that no fault of a program sends it."""


def cause_of(returncode: int, oom_before: int) -> str:
    """Why a child ended, in words: its exit code, its signal, or the kernel for want of memory."""
    if returncode >= 0:
        return f"exit code {returncode}"
    name = signal.Signals(-returncode).name
    if -returncode == signal.SIGKILL and oom_kills() > oom_before:
        return f"{name}, out of memory"
    return name


def was_killed(returncode: int, cause: str) -> bool:
    """Whether somebody else ended a child: a signal that is no fault of its own, and not for want
    of memory."""
    return -returncode in _OUTSIDERS and "out of memory" not in cause


def oom_kills(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How many processes the kernel has killed for want of memory, in our cgroup or at all.

    A group of our own is asked first (v2, then v1): another's end is not ours.
    """
    paths = []
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                paths.append(groups / group.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                paths.append(groups / "memory" / group.lstrip("/") / "memory.oom_control")
                paths.append(groups / "memory" / "memory.oom_control")  # a namespace hides ours
    for path in (*paths, groups / "memory.events", Path("/proc/vmstat")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return 0


def watch_parent(parent: int, on_orphaned: Callable[[], None]) -> None:
    """Call back when the process that started us is gone: we have another parent than ``parent``.

    Its id is given, since it may be gone before we ask.
    """

    def watch() -> None:
        # A descriptor costs nothing until it tells; five looks a second by each process of an idle
        # device were a hundredth of a quarter of a processor. Kernels before 5.3 have none.
        with contextlib.suppress(OSError):
            process = os.pidfd_open(parent)
            if os.getppid() == parent:  # else it is gone, and its id may be another's
                told = select.poll()
                told.register(process, select.POLLIN)
                told.poll()
            os.close(process)
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        on_orphaned()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def end_session(session: int) -> None:
    """Kill all processes of a session, in whatever groups, and wait for their ends.

    Its leader must not have been waited for: then its id might be another's by now.
    """
    import psutil

    until = time.monotonic() + _END_S
    while time.monotonic() < until:
        living = 0
        for process in psutil.process_iter():  # again: they may have forked meanwhile
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                    living += 1
                    os.kill(process.pid, signal.SIGKILL)
        if not living:
            return
        time.sleep(_END_POLL_S)


def _check_owner(folder: Path) -> None:
    """Whoever may put a file in place of one there admits whom they like."""
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o002:
        raise ConfigurationError(
            f"the folder {folder} is another user's, or all may write in it",
            hint=f"chmod 700 {folder}, or choose another state folder with --state-dir",
        )


def open_more(descriptors: int) -> int:
    """Let this process open so many, as far as the system does; how many of them it may. The soft
    limit is often 1024, and once it is reached libzmq tries again for ever to take the next
    connection. Where the system allows fewer, the log says so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= descriptors:
        return descriptors
    most = descriptors if hard == resource.RLIM_INFINITY else min(descriptors, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        most = soft  # it goes on with what it has
    if most < descriptors:
        structlog.get_logger().warning(
            "this process may open fewer files than a full cluster needs",
            may=most,
            needs=descriptors,
            hint=f"allow more: LimitNOFILE={descriptors} in its unit, or `ulimit -Hn {descriptors}`"
            " as root before it starts; until then connections past that wait for ever",
        )
    return most


def hold_folder(folder: Path) -> int:
    """Make a state folder ours until this process ends; the lock's descriptor.

    Raises ``ConfigurationError`` when another process has it, or when it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(folder)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"cannot use the folder {folder}: {error.strerror}",
            hint="choose another state folder with --state-dir",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ConfigurationError(
            f"another process works in {folder}",
            hint="stop it, or give this one another --state-dir (or a worker another --name)",
        ) from error
    return lock
