"""The coordinator's core: admits peers, opens models, plans and installs, starts and ends requests.

After each event ``_advance`` runs the same short list of rules, so what happens next depends on the
state alone and not on the order in which it came about. No tensor passes through here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.admission import refuse, signature_of
from meshinfer.scheduler.catalogue import Catalogue, Deployment, Model, Phase
from meshinfer.scheduler.events import (
    Arrived,
    BlobsFound,
    BlobWritten,
    Effect,
    Event,
    FindBlobs,
    MakePlan,
    ModelOpened,
    Note,
    OpenModel,
    PeerLost,
    Plane,
    PlanReady,
    Send,
    ServeBlob,
    Signature,
    Stop,
    StopRequested,
    Ticked,
)
from meshinfer.scheduler.membership import EXCLUDED_S, Device, Membership
from meshinfer.scheduler.puller import Puller


@dataclass(slots=True)
class Request:
    """One accepted request, until its outcome."""

    id: str
    client: str
    model: Model
    signature: Signature
    submitted: float
    deadline: float
    attempt: int = 0
    deployment: Deployment | None = None
    started: float = 0.0
    merged: float | None = None
    kernel_failures: int = 0
    tasks: list[m.TaskTime] = field(default_factory=list)


class CoordinatorCore:
    """``handle`` is the only gate; ``next_deadline`` says when to tick."""

    def __init__(self, cluster: str, version: str, bulk: m.Peer) -> None:
        self.members = Membership(cluster, version)
        self.catalogue = Catalogue()
        self.requests: OrderedDict[str, Request] = OrderedDict()
        self._bulk = bulk
        self._answered: OrderedDict[str, m.Reply] = OrderedDict()
        self._puller = Puller()
        self._without_workers_since = 0.0
        self._stop_due: float | None = None
        self._now = 0.0

    # --- the gate

    def handle(self, event: Event, now: float) -> list[Effect]:
        self._now = now
        match event:
            case Arrived():
                effects = self._arrived(event, now)
            case Ticked():
                effects = self._tick(now)
            case PeerLost():
                effects = self._lost(event, now)
            case BlobsFound():
                effects = self._found(event, now)
            case BlobWritten():
                effects = self._written(event)
            case ModelOpened():
                effects = self._opened(event, now)
            case PlanReady():
                effects = self._planned(event, now)
            case StopRequested():
                effects = self._stop(now)
            case _:
                raise AssertionError(f"a coordinator has no use for {event}")
        return effects + self._advance(now)

    def next_deadline(self) -> float | None:
        """When to tick; only times that lie ahead, since each was dealt with when it came."""
        requests = self.requests.values()
        times = [r.deadline for r in requests]
        times += [r.merged + limits.TIMING_GRACE_S for r in requests if r.merged is not None]
        times += self._patience_ends()
        times.append(self.members.changed_at + limits.REPLAN_SETTLE_S + 0.001)
        for other in (self.members.next_deadline(), self._puller.next_deadline(), self._stop_due):
            if other is not None:
                times.append(other)
        return min((t for t in times if t > self._now), default=None)

    # --- messages

    def _arrived(self, event: Arrived, now: float) -> list[Effect]:
        message, peer = event.message, event.peer
        match message:
            case m.Heartbeat():
                return self._heartbeat(peer, message, now)
            case m.Hello():
                return self._hello(peer, message, now)
            case m.Submit():
                return self._submit(peer, message, now)
            case m.TaskDone():
                return self._task_done(peer, message)
            case m.Merged():
                return self._merged(message, now)
            case m.TaskFailed():
                return self._task_failed(message, now)
            case m.Cancel():
                request = self.requests.get(message.request)
                return [] if request is None else self._end(request, None)
            case m.Installed():
                return self._installed(peer, message, now)
            case m.Want():
                return [ServeBlob(peer, message.digest, message.offset, message.length)]
            case m.Chunk():
                return self._puller.arrived(peer, message, event.payload, now)
            case m.Gone():
                return self._blob_lost(message.digest, "the client has lost the model")
            case m.Deploy():
                model = self.catalogue.open(message, peer, now)
                return [FindBlobs(str(model.key), (model.digest,))]
            case m.ListDevices():
                devices = self.members.infos(now)
                return [_to(peer, m.Devices(call=message.call, devices=devices))]
            case m.ListModels():
                return [_to(peer, m.Models(call=message.call, models=self.catalogue.infos()))]
            case m.Goodbye():
                device = self.members.by_peer(peer)
                if device is not None:
                    device.draining = True
                    self.members.changed_at = now - limits.REPLAN_SETTLE_S
                return []
            case m.Probe() | m.Ack():
                return []
            case _:
                return [Note("warning", "unexpected message", {"type": type(message).__name__})]

    def _heartbeat(self, peer: str, message: m.Heartbeat, now: float) -> list[Effect]:
        if not self.members.heard(peer, message, now):
            return [_to(peer, m.Who())]
        return [_to(peer, m.Alive())] if peer in self.members.clients else []

    def _hello(self, peer: str, hello: m.Hello, now: float) -> list[Effect]:
        failure = self.members.refusal(hello, now)
        if failure is not None:
            return [
                _to(peer, m.Refused(failure=failure)),
                Note("warning", failure.message, {"hint": failure.hint}),
            ]
        effects: list[Effect] = []
        known = self.members.devices.get(hello.device)
        if hello.role == "worker" and known is not None:
            effects += self._device_lost(known, "it started again", now)
        self.members.admit(hello, peer, now)
        if hello.role == "worker":
            fields = {"device": hello.device, "engine": hello.facts.engine}
            effects.append(Note("info", "device joined", fields))
        head = self.members.head
        welcome = m.Welcome(
            coordinator=self._bulk.incarnation,
            protocol=min(hello.protocol[1], m.PROTOCOL[1]),
            bulk=self._bulk,
            head=None if head is None else head.bulk,
        )
        return [*effects, _to(peer, welcome)]

    # --- models

    def _found(self, event: BlobsFound, now: float) -> list[Effect]:
        model = self.catalogue.opening.get(int(event.purpose))
        if model is None or model.call is None:
            return []
        if event.missing:
            return self._puller.want(model.digest, model.call.peer, now)
        return [OpenModel(model.key, model.digest, model.image)]

    def _written(self, event: BlobWritten) -> list[Effect]:
        self._puller.done(event.digest)
        if event.failure is not None:
            return self._blob_lost(event.digest, event.failure.message)
        return [
            OpenModel(model.key, model.digest, model.image)
            for model in self.catalogue.opening.values()
            if model.digest == event.digest and not model.opened
        ]

    def _blob_lost(self, digest: str, why: str) -> list[Effect]:
        self._puller.done(digest)
        failure = m.Failure(
            error="InvalidInput", message=f"the model did not arrive: {why}", hint="deploy it again"
        )
        effects: list[Effect] = []
        for model in [o for o in self.catalogue.opening.values() if o.digest == digest]:
            effects += self._deploy_failed(model, failure)
        return effects

    def _opened(self, event: ModelOpened, now: float) -> list[Effect]:
        model = self.catalogue.opening.get(event.key)
        if model is None:
            return []
        if event.failure is not None:
            return self._deploy_failed(model, event.failure)
        model.opened, model.inputs, model.image = True, event.inputs, event.image
        signature = model.default_signature()
        if signature is None:
            self.catalogue.publish(model)  # planned at the first request of a shape
            return self._answer_deploy(model, None)
        model.signatures.append(signature)
        return []

    def _deploy_failed(self, model: Model, failure: m.Failure) -> list[Effect]:
        self.catalogue.opening.pop(model.key, None)
        call, model.call = model.call, None
        if call is None:
            return []
        return [_to(call.peer, m.Deployed(call=call.name, name=model.name, failure=failure))]

    def _answer_deploy(self, model: Model, deployment: Deployment | None) -> list[Effect]:
        call, model.call = model.call, None
        if call is None:
            return []
        answer = m.Deployed(
            call=call.name,
            name=model.name,
            version=model.version,
            plan=None if deployment is None else deployment.plan,
            report=() if deployment is None else deployment.report,
            image=model.image,
        )
        return [_to(call.peer, answer)]

    # --- plans

    def _plan(self, model: Model, signature: Signature, now: float) -> list[Effect]:
        head, candidates = self.members.head, self.members.candidates(now)
        assert head is not None and candidates
        names = tuple(c.device for c in candidates)
        members = {n: self.members.devices[n].peer for n in (*names, head.name)}
        made = self.catalogue.new_deployment(model, signature, members, names)
        return [
            MakePlan(
                deployment=made.number,
                digest=model.digest,
                image=model.image,
                signature=signature,
                candidates=candidates,
                head=head.name,
                plan=model.plan,
                spread=model.spread,
            )
        ]

    def _planned(self, event: PlanReady, now: float) -> list[Effect]:
        made = self.catalogue.deployments.get(event.deployment)
        if made is None or made.phase is not Phase.PLANNING:
            return []
        if event.failure is not None:
            return self._plan_failed(made, event.failure, now)
        made.plan, made.report, made.programs = event.plan, event.report, event.programs
        made.members = {n: made.members[n] for n in event.programs}
        made.phase, made.waiting = Phase.INSTALLING, set(event.programs)
        return [self._install(made, self.members.devices[name]) for name in sorted(event.programs)]

    def _install(self, made: Deployment, device: Device) -> Effect:
        programs = made.programs[device.name]
        receivers = {send.device for program in programs for send in program.sends}
        peers = tuple(self.members.devices[name].bulk for name in sorted(receivers))
        return _to(device.peer, m.Install(deployment=made.number, programs=programs, peers=peers))

    def _installed(self, peer: str, message: m.Installed, now: float) -> list[Effect]:
        made = self.catalogue.deployments.get(message.deployment)
        device = self.members.by_peer(peer)
        if made is None or device is None or made.phase is not Phase.INSTALLING:
            return []
        if message.failure is not None:
            device.excluded_until = now + EXCLUDED_S
            fields = {"device": device.name, "why": message.failure.message}
            note = Note("error", "a device could not prepare its programs", fields)
            if self.members.candidates(now):
                return [note, *self._retire(made)]
            return [note, *self._plan_failed(made, message.failure, now)]
        made.waiting.discard(device.name)
        if made.waiting:
            return []
        made.phase = Phase.READY
        model = made.model
        if not model.version:
            self.catalogue.publish(model)
        note = Note("info", "plan ready", {"model": model.name, "deployment": made.number})
        return [note, *self._answer_deploy(model, made)]

    def _plan_failed(self, made: Deployment, failure: m.Failure, now: float) -> list[Effect]:
        effects = self._retire(made)
        model, signature = made.model, made.signature
        if signature in model.signatures and model.call is None:
            model.signatures.remove(signature)
        for request in [
            r for r in self.requests.values() if r.model is model and r.signature == signature
        ]:
            effects += self._fail(request, failure, now)
        if model.call is not None:
            effects += self._deploy_failed(model, failure)
        return [Note("error", "no plan", {"model": model.name, "why": failure.message}), *effects]

    def _retire(self, made: Deployment) -> list[Effect]:
        """Take a deployment out of service; its requests start again under another."""
        made.phase = Phase.RETIRED
        self.catalogue.deployments.pop(made.number, None)
        for request in self.requests.values():
            if request.deployment is made:
                request.deployment = None
        return [
            _to(self.members.devices[name].peer, m.Forget(deployment=made.number))
            for name, peer in sorted(made.members.items())
            if name in self.members.devices and self.members.devices[name].peer == peer
        ]

    # --- requests

    def _submit(self, peer: str, message: m.Submit, now: float) -> list[Effect]:
        if message.request in self._answered:
            return [_to(peer, self._answered[message.request])]
        if message.request in self.requests:
            self.requests[message.request].client = peer
            return []
        failure = refuse(self.catalogue, message, len(self.requests))
        if self._stop_due is not None:
            failure = _unavailable("the coordinator is stopping", "submit to another, or later")
        if failure is not None:
            return [
                _to(peer, m.Reply(request=message.request, failure=failure)),
                *self._release(message.request),
            ]
        model = self.catalogue.find(message.model, message.version)
        assert model is not None
        remaining = min(message.deadline_s, limits.REQUEST_DEADLINE_S)
        signature = signature_of(message)
        self.requests[message.request] = Request(
            message.request, peer, model, signature, now, now + remaining
        )
        if signature in model.signatures:
            model.signatures.remove(signature)
        model.signatures.append(signature)
        return []

    def _begin(self, request: Request, made: Deployment, now: float) -> list[Effect]:
        request.attempt += 1
        request.deployment, request.merged, request.tasks = made, None, []
        request.started = request.started or now
        start = m.Start(
            request=request.id,
            attempt=request.attempt,
            deployment=made.number,
            client=request.client,
        )
        return [
            _to(made.members[name], start)
            for name, programs in sorted(made.programs.items())
            if any(p.model is None or not p.inputs for p in programs)
        ]

    def _task_done(self, peer: str, message: m.TaskDone) -> list[Effect]:
        request, device = self.requests.get(message.request), self.members.by_peer(peer)
        if device is not None:
            device.tasks_done += 1
        if request is None or device is None or request.attempt != message.attempt:
            return []
        request.tasks.append(
            m.TaskTime(
                device=device.name,
                place=message.place,
                compute_s=message.compute_s,
                sent_bytes=message.sent_bytes,
            )
        )
        return []

    def _merged(self, message: m.Merged, now: float) -> list[Effect]:
        request = self.requests.get(message.request)
        if request is not None and request.deployment is not None:
            request.merged = now  # any attempt's answer is right: tasks are pure
        return []

    def _task_failed(self, message: m.TaskFailed, now: float) -> list[Effect]:
        request = self.requests.get(message.request)
        if request is None or request.attempt != message.attempt:
            return []
        request.kernel_failures += 1
        request.deployment = None
        note = Note("error", "a task failed", {"request": request.id, "why": message.text})
        if request.kernel_failures < limits.KERNEL_FAILURES_PER_REQUEST:
            return [note]
        failure = m.Failure(
            error="InvalidInput",
            message=f"a kernel failed {request.kernel_failures} times: {message.text}",
            hint="run the model on this input in plain onnxruntime; it should fail there too",
        )
        return [note, *self._fail(request, failure, now)]

    def _complete(self, request: Request, now: float) -> list[Effect]:
        made = request.deployment
        assert made is not None and request.merged is not None
        reply = m.Reply(
            request=request.id,
            version=request.model.version,
            plan=made.plan,
            attempts=request.attempt,
            total_s=request.merged - request.submitted,
            queue_s=request.started - request.submitted,
            tasks=tuple(sorted(request.tasks, key=lambda t: t.place)),
        )
        return self._end(request, reply)

    def _fail(self, request: Request, failure: m.Failure, now: float) -> list[Effect]:
        reply = m.Reply(
            request=request.id,
            version=request.model.version,
            attempts=request.attempt,
            total_s=now - request.submitted,
            failure=failure,
        )
        return self._end(request, reply)

    def _end(self, request: Request, reply: m.Reply | None) -> list[Effect]:
        """The one way out of a request: its outcome, and release everywhere."""
        del self.requests[request.id]
        effects = self._release(request.id)
        if reply is not None:
            self._answered[request.id] = reply
            while len(self._answered) > limits.ANSWERED_IDS_KEPT:
                self._answered.popitem(last=False)
            effects.insert(0, _to(request.client, reply))
        return effects

    def _release(self, request: str) -> list[Effect]:
        return [
            _to(device.peer, m.Release(request=request))
            for _, device in sorted(self.members.devices.items())
        ]

    # --- loss, time, the end

    def _lost(self, event: PeerLost, now: float) -> list[Effect]:
        if not event.peer:  # some connection was reset: find out whose
            peers = [*(d.peer for d in self.members.devices.values()), *self.members.clients]
            return [_to(peer, m.Probe()) for peer in sorted(peers)]
        device = self.members.by_peer(event.peer)
        if device is not None:
            return self._device_lost(device, event.reason, now)
        if self.members.clients.pop(event.peer, None) is not None:
            return self._client_lost(event.peer)
        return []

    def _device_lost(self, device: Device, why: str, now: float) -> list[Effect]:
        self.members.remove(device, now)
        effects: list[Effect] = [
            Note("warning", "device lost", {"device": device.name, "why": why})
        ]
        for made in list(self.catalogue.deployments.values()):
            if device.name in made.members:
                effects += self._retire(made)
        return effects

    def _client_lost(self, peer: str) -> list[Effect]:
        effects: list[Effect] = []
        for digest in self._puller.forget_peer(peer):
            effects += self._blob_lost(digest, "the client is gone")
        for request in [r for r in self.requests.values() if r.client == peer]:
            effects += self._end(request, None)
        return effects

    def _tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for device in self.members.silent(now):
            why = f"no heartbeat for {limits.DEAD_AFTER_S} s"
            effects += self._device_lost(device, why, now)
        for peer in self.members.silent_clients(now):
            del self.members.clients[peer]
            effects += self._client_lost(peer)
        wants, failed = self._puller.due(now)
        effects += wants
        for digest in failed:
            effects += self._blob_lost(digest, "the client does not send it")
        return effects

    def _stop(self, now: float) -> list[Effect]:
        self._stop_due = now if self._stop_due is not None else now + limits.DRAIN_S
        return []

    # --- the rules

    def _advance(self, now: float) -> list[Effect]:
        effects = self._end_overdue(now)
        effects += self._end_merged(now)
        effects += self._plan_what_is_missing(now)
        effects += self._start_waiting(now)
        effects += self._retire_unused(now)
        effects += self._dismiss_drained()
        if self._stop_due is not None and (now >= self._stop_due or not self.requests):
            peers = [*(d.peer for d in self.members.devices.values()), *self.members.clients]
            effects += [_to(peer, m.Closing()) for peer in sorted(peers)]
            effects.append(Stop())
        return effects

    def _end_overdue(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for request in [r for r in self.requests.values() if r.deadline <= now]:
            failure = m.Failure(
                error="DeadlineExceeded",
                message=f"no answer within {request.deadline - request.submitted:.3g} s",
                hint="give a longer deadline_s, add devices, or submit less at once",
            )
            effects += self._fail(request, failure, now)
        return effects

    def _end_merged(self, now: float) -> list[Effect]:
        """Answer once the tasks' times are in too; they take another way than the tensors."""
        effects: list[Effect] = []
        for request in [r for r in self.requests.values() if r.merged is not None]:
            assert request.merged is not None
            if request.deployment is None:
                request.merged = None  # lost between merge and reply: it starts again
            elif (
                len(request.tasks) >= request.deployment.tasks
                or now >= request.merged + limits.TIMING_GRACE_S
            ):
                effects += self._complete(request, now)
        return effects

    def _patience_ends(self) -> list[float]:
        """When those who wait for a worker are told that there is none."""
        if not self._without_workers_since:
            return []
        since = [r.submitted for r in self.requests.values() if r.deployment is None]
        since += [o.call.since for o in self.catalogue.opening.values() if o.call and o.opened]
        grace = limits.NO_WORKER_GRACE_S + 0.001
        return [max(s, self._without_workers_since) + grace for s in since]

    def _plan_what_is_missing(self, now: float) -> list[Effect]:
        candidates = self.members.candidates(now)
        if self.members.head is None or not candidates:
            if not self._without_workers_since:
                self._without_workers_since = now
            return self._give_up_without_workers(now)
        self._without_workers_since = 0.0
        names = tuple(c.device for c in candidates)
        settled = now >= self.members.changed_at + limits.REPLAN_SETTLE_S
        effects: list[Effect] = []
        for model in self.catalogue.all_models():
            del model.signatures[: -limits.SHAPES_PER_MODEL]
            for signature in model.signatures if model.opened else ():
                if self.catalogue.coming(model, signature) is not None:
                    continue
                serving = self.catalogue.serving(model, signature)
                if serving is None or (settled and serving.candidates != names):
                    effects += self._plan(model, signature, now)
        return effects

    def _give_up_without_workers(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        failure = _unavailable(
            "no worker that can compute is in the cluster",
            "start one with meshinfer worker, and look at meshinfer devices",
        )
        patience = limits.NO_WORKER_GRACE_S
        for request in list(self.requests.values()):
            since = max(request.submitted, self._without_workers_since)
            if request.deployment is None and now - since > patience:
                effects += self._fail(request, failure, now)
        for model in [o for o in self.catalogue.opening.values() if o.opened and o.call]:
            assert model.call is not None
            if now - max(model.call.since, self._without_workers_since) > patience:
                effects += self._deploy_failed(model, failure)
        return effects

    def _start_waiting(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        running = sum(r.deployment is not None for r in self.requests.values())
        for request in list(self.requests.values()):
            if running >= limits.RUNNING_REQUESTS:
                break
            if request.deployment is not None:
                continue
            made = self.catalogue.serving(request.model, request.signature)
            if made is None:
                continue
            if request.attempt >= limits.ATTEMPTS_PER_REQUEST:
                failure = m.Failure(
                    error="WorkerLost",
                    message=f"its devices were lost {request.attempt} times",
                    hint="look at meshinfer devices; the devices or their network are failing",
                )
                effects += self._fail(request, failure, now)
                continue
            effects += self._begin(request, made, now)
            running += 1
        return effects

    def _retire_unused(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        used = {r.deployment.number for r in self.requests.values() if r.deployment is not None}
        for made in list(self.catalogue.deployments.values()):
            wanted = made.signature in made.model.signatures
            newest = self.catalogue.serving(made.model, made.signature) is made
            if made.phase is Phase.READY and made.number not in used and not (wanted and newest):
                effects += self._retire(made)
        return effects

    def _dismiss_drained(self) -> list[Effect]:
        return [
            _to(device.peer, m.Dismiss())
            for device in self.members.devices.values()
            if device.draining
            and not any(device.name in d.members for d in self.catalogue.deployments.values())
        ]


def _to(peer: str, message: m.AnyMessage) -> Send:
    return Send(Plane.CONTROL, peer, message)


def _unavailable(message: str, hint: str) -> m.Failure:
    return m.Failure(error="ClusterUnavailable", message=message, hint=hint, retry_after_s=5.0)
