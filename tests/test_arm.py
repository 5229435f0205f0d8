"""``scripts/try_arm``: what it says where it cannot be; and with --full a worker of 64-bit Arm that
computes beside one of x86, under qemu-user."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "try_arm"
NOWHERE = "http://127.0.0.1:9/debian"

here = pytest.mark.skipif(platform.machine() != "x86_64", reason="Arm is emulated on x86_64")


def tried(*arguments: object, longest_s: float = 120, **env: str) -> tuple[int, str]:
    """Its exit code, and all that it says."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=longest_s,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@here
def test_without_qemu_and_without_apt_it_says_what_to_install(tmp_path: Path) -> None:
    code, said = tried("--cache", tmp_path / "cache", PATH=str(tmp_path))
    assert code == 78
    assert "no qemu-aarch64" in said and "hint: run it on Debian" in said
    assert "Traceback" not in said


@here
def test_a_mirror_that_does_not_answer_may_answer_later(tmp_path: Path) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("needs apt-get")
    code, said = tried("--cache", tmp_path / "cache", "--mirror", NOWHERE)
    assert code == 75
    assert "apt-get update" in said and "127.0.0.1" in said and "--mirror" in said
    assert "Traceback" not in said
    assert not (tmp_path / "cache" / "root" / "made").exists(), "the next run must try again"


@here
def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = tried("--cache", tmp_path)
    assert code == 75
    assert f"another run uses {tmp_path}" in said


@here
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_worker_of_arm_and_one_of_x86_compute_one_image() -> None:
    """Fetches Debian and the wheels, where ~/.cache/meshinfer-arm lacks them."""
    code, said = tried(longest_s=3500)
    assert code == 0, said
    assert "aarch64, numeric class" in said and "x86_64, numeric class" in said
    assert "all held" in said
