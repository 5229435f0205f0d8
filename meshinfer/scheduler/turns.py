"""Whose plan is made when: first of all, what requests wait for.

A model that nobody asks lately has time. To plan and to prepare takes devices from the requests of
others, so it waits for its turn until all is prepared: as after a loss, when all are planned anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from meshinfer import limits
from meshinfer.scheduler.catalogue import Deployment, Model, Phase


def rests(model: Model, asked: Collection[int], now: float) -> bool:
    """Whether a model has time. ``asked``: the keys of those with open requests."""
    called = model.call is not None or model.key in asked
    return not called and now > model.used_at + limits.UNASKED_S


def preparing(deployments: Iterable[Deployment], now: float) -> bool:
    """Whether a plan that is needed is made, or devices prepare for one."""
    return any(_under_way(made, now) for made in deployments)


def is_planning(made: Deployment) -> bool:
    return made.phase is Phase.PLANNING


def is_search_beside(made: Deployment) -> bool:
    """Whether it is only looked for, while another serves, and may be dropped."""
    return is_planning(made) and made.share < 1.0


def _under_way(made: Deployment, now: float) -> bool:
    if made.phase is Phase.READY:  # those that stand by come last
        return not made.spares.prepared and now < made.ready_at + limits.UNASKED_S
    return not is_search_beside(made)
