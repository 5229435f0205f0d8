"""Why a client fails a request by itself: nobody answers, its time is over, or as much was refused;
and that it has given one up, said until it is heard.

What a full queue will refuse once more is neither copied nor sent: the one who lacks time would
have to read it. How long, only the coordinator says.
"""

from __future__ import annotations

from collections.abc import Container, Sized

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Effect
from meshinfer.scheduler.load import nbytes_of
from meshinfer.scheduler.telling import told


class Full:
    """What the coordinator said last of its queue: as many requests of this client as were open
    then are all that it takes for a while. ``open_`` is a view of those that are. The rest is one
    value, replaced and never changed, so that any thread may ask."""

    def __init__(self, open_: Sized) -> None:
        self._open = open_
        self._last: tuple[float, int, int, m.Failure] | None = None

    def told(self, header: m.Submit, failure: m.Failure | None, now: float) -> None:
        """Of a request whose reply is here, and which is no longer open."""
        if failure is not None and failure.error == "QueueFull" and failure.retry_after_s:
            until = now + failure.retry_after_s
            self._last = (until, len(self._open), nbytes_of(header), failure)

    def over(self) -> None:
        """It is another coordinator, maybe, whose queue is empty."""
        self._last = None

    def refusal(self, nbytes: int, now: float) -> m.Failure | None:
        """Why a request with so many bytes of inputs would be refused now; None if it may not be.
        Smaller ones than the one that was are tried."""
        if self._last is None:
            return None
        until, most, least, failure = self._last
        if now >= until or len(self._open) < most or nbytes < least:
            return None
        return structs.replace(failure, retry_after_s=until - now)


class GivenUp:
    """Requests that are given up, by their turn. On a connection that breaks the word of it may be
    lost, and the head would hold their inputs for long: so it is said again on the next, until the
    coordinator has answered a heartbeat that went after it."""

    def __init__(self) -> None:
        self._beats = 0
        self._told: dict[str, tuple[int, int]] = {}
        """The turn, and the number of heartbeats before it was said."""

    def tell(self, request: str, turn: int) -> Effect:
        self.note(request, turn)
        return told(m.Cancel(request=request, turn=turn))

    def note(self, request: str, turn: int) -> None:
        """One that nobody can be told of now."""
        self._told.pop(request, None)
        self._told[request] = (turn, self._beats)
        while len(self._told) > limits.GIVEN_UP_KEPT:
            del self._told[next(iter(self._told))]

    def again(self, open_: Container[str]) -> list[Effect]:
        """What to say on a new connection, but of those that are ``open_`` again."""
        turns = {name: turn for name, (turn, _) in self._told.items() if name not in open_}
        self._told |= {name: (turn, self._beats) for name, turn in turns.items()}
        return [told(m.Cancel(request=name, turn=turn)) for name, turn in turns.items()]

    def turn(self, request: str) -> int:
        """Of one that begins, maybe once more: inputs of a turn that was given up are dropped."""
        return self._told.get(request, (0, 0))[0]

    def beat(self) -> Effect:
        self._beats += 1
        return told(m.Heartbeat())

    def heard(self) -> None:
        """The coordinator has answered a heartbeat: the last one, or the one before."""
        late = {name: each for name, each in self._told.items() if each[1] > self._beats - 2}
        self._told = late if len(late) < len(self._told) else self._told


def silence(why: str = "no coordinator answers") -> m.Failure:
    return m.Failure(
        error="ClusterUnavailable",
        message=why,
        hint="start one with meshinfer coordinator, or give its address",
        retry_after_s=5.0,
    )


def overdue(deadline_s: float) -> m.Failure:
    return m.Failure(
        error="DeadlineExceeded",
        message=f"no answer within {deadline_s:.3g} s",
        hint="give a longer deadline_s, or look at meshinfer devices",
    )


def unanswered(timeout_s: float) -> m.Failure:
    """Of anything but a request, from a coordinator that is there: it goes on with it, perhaps."""
    return m.Failure(
        error="DeadlineExceeded",
        message=f"not done within {timeout_s:.3g} s",
        hint="look at meshinfer devices and at the coordinator's log, or give a longer timeout_s",
    )
