"""Daemons as processes of their own: refusals that both sides print, exit codes, loud defects."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from architectures import squeezenet1_1
from oracle import assert_exact
from processes import alive, eventually, image, let_in, small_model

import meshinfer as mi
from cluster import heap
from cluster.coordinator import CoordinatorOptions, await_address
from cluster.identity import IDENTITY_FILE, machine_id
from cluster.keyring import KEYRING_FILE, Keyring, new_keyring, read_keyring, write_keyring
from cluster.keys import generate_keypair, write_private
from cluster.profiler import Measured
from cluster.worker import WorkerOptions
from meshinfer import limits
from meshinfer.protocol import messages as m

MODEL, IMAGE = small_model(), image()
SPEC = mi.ImageSpec(input="image", output="y", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
WITHIN_S = 30.0


def test_a_coordinator_may_open_what_a_thousand_devices_take(tmp_path: Path) -> None:
    """Three connections each, where the soft limit of 1024 would be reached by 300 of them."""
    options = CoordinatorOptions(state_dir=str(tmp_path), host="127.0.0.1", port=0, interfaces=())
    few = (
        "from resource import RLIMIT_NOFILE as kind, getrlimit, setrlimit\n"
        "setrlimit(kind, (512, getrlimit(kind)[1]))"
    )
    with daemon("cluster.coordinator", options, few) as process:
        await_address(process, tmp_path, WITHIN_S)
        soft, hard = psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == min(hard, 4 * limits.DEVICES + 512) > 512


def heaps(pid: int) -> int:
    """Of other threads than the first: glibc keeps 64 MiB of addresses for each."""
    spans = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        spans.append((first, last))
    found = 0
    for (first, middle), (begin, last) in pairwise(spans):
        found += middle == begin and last - first == 64 << 20 and first % (64 << 20) == 0
    return found


def test_all_threads_of_a_coordinator_share_one_heap(tmp_path: Path) -> None:
    """It is the process that was started. Others have a heap a thread, which shows that the count
    counts."""
    code = "import sys, threading; threading.Thread(target=sys.stdin.read).start()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as other:
        assert eventually(lambda: heaps(other.pid) > 0)
        other.communicate()
    options = coordinator_options(tmp_path / "c")
    with daemon("cluster.coordinator", options) as coordinator:
        await_address(coordinator, tmp_path / "c", WITHIN_S)
        assert psutil.Process(coordinator.pid).num_threads() > 8
        assert heaps(coordinator.pid) == 0
        began = Path(f"/proc/{coordinator.pid}/environ").read_bytes().split(b"\0")
        assert {f"{k}={v}".encode() for k, v in heap.ONE.items()} <= set(began)


def test_what_is_large_leaves_no_gaps_in_the_one_heap() -> None:
    """1. large blocks come and go, each larger than the last, and a small one in between stays;
    2. the process holds hardly more than at first. By glibc's own rule it holds all of them."""
    code = (
        "import os, sys, gc\n"
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "stay, before = [], held()\n"
        "for i in range(200):\n"
        "    blocks = [bytearray(b'x') * (150_000 + 1000 * i) for _ in range(9)]\n"
        "    stay.append(bytearray(b'y') * 30_000)\n"
        "    del blocks\n"
        "print(held() - before - 200 * 30_000)"
    )
    grown = []
    for settings in ({}, heap.ONE):
        own = {k: v for k, v in os.environ.items() if k not in heap.ONE}
        done = subprocess.run(
            [sys.executable, "-c", code], env=own | settings, capture_output=True, timeout=60
        )
        grown.append(int(done.stdout))
    assert grown[1] < 1 << 20 < grown[0]


def test_room_that_one_model_leaves_serves_the_next_until_it_is_given_back() -> None:
    """In the thread that prepares, which is not the first one."""
    code = (
        "import resource, threading, psutil; from cluster.heap import Room\n"
        "room, mib, faults = Room(1 << 30), 1 << 20, []\n"
        "def held(): return psutil.Process().memory_info().rss\n"
        "def prepare():\n"
        "    for _ in range(3):\n"
        "        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt\n"
        "        blocks = [bytes(b'x') * (40 * mib) for _ in range(3)]; del blocks\n"
        "        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)\n"
        "def other(work):\n"
        "    thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "first = held(); room.keep(); other(prepare); kept = held() - first\n"
        "room.give_back(); left = held() - first\n"
        "print(*faults, kept // mib, left // mib)"
    )
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    first, *later, kept, left = map(int, done.stdout.split())
    assert first > 20_000 and max(later) < 1000, "no new pages"
    assert kept > 100 and left < 20


@pytest.mark.parametrize("chosen", ["", "3"])
def test_only_who_shares_one_heap_begins_anew_and_what_it_starts_chooses(chosen: str) -> None:
    """Its user's own choice stays, also for what it starts."""
    code = (
        "import os; from cluster.heap import share_one\n"
        "began = os.environ.get('MALLOC_ARENA_MAX'); share_one()\n"
        "print(os.getpid(), began, os.environ.get('MALLOC_ARENA_MAX'))"
    )
    given = {k: v for k, v in os.environ.items() if k not in heap.ONE}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=given | ({"MALLOC_ARENA_MAX": chosen} if chosen else {}),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        said, _ = process.communicate(timeout=WITHIN_S)
    assert said.split() == [str(process.pid), *([chosen, chosen] if chosen else ["1", "None"])]


@pytest.mark.parametrize("hard", [600, 6000])
def test_a_process_that_may_not_open_as_many_says_what_to_do(hard: int) -> None:
    code = (
        "import resource; from cluster.processes import open_more; kind = resource.RLIMIT_NOFILE\n"
        f"resource.setrlimit(kind, (512, {hard}))\n"
        "assert open_more(4512) == resource.getrlimit(kind)[0]; print(resource.getrlimit(kind)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(min(hard, 4512))
    said = done.stdout + done.stderr
    assert all(word in said for word in ("LimitNOFILE=4512", "ulimit -Hn")) == (hard < 4512), said


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(2) as made:
        yield made


@contextlib.contextmanager
def daemon(module: str, options: Any, patch: str = "") -> Iterator[subprocess.Popen[str]]:
    """A daemon whose stderr is read; ``patch`` runs before it."""
    code = f"import sys\nfrom {module} import main\n{patch}\nsys.exit(main(sys.argv[1:]))"
    text = json.dumps(msgspec.to_builtins(options))
    process = subprocess.Popen(
        [sys.executable, "-c", code, text],
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "MESHINFER_COORDINATOR"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def coordinator_options(folder: Path, **more: Any) -> CoordinatorOptions:
    fields: dict[str, Any] = {
        "state_dir": str(folder), "host": "127.0.0.1", "port": 0, "interfaces": (),
        "parent": os.getpid(), "cluster": f"test-{os.getpid()}",
    }  # fmt: skip
    return CoordinatorOptions(**{**fields, **more})


def address_of(folder: Path) -> dict[str, Any]:
    path = folder / "address.json"
    assert eventually(path.exists, 20.0)
    return json.loads(path.read_text())


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=20)
    return process.returncode, stderr


def worker_options(folder: Path, keyring: Path | None, port: int, cluster: str) -> WorkerOptions:
    """Of one that an admin, with this keyring, lets in."""
    if keyring is not None:
        let_in(f"127.0.0.1:{port}", keyring, folder)
    return WorkerOptions(
        name="w", cluster=cluster, state_dir=str(folder), coordinator=f"127.0.0.1:{port}",
        measured=Measured((1e9,), 1e9, 0.0, 0.001), parent=os.getpid(),
    )  # fmt: skip


def joined(folder: Path, ring: Keyring) -> None:
    """Have a worker with this folder find that it has joined, by this keyring."""
    folder.mkdir()
    pair = {"public": ring.key.public, "secret": ring.key.secret}
    write_private(folder / IDENTITY_FILE, {"machine": machine_id(), "key": pair})
    write_keyring(folder / KEYRING_FILE, ring)


OTHER_PROTOCOL = "from meshinfer.protocol import messages\nmessages.PROTOCOL = (98, 99)"


def test_a_worker_of_another_protocol_is_refused_and_both_sides_say_why(tmp_path: Path) -> None:
    options = coordinator_options(tmp_path / "c")
    with daemon("cluster.coordinator", options) as coordinator:
        port = address_of(tmp_path / "c")["port"]
        ring = tmp_path / "c" / "keyring.json"
        mine = worker_options(tmp_path / "w", ring, port, options.cluster)
        with daemon("cluster.worker", mine, OTHER_PROTOCOL) as worker:
            code, words = end_of(worker)
        assert code == 76
        assert "protocol 98 to 99" in words and "same release" in words
        with daemon("cluster.worker", msgspec.structs.replace(mine, cluster="x")) as worker:
            assert end_of(worker)[0] == 78
        coordinator.terminate()
        code, theirs = end_of(coordinator)
        assert code == 0
        assert "protocol 98 to 99" in theirs and "same release" in theirs


def test_a_client_of_another_protocol_is_refused(
    cluster: mi.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(m, "PROTOCOL", (98, 99))
    with pytest.raises(mi.ProtocolMismatch, match="protocol 98 to 99"):
        cluster.client()


def test_a_worker_with_a_foreign_key_is_refused(cluster: mi.LocalCluster, tmp_path: Path) -> None:
    """Of the same coordinator: it was revoked, or made up."""
    own = read_keyring(cluster.keyring)
    joined(tmp_path / "w", replace(own, key=generate_keypair(), role="worker", name="w"))
    port = int(cluster.address.rpartition(":")[2])
    options = worker_options(tmp_path / "w", None, port, cluster.cluster)
    with daemon("cluster.worker", options) as worker:
        code, words = end_of(worker)
    assert code == 77 and "does not admit this device" in words and "meshinfer token" in words


def test_a_worker_of_another_coordinator_is_told_that_this_one_has_another_key(
    cluster: mi.LocalCluster, tmp_path: Path
) -> None:
    ring, _ = new_keyring(cluster.cluster)
    joined(tmp_path / "w", replace(ring, role="worker", name="w"))
    port = int(cluster.address.rpartition(":")[2])
    with daemon("cluster.worker", worker_options(tmp_path / "w", None, port, ring.cluster)) as w:
        code, words = end_of(w)
    assert code == 77 and "does not hold the key" in words


@pytest.mark.parametrize("of_coordinator", [False, True])
def test_a_worker_and_a_coordinator_of_which_one_is_encrypted_end_with_a_refusal(
    tmp_path: Path, of_coordinator: bool
) -> None:
    options = coordinator_options(tmp_path / "c", plaintext=of_coordinator)
    with daemon("cluster.coordinator", options):
        port = address_of(tmp_path / "c")["port"]
        ring = read_keyring(tmp_path / "c" / "keyring.json")
        assert ring.plaintext is of_coordinator
        # The very keys do not help.
        turned = replace(ring, plaintext=not of_coordinator, role="worker", name="w")
        joined(tmp_path / "w", turned)
        mine = worker_options(tmp_path / "w", None, port, options.cluster)
        with daemon("cluster.worker", mine) as worker:
            code, words = end_of(worker)
        assert code == 77 and "encrypt" in words
        assert ("NOT ENCRYPTED" in words) is not of_coordinator


def test_a_coordinator_without_encryption_keeps_saying_so(tmp_path: Path) -> None:
    options = coordinator_options(tmp_path, plaintext=True)
    patch = "import cluster.coordinator\ncluster.coordinator._WARN_S = 0.05"
    with daemon("cluster.coordinator", options, patch) as process:
        assert process.stderr is not None
        for _ in range(4):
            while "NOT ENCRYPTED" not in (line := process.stderr.readline()):
                assert line, "it ended"
        process.terminate()
        assert end_of(process)[0] == 0


def test_a_port_in_use_is_a_configuration_error(cluster: mi.LocalCluster, tmp_path: Path) -> None:
    port = int(cluster.address.rpartition(":")[2])
    with daemon("cluster.coordinator", coordinator_options(tmp_path, port=port)) as second:
        code, words = end_of(second)
    assert code == 78 and f"port {port}" in words and "in use" in words


def test_two_coordinators_of_one_name_are_an_error(tmp_path: Path) -> None:
    first = coordinator_options(tmp_path / "a", interfaces=("127.0.0.1",))
    second = coordinator_options(tmp_path / "b", interfaces=("127.0.0.1",))
    with daemon("cluster.coordinator", first):
        port = address_of(tmp_path / "a")["port"]
        with daemon("cluster.coordinator", second) as other:
            code, words = end_of(other)
    assert code == 78 and f"127.0.0.1:{port}" in words


def test_two_daemons_in_one_folder_are_an_error(tmp_path: Path) -> None:
    options = coordinator_options(tmp_path / "c")
    with daemon("cluster.coordinator", options):
        port = address_of(tmp_path / "c")["port"]
        with daemon("cluster.coordinator", options) as other:
            code, words = end_of(other)
        assert code == 78 and "another process" in words
        mine = worker_options(
            tmp_path / "w", tmp_path / "c" / "keyring.json", port, options.cluster
        )
        with daemon("cluster.worker", mine):
            assert eventually((tmp_path / "w" / "lock").exists)
            time.sleep(0.2)
            with daemon("cluster.worker", mine) as twin:
                assert end_of(twin)[0] == 78


@pytest.mark.parametrize("where", ["core", "head", "planning", "files"])
def test_a_defect_in_the_coordinator_is_loud_and_ends_it(tmp_path: Path, where: str) -> None:
    patches = {
        "core": "import meshinfer.scheduler.coordinator as c\nc.CoordinatorCore._hello = None",
        "head": "import cluster.coordinator as c\nc.Head._run = lambda self: 1 / 0",
        "planning": "import cluster.planning as c\nc.PlanningThread._plan_all = lambda self: 1 / 0",
        "files": "import cluster.planning as c\nc.PlanningThread._serve_all = lambda self: 1 / 0",
    }
    options = coordinator_options(tmp_path / "c")
    with daemon("cluster.coordinator", options, patches[where]) as coordinator:
        code, words = end_of(coordinator)
    assert code == 70
    assert "a defect of MeshInfer" in words and "Traceback" in words


@pytest.mark.parametrize("where", ["core", "store", "compute"])
def test_a_defect_in_a_worker_is_loud_and_ends_it(
    cluster: mi.LocalCluster, tmp_path: Path, where: str
) -> None:
    patches = {
        "core": "import meshinfer.scheduler.worker as c\nc.WorkerCore._welcome = None",
        "store": "import cluster.worker as c\nc.StoreThread._run = lambda self: 1 / 0",
        "compute": "import cluster.worker as c\nc.ComputeThread._run = lambda self: 1 / 0",
    }
    port = int(cluster.address.rpartition(":")[2])
    options = msgspec.structs.replace(
        worker_options(tmp_path / "w", cluster.keyring, port, cluster.cluster), name=where
    )
    with daemon("cluster.worker", options, patches[where]) as worker:
        code, words = end_of(worker)
    assert code == 70
    assert "a defect of MeshInfer" in words and "Traceback" in words


def test_a_defect_in_planning_or_preparing_fails_the_deployment_and_no_more(
    tmp_path: Path,
) -> None:
    options = coordinator_options(tmp_path / "c")
    child = (
        "import cluster.planner as c\n"
        "original = c.make_plan\n"
        "failures = [1]\n"
        "def make_plan(*a, **k):\n"
        "    if failures.pop() if failures else 0: raise ZeroDivisionError('planted')\n"
        "    return original(*a, **k)\n"
        "c.make_plan = make_plan\n"
        "c.main()"
    )
    patch = f"import cluster.planning as c\nc._COMMAND = (sys.executable, '-c', {child!r})"
    ring = tmp_path / "c" / "keyring.json"
    with daemon("cluster.coordinator", options, patch):
        port = address_of(tmp_path / "c")["port"]
        mine = worker_options(tmp_path / "w", ring, port, options.cluster)
        with daemon("cluster.worker", mine) as worker:
            with mi.Client(f"127.0.0.1:{port}", keyring=ring) as client:
                with pytest.raises(mi.MeshInferError, match="planted"):
                    client.deploy("small", MODEL, timeout_s=WITHIN_S)
                client.deploy("small", MODEL, timeout_s=WITHIN_S)
                assert_exact(MODEL, IMAGE, client.infer("small", IMAGE).outputs)
            assert alive(worker.pid)


def test_a_coordinator_drains_at_the_first_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = coordinator_options(tmp_path / "c")
    ring = tmp_path / "c" / "keyring.json"
    with daemon("cluster.coordinator", options) as coordinator:
        port = address_of(tmp_path / "c")["port"]
        mine = worker_options(tmp_path / "w", ring, port, options.cluster)
        slow = msgspec.structs.replace(mine, speed=0.05)
        with daemon("cluster.worker", slow), mi.Client(f"127.0.0.1:{port}", keyring=ring) as client:
            model = squeezenet1_1()
            x = {"image": np.zeros((1, 3, 64, 64), np.float32)}
            client.deploy("slow", model, timeout_s=WITHIN_S)
            future = client.submit("slow", x)
            time.sleep(0.05)
            coordinator.send_signal(signal.SIGTERM)
            assert_exact(model, x, future.result(WITHIN_S).outputs)
            assert end_of(coordinator)[0] == 0
            monkeypatch.setattr(limits, "COORDINATOR_SILENT_S", 1.0)  # for the client
            with pytest.raises(mi.ClusterUnavailable):
                client.infer("slow", x, deadline_s=WITHIN_S)
