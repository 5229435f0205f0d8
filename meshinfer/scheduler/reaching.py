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
from meshinfer.scheduler.request import Try


class Reaching:
    """Mutable: owned by the coordinator's core. ``_said``: which device said, of late, that it does
    not reach which other, by their names, and when it said so first."""

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
        self._said: dict[tuple[str, str], float] = {}

    def stalled(self, peer: str, message: m.Stalled) -> list[Effect]:
        """A peer is late to acknowledge what another sends: by the head, either way."""
        client = self._heads.among(peer, message.peer)
        if client is None:
            # Which is over whether or not the plan is still there, else they are apart for good.
            heed = message.over or self._share_plan(peer, message.peer)
            return detour(self._members, peer, message) if heed else []
        other = message.peer if client == peer else peer
        there = self._members.by_peer(other) is not None  # else it is late for good
        there = there and self._answering.hearing.share_attempt(client, other)
        return self._heads.refuse(client) if there else []

    def _share_plan(self, *peers: str) -> bool:
        """Whether a plan has them all."""
        plans = (made.members.values() for made in self._catalogue.deployments.values())
        return any(set(peers) <= set(members) for members in plans)

    def unreachable(self, peer: str, message: m.Unreachable, now: float) -> list[Effect]:
        """A device does not get what another sends. Where one end is a client, it goes by the head
        instead; where it is the head, which is the coordinator's own, plan without the other one.
        """
        tried = self._answering.hearing.unreachable(peer, message)
        if tried is None:
            return []
        client = self._heads.among(peer, message.peer)
        if client is not None:
            return self._heads.refuse(client)
        device, lost = self._members.by_peer(peer), self._members.by_peer(message.peer)
        assert device is not None
        if lost is None or lost.hello.facts.head:
            lost = device  # a piece for the head, or for one that has left: it is the sender's link
        out: Device | None = lost
        why = f"{device.name} does not reach it"
        if device is not lost and not device.hello.facts.head:
            out, why = self._word_against(device, lost, tried, now)
        fields = {**lost.ids, "heard_by": device.name, "excluded": "" if out is None else out.name}
        note = self._members.faults.note("warning", "a device cannot be reached", fields)
        if out is None:
            return [note, *detour(self._members, peer, m.Stalled(peer=message.peer))]
        out.exclude(why, now)
        return [note, *self._deploying.out_of_service(out.name, now)]

    def _word_against(
        self, by: Device, of: Device, tried: Try, now: float
    ) -> tuple[Device | None, str]:
        """Who gets no work for a while, and why: whom another has named too; else who names a
        second one, or one from which it is kept apart already. A liar could else have all others
        out, one in each attempt, and serve alone."""
        since = now - limits.STRIKES_WITHIN_S
        self._said = {pair: at for pair, at in self._said.items() if at >= since}
        others = {who for who, whom in self._said if whom == of.name} - {by.name}
        named = {whom: at for (who, whom), at in self._said.items() if who == by.name}
        first = self._said.setdefault((by.name, of.name), now)
        if others:
            return of, f"{' and '.join(sorted({*others, by.name}))} do not reach it"
        if named.keys() - {of.name}:
            return by, f"it reaches neither of {', '.join(sorted({*named, of.name}))}, as it says"
        pair = (min(by.name, of.name), max(by.name, of.name))
        if pair in self._members.apart or (named and tried.since >= first):
            return by, f"it does not reach {of.name}, as it says, by the head either"
        return None, ""
