"""The doctor finds what is really wrong: each condition is made, not imitated, and has its cure."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_daemons import OTHER_PROTOCOL, address_of, coordinator_options, daemon

import meshinfer as mi
from cluster import config
from cluster.discovery import Announcement, announce, browse
from cluster.keyring import new_keyring, read_keyring, write_keyring
from cluster.keys import generate_keypair
from cluster.lab import DeviceSpec, Lab, LabCluster
from cluster.profiler import Measured
from cluster.worker import WorkerOptions
from meshinfer.doctor import Finding, Interface, Verdict, exit_code, judge_interfaces

ROOT = Path(__file__).parent.parent
LONG_S = 90.0
BRIEF_S = 1.0
"""How long a doctor waits for a coordinator that cannot answer."""
LO = ["127.0.0.1"]
DOCTOR = [sys.executable, "-m", "cluster.cli", "doctor", "--json"]


@dataclass(frozen=True)
class Told:
    """What a doctor said: the findings by check, and its exit code."""

    findings: dict[str, Finding]
    code: int

    def __getitem__(self, check: str) -> Finding:
        return self.findings[check]

    @property
    def problems(self) -> list[str]:
        return [f.check for f in self.findings.values() if f.verdict == Verdict.PROBLEM]


def understood(process: subprocess.Popen[str]) -> Told:
    out, err = process.communicate(timeout=LONG_S)
    assert not err, err
    found = [Finding(**{**each, "verdict": Verdict(each["verdict"])}) for each in json.loads(out)]
    for each in found:
        ailing = each.verdict in (Verdict.PROBLEM, Verdict.WARNING)
        assert bool(each.hint) == ailing, f"{each.check} says nothing of what to do"
        assert (each.exit_code > 0) == (each.verdict is Verdict.PROBLEM)
    assert process.returncode == exit_code(found)
    return Told({each.check: each for each in found}, process.returncode)


def begun(folder: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Let it begin on this machine, with ``folder`` for all state; several listen at once."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MESHINFER_")}
    return subprocess.Popen(
        [*DOCTOR, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "MESHINFER_STATE_DIR": str(folder), **environment},
        cwd=ROOT,
    )


def doctor(folder: Path, *arguments: object, **environment: str) -> Told:
    """Run it on this machine to its end."""
    return understood(begun(folder, *arguments, **environment))


def all_told(*processes: subprocess.Popen[str]) -> list[Told]:
    return [understood(process) for process in processes]


def nobodys() -> str:
    """The name of a cluster that is nowhere."""
    return f"t{secrets.token_hex(6)}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- a cluster that is well, and a machine with nothing on it


@pytest.fixture(scope="module")
def announced() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(2, discovery=True) as made:
        yield made


def test_where_all_is_well_it_finds_nothing_and_leaves_nothing(
    announced: mi.LocalCluster, tmp_path: Path
) -> None:
    options = ("--keyring", announced.keyring, "--cluster", announced.cluster)
    told = doctor(tmp_path, *options, "--interface", "127.0.0.1")
    assert told.code == 0
    assert {f.verdict for f in told.findings.values()} == {Verdict.OK}
    assert "2 ready" in told["devices"].text
    assert announced.address in told["multicast"].text
    assert not list(tmp_path.iterdir())


def test_a_keyring_of_another_cluster_of_that_name_is_refused_and_told(
    announced: mi.LocalCluster, tmp_path: Path
) -> None:
    write_keyring(tmp_path / "ring.json", new_keyring(announced.cluster)[0])
    ring = ("--keyring", tmp_path / "ring.json", "--cluster", announced.cluster)
    told = doctor(tmp_path, *ring, "--interface", "127.0.0.1")
    assert told.problems == ["multicast", "join"] and told.code == 77
    assert "another key" in told["multicast"].text and "token" in told["multicast"].hint


def test_on_a_workers_machine_its_own_keyring_is_tried(
    announced: mi.LocalCluster, tmp_path: Path
) -> None:
    """1. Of a worker that is in; 2. of one that was made up, and so is as one that was revoked."""
    folder = announced.keyring.parent.parent / "worker-0"
    options = ("--coordinator", announced.address, "--interface", "127.0.0.1")
    told = doctor(tmp_path, *options, "--cluster", announced.cluster, "--state-dir", folder)
    assert "role worker" in told["keyring"].text
    assert told["join"].verdict is Verdict.OK and told.code == 0
    assert told["identity"].verdict is Verdict.SKIPPED
    (tmp_path / "w").mkdir()
    ring = replace(read_keyring(folder / "keyring.json"), key=generate_keypair())
    write_keyring(tmp_path / "w" / "keyring.json", ring)
    told = doctor(tmp_path, *options, "--cluster", ring.cluster, "--state-dir", tmp_path / "w")
    assert told.problems == ["join"] and told.code == 77 and "not admitted" in told["join"].text


def test_on_a_bare_machine_the_missing_keyring_comes_before_the_missing_coordinator(
    tmp_path: Path,
) -> None:
    cluster = nobodys()
    write_keyring(tmp_path / "ring.json", new_keyring(cluster)[0])
    here = ("--cluster", cluster, "--interface", "127.0.0.1")
    bare, admitted = all_told(
        begun(tmp_path / "state", *here),
        begun(tmp_path / "state", *here, "--keyring", tmp_path / "ring.json"),
    )
    assert bare.problems == ["keyring", "multicast"] and bare.code == 77
    assert "--coordinator HOST:PORT" in bare["multicast"].hint
    assert admitted.problems == ["multicast"] and admitted.code == 69


def test_for_people_it_says_one_line_a_check_and_what_to_do_below(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DOCTOR[:-1], "--coordinator", f"127.0.0.1:{free_port()}"],
        capture_output=True, text=True, timeout=LONG_S, check=False,
        env={**os.environ, "MESHINFER_STATE_DIR": str(tmp_path)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 77 and lines[0].startswith("ok       engine")
    (at,) = (i for i, line in enumerate(lines) if line.startswith("problem  port"))
    assert "nobody listens" in lines[at] and lines[at + 1].strip().startswith("-> ")


# --- the engine

ILLEGAL = {"x86_64": b"\x0f\x0b", "aarch64": b"\x00\x00\x00\x00"}  # ud2, udf #0


def illegal_instruction() -> str:
    """Python that executes one."""
    code = ILLEGAL[os.uname().machine]
    return (
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ|mmap.PROT_WRITE|mmap.PROT_EXEC)\n"
        f"page.write({code!r})\n"
        "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\n"
    )


def with_packages(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def broken_package(folder: Path, name: str, body: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(body)
    return folder


BROKEN = {
    "illegal onnxruntime": ("onnxruntime", illegal_instruction()),
    "illegal numpy": ("numpy", illegal_instruction()),
    "libgomp.so.1": (
        "onnxruntime",
        "raise ImportError('libgomp.so.1: cannot open shared object file')",
    ),
    "SIGSEGV": ("onnxruntime", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"),
    "exit code 3": ("onnxruntime", "import os\nos._exit(3)"),
}
"""By what is said of it: a package, and what its import executes."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """What is told where a package is broken; all are looked at at once."""
    begins = {}
    for says, (package, body) in BROKEN.items():
        folder = tmp_path_factory.mktemp("broken")
        path = with_packages(broken_package(folder, package, body))["PYTHONPATH"]
        begins[says] = begun(folder / "state", "--cluster", nobodys(), PYTHONPATH=path)
    return dict(zip(begins, all_told(*begins.values()), strict=True))


@pytest.mark.parametrize("package", ["onnxruntime", "numpy"])
def test_an_engine_whose_instructions_this_processor_lacks_is_found_by_its_death(
    broken: dict[str, Told], package: str
) -> None:
    """The package's import executes an instruction that no processor has."""
    told = broken[f"illegal {package}"]
    assert told.problems[0] == "engine" and told.code == 78
    found = told["engine"]
    assert "SIGILL" in found.text and f"importing {package}" in found.text
    assert "another release" in found.hint
    assert (told["join"].text == "without numpy there is no client") == (package == "numpy")


def test_a_worker_whose_engine_does_not_run_here_is_given_up_and_points_to_the_doctor(
    tmp_path: Path,
) -> None:
    path = broken_package(tmp_path / "broken", "onnxruntime", illegal_instruction())
    options = {"name": "w", "state_dir": str(tmp_path / "w")}
    done = subprocess.run(
        [sys.executable, "-m", "cluster.supervisor", json.dumps(options)],
        capture_output=True, text=True, timeout=LONG_S, check=False, env=with_packages(path),
    )  # fmt: skip
    assert done.returncode == 78
    again, last = done.stderr.splitlines()
    assert "SIGILL; again in" in again
    assert "SIGILL" in last and "not started again" in last and "meshinfer doctor" in last


@pytest.mark.parametrize("says", ["libgomp.so.1", "SIGSEGV", "exit code 3"])
def test_an_engine_that_does_not_start_is_found_with_its_own_words(
    broken: dict[str, Told], says: str
) -> None:
    told = broken[says]
    assert told.problems[0] == "engine" and told.code == 78
    assert says in told["engine"].text and "pip install" in told["engine"].hint


# --- the disk


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_a_read_only_and_a_nearly_full_disk_are_found(tmp_path: Path) -> None:
    full, fixed, nearly = (tmp_path / name for name in ("full", "fixed", "nearly"))
    with mounted(full, "size=64k"), mounted(fixed, "size=64m,ro"), mounted(nearly, "size=16m"):
        begins = [begun(each, "--cluster", nobodys()) for each in (full, fixed, nearly)]
        *problems, warned = all_told(*begins)
    words = ("No space left on device", "Read-only file system")
    for told, folder, says in zip(problems, (full, fixed), words, strict=True):
        assert told.problems[0] == "disk" and told.code == 78
        assert says in told["disk"].text and str(folder) in told["disk"].text
    assert warned["disk"].verdict is Verdict.WARNING and "16.8 MB" in warned["disk"].text


# --- the coordinator's port, release and key


def test_a_closed_port_is_told_from_a_host_that_is_not_there(tmp_path: Path) -> None:
    closed, unknown = all_told(
        begun(tmp_path, "--coordinator", f"127.0.0.1:{free_port()}"),
        begun(tmp_path, "--coordinator", "no-such-host.invalid:7433"),
    )
    assert "port" in closed.problems and "nobody listens" in closed["port"].text
    assert "no host is named" in unknown["port"].text


def test_on_the_machine_of_a_coordinator_that_does_not_run_its_port_is_looked_at(
    tmp_path: Path,
) -> None:
    """1. it was killed: its address is still there; 2. it was stopped, and another has its port."""
    cluster = nobodys()
    state = tmp_path / f"coordinator-{cluster}"
    arguments = ("--cluster", cluster)
    with daemon("cluster.coordinator", coordinator_options(state, cluster=cluster)) as process:
        address_of(state)
        told = doctor(tmp_path, *arguments)
        assert told["port"].verdict is Verdict.OK and told["join"].verdict is Verdict.OK
        assert told.problems == ["devices"] and told.code == 69
        process.kill()
        process.wait(10)
    told = doctor(tmp_path, *arguments, "--timeout", BRIEF_S)
    assert "nobody listens" in told["port"].text
    (state / "address.json").unlink()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("0.0.0.0", 7433))
            other.listen()
        except OSError:
            pytest.skip("something has the usual port already")
        told = doctor(tmp_path, *arguments)
        assert "another program has port 7433" in told["port"].text
    assert "is free" in doctor(tmp_path, *arguments)["port"].text


def test_a_coordinator_of_another_release_is_found_by_asking_and_by_what_it_announces(
    tmp_path: Path,
) -> None:
    options = coordinator_options(tmp_path / "c")
    keys, own = new_keyring(cluster := nobodys())
    write_keyring(tmp_path / "ring.json", keys)
    announced = ("--keyring", tmp_path / "ring.json", "--cluster", cluster)
    with daemon("cluster.coordinator", options, OTHER_PROTOCOL):
        where = f"127.0.0.1:{address_of(tmp_path / 'c')['port']}"
        ring = ("--keyring", tmp_path / "c" / "keyring.json", "--cluster", options.cluster)
        told_by = announce(
            cluster, free_port(), key=own.public, join_port=5001, protocol=(98, 99), interfaces=LO
        )
        try:
            asked, heard = all_told(
                begun(tmp_path, "--coordinator", where, *ring),
                begun(tmp_path, *announced, "--interface", "127.0.0.1", "--timeout", BRIEF_S),
            )
        finally:
            told_by.close()
    assert asked.problems == ["join"] and asked.code == 76
    assert "98 to 99" in asked["join"].text and "same release" in asked["join"].hint
    assert "version" in heard.problems and "98 to 99" in heard["version"].text


@pytest.mark.parametrize("cloned", [True, False])
def test_two_coordinators_of_a_name_are_found_and_whether_one_was_copied(
    tmp_path: Path, cloned: bool
) -> None:
    cluster = nobodys()
    keys = [new_keyring(cluster)[1].public for _ in range(2)]
    first = announced_at(cluster, 5001, keys[0])
    second = announced_at(cluster, 5002, keys[not cloned])
    try:
        assert len(browse(cluster, timeout_s=20.0, interfaces=LO, until=2)) == 2
        told = doctor(tmp_path, "--cluster", cluster, "--interface", "127.0.0.1")
    finally:
        first.close()
        second.close()
    found = told["multicast"]
    assert found.verdict is Verdict.PROBLEM and found.exit_code == 78
    assert "2 coordinators" in found.text and ("copied" in found.text) == cloned


def announced_at(cluster: str, port: int, key: str) -> Announcement:
    return announce(cluster, port, key=key, join_port=5003, protocol=(1, 9), interfaces=LO)


# --- networks: in the lab


@pytest.fixture(scope="module")
def lab(lab_here: None) -> Iterator[tuple[Lab, LabCluster]]:
    with Lab([DeviceSpec("a", 1.0), DeviceSpec("b", 1.0)]) as made:
        yield made, made.start_cluster(discovery=True)


def begun_on(
    lab: Lab, cluster: LabCluster, i: int, *arguments: object, **more: Any
) -> subprocess.Popen[str]:
    """Let it begin there, knowing the keyring and the name of the cluster only."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MESHINFER_")}
    state = more.pop("state", cluster.state / "nothing")
    options = ("--keyring", cluster.keyring, "--cluster", cluster.name, *arguments)
    return lab.spawn(
        i, [*DOCTOR, *map(str, options)], limits=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env={**clean, "MESHINFER_STATE_DIR": str(state)},
    )  # fmt: skip


def on_device(lab: Lab, cluster: LabCluster, i: int, *arguments: object, **more: Any) -> Told:
    return understood(begun_on(lab, cluster, i, *arguments, **more))


def bridge(lab: Lab, *command: str) -> None:
    subprocess.run(["bridge", "-n", f"mi-{lab.name}-br", "link", "set", *command], check=True)


def ip(lab: Lab, i: int, *command: str) -> None:
    subprocess.run(["ip", "-n", f"mi-{lab.name}-{i}", *command], check=True)


def test_multicast_that_the_network_filters_is_told_from_a_coordinator_that_is_silent(
    lab: tuple[Lab, LabCluster],
) -> None:
    """1. all is well; 2. the bridge passes no multicast to either; 3. unicast still passes."""
    made, cluster = lab
    well = on_device(made, cluster, 1)
    assert well.code == 0 and well["multicast"].verdict is Verdict.OK
    for port in ("d0", "d1"):
        bridge(made, "dev", port, "mcast_flood", "off")
    try:
        known, unknown = all_told(
            begun_on(made, cluster, 1, "--coordinator", cluster.coordinator),
            begun_on(made, cluster, 1),
        )
        assert known["multicast"].verdict is Verdict.WARNING
        assert "multicast is filtered" in known["multicast"].text
        assert cluster.coordinator in known["multicast"].hint
        assert known["join"].verdict is Verdict.OK and known.code == 0, "all else works"
        assert unknown.problems == ["multicast"] and unknown.code == 69
    finally:
        for port in ("d0", "d1"):
            bridge(made, "dev", port, "mcast_flood", "on")


def test_the_wrong_interface_is_found_and_the_right_one_named(
    lab: tuple[Lab, LabCluster],
) -> None:
    made, cluster = lab
    ip(made, 1, *"link add usb0 type veth peer name usb1".split())
    ip(made, 1, *"addr add 10.99.0.1/24 dev usb0".split())
    for end in ("usb0", "usb1"):
        ip(made, 1, "link", "set", end, "up")
    try:
        known = ("--coordinator", cluster.coordinator)
        told = on_device(made, cluster, 1, "--interface", "10.99.0.1")
        assert told.problems == ["multicast"] and told.code == 78
        assert "it is the wrong one" in told["multicast"].text
        assert told["join"].verdict is Verdict.OK
        told, missing = all_told(
            begun_on(made, cluster, 1, "--interface", "10.99.0.1", *known),
            begun_on(made, cluster, 1, "--interface", "10.98.0.1", *known),
        )
        assert told["interface"].verdict is Verdict.WARNING
        assert f"eth0 {made.address(1)}" in told["interface"].text
        assert f"--interface {made.address(1)}" in told["interface"].hint
        assert missing.problems[0] == "interface" and missing.code == 78
        assert "usb0 10.99.0.1" in missing["interface"].text
        ip(made, 1, "link", "set", "usb0", "down")
        told = on_device(made, cluster, 1, "--interface", "10.99.0.1", *known)
        assert told.problems[0] == "interface" and "usb0 is down" in told["interface"].text
    finally:
        ip(made, 1, "link", "del", "usb0")


def test_a_device_without_a_network_and_one_that_is_cut_off_are_told_apart(
    lab: tuple[Lab, LabCluster],
) -> None:
    made, cluster = lab
    known = ("--coordinator", cluster.coordinator, "--timeout", BRIEF_S)
    made.cut(1)
    try:
        told = on_device(made, cluster, 1, *known)
        assert told["interface"].verdict is Verdict.OK
        assert "port" in told.problems and "does not answer at all" in told["port"].text
        assert told.code == 69
    finally:
        made.heal(1)
    ip(made, 1, "link", "set", "eth0", "down")
    try:
        told = on_device(made, cluster, 1, *known)
        assert told.problems[0] == "interface" and "no network" in told["interface"].text
        assert "eth0" in told["interface"].text and "(down)" in told["interface"].text
    finally:
        ip(made, 1, "link", "set", "eth0", "up")


def test_a_copied_card_is_found_on_either_machine_by_the_name_that_both_have(
    lab: tuple[Lab, LabCluster], tmp_path: Path
) -> None:
    """1. b's state folder is copied from a's; 2. a worker there is refused, since a's lives on;
    3. the doctor on b says why; 4. and on a that all is well."""
    made, cluster = lab
    with monkeypatched_state(tmp_path):
        own = config.state_dir(f"worker-{cluster.name}-a")
    shutil.copytree(cluster.state / "a", own)
    options = WorkerOptions(
        name="a", cluster=cluster.name, state_dir=str(own),
        coordinator=cluster.coordinator, measured=Measured((1e9,), 1e9, 0.0, 0.001),
    )  # fmt: skip
    text = json.dumps(msgspec.to_builtins(options))
    command = [sys.executable, "-m", "cluster.worker", text]
    clone = made.spawn(1, command, text=True, stderr=subprocess.PIPE, cwd=ROOT)
    _, said = clone.communicate(timeout=LONG_S)
    assert clone.returncode == 78 and "a device named 'a' is alive" in said
    copied, true, elsewhere = all_told(
        begun_on(made, cluster, 1, "--name", "a", state=tmp_path),
        begun_on(made, cluster, 0, "--name", "a", state=tmp_path),
        begun_on(made, cluster, 1, "--name", "a"),
    )
    assert copied.problems == ["identity"] and copied.code == 78
    assert made.address(0) in copied["identity"].text
    assert "host name" in copied["identity"].hint
    assert true.code == 0, "the true one"
    assert elsewhere["identity"].verdict is Verdict.WARNING, "no worker has been here"


@contextmanager
def monkeypatched_state(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHINFER_STATE_DIR", str(folder))
        yield


def test_a_firewall_before_a_device_is_found_though_the_coordinator_admits_all(
    lab: tuple[Lab, LabCluster],
) -> None:
    """1. device b drops new connections; 2. those that it has go on; 3. others see its port."""
    made, cluster = lab
    nft = ["nsenter", f"--net=/run/netns/mi-{made.name}-1", "--", "nft"]
    rules = (
        "add table ip t; add chain ip t in { type filter hook input priority 0; };"
        "add rule ip t in tcp flags & (syn|ack) == syn drop"
    )
    if subprocess.run([*nft, rules], capture_output=True, check=False).returncode:
        pytest.skip("there is no nft here")
    try:
        told = on_device(made, cluster, 0)
        assert told.code == 0 and told["devices"].verdict is Verdict.WARNING
        assert f"b has a closed port at {made.address(1)}" in told["devices"].text
        assert "firewall" in told["devices"].hint
    finally:
        subprocess.run([*nft, "delete table ip t"], check=True)
    assert on_device(made, cluster, 0)["devices"].verdict is Verdict.OK


# --- judgements that take a machine which is not at hand


def test_a_network_of_containers_is_named_as_what_is_skipped() -> None:
    here = [
        Interface("lo", "127.0.0.1", up=True, loopback=True),
        Interface("br-lan", "192.168.1.2", up=True, skipped=True),
        Interface("eth0", "10.0.0.2", up=True),
    ]
    found = judge_interfaces(here, None, "192.168.1.9", "192.168.1.2")
    assert found.verdict is Verdict.WARNING and "named br-lan, it is skipped" in found.text
    assert "--interface 192.168.1.2" in found.hint
    assert judge_interfaces(here, None, "10.0.0.9", "10.0.0.2").verdict is Verdict.OK
    lost = judge_interfaces(here, None, "172.16.0.9", None)
    assert lost.exit_code == 69 and "no way" in lost.text
