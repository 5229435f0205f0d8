"""What is measured: a lab with a cluster and a client on it, and a lab with plain onnxruntime.

Nothing here computes a figure: it starts processes, passes commands on and reads counters.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_parts.child import Broken, Peer, forget_peak, memory
from bench_parts.models import Model
from cluster.lab import DeviceSpec, Lab

_HERE = Path(__file__).resolve().parent
_SETTLE_S = 60.0
_POLL_S = 0.01
_REST_S = 12.0
_REST_LOOK_S = 0.4
_REST_SHARE = 0.08
_LEAST_S = 1.0
_GRACE_S = 8.0


class OutOfTime(Exception):
    """The time for the whole run is over."""


class Patience:
    """How long a measured process may take for one command: whoever is slower has failed.

    ``total_s``: for all of a run, from now on; what has begun then may take ``_GRACE_S`` more.
    """

    def __init__(
        self, start_s: float, deploy_s: float, answer_s: float, total_s: float = math.inf
    ) -> None:
        self._start_s, self._deploy_s, self._answer_s = start_s, deploy_s, answer_s
        self._end = time.monotonic() + total_s

    def left_s(self) -> float:
        """Until the end of all; raises ``OutOfTime`` after it."""
        left_s = self._end - time.monotonic()
        if left_s < _LEAST_S:
            raise OutOfTime("the time for this run is over")
        return left_s

    def lasts(self, wanted_s: float) -> bool:
        """Whether there is so much time still."""
        return time.monotonic() + wanted_s < self._end

    @property
    def start_s(self) -> float:
        """To start a process, or a cluster."""
        return min(self._start_s, self.left_s() + _GRACE_S)

    @property
    def deploy_s(self) -> float:
        return min(self._deploy_s, self.left_s() + _GRACE_S)

    @property
    def answer_s(self) -> float:
        """For one answer, or a stream of them."""
        return min(self._answer_s, self.left_s() + _GRACE_S)


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

    @property
    def kind(self) -> tuple[float, bool]:
        """What setups that share a cluster have alike."""
        return self.link_bits_per_s, self.plaintext


def shared(setups: Iterable[Setup]) -> tuple[list[float], dict[Setup, tuple[int, ...]]]:
    """Cores of the fewest devices among which each of these setups is found, and which they are.

    A setup's devices are in its order; device 0 is the first of all of them.
    """
    cores: list[float] = []
    found = {}
    for setup in setups:
        free, members = list(range(len(cores))), []
        for each in setup.cores:
            i = next((i for i in free if cores[i] == each), len(cores))
            if i == len(cores):
                cores.append(each)
            else:
                free.remove(i)
            members.append(i)
        assert members[0] == 0, "the client's device differs"
        found[setup] = tuple(members)
    return cores, found


@dataclass(frozen=True, slots=True)
class Counters:
    """What each device of a lab has used so far, and when that was."""

    cpu_s: tuple[float, ...]
    sent_bytes: tuple[int, ...]
    at_s: float

    def since(self, before: Counters) -> Counters:
        """The difference; ``at_s`` is then the time between both."""
        return Counters(
            tuple(a - b for a, b in zip(self.cpu_s, before.cpu_s, strict=True)),
            tuple(a - b for a, b in zip(self.sent_bytes, before.sent_bytes, strict=True)),
            self.at_s - before.at_s,
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

    ``cores``: of its devices; a deployment may use some of them only. ``deploy_cores``: each
    device's until its worker begins, and while a model is deployed; 0 leaves its quota as it is.
    Workers and links are measured under the real quota. ``memory_bytes``: limits of the
    devices' memory. ``broken``: why it is of no more use.
    """

    cores: Sequence[float]
    link_bits_per_s: float
    folder: Path
    patience: Patience
    deploy_cores: float = 0.0
    plaintext: bool = False
    memory_bytes: Sequence[int | None] = ()
    workers: list[WorkerMemory] = field(default_factory=list)
    deployed: int = 0
    broken: str = ""
    idle_cores: float = 0.0
    start_s: float = 0.0
    start_cpu_s: float = 0.0
    profiles: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        """Of the devices in the cluster."""
        return [spec.name for spec in self.lab.devices]

    def ask(self, **command: Any) -> Any:
        """The client's answer. Raises ``Broken``."""
        return self.client.ask(command, self.patience.answer_s)

    def load(self, model: Model, inputs: Sequence[Path]) -> None:
        """The client takes these pictures from now on."""
        assert self.ask(do="load", inputs=[str(p) for p in inputs]) == len(model.requests)

    def deploy(
        self, name: str, model: Model, members: Sequence[int] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Deploy it on these devices (all, if None); see ``Session.do_deploy``."""
        others = set(range(len(self.cores))) - set(
            range(len(self.cores)) if members is None else members
        )
        if others:
            options["memory"] = {self.names[i]: 0 for i in sorted(others)}
        self._forget_peaks()
        before = self.counters()
        with lifted(self.lab, self.deploy_cores):
            timeout_s = self.patience.deploy_s
            command = {"do": "deploy", "name": name, "path": str(model.path), **options}
            made: dict[str, Any] = self.client.ask(
                {**command, "timeout_s": timeout_s}, timeout_s + _LEAST_S
            )
        made["deploy_cpu_s"] = sum(self.counters().since(before).cpu_s)
        self.deployed += 1
        for each, (_, peak) in zip(self.workers, self._memory(), strict=True):
            each.install = max(each.install, peak - each.idle)
        self._forget_peaks()
        return made

    def rest(self) -> None:
        """Wait until what a deployment and its first requests set going is done: spare tasks, the
        client's own task. With the cores of a deployment; bounded, for a search may go on."""
        until = time.monotonic() + _REST_S
        with lifted(self.lab, self.deploy_cores):
            idle = 0
            while idle < 2 and time.monotonic() < until:
                before = self.counters()
                time.sleep(_REST_LOOK_S)
                used_s = sum(self.counters().since(before).cpu_s)
                idle = idle + 1 if used_s < _REST_SHARE * _REST_LOOK_S else 0
        self._forget_peaks()

    def read_memory(self) -> None:
        """Note the peak of each worker since it was deployed to."""
        for each, (_, peak) in zip(self.workers, self._memory(), strict=True):
            each.serving = max(each.serving, peak - each.idle)

    def counters(self) -> Counters:
        """What the devices have used since they were made."""
        used = [self.lab.usage(i) for i in range(len(self.lab.devices))]
        at_s = time.monotonic()
        return Counters(tuple(u.cpu_s for u in used), tuple(u.sent_bytes for u in used), at_s)

    def close(self) -> None:
        """Take it down. Nothing is worth waiting for: what runs in it is killed."""
        if hasattr(self, "lab"):  # else it could not be made
            for i in range(len(self.lab.devices)):
                for pid in self.lab.processes(i):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        self._stack.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        memory_bytes = self.memory_bytes or [None] * len(self.cores)
        specs = [
            DeviceSpec(f"pi-{i}", cores, nbytes, self.link_bits_per_s)
            for i, (cores, nbytes) in enumerate(zip(self.cores, memory_bytes, strict=True))
        ]
        began = time.monotonic()
        self.lab = self._stack.enter_context(Lab(specs))
        options = {"folder": str(self.folder)}
        with _starting(self.lab, self.deploy_cores):
            self.client = self._stack.enter_context(
                spawn(self.lab, "session.py", options, self.folder / "client.log")
            )
            assert self.client.hear(self.patience.start_s) == "ready"
            self.cluster = self.lab.start_cluster(plaintext=self.plaintext)
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
        if lost := set(range(len(self.cores))) - set(found):
            raise Broken(f"the workers of devices {sorted(lost)} have ended")
        return [found[i] for i in range(len(self.cores))]

    def _memory(self) -> list[tuple[int, int]]:
        with _ended():
            return [memory(pid) for pid in self._pids()]

    def _forget_peaks(self) -> None:
        with _ended():
            for pid in self._pids():
                forget_peak(pid)


@contextlib.contextmanager
def _ended() -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError) as error:  # of a process that is no more
        raise Broken(f"a worker has ended: {error}") from error


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


def spawn(lab: Lab, script: str, options: dict[str, Any], log: Path, device: int = 0) -> Peer:
    """Start one of the measured processes on a device."""
    with log.open("ab") as errors:
        process = lab.spawn(
            device,
            [sys.executable, str(_HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    return Peer(process, log, script)
