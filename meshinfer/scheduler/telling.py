"""How devices and clients speak to the coordinator: what all say alike, and what of tasks."""

from __future__ import annotations

from collections.abc import Collection

from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Effect, Note, PeerLost, Plane, Send
from meshinfer.scheduler.held import Held
from meshinfer.scheduler.outbox import Unacknowledged

COORDINATOR = "coordinator"
"""Name of the control connection to the coordinator."""


def refusal(who: str, lost: PeerLost) -> m.Failure:
    """Why a connection to the coordinator is given up."""
    if lost.unadmitted:
        message = f"the coordinator does not admit {who}: its key is unknown there or was revoked"
        hint = "join with a token: `meshinfer token`, on the coordinator's machine, makes one"
    else:
        message = f"the coordinator cannot be spoken to: {lost.reason}"
        hint = (
            "check its address; if it was set up anew, join anew with a token (`meshinfer token`)"
        )
    return m.Failure(error="AuthError", message=message, hint=hint)


def told(message: m.AnyMessage) -> Send:
    return Send(Plane.CONTROL, COORDINATOR, message)


def task_failed(name: str, attempt: int, place: m.Place, text: str) -> Send:
    return told(m.TaskFailed(request=name, attempt=attempt, place=place, text=text[:4000]))


def told_done(name: str, request: Held, done: list[m.Done]) -> Send:
    return told(m.TasksDone(request=name, attempt=request.attempt, tasks=tuple(done)))


def told_lacked(asked: m.Assign, awaited: Collection[m.Place]) -> Send:
    """Which of the tasks asked for are still awaited here."""
    lacked = tuple(place for place in asked.asked if place in awaited)
    word = m.Lacks(request=asked.request, attempt=asked.attempt, asked=asked.asked, lacked=lacked)
    return told(word)


def unreachable(lost: Unacknowledged) -> list[Effect]:
    """A peer never acknowledged a message; it is news where it was a piece."""
    piece, fields = lost.message, {"peer": lost.peer}
    if not isinstance(piece, m.Deliver):
        return [Note("warning", "no acknowledgement", fields)]
    ids = {"request": piece.request, "attempt": piece.attempt}
    word = m.Unreachable(request=piece.request, attempt=piece.attempt, peer=lost.peer)
    return [Note("warning", "no acknowledgement", {**fields, **ids}), told(word)]
