"""Why a worker process died, by its supervisor: real signals, real exits, real want of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from architectures import squeezenet1_1
from oracle import assert_exact
from processes import eventually, image, worker_pids

import meshinfer as mi
from cluster.doing import Doing, new_page
from cluster.processes import cause_of, oom_kills, was_killed

MODEL, IMAGES = squeezenet1_1(64), [image(64, seed) for seed in range(6)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(3, speeds=[0.05] * 3) as made:
        yield made


def test_what_a_killed_process_computed_is_read_afterwards() -> None:
    page = new_page()
    child = "\n".join(
        [
            "import os, sys",
            "from cluster.doing import Doing",
            "doing = Doing(int(sys.argv[1]))",
            "doing.begin('first', 1, (0, 1)); doing.end()",
            "doing.begin('second', 2, (3, 4)); os.kill(os.getpid(), 9)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", child, str(page)], pass_fds=(page,), timeout=30)
    assert done.returncode == -signal.SIGKILL
    here = Doing(page)
    assert here.read() == {"request": "second", "attempt": 2, "place": [3, 4]}
    here.end()
    assert here.read() == {}


@pytest.mark.parametrize(
    "text", [b"\xff\xff\xff\xff", b"\x05\x00\x00\x00[1,2", b"\x02\x00\x00\x00[]"]
)
def test_a_page_that_was_written_over_says_nothing(text: bytes) -> None:
    page = new_page()
    os.pwrite(page, text, 0)
    assert Doing(page).read() == {}


def test_a_name_too_long_for_the_page_is_left_out() -> None:
    doing = Doing(-1)
    doing.begin("x" * 5000, 1, (0, 0))
    assert doing.read() == {}


@pytest.mark.parametrize(
    ("code", "cause", "killed"),
    [
        (-signal.SIGSEGV, "SIGSEGV", False),
        (-signal.SIGKILL, "SIGKILL", True),
        (-signal.SIGTERM, "SIGTERM", True),
        (-signal.SIGILL, "SIGILL", False),
        (7, "exit code 7", False),
    ],
)
def test_a_cause_says_whether_the_process_was_at_fault(code: int, cause: str, killed: bool) -> None:
    assert cause_of(code, oom_kills()) == cause
    assert was_killed(code, cause) == killed


def test_a_kill_for_want_of_memory_is_no_other_s_doing() -> None:
    cause = cause_of(-signal.SIGKILL, oom_kills() - 1)
    assert cause == "SIGKILL, out of memory" and not was_killed(-signal.SIGKILL, cause)


@pytest.mark.parametrize(
    ("own", "file"),
    [
        ("0::/mesh/pi-1\n", "mesh/pi-1/memory.events"),
        ("4:memory:/mesh/pi-1\n0::/\n", "memory/mesh/pi-1/memory.oom_control"),
        ("4:memory:/hidden\n", "memory/memory.oom_control"),
    ],
)
def test_the_group_s_own_counter_is_asked_first(tmp_path: Path, own: str, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("under_oom 0\noom_kill 41\n")
    (tmp_path / "own").write_text(own)
    assert oom_kills(tmp_path, tmp_path / "own") == 41


def page_of(supervisor: int) -> Doing:
    """What the worker under a supervisor computes, from the page that both have."""
    for link in Path(f"/proc/{supervisor}/fd").iterdir():
        if "meshinfer-doing" in os.readlink(link):
            return Doing(os.open(link, os.O_RDWR))
    raise AssertionError("no page")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_in_compute_costs_no_request_and_names_signal_request_and_task(
    cluster: mi.LocalCluster, number: signal.Signals
) -> None:
    name, pid = cluster.names()[0], worker_pids(cluster)[0]
    doing = page_of(psutil.Process(pid).ppid())
    with cluster.client() as client:
        client.deploy("net", MODEL, spread=True)
        futures = [client.submit("net", x, deadline_s=60) for x in IMAGES]
        until = time.monotonic() + 30.0
        while not doing.read() and time.monotonic() < until:
            time.sleep(0.001)
        os.kill(pid, number)
        results = [future.result(60) for future in futures]
        for x, result in zip(IMAGES, results, strict=True):
            assert_exact(MODEL, x, result.outputs)
        assert eventually(partial(cause_is, client, name, number.name), 20.0)
        (cause,) = (d.cause for d in client.devices() if d.device == name)
        assert cause.split()[-1] in {result.request_id for result in results}, cause
        assert any(name in result.devices_lost and result.degraded for result in results)


def cause_is(client: mi.Client, name: str, cause: str) -> bool:
    return any(d.device == name and d.cause.startswith(cause) for d in client.devices())


def test_a_worker_that_calls_exit_in_a_kernel_is_started_again(tmp_path: Path) -> None:
    """Exit codes that end a supervisor do so only where nothing was computed."""
    source = Path(__file__).resolve().parent.parent
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "worker.py").write_text(
        "import json, os, sys\n"
        "from cluster.doing import Doing\n"
        "options = json.loads(sys.argv[1])\n"
        "if options['ended'] is None:\n"
        "    Doing(options['doing']).begin('mine', 3, (1, 2))\n"
        "    os._exit(0)\n"
        "print(json.dumps(options['ended']))\n"
        "sys.exit(76)\n"
    )
    for module in ("__init__", "doing", "processes", "supervisor"):
        (tmp_path / "cluster" / f"{module}.py").write_text(
            (source / "cluster" / f"{module}.py").read_text()
        )
    options = json.dumps({"name": "pi-1"})
    done = subprocess.run(
        [sys.executable, "-m", "cluster.supervisor", options],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 76, done.stderr
    assert json.loads(done.stdout) == {
        "request": "mine", "attempt": 3, "place": [1, 2], "cause": "exit code 0", "killed": False,
    }  # fmt: skip
    assert "exit code 0" in done.stderr
