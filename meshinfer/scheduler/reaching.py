"""Members that do not reach each other, as one of them says: there is another way, or none now.

Only where the two have something to send each other: in a plan, or in an attempt of a client's.
"""

from __future__ import annotations

from meshinfer.protocol import messages as m
from meshinfer.scheduler.answering import Answering
from meshinfer.scheduler.catalogue import Catalogue
from meshinfer.scheduler.deploying import Deploying
from meshinfer.scheduler.detours import detour
from meshinfer.scheduler.events import Effect
from meshinfer.scheduler.heads import Heads
from meshinfer.scheduler.membership import Membership


class Reaching:
    """Owned by the coordinator's core; has no state of its own."""

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

    def stalled(self, peer: str, message: m.Stalled) -> list[Effect]:
        """A peer is late to acknowledge what another sends: by the head, either way."""
        client = self._heads.among(peer, message.peer)
        if client is None:
            both = self._share_plan(peer, message.peer)
            return detour(self._members, peer, message) if both else []
        other = message.peer if client == peer else peer
        there = self._members.by_peer(other) is not None  # else it is late for good
        there = there and self._answering.hearing.share_attempt(client, other)
        return self._heads.refuse(client) if there else []

    def _share_plan(self, *peers: str) -> bool:
        """Whether a plan has them all."""
        plans = (made.members.values() for made in self._catalogue.deployments.values())
        return any(set(peers) <= set(members) for members in plans)

    def unreachable(self, peer: str, message: m.Unreachable, now: float) -> list[Effect]:
        """A device does not get what another sends: plan without it for a while. Where one end is a
        client, it goes by the head instead."""
        if not self._answering.hearing.unreachable(peer, message):
            return []
        client = self._heads.among(peer, message.peer)
        if client is not None:
            return self._heads.refuse(client)
        device, lost = self._members.by_peer(peer), self._members.by_peer(message.peer)
        assert device is not None
        if lost is None or lost.hello.facts.head:
            lost = device  # a piece for the head, or for one that has left: it is the sender's link
        fields = {**lost.ids, "heard_by": device.name}
        lost.exclude(f"{device.name} does not reach it", now)
        note = self._members.faults.note("warning", "a device cannot be reached", fields)
        return [note, *self._deploying.out_of_service(lost.name, now)]
