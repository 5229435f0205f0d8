"""What --interface promises of daemons: they listen there alone, with every socket."""

from __future__ import annotations

import secrets
from pathlib import Path

import psutil
import pytest
from processes import eventually, let_in
from test_cli import Done, address_of, daemon, meshinfer, refused

LO, OTHER_LO = "127.0.0.1", "127.0.0.2"
LONG_S = 30.0


def listens(pid: int) -> set[tuple[str, int]]:
    """Where a process and all below it listen over TCP."""
    root = psutil.Process(pid)
    found: set[tuple[str, int]] = set()
    for each in (root, *root.children(recursive=True)):
        connections = each.net_connections("tcp")
        found |= {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def test_a_coordinator_and_the_worker_beside_it_listen_at_their_interface_alone(
    tmp_path: Path,
) -> None:
    """Control, join and bulk, the head's bulk and the worker's, also where mDNS is off."""
    name = f"listen-{secrets.token_hex(4)}"
    options = ("--cluster", name, "--interface", LO, "--no-mdns", "--port", 0, "--threads", 1)
    with daemon(tmp_path, "coordinator", *options, "--name", "beside") as process:
        where = address_of(tmp_path, name, process)
        to = ("--coordinator", where, "--cluster", name)
        assert eventually(lambda: "beside" in meshinfer(tmp_path, "devices", *to).stdout, LONG_S)
        found = listens(process.pid)
        assert len(found) == 5 and {host for host, _ in found} == {LO}
        (log,) = tmp_path.glob("coordinator-*.log")
        assert f"host={LO}" in log.read_text()


def test_a_worker_listens_at_its_interface_alone(tmp_path: Path) -> None:
    """Another than the one that leads to the coordinator: it says so."""
    name = f"listen-{secrets.token_hex(4)}"
    options = ("--cluster", name, "--host", LO, "--no-mdns", "--port", 0, "--no-compute")
    with daemon(tmp_path, "coordinator", *options) as process:
        where = address_of(tmp_path, name, process)
        let_in(where, tmp_path / f"coordinator-{name}" / "keyring.json", tmp_path / "w")
        of_worker = ("--state-dir", tmp_path / "w", "--name", "apart", "--threads", 1)
        to = ("--coordinator", where, "--cluster", name)
        with daemon(tmp_path, "worker", *to, *of_worker, "--interface", OTHER_LO) as worker:
            assert eventually(lambda: "apart" in meshinfer(tmp_path, "devices", *to).stdout, LONG_S)
            assert {host for host, _ in listens(worker.pid)} == {OTHER_LO}
        (log,) = tmp_path.glob("worker-*.log")
        assert f"--interface {LO}" in log.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--interface", LO, "--interface", OTHER_LO), "--host"),
        (("--interface", "192.0.2.1"), "192.0.2.1"),  # of documentation, and nobody's
    ],
)
def test_where_a_coordinator_cannot_listen_is_said(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    done: Done = meshinfer(tmp_path, "coordinator", *options, "--no-mdns", "--port", 0)
    refused(done, 78, words)
