"""The user of a chaos run, a process inside the lab: submits, holds every answer against
onnxruntime's, and writes down what it saw. Told what to do by JSON lines on stdin.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import oracle

import meshinfer as mi
from chaos.history import History

IMAGES = 6
WATCH_S = 0.1
SILENT_S = 0.5
HEALTHY = "ready"


@dataclass(frozen=True, slots=True)
class Known:
    """A deployed model with its inputs, and what onnxruntime answers to each."""

    name: str
    inputs: list[dict[str, np.ndarray]]
    truths: list[dict[str, np.ndarray]]
    tolerances: list[float]


class User:
    """One client and its threads: what it is told runs beside what it was told before."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.client = mi.Client(timeout_s=30.0)
        self.models: dict[str, Known] = {}
        self.answers: queue.SimpleQueue[tuple[int, float, Future[mi.Result], Known, int]] = (
            queue.SimpleQueue()
        )
        self.numbers = itertools.count()
        self.open = 0
        self.enough = False
        self.over: set[int] = set()
        self.changed = threading.Condition()
        self.seen: dict[str, str] = {}
        self.tasks: dict[str, int] = {}  # done by each device, as it last told
        self.tasks_done = 0  # by all, also before they died
        for body in (self._judge, self._watch):
            threading.Thread(target=body, daemon=True).start()

    # --- what it can be told

    def deploy(self, name: str, path: str, shape: list[int], **options: Any) -> None:
        """Ask onnxruntime for the truth of a model of one input, and deploy it."""
        model = Path(path).read_bytes()
        (feed,) = _inputs(model)
        rng = np.random.default_rng(0)
        inputs = [{feed: rng.standard_normal(shape).astype(np.float32)} for _ in range(IMAGES)]
        truths = [oracle.reference(model, each) for each in inputs]
        bounds = [oracle.tolerance(model, each) for each in inputs]
        self.client.deploy(name, model, timeout_s=120.0, **options)
        self.models[name] = Known(name, inputs, truths, bounds)

    def load(
        self,
        name: str,
        phase: str,
        count: int,
        rate: float = 0.0,
        in_flight: int = 0,
        within_s: float = 1e9,
        deadline_s: float = 30.0,
    ) -> None:
        """Submit ``count`` requests, ``rate`` a second whatever becomes of them, or the next when
        fewer than ``in_flight`` are open; none after ``within_s``. Each has an outcome then."""
        started, before = time.monotonic(), self.tasks_done
        self.enough = False
        model = self.models[name]
        for k in range(count):
            if self.enough or time.monotonic() > started + within_s:
                break
            if rate:
                time.sleep(max(0.0, started + k / rate - time.monotonic()))
            with self.changed:
                while in_flight and self.open >= in_flight:
                    self.changed.wait(1.0)
                self.open += 1
            self._submit(model, phase, deadline_s)
        self.drain(deadline_s + 30.0)
        time.sleep(2 * WATCH_S)  # what was done last is told with a heartbeat or a reply
        self.history.write("tasks", phase=phase, done=self.tasks_done - before)

    def stop(self) -> None:
        """No further requests of the load."""
        self.enough = True

    def poison(self, name: str, value: float, deadline_s: float = 60.0) -> None:
        """Submit one request whose brightest value is this, and wait for what becomes of it."""
        model = self.models[name]
        image = {k: v.copy() for k, v in model.inputs[0].items()}
        next(iter(image.values())).flat[0] = value
        evil = Known(name, [image] * IMAGES, model.truths, model.tolerances)
        with self.changed:
            self.open += 1
        number = self._submit(evil, "poison", deadline_s)
        until = time.monotonic() + deadline_s + 30.0
        with self.changed:
            while number not in self.over and time.monotonic() < until:
                self.changed.wait(0.2)

    def drain(self, within_s: float) -> None:
        """Wait until nothing is open; what then still is has been lost."""
        until = time.monotonic() + within_s
        with self.changed:
            while self.open and time.monotonic() < until:
                self.changed.wait(0.2)

    def settle(self, names: list[str], model: str, within_s: float) -> None:
        """Write down how long it takes until all devices are healthy, nothing is open and a
        request is answered at the first attempt."""
        started, why = time.monotonic(), "never looked"
        while time.monotonic() < started + within_s:
            why = self._unsettled(names, model)
            if not why:
                break
            time.sleep(0.05)
        self.history.write("settled", took_s=time.monotonic() - started, why=why)

    # --- inside

    def _unsettled(self, names: list[str], model: str) -> str:
        sick = {n: self.seen.get(n, "gone") for n in names if self.seen.get(n) != HEALTHY}
        if sick:
            return f"devices {sick}"
        if self.open:
            return f"{self.open} requests are open"
        try:
            known = self.models[model]
            result = self.client.infer(model, known.inputs[0], deadline_s=5.0)
        except mi.MeshInferError as error:
            return f"a request failed: {error.message}"
        return "" if result.attempts == 1 else f"a request took {result.attempts} attempts"

    def _submit(self, model: Known, phase: str, deadline_s: float) -> int:
        number = next(self.numbers)
        which = number % IMAGES
        self.history.write(
            "submit", n=number, phase=phase, model=model.name, image=which, deadline_s=deadline_s
        )
        try:
            future = self.client.submit(model.name, model.inputs[which], deadline_s=deadline_s)
        except mi.MeshInferError as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(
            lambda done: self.answers.put((number, time.monotonic(), done, model, which))
        )
        return number

    def _judge(self) -> None:
        """Compares answers: its time is nobody's latency."""
        while True:
            number, at, done, model, which = self.answers.get()
            error = done.exception()
            if error is not None:
                self.history.write("outcome", at=at, n=number, ok=False, **_told(error))
            else:
                self._answered(number, at, done.result(), model, which)
            with self.changed:
                self.open -= 1
                self.over.add(number)
                self.changed.notify_all()

    def _answered(
        self, number: int, at: float, result: mi.Result, model: Known, which: int
    ) -> None:
        truth = model.truths[which]
        off = float("inf")
        if set(result.outputs) == set(truth):
            off = max(oracle.error(result.outputs[name], truth[name]) for name in truth)
        tasks = result.timing.tasks
        self.history.write(
            "outcome",
            at=at,
            n=number,
            ok=True,
            request=result.request_id,
            error=off,
            tolerance=model.tolerances[which],
            attempts=result.attempts,
            degraded=result.degraded,
            tasks=len(tasks),
            places=len({task.place for task in tasks}),
            work=dict(Counter(task.device for task in tasks)),
            plan=result.plan,
        )

    def _watch(self) -> None:
        """Writes down each change of the devices' states, as the coordinator tells them; and what
        it tells after a while of silence, be it the same."""
        while True:
            asked = time.monotonic()
            try:
                devices = self.client.devices()
                now = {each.device: each.state for each in devices}
                exits = {each.device: each.facts.last_exit for each in devices}
                self._count({each.device: each.tasks_done for each in devices})
            except mi.MeshInferError as error:
                now, exits = {}, {"": error.message}
            if now != self.seen or time.monotonic() - asked > SILENT_S:
                self.history.write("devices", states=now, exits=exits)
            self.seen = now
            time.sleep(WATCH_S)

    def _count(self, tasks: dict[str, int]) -> None:
        for name, done in tasks.items():
            before = self.tasks.get(name, 0)
            self.tasks_done += done - before if done >= before else done  # it came back: from 0
        self.tasks = tasks


def _told(error: BaseException) -> dict[str, Any]:
    return {
        "name": type(error).__name__,
        "message": getattr(error, "message", repr(error)),
        "hint": getattr(error, "hint", ""),
        "retry_after_s": getattr(error, "retry_after_s", None),
        "typed": isinstance(error, mi.MeshInferError),
    }


def _inputs(model: bytes) -> list[str]:
    from meshinfer.onnxrt import ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [each.name for each in session.get_inputs()]


def _say(done: str, failed: str = "") -> None:
    os.write(sys.stdout.fileno(), json.dumps({"done": done, "failed": failed}).encode() + b"\n")


def main() -> None:
    """``user.py HISTORY``: a command a line, {"do": NAME, ...}; answers each as it is over."""
    user = User(History(Path(sys.argv[1])))
    _say("start")

    def act(command: dict[str, Any]) -> None:
        what, failed = command.pop("do"), ""
        try:
            getattr(user, what)(**command)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        _say(what, failed)

    for line in sys.stdin:
        threading.Thread(target=act, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    main()
