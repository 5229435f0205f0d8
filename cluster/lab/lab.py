"""A lab: devices on this machine, each with a network, a CPU share and memory of its own.

An emulation of a shelf of small computers, and a lower bound of it. Needs root on Linux.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.lab import cgroups, filters, network, record
from cluster.lab.cgroups import FREE, Cgroups, GroupUsage
from cluster.lab.filters import Filters
from cluster.lab.specs import DeviceSpec, check_cpu, check_devices, check_link
from meshinfer.errors import ConfigurationError, InvalidInput

if TYPE_CHECKING:
    from cluster.lab.running import LabCluster
    from cluster.worker import Ways

_REAP_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Usage(GroupUsage):
    """What a device has used since the lab was made; the peak since ``reset_peak``.

    Memory is what the kernel charges the device: its processes' own pages (anonymous) and the
    files that it was the first to read or write. Bytes of the link count headers.
    """

    sent_bytes: int
    received_bytes: int


class Lab:
    """``devices``, numbered from 0. Use it as a context manager; ``name`` is made up if not given.

    Raises ``ConfigurationError`` where a lab cannot be (no root, not Linux, a program or the
    kernel's control groups missing), ``InvalidInput`` for devices or a name that make no sense.
    """

    def __init__(self, devices: Sequence[DeviceSpec], name: str | None = None) -> None:
        specs = check_devices(devices)
        self._groups = available()
        self._processes: list[subprocess.Popen] = []
        self._cluster: LabCluster | None = None
        self._filters: dict[int, Filters] = {}
        self._record = record.claim(name or secrets.token_hex(3), specs)
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def names() -> list[str]:
        """Of all labs on this machine, also of those that a killed process left behind."""
        return record.all_names()

    @classmethod
    def attach(cls, name: str) -> Lab:
        """A lab that was made elsewhere. ``close`` takes it down, leaving the block does not."""
        lab = cls.__new__(cls)
        lab._groups = available()
        lab._processes, lab._cluster = [], None
        lab._filters = {}
        lab._record = record.read(name)
        return lab

    # --- facts

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """As they were at first; ``set_cpu`` and ``set_link`` do not show here."""
        return self._record.devices

    @property
    def owner(self) -> int | None:
        """The process whose end is the lab's; None: it stays until it is taken down."""
        return None if self._record.owner is None else self._record.owner.pid

    @property
    def in_use(self) -> bool:
        """Whether its owner lives."""
        return self._record.in_use

    @property
    def state(self) -> Path:
        """A folder that goes with the lab."""
        return Path(self._record.state)

    def address(self, i: int) -> str:
        """The i-th device's, reachable from the other devices only."""
        return network.address(self._index(i))

    def processes(self, i: int) -> list[int]:
        """Ids of what runs on a device."""
        return cgroups.processes(self._groups, self.name).get(_group(self._index(i)), [])

    def usage(self, i: int) -> Usage:
        used = self._groups.usage(self.name, _group(self._index(i)))
        sent, received = network.counters(self.name, i)
        return Usage(**asdict(used), sent_bytes=sent, received_bytes=received)

    def reset_peak(self, i: int) -> None:
        """Let the peak of memory start again from what is in use now."""
        self._groups.reset_peak(self.name, _group(self._index(i)))

    # --- use

    def command(self, i: int, argv: Sequence[str], *, limits: bool = True) -> list[str]:
        """What to execute for ``argv`` to run on a device, from its first instruction on."""
        group = _group(self._index(i)) if limits else FREE
        enter = cgroups.entering(self._groups.folders(self.name, group))
        return [*enter, *network.entering(self.name, i), *argv]

    def spawn(
        self, i: int, argv: Sequence[str], *, limits: bool = True, **popen: Any
    ) -> subprocess.Popen:
        """Start a program on a device; the process that is returned is the program itself.

        ``limits=False``: in its network, but with all of this machine's CPU and memory.
        """
        process = subprocess.Popen(self.command(i, argv, limits=limits), **popen)
        self._processes = [p for p in self._processes if p.poll() is None] + [process]
        group = _group(i) if limits else FREE
        cgroups.wait_until_in(self._groups.folders(self.name, group), process)
        return process

    def start_cluster(
        self,
        *,
        log_level: str = "error",
        plaintext: bool = False,
        discovery: bool = False,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        ways: Callable[[int], Ways] | None = None,
    ) -> LabCluster:
        """A coordinator and a worker on device 0, a worker on each other; when all have joined.

        ``discovery``: they find the coordinator over mDNS instead of being told where it is.
        ``plaintext``: without encryption, to measure what that costs. ``environment``: more of it
        for the daemons. ``log``: a file that their logs are added to, instead of our stderr.
        ``ways``: of each device through a gate (``cluster.gate``) in its network.
        """
        from cluster.lab.running import LabCluster

        if self._cluster is not None:
            self._cluster.stop()
        self._cluster = LabCluster(
            self,
            log_level=log_level,
            plaintext=plaintext,
            discovery=discovery,
            environment=environment,
            log=log,
            ways=ways,
        )
        return self._cluster

    def set_cpu(self, i: int, cores: float) -> None:
        self._groups.set_cpu(self.name, _group(self._index(i)), check_cpu(cores))

    def set_link(self, i: int, bits_per_s: float) -> None:
        network.set_link(self.name, self._index(i), check_link(bits_per_s))

    def cut(self, i: int) -> None:
        """Drop all that a device sends or should receive, silently, as a bad switch does."""
        network.set_cut(self.name, self._index(i), cut=True)

    def cut_between(self, i: int, j: int) -> None:
        """Drop all between two devices, silently; each still reaches all others. Needs nftables."""
        for one, other in ((self._index(i), self._index(j)), (j, i)):
            self._filters.setdefault(one, Filters()).deaf.add(other)
            filters.apply(self.name, one, self._filters[one])

    def lose(self, i: int, share: float) -> None:
        """Drop this share (0 to 0.5) of the packets that reach a device. Needs nftables."""
        self._filters.setdefault(self._index(i), Filters()).loss = filters.check_loss(share)
        filters.apply(self.name, i, self._filters[i])

    def heal(self, i: int) -> None:
        """End ``cut``, ``lose``, and ``cut_between`` with this and any device."""
        network.set_cut(self.name, self._index(i), cut=False)
        for j, each in sorted(self._filters.items()):
            if j == i or i in each.deaf:
                each.deaf -= each.deaf if j == i else {i}
                each.loss = 0.0 if j == i else each.loss
                filters.apply(self.name, j, each)

    # --- end

    def leave(self) -> None:
        """Let the lab outlive this process, until ``meshinfer lab down``."""
        self._record = record.give_up(self._record)

    def close(self) -> None:
        """Stop what runs in the lab and remove all of it. Again is no error."""
        try:
            if self._cluster is not None:
                self._cluster.stop()
        except subprocess.TimeoutExpired:
            pass  # taken down with the lab
        finally:
            record.take_down(self._record, self._groups)
            for process in self._processes:  # killed with their groups
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_REAP_S)
            self._processes.clear()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        if self.owner == os.getpid():
            self.close()
        elif self._cluster is not None:
            self._cluster.stop()

    # --- inside

    def _make(self) -> None:
        network.create(self.name, [device.link_bits_per_s for device in self.devices])
        self._groups.create(self.name, FREE)
        self._groups.set_weight(self.name, len(self.devices))
        for i, device in enumerate(self.devices):
            self._groups.create(self.name, _group(i))
            self._groups.set_cpu(self.name, _group(i), device.cpu)
            if device.memory_bytes is not None:
                self._groups.set_memory(self.name, _group(i), device.memory_bytes)

    def _index(self, i: int) -> int:
        if not 0 <= i < len(self.devices):
            raise InvalidInput(
                f"no device {i} in lab {self.name}", hint=f"0 to {len(self.devices) - 1}"
            )
        return i


def available() -> Cgroups:
    """The control groups, if a lab can be here; else ``ConfigurationError`` says what is missing"""
    if not sys.platform.startswith("linux"):
        raise ConfigurationError(
            f"the lab needs Linux, and this is {sys.platform}",
            hint="use LocalCluster or meshinfer demo here",
        )
    if os.geteuid() != 0:
        raise ConfigurationError(
            "the lab needs root: it makes network namespaces and control groups",
            hint="run it with sudo; LocalCluster and meshinfer demo need no root",
        )
    network.check_tools()
    return cgroups.find_cgroups()


def _group(i: int) -> str:
    return f"d{i}"
