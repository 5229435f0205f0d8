"""What the planner knows of a device: what it said of itself, and its link as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshinfer.cost import DeviceProfile
from meshinfer.errors import InvalidInput
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


def within(
    profiles: Sequence[DeviceProfile], granted: Mapping[str, int] | int | None
) -> list[DeviceProfile]:
    """The same, within the bytes that the user grants to each, or to all alike; 0: not used.

    Raises ``InvalidInput`` for a device that does not compute.
    """
    if not isinstance(granted, Mapping):
        return [_within(p, granted) for p in profiles]
    able = sorted(p.id for p in profiles if p.computes)
    unknown = sorted(set(granted) - set(able))
    if unknown:
        raise InvalidInput(
            f"memory is granted for {unknown[0]!r}, which does not compute in this cluster",
            hint=f"devices that compute are {able}",
        )
    return [_within(p, granted.get(p.id)) for p in profiles]


def _within(p: DeviceProfile, granted: int | None) -> DeviceProfile:
    if granted is None or not p.computes:
        return p
    if granted == 0:
        return replace(p, computes=False)
    return replace(p, memory_bytes=min(granted, p.memory_bytes or granted))
