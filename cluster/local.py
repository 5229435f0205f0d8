"""A cluster of worker processes on this machine, on loopback, with keys and a name of its own.

The same daemons as on real devices: coordinator, supervisors, workers, CURVE, sockets. ``kill``,
``pause``, ``resume``, ``slow``, ``cut`` and ``heal`` let people try what happens to their
application.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from cluster.client import Client
from cluster.config import ADDRESS_FILE
from cluster.coordinator import HEAD, Address, CoordinatorOptions, await_address
from cluster.gate import GateProcess
from cluster.heap import environment_of
from cluster.keyring import read_keyring
from cluster.profiler import Measured, measure
from cluster.tokens import FOR_EVER_S, given, leave_token, new_secret, places_of, token_for
from cluster.worker import Ways, WorkerOptions
from meshinfer.errors import ClusterUnavailable, InvalidInput

LOOPBACK = "127.0.0.1"
_START_S = 60.0
_STOP_S = 15.0
_POLL_S = 0.02


@dataclass(slots=True)
class _Worker:
    name: str
    supervisor: subprocess.Popen[bytes]
    paused: bool = False

    def signal(self, number: signal.Signals) -> None:
        """To the supervisor and its worker at once: they are a process group of their own."""
        if self.supervisor.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.supervisor.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.supervisor.wait(timeout=_STOP_S)


class LocalCluster:
    """``count`` workers as processes of this machine; ``speeds`` below 1 emulate slower devices.

    ``discovery``: let them find the coordinator over mDNS on loopback instead of being told.
    ``faults``: what workers send and receive goes through a process that ``cut`` can stop; without,
    nothing is in its way. ``log_level``: of the daemons, on this process's stderr. Use it as a
    context manager. ``i`` in what follows: the i-th of ``names()``, the living workers.
    """

    def __init__(
        self,
        count: int = 4,
        *,
        speeds: Sequence[float] | None = None,
        threads: int = 1,
        discovery: bool = False,
        faults: bool = False,
        log_level: str = "error",
    ) -> None:
        if count < 0 or (speeds is not None and len(speeds) != count):
            raise InvalidInput(f"{count} workers with speeds {speeds}", hint="one speed a worker")
        if any(not 0 < speed <= 1 for speed in speeds or ()):
            raise InvalidInput(f"speeds {speeds}", hint="speeds are above 0 and at most 1")
        self.cluster = f"local-{secrets.token_hex(4)}"
        self._speeds = list(speeds or [1.0] * count)
        self._threads, self._discovery, self._log_level = threads, discovery, log_level
        self._folder = Path(tempfile.mkdtemp(prefix="meshinfer-local-"))
        self._workers: list[_Worker] = []
        self._made = 0
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._address: Address | None = None
        self._secret = new_secret()  # of the token that all workers join with
        self._gate: GateProcess | None = None
        try:
            self._gate = GateProcess() if faults else None
            self._start_coordinator()
            for speed in self._speeds:
                self._start_worker(speed)
            self._wait_for_workers()
        except BaseException:
            self.close()
            raise

    # --- use

    @property
    def address(self) -> str:
        """HOST:PORT of the coordinator."""
        assert self._address is not None
        return f"{self._address.host}:{self._address.port}"

    @property
    def keyring(self) -> Path:
        return self._folder / "coordinator" / "keyring.json"

    def client(self, **options: Any) -> Client:
        return Client(self.address, keyring=self.keyring, cluster=self.cluster, **options)

    def names(self) -> list[str]:
        """Names of the living workers, oldest first."""
        return [w.name for w in self._living()]

    def add(self, speed: float = 1.0, *, wait: bool = True) -> str:
        """Start one more worker; its name. ``wait``: until it has joined."""
        name = self._start_worker(speed)
        if wait:
            self._wait_for_workers()
        return name

    def kill(self, i: int) -> str:
        """SIGKILL the i-th worker and its supervisor, as if its power went; its name. What it had
        on its disk is not used again: ``add`` starts another device."""
        worker = self._worker(i)
        worker.kill()
        self._workers.remove(worker)
        return worker.name

    def crash(self, i: int) -> str:
        """SIGKILL the i-th worker's process only: its supervisor starts it again; its name."""
        worker = self._worker(i)
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(worker.supervisor.pid).children():
                process.kill()
        return worker.name

    def pause(self, i: int) -> str:
        """SIGSTOP the i-th worker and its supervisor: alive, and silent; its name."""
        return self._signal(i, signal.SIGSTOP, paused=True)

    def resume(self, i: int) -> str:
        """SIGCONT what ``pause`` stopped; its name."""
        return self._signal(i, signal.SIGCONT, paused=False)

    def slow(self, i: int, speed: float) -> str:
        """Let the i-th worker run at this speed from its next task on, as if its processor
        grew hot; it does not say so. ``speed`` as in ``speeds``: 1 is this machine's. Its name."""
        if not 0 < speed <= 1:
            raise InvalidInput(f"speed {speed}", hint="a speed is above 0 and at most 1")
        worker = self._worker(i)
        path = self._speed_file(worker.name)
        path.with_suffix(".new").write_text(repr(float(speed)))
        path.with_suffix(".new").replace(path)
        return worker.name

    def cut(self, i: int, j: int | None = None) -> str:
        """Cut the i-th worker off from everybody, or from the j-th worker only; its name.

        Nothing passes any more, and nobody is told: connections stay, and what is sent waits. Ends
        with ``heal``. Raises ``InvalidInput`` unless the cluster was made with ``faults=True``.
        """
        names = [self._worker(each).name for each in ((i,) if j is None else (i, j))]
        if len(set(names)) != len(names):
            raise InvalidInput(f"{names[0]} cannot be cut off from itself", hint="give two workers")
        self._reach_gate().ask("cut", names=names)
        return names[0]

    def heal(self, i: int | None = None) -> None:
        """End every cut, or those with the i-th worker. Raises ``InvalidInput`` as ``cut`` does."""
        names = [w.name for w in self._workers] if i is None else [self._worker(i).name]
        self._reach_gate().ask("heal", names=names)

    def restart_coordinator(self) -> None:
        """SIGKILL the coordinator and start it again on its own disk, at the same address; until it
        listens."""
        assert self._coordinator is not None and self._address is not None
        self._coordinator.kill()
        self._coordinator.wait()
        (self._folder / "coordinator" / ADDRESS_FILE).unlink(missing_ok=True)
        self._start_coordinator(self._address.port, self._address.join_port)

    def close(self) -> None:
        """Stop everything that was started here and remove its folder."""
        try:
            for worker in self._workers:
                worker.kill()
            if self._coordinator is not None:
                _stop(self._coordinator)
        finally:
            if self._gate is not None:
                self._gate.close()
            self._workers.clear()
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside

    def _living(self) -> list[_Worker]:
        return [w for w in self._workers if w.supervisor.poll() is None]

    def _worker(self, i: int) -> _Worker:
        living = self._living()
        if not -len(living) <= i < len(living):
            raise InvalidInput(f"no living worker {i}", hint=f"{len(living)} are alive")
        return living[i]

    def _reach_gate(self) -> GateProcess:
        if self._gate is None:
            raise InvalidInput(
                "this cluster's connections cannot be cut",
                hint="make it with LocalCluster(..., faults=True)",
            )
        return self._gate

    def _signal(self, i: int, number: signal.Signals, *, paused: bool) -> str:
        worker = self._worker(i)
        worker.signal(number)
        worker.paused = paused
        return worker.name

    def _start_coordinator(self, port: int = 0, join_port: int = 0) -> None:
        options = CoordinatorOptions(
            cluster=self.cluster,
            state_dir=str(self._folder / "coordinator"),
            host=LOOPBACK,
            port=port,
            join_port=join_port,
            tokens=(given(self._secret, "worker", ttl_s=FOR_EVER_S, reusable=True),),
            interfaces=(LOOPBACK,) if self._discovery else (),
            log_level=self._log_level,
            parent=os.getpid(),
        )
        self._coordinator = _spawn("cluster.coordinator", msgspec.to_builtins(options))
        self._address = await_address(self._coordinator, self._folder / "coordinator", _START_S)

    def _start_worker(self, speed: float) -> str:
        assert self._address is not None
        name = f"worker-{self._made}"
        self._made += 1
        places = () if self._discovery else places_of(LOOPBACK, self._address.join_port)
        token = token_for(read_keyring(self.keyring), "worker", self._secret, places)
        leave_token(self._folder / name, token)
        options = WorkerOptions(
            name=name,
            cluster=self.cluster,
            state_dir=str(self._folder / name),
            coordinator=None if self._discovery else self.address,
            interfaces=(LOOPBACK,),
            threads=self._threads,
            measured=_of_this_machine(self._threads),
            speed=speed,
            speed_file=str(self._speed_file(name)),
            log_level=self._log_level,
            parent=os.getpid(),
            gate=None if self._gate is None else _ways(self._gate, name),
        )
        self._workers.append(
            _Worker(name, _spawn("cluster.supervisor", msgspec.to_builtins(options)))
        )
        return name

    def _speed_file(self, name: str) -> Path:
        return self._folder / f"{name}.speed"

    def _wait_for_workers(self) -> None:
        """Until every living worker that is not paused has joined."""
        deadline = time.monotonic() + _START_S
        with self.client(timeout_s=_START_S) as client:
            while True:
                joined = {d.device for d in client.devices()}
                wanted = {w.name for w in self._living() if not w.paused} | {HEAD}
                if wanted <= joined:
                    return
                if time.monotonic() > deadline:
                    raise ClusterUnavailable(
                        f"workers {sorted(wanted - joined)} did not join",
                        hint="use log_level='info' to see why",
                    )
                time.sleep(_POLL_S)


@functools.cache
def _of_this_machine(threads: int) -> Measured:
    """Measured once in a process: workers that measured together would disturb each other, and
    the next cluster is on this machine too."""
    return measure(threads)


def _ways(gate: GateProcess, name: str) -> Ways:
    with socket.create_server((LOOPBACK, 0)) as free:  # a port for the worker, also when restarted
        behind = free.getsockname()[1]
    return Ways(behind=behind, **gate.ask("add", name=name, behind=behind))


def _spawn(module: str, options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(options)],
        stdin=subprocess.DEVNULL,
        env=environment_of(module),
        start_new_session=True,  # Ctrl-C goes to the user's program, which closes us
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM drains; there is nothing left that could, so soon the second one, then SIGKILL."""
    for number, patience_s in ((signal.SIGTERM, 0.5), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        process.send_signal(number)
        try:
            process.wait(timeout=patience_s)
            return
        except subprocess.TimeoutExpired:
            continue
