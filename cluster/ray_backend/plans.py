"""Models and the plans that serve them on Ray: opened, planned and installed one after another.

By the process that plans for a coordinator (``cluster.planning``); what is to be done next depends
on the state alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from cluster.blobs import BlobStore
from cluster.planning import PlannerProcess
from cluster.ray_backend.nodes import HEAD, Nodes
from cluster.ray_backend.serving import Serving, install, own_programs, spare_programs
from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, MeshInferError
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import error_of, failure_of
from meshinfer.scheduler.admission import refuse_model
from meshinfer.scheduler.calls import calls_of
from meshinfer.scheduler.catalogue import Catalogue, Model, with_notes
from meshinfer.scheduler.events import MakePlan, ModelOpened, OpenModel, PlanReady, Signature

LOOK_S = 0.5
_log = logging.getLogger("meshinfer.ray")
_END_S = 2.0

Key = tuple[int, Signature]


@dataclass(frozen=True, slots=True)
class _Failed:
    """No plan could be made for these devices."""

    failure: m.Failure
    candidates: tuple[str, ...]


class Plans:
    """Mutable, under ``changed``; what has an underscore is the plans' own thread's."""

    def __init__(
        self, ray: Any, store: BlobStore, nodes: Nodes, changed: threading.Condition
    ) -> None:
        self._ray, self._store, self._nodes, self._changed = ray, store, nodes, changed
        self.catalogue = Catalogue()
        self._serving: dict[Key, Serving] = {}
        self._failed: dict[Key, _Failed] = {}
        self._tries: dict[Key, int] = {}
        self._numbers = 0
        self._closed = False
        self._process = PlannerProcess(store, "error", "text")
        self._thread = threading.Thread(target=self._run, name="ray-plans", daemon=True)
        self._thread.start()

    # --- under the lock

    def find(self, key: Key) -> Serving | None:
        """What serves now; what cannot any more is retired."""
        found = self._serving.get(key)
        if found is not None and not found.is_whole(self._nodes.is_current):
            self._retire(key)
            return None
        return found

    def refuse(self, key: Key) -> None:
        """Raise why there is no plan for who is there, if that was tried."""
        failed = self._failed.get(key)
        if failed is not None and failed.candidates == tuple(self._nodes.ready()):
            raise error_of(failed.failure)

    def infos(self) -> tuple[m.ModelInfo, ...]:
        found = []
        for info in self.catalogue.infos():
            plans = tuple(
                s.made.plan
                for s in self._serving.values()
                if (s.model.name, s.model.version) == (info.name, info.version)
            )
            found.append(structs.replace(info, plans=plans))
        return tuple(found)

    def over(self, serving: Serving) -> None:
        """A request does not use it any more."""
        serving.running -= 1
        if serving.retired and not serving.running:
            self._forget(serving)

    # --- the end

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._process.close()
        self._thread.join(timeout=_END_S)
        self._process.close_pipes()

    # --- inside

    def _run(self) -> None:
        while True:
            with self._changed:
                job = self._next()
                while job is None and not self._closed:
                    self._changed.wait(LOOK_S)
                    job = self._next()
                if self._closed:
                    return
                assert job is not None
            try:
                job()
            except Exception as error:  # Ray's, of a cluster that is going
                _log.error("a plan could not be made", exc_info=error)
                time.sleep(LOOK_S)

    def _next(self) -> Callable[[], None] | None:
        """What is to be done next, the most urgent first."""
        for model in self.catalogue.opening.values():
            if not model.opened:
                return lambda model=model: self._open(model)  # type: ignore[misc]
        models = {model.key: model for model in self.catalogue.all_models()}
        for key in [k for k in self._serving if k[0] not in models]:
            self._retire(key)
        names = tuple(self._nodes.ready())
        wanted = [(m_, s) for m_ in models.values() if m_.opened for s in m_.signatures]
        for key in [(model.key, s) for model, s in wanted]:
            found = self._serving.get(key)
            if found is not None and not found.is_whole(self._nodes.is_current):
                self._retire(key)
        for model, signature in wanted:
            key = (model.key, signature)
            failed = self._failed.get(key)
            tried = failed is not None and failed.candidates == names
            if names and key not in self._serving and not tried:
                return lambda m_=model, s=signature: self._plan(m_, s)  # type: ignore[misc]
        for found in self._serving.values():
            if not found.spares_tried:
                return lambda found=found: self._stand_by(found)  # type: ignore[misc]
        if time.monotonic() < self._nodes.changed_at + limits.REPLAN_SETTLE_S:
            return None
        for model, signature in wanted:
            found = self._serving.get((model.key, signature))
            if found is not None and found.candidates != names:
                return lambda m_=model, s=signature: self._plan(m_, s)  # type: ignore[misc]
        return None

    def _open(self, model: Model) -> None:
        event = self._process.perform(
            OpenModel(model.key, model.digest, model.image), lambda: False
        )
        with self._changed:
            if event is None or self._closed:
                return
            assert isinstance(event, ModelOpened)
            model.opened = True
            failure = event.failure
            if failure is None:
                model.inputs, model.image, model.outputs = event.inputs, event.image, event.outputs
                failure = refuse_model(model)
            if failure is not None:
                return self._answer(model, m.Deployed(call="deploy", failure=failure))
            signature = model.default_signature()
            if signature is None:
                return self._publish(model, None)  # planned at the first request of a shape
            model.asked_for(signature)

    def _plan(self, model: Model, signature: Signature) -> None:
        """Plan for who is there, install, and let it serve."""
        key = (model.key, signature)
        with self._changed:
            present = self._serving.get(key)
            candidates, actors = self._nodes.candidates(), {}
            for name, node in self._nodes.ready().items():
                actors[name] = node.actor
            names = tuple(actors)
        if not names:
            return
        self._numbers += 1
        effect = self._effect(model, signature, candidates, present)
        made = self._process.perform(effect, lambda: False)
        if made is None:  # closed
            return
        assert isinstance(made, PlanReady)
        if made.kept and present is not None:
            present.candidates = names
            return
        failure = made.failure
        if failure is None:
            programs = own_programs(made)
            failed = install(self._ray, self._store, effect.deployment, programs, actors)
            if failed:
                return self._not_installed(model, signature, actors, failed)
        with self._changed:
            self._tries.pop(key, None)
            if failure is not None:
                return self._no_plan(model, signature, names, failure, present)
            if made.report is not None and present is None:
                made = _with_notes(made, tuple(self._nodes.left_out()))
            calls = calls_of(made.programs)
            self._retire(key)
            self._serving[key] = Serving(
                effect.deployment, model, signature, names, made, calls, actors
            )
            self._failed.pop(key, None)
            _log.info("plan %d of %s is ready", effect.deployment, model.name)
            if not model.version:
                self._publish(model, made)
            self._changed.notify_all()

    def _effect(
        self, model: Model, signature: Signature, candidates: Any, present: Serving | None
    ) -> MakePlan:
        return MakePlan(
            deployment=self._numbers,
            digest=model.digest,
            image=model.image,
            signature=signature,
            candidates=candidates,
            head=HEAD,
            plan=_given_plan(model, {HEAD, *(c.device for c in candidates)}),
            objective=model.objective,
            spread=model.spread,
            strict=model.strict,
            present=None if present is None else present.made.plan,
            head_host=self._nodes.own,
            memory=model.memory,
            half_transfers=model.half_transfers,
            tell_loss=not model.version,
        )

    def _not_installed(
        self, model: Model, signature: Signature, actors: Any, failed: dict[str, Exception]
    ) -> None:
        """Who could not prepare is left out; what several cannot is the model's fault."""
        key = (model.key, signature)
        with self._changed:
            self._tries[key] = self._tries.get(key, 0) + 1
            for name, error in failed.items():
                _log.warning("%s could not prepare its programs: %s", name, error)
                if isinstance(error, MeshInferError):
                    self._nodes.exclude(name, error.message)
                else:
                    self._nodes.lost(name, actors[name], str(error).splitlines()[0])
            if self._tries[key] < limits.INSTALL_ATTEMPTS:
                return
            del self._tries[key]
            error = next(iter(failed.values()))
            if not isinstance(error, MeshInferError):
                error = ClusterUnavailable(str(error), hint="look at ray status")
            self._no_plan(model, signature, tuple(self._nodes.ready()), failure_of(error), None)

    def _no_plan(
        self,
        model: Model,
        signature: Signature,
        names: tuple[str, ...],
        failure: m.Failure,
        present: Serving | None,
    ) -> None:
        if present is not None:  # it stays; these devices were tried
            present.candidates = names
            return
        while len(self._failed) >= limits.MODELS:
            self._failed.pop(next(iter(self._failed)))
        self._failed[model.key, signature] = _Failed(failure, names)
        if not model.version:
            self._answer(model, m.Deployed(call="deploy", failure=failure))
        self._changed.notify_all()

    def _stand_by(self, serving: Serving) -> None:
        """Have tasks prepared a second time, for the loss of a device."""
        serving.spares_tried = True
        programs = spare_programs(serving.made)
        with self._changed:
            ready = self._nodes.ready()
            actors = {n: ready[n].actor for n in programs if n in ready}
        here = {name: programs[name] for name in actors}
        failed = install(self._ray, self._store, serving.number, here, actors)
        with self._changed:
            for name in actors.keys() - failed.keys():
                serving.actors.setdefault(name, actors[name])
                serving.spares |= {(p.place, name) for p in programs[name]}

    # --- models, under the lock

    def _publish(self, model: Model, made: PlanReady | None) -> None:
        if model.key not in self.catalogue.opening:  # who deployed it has given up
            return
        self.catalogue.reserve(model)
        self.catalogue.publish(model)
        self._answer(
            model,
            m.Deployed(
                call="deploy",
                name=model.name,
                version=model.version,
                plan=None if made is None else made.plan,
                report=None if made is None else made.report,
                image=model.image,
            ),
        )

    def _answer(self, model: Model, answer: m.Deployed) -> None:
        self.catalogue.opening.pop(model.key, None)
        model.answer = answer
        self._changed.notify_all()

    def _retire(self, key: Key) -> None:
        serving = self._serving.pop(key, None)
        if serving is not None:
            serving.retired = True
            if not serving.running:
                self._forget(serving)

    def _forget(self, serving: Serving) -> None:
        for name, actor in serving.actors.items():
            if self._nodes.is_current(name, actor):
                actor.forget.remote(serving.number)


def _with_notes(made: PlanReady, notes: tuple[str, ...]) -> PlanReady:
    assert made.report is not None
    return replace(made, report=with_notes(made.report, notes)) if notes else made


def _given_plan(model: Model, here: set[str]) -> str | None:
    """The user's plan; once the model serves, only while the plan's devices are here."""
    if model.plan is None or not model.version:
        return model.plan
    plan = Plan.parse(model.plan)
    return model.plan if {*plan.devices(), plan.source, plan.sink} <= here else None
