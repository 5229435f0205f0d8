"""Judges one machine: its engine and its disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshinfer import limits
from meshinfer.doctor.finding import Finding, ok, problem, warning
from meshinfer.errors import ConfigurationError

_MB = 1_000_000


@dataclass(frozen=True, slots=True)
class EngineRun:
    """What a process that tried the engine came to. ``reached``: what it did last; ``ended``: why
    it ended before it was done, as a supervisor says it, else empty; ``text``: its last words."""

    reached: str
    ended: str
    text: str
    processor: str


def judge_engine(run: EngineRun) -> Finding:
    if not run.ended:
        return ok("engine", f"{run.text} computes on this processor ({run.processor})")
    what = f"the engine died with {run.ended} at {run.reached}, in a process of its own"
    if run.ended.startswith(("SIGILL", "SIGTRAP")):
        return problem(
            "engine",
            ConfigurationError,
            f"{what}: this processor ({run.processor}) lacks an instruction that it was built for",
            "install another release: pip install 'onnxruntime<VERSION' with the one before; on a "
            "Raspberry Pi use the 64-bit system; or let this device be a client only",
        )
    if "out of memory" in run.ended:
        return problem(
            "engine",
            ConfigurationError,
            what,
            "the kernel had no memory for it: stop other programs, or raise the group's limit",
        )
    said = f": {run.text}" if run.text else ""
    return problem(
        "engine",
        ConfigurationError,
        f"{what}{said}",
        "install it again: pip install --force-reinstall onnxruntime numpy",
    )


@dataclass(frozen=True, slots=True)
class Room:
    """Of a folder: bytes that are free, and why writing and syncing a small file failed."""

    what: str
    folder: str
    free_bytes: int
    failure: str


def judge_room(rooms: Sequence[Room]) -> Finding:
    for room in rooms:
        where = f"{room.what} {room.folder}"
        if room.failure:
            return problem(
                "disk",
                ConfigurationError,
                f"cannot write to the {where}: {room.failure} ({_size(room.free_bytes)} free)",
                "make room or mend its permissions; or choose another with --state-dir, "
                "$MESHINFER_STATE_DIR or $TMPDIR",
            )
    low = min(rooms, key=lambda room: room.free_bytes)
    if low.free_bytes < limits.DISK_LOW_BYTES:
        return warning(
            "disk",
            f"only {_size(low.free_bytes)} are free for the {low.what} {low.folder}",
            "weights of models are kept there: make room, or choose another folder with "
            "--state-dir, $MESHINFER_STATE_DIR or $TMPDIR",
        )
    return ok("disk", f"{_size(low.free_bytes)} are free, and writing works")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1000 / _MB:.1f} GB" if nbytes >= 1000 * _MB else f"{nbytes / _MB:.1f} MB"
