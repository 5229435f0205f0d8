"""What the planner knows of a device: what it said of itself, and its link as measured."""

from __future__ import annotations

from meshinfer.cost import DeviceProfile
from meshinfer.identity import DeviceId
from meshinfer.protocol.messages import Facts
from meshinfer.protocol.records import Link


def profile_of(
    device: str,
    facts: Facts,
    link: Link | None = None,
    slowdown: float = 1.0,
    host: str = "",
) -> DeviceProfile:
    """The profile of a device. What was not measured is as ``DeviceProfile`` assumes.

    ``slowdown``: how many times longer than by its own figures its kernels take now.
    """
    plain = DeviceProfile(DeviceId(device), facts.flops_per_s)
    return DeviceProfile(
        id=plain.id,
        flops_per_s=facts.flops_per_s / slowdown,
        overhead_s=facts.overhead_s or plain.overhead_s,
        bandwidth_bytes_per_s=(link and link.bytes_per_s) or plain.bandwidth_bytes_per_s,
        latency_s=(link and link.latency_s) or plain.latency_s,
        memory_bytes=facts.memory_bytes,
        numeric_class=facts.engine,
        computes=facts.computes,
        memory_bytes_per_s=facts.memory_bytes_per_s / slowdown,
        rates=tuple(rate / slowdown for rate in facts.rates),
        kernel_s=facts.kernel_s * slowdown,
        host=host,
        message_s=facts.overhead_s or plain.message_s,  # each wakes a thread or two, as a task does
    )
