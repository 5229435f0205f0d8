"""Some tasks of answered requests are computed once more, by another device, to see who is wrong.

The answer never waits for it: the request is over, and only its release is put off until both
results are compared. Nobody is told before a task is done that it will be checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.catalogue import Deployment
from meshinfer.scheduler.events import Effect, Note, Plane, Send
from meshinfer.scheduler.membership import Device, Membership
from meshinfer.scheduler.recipe import SOURCE
from meshinfer.scheduler.request import Request, Try
from meshinfer.scheduler.trust import Trust, Verdict

Due = tuple[int, m.Place]
"""A task of a deployment."""

PROVEN, SUSPECT = "a device's results are wrong", "a device may be wrong"
"""What the log says of who works no more."""

Heard = tuple[list[Effect], list[str]]
"""What comes of a message: effects, and devices that get no work any more."""


@dataclass(slots=True)
class _Open:
    """``of``: whose result it is; ``by``: who computes it again, and as which peer. ``releases``:
    what is put off meanwhile."""

    attempt: int
    due: Due
    of: str
    by: str
    peer: str
    since: float
    releases: list[Effect] = field(default_factory=list)


class Checks:
    """Mutable: owned by the coordinator's core. ``open_`` is a view of the open requests; ``draw``:
    a number in [0, 1) that no device can foresee."""

    def __init__(
        self, open_: Mapping[str, Request], members: Membership, draw: Callable[[], float]
    ) -> None:
        self.trust = Trust()
        self._requests, self._members, self._draw = open_, members, draw
        self._open: dict[str, _Open] = {}
        self._due: set[Due] = set()
        self._wanted: dict[str, m.Place] = {}

    # --- one check

    def begin(self, request: Request, tried: Try, now: float) -> list[Effect]:
        """A request is answered, as it will be told: whether one of its tasks is checked."""
        wanted = self._wanted.pop(request.id, None)
        for done in tried.tasks.values():
            self.trust.did(done.device)
        made = tried.deployment
        many = len(self._open) >= limits.CHECKS_AT_ONCE or request.id in self._open  # once more
        if made.alone or request.crashes or many:
            return []
        programs = {p.place: p for each in made.programs.values() for p in each}
        places = sorted(tried.tasks)
        first = int(self._draw() * len(places)) if places else 0
        for place in (*places[first:], *places[:first]):
            of = tried.tasks[place].device
            if not tried.made_once(programs[place]):
                continue
            must = place == wanted or (made.number, place) in self._due
            if must or self._draws(of):
                by = self._other(programs[place], tried, of, now)
                if by is not None:
                    return self._ask(request, tried, programs[place], of, by, now)
        return []

    def _draws(self, device: str) -> bool:
        share = self.trust.share(device)
        return share == 1.0 or self._draw() < share

    def _other(self, program: m.Program, tried: Try, of: str, now: float) -> Device | None:
        """Who else has prepared a task, had no part in it and may work: rather one that has not
        differed from its own device yet, that has not lost it for being slow or silent, and of the
        same numeric class."""
        made, place = tried.deployment, program.place
        own = made.programs.keys() & program.devices[:1]
        here = own | made.spares.ready if program.spare else made.members.keys()
        gone = place in tried.twice
        late = own if gone else set(tried.assigned.get(place, ()))
        may = set(self._members.ready(now)) & here - late - self._members.presence.away - {of}
        rivals = self.trust.rivals(of)
        found = [self._members.devices[name] for name in program.devices if name in may]
        lost = own if place in tried.moved else set()

        def worse(device: Device) -> tuple[bool, bool, bool]:
            name = device.name
            return name in rivals, name in lost, not self._alike(name, of)

        return min(found, key=worse, default=None)

    def _ask(
        self, request: Request, tried: Try, program: m.Program, of: str, by: Device, now: float
    ) -> list[Effect]:
        made, place = tried.deployment, program.place
        due = (made.number, place)
        assert request.merged is not None
        attempt = request.merged[1]
        self._open[request.id] = _Open(attempt, due, of, by.name, by.peer, now)
        check = m.Check(
            request=request.id,
            attempt=attempt,
            deployment=made.number,
            place=place,
            of=of,
            by=by.bulk,
            head=tried.head,
            makers=_makers(program, tried),
        )
        tried.took.add(by.name)  # it is released there, too
        told = [Send(Plane.CONTROL, peer, check) for _, peer in sorted(tried.peers().items())]
        fields = {"request": request.id, "task": str(place), "of": of, "by": by.name}
        return [Note("debug", "a task is computed again", fields), *told]

    def put_off(self, request: str, releases: list[Effect]) -> list[Effect]:
        """What a request still holds is let go at once, or when its check is over."""
        self._wanted.pop(request, None)
        check = self._open.get(request)
        if check is None:
            return releases
        check.releases += releases
        return []

    def due(self, now: float) -> list[Effect]:
        """Give up what takes too long."""
        effects: list[Effect] = []
        for name in [n for n, c in self._open.items() if now >= c.since + limits.CHECK_S]:
            check = self._open.pop(name)
            fields = {"request": name, "of": check.of, "by": check.by}
            effects += [Note("debug", "a check came to nothing", fields), *check.releases]
        return effects

    def next_deadlines(self) -> list[float]:
        return [check.since + limits.CHECK_S for check in self._open.values()]

    # --- what comes of it

    def heard(self, peer: str, message: m.Checked | m.Doubtful, now: float) -> Heard:
        """What a device says of another's results: effects, and the devices that work no more."""
        if isinstance(message, m.Doubtful):
            return self._doubtful(peer, message, now)
        check = self._open.get(message.request)
        asked = None if check is None else (check.peer, check.attempt, check.due[1])
        if check is None or asked != (peer, message.attempt, message.place):
            return [], []
        releases = self._open.pop(message.request).releases
        agrees = self._agrees(message, check)
        if agrees is None:
            return releases, []
        self._due.discard(check.due)
        if agrees:
            self.trust.agree(check.of, check.by)
            return releases, []
        fields: dict[str, object] = {"request": message.request, "task": str(message.place)}
        fields |= {"of": check.of, "by": check.by, "error": message.error}
        note = self._members.faults.note("warning", "two devices have other results", fields)
        verdict = self._differ(check.of, check.by, now)
        effects: list[Effect] = [note, *releases]
        if verdict is None:
            return effects, []
        return [*effects, *self._keep_out(verdict, now)], [verdict.liar]

    def _differ(self, one: str, other: str, now: float) -> Verdict | None:
        may = self._members.ready(now)
        joined = {name: self._members.devices[name].joined for name in may}
        return self.trust.differ(one, other, joined)

    def _agrees(self, message: m.Checked, check: _Open) -> bool | None:
        """None where devices of two numeric classes may differ so without a fault."""
        if self._alike(check.of, check.by):
            return message.error <= limits.CHECK_ERROR and not message.unequal
        if message.error <= limits.CHECK_ERROR_MIXED and not message.unequal:
            return True
        return False if message.spread > limits.CHECK_SPREAD_MIXED else None

    def _alike(self, *names: str) -> bool:
        """Whether devices are of one numeric class, so that they compute the same bits."""
        here = (self._members.devices.get(name) for name in names)
        facts = [None if device is None else device.hello.facts for device in here]
        kinds = {f and (f.architecture, f.processor, f.engine, f.threads) for f in facts}
        return len(kinds) == 1 and None not in kinds

    def _keep_out(self, verdict: Verdict, now: float) -> list[Effect]:
        """It works no more, and what it had a part in and nobody was told yet begins again."""
        liar, health = verdict.liar, self._members.health
        self._clear(verdict)
        health.liars[liar] = (now + limits.LIAR_S, verdict.why)
        self._members.changed_at = now - limits.REPLAN_SETTLE_S
        for request in self._requests.values():
            parts = [n for n, t in request.tried.items() if liar in t.devices()]
            if parts:
                request.since = max(parts) + 1
                if request.merged is None or request.merged[1] < request.since:
                    request.deployment = request.merged = None
        text = PROVEN if verdict.proven else SUSPECT
        fields = {"device": liar, "why": verdict.why, "cleared": ",".join(verdict.cleared)}
        return [self._members.faults.note("error", text, fields)]

    def _clear(self, verdict: Verdict) -> None:
        for name in verdict.cleared:
            self._members.health.liars.pop(name, None)

    def _doubtful(self, peer: str, message: m.Doubtful, now: float) -> Heard:
        """Word of who has a part in an attempt of another that has: a piece is not finite, so its
        task is checked, with this request; or it is not what was asked for."""
        request = self._requests.get(message.request)
        if request is None or request.attempt != message.attempt or request.deployment is None:
            return [], []
        tried = request.tried[request.attempt]
        if not {peer, message.peer} <= set(tried.peers().values()):
            return [], []
        device, place = self._members.by_peer(message.peer), message.place
        its = device is not None and tried.has_part(device.name, place)
        if not its and (place != SOURCE or not message.why):
            return [], []
        if not message.why:
            self._wanted[request.id] = place
            self._due.add((tried.deployment.number, place))
            return [], []
        request.deployment = None
        fields = {"request": request.id, "heard_by": peer, "peer": message.peer}
        fields["why"], text = message.why, "a piece of another kind"
        by = self._members.by_peer(peer)
        if by is None or device is None or not its or device.hello.facts.head:
            return [Note("warning", text, fields)], []
        verdict = self._word_against(by, device, message.why, now)
        out = None if verdict is None else self._members.devices.get(verdict.liar)
        if verdict is None or out is None:
            return [Note("warning", text, fields)], []
        out.exclude(verdict.why, now)
        fields |= {"excluded": out.name, "cleared": ",".join(verdict.cleared)}
        return [Note("warning", text, fields)], [out.name]

    def _word_against(self, by: Device, device: Device, why: str, now: float) -> Verdict | None:
        """No kernel makes that, so that one of the two lies: as when their results differ, all that
        both do is checked, and who has it with two others works no more for a while. The head is
        the coordinator's own."""
        if by.hello.facts.head:
            text = f"it sent what was not asked for: {why}"
            return Verdict(device.name, text, proven=True)
        verdict = self._differ(device.name, by.name, now)
        if verdict is not None:
            self._clear(verdict)
        return verdict

    def forget(self, made: Deployment) -> None:
        """A deployment is retired: its checks come to nothing."""
        self._due = {due for due in self._due if due[0] != made.number}
        for check in self._open.values():
            if check.due[0] == made.number:
                check.since = -math.inf  # given up with the rules that follow


def _makers(program: m.Program, tried: Try) -> tuple[tuple[m.Place, str], ...]:
    """Who made what a task was given, as far as that was told."""
    read = sorted({piece.producer for value in program.inputs for piece in value.pieces})
    return tuple((place, tried.tasks[place].device) for place in read if place in tried.tasks)
