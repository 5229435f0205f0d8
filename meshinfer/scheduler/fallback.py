"""When a device is lost or silent, its tasks go on elsewhere, under the same attempts: no weights
are sent and nothing is compiled, since each task has a spare device that prepared it beforehand.

What was made is kept until the release, and pieces are of the same boxes wherever they are made, so
only tasks are computed again whose output somebody still awaits: first all devices are asked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.catalogue import Catalogue, Deployment, Phase
from meshinfer.scheduler.events import Effect, Note, Plane, Send
from meshinfer.scheduler.heads import install_spares
from meshinfer.scheduler.leaving import Leaving
from meshinfer.scheduler.membership import Device, Membership
from meshinfer.scheduler.opened import OpenRequests
from meshinfer.scheduler.poison import suspect_of
from meshinfer.scheduler.request import Question, Request, Try
from meshinfer.scheduler.standing_by import first_ready


class Fallback:
    """Mutable: owned by the coordinator's core. ``open_`` is a view of the open requests."""

    def __init__(
        self,
        members: Membership,
        catalogue: Catalogue,
        open_: OpenRequests,
        leaving: Leaving,
    ) -> None:
        self._members, self._catalogue, self._open = members, catalogue, open_
        self._leaving = leaving

    # --- beforehand

    def due(self, now: float) -> list[Effect]:
        """Have spare devices prepare what they may take over, once a deployment serves."""
        effects: list[Effect] = []
        for made in self._catalogue.deployments.values():
            if not self._to_prepare(made) or now < self._prepare_at(made, now):
                continue
            made.spares.told = set(made.spares.peers)
            for name, peer in sorted(made.spares.peers.items()):
                self._members.devices[name].used = True
                message = install_spares(made, name, self._members)
                effects.append(Send(Plane.CONTROL, peer, message))
        return effects

    def next_deadlines(self) -> list[float]:
        made = filter(self._to_prepare, self._catalogue.deployments.values())
        return [each.ready_at + limits.SPARES_AFTER_S for each in made]

    def _prepare_at(self, made: Deployment, now: float) -> float:
        """At once, where it is not used before; that is so if devices hold both plans meanwhile."""
        made.spares.beside = made.spares.beside and self._fits_beside(made)
        used = self._catalogue.running(made.model, made.signature, now) is made
        return made.ready_at + limits.SPARES_AFTER_S * used

    def _fits_beside(self, made: Deployment) -> bool:
        """Whether those that stand by for a plan can hold it, their part of that, and all else."""
        for name in made.spares.peers:
            everything = self._catalogue.deployments.values()
            held = sum(sum(each.held(name)) for each in everything if name in each.members)
            room = made.room(name, self._members.devices[name].hello.facts.memory_bytes)
            if room and held > limits.SPARES_ROOM * room:
                return False
        return True

    def _to_prepare(self, made: Deployment) -> bool:
        if made.phase is not Phase.READY or made.spares.told or not made.spares.peers:
            return False
        return self._catalogue.serving(made.model, made.signature) is made

    def prepared(self, name: str, message: m.Installed) -> list[Effect]:
        """A spare device has prepared what it may take over, or cannot: then it just does not."""
        made, failure = self._catalogue.deployments.get(message.deployment), message.failure
        if made is None or name not in made.spares.told & made.spares.peers.keys():
            return []  # it may have left since it was told
        fields = {"model": made.model.name, "deployment": made.number, "device": name}
        if failure is not None:
            self.leaves(made, name)
            return [Note("warning", "no fallback there", {**fields, "why": failure.message})]
        made.spares.ready.add(name)
        waiting = set(made.spares.peers) - made.spares.ready
        return [] if waiting else [Note("info", "fallbacks ready", fields)]

    # --- a loss

    def covers(self, made: Deployment, name: str, but: Collection[str] = ()) -> bool:
        """Whether all that a device has may go to another that is there and has prepared it;
        ``but``: not to these."""
        for program in made.programs.get(name, ()):
            here = made.spares.ready if program.spare else made.members
            others = (d for d in program.devices if d != name and d not in but)
            if not any(other in here for other in others):
                return False
        return True

    def stands_in(self, name: str) -> bool:
        """Whether others run all that a device has, in each deployment, while it says nothing."""
        serves = False
        away = self._members.presence.away | {name}
        for made in self._catalogue.deployments.values():
            if name not in made.members or made.phase is Phase.PLANNING or made.only_spare(name):
                continue
            if made.phase is not Phase.READY or not self.covers(made, name, away):
                return False
            serves = True
        return serves

    def leaves(self, made: Deployment, name: str) -> None:
        """A device holds nothing for others any more."""
        made.spares.peers.pop(name, None)
        made.spares.ready.discard(name)

    def lost(self, made: Deployment, name: str) -> list[Effect]:
        """A device has left a deployment, and its tasks go on: who has them from now on."""
        peer, device = made.members.pop(name), self._members.devices.get(name)
        effects: list[Effect] = []
        if device is not None and device.peer == peer:  # it is there, but cannot be reached
            effects.append(Send(Plane.CONTROL, peer, m.Forget(deployment=made.number)))
        self.leaves(made, name)
        made.candidates = ()  # whoever is here now, maybe the same again: plan anew
        programs = dict(made.programs)
        for program in programs.pop(name, ()):
            taker = first_ready(program, made.spares.ready, (name, *self._members.presence.away))
            taker = taker or first_ready(program, made.spares.ready, (name,))
            if taker:
                programs[taker] = (*programs.get(taker, ()), program)
                made.spares.moved[program.place] = taker
        made.run_by(programs)
        for request in self._open.running():
            if request.deployment is made:
                effects += self._ask(request, request.tried[request.attempt])
        return effects

    def _suspect(self, device: Device, now: float) -> str:
        """The request that may be why a device is away; empty where none is, or not any more."""
        if device.name in self._members.presence.silent:
            request = suspect_of(self._open, device)
            return "" if request is None else request.id
        request = self._open.get(device.request)
        tried = None if request is None else request.tried.get(request.attempt)
        longest_s = 0.0 if tried is None else tried.deployment.longest_s
        hung = device.computes_s(now) > max(limits.HUNG_S, limits.LATE_TIMES * longest_s)
        return "" if hung else device.request

    def _ask(self, request: Request, tried: Try) -> list[Effect]:
        """Of this attempt's tasks without a device that is heard, which are awaited?"""
        gone = self._takers(tried)
        asked = tuple(sorted(p for p in gone if not self._runs_elsewhere(tried, p)))
        tried.question, tried.unasked = None, set()
        if not asked:
            return []
        tried.untold, tried.unasked = set(asked), self._members.presence.away & tried.peers().keys()
        tried.question = Question(asked, self._heard_of(tried))
        return tell(request, tried)

    def _heard_of(self, tried: Try) -> set[str]:
        """The peers of an attempt that can be expected to answer."""
        away = self._members.presence.away
        peers = tried.peers().items()
        return {peer for name, peer in peers if name not in away or peer == tried.head}

    # --- silence

    def instead(
        self, made: Deployment, names: Collection[str], left: Collection[str] = ()
    ) -> dict[m.Place, str]:
        """Who runs the tasks of these devices, of those that have prepared them and are heard:
        rather none of them, nor one that is ``left`` for being slow."""
        if not names:
            return {}
        away, ready = self._members.presence.away, made.spares.ready
        rather = {*away, *names, *left}
        own = (p for name in sorted(names) for p in made.programs.get(name, ()))
        found = {p.place: first_ready(p, ready, rather) or first_ready(p, ready, away) for p in own}
        return {place: taker for place, taker in found.items() if taker}

    def begin(self, tried: Try, by: str, now: float) -> None:
        """Who runs tasks instead of their own devices in an attempt that begins now: ``by`` all of
        them, if it is to, else others those of devices that are slow or away, or may be soon."""
        made, risk = tried.deployment, self._at_risk()
        if by and by not in risk:
            others = (p for n, each in made.programs.items() if n != by for p in each)
            tried.moved, tried.all_by = {p.place: by for p in others if p.model is not None}, by
        else:
            gone = self._members.presence.resting(now) | risk
            left = self._leaving.tasks(made, now, gone)
            tried.moved = self.takers(made, gone, left)
            tried.left = tuple(left)
            for takers in left.values():
                tried.moved |= takers
        tried.took = set(tried.moved.values())

    def _at_risk(self) -> set[str]:
        """Devices that run a request by itself, for fear that it ends their process: it would be
        stuck in that for long before, and what came behind it would wait."""
        tries = [d for d in self._catalogue.deployments.values() if d.alone in self._open]
        ran = [d for d in tries if self._open[d.alone].deployment is d]
        of = [pair for made in ran for pair in made.programs.items()]
        return {name for name, programs in of if any(p.model is not None for p in programs)}

    def go_on_without_away(self, now: float) -> list[Effect]:
        """What silent and stuck devices owe, where it is awaited, goes to those that have prepared
        it; not a request that may be the reason why one is."""
        effects: list[Effect] = []
        found: dict[int, dict[m.Place, str]] = {}
        away, devices = self._members.presence.away, self._members.devices
        suspects = {self._suspect(devices[name], now) for name in away if name in devices}
        for request in self._open.running():
            if request.id in suspects:
                continue
            tried = request.tried[request.attempt]
            made, known = tried.deployment, tried.tasks.keys() | tried.untold
            if made.number not in found:
                found[made.number] = self.takers(made, away)
            takers = self._takers(tried, found[made.number])
            owed = {place for place, to in takers.items() if to not in away} - known
            news = any(not self._runs_elsewhere(tried, place) for place in owed)
            news = news or bool(tried.untold and tried.unasked - away)  # who is heard again awaits
            question = tried.question
            if news or (question is not None and question.awaiting - self._heard_of(tried)):
                request.hurt_at = now
                effects += self._ask(request, tried)
        return effects

    def _runs_elsewhere(self, tried: Try, place: m.Place) -> bool:
        """Whether a task has been taken over by a device that is heard."""
        taker = tried.moved.get(place, "")
        return taker in tried.deployment.members and taker not in self._members.presence.away

    def takers(
        self, made: Deployment, names: Collection[str], left: Collection[str] = ()
    ) -> dict[m.Place, str]:
        """Who runs the tasks of those that are lost, and of these."""
        return {**made.spares.moved, **self.instead(made, names, left)}

    def _takers(
        self, tried: Try, found: Mapping[m.Place, str] | None = None
    ) -> Mapping[m.Place, str]:
        """Who runs an attempt's tasks of devices that are lost or silent, as ``found`` for all of
        the deployment; their own device, where that is heard again, but not who had taken over."""
        made = tried.deployment
        if found is None:
            found = self.takers(made, self._members.presence.away)
        again = [p for p in tried.moved if p not in found and not self._runs_elsewhere(tried, p)]
        if not again:
            return found
        own = {p.place: name for name, each in made.programs.items() for p in each}
        return {**found, **{place: own[place] for place in again}}

    def lacks(self, peer: str, message: m.Lacks) -> list[Effect]:
        """One has answered; with the last answer, what is awaited goes to those that prepared it,
        and what that needs of the same device, too."""
        request = self._open.get(message.request)
        if request is None or not request.runs or request.attempt != message.attempt:
            return []
        tried = request.tried[request.attempt]
        question = tried.question
        if question is None or question.asked != message.asked or peer not in question.awaiting:
            return []  # another device was lost meanwhile: they were asked anew; or it was not
        question.lacked |= set(message.lacked)
        question.awaiting.discard(peer)
        if question.awaiting:
            return []
        tried.question = None
        made = tried.deployment
        takers = self._takers(tried)
        needed = _needed(made, question)
        tried.untold.difference_update(needed)
        again = [place for place in needed if place in takers]  # the others' devices are silent
        for place in again:
            tried.moved[place] = takers[place]
            tried.twice.add(place)
            tried.took.add(takers[place])
            tried.tasks.pop(place, None)
        fields = {"request": request.id, "tasks": len(again), "of": len(question.asked)}
        note = Note("info", "computed again elsewhere", fields)
        return [note, *tell(request, tried)] if again else [note]


def _needed(made: Deployment, question: Question) -> list[m.Place]:
    """The tasks that are awaited, and those without a device that they read, in plan order."""
    programs = {p.place: p for each in made.programs.values() for p in each}
    gone = set(question.asked)
    found: set[m.Place] = set()
    open_ = sorted(question.lacked & gone)
    while open_:
        place = open_.pop()
        if place not in found:
            found.add(place)
            pieces = (piece for value in programs[place].inputs for piece in value.pieces)
            open_ += sorted({piece.producer for piece in pieces} & gone)
    return sorted(found)


def tell(request: Request, tried: Try) -> list[Effect]:
    """All that take part in an attempt hear who takes what, and what is asked."""
    message = m.Assign(
        request=request.id,
        attempt=request.attempt,
        deployment=tried.deployment.number,
        assigned=tried.on_wire(),
        head=tried.head,
        asked=() if tried.question is None else tried.question.asked,
    )
    return [Send(Plane.CONTROL, peer, message) for _, peer in sorted(tried.peers().items())]
