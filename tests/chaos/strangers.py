"""Cases in which somebody without a key is in the network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from chaos.arena import Run

CONNECTIONS: Final = 300
RECORDS: Final = 10_000
RATE: Final = 5.0
AT: Final = 3
"""The device in whose network the stranger is; he has a processor of his own."""

_STRANGER = Path(__file__).resolve().parent / "stranger.py"
_LISTENS = "0A"  # include/net/tcp_states.h


@contextmanager
def stranger(run: Run, *arguments: str) -> Iterator[subprocess.Popen]:
    """He is there meanwhile; what he saw is in the history."""
    process = run.lab.spawn(
        AT,
        [sys.executable, str(_STRANGER), *arguments],
        limits=False,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        saw, _ = process.communicate(timeout=30.0)
        run.fault("stranger saw", **json.loads(saw.splitlines()[-1]))
    finally:
        process.kill()
        process.communicate()


def ports(run: Run) -> list[str]:
    """HOST:PORT of all that the daemons listen at, as the kernel says."""
    pids = {0: [run.cluster.coordinator_pid]}
    for i, pid in run.cluster.worker_pids().items():
        pids.setdefault(i, []).append(pid)
    found = set()
    for i, here in pids.items():
        rows = [r.split() for r in Path(f"/proc/{here[0]}/net/tcp").read_text().splitlines()[1:]]
        for row in rows:
            if row[3] == _LISTENS:
                found.add(f"{run.lab.address(i)}:{int(row[1].partition(':')[2], 16)}")
    return sorted(found)


def crowd(run: Run) -> None:
    """C17: 300 connections that say nothing, half a handshake, a frame of 4 GiB or garbage, on
    every port there is; what is closed is opened again."""
    requests = run.count(60, 600)
    run.deploy()
    with run.sampled():
        run.calm(requests, rate=RATE)
        places = ports(run)
        run.fault("crowd", AT, ports=len(places), connections=CONNECTIONS)
        with (
            stranger(run, "crowd", str(CONNECTIONS), *places),
            run.load("faults", requests, rate=RATE),
        ):
            pass
    run.log()
    run.heal()


def records(run: Run) -> None:
    """C18: 10,000 coordinators are announced that are none, half of them in the true one's words;
    then multicast passes nowhere. Devices that are told where theirs is start anew in both; one
    that has to look for it meets the impostor."""
    run.deploy()
    run.calm(run.count(40, 300), rate=RATE)
    with (
        stranger(run, "records", run.cluster.name, str(RECORDS), run.lab.address(AT)) as process,
        run.load("faults", 100_000, rate=RATE, within_s=300.0) as load,
    ):
        run.fault("records", AT, count=RECORDS)
        run.pause(2.0)
        (run.cluster.state / run.names[2] / "place.json").unlink()  # where it was last time
        _start_anew(run, 2)
        run.cluster._discovery = False  # from now on devices are told
        run.pause(2.0)
        _start_anew(run, 1)
        assert process.stdout is not None
        process.stdout.readline()  # all are sent
        _multicast(run, "off")
        run.fault("multicast filtered", AT)
        _start_anew(run, 2)
        run.pause(5.0)
        load.stop()
    _multicast(run, "on")
    run.log()
    run.heal()


def _start_anew(run: Run, victim: int) -> None:
    run.hurt("power", victim, lambda: run.power_cycle(victim))
    run.fault("anew", victim, name=run.names[victim])
    run.pause(3.0)


def _multicast(run: Run, passes: str) -> None:
    bridge = ["bridge", "-n", f"mi-{run.lab.name}-br", "link", "set", "dev"]
    for i in range(len(run.names)):
        subprocess.run([*bridge, f"d{i}", "mcast_flood", passes], check=True)
