"""A model from opened to published, and again after a restart: its version is told once it is on
disk.

What cannot come back after a restart is withdrawn, loudly, and whoever asks for it is told why.
"""

from __future__ import annotations

from collections.abc import Callable

from meshinfer.protocol import messages as m
from meshinfer.scheduler.admission import refuse_model
from meshinfer.scheduler.answering import Answering
from meshinfer.scheduler.catalogue import Call, Catalogue, Deployment, Model
from meshinfer.scheduler.events import (
    BlobsFound,
    Effect,
    FindBlobs,
    ModelOpened,
    Note,
    OpenModel,
    Plane,
    Send,
)
from meshinfer.scheduler.fetching import Fetching
from meshinfer.scheduler.heads import Heads
from meshinfer.scheduler.journal import Journal
from meshinfer.scheduler.ledger import Ledger, Planned, Published
from meshinfer.scheduler.remembered import Remembered


class Publishing:
    """Mutable: owned by the coordinator's core. ``retire``: takes a deployment out of service.
    ``_plans``: of versions whose blobs are looked for."""

    def __init__(
        self,
        catalogue: Catalogue,
        answering: Answering,
        journal: Journal,
        heads: Heads,
        remembered: Remembered,
        retire: Callable[[Deployment], list[Effect]],
    ) -> None:
        self._catalogue = catalogue
        self._answering = answering
        self._journal = journal
        self._heads = heads
        self._remembered = remembered
        self._retire = retire
        self._plans: dict[int, list[Planned]] = {}
        self.fetching = Fetching(catalogue, self.failed)

    # --- a new version

    def deploy(self, peer: str, message: m.Deploy, now: float) -> list[Effect]:
        before = self._catalogue.asked(peer, message.call)
        if before is None or before.call is not None or before.answer is not None:
            return self.fetching.deploy(peer, message, now)
        # Deployed by an earlier coordinator, whose answer was lost with it.
        before.call = Call(peer, message.call, now)
        signature = before.default_signature()
        made = None if signature is None else self._catalogue.serving(before, signature)
        return [] if made is None and signature is not None else self._answer(before, made)

    def opened(self, event: ModelOpened, now: float) -> list[Effect]:
        if event.key in self._catalogue.resuming:
            return self._open_again(self._catalogue.resuming[event.key], event, now)
        model = self._catalogue.opening.get(event.key)
        if model is None:
            return []
        if event.failure is not None:
            return self.failed(model, event.failure)
        model.opened, model.inputs, model.image = True, event.inputs, event.image
        model.outputs = event.outputs
        failure = refuse_model(model)
        if failure is not None:
            return self.failed(model, failure)
        signature = model.default_signature()
        if signature is None:
            return self.serve(model, None)  # planned at the first request of a shape
        model.asked_for(signature)
        return []

    def serve(self, model: Model, made: Deployment | None) -> list[Effect]:
        """The model can be served: by its first plan, or by one for each shape that is asked."""
        if model.version:
            return self._answer(model, made)
        if model.reserved:  # this is being written
            return []
        self._catalogue.reserve(model)
        entry = Published(
            model.reserved, model.asked.peer, model.deploy, model.inputs, model.outputs, model.image
        )
        return self._journal.first_write(
            entry,
            lambda: self._publish(model, made),
            lambda failure: self.failed(model, failure),
        )

    def _publish(self, model: Model, made: Deployment | None) -> list[Effect]:
        self._catalogue.publish(model)
        return [*self._heads.superseded(model), *self._answer(model, made)]

    def failed(self, model: Model, failure: m.Failure) -> list[Effect]:
        """The model never came to be; what was planned for it is retired."""
        self._catalogue.opening.pop(model.key, None)
        effects: list[Effect] = []
        for made in list(self._catalogue.deployments.values()):
            if made.model is model:
                effects += self._retire(made)
        call, model.call = model.call, None
        if call is None:
            return effects
        answer = m.Deployed(call=call.name, name=model.name, failure=failure)
        return [*effects, _to(call.peer, answer)]

    def _answer(self, model: Model, made: Deployment | None) -> list[Effect]:
        call, model.call = model.call, None
        if call is None:
            return []
        model.answer = m.Deployed(
            call=call.name,
            name=model.name,
            version=model.version,
            plan=None if made is None else made.plan,
            report=None if made is None else made.report,
            image=model.image,
        )
        return [_to(call.peer, model.answer)]

    # --- an earlier version

    def resume(self, ledger: Ledger, now: float) -> list[Effect]:
        """Look for what an earlier coordinator served, what is current first. Requests may come
        meanwhile: what the models take is known."""
        self._remembered.begin(now)
        models = [
            (entry is not versions[-1], self._catalogue.resume(entry, now))
            for _, versions in sorted(ledger.models.items())
            for entry in versions
        ]
        models.sort(key=lambda each: each[0])
        effects: list[Effect] = []
        for _, model in models:
            plans = [
                plan
                for plan in ledger.plans.values()
                if (plan.name, plan.version) == (model.name, model.version)
            ]
            self._plans[model.key] = plans
            wanted = {*model.blobs, *(digest for plan in plans for digest in plan.blobs)}
            effects.append(FindBlobs(str(model.key), tuple(sorted(wanted))))
        return effects

    def found(self, event: BlobsFound, now: float) -> list[Effect]:
        model = self._catalogue.resuming.get(int(event.purpose))
        if model is None:
            return self.fetching.found(event, now)
        missing = set(event.missing)
        gone = missing & set(model.blobs)
        plans = self._plans.pop(model.key)
        if gone:
            what = f"{len(gone)} of its {len(model.blobs)} files are gone or damaged"
            return self._withdraw(model, what, now)
        for plan in plans:
            if not missing & plan.blobs:
                self._remembered.add(model, plan)
                model.asked_for(plan.signature)
        return [OpenModel(model.key, model.digest, model.image)]

    def _open_again(self, model: Model, event: ModelOpened, now: float) -> list[Effect]:
        if event.failure is not None:
            return self._withdraw(model, event.failure.message, now)
        del self._catalogue.resuming[event.key]
        model.opened = True
        signature = model.default_signature()
        if signature is not None:
            model.asked_for(signature)
        return []

    def _withdraw(self, model: Model, why: str, now: float) -> list[Effect]:
        what = f"{model.name} v{model.version} was deployed before a restart, but {why}"
        self._catalogue.withdraw(model, what)
        failure = m.Failure(error="ModelNotFound", message=what, hint="deploy it again")
        note = Note("error", "a model does not come back", {"model": model.name, "why": what})
        effects = self._answering.fail_waiting(model, None, failure, now)
        return [note, *effects, *self.failed(model, failure)]


def _to(peer: str, message: m.AnyMessage) -> Send:
    return Send(Plane.CONTROL, peer, message)
