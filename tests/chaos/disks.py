"""The case in which the disk below the coordinator's journal is full, torn or read-only."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from chaos.arena import Run

RATE = 5.0
ROOM = 4 << 20
"""Bytes that the coordinator's disk has left, until something fills it."""


def disks(run: Run) -> None:
    """C14: the coordinator's folder is moved to a small disk, on which everything goes wrong."""
    requests = run.count(25, 100)
    run.deploy()
    run.calm(run.count(50, 200), rate=RATE)
    disk = Disk(run)
    try:
        disk.replace(run.cluster.state / "coordinator-before")
        _load(run, "moved", requests)
        filler = disk.folder / "filler"
        _fill(filler)
        run.fault("full")
        _load(run, "full", requests)
        filler.unlink()
        run.fault("room")
        _load(run, "room", requests)
        run.cluster.kill_coordinator()
        run.fault("torn", files=_tear(disk.folder))
        run.cluster.restart_coordinator()
        _load(run, "torn", requests)
        _command("mount", "-o", "remount,abort", str(disk.folder))  # as a dying SD card does
        run.fault("read-only")
        _load(run, "read-only", requests)
        disk.replace(run.cluster.state / "coordinator-read-only")
        run.fault("writable")
        _load(run, "writable", requests)
        run.heal()
    finally:
        disk.end()


class Disk:
    """An ext4 of its own below the coordinator's folder, anew each time it is replaced."""

    def __init__(self, run: Run) -> None:
        self._run, self.folder = run, run.cluster.state / "coordinator"
        self._mounted = False

    def replace(self, aside: Path) -> None:
        """Kill the coordinator, and start it on a copy of what it had on a new disk."""
        self._run.cluster.kill_coordinator()
        shutil.copytree(self.folder, aside, ignore=shutil.ignore_patterns("lost+found"))
        self._unmount()
        used = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
        image = aside.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(used * 5 // 4 + 2 * ROOM)
        _command("mkfs.ext4", "-q", "-m", "0", str(image))
        _command("mount", "-o", "loop", str(image), str(self.folder))
        self._mounted = True
        shutil.copytree(aside, self.folder, dirs_exist_ok=True)
        self._run.cluster.restart_coordinator()

    def end(self) -> None:
        """Back to the disk of everything else."""
        if self._mounted:
            self._run.cluster.kill_coordinator()
            self._unmount()
            self._run.cluster.restart_coordinator()

    def _unmount(self) -> None:
        if self._mounted:
            _command("umount", "--lazy", str(self.folder))
            self._mounted = False


def _load(run: Run, phase: str, requests: int) -> None:
    """And whether the coordinator is still the process that it was."""
    pid = run.cluster.coordinator_pid
    with run.load(phase, requests, rate=RATE, deadline_s=30.0):
        pass
    run.history.write("alive", phase=phase, same=run.cluster.runs(pid))
    run.log()


def _command(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=60)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def _tear(folder: Path) -> list[str]:
    """Cut the end off what was written last: of each log of SQLite's, else of each database."""
    logs = [path for path in folder.rglob("*-wal") if path.stat().st_size]
    torn = logs or [*folder.glob("*.sqlite*"), *folder.glob("*.db")]
    for path in torn:
        with path.open("r+b") as file:
            file.truncate(max(0, path.stat().st_size - 100))
    return [path.name for path in torn]
