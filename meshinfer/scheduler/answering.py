"""Requests on the coordinator, from header to outcome: ``_end`` is the only way out.

An attempt runs under one deployment. When that is retired the request waits for the next; an answer
that an older attempt has merged is as good, since tasks are pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import outcomes
from meshinfer.scheduler.admission import other_body, refuse, same_body, signature_of, unavailable
from meshinfer.scheduler.balance import Balance
from meshinfer.scheduler.catalogue import Catalogue, Deployment, Model
from meshinfer.scheduler.checks import Checks
from meshinfer.scheduler.covering import Covering
from meshinfer.scheduler.events import Effect, Plane, Send, Signature
from meshinfer.scheduler.fallback import Fallback
from meshinfer.scheduler.heads import Heads
from meshinfer.scheduler.hearing import Hearing
from meshinfer.scheduler.journal import Journal
from meshinfer.scheduler.leaving import Leaving
from meshinfer.scheduler.load import Load, nbytes_of
from meshinfer.scheduler.membership import Device, Membership
from meshinfer.scheduler.opened import Kind, OpenRequests
from meshinfer.scheduler.poison import Poison
from meshinfer.scheduler.releasing import release
from meshinfer.scheduler.request import Answered, Request, Try
from meshinfer.scheduler.retreat import Retreat
from meshinfer.scheduler.silence import Silence


class Answering:
    """Mutable: owned by the coordinator's core."""

    def __init__(
        self,
        members: Membership,
        catalogue: Catalogue,
        balance: Balance,
        heads: Heads,
        journal: Journal,
        *,
        first_attempt: int,
        draw: Callable[[], float],
    ) -> None:
        self.open = OpenRequests()
        self._members = members
        self._catalogue = catalogue
        self._balance = balance
        self._heads = heads
        self._attempts = first_attempt
        self._journal = journal
        self._poison = Poison()
        self._load = Load(self.open, members, heads)
        self._covering = Covering(self.open, members.presence)
        self.leaving = Leaving(members, balance)
        self.fallback = Fallback(members, catalogue, self.open, self.leaving)
        self.checks = Checks(self.open, members, draw)
        self.silence = Silence(self.open, members, self.fallback)
        self.retreat = Retreat(members, balance)
        self.hearing = Hearing(self.open, members, catalogue, balance, self._covering, self._fail)

    # --- messages

    def submit(self, peer: str, message: m.Submit, now: float, stopping: bool) -> list[Effect]:
        name = message.request
        before = self.open.get(name)
        if before is not None:
            return self._submitted_again(before, peer, message)
        over = self._journal.outcome(message, peer, self._head())
        if over is not None:
            release = self._release(name, peer, message.turn)
            return [*self._journal.tell(over, _to(peer, over)), *release]
        failure = self._journal.broken or self._poison.refusal(message, now)
        failure = failure or self._load.many() or refuse(self._catalogue, message)
        failure = failure or self._load.large(message, peer)
        if stopping:
            failure = unavailable("the coordinator is stopping", "submit to another, or later")
        if failure is not None:
            reply = m.Reply(request=name, failure=failure)
            return [_to(peer, reply), *self._release(name, peer, message.turn)]
        model = self._catalogue.find(message.model, message.version)
        assert model is not None
        deadline = now + min(message.deadline_s, limits.REQUEST_DEADLINE_S)
        signature = model.asked_for(signature_of(model, message))
        request = Request(
            message, peer, model, signature, now, deadline, message.turn, nbytes_of(message),
            since=self._attempts + 1,
        )  # fmt: skip
        self.open.add(request)
        self._journal.accepted(message)
        return []

    def _submitted_again(self, request: Request, peer: str, message: m.Submit) -> list[Effect]:
        if not same_body(request.header, message):
            return [_to(peer, other_body(message))]
        if peer == request.client:
            request.turn = max(request.turn, message.turn)
        else:  # the answer would go to the one who asked before
            request.client, request.turn = peer, message.turn
            request.deployment, request.merged = None, None
        return []

    def goes_on(self, message: m.TasksDone | m.Submit) -> bool:
        """Whether tasks that are done let nothing end, and no other device take anything; or a
        request finds no room."""
        request = self.open.get(message.request)
        if isinstance(message, m.Submit):
            return request is None and self._load.many() is not None
        tried = None if request is None else request.tried.get(message.attempt)
        return tried is not None and not tried.assigned and not (request and request.merged)

    def cancel(self, peer: str, message: m.Cancel) -> list[Effect]:
        request = self.open.get(message.request)
        if request is None:  # it is over, or its header was lost; its inputs may be held
            return self._release(message.request, peer, message.turn)
        if request.client != peer:
            return []
        request.turn = max(request.turn, message.turn)
        return self._end(request, None)

    # --- what happens to deployments, devices and clients

    def process_ended(self, hello: m.Hello, now: float) -> list[Effect]:
        """A device's process is new, and tells how the one before ended."""
        request, failure = self._poison.heard(self.open, hello, now)
        return [] if request is None or failure is None else self._fail(request, failure, now)

    def device_lost(self, device: Device, why: str, now: float) -> None:
        self._poison.lost(self.open, device, why, now)

    def survives(self, made: Deployment, name: str, now: float) -> list[Effect] | None:
        """Go on without a device, all of whose tasks others may take; None where they may not."""
        if not self.fallback.covers(made, name):
            return None
        effects = [*self._heads.changed(made), *self.fallback.lost(made, name)]
        return effects + self._covering.lost(made, name, partial(self._seconds, now))

    def retired(self, made: Deployment) -> None:
        self._covering.forget(made)
        self.checks.forget(made)
        self.retreat.forget(made)
        for request in self.open.begun.values():
            if request.deployment is made:
                request.deployment = None

    def head_lost(self) -> None:
        """Merged answers may not have left it."""
        for request in self.open.begun.values():
            if request.merged is not None and not request.tried[request.merged[1]].head:
                request.merged = None

    def client_away(self, peer: str) -> None:
        """A client that is source and sink itself has left, or forgot what it was told."""
        for request in [r for r in self.open.running() if r.client == peer]:
            if request.tried[request.attempt].head or self._heads.stands(peer):
                request.deployment = None

    def not_recorded(self, names: Iterable[str], failure: m.Failure) -> list[Effect]:
        """Ids whose acceptance cannot be written were never accepted."""
        effects: list[Effect] = []
        for request in [self.open[name] for name in names if name in self.open]:
            effects.append(_to(request.client, m.Reply(request=request.id, failure=failure)))
            effects += self._end(request, None)
        return effects

    def client_gone(self, peer: str) -> list[Effect]:
        mine = [r for r in self.open.values() if r.client == peer]
        return [effect for request in mine for effect in self._end(request, None)]

    def fail_waiting(
        self, model: Model, signature: Signature | None, failure: m.Failure, now: float
    ) -> list[Effect]:
        """Those of a signature, or all of a model."""
        effects: list[Effect] = []
        for request in list(self.open.values()):
            if (
                request.waiting
                and request.model is model
                and signature in (None, request.signature)
            ):
                effects += self._fail(request, failure, now)
        return effects

    # --- the rules

    def end_overdue(self, now: float) -> list[Effect]:
        effects = self.checks.due(now)
        for request in self.open.overdue(now):
            if request.runs:
                tried = request.tried[request.attempt]
                effects += self.retreat.took(request, tried, now, answered=False)
            effects += self._fail(request, outcomes.overdue(request), now)
        return effects

    def end_merged(self, now: float) -> list[Effect]:
        """Answer once the tasks' times are in too; they take another way than the tensors."""
        effects: list[Effect] = []
        for request in [r for r in self.open.begun.values() if r.merged is not None]:
            assert request.merged is not None
            tried = request.tried[request.merged[1]]
            known = tried.all_told or now >= request.merged[0] + limits.TIMING_GRACE_S
            known = known or self.silence.tells_no_more(tried)
            if known and self._journal.has(request.id):
                reply = outcomes.answered(request, tried, self._members, now)
                effects += self.checks.begin(request, tried, now)  # before its client lets go
                effects += self._end(request, reply)
                self._load.answered(now)
                self.silence.took(tried, now)
                effects += self.retreat.took(request, tried, now)
        return effects

    def back_up(self, now: float) -> list[Effect]:
        return self._covering.back_up(partial(self._seconds, now), now)

    def leave_links(self, now: float) -> list[Effect]:
        """What waits on links begins again on one device, where that is sooner."""
        effects, again = self.retreat.waits(self.open.running(), now)
        for request in again:
            request.deployment = None
        return effects

    def give_up_without_workers(self, failure: m.Failure, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for request in list(self.open.values()):
            if request.waiting and self._members.out_of_patience(request.submitted, now):
                effects += self._fail(request, failure, now)
        return effects

    def start_waiting(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        count = Counter(r.deployment.number for r in self.open.begun.values() if r.deployment)
        serving: dict[Kind, Deployment | None] = {}
        full: set[Kind] = set()
        for kind, requests in self.open.waiting():
            for request in requests:
                if kind in full and not request.crashes:
                    break  # under overload nearly all wait behind others
                if now >= request.held_until:
                    effects += self._start(request, kind, now, count, serving, full)
        return effects

    def _start(
        self,
        request: Request,
        kind: Kind,
        now: float,
        count: Counter[int],
        serving: dict[Kind, Deployment | None],
        full: set[Kind],
    ) -> list[Effect]:
        """``count``: requests of each deployment; ``serving``: the one of each kind, where it was
        looked for; ``full``: kinds of which no more can begin now."""
        if request.client in self._members.absent and self._heads.stands(request.client):
            return []
        if kind not in serving:
            serving[kind] = self._catalogue.running(request.model, request.signature, now)
        made = self._catalogue.alone(request.id) if request.alone else serving[kind]
        if made is None or count[made.number] >= made.most_running:
            full |= set() if request.alone else {kind}
            return []
        if self._is_leaving(made, now):
            return []
        if not self._heads.ready(request.client, made):
            return self._heads.install(request.client, made)
        effects: list[Effect] = []
        if self._catalogue.find(request.model.name, None) is request.model:
            effects += self._heads.grant(request, made)
        if len(request.tried) >= limits.ATTEMPTS_PER_REQUEST:
            return effects + self._fail(request, outcomes.lost_too_often(request), now)
        effects += self._begin(request, made, now, count[made.number])
        count[made.number] += 1
        return effects

    def _is_leaving(self, made: Deployment, now: float) -> bool:
        """It uses a device that drains, and no other can take over: let it go."""
        return not self._members.ready(now) and any(
            self._members.devices[name].draining for name in made.members
        )

    def unused(self, made: Deployment, now: float) -> bool:
        """Whether a ready deployment can be retired."""
        if any(r.deployment is made for r in self.open.begun.values()):
            return False
        if made.alone:
            return made.alone not in self.open
        wanted = made.signature in self.wanted_signatures(made.model)
        newest = self._catalogue.serving(made.model, made.signature) is made
        runs = newest or self._catalogue.running(made.model, made.signature, now) is made
        return not (wanted and runs) or self._is_leaving(made, now)

    def wanted_signatures(self, model: Model) -> list[Signature]:
        """What the model should be planned for: its last signatures, and those of open requests."""
        current = self._catalogue.find(model.name, model.version) is model
        recent = model.signatures if current or not model.version else ()
        return list(dict.fromkeys((*recent, *self.open.signatures(model))))

    def next_deadlines(self) -> list[float]:
        times = self._covering.next_deadlines() + self.silence.next_deadlines()
        times += self.checks.next_deadlines()
        deadline = self.open.next_deadline()
        times += [] if deadline is None else [deadline]
        for request in self.open.begun.values():
            if request.held_until:
                times.append(request.held_until)
            if request.merged is not None:
                times.append(request.merged[0] + limits.TIMING_GRACE_S)
        if self._members.idle_since is not None:
            waiting = (each[0] for _, each in self.open.waiting())
            times += [self._members.patience_ends(each.submitted) for each in waiting]
        return times

    # --- one request

    def _begin(self, request: Request, made: Deployment, now: float, beside: int) -> list[Effect]:
        self._attempts += 1
        self.open.begin(request)
        request.attempt, request.deployment, request.merged = self._attempts, made, None
        own = request.client if self._heads.stands(request.client) else ""
        tried = Try(made, now, own, request.client, beside=beside)
        request.tried[request.attempt] = tried
        self.fallback.begin(tried, self.retreat.device(request, tried, now), now)
        made.asked, made.model.used_at = made.asked + 1, now
        self._covering.begin(tried, partial(self._seconds, now), now)
        request.started = now if request.started is None else request.started
        start = request.start()
        peers = tried.peers()
        return [_to(peers[name], start) for name in tried.in_order()]

    def _seconds(self, now: float, made: Deployment, place: m.Place, device: str) -> float:
        expected = self._balance.seconds(made, place, device, now)
        return 1.0 if expected is None else expected

    def _fail(self, request: Request, failure: m.Failure, now: float) -> list[Effect]:
        return self._end(request, outcomes.failed(request, failure, now))

    def _end(self, request: Request, reply: m.Reply | None) -> list[Effect]:
        """The one way out of a request: its outcome, and release everywhere."""
        self.open.remove(request)
        effects: list[Effect] = []
        if reply is not None:
            last = request.tried.get(request.attempt)
            head = (last and last.head) or self._head()
            answered = Answered(reply, head, request.client)
            effects += self._journal.ended(answered, request.outcome, _to(request.client, reply))
        took_part = {name for t in request.tried.values() for name in t.devices()}
        releases = self._release(request.id, request.client, request.turn, took_part)
        return effects + self.checks.put_off(request.id, releases)

    def _release(
        self, request: str, client: str, turn: int, names: Iterable[str] = ()
    ) -> list[Effect]:
        word = m.Release(request=request, attempt=self._attempts, client=client, turn=turn)
        return release(self._members, self._heads, word, names)

    def _head(self) -> str:
        head = self._members.head
        return "" if head is None else head.peer


def _to(peer: str, message: m.AnyMessage) -> Send:
    return Send(Plane.CONTROL, peer, message)
