"""What is known of a device: measured speeds in SI units, nothing derived from a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from meshinfer.cost.kinds import OpKind
from meshinfer.identity import DeviceId

BYTES_PER_FLOP = 0.5
"""Memory bandwidth that goes with a speed, where none was measured.

A fit over 11 networks on one core of the machine of ``kinds`` gives 52 GB/s beside 91 GFLOP/s: most
of what a kernel reads is in a cache. A ratio and not a constant, since a quota on the processor
slows both alike.
"""

RATIOS: dict[OpKind, float] = {
    OpKind.DENSE: 1.0,
    OpKind.FIRST: 0.8,
    OpKind.DEPTHWISE: 0.33,
    OpKind.GROUPED: 1.0,
    OpKind.LOOSE: 0.4,
    OpKind.ODD: 0.07,
    OpKind.MATRIX: 0.9,
    OpKind.VECTOR: 0.18,
    OpKind.INT8: 2.2,
    OpKind.WINDOW: 0.02,
    OpKind.FUNCTION: 0.025,
    OpKind.OTHER: 1.0,
}
"""Speeds of the kinds relative to dense convolutions, where they were not measured: from the same
fit."""


@dataclass(frozen=True, slots=True)
class PairLink:
    """The link of a device with ``peer``, each way; 0 where the ends tell it."""

    peer: DeviceId
    bytes_per_s: float = 0.0
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device as measured. ``cluster.profiler`` makes these; tests write them by hand.

    ``flops_per_s``: sustained speed of dense convolutions, counting a multiply-add as 2.
    ``overhead_s``: fixed cost of a task. ``bandwidth_bytes_per_s``, ``latency_s``: of its link,
    each way at once. ``memory_bytes``: what MeshInfer may use, 0 where unknown. ``numeric_class``:
    devices of one class give equal bits. ``computes``: False for one that only holds data.
    ``memory_bytes_per_s``: of its memory, 0 to derive it from ``flops_per_s``. ``rates``: FLOP/s by
    ``OpKind``, empty to derive them. ``kernel_s``: fixed cost of one kernel. ``host``: the machine
    that it runs on and whose link it shares, "" where that is unknown. ``message_s``, ``byte_s``:
    time of its processor that a message takes, and each byte of it, sent or received: encryption,
    copies. ``request_s``, ``report_s``: of a head, what client, coordinator and head take of their
    host's processor for each request, and for each task that they hear of. ``model``: what it says
    of its hardware, "" where that is unknown; devices of one model are as fast as each other.
    ``links``: of pairs of devices whose link is not what both ends suggest.
    """

    id: DeviceId
    flops_per_s: float
    overhead_s: float = 0.002
    bandwidth_bytes_per_s: float = 100e6 / 8
    latency_s: float = 0.001
    memory_bytes: int = 0
    numeric_class: str = ""
    computes: bool = True
    memory_bytes_per_s: float = 0.0
    rates: tuple[float, ...] = ()
    kernel_s: float = 0.0
    host: str = ""
    message_s: float = 0.0002
    byte_s: float = 2e-9
    request_s: float = 0.0
    report_s: float = 0.0
    model: str = ""
    links: tuple[PairLink, ...] = field(default=(), hash=False)

    def link_to(self, other: DeviceProfile) -> PairLink | None:
        """What is known of this pair beyond its ends; None where the ends tell all."""
        return next((link for link in self.links if link.peer == other.id), None)

    def rate_to(self, other: DeviceProfile) -> float:
        """Bytes/s of a transfer to a device on another host."""
        rate = min(self.bandwidth_bytes_per_s, other.bandwidth_bytes_per_s)
        pair = self.link_to(other) if self.links else None
        return rate if pair is None or not pair.bytes_per_s else min(rate, pair.bytes_per_s)

    def beside(self, other: DeviceProfile) -> bool:
        """Whether the two share a machine, so that nothing between them crosses a link."""
        return self.id == other.id or bool(self.host and self.host == other.host)

    @property
    def able(self) -> bool:
        """Whether it can be given a task at all."""
        return self.computes and self.flops_per_s > 0

    @property
    def copy_bytes_per_s(self) -> float:
        """Memory bandwidth, measured or derived."""
        return self.memory_bytes_per_s or self.flops_per_s * BYTES_PER_FLOP

    def rate(self, kind: OpKind) -> float:
        """FLOP/s of a kind, measured or derived."""
        if kind < len(self.rates) and self.rates[kind] > 0:
            return self.rates[kind]
        return self.flops_per_s * RATIOS[kind]

    @property
    def unit_costs(self) -> tuple[float, ...]:
        """Seconds of one unit of each amount of a ``Work``. Infinite where it cannot compute."""
        return _unit_costs(self)


@lru_cache(maxsize=1024)
def _unit_costs(profile: DeviceProfile) -> tuple[float, ...]:
    if not profile.able:
        return (float("inf"),) * (len(OpKind) + 2)
    rates = (1.0 / profile.rate(kind) for kind in OpKind)
    return (*rates, 1.0 / profile.copy_bytes_per_s, profile.kernel_s)
