"""How a board feels: its temperature, and whether it is throttled or lacks voltage. Pure.

What Linux and a Raspberry Pi's firmware tell; ``cluster.board`` reads it, heartbeats carry it.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshinfer.protocol.records import Rate, Record

_UNDERVOLTAGE, _CAPPED, _THROTTLED, _SOFT_LIMIT = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_SINCE_START = 16
_HOT_C = 80.0
"""From where a Pi's firmware slows it down."""

_LEAST_C, _MOST_C = -60.0, 200.0
Degrees = Annotated[float, Meta(ge=_LEAST_C, le=_MOST_C)]


class Board(Record, frozen=True, forbid_unknown_fields=False):
    """``temperature_c``: of the processor, None where nothing tells it; ``clock_hz`` of at most
    ``clock_most_hz``, 0 where unknown. ``throttled``: slowed down now, by heat or a cap;
    ``undervoltage``: now; ``before``: either of them since the board started."""

    temperature_c: Degrees | None = None
    clock_hz: Rate = 0.0
    clock_most_hz: Rate = 0.0
    throttled: bool = False
    undervoltage: bool = False
    before: bool = False


def board_of(
    *,
    temperature: str = "",
    throttled: str = "",
    clock: str = "",
    clock_most: str = "",
    low_voltage: str = "",
) -> Board | None:
    """From the texts of sysfs, empty where there is no such file: millidegrees, the firmware's
    ``get_throttled`` in hexadecimal, kHz, and the alarm of ``rpi_volt``. None: nothing is known.

    What is no number, or none that can be, counts as not told: files of sysfs differ by kernel.
    """
    heat, flags = _number(temperature), _number(throttled, 16) or 0
    degrees = None if heat is None or not _LEAST_C <= heat / 1000 <= _MOST_C else heat / 1000
    found = Board(
        temperature_c=degrees,
        clock_hz=max(0, _number(clock) or 0) * 1000.0,
        clock_most_hz=max(0, _number(clock_most) or 0) * 1000.0,
        throttled=bool(flags & (_CAPPED | _THROTTLED | _SOFT_LIMIT)),
        undervoltage=bool(flags & _UNDERVOLTAGE) or bool(_number(low_voltage)),
        before=bool(flags >> _SINCE_START & 0xF),
    )
    told = degrees is not None or _number(throttled, 16) is not None or found.clock_hz
    return found if told or found.undervoltage else None


def described(board: Board | None) -> str:
    """For a column of a table: ``61C``, ``84C hot throttled``, ``58C undervoltage``, ``-``."""
    if board is None:
        return "-"
    words = []
    if board.temperature_c is not None:
        words.append(f"{board.temperature_c:.0f}C")
        if board.temperature_c >= _HOT_C:
            words.append("hot")
    if board.throttled:
        words.append("throttled")
    if board.undervoltage:
        words.append("undervoltage")
    if board.before and not (board.throttled or board.undervoltage):
        words.append("was-throttled")
    return " ".join(words) or "-"


def _number(text: str, base: int = 10) -> int | None:
    try:
        return int(text.strip(), base)
    except ValueError:
        return None
