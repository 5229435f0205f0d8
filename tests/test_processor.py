"""What Linux tells of processors, as real machines tell it, and what classes follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import processor
from meshinfer.engine.ort import OrtEngine

LAPTOP = """processor	: 0
vendor_id	: GenuineIntel
model name	: Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz
flags		: fpu sse sse2 ssse3 fma cx16 sse4_1 sse4_2 avx f16c avx2 bmi2

processor	: 1
model name	: another
flags		: fpu
"""
SERVER = LAPTOP.replace("bmi2", "bmi2 avx512f avx512dq avx512bw avx512vl avx512_vnni")
OLD = LAPTOP.replace("fma", "").replace("avx2", "").replace("i5-8250U", "i5-2520M")
PI_4 = """processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm crc32 cpuid
CPU part	: 0xd08

Model		: Raspberry Pi 4 Model B Rev 1.4
"""
PI_5 = PI_4.replace("cpuid", "aes pmull sha1 sha2 atomics fphp asimdhp cpuid lrcpc dcpop asimddp")


@pytest.fixture
def tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose files say what is written there; nothing at first."""
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "_BOARD", tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(
    ("machine", "said", "instructions"),
    [
        ("x86_64", LAPTOP, "x86_64+avx+fma+avx2"),
        ("x86_64", SERVER, "x86_64+avx+fma+avx2+avx512f+avx512bw+avx512_vnni"),
        ("x86_64", OLD, "x86_64+avx"),
        ("aarch64", PI_4, "aarch64"),
        ("aarch64", PI_5, "aarch64+asimddp+asimdhp"),
        ("riscv64", "", "riscv64"),
    ],
)
def test_instruction_sets_that_kernels_are_chosen_by(
    tells: Path, monkeypatch: pytest.MonkeyPatch, machine: str, said: str, instructions: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    (tells / "cpuinfo").write_text(said)
    assert processor.instruction_set() == instructions


def test_a_machine_that_tells_nothing_has_its_architecture(tells: Path) -> None:
    assert "+" not in processor.instruction_set()
    assert processor.processor()


def test_names_are_the_boards_or_the_processors(tells: Path) -> None:
    (tells / "cpuinfo").write_text(LAPTOP)
    assert processor.processor() == "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz"
    (tells / "cpuinfo").write_text(PI_4)
    assert processor.processor() == "Raspberry Pi 4 Model B Rev 1.4"
    (tells / "model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    assert processor.processor() == "Raspberry Pi 5 Model B Rev 1.0"


def test_engines_on_other_instructions_are_of_other_classes(tmp_path: Path) -> None:
    names = {OrtEngine(tmp_path, 1, said).name for said in ("x86_64+avx", "x86_64+avx+avx512f")}
    assert len(names) == 2


def test_here_the_flags_are_those_that_numpy_finds_by_itself() -> None:
    """numpy asks the processor, and not the kernel."""
    from numpy._core._multiarray_umath import __cpu_features__ as found  # type: ignore[attr-defined]

    said = processor.instruction_set().split("+")
    for flag, name in (("avx512f", "AVX512F"), ("avx2", "AVX2"), ("asimddp", "ASIMDDP")):
        assert (flag in said) == found.get(name, False)
