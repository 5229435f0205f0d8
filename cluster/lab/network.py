"""The network of a lab: a namespace a device, and a bridge between them in one of its own.

Nothing of the host's network is touched. Each cable is shaped at both ends (``tc tbf``); its
latency is that of a veth pair, some 50 microseconds, since netem is not everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from meshinfer.errors import ConfigurationError

NAMESPACES: Final = Path("/run/netns")
TOOLS: Final = {
    "ip": "iproute2",
    "tc": "iproute2",
    "bridge": "iproute2",
    "nsenter": "util-linux",
}
SEARCHED: Final = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_COMMAND_S: Final = 30.0
_CARRIER_S: Final = 10.0
_POLL_S: Final = 0.02
_DISABLED, _FORWARDING = "0", "3"  # states of a bridge's port

# Measured: the burst is what passes at once after a pause, so it is as small as the rate allows.
_BURST_S: Final = 0.001
_BURST_BYTES: Final = (8 << 10, 128 << 10)
_QUEUE_S: Final = 0.02
_QUEUE_BYTES: Final = 256 << 10


def check_tools() -> None:
    """Raises ``ConfigurationError`` naming the first program that is missing."""
    for tool, package in TOOLS.items():
        if shutil.which(tool, path=SEARCHED) is None:
            raise ConfigurationError(
                f"the lab needs the program {tool}",
                hint=f"install {package} (Debian: apt install {package})",
            )


def address(i: int) -> str:
    """Of the i-th device, from 0."""
    return f"10.77.{(i + 1) >> 8}.{(i + 1) & 255}"


def namespace(lab: str, i: int) -> str:
    return f"mi-{lab}-{i}"


def entering(lab: str, i: int) -> list[str]:
    """A command's beginning: what follows runs in the device's network."""
    return [tool("nsenter"), f"--net={NAMESPACES / namespace(lab, i)}", "--"]


def create(lab: str, links_bits_per_s: Sequence[float]) -> None:
    """Make the bridge and a device for each link, and wait until all cables carry."""
    bridge, devices = _bridge(lab), range(len(links_bits_per_s))
    names = [bridge, *(namespace(lab, i) for i in devices)]
    _batch([], [f"netns add {name}" for name in names])
    ports = ["link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0"]
    for i in devices:
        ports += [
            f"link add d{i} type veth peer name eth0 netns {namespace(lab, i)}",
            f"link set d{i} master br0",
            f"link set d{i} up",
        ]
    _batch(["-n", bridge], [*ports, "link set br0 up"])
    for i, rate in enumerate(links_bits_per_s):
        set_link(lab, i, rate)
        own = [f"addr add {address(i)}/16 brd + dev eth0", "link set lo up", "link set eth0 up"]
        _batch(["-n", namespace(lab, i)], own)
    _wait_for_carrier(lab, len(links_bits_per_s))


def set_link(lab: str, i: int, bits_per_s: float) -> None:
    """Shape both ends of a device's cable to this rate."""
    burst, queue = shape(bits_per_s)
    shaping = f"root tbf rate {round(bits_per_s)}bit burst {burst}b limit {queue}b"
    run("tc", "-n", namespace(lab, i), *f"qdisc replace dev eth0 {shaping}".split())
    run("tc", "-n", _bridge(lab), *f"qdisc replace dev d{i} {shaping}".split())


def shape(bits_per_s: float) -> tuple[int, int]:
    """(burst, queue) in bytes for a rate."""
    bytes_per_s = bits_per_s / 8
    burst = min(max(_BURST_BYTES[0], round(bytes_per_s * _BURST_S)), _BURST_BYTES[1])
    return burst, burst + max(_QUEUE_BYTES, round(bytes_per_s * _QUEUE_S))


def set_cut(lab: str, i: int, *, cut: bool) -> None:
    """Let the bridge drop all of a device's packets, silently: its cable seems fine; or not."""
    state = _DISABLED if cut else _FORWARDING
    run("bridge", "-n", _bridge(lab), "link", "set", "dev", f"d{i}", "state", state)


def counters(lab: str, i: int) -> tuple[int, int]:
    """Bytes that a device has sent and received over its cable, headers included."""
    (link,) = _json("ip", "-n", namespace(lab, i), "-s", "-j", "link", "show", "eth0")
    stats = link["stats64"]
    return int(stats["tx"]["bytes"]), int(stats["rx"]["bytes"])


def remove(lab: str) -> None:
    """Remove the namespaces of a lab, and with them its bridge and cables."""
    for name in names(lab):
        with suppress(ConfigurationError):  # somebody else was quicker
            run("ip", "netns", "del", name)
    left = names(lab)
    if left:
        raise ConfigurationError(
            f"cannot remove the network namespaces {', '.join(left)}",
            hint="try ip netns del",
        )


def names(lab: str) -> list[str]:
    """Namespaces that a lab has. Names of labs have no '-', so none is another's."""
    return sorted(path.name for path in NAMESPACES.glob(f"mi-{lab}-*"))


def _bridge(lab: str) -> str:
    return f"mi-{lab}-br"


def _wait_for_carrier(lab: str, count: int) -> None:
    """The kernel tells of a carrier up to a second late, and drops packets until then."""
    deadline = time.monotonic() + _CARRIER_S
    places = [(namespace(lab, i), "eth0") for i in range(count)]
    places += [(_bridge(lab), f"d{i}") for i in range(count)]
    while places:
        name, link = places[-1]
        (state,) = _json("ip", "-n", name, "-j", "link", "show", link)
        if state["operstate"] == "UP":
            places.pop()
        elif time.monotonic() > deadline:
            raise ConfigurationError(
                f"{link} in {name} has no carrier", hint="does this kernel have veth and bridge?"
            )
        else:
            time.sleep(_POLL_S)


def tool(name: str) -> str:
    """Where a program is, also for who has no sbin in its PATH."""
    return shutil.which(name, path=SEARCHED) or name


def _batch(options: list[str], lines: list[str]) -> None:
    run("ip", *options, "-batch", "-", text="".join(f"{line}\n" for line in lines))


def _json(*command: str) -> Any:
    return json.loads(run(*command))


def run(*command: str, text: str = "") -> str:
    """What a command prints. Raises ``ConfigurationError`` when it fails."""
    try:
        done = subprocess.run(
            [tool(command[0]), *command[1:]],
            input=text,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigurationError(
            f"{' '.join(command)}: {error}", hint="is iproute2 installed?"
        ) from error
    if done.returncode:
        raise ConfigurationError(
            f"{' '.join(command)}: {done.stderr.strip() or done.returncode}",
            hint="does this kernel have veth, bridge and sch_tbf, and may we use them?",
        )
    return done.stdout
