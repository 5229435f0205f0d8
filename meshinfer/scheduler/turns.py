"""Whose plan is made when: first of all, what requests wait for.

A model that nobody asks lately, and that has a plan, has time. To plan and to prepare takes devices
from the requests of others, so it waits for its turn: as after a loss, when all are planned anew.
"""

from __future__ import annotations

from collections.abc import Collection

from meshinfer import limits
from meshinfer.scheduler.catalogue import Catalogue, Deployment, Model, Phase
from meshinfer.scheduler.membership import Membership


def rests(model: Model, asked: Collection[int], now: float) -> bool:
    """Whether a model has time. ``asked``: the keys of those with open requests."""
    called = model.call is not None or model.key in asked
    return not called and now > model.used_at + limits.UNASKED_S


def waits(
    serving: Deployment | None, catalogue: Catalogue, members: Membership, now: float
) -> bool:
    """Whether it is not the turn of a model that has time: a plan that is needed is made, or
    devices prepare for one. What keeps a device that wants to leave does not wait."""
    here = members.devices
    if serving is None or any(n in here and here[n].draining for n in serving.members):
        return False
    return any(_under_way(made, now) for made in catalogue.deployments.values())


def is_planning(made: Deployment) -> bool:
    return made.phase is Phase.PLANNING


def is_search_beside(made: Deployment) -> bool:
    """Whether it is only looked for, while another serves, and may be dropped."""
    return is_planning(made) and made.share < 1.0


def _under_way(made: Deployment, now: float) -> bool:
    if made.phase is Phase.READY:  # those that stand by come last
        return not made.spares.prepared and now < made.ready_at + limits.TURN_S
    slow = made.phase is Phase.INSTALLING and now >= made.since + limits.TURN_S
    return not slow and not is_search_beside(made)
