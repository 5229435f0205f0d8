"""Links, measured one at a time while nothing runs: who asks for it, and who does it.

The coordinator asks a device to measure its link to another; that one sends short echoes and then
a long one over the bulk plane, so that all is in it that a transfer goes through.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Connect, Effect, Plane, Send
from meshinfer.scheduler.installing import COORDINATOR
from meshinfer.scheduler.membership import Device, Membership


@dataclass(slots=True)
class LinkRounds:
    """The coordinator's half. Mutable: owned by its core. ``asked``: the one under way, and since
    when. ``_known_at``: when each device's link with the head was last measured.
    """

    asked: tuple[str, str, float] | None = None
    _look_at: float = 0.0
    _known_at: dict[str, float] = field(default_factory=dict)

    def next(self, members: Membership, now: float, *, busy: bool) -> list[Effect]:
        """Ask for the next link, if none is being measured and nothing runs."""
        if self.asked is not None:
            name, peer, since = self.asked
            there = name in members.devices and peer in members.devices
            if there and now - since < limits.LINK_ASKED_S:
                return []
            if there:  # unknown it stays, rather than being asked for ever
                members.devices[name].links[peer] = m.Link(peer=peer)
            self.asked = None
        if busy or now < self._look_at:
            return []
        pair = _missing(members, now) or self._aged(members, now)
        if pair is None:
            self._look_at = now + limits.HEARTBEAT_S  # of many devices there are many pairs
            return []
        device, other = pair
        self.asked = (device.name, other.name, now)
        if other is members.head:
            self._known_at[device.name] = now
        return [Send(Plane.CONTROL, device.peer, m.MeasureLink(peer=other.bulk))]

    def _aged(self, members: Membership, now: float) -> tuple[Device, Device] | None:
        """A device whose link with the head was measured long ago. Heartbeats come often enough
        to notice, so that no timer is needed."""
        head = members.head
        for name in [name for name in self._known_at if name not in members.devices]:
            del self._known_at[name]
        if head is None:
            return None
        for name, since in self._known_at.items():
            device = members.devices[name]
            if now - since > limits.LINK_AGE_S and device.state(now) == "ready":
                return device, head
        return None

    def measured(self, members: Membership, device: Device, link: m.Link) -> None:
        """A device tells what its link came to. What is worse than before counts half: a link may
        have become slow, or something was in the way for a moment."""
        if self.asked is None or self.asked[:2] != (device.name, link.peer):
            return
        self.asked = None
        head = members.head
        if head is not None and link.peer == head.name and device.name in head.links:
            known = members.link(device.name)
            rate = link.bytes_per_s
            if known is not None and rate < known.bytes_per_s:
                rate = (rate + known.bytes_per_s) / 2
            link = m.Link(peer=link.peer, bytes_per_s=rate, latency_s=link.latency_s)
            head.links[device.name] = m.Link(
                peer=device.name, bytes_per_s=rate, latency_s=link.latency_s
            )
        device.links[link.peer] = link

    def next_deadline(self) -> float | None:
        return None if self.asked is None else self.asked[2] + limits.LINK_ASKED_S


def _missing(members: Membership, now: float) -> tuple[Device, Device] | None:
    """A pair of devices whose link is not known: those with the head first; all pairs of few."""
    head = members.head
    if head is None:
        return None
    ready = [d for _, d in sorted(members.devices.items()) if d.state(now) == "ready"]
    others = [d for d in ready if d is not head]
    for device in others:
        if head.name not in device.links:
            return device, head
    if len(others) <= limits.LINKED_DEVICES:
        for i, device in enumerate(others):
            for other in others[i + 1 :]:
                if other.name not in device.links:
                    return device, other
    # Once more, from the other end: as devices join they are busy, which is not the link's fault.
    return next(((head, d) for d in others if d.name not in head.links), None)


class LinkMeter:
    """The measuring device's half: one echo after another. Mutable: owned by its core."""

    def __init__(self) -> None:
        self._peer: m.Peer | None = None
        self._number = 0
        self._sent = self._ends = 0.0
        self._left: list[int] = []
        self._nbytes = 0
        self._fastest_s = 0.0
        self._bytes_per_s = 0.0
        self._was_long = False

    def begin(self, peer: m.Peer, now: float) -> list[Effect]:
        """Measure the link to a peer; what was being measured is dropped."""
        self._peer, self._ends = peer, now + limits.LINK_MEASURE_S
        self._left = [*[0] * limits.LINK_ECHOES, *limits.LINK_BYTES]
        self._fastest_s, self._bytes_per_s, self._was_long = float("inf"), 0.0, False
        return [Connect(peer), *self._echo(now)]

    def echoed(self, peer: str, number: int, now: float) -> list[Effect]:
        """An echo has come back."""
        if self._peer is None or peer != self._peer.id or number != self._number:
            return []
        took = now - self._sent
        if not self._nbytes:
            self._fastest_s = min(self._fastest_s, took)
        else:
            pure_s = max(took - self._fastest_s, took / 8, 1e-6)
            self._bytes_per_s = max(self._bytes_per_s, self._nbytes / pure_s)
            if took > limits.LINK_LONG_S:  # one more, or what was in the way would count; no longer
                self._left = [] if self._was_long else [self._nbytes]
                self._was_long = True
        return self._echo(now)

    def due(self, now: float) -> list[Effect]:
        """Give up where echoes do not come back."""
        if self._peer is None or now < self._ends:
            return []
        return self._end()

    def next_deadline(self) -> float | None:
        return None if self._peer is None else self._ends

    def reset(self) -> None:
        """The coordinator that asked is gone."""
        self._peer = None

    def _echo(self, now: float) -> list[Effect]:
        assert self._peer is not None
        if not self._left:
            return self._end()
        self._nbytes = self._left.pop(0)
        self._number, self._sent = self._number + 1, now
        return [
            Send(
                Plane.BULK, self._peer.id, m.Echo(id=self._number), memoryview(bytes(self._nbytes))
            )
        ]

    def _end(self) -> list[Effect]:
        assert self._peer is not None
        latency_s = self._fastest_s / 2 if self._fastest_s < float("inf") else 0.0
        link = m.Link(peer=self._peer.device, bytes_per_s=self._bytes_per_s, latency_s=latency_s)
        self._peer = None
        return [Send(Plane.CONTROL, COORDINATOR, m.LinkMeasured(link=link))]
