"""Members that do not reach each other, as one of them says: there is another way, or none now.

Only where the two have something to send each other: in a plan, or in an attempt of a client's. One
device's word against another excludes nobody: either may lie.
"""

from __future__ import annotations

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.answering import Answering
from meshinfer.scheduler.catalogue import Catalogue
from meshinfer.scheduler.deploying import Deploying
from meshinfer.scheduler.detours import detour
from meshinfer.scheduler.events import Effect
from meshinfer.scheduler.heads import Heads
from meshinfer.scheduler.membership import Device, Membership

_Pair = tuple[str, str]


class Reaching:
    """Mutable: owned by the coordinator's core. ``_said``: which device said that it does not reach
    which other, of late, by their names; ``_parted``: pairs told to go by the head, or no
    more. Both with when that was last."""

    def __init__(
        self,
        members: Membership,
        catalogue: Catalogue,
        heads: Heads,
        answering: Answering,
        deploying: Deploying,
    ) -> None:
        self._members, self._catalogue, self._heads = members, catalogue, heads
        self._answering, self._deploying = answering, deploying
        self._said: dict[_Pair, float] = {}
        self._parted: dict[_Pair, float] = {}

    def stalled(self, peer: str, message: m.Stalled, now: float) -> list[Effect]:
        """A peer is late to acknowledge what another sends: by the head, either way."""
        client = self._heads.among(peer, message.peer)
        if client is None:
            # Which is over whether or not the plan is still there, else they are apart for good.
            heed = message.over or self._share_plan(peer, message.peer)
            return self._detour(peer, message, now) if heed else []
        other = message.peer if client == peer else peer
        there = self._members.by_peer(other) is not None  # else it is late for good
        there = there and self._answering.hearing.share_attempt(client, other)
        return self._heads.refuse(client, now) if there else []

    def _detour(self, peer: str, message: m.Stalled, now: float) -> list[Effect]:
        effects = detour(self._members, peer, message)
        one, other = self._members.by_peer(peer), self._members.by_peer(message.peer)
        if effects and one is not None and other is not None:
            self._parted = {**_of_late(self._parted, now), _pair(one, other): now}
        return effects

    def _share_plan(self, *peers: str) -> bool:
        """Whether a plan has them all."""
        plans = (made.members.values() for made in self._catalogue.deployments.values())
        return any(set(peers) <= set(members) for members in plans)

    def unreachable(self, peer: str, message: m.Unreachable, now: float) -> list[Effect]:
        """A device does not get what another sends. Where one end is a client, it goes by the head
        instead; where it is the head, which is the coordinator's own, plan without the other one.
        """
        if not self._answering.hearing.unreachable(peer, message):
            return []
        client = self._heads.among(peer, message.peer)
        if client is not None:
            return self._heads.refuse(client, now)
        device, lost = self._members.by_peer(peer), self._members.by_peer(message.peer)
        assert device is not None
        if lost is None or lost.hello.facts.head:
            lost = device  # a piece for the head, or for one that has left: it is the sender's link
        out: Device | None = lost
        why = f"{device.name} does not reach it"
        if device is not lost and not device.hello.facts.head:
            out, why = self._word_against(device, lost, now)
        fields = {**lost.ids, "heard_by": device.name, "excluded": "" if out is None else out.name}
        note = self._members.faults.note("warning", "a device cannot be reached", fields)
        if out is None:
            return [note, *self._detour(peer, m.Stalled(peer=message.peer), now)]
        out.exclude(why, now)
        return [note, *self._deploying.out_of_service(out.name, now)]

    def _word_against(self, by: Device, of: Device, now: float) -> tuple[Device | None, str]:
        """Who gets no work for a while, and why: whom another has named too; else who names a
        second one, or one that it was told to go to by the head. A liar could else have all others
        out, one in each attempt, and serve alone."""
        said = self._said = _of_late(self._said, now)
        others = {who for who, whom in said if whom == of.name} - {by.name}
        named = {whom for who, whom in said if who == by.name} | {of.name}
        said[by.name, of.name] = now
        if others:
            return of, f"{' and '.join(sorted({*others, by.name}))} do not reach it"
        if len(named) > 1:
            return by, f"it reaches none of {', '.join(sorted(named))}, as it says"
        if _pair(by, of) in self._members.apart.keys() | _of_late(self._parted, now).keys():
            return by, f"it does not reach {of.name}, as it says, by the head either"
        return None, ""


def _pair(one: Device, other: Device) -> _Pair:
    return (min(one.name, other.name), max(one.name, other.name))


def _of_late(said: dict[_Pair, float], now: float) -> dict[_Pair, float]:
    return {pair: at for pair, at in said.items() if now - at <= limits.STRIKES_WITHIN_S}
