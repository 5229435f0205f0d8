"""Measuring in a process of its own: the same numbers, and a death that is passed on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.measuring import measured_apart
from cluster.profiler import Measured

SAY = (
    "import sys; from pathlib import Path; from cluster.measuring import measured_apart\n"
    "sys.executable = {!r}\n"
    "measured_apart(Path({!r}), 'e', 1, plaintext=True, log_level='info', log_form='text')"
)


def test_it_measures_and_keeps_what_it_measured(tmp_path: Path) -> None:
    def again() -> Measured:
        return measured_apart(
            tmp_path, "engine", 1, plaintext=True, log_level="warning", log_form="text"
        )

    found = again()
    assert found.flops_per_s > 0
    assert (tmp_path / "profile.json").is_file()
    assert len(again().rates) == len(found.rates)


@pytest.mark.parametrize(("end", "code"), [("kill -ILL $$", -signal.SIGILL), ("exit 3", 3)])
def test_its_end_is_the_end_of_who_asked(tmp_path: Path, end: str, code: int) -> None:
    """An engine that this processor cannot run ends its process: the supervisor is to see it."""
    dies = tmp_path / "python"
    dies.write_text(f"#!/bin/sh\n{end}\n")
    dies.chmod(0o755)
    text = SAY.format(str(dies), str(tmp_path))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, timeout=60)
    assert done.returncode == code
