"""What a lab's devices are: shares of this machine, with presets that say what they stand for.

An emulation: a share of a fast core has another cache, another instruction set and sleeps between
its slices. Results are a lower bound of what real boards of that ratio would reach.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from meshinfer import limits
from meshinfer.errors import InvalidInput

GIB: Final = 1 << 30
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device. ``cpu``: cores of this machine, also fractions. ``memory_bytes``: None has no
    limit. ``link_bits_per_s``: of its cable, each way.
    """

    name: str
    cpu: float = 0.25
    memory_bytes: int | None = None
    link_bits_per_s: float = 1e9


PRESETS: Final[Mapping[str, tuple[DeviceSpec, ...]]] = MappingProxyType(
    {
        "pi3": (DeviceSpec("pi3", 0.125, 1 * GIB, 1e8),),
        "pi4": (DeviceSpec("pi4", 0.25, 4 * GIB, 1e9),),
        "pi5": (DeviceSpec("pi5", 0.5, 8 * GIB, 1e9),),
        "mixed": (
            DeviceSpec("full", 0.5),
            DeviceSpec("full", 0.5),
            DeviceSpec("half", 0.25),
            DeviceSpec("quarter", 0.125),
        ),
        "device+server": (DeviceSpec("device"), DeviceSpec("server", 1.0, None, 2e7)),
        "device+server-5": (DeviceSpec("device"), DeviceSpec("server", 1.0, None, 5e6)),
        "device+server-20": (DeviceSpec("device"), DeviceSpec("server", 1.0, None, 2e7)),
        "device+server-100": (DeviceSpec("device"), DeviceSpec("server", 1.0, None, 1e8)),
    }
)
"""Devices by preset; ``preset`` repeats them to the number wanted and numbers their names."""

ABOUT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pi3": "Raspberry Pi 3: 1/8 core, 1 GiB, 100 Mbit/s",
        "pi4": "Raspberry Pi 4: 1/4 core, 4 GiB, 1 Gbit/s",
        "pi5": "Raspberry Pi 5: 1/2 core, 8 GiB, 1 Gbit/s",
        "mixed": "boards of speeds 1 : 1 : 1/2 : 1/4 (1 is half a core), 1 Gbit/s",
        "device+server": "a board of 1/4 core and a server of 1 core behind 20 Mbit/s",
        "device+server-5": "a board of 1/4 core and a server of 1 core behind 5 Mbit/s",
        "device+server-20": "a board of 1/4 core and a server of 1 core behind 20 Mbit/s",
        "device+server-100": "a board of 1/4 core and a server of 1 core behind 100 Mbit/s",
    }
)
"""What each preset stands for. The boards' ratios are kept; how fast 1/4 core is depends on this
machine, so all of it is emulated and a lower bound.
"""

assert PRESETS.keys() == ABOUT.keys()


def preset(name: str, count: int | None = None) -> tuple[DeviceSpec, ...]:
    """``count`` devices of a preset, named NAME-1, NAME-2, ...; default: as many as it lists.

    Raises ``InvalidInput`` for an unknown preset or a number that no lab holds.
    """
    kinds = PRESETS.get(name)
    if kinds is None:
        raise InvalidInput(f"no preset {name!r}", hint=f"there are {', '.join(PRESETS)}")
    number = len(kinds) if count is None else count
    if not 1 <= number <= limits.LAB_DEVICES:
        raise InvalidInput(f"a lab of {number} devices", hint=f"1 to {limits.LAB_DEVICES}")
    made: dict[str, int] = {}
    devices = []
    for i in range(number):
        kind = kinds[i % len(kinds)]
        made[kind.name] = made.get(kind.name, 0) + 1
        devices.append(replace(kind, name=f"{kind.name}-{made[kind.name]}"))
    return tuple(devices)


def check_devices(devices: Sequence[DeviceSpec]) -> tuple[DeviceSpec, ...]:
    """The same, if a lab can hold them. Raises ``InvalidInput``."""
    if not 1 <= len(devices) <= limits.LAB_DEVICES:
        raise InvalidInput(f"a lab of {len(devices)} devices", hint=f"1 to {limits.LAB_DEVICES}")
    names = [device.name for device in devices]
    for device in devices:
        if not _NAME.fullmatch(device.name) or device.name == "head":
            raise InvalidInput(
                f"a device cannot be named {device.name!r}",
                hint="letters, digits, '.', '_' and '-'; 'head' is the coordinator's own",
            )
        if names.count(device.name) > 1:
            raise InvalidInput(f"two devices named {device.name!r}", hint="give each its own name")
        check_cpu(device.cpu)
        check_link(device.link_bits_per_s)
        if device.memory_bytes is not None:
            _within("memory", device.memory_bytes, limits.LAB_MEMORY_BYTES, "bytes")
    return tuple(devices)


def check_cpu(cores: float) -> float:
    return _within("CPU", cores, limits.LAB_CORES, "cores")


def check_link(bits_per_s: float) -> float:
    return _within("link", bits_per_s, limits.LAB_LINK_BITS_PER_S, "bit/s")


def _within(what: str, value: float, bounds: tuple[float, float], unit: str) -> float:
    if not bounds[0] <= value <= bounds[1]:  # also false for NaN
        raise InvalidInput(
            f"a device's {what} cannot be {value:g} {unit}",
            hint=f"{bounds[0]:g} to {bounds[1]:g} {unit}",
        )
    return value
