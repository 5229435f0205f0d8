"""What a worker takes of a small board while it waits for work, and what it was told to take."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
from processes import eventually
from test_cli import daemon as begun
from test_daemons import address_of, coordinator_options, daemon

import meshinfer as mi
from cluster.tokens import leave_token
from meshinfer import limits

LONG_S = 60.0
IDLE_BYTES = 80_000_000
"""Of a supervisor and its worker together, each page by its share (PSS)."""


def tree(pid: int) -> list[psutil.Process]:
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def held(pid: int) -> int:
    return sum(each.memory_full_info().pss for each in tree(pid))


def test_a_worker_grants_and_takes_what_it_was_told_and_is_small_while_idle(
    tmp_path: Path,
) -> None:
    """Started by its command, measured there, with its supervisor."""
    here, pi = tmp_path / "here", tmp_path / "pi"
    pi.mkdir()
    options = coordinator_options(here, interfaces=("127.0.0.1",))
    with daemon("cluster.coordinator", options):
        found = address_of(here)
        where = f"127.0.0.1:{found['port']}"
        with mi.Client(where, keyring=here / "keyring.json") as admin:
            leave_token(pi / "state", admin.admitting.token())
            started = begun(
                pi, "worker", "--name", "pi", "--state-dir", pi / "state", "--cluster",
                options.cluster, "--interface", "127.0.0.1", "--threads", 1, "--memory", 500,
                "--nice", 7,
            )  # fmt: skip
            with started as worker:
                ready = lambda: [d for d in admin.devices() if d.device == "pi"]  # noqa: E731
                assert eventually(lambda: bool(ready()), LONG_S)
                assert ready()[0].facts.memory_bytes == 500_000_000 - limits.WORKER_BYTES
                both = tree(worker.pid)
                assert len(both) == 2, [each.cmdline() for each in both]
                assert both[1].nice() - os.nice(0) == 7
                time.sleep(2.0)  # what it took to join is given back
                assert held(worker.pid) < IDLE_BYTES
