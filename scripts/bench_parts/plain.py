"""The baseline, a process of its own: plain onnxruntime on the whole model, pictures at hand."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from meshinfer.onnxrt import ort

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_parts.child import forget_peak, memory, serve, take_stdout


class Plain:
    """What a user would run instead: a session with default options and so many threads."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.feeds = [dict(np.load(path, allow_pickle=False)) for path in options["inputs"]]
        self.idle, _ = memory()
        forget_peak()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options["threads"]
        self.session = ort.InferenceSession(
            options["model"], settings, providers=["CPUExecutionProvider"]
        )
        self.next = 0

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Run it so many times; seconds of each by the clock and of the processor."""
        wall, cpu = [], []
        for _ in range(command["run"]):
            feeds = self.feeds[self.next % len(self.feeds)]
            self.next += 1
            clock, used = time.perf_counter(), time.process_time()
            self.session.run(None, feeds)
            wall.append(time.perf_counter() - clock)
            cpu.append(time.process_time() - used)
        now, peak = memory()
        return {"wall_s": wall, "cpu_s": cpu, "idle": self.idle, "now": now, "peak": peak}


def main() -> None:
    answers = take_stdout()
    plain = Plain(json.loads(sys.argv[1]))
    answers.write(json.dumps({"answer": "ready"}) + "\n")
    serve(answers, plain.do)


if __name__ == "__main__":
    main()
