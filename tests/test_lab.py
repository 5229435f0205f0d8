"""The virtual lab: shares are kept, faults are real, discovery crosses it, and nothing is left."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result as Outcome
from oracle import assert_exact
from processes import alive, eventually, image, none_alive, small_model
from typer.testing import CliRunner

from cluster.cli import app
from cluster.keyring import read_keyring
from cluster.lab import (
    ABOUT,
    PRESETS,
    DeviceSpec,
    Lab,
    LabCluster,
    cgroups,
    network,
    preset,
    record,
)
from cluster.lab.cgroups import CgroupsV1, CgroupsV2, find_cgroups, quota_us
from cluster.lab.lab import available
from meshinfer.errors import ConfigurationError, InvalidInput

ROOT = Path(__file__).resolve().parent.parent
FULL = DeviceSpec("a", 1.0), DeviceSpec("b", 1.0)
LONG_S = 30.0


def meshinfer(*arguments: str) -> Outcome:
    return CliRunner().invoke(app, list(arguments))


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", script, *arguments]


def traces(name: str) -> list[str]:
    """All that a lab of this name has on this machine."""
    folders = [path for root in find_cgroups().folders(name) for path in (root, *root.glob("*/"))]
    found = [str(path) for path in folders if path.exists()]
    found += network.names(name)
    found += [name for each in record.all_names() if each == name]
    found += [str(path) for path in Path(tempfile.gettempdir()).glob(f"meshinfer-lab-{name}-*")]
    return found


@pytest.fixture
def lab(lab_here: None) -> Iterator[Lab]:
    """Two devices that are fast, so that what is slow is what a test makes slow."""
    with Lab(FULL) as made:
        yield made


# --- what it is made of


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_says_what_it_stands_for_and_gives_any_number_of_devices(name: str) -> None:
    for count in (1, 2, 7):
        devices = preset(name, count)
        assert len({device.name for device in devices}) == len(devices) == count
    assert "core" in ABOUT[name] and "bit/s" in ABOUT[name]


def test_the_mixed_preset_has_the_ratios_that_it_says() -> None:
    shares = [device.cpu for device in preset("mixed", 8)]
    assert [share / shares[0] for share in shares] == [1, 1, 0.5, 0.25] * 2


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ([], "0 devices"),
        ([DeviceSpec("x")] * 2, "two devices named 'x'"),
        ([DeviceSpec("head")], "cannot be named 'head'"),
        ([DeviceSpec("a/b")], "cannot be named 'a/b'"),
        ([DeviceSpec("x", cpu=0.0)], "0 cores"),
        ([DeviceSpec("x", cpu=float("nan"))], "nan cores"),
        ([DeviceSpec("x", memory_bytes=1000)], "1000 bytes"),
        ([DeviceSpec("x", link_bits_per_s=10.0)], "10 bit/s"),
        ([DeviceSpec(f"x{i}") for i in range(65)], "65 devices"),
    ],
)
def test_devices_that_make_no_sense_are_refused_with_the_value(
    devices: list[DeviceSpec], says: str
) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        Lab(devices)
    assert caught.value.hint


def test_a_preset_that_is_none_names_those_that_are() -> None:
    with pytest.raises(InvalidInput) as caught:
        preset("pi9")
    assert "mixed" in caught.value.hint


@pytest.mark.parametrize("cores", [0.01, 0.0625, 0.25, 0.3, 0.5, 0.99, 1.0, 1.5, 4.0])
def test_a_quota_is_the_share_in_the_shortest_period_that_the_kernel_takes(cores: float) -> None:
    quota, period = quota_us(cores)
    assert quota / period == pytest.approx(cores, rel=1e-3)
    assert quota >= 1000 and 1000 <= period <= 1_000_000
    assert cores >= 1 or quota == 1000


# --- control groups of the other version, on a folder laid out like its own: what is written


@pytest.fixture
def unified(tmp_path: Path) -> Path:
    device = tmp_path / "mi-x" / "d0"
    device.mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (device / "memory.swap.max").write_text("max\n")
    (device / "memory.peak").write_text("5000\n")
    (device / "memory.current").write_text("3000\n")
    (device / "memory.stat").write_text("anon 1000\nfile 2000\nkernel 10\n")
    (device / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\n")
    (device / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\nsystem_usec 2\n")
    return tmp_path


def test_where_the_unified_hierarchy_has_the_controllers_it_is_used(unified: Path) -> None:
    groups = find_cgroups(f"none {unified} cgroup2 rw 0 0\n")
    assert isinstance(groups, CgroupsV2)
    assert groups.folders("x", "d0") == [unified / "mi-x" / "d0"]


def test_where_it_has_none_the_old_hierarchies_are_used(tmp_path: Path, unified: Path) -> None:
    (unified / "cgroup.controllers").write_text("hugetlb\n")
    (tmp_path / "both").mkdir()
    (tmp_path / "memory").mkdir()
    mounts = (
        f"none {unified} cgroup2 rw 0 0\n"
        f"cgroup {tmp_path}/both cgroup rw,cpu,cpuacct 0 0\n"
        f"cgroup {tmp_path}/memory cgroup rw,memory 0 0\n"
    )
    groups = find_cgroups(mounts)
    assert isinstance(groups, CgroupsV1)
    assert groups.folders("x", "d0") == [
        tmp_path / "both" / "mi-x" / "d0",
        tmp_path / "memory" / "mi-x" / "d0",
    ]


def test_without_control_groups_it_says_what_would_help() -> None:
    with pytest.raises(ConfigurationError, match="no control groups") as caught:
        find_cgroups("proc /proc proc rw 0 0\n")
    assert "--privileged" in caught.value.hint


def test_limits_are_written_as_the_unified_hierarchy_wants_them(unified: Path) -> None:
    groups, device = CgroupsV2(unified), unified / "mi-x" / "d0"
    groups.create("x", "d0")
    for folder in (unified, unified / "mi-x"):
        assert (folder / "cgroup.subtree_control").read_text() == "+cpu +memory\n"
    groups.set_cpu("x", "d0", 0.25)
    assert (device / "cpu.max").read_text() == "1000 4000\n"
    groups.set_cpu("x", "d0", None)
    assert (device / "cpu.max").read_text() == "max 100000\n"
    groups.set_weight("x", 6)
    assert (unified / "mi-x" / "cpu.weight").read_text() == "600\n"
    groups.set_memory("x", "d0", 1 << 29)
    assert (device / "memory.max").read_text() == f"{1 << 29}\n"
    assert (device / "memory.swap.max").read_text() == "0\n"


def test_usage_is_read_as_the_unified_hierarchy_tells_it(unified: Path) -> None:
    groups = CgroupsV2(unified)
    used = groups.usage("x", "d0")
    assert (used.cpu_s, used.memory_bytes, used.peak_memory_bytes) == (1.5, 3000, 5000)
    assert (used.anonymous_bytes, used.file_bytes, used.oom_kills) == (1000, 2000, 2)
    groups.reset_peak("x", "d0")
    assert (unified / "mi-x" / "d0" / "memory.peak").read_text().startswith("0\n")


# --- where it cannot be


@pytest.mark.root  # only root can become somebody else
def test_without_root_it_says_so_and_makes_nothing() -> None:
    script = """
import os, sys
from cluster.lab import Lab, preset
os.setuid(65534)
try:
    Lab(preset("pi4", 2), sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""
    name = secrets.token_hex(4)
    done = subprocess.run(python(script, name), cwd=ROOT, capture_output=True, text=True)
    assert "ConfigurationError the lab needs root" in done.stdout, done.stderr
    assert "sudo" in done.stdout
    assert name not in record.all_names()


def test_a_missing_program_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "SEARCHED", str(tmp_path))
    with pytest.raises(ConfigurationError, match="the program ip") as caught:
        network.check_tools()
    assert "iproute2" in caught.value.hint


# --- what it leaves


@pytest.mark.root
def test_a_lab_that_is_over_has_left_nothing(lab_here: None) -> None:
    with Lab(FULL) as made:
        name = made.name
        stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
        inside = made.spawn(0, python(stubborn))
        outside = subprocess.Popen(["sleep", "60"])
        assert made.processes(0) == [inside.pid]
        assert len(traces(name)) > 5
    assert traces(name) == []
    assert inside.returncode == -signal.SIGKILL
    assert alive(outside.pid), "what is not in the lab is not its business"
    outside.kill()
    outside.wait()


@pytest.mark.root
def test_what_a_killed_run_left_is_seen_and_removed(lab_here: None) -> None:
    script = """
import subprocess, sys, time
from cluster.lab import Lab, preset
lab = Lab(preset("pi4", 2), sys.argv[1])
print(lab.spawn(1, ["sleep", "60"], stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(60)
"""
    name = secrets.token_hex(4)
    maker = subprocess.Popen(python(script, name), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert maker.stdout is not None
        inside = int(maker.stdout.readline())
        assert meshinfer("lab", "down", name).exit_code == 78, "it is in use"
        assert alive(inside)
    finally:
        maker.kill()
        maker.communicate()
    try:
        (shown,) = json.loads(meshinfer("lab", "status", name, "--json").stdout)
    finally:
        removed = meshinfer("lab", "down", name)
    assert shown["state"] == "left behind"
    assert shown["devices"][1]["used"]["processes"] == [inside]
    assert (removed.exit_code, removed.stdout) == (0, "")
    assert eventually(lambda: none_alive([inside]))
    assert traces(name) == []
    assert meshinfer("lab", "down", name).exit_code == 2


@pytest.mark.root
def test_a_lab_made_by_the_command_runs_programs_until_it_is_taken_down(lab_here: None) -> None:
    name = secrets.token_hex(4)
    try:
        up = meshinfer("lab", "up", "--preset", "pi3", "--count", "2", "--name", name, "--json")
        assert up.exit_code == 0, up.stderr
        assert "lower bound" in up.stderr
        (made,) = json.loads(up.stdout)
        assert [device["address"] for device in made["devices"]] == ["10.77.0.1", "10.77.0.2"]
        again = meshinfer("lab", "up", "--name", name)
        assert (again.exit_code, again.stdout) == (78, "")
        assert "already" in again.stderr
        show = "ip -o -4 addr show eth0; exit 7"
        run = [sys.executable, "-m", "cluster.cli", "lab", "run", "--lab", name]
        ran = subprocess.run(
            [*run, "--device", "1", "--", "sh", "-c", show],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LONG_S,
        )
        assert ran.returncode == 7, ran.stderr
        assert "10.77.0.2/16" in ran.stdout
        missing = meshinfer("lab", "run", "--lab", name, "--device", "2", "true")
        assert (missing.exit_code, missing.stdout) == (2, "")
    finally:
        assert meshinfer("lab", "down", name).exit_code == 0
    assert traces(name) == []


@pytest.mark.root
def test_a_lab_that_fails_on_the_way_leaves_nothing(
    lab_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigurationError("no")

    name = secrets.token_hex(4)
    monkeypatch.setattr(type(find_cgroups()), "set_memory", refuse)
    with pytest.raises(ConfigurationError, match="no"):
        Lab(preset("pi4", 2), name)
    assert traces(name) == []


# --- what it keeps


SINK = """
import socket, sys
server = socket.create_server((sys.argv[1], 5001))
print("listening", flush=True)
connection, _ = server.accept()
while connection.recv(1 << 16):
    pass
"""
SOURCE = """
import socket, sys
with socket.create_connection((sys.argv[1], 5001)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
"""


@pytest.mark.root
def test_no_more_passes_a_link_than_its_rate_lets_and_all_of_it_is_counted(lab: Lab) -> None:
    nbytes, rate = 2_000_000, 2e7
    lab.set_link(1, rate)
    sink = lab.spawn(0, python(SINK, lab.address(0)), stdout=subprocess.PIPE, text=True)
    with sink:
        assert sink.stdout is not None and sink.stdout.readline() == "listening\n"
        before, started = lab.usage(1), time.monotonic()
        source = lab.spawn(1, python(SOURCE, lab.address(0), str(nbytes)))
        assert (source.wait(LONG_S), sink.wait(LONG_S)) == (0, 0)
        took_s = time.monotonic() - started
    assert took_s >= 0.9 * nbytes * 8 / rate
    sent = lab.usage(1).sent_bytes - before.sent_bytes
    assert nbytes < sent < 1.3 * nbytes
    assert lab.usage(0).received_bytes >= sent


@pytest.mark.root
def test_a_device_gets_no_more_cpu_than_its_share_however_many_threads_it_has(lab: Lab) -> None:
    lab.set_cpu(0, 0.25)
    before, started = lab.usage(0).cpu_s, time.monotonic()
    busy = [lab.spawn(0, ["sh", "-c", "while :; do :; done"]) for _ in range(2)]
    time.sleep(1.5)
    used, took_s = lab.usage(0).cpu_s - before, time.monotonic() - started
    for each in busy:
        each.kill()
    assert 0.02 < used <= 0.25 * took_s * 1.2


HOG = "print(len(b'x' * (100 << 20)))"


@pytest.mark.root
def test_a_device_with_too_little_memory_kills_what_takes_more(lab_here: None) -> None:
    small, large = DeviceSpec("small", 1.0, 48 << 20), DeviceSpec("large", 1.0)
    with Lab([small, large]) as made:
        killed = made.spawn(0, python(HOG), stdout=subprocess.DEVNULL)
        lives = made.spawn(1, python(HOG), stdout=subprocess.DEVNULL)
        assert killed.wait(LONG_S) == -signal.SIGKILL
        assert lives.wait(LONG_S) == 0
        assert made.usage(0).oom_kills == 1
        assert made.usage(0).peak_memory_bytes <= 48 << 20
        assert made.usage(1).peak_memory_bytes > 100 << 20
        made.reset_peak(1)
        assert made.usage(1).peak_memory_bytes < 100 << 20


EARS = """
import socket, sys
ears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
ears.bind((sys.argv[1], 5002))
print("listening", flush=True)
while True:
    print(ears.recv(100).decode(), flush=True)
"""
MOUTH = """
import socket, sys
mouth = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
mouth.sendto(sys.argv[2].encode(), (sys.argv[1], 5002))
"""


@pytest.mark.root
def test_a_device_that_is_cut_off_hears_nothing_until_it_is_healed(lab: Lab) -> None:
    def say(word: str) -> None:
        assert lab.spawn(1, python(MOUTH, lab.address(0), word)).wait(LONG_S) == 0

    ears = lab.spawn(0, python(EARS, lab.address(0)), stdout=subprocess.PIPE, text=True)
    with ears:
        assert ears.stdout is not None
        heard = [ears.stdout.readline().strip()]
        say("first")
        heard.append(ears.stdout.readline().strip())
        lab.cut(0)
        say("lost")  # what sends it is told nothing
        lab.heal(0)
        say("last")
        heard.append(ears.stdout.readline().strip())
        ears.kill()
    assert heard == ["listening", "first", "last"]


# --- a cluster in it


USER = """
import sys
import numpy as np
import meshinfer as mi
inputs = dict(np.load(sys.argv[2]))
with mi.Client() as client:
    client.deploy("net", sys.argv[1], spread=True)
    for line in sys.stdin:
        result = client.infer("net", inputs)
        np.savez(sys.argv[3], **result.outputs)
        devices = [each.device for each in client.devices()]
        print(sorted(devices), str(result.plan).replace("\\n", ";"), flush=True)
"""


@pytest.fixture(scope="module")
def cluster(lab_here: None) -> Iterator[tuple[Lab, LabCluster]]:
    """Two devices whose daemons have found each other over mDNS."""
    with Lab(FULL) as made:
        yield made, made.start_cluster(discovery=True)


class User:
    """A program on device 0 with a client, which infers once for each line that it reads."""

    def __init__(self, lab: Lab, cluster: LabCluster, folder: Path) -> None:
        self.model, self.inputs, self.out = small_model(48), image(48), folder / "out.npz"
        onnx.save(self.model, folder / "net.onnx")
        np.savez(folder / "in.npz", **self.inputs)
        script = python(USER, *(str(folder / n) for n in ("net.onnx", "in.npz", "out.npz")))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = lab.spawn(0, script, env=cluster.environment, **pipes)

    def ask(self) -> str:
        """The devices and the plan; the answer is what onnxruntime gives."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline()
        assert said, f"ended with {self.process.wait(LONG_S)}"
        assert_exact(self.model, self.inputs, dict(np.load(self.out)))
        return said

    def __enter__(self) -> User:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=LONG_S)


@pytest.mark.root
def test_daemons_find_each_other_across_the_bridge_and_answer_as_onnxruntime_does(
    cluster: tuple[Lab, LabCluster], tmp_path: Path
) -> None:
    lab, running = cluster
    workers = running.worker_pids()
    assert sorted(workers) == [0, 1]
    assert workers[1] in lab.processes(1) and running.coordinator_pid in lab.processes(0)
    before = lab.usage(1)
    with User(lab, running, tmp_path) as user:
        said = user.ask()
    assert said.startswith("['a', 'b', 'head']")
    assert " b" in said.partition("]")[2]
    assert lab.usage(1).sent_bytes - before.sent_bytes > 1000


@pytest.mark.root
def test_what_is_asked_while_a_device_is_cut_off_or_dead_is_answered_by_the_other(
    cluster: tuple[Lab, LabCluster], tmp_path: Path
) -> None:
    lab, running = cluster
    with User(lab, running, tmp_path) as user:
        user.ask()
        lab.cut(1)
        assert "task b" not in user.ask(), (
            "it stays a member for a while, and the other does its work"
        )
        lab.heal(1)
        running.wait()
        assert eventually(lambda: "task b" in user.ask())
        running.kill(1)
        assert lab.processes(1) == []
        assert eventually(lambda: "'b'" not in user.ask())
        running.restart(1)
        assert "'b'" in user.ask()


@pytest.mark.root
def test_a_cluster_that_was_stopped_has_left_no_process(lab: Lab) -> None:
    running = lab.start_cluster()
    everything = [*lab.processes(0), *lab.processes(1)]
    assert len(everything) >= 5
    running.stop()
    assert none_alive(everything)


SNIFFER = """
import json, select, socket, sys
secrets = [bytes.fromhex(each) for each in json.loads(sys.argv[1])]
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
print("ready", flush=True)
size = found = 0
while sys.stdin not in (ready := select.select([wire, sys.stdin], [], [])[0]) or wire in ready:
    packet = wire.recv(1 << 17)
    size += len(packet)
    found += any(secret in packet for secret in secrets)
print(json.dumps([size, found]), flush=True)
"""


@pytest.mark.root
@pytest.mark.parametrize("plaintext", [False, True])
def test_only_without_encryption_are_there_rows_of_the_image_on_the_cable(
    lab: Lab, tmp_path: Path, plaintext: bool
) -> None:
    running = lab.start_cluster(plaintext=plaintext)
    assert read_keyring(running.keyring).plaintext is plaintext
    user = User(lab, running, tmp_path)
    (pixels,) = user.inputs.values()
    rows = [row[:6].tobytes().hex() for row in pixels.reshape(-1, pixels.shape[-1])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    sniffer = lab.spawn(1, python(SNIFFER, json.dumps(rows)), limits=False, **pipes)
    assert sniffer.stdout is not None and sniffer.stdout.readline() == "ready\n"
    with user:
        assert " b" in user.ask().partition("]")[2]
    said, _ = sniffer.communicate(timeout=LONG_S)
    size, found = json.loads(said)
    assert size > pixels.nbytes // 3, "b gets its share of the image"
    assert (found > 0) is plaintext


@pytest.mark.root
def test_a_lab_is_described_by_what_it_was_made_of(lab: Lab) -> None:
    seen = Lab.attach(lab.name)
    assert [asdict(device) for device in seen.devices] == [asdict(device) for device in FULL]
    assert seen.in_use and seen.owner == os.getpid()
    with pytest.raises(InvalidInput, match="no device 2"):
        seen.address(2)
    with pytest.raises(InvalidInput, match="no lab"):
        Lab.attach("nosuchlab")
    with pytest.raises(InvalidInput, match="cannot be named"):
        Lab(FULL, "../x")
    assert cgroups.processes(available(), "nosuchlab") == {}
