"""A cluster in a lab: the daemons that run on real devices, a worker each, with keys of its own."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psutil

from cluster.config import ADDRESS_FILE
from cluster.coordinator import HEAD, Address, CoordinatorOptions, await_address
from cluster.heap import environment_of
from cluster.keyring import KEYRING_FILE, read_keyring
from cluster.tokens import FOR_EVER_S, given, leave_token, new_secret, places_of, token_for
from cluster.worker import Ways, WorkerOptions
from meshinfer.errors import ClusterUnavailable

if TYPE_CHECKING:
    from cluster.lab.lab import Lab

_START_S: Final = 120.0  # a worker imports what it needs at 1/16 of a core, too
_DRAIN_S: Final = 2.0
_STOP_S: Final = 30.0  # dying takes CPU, too, of which a device may have little
_POLL_S: Final = 0.02


class LabCluster:
    """Made by ``Lab.start_cluster``. A client runs on device 0: ``lab.spawn(0, ...)``.

    Workers are numbered and named like the devices.
    """

    def __init__(
        self,
        lab: Lab,
        *,
        log_level: str,
        plaintext: bool,
        discovery: bool,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        ways: Callable[[int], Ways] | None = None,
    ) -> None:
        self.name = f"lab-{lab.name}-{secrets.token_hex(2)}"
        self.state = lab.state / self.name
        self._lab, self._log_level = lab, log_level
        self._plaintext, self._discovery = plaintext, discovery
        self._environment, self._log, self._ways = dict(environment or {}), log, ways
        self._workers: dict[int, subprocess.Popen] = {}
        self._paused: set[int] = set()
        self._coordinator: subprocess.Popen | None = None
        self._address: Address | None = None
        self._secret = new_secret()  # of the token that all workers join with
        try:
            self.state.mkdir()
            self._start_coordinator()
            for i in range(len(lab.devices)):
                self._start_worker(i)
            self.wait()
        except BaseException:
            self.stop()
            raise

    # --- facts

    @property
    def coordinator(self) -> str:
        """HOST:PORT, within the lab."""
        assert self._address is not None
        return f"{self._address.host}:{self._address.port}"

    @property
    def coordinator_pid(self) -> int:
        assert self._coordinator is not None
        return self._coordinator.pid

    @property
    def keyring(self) -> Path:
        return self.state / "coordinator" / "keyring.json"

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with which ``mi.Client()`` and all commands use this cluster."""
        return {
            **os.environ,
            "MESHINFER_COORDINATOR": self.coordinator,
            "MESHINFER_KEYRING": str(self.keyring),
            "MESHINFER_CLUSTER": self.name,
        }

    def runs(self, pid: int) -> bool:
        """Whether the coordinator is this process, and has not ended."""
        coordinator = self._coordinator
        return coordinator is not None and coordinator.pid == pid and coordinator.poll() is None

    def worker_pids(self) -> dict[int, int]:
        """Worker process by device; not of one that is killed, or just being started again."""
        children = {i: self._children(each) for i, each in sorted(self._workers.items())}
        return {i: pids[0] for i, pids in children.items() if pids}

    # --- faults

    def kill(self, i: int) -> None:
        """SIGKILL a device's worker and supervisor, as if its power went."""
        supervisor = self._workers.pop(i)
        self._paused.discard(i)
        dying = {supervisor.pid, *self._children(supervisor)}
        _signal(supervisor, signal.SIGKILL)
        supervisor.wait(_STOP_S)
        deadline = time.monotonic() + _STOP_S  # its folder is free for the next once it is gone
        while dying & set(self._lab.processes(i)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def crash(self, i: int) -> None:
        """SIGKILL a device's worker process only: its supervisor starts it again."""
        with suppress(KeyError, ProcessLookupError):
            os.kill(self.worker_pids()[i], signal.SIGKILL)

    def kill_coordinator(self) -> None:
        """SIGKILL the coordinator and what it has started."""
        assert self._coordinator is not None
        _signal(self._coordinator, signal.SIGKILL)
        self._coordinator.wait(_STOP_S)

    def restart_coordinator(self) -> None:
        """Start the coordinator again at its address, killing it first if it runs."""
        assert self._address is not None
        self.kill_coordinator()
        (self.state / "coordinator" / ADDRESS_FILE).unlink(missing_ok=True)
        self._start_coordinator(self._address.port, self._address.join_port)

    def restart(self, i: int, *, wait: bool = True) -> None:
        """Start a device's worker, killing it first if it runs; ``wait`` until it has joined."""
        if i in self._workers:
            self.kill(i)
        self._start_worker(i)
        if wait:
            self.wait()

    def pause(self, i: int) -> None:
        """SIGSTOP a device's worker and supervisor."""
        _signal(self._workers[i], signal.SIGSTOP)
        self._paused.add(i)

    def resume(self, i: int) -> None:
        _signal(self._workers[i], signal.SIGCONT)
        self._paused.discard(i)

    def heal(self, i: int) -> None:
        """Let a device's worker run: resumed if it was paused, started if it was killed."""
        if i in self._paused:
            self.resume(i)
        if i not in self._workers or self._workers[i].poll() is not None:
            self.restart(i, wait=False)

    def wait(self) -> None:
        """Until every worker that is not paused or killed has joined, or ``ClusterUnavailable``."""
        workers = [self._lab.devices[i].name for i in self._workers if i not in self._paused]
        request = {
            "address": self.coordinator,
            "keyring": str(self.keyring),
            "names": [HEAD, *workers],
            "timeout_s": _START_S,
        }
        # Without the device's limits: it only looks on.
        watcher = self._lab.spawn(
            0,
            [sys.executable, "-m", "cluster.lab.joined", json.dumps(request)],
            limits=False,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        _, said = watcher.communicate(timeout=2 * _START_S)
        if watcher.returncode:
            raise ClusterUnavailable(said.strip(), hint="use log_level='info' to see why")

    def stop(self) -> None:
        """Stop all of it: the workers at once, then the coordinator. Again is no error."""
        for supervisor in self._workers.values():
            _signal(supervisor, signal.SIGKILL)
        for i in list(self._workers):
            self.kill(i)
        coordinator = self._coordinator
        if coordinator is None:
            return
        for number, patience_s in (
            (signal.SIGTERM, _DRAIN_S),
            (signal.SIGTERM, _STOP_S),
            (signal.SIGKILL, _STOP_S),
        ):
            _signal(coordinator, number)
            with suppress(subprocess.TimeoutExpired):
                coordinator.wait(patience_s)
                break
        self._coordinator = None

    # --- inside

    def _start_coordinator(self, port: int = 0, join_port: int = 0) -> None:
        options = CoordinatorOptions(
            cluster=self.name,
            state_dir=str(self.state / "coordinator"),
            host=self._lab.address(0),
            port=port,
            join_port=join_port,
            tokens=(given(self._secret, "worker", ttl_s=FOR_EVER_S, reusable=True),),
            interfaces=(self._lab.address(0),) if self._discovery else (),
            plaintext=self._plaintext,  # all others take it from its keyring
            log_level=self._log_level,
            parent=os.getpid(),
        )
        self._coordinator = self._spawn(0, "cluster.coordinator", options)
        self._address = await_address(self._coordinator, self.state / "coordinator", _START_S)

    def _start_worker(self, i: int) -> None:
        device = self._lab.devices[i]
        self._invite(self.state / device.name)
        options = WorkerOptions(
            name=device.name,
            cluster=self.name,
            state_dir=str(self.state / device.name),
            coordinator=None if self._discovery else self.coordinator,
            interfaces=(self._lab.address(i),),
            threads=max(1, int(device.cpu)),
            log_level=self._log_level,
            parent=os.getpid(),
            gate=None if self._ways is None else self._ways(i),
        )
        self._workers[i] = self._spawn(i, "cluster.supervisor", options)

    def _invite(self, state: Path) -> None:
        """Leave a token to a worker that has not joined yet."""
        assert self._address is not None
        if (state / KEYRING_FILE).exists():
            return
        places = () if self._discovery else places_of(self._address.host, self._address.join_port)
        leave_token(state, token_for(read_keyring(self.keyring), "worker", self._secret, places))

    def _spawn(self, i: int, module: str, options: msgspec.Struct) -> subprocess.Popen:
        with ExitStack() as stack:
            log = None if self._log is None else stack.enter_context(self._log.open("ab"))
            return self._lab.spawn(
                i,
                _daemon(module, msgspec.to_builtins(options)),
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={**environment_of(module), **self._environment},
                start_new_session=True,  # Ctrl-C goes to the user's program, which closes the lab
            )

    @staticmethod
    def _children(supervisor: subprocess.Popen) -> list[int]:
        with suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(supervisor.pid).children()]
        return []


def _daemon(module: str, options: Mapping[str, Any]) -> Sequence[str]:
    return [sys.executable, "-m", module, json.dumps(options)]


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    """To a daemon and its children at once: they are a process group of their own."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
