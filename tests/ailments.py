"""Everything that the doctor can find wrong, each made by its own judge.

docs/troubleshooting.md has them as a table, which `scripts/guides` writes from here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.doctor.network import refusal, try_key
from cluster.keyring import new_keyring, read_keyring, write_keyring
from cluster.sockets import REFUSED
from meshinfer import limits
from meshinfer.doctor import (
    EngineRun,
    Finding,
    Heard,
    Interface,
    Member,
    Multicast,
    Reached,
    Room,
    Verdict,
    judge_devices,
    judge_engine,
    judge_identity,
    judge_interfaces,
    judge_multicast,
    judge_own_port,
    judge_port,
    judge_room,
    judge_versions,
    of_error,
)
from meshinfer.errors import MeshInferError
from meshinfer.protocol.messages import PROTOCOL

HOST, PORT = "192.168.1.10", 7433
BOARD = "Raspberry Pi 4"
BEGIN, END = "<!-- the findings: scripts/guides writes them -->", "<!-- the end of the findings -->"


def ailments() -> list[Finding]:
    """In the order of the doctor's checks."""
    found = [
        *_machine(),
        *_keyring(),
        *_interfaces(),
        *_multicast(),
        *_ports(),
        *_join(),
        *_members(),
    ]
    assert all(f.verdict in (Verdict.PROBLEM, Verdict.WARNING) for f in found)
    return found


def table(found: list[Finding]) -> str:
    """For the guide: a row a finding."""
    lines = ["| check | it says | exit code | what to do |", "|---|---|---|---|"]
    for each in found:
        code = str(each.exit_code) if each.verdict is Verdict.PROBLEM else "0, a warning"
        cells = [each.check, each.text, code, each.hint]
        lines.append(f"| {' | '.join(_cell(text) for text in cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _machine() -> Iterator[Finding]:
    step = "computing conv"
    yield judge_engine(EngineRun(step, "SIGILL", "", BOARD))
    yield judge_engine(EngineRun(step, "SIGKILL, out of memory", "", BOARD))
    missing = "ModuleNotFoundError: No module named 'onnxruntime'"
    yield judge_engine(EngineRun("importing onnxruntime", "exit code 1", missing, BOARD))
    state = "state folder of the worker"
    folder = "/var/lib/meshinfer-worker"
    yield judge_room([Room(state, folder, 2_000_000_000, "Read-only file system")])
    yield judge_room([Room(state, folder, limits.DISK_LOW_BYTES // 2, "")])


def _keyring() -> Iterator[Finding]:
    """By reading files as they may be."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "keyring.json"
        yield _refused(path)
        write_keyring(path, new_keyring("default")[0])
        path.chmod(0o644)
        yield _refused(path)
        path.chmod(0o600)
        path.write_text("{}")
        yield _refused(path)


def _refused(path: Path) -> Finding:
    try:
        read_keyring(path)
    except MeshInferError as error:
        found = of_error("keyring", error)
    text, hint = (t.replace(str(path), "PATH/keyring.json") for t in (found.text, found.hint))
    return Finding(found.check, found.verdict, text, hint, found.exit_code)


def _interfaces() -> Iterator[Finding]:
    lo = Interface("lo", "127.0.0.1", up=True, loopback=True)
    cable, wifi = Interface("eth0", HOST, up=True), Interface("wlan0", "10.0.0.7", up=False)
    bridge = Interface("docker0", "172.17.0.1", up=True, skipped=True)
    yield judge_interfaces([lo, cable], ["10.9.9.9"], "", None)
    yield judge_interfaces([lo, cable, wifi], [wifi.address], "", None)
    yield judge_interfaces([lo, wifi], None, "", None)
    yield judge_interfaces([lo, cable], None, "10.9.9.9", None)
    yield judge_interfaces([lo, cable, bridge], None, "172.17.0.2", bridge.address)
    other = Interface("eth1", "10.1.0.5", up=True)
    yield judge_interfaces([lo, cable, other], [HOST], "10.1.0.1", other.address)


def _multicast() -> Iterator[Finding]:
    ours = Heard(HOST, PORT, "k", PROTOCOL)
    other, copy = (
        Heard("192.168.1.11", PORT, "l", PROTOCOL),
        Heard("192.168.1.11", PORT, "k", PROTOCOL),
    )
    where = f"{HOST}:{PORT}"
    yield judge_multicast(Multicast("default", True, (ours, other)), None, "")
    yield judge_multicast(Multicast("default", True, (ours, copy)), None, "")
    yield judge_multicast(Multicast("default", True, (other,)), "k", "")
    yield judge_multicast(Multicast("default", True, (), elsewhere=(ours,)), None, "")
    yield judge_multicast(Multicast("default", False, ()), None, "")
    yield judge_multicast(Multicast("default", True, (), direct=True), None, where)
    yield judge_multicast(Multicast("default", True, (), direct=False), None, where)
    yield judge_multicast(Multicast("default", True, ()), None, "")


def _ports() -> Iterator[Finding]:
    for outcome in ("refused", "silent", "unknown host", "Network is unreachable"):
        yield judge_port(Reached(HOST if outcome != "unknown host" else "pi-9", PORT, outcome))
    yield judge_own_port("0.0.0.0", PORT, taken=True)


def _join() -> Iterator[Finding]:
    """Nobody listens at the port that is tried; test_doctor has a coordinator that refuses."""
    yield of_error("join", refusal(HOST, PORT, REFUSED))
    ring = new_keyring("default")[0]
    try:
        try_key(ring, "127.0.0.1", 9, 0.1)
    except MeshInferError as error:
        found = of_error("join", error)
    text = found.text.replace("127.0.0.1:9", f"{HOST}:{PORT}").replace("0.1 s", "5 s")
    yield Finding(found.check, found.verdict, text, found.hint, found.exit_code)


def _members() -> Iterator[Finding]:
    head = Member("head", "ready", "pi-1", HOST, "0.1.0", head=True)
    first = Member("pi-1", "ready", "pi-1", HOST, "0.1.0", 40001)
    second = Member("pi-2", "ready", "pi-2", "192.168.1.12", "0.1.0", 40002)
    later = Heard(HOST, PORT, "k", (PROTOCOL[1] + 1, PROTOCOL[1] + 2))
    yield judge_versions("0.1.0", PROTOCOL, [later], [])
    newer = Member("pi-2", "ready", "pi-2", "192.168.1.12", "0.2.0")
    yield judge_versions("0.1.0", PROTOCOL, [], [first, newer])
    yield judge_identity("pi-2", ["192.168.1.13"], [first, second], is_worker=False)
    yield judge_identity("pi-2", ["192.168.1.13"], [first, second], is_worker=True)
    yield judge_devices([head], [])
    why = "it ended 3 times within 60 s, last: SIGSEGV"
    hot = Member("pi-3", "quarantined", "pi-3", "192.168.1.13", "0.1.0", cause=why)
    yield judge_devices([head, first, hot], [])
    yield judge_devices([head, first], [Reached("192.168.1.12", 40002, "silent", "pi-2")])
