"""Telling all that hold something of a request that it is over."""

from __future__ import annotations

from collections.abc import Iterable

from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Effect, Plane, Send
from meshinfer.scheduler.heads import Heads
from meshinfer.scheduler.membership import Membership


def release(
    members: Membership, heads: Heads, message: m.Release, names: Iterable[str] = ()
) -> list[Effect]:
    """To those that took part, and to the head, which may hold the inputs."""
    fed = message.turn > 1 or not heads.stands(message.client)  # maybe in the turn before it stood
    head = members.head if fed else None
    at = {*names, *(() if head is None else (head.name,))}
    here = [members.devices[name].peer for name in sorted(at) if name in members.devices]
    return [Send(Plane.CONTROL, peer, message) for peer in here]
