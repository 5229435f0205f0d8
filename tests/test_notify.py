"""What daemons tell a service manager: read from a real socket of sd_notify(3)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from processes import alive, eventually

from cluster import notify
from cluster.coordinator import Address, CoordinatorOptions
from cluster.keyring import KEYRING_FILE, read_keyring
from cluster.profiler import Measured
from cluster.tokens import given, leave_token, new_secret, token_for
from cluster.worker import WorkerOptions

WITHIN_S = 30.0
CLUSTER = f"test-{os.getpid()}"


class Manager:
    """A service manager, as far as it listens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def hears(self, line: str, times: int = 1) -> bool:
        """Whether this line is told so often, in time."""
        return eventually(lambda: self.lines().count(line) >= times, WITHIN_S)

    def lines(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard += self._socket.recv(4096).decode().split("\n")
        return self.heard

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@contextlib.contextmanager
def daemon(module: str, options: Any, manager: Manager) -> Iterator[subprocess.Popen[bytes]]:
    """As systemd would start it: nobody's child that it has to end with."""
    text = json.dumps(msgspec.to_builtins(options))
    environment = {k: v for k, v in os.environ.items() if k != "MESHINFER_COORDINATOR"}
    environment |= {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "3000000"}
    process = subprocess.Popen([sys.executable, "-m", module, text], env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def coordinator(folder: Path, secret: bytes, **more: Any) -> CoordinatorOptions:
    fields = {"host": "127.0.0.1", "port": 0, "interfaces": (), "cluster": CLUSTER, **more}
    return CoordinatorOptions(state_dir=str(folder), tokens=(given(secret, "worker"),), **fields)


def address_of(folder: Path) -> Address:
    path = folder / "address.json"
    assert eventually(path.exists, WITHIN_S)
    return msgspec.json.decode(path.read_bytes(), type=Address)


def test_a_coordinator_says_that_it_listens_and_lives_and_stops(
    manager: Manager, tmp_path: Path
) -> None:
    folder = tmp_path / "coordinator"
    with daemon("cluster.coordinator", coordinator(folder, new_secret()), manager) as process:
        port = address_of(folder).port
        assert manager.hears("READY=1")
        assert f"STATUS=listens at port {port}" in manager.lines()
        assert manager.hears("WATCHDOG=1", manager.lines().count("WATCHDOG=1") + 2)
        process.terminate()
        assert manager.hears("STOPPING=1")
        assert process.wait(WITHIN_S) == 0


def test_a_worker_asks_for_time_until_it_has_joined_and_its_supervisor_lives_for_it(
    manager: Manager, tmp_path: Path
) -> None:
    folder, state, secret = tmp_path / "coordinator", tmp_path / "worker", new_secret()
    silent = Manager(tmp_path / "silent")
    with daemon("cluster.coordinator", coordinator(folder, secret), silent):
        where, ring = address_of(folder), read_keyring(folder / KEYRING_FILE)
    leave_token(state, token_for(ring, "worker", secret, (f"127.0.0.1:{where.join_port}",)))
    options = WorkerOptions(
        name="w", cluster=CLUSTER, state_dir=str(state), coordinator=f"127.0.0.1:{where.port}",
        interfaces=(), measured=Measured((1e9,), 1e9, 0.0, 0.001),
    )  # fmt: skip
    again = coordinator(folder, secret, port=where.port, join_port=where.join_port)
    with daemon("cluster.supervisor", options, manager) as process:
        assert manager.hears("EXTEND_TIMEOUT_USEC=60000000", 2)
        assert "READY=1" not in manager.lines()
        with daemon("cluster.coordinator", again, silent):
            assert manager.hears("READY=1")
            joined = f"STATUS=joined the coordinator at 127.0.0.1:{where.port}"
            assert joined in manager.lines()
            os.kill(child_of(process.pid), signal.SIGKILL)
            assert manager.hears("STATUS=its worker process died: SIGKILL")
            assert manager.hears(joined, 2)
            process.terminate()
            assert manager.hears("STOPPING=1")
            assert process.wait(WITHIN_S) == 0
    silent.close()


def child_of(pid: int) -> int:
    import psutil

    (child,) = psutil.Process(pid).children()
    return child.pid


def test_a_daemon_that_hangs_feeds_the_watchdog_no_more(manager: Manager, tmp_path: Path) -> None:
    """Its loop stands still in a message's midst; other threads of it go on."""
    said = notify.Manager(str(manager.path), 1.0, ("loop", "head"))
    now = time.monotonic()
    said.alive("head", "", False, now)
    said.alive("loop", "", True, now)
    assert manager.lines().count("READY=1") == 1
    before = manager.lines().count("WATCHDOG=1")
    for step in range(1, 40):  # the head goes on alone
        said.alive("head", "", False, now + step * 0.1)
    fed = manager.lines().count("WATCHDOG=1") - before
    assert 1 <= fed <= 2, "for as long as the loop's last beat holds"
    said.alive("loop", "", True, now + 4.0)
    assert manager.lines().count("WATCHDOG=1") == before + fed + 1
    assert manager.lines().count("READY=1") == 1


def test_what_another_program_started_says_nothing_in_its_name(
    manager: Manager, tmp_path: Path
) -> None:
    folder = tmp_path / "coordinator"
    options = coordinator(folder, new_secret(), parent=os.getpid())
    with daemon("cluster.coordinator", options, manager) as process:
        address_of(folder)
        process.terminate()
        assert process.wait(WITHIN_S) == 0
    assert not alive(process.pid)
    assert manager.lines() == []


def test_nobody_listens_and_nothing_happens(tmp_path: Path) -> None:
    for address in (str(tmp_path / "gone"), "@meshinfer-nobody"):
        notify.Manager(address, 1.0, ("loop",)).alive("loop", "status", True, 1.0)
    notify.alive("not enabled: in a test, in a user's program", ready=True)
