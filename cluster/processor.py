"""What the processor is, as Linux tells: its name, and the instructions that kernels are chosen by.

Imports neither numpy nor onnxruntime: the doctor asks where those may die.
"""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BOARD = Path("/proc/device-tree/model")

_CHOSEN_BY = (
    # x86: float kernels by the first four, int8 by all.
    *("avx", "fma", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni"),
    *("avx_vnni_int8", "amx_int8"),
    # Arm.
    *("asimddp", "asimdhp", "i8mm", "sve", "svei8mm", "sme"),
)
"""Flags of /proc/cpuinfo by which onnxruntime picks its kernels (its mlas/lib/platform.cpp):
processors that differ in one may round differently."""


def processor() -> str:
    """The board's name where there is one (a Raspberry Pi), else the processor's."""
    board = _read(_BOARD).strip("\0 \n")
    named = board or _field("model name") or _field("Model")
    return named or platform.processor() or platform.machine()


def instruction_set() -> str:
    """For the device's numeric class: ``x86_64+avx+fma+avx2``; the architecture alone where
    nothing more is told."""
    flags = set((_field("flags") or _field("Features")).split())
    return "+".join((platform.machine(), *(flag for flag in _CHOSEN_BY if flag in flags)))


def _field(key: str) -> str:
    """Of the first processor."""
    for line in _read(_CPUINFO).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
