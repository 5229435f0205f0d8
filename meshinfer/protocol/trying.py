"""What the coordinator and a device that the plan leaves out tell each other of its speed."""

from __future__ import annotations

from meshinfer.protocol.records import Count, Message, Place, Seconds


class Try(Message, frozen=True):
    """Run a task that you have prepared for another, on inputs that you make up, and say what it
    took, if you have nothing else to do."""

    deployment: Count
    place: Place


class Tried(Message, frozen=True):
    """What it took, 0 where it was not run; also of a task that was done in vain, unasked."""

    deployment: Count
    place: Place
    compute_s: Seconds = 0.0
