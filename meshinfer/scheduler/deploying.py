"""Models and their plans: open a model, plan each signature, install, retire.

A deployment is made beside the one that serves and takes over when all its devices are ready; what
fails meanwhile never takes down what serves.
"""

from __future__ import annotations

from dataclasses import replace

from meshinfer import limits
from meshinfer.errors import InvalidInput
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import header_bytes
from meshinfer.scheduler.admission import unavailable
from meshinfer.scheduler.answering import Answering
from meshinfer.scheduler.assigning import choices_of
from meshinfer.scheduler.balance import Balance, unusual
from meshinfer.scheduler.catalogue import Catalogue, Deployment, Model, Phase, with_notes
from meshinfer.scheduler.events import (
    Candidate,
    Discard,
    Effect,
    MakePlan,
    Note,
    Plane,
    PlanReady,
    Send,
    Signature,
)
from meshinfer.scheduler.heads import Heads, install
from meshinfer.scheduler.journal import Journal
from meshinfer.scheduler.membership import Device, Membership
from meshinfer.scheduler.publishing import Publishing
from meshinfer.scheduler.remembered import Remembered, entry_of
from meshinfer.scheduler.replanning import Replanning
from meshinfer.scheduler.request import Request
from meshinfer.scheduler.turns import is_planning, is_search_beside, rests, waits


class Deploying:
    """Mutable: owned by the coordinator's core."""

    def __init__(
        self,
        members: Membership,
        catalogue: Catalogue,
        balance: Balance,
        heads: Heads,
        journal: Journal,
        answering: Answering,
    ) -> None:
        self._members = members
        self._heads = heads
        self._catalogue = catalogue
        self._answering = answering
        self._balance = balance
        self._journal = journal
        self._remembered = Remembered(members)
        self.models = Publishing(
            catalogue, answering, journal, heads, self._remembered, self.retire
        )
        self.fetching = self.models.fetching
        self._replanning = Replanning(members, balance)

    # --- plans

    def _plan(
        self,
        model: Model,
        signature: Signature,
        now: float,
        present: Deployment | None = None,
        alone: Request | None = None,
    ) -> Effect:
        head, candidates = self._members.head, self._members.candidates(now)
        if alone is not None:
            candidates = (_one_for(alone, candidates),)
        assert head is not None and candidates
        names = tuple(c.device for c in candidates)
        factors = self._replanning.factors(names, present, now)
        members = {n: self._members.devices[n].peer for n in (*names, head.name)}
        plan = None if alone is not None else self._given_plan(model, set(members))
        made = self._catalogue.new_deployment(model, signature, members, names, now)
        made.factors, made.given, made.head = factors, plan is not None, head.name
        self._replanning.planned(made)
        made.alone = "" if alone is None else alone.id
        if present is not None:
            grave = self._replanning.grave(present)
            made.share = limits.SEARCH_SHARE_GRAVE if grave else limits.SEARCH_SHARE
            made.spares.beside = not grave or bool(present.drift.by_one)  # else leave slow ones
        return MakePlan(
            deployment=made.number,
            digest=model.digest,
            image=model.image,
            signature=signature,
            candidates=tuple(replace(c, slowdown=factors[c.device]) for c in candidates),
            head=head.name,
            plan=plan,
            objective=model.objective,
            spread=model.spread and alone is None,
            strict=model.strict,
            present=None if present is None else present.plan,
            paced=present is not None and self._replanning.paced(present, names),
            head_host=head.where,
            pin=model.pin,
            memory=model.memory,
            share=made.share,
            half_transfers=model.half_transfers,
            tell_loss=model.call is not None,
        )

    def _given_plan(self, model: Model, here: set[str]) -> str | None:
        """The user's plan; once the model serves, only while the plan's devices are here."""
        if model.plan is None or not model.version:
            return model.plan
        try:
            plan = Plan.parse(model.plan)
        except InvalidInput:
            return model.plan
        return model.plan if {*plan.devices(), plan.source, plan.sink} <= here else None

    def planned(self, event: PlanReady, now: float) -> list[Effect]:
        made = self._catalogue.deployments.get(event.deployment)
        if made is None or made.phase is not Phase.PLANNING:
            return []
        made.search_s, made.drift.adapted = event.search_s, event.adapted
        serving = self._catalogue.serving(made.model, made.signature)
        if event.adapted and serving is not None:  # or one would follow the other ever sooner
            made.search_s = max(made.search_s, serving.search_s)
        if event.dropped:
            self._look_again_later(made, now)
            return self.retire(made)
        failure = event.failure
        unknown = sorted(set(event.programs) - set(made.members))
        if failure is None and unknown:
            failure = m.Failure(
                error="InvalidInput",
                message=f"the plan names {unknown}",
                hint=f"devices that can compute are {sorted(made.members)}",
            )
        if failure is not None:
            return self._plan_failed(made, failure, now)
        if event.kept:
            return self._keep(made)
        made.plan, made.report, made.window = event.plan, event.report, event.window
        made.choices, made.expected = choices_of(event.programs), event.expected
        made.take_on(event.programs)
        made.phase, made.waiting, made.since = Phase.INSTALLING, set(event.programs), now
        sends = [
            _to(made.members[name], install(made, name, self._members))
            for name in sorted(made.programs)
        ]
        largest = max(header_bytes(send.message) for send in sends)
        if largest > limits.CONTROL_FRAME_BYTES:
            failure = m.Failure(
                error="InvalidInput",
                message=f"the plan needs a message of {largest} bytes to install",
                hint="plan fewer stages or tasks",
            )
            return self._plan_failed(made, failure, now)
        for name in made.programs:
            self._members.devices[name].used = True
        return list(sends)

    def _keep(self, made: Deployment) -> list[Effect]:
        """What serves is as good on devices as they are now: go on, and compare with that."""
        serving = self._catalogue.serving(made.model, made.signature)
        if serving is not None and serving.candidates == made.candidates:
            serving.since, serving.in_vain, serving.asked = made.since, serving.in_vain + 1, 0
            serving.search_s = made.search_s
            serving.paced(made.factors)
            serving.links = made.links
        return self.retire(made)

    def _look_again_later(self, made: Deployment, now: float) -> None:
        """A search for a better plan came to nothing, and nothing was learnt of what serves."""
        serving = self._catalogue.serving(made.model, made.signature)
        if serving is not None and made.share < 1.0:
            serving.since, serving.search_s, serving.asked = now, made.search_s, 0
            serving.drift.overtaken = 0

    def installed(self, peer: str, message: m.Installed, now: float) -> list[Effect]:
        made = self._catalogue.deployments.get(message.deployment)
        device = self._members.by_peer(peer)
        if made is None or device is None or device.name not in made.waiting:
            return []
        if message.failure is not None:
            return self._install_failed(made, device, message.failure, now)
        made.waiting.discard(device.name)
        if made.waiting:
            return []
        made.phase, made.ready_at = Phase.READY, now
        model = made.model
        if made.report is not None and made.signature in model.unprepared:
            made.report = with_notes(made.report, model.unprepared.pop(made.signature))
        fields = {"model": model.name, "deployment": made.number, **unusual(made.factors)}
        note = Note("info", "plan ready", fields)
        effects = self.models.serve(model, made)
        if not made.alone:
            self._journal.planned(entry_of(made, self._members))
        return [note, *effects]

    def _install_failed(
        self, made: Deployment, device: Device, failure: m.Failure, now: float
    ) -> list[Effect]:
        fields = {**device.ids, "deployment": made.number, "why": failure.message}
        note = self._members.faults.note("error", "a device could not prepare its programs", fields)
        computes = device.name in made.candidates
        failed = made.model.unprepared.pop(made.signature, ())
        # What was only late may come the next time; and who else is there to take its tasks?
        again = failure.error == "ClusterUnavailable"
        again = again and self._members.ready(now) == (device.name,)
        what = "tries again" if again else "is left out"
        failed = (*failed, f"{device.name} {what}: {failure.message}")
        if computes and not again:
            device.exclude(f"it cannot prepare its tasks: {failure.message}", now)
        if computes and len(failed) < limits.INSTALL_ATTEMPTS and self._members.ready(now):
            made.model.unprepared[made.signature] = failed
            return [note, *self.retire(made)]
        return [note, *self._plan_failed(made, failure, now)]

    def install_overdue(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for made in list(self._catalogue.deployments.values()):
            if made.phase is Phase.INSTALLING and now >= made.since + limits.INSTALL_S:
                failure = m.Failure(
                    error="ClusterUnavailable",
                    message=f"{sorted(made.waiting)} did not prepare within {limits.INSTALL_S} s",
                    hint="look at their logs and links",
                )
                device = self._members.devices[min(made.waiting)]
                effects += self._install_failed(made, device, failure, now)
        return effects

    def _plan_failed(self, made: Deployment, failure: m.Failure, now: float) -> list[Effect]:
        effects = self.retire(made)
        model, signature = made.model, made.signature
        note = Note("error", "no plan", {"model": model.name, "why": failure.message})
        if made.alone:
            asked = self._answering.open.get(made.alone)
            if asked is not None:
                asked.together = asked.attempt  # a crash after that is proof all the same
            return [note, *effects]
        serving = self._catalogue.serving(model, signature)
        if serving is not None:
            serving.candidates = made.candidates  # it stays; these devices were tried
            self._look_again_later(made, now)
            serving.drift.tried = serving.drift.times
            serving.in_vain += made.share < 1.0  # maybe the end of the process that plans
            return [note, *effects]
        if signature in model.signatures:
            model.signatures.remove(signature)
        effects += self._answering.fail_waiting(model, signature, failure, now)
        if model.call is not None:
            effects += self.models.failed(model, failure)
        return [note, *effects]

    def out_of_service(self, name: str, now: float) -> list[Effect]:
        """A device is lost, or cannot be reached: retire what cannot do without it."""
        effects: list[Effect] = []
        for made in list(self._catalogue.deployments.values()):
            if name not in made.members:
                continue
            ready = made.phase is Phase.READY or made.only_spare(name)
            went_on = self._answering.survives(made, name, now) if ready else None
            effects += self.retire(made) if went_on is None else went_on
        return effects

    def retire(self, made: Deployment) -> list[Effect]:
        """Take a deployment out of service; its requests start again under another."""
        effects: list[Effect] = [Discard(made.number)] if is_planning(made) else []
        made.phase = Phase.RETIRED
        self._catalogue.deployments.pop(made.number, None)
        self._answering.retired(made)
        effects += self._heads.forget(made)
        devices = self._members.devices
        return effects + [
            _to(peer, m.Forget(deployment=made.number))
            for name, peer in sorted(made.members.items())
            if name in devices and devices[name].peer == peer
        ]

    # --- the rules

    def due(self, now: float) -> list[Effect]:
        return self.fetching.due(now) + self.install_overdue(now)

    def plan_what_is_missing(self, now: float) -> list[Effect]:
        names = self._members.note_workers(now)
        if self._answering.open:
            self._replanning.busy_at = now
        if self._members.idle_since is not None:
            return self._give_up_without_workers(now)
        settled = now >= self._members.changed_at + limits.REPLAN_SETTLE_S
        planning = [d.share for d in self._catalogue.deployments.values() if is_planning(d)]
        room = limits.PLANS_AT_ONCE - planning.count(1.0)
        effects: list[Effect] = []
        asked = self._answering.open.models()
        models = self._catalogue.all_models(*asked.values()) if room > 0 else []
        for model in sorted(models, key=lambda each: rests(each, asked, now)):
            for signature in self._answering.wanted_signatures(model):
                if self._remembered.awaits(model, signature, now):
                    event = self._remembered.take_up(self._catalogue, model, signature, now)
                    effects += [] if event is None else self.planned(event, now)
                    continue
                if not model.opened:
                    continue
                coming = self._catalogue.coming(model, signature)
                serving = self._catalogue.serving(model, signature)
                urgent = serving is None or (settled and serving.candidates != names)
                if coming is not None:
                    over = urgent and is_search_beside(coming)
                    if not over and not self._replanning.overtaken(coming, serving, now):
                        continue
                    if is_planning(coming):
                        planning.remove(coming.share)
                    effects += self.retire(coming)
                if urgent and rests(model, asked, now) and self._waits(serving, now):
                    continue
                if urgent and room > 0:
                    effects.append(self._plan(model, signature, now))
                    room -= 1
                elif serving is not None and self._replanning.due(serving, now) and not planning:
                    effects += self._look_for_better(serving, now)
                else:
                    continue
                planning.append(1.0)
        return effects + self._plan_for_one(now)

    def _look_for_better(self, serving: Deployment, now: float) -> list[Effect]:
        said: dict[str, object] = {"deployment": serving.number}
        said["apart"] = f"{serving.drift.times:.2f}"
        if links := self._replanning.changed_links(serving):
            said["links"] = ", ".join(map("-".join, links))
        note = Note("info", "looks for a better plan", {"model": serving.model.name, **said})
        return [note, self._plan(serving.model, serving.signature, now, serving)]

    def _plan_for_one(self, now: float) -> list[Effect]:
        """For each request that may run only alone, a plan on one device."""
        known = {made.alone for made in self._catalogue.deployments.values()} - {""}
        wanted = [
            r
            for r in self._answering.open.begun.values()
            if r.crashes and r.alone and r.waiting and now >= r.held_until and r.id not in known
        ]
        room = max(0, limits.PLANS_AT_ONCE - len(known))
        return [self._plan(r.model, r.signature, now, alone=r) for r in wanted[:room]]

    def _waits(self, serving: Deployment | None, now: float) -> bool:
        return waits(serving, self._catalogue, self._members, now)

    def _give_up_without_workers(self, now: float) -> list[Effect]:
        failure = unavailable(
            "no worker that can compute is in the cluster",
            "start one with meshinfer worker, and look at meshinfer devices",
        )
        effects = self._answering.give_up_without_workers(failure, now)
        for model in [o for o in self._catalogue.opening.values() if o.opened and o.call]:
            if self._members.out_of_patience(model.asked.since, now):
                effects += self.models.failed(model, failure)
        return effects

    def retire_unused(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for made in list(self._catalogue.deployments.values()):
            if made.phase is Phase.READY and self._answering.unused(made, now):
                effects += self.retire(made)
        return effects

    def next_deadlines(self) -> list[float]:
        times = [self._members.changed_at + limits.REPLAN_SETTLE_S]
        times += [
            made.since + limits.INSTALL_S
            for made in self._catalogue.deployments.values()
            if made.phase is Phase.INSTALLING
        ]
        if self._members.idle_since is not None:
            times += [
                self._members.patience_ends(o.asked.since)
                for o in self._catalogue.opening.values()
                if o.opened and o.call
            ]
        others = (self.fetching.next_deadline(), self._remembered.next_deadline())
        return [*times, *(time for time in others if time is not None)]


def _one_for(request: Request, candidates: tuple[Candidate, ...]) -> Candidate:
    """The device with the most memory, of those that the request has not ended yet if any is."""
    ended = {each.partition(":")[0] for each in request.crashes.values()}
    left = [c for c in candidates if c.device not in ended] or candidates
    return max(left, key=lambda c: c.facts.memory_bytes)


def _to(peer: str, message: m.AnyMessage) -> Send:
    return Send(Plane.CONTROL, peer, message)
