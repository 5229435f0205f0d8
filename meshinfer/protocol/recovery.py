"""What the coordinator and devices tell each other when tasks of an attempt change hands."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshinfer import limits
from meshinfer.protocol.records import Assignment, Count, Message, Name, Place, Word

Places = Annotated[tuple[Place, ...], Meta(max_length=limits.PLAN_TASKS)]


class Assign(Message, frozen=True):
    """More devices take tasks of this attempt: ``assigned`` as said so far, and more. Whoever holds
    inputs of such a task sends them there too. ``head`` as in ``Start``. ``asked``: tasks whose
    device was lost; the answer is ``Lacks``, if there are any."""

    request: Name
    attempt: Count
    deployment: Count
    assigned: Assignment
    head: Word = ""
    asked: Places = ()


class NotKept(Message, frozen=True):
    """What a task needs that was assigned again is not here any more, or the request's inputs are
    not: start a new attempt."""

    request: Name
    attempt: Count


class Lacks(Message, frozen=True):
    """Of the tasks ``asked`` for, those of which tasks on this device still await a piece."""

    request: Name
    attempt: Count
    asked: Places
    lacked: Places = ()
