"""What is written down of a lab, so that another process can use it, and remove it after a crash.

A file ``NAME.json`` from before the first thing is made until after the last one is removed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from cluster.lab import cgroups, network
from cluster.lab.cgroups import Cgroups
from cluster.lab.specs import DeviceSpec
from meshinfer.errors import ConfigurationError, InvalidInput

FOLDER: Final = Path("/run/meshinfer-lab")
_NAME: Final = re.compile(r"[a-z0-9]{1,12}")


class Owner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process, told from a later one of the same id by its start (clock ticks after boot)."""

    pid: int
    started: int


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lab. ``owner``: the process whose end is the lab's; None: stays until it is taken down.
    ``state``: the folder for what its daemons keep.
    """

    name: str
    devices: tuple[DeviceSpec, ...]
    owner: Owner | None
    state: str

    @property
    def in_use(self) -> bool:
        """Whether its owner lives."""
        return self.owner is not None and _started(self.owner.pid) == self.owner.started


def claim(name: str, devices: tuple[DeviceSpec, ...]) -> Record:
    """Write down a new lab of this process. Raises for a name that is no name, or taken."""
    check_name(name)
    FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = Owner(os.getpid(), _started(os.getpid()) or 0)
    record = Record(name, devices, owner, tempfile.mkdtemp(prefix=f"meshinfer-lab-{name}-"))
    part = _write(record)
    try:
        os.link(part, _path(name))  # whole from the first moment on; fails if there is one
    except FileExistsError as error:
        Path(record.state).rmdir()
        raise ConfigurationError(
            f"there is a lab {name!r} already",
            hint=f"choose another name, or remove that one: meshinfer lab down {name}",
        ) from error
    finally:
        part.unlink()
    return record


def give_up(record: Record) -> Record:
    """The lab shall outlive this process."""
    free = msgspec.structs.replace(record, owner=None)
    os.replace(_write(free), _path(record.name))
    return free


def read(name: str) -> Record:
    """The lab of this name. Raises ``InvalidInput`` if there is none."""
    check_name(name)
    try:
        return msgspec.json.decode(_path(name).read_bytes(), type=Record)
    except FileNotFoundError as error:
        there = ", ".join(all_names()) or "none"
        raise InvalidInput(f"no lab {name!r}", hint=f"there are: {there}") from error
    except msgspec.DecodeError:  # of another version: its name is enough to remove it
        return Record(name, (), None, "")


def all_names() -> list[str]:
    """Of all labs that are written down."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def take_down(record: Record, groups: Cgroups) -> None:
    """Remove all of a lab: its processes, groups, namespaces, files. Again is no error."""
    cgroups.remove(groups, record.name)
    network.remove(record.name)
    if record.state:
        shutil.rmtree(record.state, ignore_errors=True)
    _path(record.name).unlink(missing_ok=True)


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"a lab cannot be named {name!r}", hint="1 to 12 of a-z and 0-9")


def _path(name: str) -> Path:
    return FOLDER / f"{name}.json"


def _write(record: Record) -> Path:
    part = FOLDER / f"{record.name}.{os.getpid()}.part"
    part.write_bytes(msgspec.json.encode(record))
    return part


def _started(pid: int) -> int | None:
    """Start of a process; None if there is none, or nothing but its exit code is left."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return int(fields[19])
    return None
