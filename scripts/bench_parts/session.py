"""The measured client, a process on lab device 0: deploys, asks, streams, and keeps each answer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import meshinfer as mi
from bench_parts.child import serve, take_stdout
from bench_parts.figures import frame_s
from cluster.client import Client

_SETTLED_S, _POLL_S = 1.5, 0.1


class Watched(Client):
    """A client that notes when each answer is there: ``map`` hands them out in order, so what was
    done long ago may wait behind a slow one, and the times of its results say nothing of rates."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.done: list[float] = []
        super().__init__(*args, **options)

    def submit(self, *args: Any, **options: Any) -> Future[mi.Result]:
        """As ``Client.submit``, which ``map`` calls."""
        future = super().submit(*args, **options)
        future.add_done_callback(lambda _: self.done.append(time.perf_counter()))
        return future


class Session:
    """``folder`` gets every answer once, named by its content: the benchmark checks them."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.folder = Path(options["folder"])
        self.requests: list[Any] = []
        self.plans: dict[str, str] = {}

    def do(self, command: dict[str, Any]) -> Any:
        """One command, by its ``do``."""
        what = command.pop("do")
        return getattr(self, f"do_{what}")(**command)

    def do_connect(self, address: str, keyring: str, cluster: str) -> None:
        """Connect to a cluster; before, only this process's imports were done."""
        self.client = Watched(address, keyring=keyring, cluster=cluster, timeout_s=60.0)

    def do_devices(self) -> Any:
        """The cluster's devices, as it describes them."""
        return msgspec.to_builtins(self.client.devices())

    def do_settle(self, timeout_s: float) -> int:
        """Wait until no more links become known (a plan made before knows less); how many are."""
        deadline = time.monotonic() + timeout_s
        known, since = -1, time.monotonic()
        while (now := time.monotonic()) < deadline:
            devices = self.client.devices()
            if not hasattr(devices[0], "links"):  # a version that measures none
                return 0
            found = sum(len(d.links) + (d.link is not None) for d in devices)
            if found != known:
                known, since = found, now
            if now - since > _SETTLED_S:
                break
            time.sleep(_POLL_S)
        return known

    def do_deploy(
        self,
        name: str,
        path: str,
        objective: str,
        timeout_s: float,
        memory: int | dict[str, int] | None = None,
        plan: str | None = None,
        spread: bool = False,
    ) -> dict[str, Any]:
        """Deploy a file; seconds it took, the plan, the report in lines and its expectation."""
        began = time.perf_counter()
        made = self.client.deploy(
            name,
            path,
            objective=objective,
            timeout_s=timeout_s,
            memory=memory,
            plan=plan,
            spread=spread,
        )
        report = made.report
        return {
            "deploy_s": time.perf_counter() - began,
            "version": made.version,
            "plan": made.plan,
            "expected_s": report.expected_s if report else None,
            "bound": report.bound if report else "",
            "report": msgspec.to_builtins(report) if report else None,
            "lines": list(report.lines) if report else [],
        }

    def do_load(self, inputs: list[str]) -> int:
        """The pictures that are asked from now on; their number."""
        self.requests = []
        for path in inputs:
            arrays = dict(np.load(path, allow_pickle=False))
            self.requests.append(arrays.get("picture", arrays))
        return len(self.requests)

    def do_infer(self, name: str, which: list[int], deadline_s: float) -> list[dict[str, Any]]:
        """These pictures, one after another; of each the time by this clock and what it says."""
        found = []
        for i in which:
            began = time.perf_counter()
            result = self.client.infer(name, self.requests[i], deadline_s=deadline_s)
            wall_s = time.perf_counter() - began
            found.append({"request": i, "wall_s": wall_s, **self._told(result)})
        return found

    def do_stream(
        self, name: str, frames: int, around: int, in_flight: int, deadline_s: float
    ) -> dict[str, Any]:
        """Seconds between two answers while ``client.map`` is full; see ``figures.frame_s``."""
        total = around + frames + around + in_flight
        told = []
        self.client.done.clear()
        given = (self.requests[i % len(self.requests)] for i in range(total))
        results: Iterator[mi.Result] = self.client.map(
            name, given, max_in_flight=in_flight, deadline_s=deadline_s
        )
        for i, result in enumerate(results):
            told.append({"request": i % len(self.requests), **self._told(result)})
        done = self.client.done
        return {"frame_s": frame_s(done, frames, around), "frames": total, "results": told}

    def do_plans(self) -> dict[str, str]:
        """Every plan that answered, by the digest that the answers have."""
        return self.plans

    def _told(self, result: mi.Result) -> dict[str, Any]:
        plan = xxhash.xxh3_64_hexdigest(result.plan.encode())
        self.plans.setdefault(plan, result.plan)
        return {
            "answer": self._kept(result.outputs),
            "timing": msgspec.to_builtins(
                {
                    "total_s": result.timing.total_s,
                    "queue_s": result.timing.queue_s,
                    "tasks": result.timing.tasks,
                }
            ),
            "plan": plan,
            "attempts": result.attempts,
            "degraded": result.degraded,
        }

    def _kept(self, outputs: Mapping[str, Any]) -> str:
        """The file name of an answer; written when it is new."""
        state = xxhash.xxh3_128()
        for name, array in sorted(outputs.items()):
            state.update(name.encode())
            state.update(np.ascontiguousarray(array).data)
        path = self.folder / f"{state.hexdigest()}.npz"
        if not path.exists():
            np.savez(path, **outputs)
        return path.name


def main() -> None:
    answers = take_stdout()
    session = Session(json.loads(sys.argv[1]))
    answers.write(json.dumps({"answer": "ready"}) + "\n")
    serve(answers, session.do)
    if hasattr(session, "client"):
        session.client.close()


if __name__ == "__main__":
    main()
