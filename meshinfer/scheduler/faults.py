"""What the coordinator's log says of faults and of requests: each recovery names its fault.

A fault gets an id as it happens (``cause``); what is done because of it carries that id, so that a
search for one id in a log finds the loss of a device and every request that it set back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Effect, Note, Send
from meshinfer.scheduler.request import Request


class Faults:
    """Mutable: owned by the coordinator's core. ``incarnation``: makes ids of restarts differ.

    ``_fresh`` are the faults of the event that is being handled; ``_causes`` those that each
    request met, first to last, until its reply goes out (late, where it is written down first);
    ``_latest`` the latest of each device, by its name.
    """

    def __init__(self, incarnation: str = "0") -> None:
        self._incarnation = incarnation
        self._count = 0
        self._fresh: list[str] = []
        self._causes: OrderedDict[str, dict[str, None]] = OrderedDict()
        self._latest: OrderedDict[str, str] = OrderedDict()

    def note(self, level: str, text: str, fields: Mapping[str, object]) -> Note:
        """A fault, to be logged with an id of its own."""
        self._count += 1
        cause = f"{self._incarnation}-{self._count}"
        self._fresh.append(cause)
        if "request" in fields:
            self._met(str(fields["request"]))
        if "device" in fields:
            self._latest[str(fields["device"])] = cause
            while len(self._latest) > limits.DEVICES:
                self._latest.popitem(last=False)
        return Note(level, text, {**fields, "cause": cause})

    def behind(self, device: str) -> dict[str, object]:
        """The latest fault of a device, as a field: what is learnt of it later belongs there."""
        cause = self._latest.get(device)
        return {"cause": cause} if cause else {}

    def told(self, effects: Iterable[Effect], open_: Mapping[str, Request]) -> list[Effect]:
        """Notes on what an event's effects mean to requests, of which ``open_`` are open; ends the
        event."""
        if self._fresh:
            for request in open_.values():
                if request.waiting and request.tried:
                    self._met(request.id)
        notes: list[Effect] = []
        seen: set[tuple[str, int]] = set()
        for effect in effects:
            if not isinstance(effect, Send):
                continue
            match effect.message:
                case m.Start(again=False) as start if (start.request, start.attempt) not in seen:
                    seen.add((start.request, start.attempt))
                    if start.request in open_ and len(open_[start.request].tried) > 1:
                        self._met(start.request)
                    notes.append(self._begun(start))
                case m.Assign() as word if self._fresh and (word.request, word.attempt) not in seen:
                    seen.add((word.request, word.attempt))
                    self._met(word.request)
                    fields = {"request": word.request, "attempt": word.attempt}
                    text = "tasks of a lost device go to others"
                    notes.append(Note("info", text, {**fields, **self._last(word.request)}))
                case m.Reply() as reply:
                    notes.append(self._ended(reply))
                case _:
                    pass
        self._fresh.clear()
        return notes

    def _met(self, request: str) -> None:
        if self._fresh:
            self._causes.setdefault(request, {}).update(dict.fromkeys(self._fresh))
            self._causes.move_to_end(request)
            while len(self._causes) > limits.CAUSES_KEPT:  # nobody waited for them to the end
                self._causes.popitem(last=False)

    def _last(self, request: str) -> dict[str, object]:
        """The latest fault that a request met, as a field; none where it met none."""
        met = self._causes.get(request)
        return {"cause": next(reversed(met))} if met else {}

    def _begun(self, start: m.Start) -> Note:
        fields = {
            "request": start.request,
            "attempt": start.attempt,
            "deployment": start.deployment,
        }
        cause = self._last(start.request)
        if cause:
            return Note("info", "request begins again", {**fields, **cause})
        return Note("debug", "request begins", fields)

    def _ended(self, reply: m.Reply) -> Note:
        if reply.failure is not None and reply.attempts:
            self._met(reply.request)  # what has just happened ended it
        met = self._causes.pop(reply.request, {})
        fields: dict[str, object] = {"request": reply.request, "attempts": reply.attempts}
        fields |= {"cause": ",".join(met)} if met else {}
        if reply.failure is None:
            fields["seconds"] = round(reply.total_s, 6)
            return Note("info" if met else "debug", "request answered", fields)
        fields |= {"error": reply.failure.error, "why": reply.failure.message}
        if not reply.attempts and not reply.total_s:
            return Note("debug", "request refused", fields)  # overload must not flood the log
        return Note("warning", "request failed", fields)


def of_end(ended: m.Ended, device: str) -> dict[str, object]:
    """How a process ended, as a log says it."""
    fields: dict[str, object] = {"device": device, "why": ended.cause}
    if ended.request:
        fields |= {"request": ended.request, "attempt": ended.attempt, "task": str(ended.place)}
    return fields
