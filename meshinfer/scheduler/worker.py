"""The worker's core: joins, stays, and hands what arrives to its installing or its computing half.

Data drives it: a task runs when its last piece is here. The device at the coordinator (the *head*)
is this same core without an engine; it is the source and the sink of requests.
"""

from __future__ import annotations

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.checking import Checking
from meshinfer.scheduler.computing import Computing
from meshinfer.scheduler.counting import Member
from meshinfer.scheduler.detours import Detours
from meshinfer.scheduler.events import (
    Admit,
    Arrived,
    BlobsFound,
    BlobWritten,
    BoardRead,
    Computed,
    Connect,
    Disconnect,
    Effect,
    Event,
    Note,
    PeerLost,
    Plane,
    Prepared,
    Send,
    Stop,
    StopRequested,
    Ticked,
)
from meshinfer.scheduler.installing import Installing
from meshinfer.scheduler.links import LinkMeter
from meshinfer.scheduler.recipe import SOURCE
from meshinfer.scheduler.telling import COORDINATOR, refusal, told
from meshinfer.scheduler.trying import Trying

__all__ = ["COORDINATOR", "SOURCE", "WorkerCore"]


class WorkerCore(Member):
    """``handle`` is the only gate; ``next_deadline`` says when to tick."""

    def __init__(self, hello: m.Hello) -> None:
        super().__init__()
        self.hello = hello
        self.device = hello.device
        self._ids = {"device": hello.device, "incarnation": hello.incarnation}
        self.joined = False
        self._coordinator: m.Peer | None = None
        self._installing = Installing(hello.device)
        self._computing = Computing(
            hello.device,
            self._installing.deployments,
            granted_bytes=hello.facts.memory_bytes,
        )
        self._checking = Checking(hello.device, self._computing, self._installing)
        self._trying = Trying(self._computing, self._installing)
        self._links = LinkMeter()
        self._detours = Detours("" if hello.bulk is None else hello.bulk.id)
        self._hello_due = 0.0
        self._left = 0.0
        self._beat_due = 0.0
        self._stop_due: float | None = None
        self._board: m.Board | None = None

    # --- the gate

    def _handle(self, event: Event, now: float) -> list[Effect]:
        effects = self._taken(event, now) + self._checking.begin(now)
        return self._detours.redirect(effects)

    def _taken(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Arrived():
                return self._arrived(event, now)
            case Ticked():
                return self._tick(now)
            case Computed(request=""):
                return self._trying.computed(event, now)
            case Computed(again=True):
                return self._checking.computed(event)
            case Computed():
                return self._computed(event, now)
            case Prepared():
                busy = not self._computing.idle or self._trying.wanted
                return self._installing.prepared(event, now, busy=busy) + self._trying.prepared(now)
            case BlobsFound():
                if self._coordinator is None:
                    return []
                return self._installing.found(event, self._coordinator, now)
            case BlobWritten():
                return self._installing.written(event, now)
            case PeerLost():
                return self._lost(event, now)
            case BoardRead(board):
                self._board = board
                return []
            case StopRequested():
                return self._stop(now)
            case _:
                raise AssertionError(f"a worker has no use for {event}")

    def next_deadline(self) -> float:
        soonest = self._beat_due if self.joined else self._hello_due
        for other in (
            self._computing.next_deadline(),
            self._checking.next_deadline(),
            self._installing.next_deadline(),
            self._links.next_deadline(),
            self._detours.next_deadline(),
            self._stop_due,
        ):
            if other is not None and other < soonest:
                soonest = other
        return soonest

    @property
    def idle(self) -> bool:
        """Whether nothing is held or under way; tests and draining look at it."""
        half = self._computing
        idle = half.idle and self._installing.idle and not self._checking
        return idle and not half.outbox and not half.acks

    # --- messages

    def _arrived(self, event: Arrived, now: float) -> list[Effect]:
        if event.peer == COORDINATOR:
            return self._told(event.message, now)
        message, peer = event.message, event.peer
        match message:
            case m.Deliver():
                return self._computing.deliver(peer, message, event.payload, now)
            case m.Sample():
                return self._checking.sampled(peer, message, event.payload, now)
            case m.Feed() if self.hello.facts.head:
                return self._computing.giving.feed(peer, message, event.payload, now)
            case m.Relay():
                if self.hello.facts.head:
                    return self._detours.pass_on(peer, message, event.payload)
                if not self._detours.is_for_us(peer, message, now):
                    return [Note("warning", "relayed by another than the head", {"peer": peer})]
                return self._arrived(Arrived(message.origin, message.message, event.payload), now)
            case m.Ack():
                self._computing.outbox.acknowledge(peer, message.ids)
                return []
            case m.Echo():
                return [Send(Plane.BULK, peer, m.Echoed(id=message.id))]
            case m.Echoed():
                watched = self._computing.watch.echoed(peer, message.id, now)
                watched += self._detours.echoed(peer, message.id)
                return watched or self._links.echoed(peer, message.id, now)
            case m.Chunk():
                busy = not self._computing.idle
                return self._installing.chunk(peer, message, event.payload, now, busy=busy)
            case m.Gone():
                return self._installing.gone(peer, message.digest, now)
            case m.Probe():
                return []
            case _:
                fields = {"type": type(message).__name__, "peer": peer}
                return [Note("warning", "unexpected message", fields)]

    def _told(self, message: m.AnyMessage, now: float) -> list[Effect]:
        """What only the coordinator may say, over its control connection."""
        match message:
            case m.Start():
                effects = self._computing.start(message, now)
                begins = [] if message.again else self._installing.begins(message.attempt, now)
                return effects + begins
            case m.Assign():
                return self._computing.assign(message, now)
            case m.Release():
                self._checking.release(message.request, message.attempt, now)
                return self._computing.release(message, now)
            case m.Check():
                return self._checking.asked(message, now)
            case m.Try():
                return self._trying.asked(message, now)
            case m.Install():
                return self._installing.install(message)
            case m.Forget():
                self._computing.holding.forget(message.deployment)
                self._checking.forget(message.deployment)
                return self._installing.forget(message.deployment)
            case m.Admitted():
                return [Admit(message.members)]
            case m.Welcome():
                return self._welcome(message, now)
            case m.Detour():
                self._computing.outbox.hasten(message.peer.id, now)
                return self._detours.begin(message, now)
            case m.MeasureLink():
                return self._links.begin(message.peer, now)
            case m.Who():
                return self._rejoin(now)
            case m.Closing():
                return self._rejoin(now + limits.HELLO_RETRY_S)
            case m.Refused():
                return [Stop(message.failure)]
            case m.Dismiss():
                return self._end()
            case m.Alive():
                if message.beat_in_s:
                    self._beat_due = now + message.beat_in_s
                return []
            case m.Probe():
                return []
            case _:
                return [Note("warning", "unexpected message", {"type": type(message).__name__})]

    # --- joining and staying

    def _computed(self, event: Computed, now: float) -> list[Effect]:
        running, wasted = self._computing.running, self._computing.wasted
        effects = self._computing.computed(event, now)
        if running is not None and self._computing.wasted > wasted and self._tally.counts:
            effects += self._trying.in_vain(running[0].deployment, event)
        return effects

    def _welcome(self, message: m.Welcome, now: float) -> list[Effect]:
        """What was told before this welcome may have been lost, so the coordinator starts anew."""
        self._checking.reset()
        self._computing.reset(keep_inputs=True)  # given since this device said hello
        effects = self._installing.reset()
        if self._coordinator is not None and self._coordinator.id != message.bulk.id:
            self._computing.holding.forget_other_coordinator()
            effects.append(Disconnect(self._coordinator.id))
        self._coordinator = message.bulk
        self._detours.trust(message.head)
        self.joined = True
        self._beat_due = now
        effects += [Connect(message.bulk), Note("info", "joined", self._ids)]
        if self._stop_due is not None:
            effects.append(told(m.Goodbye()))
        return effects

    def _rejoin(self, when: float) -> list[Effect]:
        if not self.joined:  # a hello is under way already
            return []
        self.joined = False
        self._hello_due, self._left = when, when
        self._links.reset()
        self._detours.reset()
        self._checking.reset()
        self._computing.reset(keep_inputs=False)  # the coordinator has clients give them again
        if self._stop_due is not None:
            return self._end()
        return [Note("warning", "coordinator lost", self._ids)]

    def _moved(self, now: float) -> bool:
        """Whether a coordinator that once answered is silent so long that it must be looked for."""
        away = not self.joined and self._coordinator is not None
        return away and now - self._left > limits.COORDINATOR_SILENT_S

    def _tick(self, now: float) -> list[Effect]:
        if self._stop_due is not None and now >= self._stop_due:
            return self._end()
        if self._moved(now):
            failure = m.Failure(
                error="ClusterUnavailable",
                message=f"the coordinator is gone for {limits.COORDINATOR_SILENT_S:g} s",
                hint="its supervisor starts this worker again, which looks for the coordinator",
            )
            return [Stop(failure)]
        effects: list[Effect] = []
        if not self.joined and now >= self._hello_due:
            self._hello_due = now + limits.HELLO_RETRY_S
            effects.append(told(self.hello))
        if self.joined and now >= self._beat_due:
            self._beat_due = now + limits.HEARTBEAT_S
            effects.append(told(self._heartbeat(now)))
        effects += self._computing.due(now)
        effects += self._detours.late(self._computing.outbox.late, now) + self._detours.due(now)
        effects += self._installing.due(now, busy=not self._computing.idle)
        effects += self._links.due(now)
        self._computing.holding.drop_orphans(now)
        self._checking.drop_orphans(now)
        return effects

    def _heartbeat(self, now: float) -> m.Heartbeat:
        wasted = self._computing.wasted
        if self._computing.running is None:
            return m.Heartbeat(wasted=wasted, board=self._board)
        job, since = self._computing.running
        what = f"{job.request} {job.place}"
        return m.Heartbeat(computing=what, since_s=now - since, wasted=wasted, board=self._board)

    def _lost(self, event: PeerLost, now: float) -> list[Effect]:
        if event.peer == COORDINATOR:
            if event.unadmitted or (event.refused and self._coordinator is None):
                return [Stop(refusal("this device", event))]
            return self._rejoin(now)
        if event.peer:
            if not self._detours.goes(event.peer):
                self._computing.outbox.hasten(event.peer, now)
            self._installing.connection_cut(event.peer, now)
        return []

    def _stop(self, now: float) -> list[Effect]:
        if self._stop_due is not None or not self.joined:
            return self._end()
        self._stop_due = now + limits.DRAIN_S
        return [told(m.Goodbye())]

    def _end(self) -> list[Effect]:
        return [*self._computing.acks.flush(), Stop()]
