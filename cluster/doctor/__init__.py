"""Probes this machine, its network and its cluster for ``meshinfer.doctor``, which judges.

Checks run in the order of causes. None raises, none changes anything, each has a bound in time.
The engine comes first, in a process of its own: numpy alone may die of what is wrong with it. What
takes its time on the network is asked meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

import meshinfer
from cluster.config import ADDRESS_FILE, coordinator_state, default_keyring, state_dir
from cluster.doctor import network
from cluster.doctor.engine import run_engine
from cluster.doctor.storage import room
from cluster.keyring import KEYRING_FILE, Keyring, read_keyring
from cluster.locate import DEFAULT_PORT, parse_address
from meshinfer.doctor import (
    Finding,
    Heard,
    Member,
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
    ok,
    skipped,
)
from meshinfer.errors import MeshInferError

_COORDINATOR_FILE = "coordinator.json"


@dataclass(frozen=True, slots=True)
class Options:
    """Of an examination. ``coordinator``: HOST:PORT, if given; ``state``: where this machine's
    daemons keep their state, if not in the usual folders; ``name``: that a worker here has."""

    cluster: str
    name: str
    coordinator: str | None = None
    keyring: Path | None = None
    interfaces: tuple[str, ...] | None = None
    state: Path | None = None
    threads: int = 1
    timeout_s: float = 5.0


class _Address(msgspec.Struct):
    """What a running coordinator wrote, as far as it matters here."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class _Target:
    """The coordinator to look at."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def examine(options: Options, say: Callable[[Finding], None]) -> list[Finding]:
    """All findings, in the order of causes; each is said as soon as it is there."""
    found = []
    for finding in _Examination(options).all():
        say(finding)
        found.append(finding)
    return found


class _Examination:
    """One run of all checks."""

    def __init__(self, options: Options) -> None:
        self._options = options
        own = options.state or coordinator_state(options.cluster)
        self._coordinator_state = own
        self._workers = (
            options.state or state_dir(f"worker-{options.cluster}-{options.name}"),
            own / "worker",
        )

    def all(self) -> Iterator[Finding]:
        ring, about_ring = self._keyring()
        cluster = ring.cluster if ring is not None else self._options.cluster
        target = self._target()
        host = target.host if target is not None else ""
        with ThreadPoolExecutor(max_workers=1) as pool:
            listening = pool.submit(network.listen, cluster, self._options.interfaces, host)
            engine = judge_engine(run_engine(self._options.threads))
            yield engine
            yield judge_room(self._rooms())
            yield about_ring
            here = network.interfaces()
            through = network.way_to(host) if host else None
            yield judge_interfaces(here, self._options.interfaces, host, through)
            seen = listening.result()
        key = None if ring is None else ring.coordinator_public
        yield judge_multicast(seen, key, "" if target is None else str(target))
        if target is None:
            target = _announced((*seen.heard, *seen.elsewhere), key)
        yield from self._ports(target)
        if engine.verdict is Verdict.PROBLEM and "numpy" in engine.text:
            yield skipped("join", "without numpy there is no client")
            return
        yield from self._cluster(ring, target, seen.heard, [i.address for i in here])

    def _rooms(self) -> list:
        folders = {
            "state folder of the coordinator": self._coordinator_state,
            "state folder of the worker": self._workers[0],
            "folder of temporary files": Path(tempfile.gettempdir()),
        }
        return [room(what, folder) for what, folder in folders.items()]

    def _keyring(self) -> tuple[Keyring | None, Finding]:
        """That of a client or admin here, else a worker's."""
        path = self._options.keyring or default_keyring(self._options.cluster)
        if self._options.keyring is None and not path.exists():
            of_workers = [folder / KEYRING_FILE for folder in self._workers]
            path = next((each for each in of_workers if each.exists()), path)
        try:
            ring = read_keyring(path)
        except MeshInferError as error:
            return None, of_error("keyring", error)
        plain = "; NOT ENCRYPTED" if ring.plaintext else ""
        return ring, ok("keyring", f"{path} has the role {ring.role} in {ring.cluster!r}{plain}")

    def _target(self) -> _Target | None:
        """As given, else the coordinator that runs on this machine."""
        if self._options.coordinator:
            return _Target(*parse_address(self._options.coordinator))
        with suppress(OSError, msgspec.DecodeError):  # also of one that was killed: its port tells
            text = (self._coordinator_state / ADDRESS_FILE).read_bytes()
            address = msgspec.json.decode(text, type=_Address)
            return _Target(address.host, address.port)
        return None

    def _ports(self, target: _Target | None) -> Iterator[Finding]:
        if target is not None:
            yield judge_port(network.reach(target.host, target.port))
        elif (self._coordinator_state / _COORDINATOR_FILE).exists():
            taken = network.is_taken("0.0.0.0", DEFAULT_PORT)
            yield judge_own_port("0.0.0.0", DEFAULT_PORT, taken)
        else:
            yield skipped("port", "no coordinator is known")

    def _cluster(
        self,
        ring: Keyring | None,
        target: _Target | None,
        heard: tuple[Heard, ...],
        own: list[str],
    ) -> Iterator[Finding]:
        from meshinfer.protocol.messages import PROTOCOL  # numpy comes along

        members: list[Member] = []
        if ring is None or target is None:
            why = "there is no keyring" if ring is None else "no coordinator is known"
            yield skipped("join", why)
        else:
            try:
                if ring.role == "worker":
                    network.try_key(ring, target.host, target.port, self._options.timeout_s)
                else:
                    members = self._members(target)
                yield ok("join", f"the coordinator at {target} admits us")
            except MeshInferError as error:
                yield of_error("join", error)
        yield judge_versions(meshinfer.__version__, PROTOCOL, heard, members)
        if not members:
            asks = "; a worker's key may not ask" if ring and ring.role == "worker" else ""
            yield skipped("identity", f"the cluster's devices are not known{asks}")
            return
        is_worker = any((folder / "lock").exists() for folder in self._workers)
        yield judge_identity(self._options.name, own, members, is_worker)
        places = [(d.address, d.port, d.name) for d in members if d.port and d.state != "dead"]
        yield judge_devices(members, network.reach_all(places))

    def _members(self, target: _Target) -> list[Member]:
        from cluster.client import Client
        from meshinfer.protocol.records import BESIDE_COORDINATOR

        def address(where: str) -> str:
            own = where.rpartition(" ")[2]
            return target.host if own == BESIDE_COORDINATOR else own

        with Client(
            str(target),
            keyring=self._options.keyring,
            cluster=self._options.cluster,
            timeout_s=self._options.timeout_s,
        ) as client:
            return [
                Member(
                    name=each.device,
                    state=each.state,
                    host=each.facts.host,
                    address=address(each.where),
                    port=each.port,
                    version=each.facts.version,
                    cause=each.cause,
                    head=each.facts.head,
                )
                for each in client.devices()
            ]


def _announced(found: tuple[Heard, ...], key: str | None) -> _Target | None:
    """The one with our key, if any; else, to see what it says, the first."""
    chosen = [h for h in found if h.key == key] or list(found)
    return _Target(chosen[0].host, chosen[0].port) if chosen else None
