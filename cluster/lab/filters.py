"""Faults that only some packets of a lab meet: nftables rules in a device's namespace.

What is dropped here is dropped silently, with the cable and all other connections as they were.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cluster.lab import network
from meshinfer.errors import ConfigurationError, InvalidInput

_TABLE: Final = "meshinfer"


@dataclass(slots=True)
class Filters:
    """What a device is to lose: all packets to and from ``deaf`` devices, a share of all others."""

    deaf: set[int] = field(default_factory=set)
    loss: float = 0.0


def check_loss(share: float) -> float:
    """A share of packets, from 0 to 0.5. Raises ``InvalidInput``."""
    if not 0 <= share <= 0.5:
        raise InvalidInput(f"a loss of {share}", hint="give a share from 0 to 0.5")
    return share


def apply(lab: str, i: int, filters: Filters) -> None:
    """Replace a device's rules. Raises ``ConfigurationError`` without nftables in the kernel."""
    if shutil.which("nft", path=network.SEARCHED) is None:
        raise ConfigurationError(
            "cutting between two devices, and losing packets, need the program nft",
            hint="install nftables (Debian: apt install nftables)",
        )
    network.run(*network.entering(lab, i), network.tool("nft"), "-f", "-", text=_rules(filters))


def _rules(filters: Filters) -> str:
    own = f"table inet {_TABLE}"
    lines = [own, f"delete {own}", f"{own} {{"]
    for hook, side in (("input", "saddr"), ("output", "daddr")):
        drops = _drops(filters, side) if hook == "input" or filters.deaf else []
        lines += [f"chain {hook} {{", f"type filter hook {hook} priority 0;", *drops, "}"]
    return "\n".join([*lines, "}", ""])


def _drops(filters: Filters, side: str) -> Sequence[str]:
    drops = [f"ip {side} {network.address(i)} drop" for i in sorted(filters.deaf)]
    if filters.loss and side == "saddr":  # once a packet: where it comes in
        # What stays on the device is no packet of its network.
        drops.append(f'iifname "eth0" numgen random mod 10000 < {round(filters.loss * 1e4)} drop')
    return drops
