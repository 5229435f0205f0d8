"""The coordinator's core: admits peers, and hands what arrives to its deploying or answering half.

After each event ``_advance`` runs the same short list of rules, so what happens next depends on the
state alone and not on the order in which it came about. No tensor passes through here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.answering import Answering
from meshinfer.scheduler.balance import Balance
from meshinfer.scheduler.catalogue import Catalogue
from meshinfer.scheduler.counting import Tallies
from meshinfer.scheduler.deploying import Deploying
from meshinfer.scheduler.enrolment import Door, Enrolment
from meshinfer.scheduler.events import (
    Arrived,
    BlobsFound,
    BlobWritten,
    Effect,
    Event,
    Knocked,
    ModelOpened,
    Note,
    PeerLost,
    Plane,
    PlanReady,
    Recorded,
    RecordFailed,
    Send,
    Stop,
    StopRequested,
    Ticked,
)
from meshinfer.scheduler.faults import Faults, of_end
from meshinfer.scheduler.handing import hand
from meshinfer.scheduler.heads import Heads, where_it_is
from meshinfer.scheduler.journal import Journal
from meshinfer.scheduler.ledger import Ledger
from meshinfer.scheduler.links import LinkRounds
from meshinfer.scheduler.membership import Membership
from meshinfer.scheduler.on_device import only_task
from meshinfer.scheduler.opened import OpenRequests
from meshinfer.scheduler.parting import Parting
from meshinfer.scheduler.reaching import Reaching
from meshinfer.scheduler.replanning import disturbs
from meshinfer.scheduler.trying import Tries


class CoordinatorCore:
    """``handle`` is the only gate; ``next_deadline`` says when to tick. ``door``: None where
    nobody has a key (in plaintext, keys are said). ``ledger``: what an earlier coordinator wrote
    down; without one nothing is, and a restart remembers nothing. ``draw``: a number in [0, 1), by
    which tasks are chosen to be checked."""

    def __init__(
        self,
        cluster: str,
        version: str,
        bulk: m.Peer,
        door: Door | None,
        ledger: Ledger | None = None,
        draw: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.members = Membership(cluster, version, faults=Faults(bulk.incarnation))
        # Numbers of an earlier coordinator must mean nothing here: its workers may join late.
        epoch = int.from_bytes(hashlib.sha256(bulk.id.encode()).digest()[:4])
        self.catalogue = Catalogue(first_deployment=epoch << 24)
        self._balance = Balance()
        self._heads = Heads(self.members)
        self._ledger, self._journal = ledger, Journal(ledger)
        # What belongs to an attempt of an earlier coordinator is older than all that is made here.
        before = 0 if ledger is None else ledger.starts - 1
        parts = (self.members, self.catalogue, self._balance, self._heads)
        self._answering = Answering(*parts, self._journal, first_attempt=before << 32, draw=draw)
        self._deploying = Deploying(*parts, self._journal, self._answering)
        roads = (self.members, self.catalogue, self._heads)
        self._reaching = Reaching(*roads, self._answering, self._deploying)
        self._enrolment = Enrolment(door, ledger, self._journal, self.members)
        self._parting = Parting(*parts, self._answering, self._deploying, self._enrolment)
        self._links = LinkRounds()
        self._tallies = Tallies(self.members.knows)
        self._tries = Tries(*parts[:3], self._answering.leaving)
        self._bulk = bulk
        self._stop_due: float | None = None
        self._now = self._ruled = 0.0
        self._begun = False
        self._due: float | None = None  # since the rules were looked at last

    @property
    def requests(self) -> OpenRequests:
        """Accepted and not yet answered, in their order."""
        return self._answering.open

    @property
    def admitted(self) -> tuple[m.Admission, ...]:
        """Who may connect: the gate begins with it, before there is a first event."""
        return self._enrolment.admitted

    # --- the gate

    def handle(self, event: Event, now: float) -> list[Effect]:
        lost = isinstance(event, Arrived) and self._tallies.heard(event.peer, event.message)
        effects = self._handle(event, now)
        if lost:
            assert isinstance(event, Arrived)
            said = Note("warning", "words of a peer were lost", {"peer": event.peer})
            effects += [said, _to(event.peer, m.Who())]
        return self._tallies.counted(effects)

    def _handle(self, event: Event, now: float) -> list[Effect]:
        if self._now and now - self._now > limits.STALL_S:  # it asks to be woken more often
            self.members.forgive(now - self._now, now)
            self._answering.retreat.stood_still(now)
        self._now = now
        asked = isinstance(event, Arrived) and self.members.speaks(event.peer, now)
        effects: list[Effect]
        match event:
            case Arrived(peer, m.Heartbeat() as beat) if self.members.heard(peer, beat, now):
                effects = self._in_step(peer, now)
                # Most of what comes in when nothing happens, and it changes nothing that the rules
                # look at but the time: every so often is enough.
                if now < self._ruled + limits.HEARTBEAT_S and not asked:
                    return effects
            case Arrived(_, m.TasksDone() | m.Submit() as said) if self._answering.goes_on(said):
                effects = self._arrived(event, now)  # nor does this, which comes the most otherwise
                if now < self._ruled + limits.HEARTBEAT_S:
                    return effects + self.members.faults.told(effects, self.requests)
            case Arrived():
                effects = self._arrived(event, now)
            case Ticked():
                effects = self._resume(now)
            case Knocked():
                effects = self._enrolment.knocked(event, now)
            case PeerLost():
                effects = self._lost(event, now)
            case BlobsFound():
                effects = self._deploying.models.found(event, now)
            case BlobWritten():
                effects = self._deploying.fetching.written(event)
            case ModelOpened():
                effects = self._deploying.models.opened(event, now)
            case PlanReady():
                effects = self._deploying.planned(event, now)
            case Recorded():
                effects, waited = self._journal.recorded(event)
                if not waited:
                    return effects
            case RecordFailed():
                effects, lost = self._journal.failed(event, now)
                effects += self._answering.not_recorded(lost, event.failure)
            case StopRequested():
                effects = self._stop(now)
            case _:
                raise AssertionError(f"a coordinator has no use for {event}")
        effects += self._advance(now)
        return effects + self.members.faults.told(effects, self.requests)

    def next_deadline(self) -> float | None:
        """When to tick: what was ahead as the rules were last looked at."""
        return self._due

    def _next(self) -> float | None:
        times = [*self._answering.next_deadlines(), *self._deploying.next_deadlines()]
        times += self._answering.fallback.next_deadlines()
        parts = (self.members, self._links, self._journal)
        others = (*(part.next_deadline() for part in parts), self._stop_due)
        times += [other for other in others if other is not None]
        if self.members.devices:
            times.append(self._ruled + limits.HEARTBEAT_S)  # so that it knows when it stood still
        return min((t for t in times if t > self._now), default=None)

    def _in_step(self, peer: str, now: float) -> list[Effect]:
        """Have all beat together, and with the rules: it is waking up that costs an idle device,
        not what a heartbeat says. Clients want an answer anyway, and who may have missed a word."""
        after = now % limits.HEARTBEAT_S
        before = limits.HEARTBEAT_S - after
        if min(after, before) > limits.BEAT_OFF_S:
            return [_to(peer, m.Alive(beat_in_s=before))]
        quiet = self.members.by_peer(peer) and not self._tallies.is_behind(peer)
        return [] if quiet else [_to(peer, m.Alive())]

    # --- messages

    def _arrived(self, event: Arrived, now: float) -> list[Effect]:
        message, peer = event.message, event.peer
        denied = self._enrolment.denied(peer, message)
        if denied is not None:
            return denied
        match message:
            case m.Hello():
                hello, effects = where_it_is(peer, message, event.ends)
                return effects + self._hello(peer, hello, now)
            case m.Want():
                return hand(self.catalogue, self.members, self._heads, peer, message)
            case m.Chunk():
                return self._deploying.fetching.chunk(peer, message, event.payload, now)
            case m.Gone():
                return self._deploying.fetching.gone(peer, message.digest)
            case m.Probe() | m.Ack():
                return []
            case _ if not self.members.knows(peer):
                return [_to(peer, m.Who())]
            case _:
                return self._told(peer, message, now)

    def _told(self, peer: str, message: m.AnyMessage, now: float) -> list[Effect]:
        """From a peer that has joined."""
        device = self.members.by_peer(peer)
        runs = device is not None or self._heads.stands(peer)
        match message:
            case m.TasksDone() if device is not None:
                return self._answering.hearing.tasks_done(peer, message, now)
            case m.Ran() if runs:
                return self._ran(peer, message, now)
            case m.Lacks() if runs:
                return self._answering.fallback.lacks(peer, message)
            case m.NotKept() if runs:
                return self._answering.hearing.not_kept(peer, message)
            case m.Merged() if runs:
                return self._answering.hearing.merged(peer, message, now)
            case m.TaskFailed() if runs:
                return self._answering.hearing.task_failed(peer, message, now)
            case m.Checked() | m.Doubtful() if runs:
                effects, out = self._answering.checks.heard(peer, message, now)
                return effects + [e for n in out for e in self._deploying.out_of_service(n, now)]
            case m.Stalled() if runs:
                return self._reaching.stalled(peer, message, now)
            case m.Unreachable() if runs:
                return self._reaching.unreachable(peer, message, now)
            case m.LinkMeasured() if device is not None:
                if message.least_bytes_per_s:
                    self._links.seen(self.members, device, message, now)
                else:
                    self._links.measured(self.members, device, message.link, now)
                return []
            case m.Tried() if device is not None:
                self._tries.heard(device, message, now)
                return []
            case m.Installed() if device is not None:
                effects = self._answering.fallback.prepared(device.name, message)
                return effects or self._deploying.installed(peer, message, now)
            case m.Installed() if runs:
                self._heads.installed(peer, message)
                return []
            case m.Goodbye() if device is not None:
                device.draining = True
                self.members.changed_at = now - limits.REPLAN_SETTLE_S
                return []
            case m.Submit():
                return self._answering.submit(peer, message, now, self._stop_due is not None)
            case m.Cancel():
                return self._answering.cancel(peer, message)
            case m.Deploy():
                return self._deploying.models.deploy(peer, message, now)
            case m.AddToken() | m.Approve() | m.Expel() | m.ListAdmitted():
                return self._enrolment.told(peer, message, now)
            case m.ListDevices():
                devices = self.members.infos(now, lost=message.lost)
                return [_to(peer, m.Devices(call=message.call, devices=devices))]
            case m.ListModels():
                return [_to(peer, m.Models(call=message.call, models=self.catalogue.infos()))]
            case _:
                return [Note("warning", "unexpected message", {"type": type(message).__name__})]

    def _hello(self, peer: str, hello: m.Hello, now: float) -> list[Effect]:
        failure = self.members.refusal(hello, now)
        if failure is not None:
            return [
                _to(peer, m.Refused(failure=failure)),
                Note("warning", failure.message, {"hint": failure.hint, "peer": peer}),
            ]
        rival = self.members.contested(hello, now)
        if rival is not None:
            return [_to(rival.peer, m.Probe())]
        effects: list[Effect] = []
        known = self.members.devices.get(hello.device) if hello.role == "worker" else None
        if known is not None and known.peer == peer and known.untouched:
            known.heard = now  # it asked twice
        else:
            if known is not None:  # what was told to it may be lost: it starts anew
                effects += self._parting.device_lost(known, "it joins again", now)
            self.members.admit(hello, peer, now)
            if hello.role == "worker":
                effects += self._joined(hello, now)
        head = self.members.head
        welcome = m.Welcome(
            coordinator=self._bulk.incarnation,
            protocol=min(hello.protocol[1], m.PROTOCOL[1]),
            bulk=self._bulk,
            head=None if head is None else head.bulk,
            acts_as=self._heads.admit(peer, hello),
        )
        self._answering.client_away(peer)
        effects.append(_to(peer, welcome))
        return effects + (self._enrolment.greeting(peer) if hello.role == "worker" else [])

    def _ran(self, peer: str, message: m.Ran, now: float) -> list[Effect]:
        """A client has computed requests itself, on its host's device."""
        made = self._heads.granted(peer, message.deployment)
        only = None if made is None else only_task(made)
        device = None if only is None else self.members.devices.get(only[0])
        if made is not None and device is not None:
            made.asked, made.model.used_at = made.asked + message.count, now
            device.tasks_done += message.count
            if not disturbs(self.catalogue, self.members, device):
                self._balance.note(made, device.name, (message.done,), now)
        return []

    def _joined(self, hello: m.Hello, now: float) -> list[Effect]:
        """A device's process is new: how the one before ended is known only now."""
        ids = {"device": hello.device, "incarnation": hello.incarnation}
        engine = hello.facts.engine
        effects: list[Effect] = [Note("info", "device joined", {**ids, "engine": engine})]
        behind = self.members.faults.behind(hello.device)
        effects += self._answering.process_ended(hello, now)
        if hello.ended is not None:
            told = {**of_end(hello.ended, hello.device), **behind}
            effects.append(Note("warning", "its last process ended", told))
        why = self.members.health.joined(hello, now)
        if why:
            effects.append(Note("warning", "device quarantined", {**ids, "why": why, **behind}))
        return effects

    # --- loss, time, the end

    def _lost(self, event: PeerLost, now: float) -> list[Effect]:
        if event.plane is Plane.BULK:
            self._deploying.fetching.connection_cut(event.peer, now)
            return []
        if not event.peer:  # some connection was reset: find out whose
            return [_to(peer, m.Probe()) for peer in self.members.everybody()]
        device = self.members.by_peer(event.peer)
        if device is not None:
            return self._parting.device_lost(device, event.reason, now)
        self.members.leave_open(event.peer, now)
        self._answering.client_away(event.peer)
        return []

    def _resume(self, now: float) -> list[Effect]:
        """With the first tick, go on where an earlier coordinator was."""
        if self._begun:
            return []
        self._begun = True
        effects, ledger = self._enrolment.begin(now), self._ledger
        return effects + ([] if ledger is None else self._deploying.models.resume(ledger, now))

    def _unused(self) -> set[str]:
        """Devices that have no part in any plan."""
        plans = self.catalogue.deployments.values()
        return self.members.devices.keys() - {name for made in plans for name in made.programs}

    def _stop(self, now: float) -> list[Effect]:
        self._stop_due = now if self._stop_due is not None else now + limits.DRAIN_S
        return []

    # --- the rules

    def _advance(self, now: float) -> list[Effect]:
        self._ruled = now
        effects = self._parting.with_those_not_admitted(now) + self._enrolment.due()
        effects += self._parting.with_the_silent(now) + self._deploying.due(now)
        effects += self._answering.fallback.due(now)
        effects += self._answering.end_overdue(now)
        effects += self._answering.end_merged(now)
        effects += self._answering.silence.doubt(now)
        effects += self._answering.leave_links(now)
        effects += self._answering.back_up(now)
        effects += self._deploying.plan_what_is_missing(now)
        effects += self._answering.start_waiting(now)
        effects += self._deploying.retire_unused(now)
        effects += self._parting.with_the_drained()
        effects += self._tries.begin(now) + self._heads.due(now)
        busy = bool(self.requests)
        effects += self._links.next(self.members, now, busy=busy, free=self._unused)
        over = not self.requests and not self._journal.waits
        stops = self._stop_due is not None and (now >= self._stop_due or over)
        effects += self._journal.flush(now, last=stops)
        if stops:
            effects += [_to(peer, m.Closing()) for peer in self.members.everybody()]
            effects.append(Stop())
        self._due = self._next()
        return effects


def _to(peer: str, message: m.AnyMessage) -> Send:
    return Send(Plane.CONTROL, peer, message)
