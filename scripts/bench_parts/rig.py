"""What is measured: a lab with a cluster and a client on it, and a lab with plain onnxruntime.

Nothing here computes a figure: it starts processes, passes commands on and reads counters.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_parts.child import Broken, Peer, forget_peak, memory
from bench_parts.models import Model
from cluster.lab import DeviceSpec, Lab

_HERE = Path(__file__).resolve().parent
_START_S = 180.0
_SETTLE_S = 60.0
_POLL_S = 0.01
DEPLOY_S = 580.0
ANSWER_S = 600.0


@dataclass(frozen=True, slots=True)
class Setup:
    """A cluster to measure. ``devices``: its name in rows, a number or "mixed"; ``cores`` of each
    device, device 0's first."""

    devices: str
    cores: tuple[float, ...]
    link_bits_per_s: float
    plaintext: bool = False

    @property
    def name(self) -> str:
        return self.devices + (", plaintext" if self.plaintext else "")


@dataclass(frozen=True, slots=True)
class Counters:
    """What each device of a lab has used so far."""

    cpu_s: tuple[float, ...]
    sent_bytes: tuple[int, ...]

    def since(self, before: Counters) -> Counters:
        return Counters(
            tuple(a - b for a, b in zip(self.cpu_s, before.cpu_s, strict=True)),
            tuple(a - b for a, b in zip(self.sent_bytes, before.sent_bytes, strict=True)),
        )


@dataclass(slots=True)
class WorkerMemory:
    """Resident bytes of one worker: idle, and at most above that at installing and serving."""

    idle: int
    install: int = 0
    serving: int = 0


@dataclass
class Rig:
    """A lab with a running cluster and its client on device 0.

    ``deploy_cores``: each device's until its worker begins, and while a model is deployed; 0 leaves
    its quota as it is. Workers and links are measured under the real quota.
    """

    setup: Setup
    folder: Path
    deploy_cores: float = 0.0
    workers: list[WorkerMemory] = field(default_factory=list)
    deployed: int = 0
    idle_cores: float = 0.0
    start_s: float = 0.0
    start_cpu_s: float = 0.0
    profiles: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise

    @property
    def cores(self) -> dict[str, float]:
        """By the device's name in the cluster."""
        return {spec.name: spec.cpu for spec in self.lab.devices}

    def ask(self, **command: Any) -> Any:
        """The client's answer. Raises ``Broken``."""
        return self.client.ask(command, ANSWER_S)

    def load(self, model: Model, inputs: Sequence[Path]) -> None:
        """The client takes these pictures from now on."""
        assert self.ask(do="load", inputs=[str(p) for p in inputs]) == len(model.requests)

    def deploy(self, model: Model, objective: str) -> dict[str, Any]:
        """Deploy it under the name of model and objective; see ``Session.do_deploy``."""
        self._forget_peaks()
        before = self.counters()
        with lifted(self.lab, self.deploy_cores):
            made: dict[str, Any] = self.ask(
                do="deploy",
                name=f"{model.name}-{objective}",
                path=str(model.path),
                objective=objective,
                timeout_s=DEPLOY_S,
            )
        made["deploy_cpu_s"] = sum(self.counters().since(before).cpu_s)
        self.deployed += 1
        for each, (_, peak) in zip(self.workers, self._memory(), strict=True):
            each.install = max(each.install, peak - each.idle)
        self._forget_peaks()
        return made

    def read_memory(self) -> None:
        """Note the peak of each worker since it was deployed to."""
        for each, (_, peak) in zip(self.workers, self._memory(), strict=True):
            each.serving = max(each.serving, peak - each.idle)

    def counters(self) -> Counters:
        """What the devices have used since they were made."""
        used = [self.lab.usage(i) for i in range(len(self.lab.devices))]
        return Counters(tuple(u.cpu_s for u in used), tuple(u.sent_bytes for u in used))

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        specs = [
            DeviceSpec(f"pi-{i}", cores, None, self.setup.link_bits_per_s)
            for i, cores in enumerate(self.setup.cores)
        ]
        began = time.monotonic()
        self.lab = self._stack.enter_context(Lab(specs))
        options = {"folder": str(self.folder)}
        with _starting(self.lab, self.deploy_cores):
            self.client = self._stack.enter_context(
                spawn(self.lab, "session.py", options, self.folder / "client.log")
            )
            assert self.client.hear(_START_S) == "ready"
            self.cluster = self.lab.start_cluster(plaintext=self.setup.plaintext)
        self.ask(
            do="connect",
            address=self.cluster.coordinator,
            keyring=str(self.cluster.keyring),
            cluster=self.cluster.name,
        )
        self.ask(do="settle", timeout_s=_SETTLE_S)
        self.profiles = self.ask(do="devices")
        self.workers = [WorkerMemory(now) for now, _ in self._memory()]
        before, since = self.counters(), time.monotonic()
        self.start_s, self.start_cpu_s = since - began, sum(before.cpu_s)
        time.sleep(1.0)
        used = self.counters().since(before)
        self.idle_cores = sum(used.cpu_s) / (time.monotonic() - since)

    def _pids(self) -> list[int]:
        found = self.cluster.worker_pids()
        return [found[i] for i in range(len(self.lab.devices))]

    def _memory(self) -> list[tuple[int, int]]:
        return [memory(pid) for pid in self._pids()]

    def _forget_peaks(self) -> None:
        for pid in self._pids():
            forget_peak(pid)


class Baseline:
    """Plain onnxruntime on one device of its own, with the better of 1 and 2 threads."""

    def __init__(
        self,
        cores: float,
        model: Model,
        inputs: Sequence[Path],
        folder: Path,
        load_cores: float,
        tries: int,
    ) -> None:
        self.cores = cores
        self._stack = contextlib.ExitStack()
        try:
            lab = self._stack.enter_context(Lab([DeviceSpec("plain", cores)]))
            folder.mkdir(parents=True, exist_ok=True)
            tried: dict[int, tuple[float, Peer]] = {}
            for threads in (1, 2):
                options = {
                    "model": str(model.path),
                    "inputs": [str(p) for p in inputs],
                    "threads": threads,
                }
                log = folder / f"plain-{threads}.log"
                with lifted(lab, load_cores):
                    peer = self._stack.enter_context(spawn(lab, "plain.py", options, log))
                    assert peer.hear(_START_S) == "ready"
                peer.ask({"run": 1}, ANSWER_S)  # the first touches all the memory
                tried[threads] = min(peer.ask({"run": tries}, ANSWER_S)["wall_s"]), peer
            self.tried = {threads: best_s for threads, (best_s, _) in tried.items()}
            self.threads = min(tried, key=lambda n: tried[n][0])
            for threads, (_, peer) in tried.items():
                if threads != self.threads:
                    peer.close()
            self._peer = tried[self.threads][1]
        except BaseException:
            self._stack.close()
            raise

    def run(self, times: int) -> dict[str, Any]:
        """See ``Plain.do``."""
        answer: dict[str, Any] = self._peer.ask({"run": times}, ANSWER_S)
        return answer

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Baseline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def lifted(lab: Lab, cores: float) -> Iterator[None]:
    """Each device has at least so many cores inside the block; 0: its own, as always."""
    for i, spec in enumerate(lab.devices):
        lab.set_cpu(i, max(spec.cpu, cores))
    try:
        yield
    finally:
        for i, spec in enumerate(lab.devices):
            lab.set_cpu(i, spec.cpu)


@contextlib.contextmanager
def _starting(lab: Lab, cores: float) -> Iterator[None]:
    """As ``lifted``, but each device only until its worker process begins.

    So coordinator, supervisors and client are up soon, and a worker imports, measures itself and
    joins under the real quota. Raises ``Broken`` if a worker began unnoticed.
    """
    waiting, over = set(range(len(lab.devices))) if cores else set(), threading.Event()

    def watch() -> None:
        while waiting and not over.is_set():
            for i in sorted(waiting):
                if any(_is_worker(pid) for pid in lab.processes(i)):
                    lab.set_cpu(i, lab.devices[i].cpu)
                    waiting.discard(i)
            time.sleep(_POLL_S)

    for i, spec in enumerate(lab.devices):
        lab.set_cpu(i, max(spec.cpu, cores))
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    if waiting:
        raise Broken(f"the workers of devices {sorted(waiting)} began unnoticed, too fast")


def _is_worker(pid: int) -> bool:
    try:
        return b"\0cluster.worker\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def spawn(lab: Lab, script: str, options: dict[str, Any], log: Path) -> Peer:
    """Start one of the measured processes on device 0."""
    with log.open("ab") as errors:
        process = lab.spawn(
            0,
            [sys.executable, str(_HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    return Peer(process, log, script)
