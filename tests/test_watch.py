"""``meshinfer devices --watch``: what becomes of devices is told as it happens, to any reader."""

from __future__ import annotations

import json
import os
import pty
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest
from processes import eventually

import meshinfer as mi
from cluster.cli.watch import GONE, Change, State, changes, states
from meshinfer.protocol.messages import DeviceInfo, Facts

WITHIN_S = 40.0
Line = dict[str, Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(2) as made:
        yield made


class Watching:
    """A command that goes on; its lines as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def close(self) -> None:
        self._thread.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def until(self, fits: Callable[[Line], bool]) -> Line:
        """The next line of which this is so."""
        while True:
            line = json.loads(self.lines.get(timeout=WITHIN_S))
            if fits(line):
                return line


@contextmanager
def watching(cluster: mi.LocalCluster, *arguments: str) -> Iterator[Watching]:
    command = [sys.executable, "-m", "cluster.cli", "devices", "--watch", *arguments]
    options = ("--coordinator", cluster.address, "--keyring", str(cluster.keyring))
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    seen = Watching(process)
    try:
        yield seen
    finally:
        process.kill()
        process.wait(10)
        seen.close()


def about(device: str, state: str) -> Callable[[Line], bool]:
    return lambda line: line["device"] == device and line["state"] == state


def is_lost(device: str) -> Callable[[Line], bool]:
    return lambda line: line["device"] == device and line["state"] in (GONE, "dead")


def test_a_crash_and_its_cause_a_loss_and_a_newcomer_are_told_as_lines_of_json(
    cluster: mi.LocalCluster,
) -> None:
    first, second = cluster.names()
    with watching(cluster, "--json") as seen:
        found = [seen.until(about(name, "ready")) for name in (first, second)]
        assert [line["before"] for line in found] == ["", ""] and found[0]["time"].endswith("Z")
        cluster.crash(0)
        seen.until(is_lost(first))
        back = seen.until(about(first, "ready"))
        assert "SIGKILL" in back["cause"]
        cluster.kill(1)
        assert seen.until(is_lost(second))["before"]
        new = cluster.add()
        assert seen.until(about(new, "ready"))["before"] == ""
        seen.process.send_signal(signal.SIGINT)
        assert seen.process.wait(WITHIN_S) == 130


def test_without_a_terminal_people_get_a_line_a_change(cluster: mi.LocalCluster) -> None:
    with watching(cluster) as seen:
        missing = {"coordinator: answers", "head: ready"}
        missing |= {f"{name}: ready" for name in cluster.names()}
        while missing:
            line = seen.lines.get(timeout=WITHIN_S)
            missing -= {each for each in missing if f" {each}" in line}


def test_a_terminal_gets_a_table_that_is_drawn_again(cluster: mi.LocalCluster) -> None:
    ours, theirs = pty.openpty()
    options = ("--coordinator", cluster.address, "--keyring", str(cluster.keyring))
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "devices", "--watch", *options],
        stdout=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    said = bytearray()

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while found := os.read(ours, 1 << 16):
                said.extend(found)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert eventually(lambda: said.count(b"HEARD-S") >= 3, WITHIN_S), bytes(said)
        for name in cluster.names():
            assert name.encode() in said
        process.send_signal(signal.SIGINT)
        assert process.wait(WITHIN_S) == 130
    finally:
        process.kill()
        process.wait(10)
        reader.join(10)
        os.close(ours)


def test_a_coordinator_that_falls_silent_is_told_and_so_is_its_return() -> None:
    with mi.LocalCluster(1) as cluster, watching(cluster, "--json") as seen:
        seen.until(about("coordinator", "answers"))
        coordinator = cluster._coordinator
        assert coordinator is not None
        coordinator.send_signal(signal.SIGSTOP)
        try:
            seen.until(about("coordinator", "silent"))
        finally:
            coordinator.send_signal(signal.SIGCONT)
        seen.until(about("coordinator", "answers"))


def test_any_state_and_cause_that_a_coordinator_tells_is_shown() -> None:
    """States that are yet to be thought of, too."""
    before = {"pi-1": State("ready"), "pi-2": State("ready"), "pi-3": State("ready")}
    now = {"pi-1": State("ready"), "pi-2": State("quarantined", "SIGSEGV"), "pi-4": State("new")}
    assert changes(before, now) == [
        Change("pi-2", "ready", "quarantined", "SIGSEGV"),
        Change("pi-3", "ready", GONE, ""),
        Change("pi-4", "", "new", ""),
    ]
    assert str(changes(before, now)[0]) == "pi-2: ready -> quarantined (SIGSEGV)"
    assert changes(now, now) == []
    oom = "SIGKILL, out of memory"
    info = DeviceInfo(device="pi-1", state="suspect", facts=Facts(), heard_s=0.0, cause=oom)
    assert states((info,)) == {"pi-1": State("suspect", "SIGKILL, out of memory")}
    again = msgspec.structs.replace(info, cause="SIGSEGV")
    (change,) = changes(states((info,)), states((again,)))
    assert change.cause == "SIGSEGV", "it died again between two looks"
