"""When links were measured, and when their turn comes again: soon while they are young.

A device that has just joined may be busy booting, and what else it does makes its links seem slow.
Real transfers tell of links that are used; who is left out for such a figure has none to tell.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.membership import Device, Membership

Pair = tuple[str, str]
Known = Mapping[Pair, m.Link]


@dataclass(slots=True)
class Ages:
    """Mutable: owned by the coordinator's core. ``_asked``: of each pair when it was, and how
    often, the longest ago first."""

    _asked: dict[Pair, tuple[float, int]] = field(default_factory=dict)

    def asked(self, pair: Pair, now: float, *, first: bool) -> None:
        """A link is being measured; ``first``: for the first time since both ends are there."""
        _, times = self._asked.pop(pair, (now, 0))
        self._asked[pair] = (now, 1 if first else times + 1)

    def next(
        self, members: Membership, now: float, free: Collection[str] | None
    ) -> tuple[Device, Device] | None:
        """Of links whose turn has come, the one that was measured the longest ago. ``free``: what
        is measured is of these devices and the head, since requests run; None: it may be any."""
        head, devices = members.head, members.devices
        for pair in [p for p in self._asked if p[0] not in devices or p[1] not in devices]:
            del self._asked[pair]
        if head is None or not self._asked:
            return None
        many = len(self._asked) > limits.LINKED_DEVICES
        last, _ = next(reversed(self._asked.values()))
        if many and now < last + limits.LINK_AGAIN_S:
            return None
        for (name, peer), (at, times) in self._asked.items():
            wait_s = limits.LINK_YOUNG_S * 2.0 ** min(times - 1, limits.LINK_DOUBLINGS)
            due = now - at > min(wait_s, limits.LINK_AGE_S)
            may = free is None or {name, peer} <= {*free, head.name}
            if due and may and all(devices[each].state(now) == "ready" for each in (name, peer)):
                return devices[name], devices[peer]
        return None


def measured_again(known: m.Link | None, link: m.Link) -> m.Link:
    """What is known of a link now. What is worse than before counts half: it may have become slow,
    or something was in the way for a moment. What came to nothing does not count."""
    if known is None or not known.bytes_per_s:
        return link
    if not link.bytes_per_s:
        return known
    rate, latency_s = link.bytes_per_s, link.latency_s
    if rate < known.bytes_per_s:
        rate = (rate + known.bytes_per_s) / 2
    if latency_s > known.latency_s:
        latency_s = (latency_s + known.latency_s) / 2
    return m.Link(peer=link.peer, bytes_per_s=rate, latency_s=latency_s)


def known_links(members: Membership, names: Collection[str]) -> dict[Pair, m.Link]:
    """What a plan on these devices is made by."""
    head, found = members.head, dict[Pair, m.Link]()
    for device in map(members.devices.__getitem__, names):
        found |= {(device.name, peer): link for peer, link in device.links.items()}
        way = None if head is None else members.link(device.name)
        if head is not None and way is not None:
            found[device.name, head.name] = way
    return found


def among(pair: Pair, names: Container[str]) -> bool:
    """Whether a link is between two of these devices."""
    return all(name in names for name in pair)


def bettered(before: Known, after: Known, names: Collection[str]) -> bool:
    """Whether any link of these devices is so much better than it was that a plan may be, too."""
    ours = (pair for pair in before if not set(names).isdisjoint(pair))
    return any(_better(before[pair], after[pair]) for pair in ours if pair in after)


def _better(before: m.Link, after: m.Link) -> bool:
    times = limits.LINK_DEVIATION
    sooner = before.latency_s - after.latency_s > limits.LINK_LATENCY_S
    sooner = sooner and before.latency_s > times * after.latency_s
    return sooner or 0.0 < before.bytes_per_s * times < after.bytes_per_s
