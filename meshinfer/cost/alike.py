"""Devices that measured alike are treated as equal, so that noise does not give them other shares.

Unequal shares of equal devices cost waiting in every stage, and plans that change with each
measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median

from meshinfer.cost.profile import DeviceProfile, PairLink
from meshinfer.identity import DeviceId

SPEED_NOISE = 0.08
"""How far a measured speed may be from the true one, either way: equal devices of the lab differed
by up to this on a busy machine."""
SAME_NOISE = 0.16
"""The same of devices of one model, which what else ran meanwhile made slower: the lab's first
device, where a coordinator starts as well, measured a quarter below its equals. That one of them
really is slower, a request's tasks tell (``scheduler.balance``)."""
RATE_NOISE = 0.16
"""The same of a speed of one kind of operator, whose probe is shorter."""
LINK_NOISE = 0.25
"""The same of a link, whose measurement is short and meets what else is sent."""
LATENCY_NOISE_S = 0.002
"""By how much a link's latency may have been measured too long, on a device that has other work."""


def alike(profiles: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    """The same devices in the same order; those that differ by no more than noise get common
    figures.

    A group reaches from its slowest device up to what noise explains: their speeds become the
    medians, kind by kind where noise explains the difference, and their links the best of theirs,
    since what disturbs a measurement of a link only makes it worse. Of devices of one model noise
    explains more, and all their kinds become common. Devices of other numeric classes, or that
    cannot compute, stay apart.
    """
    found = {p.id: p for p in profiles}
    models = dict.fromkeys((p.numeric_class, p.model) for p in profiles if p.able and p.model)
    for model in models:
        same = [p for p in profiles if p.able and (p.numeric_class, p.model) == model]
        for group in _groups(same, lambda p: p.flops_per_s, SAME_NOISE):
            found.update((p.id, p) for p in _of_one_speed(group, one_model=True))
    classes = dict.fromkeys(p.numeric_class for p in profiles if p.able)
    for name in classes:
        same = [found[p.id] for p in profiles if p.able and p.numeric_class == name]
        for group in _groups(same, lambda p: p.flops_per_s, SPEED_NOISE):
            found.update((p.id, p) for p in _of_one_speed(group))
    able = [found[p.id] for p in profiles if p.able]
    for group in _groups(able, lambda p: p.bandwidth_bytes_per_s, LINK_NOISE):
        best = max(p.bandwidth_bytes_per_s for p in group)
        soonest = min(p.latency_s for p in group)
        for p in group:
            latency_s = soonest if p.latency_s <= soonest + LATENCY_NOISE_S else p.latency_s
            found[p.id] = replace(p, bandwidth_bytes_per_s=best, latency_s=latency_s)
    return [found[p.id] for p in profiles]


def apart_links(profiles: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    """The same devices, each with those pairs only whose link differs from what both ends suggest
    by more than noise, whichever end measured it: by the better of two measurements.
    """
    by_id = {p.id: p for p in profiles}
    kept: dict[DeviceId, list[PairLink]] = {p.id: [] for p in profiles}
    for i, a in enumerate(profiles):
        for b in profiles[i + 1 :]:
            ways = [w for w in (a.link_to(b), b.link_to(a)) if w is not None]
            if not ways or a.beside(b):
                continue
            suggested = min(a.bandwidth_bytes_per_s, b.bandwidth_bytes_per_s)
            rate = max(w.bytes_per_s for w in ways)
            rate = rate if rate and _apart(rate, suggested, LINK_NOISE) else 0.0
            late = max(a.latency_s, b.latency_s)
            latency_s = min((w.latency_s for w in ways if w.latency_s), default=late)
            latency_s = latency_s if abs(latency_s - late) > LATENCY_NOISE_S else 0.0
            if rate or latency_s:
                kept[a.id].append(PairLink(b.id, rate, latency_s))
                kept[b.id].append(PairLink(a.id, rate, latency_s))
    return [replace(by_id[name], links=tuple(links)) for name, links in kept.items()]


def _groups(
    profiles: Sequence[DeviceProfile], figure: Callable[[DeviceProfile], float], noise: float
) -> Iterator[list[DeviceProfile]]:
    group: list[DeviceProfile] = []
    for p in sorted(profiles, key=lambda p: (figure(p), p.id)):
        if group and _apart(figure(group[0]), figure(p), noise):
            yield group
            group = []
        group.append(p)
    if group:
        yield group


def _apart(low: float, high: float, noise: float) -> bool:
    """Whether noise, either way, does not explain the difference."""
    return high * (1 - noise) > low * (1 + noise)


def _of_one_speed(
    group: Sequence[DeviceProfile], *, one_model: bool = False
) -> list[DeviceProfile]:
    kinds = range(max(len(p.rates) for p in group))
    by_kind = [[p.rates[k] for p in group if k < len(p.rates)] for k in kinds]
    memory = [p.memory_bytes_per_s for p in group]
    return [
        replace(
            p,
            flops_per_s=_middle([q.flops_per_s for q in group]),
            overhead_s=_middle([q.overhead_s for q in group]),
            memory_bytes_per_s=_common(memory, p.memory_bytes_per_s, one_model),
            rates=tuple(
                _common(rates, p.rates[k] if k < len(p.rates) else 0.0, one_model)
                for k, rates in enumerate(by_kind)
            ),
            kernel_s=_middle([q.kernel_s for q in group]),
            message_s=_middle([q.message_s for q in group]),
            byte_s=_middle([q.byte_s for q in group]),
        )
        for p in group
    ]


def _common(values: Sequence[float], own: float, one_model: bool) -> float:
    """The median of speeds that noise explains; else a device's own, if it is known."""
    known = [v for v in values if v > 0]
    apart = known and not one_model and _apart(min(known), max(known), RATE_NOISE)
    return own if apart and own > 0 else _middle(values)


def _middle(values: Sequence[float]) -> float:
    """The median of those that are known, 0 where none is."""
    known = [v for v in values if v > 0]
    return median(known) if known else 0.0
