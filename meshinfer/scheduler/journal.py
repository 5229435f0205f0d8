"""The core's side of the journal: what must be on disk before it is told, and what ids stand for.

An id is acknowledged by its reply alone. So work never waits for the disk, replies do: for the
acceptance, and a failure for itself as well, since a second try could end otherwise. The outcome of
a success is written when there is company: tasks are pure, so a second try ends as the first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.admission import body_of, other_body
from meshinfer.scheduler.events import Effect, Note, Record, Recorded, RecordFailed
from meshinfer.scheduler.ledger import (
    Accepted,
    Ended,
    Enrolled,
    Entry,
    Expelled,
    Ledger,
    Planned,
    Published,
    TokenMade,
)
from meshinfer.scheduler.request import Answered


@dataclass(slots=True)
class _Known:
    """``number``: of the record of its acceptance; 0 where it was there before."""

    body: str
    number: int
    failure: m.Failure | None = None


@dataclass(frozen=True, slots=True)
class _Held:
    number: int
    then: Callable[[], list[Effect]]
    otherwise: Callable[[m.Failure], list[Effect]]


class Journal:
    """Mutable: owned by the coordinator's core. Without a ledger nothing is written down, and ids
    are known all the same.

    ``broken``: why the last record failed. While it is set, nothing new is accepted.
    """

    def __init__(self, ledger: Ledger | None) -> None:
        self._on = ledger is not None
        requests = OrderedDict() if ledger is None else ledger.requests
        self._known = OrderedDict(
            (name, _Known(entry.body, 0, entry.failure if isinstance(entry, Ended) else None))
            for name, entry in requests.items()
        )
        self._answered: OrderedDict[str, Answered] = OrderedDict()
        self._timed: deque[tuple[str, int]] = deque()  # of which the tasks' times are kept
        self._times = 0
        self._entries: list[Entry] = []
        self._held: deque[_Held] = deque()
        self._last = self._recorded = self._urged = self._wanted = 0
        self._prompt = False
        self._due: float | None = None
        self.broken: m.Failure | None = None

    # --- ids

    def outcome(self, message: m.Submit, peer: str, head: str) -> m.Reply | None:
        """What an id has come to, where that can be told again to ``peer``. It, or ``head``, may
        still have an answer's tensors."""
        known = self._known.get(message.request)
        if known is not None and known.body != body_of(message):
            return other_body(message)
        done = self._answered.get(message.request)
        if done is not None and (done.reply.failure or done.reaches(peer, head)):
            return done.reply
        if known is None or known.failure is None:
            return None
        return m.Reply(request=message.request, failure=known.failure)

    def accepted(self, message: m.Submit) -> None:
        name = message.request
        self._answered.pop(name, None)  # who had the answer is gone: once more
        if name in self._known:
            self._known.move_to_end(name)
            return
        body = body_of(message)
        self._add(Accepted(name, body))
        self._known[name] = _Known(body, self._last)
        while len(self._known) > limits.JOURNALED_IDS:
            self._known.popitem(last=False)

    def has(self, request: str) -> bool:
        """Whether the acceptance is on disk; who asks is woken when it is."""
        known = self._known.get(request)
        if known is None or known.number <= self._recorded:
            return True
        self._wanted = max(self._wanted, known.number)
        return False

    def ended(self, answered: Answered, digest: str, told: Effect) -> list[Effect]:
        """Note the outcome of an accepted id, and tell it as soon as it may be."""
        name, failure = answered.reply.request, answered.reply.failure
        self._answered[name] = answered
        while len(self._answered) > limits.ANSWERED_IDS_KEPT:
            self._answered.popitem(last=False)
        self._forget_times(name, len(answered.reply.tasks))
        known = self._known.get(name)
        if known is None:
            return [told]
        known.failure = failure
        self._add(Ended(name, known.body, digest, failure), prompt=failure is not None)
        return self.tell(answered.reply, told)

    def _forget_times(self, newest: str, tasks: int) -> None:
        """Of older answers: a plan for many devices has hundreds of tasks."""
        if not tasks:
            return
        self._timed.append((newest, tasks))
        self._times += tasks
        while self._times > limits.TASK_TIMES_KEPT and len(self._timed) > 1:
            name, count = self._timed.popleft()
            self._times -= count
            if old := self._answered.get(name):
                self._answered[name] = replace(old, reply=structs.replace(old.reply, tasks=()))

    def tell(self, reply: m.Reply, told: Effect) -> list[Effect]:
        """Send an outcome; that an id has failed once it is written."""
        known = self._known.get(reply.request)
        failed = known is not None and known.failure is not None
        return self.once_recorded(lambda: [told]) if failed else [told]

    # --- what waits for the disk

    def first_write(
        self,
        entry: Published | TokenMade | Enrolled | Expelled,
        then: Callable[[], list[Effect]],
        otherwise: Callable[[m.Failure], list[Effect]],
    ) -> list[Effect]:
        """Write something down, then go on with it, or not."""
        if self.broken is not None:
            return otherwise(self.broken)
        self._add(entry)
        return self.once_recorded(then, otherwise)

    def planned(self, entry: Planned) -> None:
        """A plan is ready; should it not be written, it is made anew after a restart."""
        self._add(entry, prompt=False)

    def once_recorded(
        self,
        then: Callable[[], list[Effect]],
        otherwise: Callable[[m.Failure], list[Effect]] | None = None,
    ) -> list[Effect]:
        """When all that was noted so far is on disk; without ``otherwise`` even if it fails."""
        if self._last <= self._recorded or self.broken is not None:
            return then()
        self._held.append(_Held(self._last, then, otherwise or (lambda failure: then())))
        return []

    def _add(self, entry: Entry, *, prompt: bool = True) -> None:
        if not self._on:
            return
        self._last += 1
        self._entries.append(entry)
        self._prompt = self._prompt or prompt

    # --- what the disk says

    def recorded(self, event: Recorded) -> tuple[list[Effect], bool]:
        """What may be done now, and whether anybody waited for this."""
        waited = self._wanted > self._recorded or self.broken is not None or bool(self._held)
        self._recorded = max(self._recorded, event.number)
        effects: list[Effect] = []
        if self.broken is not None:
            self.broken = None
            effects.append(Note("info", "the journal is written again", {}))
        return effects + self._release(event.number, None), waited

    def failed(self, event: RecordFailed, now: float) -> tuple[list[Effect], list[str]]:
        """What could not be written never was: the ids that are not accepted after all."""
        effects: list[Effect] = []
        if self.broken is None:
            fields = {"why": event.failure.message, "hint": event.failure.hint}
            effects.append(Note("error", "the journal cannot be written", fields))
        self.broken = event.failure
        self._due = now + limits.JOURNAL_RETRY_S
        before, self._recorded = self._recorded, max(self._recorded, event.number)
        lost = [n for n, known in self._known.items() if before < known.number <= event.number]
        for name in lost:
            del self._known[name]
        return effects + self._release(event.number, event.failure), lost

    def _release(self, number: int, failure: m.Failure | None) -> list[Effect]:
        effects: list[Effect] = []
        while self._held and self._held[0].number <= number:
            held = self._held.popleft()
            effects += held.then() if failure is None else held.otherwise(failure)
        return effects

    # --- the rule

    @property
    def waits(self) -> bool:
        """Whether something is to be told as soon as it is on disk."""
        return bool(self._held)

    def flush(self, now: float, *, last: bool = False) -> list[Effect]:
        """Have written what is new, with what waited for company; once somebody waits, be woken.
        ``last``: nothing will be company any more."""
        if self.broken is not None:
            if self._due is None or now < self._due:
                return []
            self._due, self._urged = now + limits.JOURNAL_RETRY_S, self._last
            return [self._record(awaited=True)]  # with nothing in it, it still shows
        need = max(self._wanted, self._held[-1].number if self._held else 0)
        if need > self._recorded and need > self._urged:
            self._urged = self._last
            return [self._record(awaited=True)]
        if not self._entries:
            return []
        if self._prompt or last or (self._due is not None and now >= self._due):
            return [self._record(awaited=False)]
        self._due = self._due or now + limits.JOURNAL_DELAY_S
        return []

    def _record(self, *, awaited: bool) -> Record:
        entries, self._entries = tuple(self._entries), []
        self._prompt = False
        if self.broken is None:
            self._due = None
        return Record(self._last, entries, awaited)

    def next_deadline(self) -> float | None:
        return self._due
