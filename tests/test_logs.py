"""Logs tell one story: a fault has an id, and all that was done because of it carries that id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from cores import Cluster, image, kind
from oracle import assert_exact
from processes import eventually, let_in, small_model
from processes import image as array

import meshinfer as mi
from cluster.coordinator import CoordinatorOptions
from cluster.profiler import Measured
from cluster.worker import WorkerOptions
from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e

Line = dict[str, Any]
MODEL = small_model()
SPEED = 0.02
"""So slow that a kill meets a request at work."""


# --- by the cores


def told(cluster: Cluster) -> list[Line]:
    """What the coordinator's core noted."""
    return [{"event": n.text, "level": n.level, **n.fields} for n in cluster.coordinator.notes]


def of(lines: list[Line], *events: str) -> list[Line]:
    return [line for line in lines if line["event"] in events]


RECOVERIES = "request begins again", "tasks of a lost device go to others"


def test_each_request_that_a_lost_device_sets_back_names_that_loss() -> None:
    """1. four requests are under way; 2. pi-2 dies; 3. all are answered; 4. the log says why."""
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.deployed()
    cluster.when(kind(m.Deliver, by="pi-2"), lambda: cluster.kill("pi-2"))
    asked = [cluster.submit(image(i)) for i in range(4)]
    retried = {name for i, name in enumerate(asked) if cluster.check(name, image(i)).attempts > 1}
    lines = told(cluster)
    (lost,) = of(lines, "device lost")
    assert lost["device"] == "pi-2" and lost["incarnation"] and lost["why"] == "reset"
    again = of(lines, *RECOVERIES)
    assert retried <= {line["request"] for line in again} <= set(asked) and retried
    assert {line["cause"] for line in again} == {lost["cause"]}
    ended = {line["request"]: line for line in of(lines, "request answered")}
    assert set(ended) == set(asked)
    for name, line in ended.items():
        assert line.get("cause") == (lost["cause"] if name in retried else line.get("cause"))
        assert line["level"] == ("info" if "cause" in line else "debug")


def test_a_second_loss_is_another_cause_and_the_answer_names_both() -> None:
    """1. pi-1 dies under a request; 2. so does pi-2 under its next attempt; 3. pi-3 answers."""
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.deployed()
    cluster.when(kind(m.Deliver, by="pi-1"), lambda: cluster.kill("pi-1"))
    request = cluster.submit()
    cluster.settle(lambda: not cluster.nodes["pi-1"].alive)
    cluster.when(kind(m.Deliver, by="pi-2"), lambda: cluster.kill("pi-2"))
    cluster.check(request)
    lines = told(cluster)
    first, second = (line["cause"] for line in of(lines, "device lost"))
    assert first != second
    (answered,) = of(lines, "request answered")
    assert answered["cause"].split(",") == [first, second]


def test_a_failed_kernel_is_a_fault_of_its_request() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.kernel_fault = lambda node, job: "division by zero" if job.place[0] == 1 else None
    request = cluster.submit()
    cluster.failure(request)
    lines = told(cluster)
    failed = of(lines, "a task failed")
    assert len(failed) == limits.KERNEL_FAILURES_PER_REQUEST
    assert {line["request"] for line in failed} == {request}
    again = of(lines, "request begins again")
    assert [line["cause"] for line in again] == [line["cause"] for line in failed[:-1]]
    (end,) = of(lines, "request failed")
    assert end["level"] == "warning" and end["error"] == "InvalidInput"
    assert end["cause"].split(",") == [line["cause"] for line in failed]


def test_where_nothing_happens_nothing_is_said_above_debug_and_nothing_is_kept() -> None:
    cluster = Cluster()
    cluster.deployed()
    before = len(told(cluster))
    for i in range(5):
        cluster.check(cluster.submit(image(i)), image(i))
    lines = told(cluster)[before:]
    assert {line["level"] for line in lines} == {"debug"}
    assert [line["event"] for line in lines] == ["request begins", "request answered"] * 5
    assert not any("cause" in line for line in lines)


def test_causes_of_requests_that_nobody_waits_for_any_more_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. six requests are set back; 2. all are cancelled; 3. no more are known than may be."""
    monkeypatch.setattr(limits, "CAUSES_KEPT", 4)
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.deployed()
    cluster.when(kind(m.Deliver, by="pi-2"), lambda: cluster.kill("pi-2"))
    asked = [cluster.submit(image(i)) for i in range(6)]
    cluster.settle(lambda: bool(of(told(cluster), "device lost")))
    for request in asked:
        cluster.post(cluster.nodes["ann"], e.Cancelled(request), 0.0)
    cluster.pass_time(1.0)
    cluster.kill("pi-3")
    cluster.pass_time(1.0)
    faults = cluster.core.members.faults
    assert len(faults._causes) <= 4 and not faults._fresh


def test_a_refusal_at_the_door_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times too much load must not become ten times too much log."""
    monkeypatch.setattr(limits, "QUEUE_REQUESTS", 1)
    cluster = Cluster()
    cluster.deployed()
    asked = [cluster.submit(image(i)) for i in range(3)]
    for name in asked:
        cluster.outcome(name)
    refused = of(told(cluster), "request refused")
    assert refused and {line["level"] for line in refused} == {"debug"}
    assert {line["error"] for line in refused} == {"QueueFull"}
    assert not of(told(cluster), "request failed")


def test_a_program_that_uses_us_keeps_its_stdout_and_its_own_logging() -> None:
    program = """
import sys, structlog
from cluster import telemetry
if sys.argv[1:]:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stdout))
import meshinfer as mi
try:
    mi.Client("127.0.0.1:1", keyring="nowhere", timeout_s=0.1)
except mi.MeshInferError as error:
    print(type(error).__name__)
structlog.get_logger().info("a detail")
structlog.get_logger().warning("a warning")
"""

    def run(*argv: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    out, err = run()
    assert out.split() == ["AuthError"] and "a warning" in err and "detail" not in err
    out, err = run("own")
    assert "a warning" in out and "a detail" in out and not err


# --- by the daemons


@contextmanager
def daemon(module: str, options: Any, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    text = json.dumps(msgspec.to_builtins(options))
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-m", module, text], stderr=stderr)
        try:
            yield process
        finally:
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
                for each in (process, *children):
                    each.kill()
            process.wait(10)


def read(log: Path) -> list[Line]:
    """Each line that is whole, as the JSON that it must be."""
    return [json.loads(line) for line in log.read_text().rpartition("\n")[0].splitlines()]


def knows_that_it_joined(coordinator: Path, worker: Path) -> bool:
    """The last process of device a that joined is not lost, and itself has logged the joining."""
    at = [line for line in read(coordinator) if line.get("device") == "a"]
    (*_, last) = of(at, "device joined")
    lost = {line["incarnation"] for line in of(at, "device lost")}
    own = {line["incarnation"] for line in of(read(worker), "joined")}
    return last["incarnation"] in own - lost


def test_the_logs_of_daemons_lead_from_an_answer_to_the_death_behind_it(tmp_path: Path) -> None:
    """1. a worker process is killed at its task; 2. the answer comes; 3. from its id to the log of
    the coordinator, the cause, the device, and to why it died in the log of its supervisor."""
    folder, logs = tmp_path / "c", {name: tmp_path / f"{name}.log" for name in ("c", "a", "b")}
    common: Line = {"cluster": "logs", "parent": os.getpid(), "log_form": "json"}
    coordinator = CoordinatorOptions(
        state_dir=str(folder), host="127.0.0.1", port=0, interfaces=(), log_level="debug", **common
    )
    with daemon("cluster.coordinator", coordinator, logs["c"]):
        assert eventually((folder / "address.json").exists, 30.0)
        found, ring = json.loads((folder / "address.json").read_text()), folder / "keyring.json"
        where = f"127.0.0.1:{found['port']}"
        let_in(where, ring, tmp_path / "a", tmp_path / "b")
        workers = {
            name: WorkerOptions(
                name=name, state_dir=str(tmp_path / name), coordinator=where,
                measured=Measured((1e9,), 1e9, 0.0, 0.001), speed=SPEED, **common,
            )
            for name in ("a", "b")
        }  # fmt: skip
        with (
            daemon("cluster.supervisor", workers["a"], logs["a"]) as supervisor,
            daemon("cluster.supervisor", workers["b"], logs["b"]),
            mi.Client(where, keyring=ring, cluster="logs") as client,
        ):
            assert eventually(lambda: {d.device for d in client.devices()} >= {"a", "b"}, 30.0)
            client.deploy("net", MODEL, spread=True)
            for _ in range(20):  # until a kill meets a request at work
                joined = partial(knows_that_it_joined, logs["c"], logs["a"])  # or it dies unlogged
                assert eventually(joined, 30.0)
                first, *others = [client.submit("net", array()) for _ in range(16)]
                first.result(60.0)
                for child in psutil.Process(supervisor.pid).children():
                    child.kill()
                for future in others:
                    assert_exact(MODEL, array(), future.result(60.0).outputs)
                lines = read(logs["c"])
                if of(lines, *RECOVERIES):
                    break
            ended = "its last process ended"  # as its supervisor tells when the next one joins
            assert eventually(lambda: bool(of(read(logs["c"]), ended)), 30.0)
            assert eventually(joined, 30.0)
        lines = read(logs["c"])
        again = of(lines, *RECOVERIES)
        assert again and {line["request"] for line in again} <= {
            line["request"] for line in of(lines, "request answered")
        }
        lost = {line["cause"]: line for line in of(lines, "device lost")}
        assert {lost[line["cause"]]["device"] for line in again} == {"a"}
        joined = of(lines, "device joined")
        ids = {(line["device"], line["incarnation"]) for line in joined}
        assert {(line["device"], line["incarnation"]) for line in lost.values()} <= ids
    ends = of(lines, ended)
    assert ends and all(lost[line["cause"]]["device"] == line["device"] == "a" for line in ends)
    assert {e["why"] for e in ends} == {"SIGKILL"}
    own = read(logs["a"])
    (death, *_) = of(own, "worker died")
    assert death["device"] == "a" and death["why"] == "SIGKILL" and death["pid"]
    assert {line["device"] for line in own} == {"a"}
    theirs = {line["incarnation"] for line in own if line["event"] == "joined"}
    died = {line["incarnation"] for line in lost.values() if line["device"] == "a"}  # b was stopped
    assert died <= theirs


def test_a_worker_that_is_stopped_as_systemd_does_has_left_and_is_not_lost(tmp_path: Path) -> None:
    folder, log = tmp_path / "c", tmp_path / "c.log"
    common: Line = {"cluster": "left", "parent": os.getpid(), "log_form": "json"}
    coordinator = CoordinatorOptions(
        state_dir=str(folder), host="127.0.0.1", port=0, interfaces=(), **common
    )
    with daemon("cluster.coordinator", coordinator, log):
        assert eventually((folder / "address.json").exists, 30.0)
        where = f"127.0.0.1:{json.loads((folder / 'address.json').read_text())['port']}"
        let_in(where, folder / "keyring.json", tmp_path / "a")
        options = WorkerOptions(
            name="a", state_dir=str(tmp_path / "a"), coordinator=where,
            measured=Measured((1e9,), 1e9, 0.0, 0.001), **common,
        )  # fmt: skip
        with daemon("cluster.supervisor", options, tmp_path / "a.log") as supervisor:
            assert eventually(lambda: bool(of(read(tmp_path / "a.log"), "joined")), 30.0)
            supervisor.terminate()
            assert supervisor.wait(30.0) == 0
        assert eventually(lambda: bool(of(read(log), "device left", "device lost")), 30.0)
        (line,) = of(read(log), "device left", "device lost")
    assert (line["event"], line["device"], line["level"]) == ("device left", "a", "info")
