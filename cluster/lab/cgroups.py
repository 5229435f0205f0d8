"""Control groups of a lab: CPU quota, memory limit and what was used, on cgroup v1 or v2.

A lab has a folder ``mi-NAME`` at the root of each hierarchy, with a group per device, and one
without limits for what only looks on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from meshinfer.errors import ConfigurationError

FREE: Final = "free"
"""The group without limits."""

SHORTEST_QUOTA_US: Final = 1000  # the kernel's
_LONG_PERIOD_US: Final = 4000
_REMOVE_S: Final = 10.0
_POLL_S: Final = 0.01
_SOON_S: Final = 0.0005


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """CPU seconds; bytes now, at the peak since ``reset_peak``, and now by kind; kernel's kills."""

    cpu_s: float
    memory_bytes: int
    peak_memory_bytes: int
    anonymous_bytes: int
    file_bytes: int
    oom_kills: int


class Cgroups(Protocol):
    """What both versions can do. Each raises ``ConfigurationError`` when the kernel refuses."""

    version: int

    def create(self, lab: str, group: str) -> None: ...
    def folders(self, lab: str, group: str = "") -> list[Path]: ...
    def set_cpu(self, lab: str, group: str, cores: float | None) -> None: ...
    def set_memory(self, lab: str, group: str, nbytes: int | None) -> None: ...
    def set_weight(self, lab: str, devices: int) -> None: ...
    def usage(self, lab: str, group: str) -> GroupUsage: ...
    def reset_peak(self, lab: str, group: str) -> None: ...


def quota_us(cores: float) -> tuple[int, int]:
    """(quota, period) in microseconds: the shortest sleep that the kernel allows for this share.

    Below one core the quota is its minimum, 1 ms, so that at 1/4 core a device sleeps 3 ms.
    """
    if cores >= 1:
        return round(_LONG_PERIOD_US * cores), _LONG_PERIOD_US
    return SHORTEST_QUOTA_US, round(SHORTEST_QUOTA_US / cores)


class CgroupsV1:
    """Controllers in hierarchies of their own; ``roots`` has cpu, cpuacct and memory."""

    version = 1

    def __init__(self, roots: dict[str, Path]) -> None:
        self._roots = roots

    def create(self, lab: str, group: str) -> None:
        for folder in self.folders(lab, group):
            _make(folder)

    def folders(self, lab: str, group: str = "") -> list[Path]:
        """Of a group in each hierarchy, or of the lab; cpu and cpuacct may be mounted as one."""
        return [root / _named(lab) / group for root in dict.fromkeys(self._roots.values())]

    def set_cpu(self, lab: str, group: str, cores: float | None) -> None:
        folder = self._folder("cpu", lab, group)
        _write(folder / "cpu.cfs_quota_us", -1)  # or the old quota could be wrong for a new period
        if cores is not None:
            quota, period = quota_us(cores)
            _write(folder / "cpu.cfs_period_us", period)
            _write(folder / "cpu.cfs_quota_us", quota)

    def set_memory(self, lab: str, group: str, nbytes: int | None) -> None:
        folder = self._folder("memory", lab, group)
        limit = -1 if nbytes is None else nbytes
        both = folder / "memory.memsw.limit_in_bytes"  # else what is over goes to swap
        if both.exists():
            _write(both, -1)  # never below the other one
        _write(folder / "memory.limit_in_bytes", limit)
        if both.exists():
            _write(both, limit)

    def set_weight(self, lab: str, devices: int) -> None:
        """Against what else runs here, each device counts as a process, not all of them as one."""
        _write(self._folder("cpu", lab, "") / "cpu.shares", 1024 * devices)

    def usage(self, lab: str, group: str) -> GroupUsage:
        memory = self._folder("memory", lab, group)
        stat = _table(memory / "memory.stat")
        return GroupUsage(
            cpu_s=int(_read(self._folder("cpuacct", lab, group) / "cpuacct.usage")) / 1e9,
            memory_bytes=int(_read(memory / "memory.usage_in_bytes")),
            peak_memory_bytes=int(_read(memory / "memory.max_usage_in_bytes")),
            anonymous_bytes=stat["total_rss"],
            file_bytes=stat["total_cache"],
            oom_kills=_table(memory / "memory.oom_control").get("oom_kill", 0),
        )

    def reset_peak(self, lab: str, group: str) -> None:
        _write(self._folder("memory", lab, group) / "memory.max_usage_in_bytes", 0)

    def _folder(self, controller: str, lab: str, group: str) -> Path:
        return self._roots[controller] / _named(lab) / group


class CgroupsV2:
    """One hierarchy for all controllers."""

    version = 2

    def __init__(self, root: Path) -> None:
        self._root = root
        self._peaks: dict[tuple[str, str], int] = {}  # descriptors: a reset holds for one only

    def create(self, lab: str, group: str) -> None:
        above = self._root / _named(lab)
        _make(above)
        for folder in (self._root, above):
            _write(folder / "cgroup.subtree_control", "+cpu +memory")
        _make(above / group)

    def folders(self, lab: str, group: str = "") -> list[Path]:
        """Of a group, or of the lab."""
        return [self._root / _named(lab) / group]

    def set_cpu(self, lab: str, group: str, cores: float | None) -> None:
        quota, period = ("max", 100_000) if cores is None else quota_us(cores)
        _write(self._folder(lab, group) / "cpu.max", f"{quota} {period}")

    def set_memory(self, lab: str, group: str, nbytes: int | None) -> None:
        folder = self._folder(lab, group)
        _write(folder / "memory.max", "max" if nbytes is None else nbytes)
        swap = folder / "memory.swap.max"
        if swap.exists():
            _write(swap, "max" if nbytes is None else 0)

    def set_weight(self, lab: str, devices: int) -> None:
        """Against what else runs here, each device counts as a process, not all of them as one."""
        _write(self._folder(lab, "") / "cpu.weight", min(100 * devices, 10_000))

    def usage(self, lab: str, group: str) -> GroupUsage:
        folder = self._folder(lab, group)
        stat = _table(folder / "memory.stat")
        opened = self._peaks.get((lab, group))
        peak = _read(folder / "memory.peak") if opened is None else os.pread(opened, 64, 0)
        return GroupUsage(
            cpu_s=_table(folder / "cpu.stat")["usage_usec"] / 1e6,
            memory_bytes=int(_read(folder / "memory.current")),
            peak_memory_bytes=int(peak),
            anonymous_bytes=stat["anon"],
            file_bytes=stat["file"],
            oom_kills=_table(folder / "memory.events").get("oom_kill", 0),
        )

    def reset_peak(self, lab: str, group: str) -> None:
        """Needs Linux 6.12, where a peak is reset for the descriptor that asked."""
        path = self._folder(lab, group) / "memory.peak"
        try:
            if (lab, group) not in self._peaks:
                self._peaks[lab, group] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            os.write(self._peaks[lab, group], b"0\n")
        except OSError as error:
            raise ConfigurationError(
                f"cannot reset {path}: {error.strerror}",
                hint="that takes Linux 6.12; make a new lab instead",
            ) from error

    def _folder(self, lab: str, group: str) -> Path:
        return self._root / _named(lab) / group

    def __del__(self) -> None:
        for opened in self._peaks.values():
            with suppress(OSError):
                os.close(opened)


def find_cgroups(mounts: str | None = None) -> Cgroups:
    """The version that has the CPU and memory controllers here and can be written to.

    ``mounts``: instead of /proc/self/mounts. Raises ``ConfigurationError`` if there is none.
    """
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    first: dict[str, Path] = {}
    for line in text.splitlines():
        _, where, kind, options = line.split()[:4]
        path = Path(where.replace("\\040", " "))
        if kind == "cgroup2" and os.access(path, os.W_OK):
            controllers = path / "cgroup.controllers"
            if controllers.exists() and {"cpu", "memory"} <= set(_read(controllers).split()):
                return CgroupsV2(path)
        if kind == "cgroup" and os.access(path, os.W_OK):
            for controller in {"cpu", "cpuacct", "memory"} & set(options.split(",")):
                first.setdefault(controller, path)
    if first.keys() >= {"cpu", "cpuacct", "memory"}:
        return CgroupsV1(first)
    raise ConfigurationError(
        "no control groups for CPU and memory can be written to here",
        hint="in a container, start it with --privileged and --cgroupns=host",
    )


def entering(folders: Sequence[Path]) -> list[str]:
    """A command's beginning: what follows runs in these groups from its first instruction on."""
    script = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 126; shift; done; shift; exec "$@"'
    return ["sh", "-c", script, "sh", *(str(folder / "cgroup.procs") for folder in folders), "--"]


def wait_until_in(folders: Sequence[Path], process: subprocess.Popen) -> None:
    """Until a process that began with ``entering`` is in the last of the groups, or has ended."""
    deadline = time.monotonic() + _REMOVE_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if str(process.pid) in _read(folders[-1] / "cgroup.procs").split():
                return
        time.sleep(_SOON_S)


def processes(groups: Cgroups, lab: str) -> dict[str, list[int]]:
    """Ids of the living processes in a lab by group; empty for a lab that is gone."""
    found: dict[str, set[int]] = {}
    for folder in groups.folders(lab):
        for path in sorted(folder.glob("*/cgroup.procs")):
            with suppress(FileNotFoundError):
                ids = found.setdefault(path.parent.name, set())
                ids.update(int(word) for word in _read(path).split())
    return {group: sorted(ids) for group, ids in found.items()}


def remove(groups: Cgroups, lab: str) -> None:
    """Kill what runs in a lab, then remove its groups; nothing to do for one that is gone."""
    for group in processes(groups, lab):
        with suppress(ConfigurationError):
            groups.set_cpu(lab, group, None)  # dying takes CPU, too
    deadline = time.monotonic() + _REMOVE_S
    while not _try_remove(groups, lab):
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"processes of lab {lab} do not end: {processes(groups, lab)}",
                hint="look at them with ps, then try again",
            )
        time.sleep(_POLL_S)


def _try_remove(groups: Cgroups, lab: str) -> bool:
    for ids in processes(groups, lab).values():
        for pid in ids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    done = True
    for folder in groups.folders(lab):
        for path in (*folder.glob("*/"), folder):
            try:
                path.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                done = False
    return done


def _named(lab: str) -> str:
    return f"mi-{lab}"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, error) from error


def _read(path: Path) -> str:
    return path.read_text()


def _table(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in _read(path).splitlines())}


def _write(path: Path, value: str | int) -> None:
    try:
        path.write_text(f"{value}\n")
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"the kernel refuses {path}: {error.strerror}",
        hint="a lab needs control groups of its own at the root of their hierarchy",
    )
