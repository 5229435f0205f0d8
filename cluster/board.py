"""Reads how this board feels from sysfs, now and then: a few small files, no process, no root.

``vcgencmd`` is not asked: it needs /dev/vcio, which a service does not see, and tells no more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from meshinfer.protocol.board import Board, board_of

EACH_S = 5.0
_PROCESSOR = ("cpu", "soc", "x86_pkg_temp")


def read_board(root: Path = Path("/")) -> Board | None:
    """What the files under ``root``/sys tell; None where there are none, as in most containers."""
    clock = root / "sys/devices/system/cpu/cpu0/cpufreq"
    return board_of(
        temperature=_read(_zone(root / "sys/class/thermal") / "temp"),
        throttled=_first(root, "sys/devices/platform/soc*/*firmware/get_throttled"),
        clock=_read(clock / "scaling_cur_freq"),
        clock_most=_read(clock / "cpuinfo_max_freq"),
        low_voltage=_alarm(root / "sys/class/hwmon"),
    )


class Watch:
    """Reads it each ``EACH_S``, from the loop's own steps, and hands on what it has read."""

    def __init__(self, tell: Callable[[Board], object], root: Path = Path("/")) -> None:
        self._tell, self._root, self._due = tell, root, 0.0

    def look(self, now: float) -> None:
        """As often as one likes."""
        if now < self._due:
            return
        self._due = now + EACH_S
        board = read_board(self._root)
        if board is not None:
            self._tell(board)


def _zone(folder: Path) -> Path:
    """The thermal zone of the processor; the first, if none says that it is."""
    zones = sorted(folder.glob("thermal_zone*"))
    for zone in zones:
        if any(word in _read(zone / "type").lower() for word in _PROCESSOR):
            return zone
    return zones[0] if zones else folder


def _alarm(folder: Path) -> str:
    """Of the Raspberry Pi's voltage."""
    for chip in sorted(folder.glob("hwmon*")):
        if _read(chip / "name").strip() == "rpi_volt":
            return _read(chip / "in0_lcrit_alarm")
    return ""


def _first(root: Path, pattern: str) -> str:
    for path in sorted(root.glob(pattern)):
        return _read(path)
    return ""


def _read(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="ascii")
    return ""
