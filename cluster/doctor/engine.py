"""``python -m cluster.doctor.engine``: try the engine, in a process that may die of it.

A wheel built for newer processors dies with SIGILL; whoever imports it dies along. So whoever asks
imports neither numpy nor onnxruntime, and learns from the child's last line how far it came.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.processes import cause_of, oom_kills
from cluster.processor import instruction_set, processor
from meshinfer.doctor import EngineRun

_LONGEST_S = 60.0
_TEXT_CHARS = 500


def run_engine(threads: int) -> EngineRun:
    """Have every kind of operator computed by a child."""
    before = oom_kills()
    command = [sys.executable, "-m", "cluster.doctor.engine", str(threads)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LONGEST_S,
            check=False,
        )  # fmt: skip
        code, out, err = done.returncode, done.stdout, done.stderr
        ended = "" if code == 0 else cause_of(code, before)
    except subprocess.TimeoutExpired as error:
        out, err = _text(error.stdout), _text(error.stderr)
        ended = f"no end after {_LONGEST_S:g} s"
    except OSError as error:
        out, err, ended = "", "", f"{error.strerror} when it was to start"
    steps = out.splitlines() or ["its start"]
    last = [line for line in err.splitlines() if line.strip()]
    text = steps[-1] if not ended else (last or [""])[-1][:_TEXT_CHARS]
    return EngineRun(steps[-1], ended, text, processor())


def _text(found: str | bytes | None) -> str:
    return found.decode(errors="replace") if isinstance(found, bytes) else found or ""


def _step(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Each step is told before it is taken."""
    _step("importing numpy")
    import numpy as np

    _step("importing onnxruntime")
    import meshinfer.onnxrt  # noqa: F401
    from cluster.profiler import probes
    from meshinfer.engine.ort import OrtEngine

    with tempfile.TemporaryDirectory(prefix="meshinfer-doctor-") as folder:
        engine = OrtEngine(Path(folder), int(arguments[0]), instruction_set())
        for probe in probes():
            _step(f"computing {probe.name}")
            prepared = engine.prepare(base64.b64decode(probe.model))
            feeds = {prepared.inputs[0]: np.ones(probe.shape, np.dtype(probe.dtype))}
            first, again = prepared.run(feeds)[0], prepared.run(feeds)[0]
            if not np.isfinite(first).all() or not np.array_equal(first, again):
                sys.stderr.write(f"{probe.name} is computed wrongly\n")
                return 1
    _step(engine.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
