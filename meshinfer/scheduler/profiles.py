"""What the planner knows of the devices: what they said of themselves, and links as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshinfer.cost import DeviceProfile, PairLink, alike
from meshinfer.cost.alike import apart_links
from meshinfer.errors import InvalidInput, NotEnoughMemory
from meshinfer.identity import DeviceId
from meshinfer.protocol.messages import Facts
from meshinfer.protocol.records import Link

REQUEST_MESSAGES = 20.0
"""What a request takes of the processor of the head's host, as multiples of a worker's message:
a client that is its own head and the coordinator 1.45 ms, where a message takes 0.071 ms (processor
time in a LocalCluster, ``scripts/bench_messages``, as the figures below)."""
HEAD_MESSAGE = 4.0
"""A message of such a client, beside one of a worker: 0.29 ms."""
HEAD_BYTE = 1.3
"""A byte that it sends or receives, beside a worker's: 1.73 ns against 1.36 ns. By the head in the
coordinator's process, for clients elsewhere, it was 4.7 ns."""
REPORT_MESSAGES = 0.6
"""What the coordinator takes for each task that it hears of, as a multiple of a message."""


def profile_of(
    device: str,
    facts: Facts,
    link: Link | None = None,
    host: str = "",
    links: Sequence[Link] = (),
) -> DeviceProfile:
    """The profile of a device. What was not measured is as ``DeviceProfile`` assumes.

    ``link``: with the head; ``links``: with others. Its own interface is as fast as its best link.
    """
    known = [x for x in (*([link] if link else ()), *links) if x.bytes_per_s or x.latency_s]
    best = max((x.bytes_per_s for x in known), default=0.0)
    soonest = (link and link.latency_s) or min(
        (x.latency_s for x in known if x.latency_s), default=0.0
    )
    plain = DeviceProfile(DeviceId(device), facts.flops_per_s)
    return DeviceProfile(
        id=plain.id,
        flops_per_s=facts.flops_per_s,
        overhead_s=facts.overhead_s or plain.overhead_s,
        bandwidth_bytes_per_s=best or plain.bandwidth_bytes_per_s,
        latency_s=soonest or plain.latency_s,
        memory_bytes=facts.memory_bytes,
        numeric_class=facts.engine,
        computes=facts.computes,
        memory_bytes_per_s=facts.memory_bytes_per_s,
        rates=tuple(facts.rates),
        kernel_s=facts.kernel_s,
        host=host,
        message_s=facts.message_s or plain.message_s,
        byte_s=facts.byte_s or plain.byte_s,
        model=_model(facts),
        links=tuple(
            {
                x.peer: PairLink(DeviceId(x.peer), x.bytes_per_s, x.latency_s)
                for x in reversed(known)
            }.values()
        ),
    )


def _model(facts: Facts) -> str:
    """All that a device says of its hardware and of what it may use of it."""
    if not facts.processor:
        return ""
    granted = f"{facts.cores} cores, quota {facts.cpu_quota:.3f}, {facts.threads} threads"
    return f"{facts.processor}, {facts.architecture}, {granted}"


def slowed(
    profiles: Sequence[DeviceProfile], slowdowns: Mapping[str, float]
) -> list[DeviceProfile]:
    """The same, where tasks take so many times longer now than by the profiles given.

    After ``with_head``: slowdowns were measured against profiles where equals are equal, and would
    else count a difference twice.
    """
    return [_slowed(p, slowdowns.get(p.id, 1.0)) for p in profiles]


def _slowed(p: DeviceProfile, slowdown: float) -> DeviceProfile:
    """Messages are its processor's work, too: who is hot, or has another job, is as slow at these.
    Who seems faster is faster than others, maybe because those are slow."""
    slower = max(1.0, slowdown)
    return replace(
        p,
        flops_per_s=p.flops_per_s / slowdown,
        memory_bytes_per_s=p.memory_bytes_per_s / slowdown,
        rates=tuple(rate / slowdown for rate in p.rates),
        kernel_s=p.kernel_s * slowdown,
        overhead_s=p.overhead_s * slower,
        message_s=p.message_s * slower,
        byte_s=p.byte_s * slower,
    )


def with_head(found: Sequence[DeviceProfile], head: str, host: str = "") -> list[DeviceProfile]:
    """What to plan with: devices that measured alike as equals, and the head.

    The head has no engine, and its processor is that of the device on its host; of the quickest
    device, where none is. Its link is as good as the best one that was measured. Of pairs is kept
    what their ends do not tell.
    """
    devices = alike(found)
    near = [p for p in devices if host and p.host == host] or devices
    like = min(near, key=lambda p: (p.message_s, p.id))
    end = DeviceProfile(
        DeviceId(head),
        0.0,
        bandwidth_bytes_per_s=max(p.bandwidth_bytes_per_s for p in devices),
        latency_s=min(p.latency_s for p in devices),
        computes=False,
        host=host,
        message_s=like.message_s * HEAD_MESSAGE,
        byte_s=like.byte_s * HEAD_BYTE,
        request_s=like.message_s * REQUEST_MESSAGES,
        report_s=like.message_s * REPORT_MESSAGES,
    )
    return apart_links([*devices, end])


def within(
    profiles: Sequence[DeviceProfile], granted: Mapping[str, int] | int | None
) -> list[DeviceProfile]:
    """The same, within the bytes that the user grants to each, or to all alike; 0: not used.

    Raises ``InvalidInput`` for a device that does not compute, ``NotEnoughMemory`` where 0 is all
    that devices get.
    """
    able = sorted(p.id for p in profiles if p.computes)
    each = granted if isinstance(granted, Mapping) else dict.fromkeys(able, granted)
    unknown = sorted(set(each) - set(able))
    if unknown:
        raise InvalidInput(
            f"memory is granted for {unknown[0]!r}, which does not compute in this cluster",
            hint=f"devices that compute are {able}",
        )
    if able and all(each.get(name) == 0 for name in able):
        raise NotEnoughMemory(
            f"memory=0 is granted to every device that computes ({', '.join(able)})",
            hint="grant at least one of them memory; 0 means that a device is not used",
        )
    return [_within(p, each.get(p.id)) for p in profiles]


def _within(p: DeviceProfile, granted: int | None) -> DeviceProfile:
    if granted is None or not p.computes:
        return p
    if granted == 0:
        return replace(p, computes=False)
    return replace(p, memory_bytes=min(granted, p.memory_bytes or granted))
