"""The case in which the wall clock of all daemons jumps; the monotonic clock is the kernel's."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from chaos.arena import Run

JUMPS_S = (3600, -3600, 365 * 86400, -365 * 86400, 0)
_SOURCE = Path(__file__).resolve().parent / "inside" / "clock.c"
_FOLDER = Path(tempfile.gettempdir()) / f"meshinfer-chaos-clock-{os.getpid()}"


def environment() -> dict[str, str]:
    """Of daemons whose wall clock is moved by a file. Raises ``OSError`` without a C compiler."""
    _FOLDER.mkdir(exist_ok=True)
    library = _FOLDER / "clock.so"
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
    subprocess.run(command, check=True, timeout=60)
    _move(0)
    return {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(_FOLDER / "clock")}


def _move(seconds: int) -> None:
    """In place: the daemons have the file mapped."""
    clock = _FOLDER / "clock"
    with clock.open("r+b" if clock.exists() else "wb") as file:
        file.write(seconds.to_bytes(8, "little", signed=True))


def jumps(run: Run) -> None:
    """C22: the clock of all daemons jumps by an hour and by a year, both ways, and back."""
    requests = run.count(25, 200)
    run.deploy()
    run.calm(2 * requests, rate=5.0)
    for jump_s in JUMPS_S:
        _move(jump_s)
        run.fault("jump", by_s=jump_s, year=run.year())
        with run.load("faults", requests, rate=5.0):
            pass
    run.heal()
