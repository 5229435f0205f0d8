"""What is known of a device: measured speeds in SI units, nothing derived from a plan."""

from __future__ import annotations

from dataclasses import dataclass

from meshinfer.identity import DeviceId

BYTES_PER_FLOP = 0.2
"""Memory bandwidth that goes with a speed, where none was measured.

An assumption, not measured here: about 4 GB/s beside 20 GFLOP/s, the order of a Raspberry Pi 4. A
ratio and not a constant, since a quota on the processor slows both alike.
"""


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One device as measured. ``cluster.profiler`` makes these; tests write them by hand.

    ``flops_per_s``: sustained speed of convolutions, counting a multiply-add as 2. ``overhead_s``:
    fixed cost of a task. ``bandwidth_bytes_per_s``, ``latency_s``: of its link, each way at once.
    ``memory_bytes``: what MeshInfer may use, 0 where unknown. ``numeric_class``: devices of one
    class give equal bits. ``computes``: False for one that only holds data.
    ``memory_bytes_per_s``: of its memory, 0 to derive it from ``flops_per_s``. ``host``: the
    machine that it runs on and whose link it shares, "" where that is unknown.
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
    host: str = ""

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
