"""What devices and the coordinator tell each other of results that may be wrong."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshinfer import limits
from meshinfer.protocol.records import Count, Message, Name, Peer, Place, Rate, Tensor, Text, Word


class Check(Message, frozen=True):
    """A request is answered, and its task ``place`` is to be computed again, by the device at
    ``by``: whoever holds what the task was given sends that there, and ``of``, whose task it was,
    what it had made. What is held until the release serves; nobody is told before. ``head``: the
    client that gave the inputs, where that is the source itself; ``makers``: which device made
    what the task was given, as far as it is known. From nobody else anything counts."""

    request: Name
    attempt: Count
    deployment: Count
    place: Place
    of: Name
    by: Peer
    head: Word = ""
    makers: Annotated[tuple[tuple[Place, Name], ...], Meta(max_length=limits.LISTED)] = ()


class Sample(Message, frozen=True):
    """For who computes a task again: piece ``slot`` of its inputs, or, if ``made``, the output of
    this number as the task's device made it. Raw bytes behind; ``id`` is acknowledged."""

    id: Count
    request: Name
    attempt: Count
    deployment: Count
    place: Place
    slot: Count
    tensor: Tensor
    made: bool = False


class Checked(Message, frozen=True):
    """How far both results are apart. ``error``: max|a - b| over the largest value; ``spread``: the
    same of the 2-norms; ``unequal``: indices, conditions or other whole numbers differ."""

    request: Name
    attempt: Count
    place: Place
    error: Rate
    spread: Rate
    unequal: bool = False


class Doubtful(Message, frozen=True):
    """``peer`` sent a piece that task ``place`` made, and it holds values that are not finite; or
    it is of another kind than was asked for, as ``why`` says."""

    request: Name
    attempt: Count
    place: Place
    peer: Name
    why: Text = ""
