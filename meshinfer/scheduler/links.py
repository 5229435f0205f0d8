"""Links, measured one at a time while nothing runs: who asks for it, and who does it.

Real transfers tell whether a link still is what it was; if not, it is measured again, busy or not.
The coordinator asks a device to measure its link to another; that one sends short echoes and then
a long one over the bulk plane, so that all is in it that a transfer goes through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.ages import Ages, among, measured_again
from meshinfer.scheduler.events import Connect, Effect, Plane, Send
from meshinfer.scheduler.membership import Device, Membership
from meshinfer.scheduler.telling import told

_WATCHED = 1 << 32
"""Echoes behind real pieces have numbers above this one, those of a measurement below."""
_ANY = 1e12
"""The rate of a link of which a transfer tells no upper bound, in bytes/s."""
_TOLD_EVERY_S = 2.0


@dataclass(slots=True)
class _Watched:
    """Transfers to one peer: the next sample and the one under way (``number``, 0 for none); the
    last samples as (least, most) bytes/s; what the coordinator was told, and when."""

    next_at: float
    number: int = 0
    nbytes: int = 0
    since: float = 0.0
    samples: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=limits.LINK_SAMPLES)
    )
    told_at: float = -limits.LINK_AGE_S
    least: float = 0.0
    most: float = _ANY


@dataclass(slots=True)
class _Doubt:
    """A link that transfers disagree with: ``open`` until it is measured, not before ``next_at``;
    ``asked``: it is being measured; ``in_vain``: how often in turn it was found as it was."""

    next_at: float
    open: bool = False
    asked: bool = False
    in_vain: int = 0


@dataclass(slots=True)
class LinkRounds:
    """The coordinator's half. Mutable: owned by its core. ``asked``: the one under way, and since
    when. ``_look_at``, ``_look_busy_at``: when to look what is next, the second while requests run.
    """

    asked: tuple[str, str, float] | None = None
    _look_at: float = 0.0
    _look_busy_at: float = 0.0
    _ages: Ages = field(default_factory=Ages)
    _doubted: dict[tuple[str, str], _Doubt] = field(default_factory=dict)

    def next(
        self,
        members: Membership,
        now: float,
        *,
        busy: bool,
        free: Callable[[], Collection[str]] = tuple,
    ) -> list[Effect]:
        """Ask for the next link, if none is being measured and nothing runs; of devices that are
        ``free`` of all that runs, also then."""
        if self.asked is not None:
            name, peer, since = self.asked
            there = name in members.devices and peer in members.devices
            if there and now - since < limits.LINK_ASKED_S:
                return []
            doubt = self._doubted.get((name, peer))
            if doubt is not None and doubt.asked:
                doubt.asked, doubt.next_at = False, now + limits.LINK_DOUBT_S
            elif there:  # unknown it stays, rather than being asked for ever
                members.devices[name].links.setdefault(peer, m.Link(peer=peer))
            self.asked = None
        self._starved(members, now)
        pair = self._doubtful(members, now) if self._doubted else None
        if pair is None and now < (self._look_busy_at if busy else self._look_at):
            return []
        first = None if pair or busy else _missing(members, now)
        pair = pair or first or self._ages.next(members, now, free() if busy else None)
        if pair is None:  # of many devices there are many pairs
            self._look_busy_at = now + limits.HEARTBEAT_S
            self._look_at = self._look_at if busy else self._look_busy_at
            return []
        device, other = pair
        self.asked = (device.name, other.name, now)
        if device is not members.head:
            self._ages.asked((device.name, other.name), now, first=first is not None)
        return [Send(Plane.CONTROL, device.peer, m.MeasureLink(peer=other.bulk))]

    def _starved(self, members: Membership, now: float) -> None:
        """Devices to which messages come late: their links with the head are in doubt. What a
        client beside it sends is not watched as transfers between devices are."""
        names, head = members.presence.starved, members.head
        members.presence.starved = set()
        if head is None:
            return
        for name in sorted(names & members.devices.keys()):
            if name != head.name:
                self._doubted.setdefault((name, head.name), _Doubt(now)).open = True

    def _doubtful(self, members: Membership, now: float) -> tuple[Device, Device] | None:
        """A pair whose transfers disagree with what is known of it, and whose turn has come."""
        for (name, peer), doubt in list(self._doubted.items()):
            if name not in members.devices or peer not in members.devices:
                del self._doubted[name, peer]
            elif doubt.open and now >= doubt.next_at:
                doubt.open = False
                doubt.asked = True
                return members.devices[name], members.devices[peer]
        return None

    def seen(self, members: Membership, device: Device, word: m.LinkMeasured, now: float) -> None:
        """What real transfers of a device came to: reason to measure, if it is far from what is
        known. Rarer each time that the measurement finds the link as it was."""
        known = device.links.get(word.link.peer)
        if known is None or not known.bytes_per_s or word.link.peer not in members.devices:
            return
        slower = word.link.bytes_per_s * limits.LINK_DEVIATION < known.bytes_per_s
        faster = word.least_bytes_per_s > known.bytes_per_s * limits.LINK_DEVIATION
        if slower or faster:
            doubt = self._doubted.setdefault((device.name, word.link.peer), _Doubt(now))
            doubt.open = True

    def measured(self, members: Membership, device: Device, link: m.Link, now: float = 0.0) -> None:
        """A device tells what its link came to."""
        if self.asked is None or self.asked[:2] != (device.name, link.peer):
            return
        self.asked = None
        doubt = self._doubted.get((device.name, link.peer))
        if doubt is not None and doubt.asked:
            self._checked(members, device, link, doubt, now)
            return
        head, known = members.head, device.links.get(link.peer)
        with_head = head is not None and link.peer == head.name
        if known is not None and with_head:
            known = members.link(device.name)
        device.links[link.peer] = new = measured_again(known, link)
        if head is not None and with_head and known is not None and device.name in head.links:
            head.links[device.name] = structs.replace(new, peer=device.name)
        if known is not None and known != new:
            better = new.bytes_per_s > known.bytes_per_s or new.latency_s < known.latency_s
            members.links_bettered += better

    def _checked(
        self, members: Membership, device: Device, link: m.Link, doubt: _Doubt, now: float
    ) -> None:
        """The answer to a doubt. Transfers and echoes agree that it has changed, or nothing has."""
        before = device.links.get(link.peer)
        doubt.asked = False
        if before is None or not link.bytes_per_s:
            doubt.next_at = now + limits.LINK_DOUBT_S
            return
        ratio = link.bytes_per_s / max(before.bytes_per_s, 1.0)
        changed = max(ratio, 1 / ratio) > limits.LINK_DEVIATION
        doubt.in_vain = 0 if changed else min(doubt.in_vain + 1, limits.REPLAN_DOUBLINGS)
        doubt.next_at = now + limits.LINK_DOUBT_S * 2**doubt.in_vain
        if not changed:
            return
        members.links_bettered += ratio > 1.0
        here = {
            pair: n for pair, n in members.links_changed.items() if among(pair, members.devices)
        }
        ends = (min(device.name, link.peer), max(device.name, link.peer))
        members.links_changed = here | {ends: here.get(ends, 0) + 1}
        device.links[link.peer] = link
        other = members.devices.get(link.peer)
        if other is not None and device.name in other.links:  # what it had measured is no more
            other.links[device.name] = m.Link(
                peer=device.name, bytes_per_s=link.bytes_per_s, latency_s=link.latency_s
            )

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
        return [told(m.LinkMeasured(link=link))]


class LinkWatch:
    """The sender's eye on real transfers. Mutable: owned by a worker's core.

    Now and then an empty echo goes behind a large piece, and comes back when that has arrived: so
    much at least the link carried, and so much at most, if the processors were late.
    """

    def __init__(self) -> None:
        self._peers: dict[str, _Watched] = {}
        self._number = _WATCHED

    def sent(self, peer: str, nbytes: int, now: float) -> list[Effect]:
        """A piece of at least LINK_SAMPLE_BYTES goes out to a peer."""
        watched = self._peers.get(peer)
        if watched is None:
            while len(self._peers) >= limits.DEVICES:  # they come and go
                del self._peers[next(iter(self._peers))]
            watched = self._peers[peer] = _Watched(now)
        if now < watched.next_at or (watched.number and now < watched.since + limits.LINK_ASKED_S):
            return []
        self._number += 1
        watched.next_at = now + limits.LINK_SAMPLE_S
        watched.number, watched.nbytes, watched.since = self._number, nbytes, now
        return [Send(Plane.BULK, peer, m.Echo(id=self._number))]

    def echoed(self, peer: str, number: int, now: float) -> list[Effect]:
        """A piece has arrived. Several in turn must agree, so the best of them counts."""
        watched = self._peers.get(peer)
        if watched is None or number != watched.number:
            return []
        watched.number, took = 0, now - watched.since
        slack = took - limits.LINK_SLACK_S
        most = watched.nbytes / slack if slack > 0 else _ANY
        watched.samples.append((watched.nbytes / max(took, 1e-6), most))
        if len(watched.samples) < limits.LINK_SAMPLES or now < watched.told_at + _TOLD_EVERY_S:
            return []
        least, most = (max(each) for each in zip(*watched.samples, strict=True))
        old = now > watched.told_at + limits.LINK_AGE_S
        same = watched.most <= most * 1.2 and most <= watched.most * 1.2
        if same and least <= watched.least * 1.2 and not old:
            return []
        watched.told_at, watched.least, watched.most = now, least, most
        link = m.Link(peer=peer.rpartition("#")[0], bytes_per_s=most)
        word = m.LinkMeasured(link=link, least_bytes_per_s=least)
        return [told(word)]
