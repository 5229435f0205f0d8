"""On-device: a client on a device's host computes its requests itself where the plan is one task.

DESIGN 4's first mode. The coordinator grants it and takes it back; the client fetches the task's
program beside its other work, and tells what it has computed. Nothing else is asked for a request:
on a small model the way to another process and back costs more than the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.catalogue import Deployment
from meshinfer.scheduler.events import (
    Array,
    BlobsFound,
    BlobWritten,
    Effect,
    Granted,
    Lease,
    Prepare,
    RanHere,
    Send,
)
from meshinfer.scheduler.installing import Deployment as Told
from meshinfer.scheduler.installing import Installing
from meshinfer.scheduler.membership import Device
from meshinfer.scheduler.recipe import Gathering, Recipe
from meshinfer.scheduler.telling import told


def only_task(made: Deployment) -> tuple[str, m.Program] | None:
    """The device and the program of a plan that is one task; None for any other plan, and where its
    device is lost."""
    found = [(name, p) for name, ps in sorted(made.programs.items()) for p in ps if p.model]
    alone = len(found) == 1 and not found[0][1].free and not made.spares.moved
    return found[0] if alone else None


def has_room(made: Deployment, device: Device) -> bool:
    """Whether the device's memory holds the task twice: its worker keeps what it has."""
    own, others = made.held(device.name)
    room = made.room(device.name, device.hello.facts.memory_bytes)
    return not room or 2 * own + others <= room


def grant(made: Deployment, device: Device, task: m.Program, header: m.Submit) -> m.Grant:
    """What a client on the device's host needs to answer requests like this one."""
    return m.Grant(
        deployment=made.number,
        device=device.name,
        program=task,
        model=made.model.name,
        version=made.model.version,
        inputs=header.inputs,
        picture=header.picture,
        outputs=header.outputs,
        image=made.model.image,
        plan=made.plan,
        engine=device.hello.facts.engine,
        threads=device.hello.facts.threads,
    )


@dataclass(frozen=True, slots=True)
class OwnTask:
    """All that answers a request here, but for the kernels."""

    grant: m.Grant
    source: Recipe | None
    task: Recipe
    sink: Recipe

    @staticmethod
    def of(grant: m.Grant, head: Told) -> OwnTask:
        """``head``: the source's and the sink's programs, which the client has already."""
        without = [r for r in head.recipes.values() if r.program.model is None]
        source = next((r for r in without if r.program.sends), None)
        sink = next(r for r in without if not r.program.sends)
        return OwnTask(grant, source, Recipe.of(grant.program), sink)

    def serves(
        self,
        version: int | None,
        inputs: Sequence[m.Tensor],
        picture: bool,
        outputs: tuple[str, ...] | None,
    ) -> bool:
        """Whether it is for such requests."""
        return (
            version in (None, self.grant.version)
            and (picture, outputs) == (self.grant.picture, self.grant.outputs)
            and set(inputs) == set(self.grant.inputs)
        )

    def run(
        self,
        inputs: Mapping[str, Array],
        kernels: Callable[[Mapping[str, Array]], Sequence[Array]],
    ) -> dict[str, Array]:
        """The outputs by name, some perhaps views of the inputs. Raises what ``kernels`` raises."""
        gathered, merged = Gathering(self.task), Gathering(self.sink)
        places = {self.task.program.place: gathered, self.sink.program.place: merged}
        if self.source is not None:
            values = [inputs[output.name] for output in self.source.program.outputs]
            for cut in self.source.cuts:
                places[cut.send.consumer].put(cut.send.slot, cut.kept(values))
        results = kernels(gathered.inputs())
        for cut in self.task.cuts:
            places[cut.send.consumer].put(cut.send.slot, cut.kept(results))
        return merged.inputs()

    def reply(self, request: str, total_s: float, compute_s: float) -> m.Reply:
        """The outcome, as the coordinator would tell it."""
        place, device = self.task.program.place, self.grant.device
        took = m.TaskTime(place=place, device=device, compute_s=compute_s, sent_bytes=0)
        return m.Reply(
            request=request,
            version=self.grant.version,
            plan=self.grant.plan,
            attempts=1,
            total_s=total_s,
            image=self.grant.image,
            tasks=(took,),
        )


class OnDevice:
    """The client's part. Mutable: owned by its core."""

    def __init__(self) -> None:
        self._installing = Installing("")
        self._coming: dict[int, OwnTask] = {}
        self._heard = 0.0

    def told(
        self, message: m.Grant | m.Revoke, heads: Mapping[int, Told], now: float
    ) -> list[Effect]:
        """``heads``: where the client is source and sink itself, by deployment."""
        self._heard, number = now, message.deployment
        if isinstance(message, m.Revoke):
            return self.revoked(number)
        if number not in heads:  # it is forgotten already
            return []
        self._coming[number] = OwnTask.of(message, heads[number])
        # Here somebody waits for it.
        program = structs.replace(message.program, spare=False, devices=())
        fetch = m.Install(deployment=number, programs=(program,), peers=())
        return self._settled(self._installing.install(fetch))

    def revoked(self, deployment: int) -> list[Effect]:
        self._coming.pop(deployment, None)
        return self._installing.forget(deployment)

    def reset(self) -> list[Effect]:
        """The coordinator knows nothing of it any more."""
        self._coming.clear()
        return self._installing.reset()

    def heard(self, now: float) -> list[Effect]:
        """The coordinator was heard: had it taken anything back, it would be known."""
        self._heard = now
        return [self._lease()] if self._installing.deployments else []

    def _lease(self) -> Lease:
        return Lease(self._heard + limits.DEAD_AFTER_S)

    def handle(
        self, event: BlobsFound | BlobWritten | RanHere, bulk: m.Peer | None, now: float
    ) -> list[Effect]:
        """``bulk``: the coordinator's, while it is known."""
        match event:
            case BlobsFound():
                found = [] if bulk is None else self._installing.found(event, bulk, now)
                return self._settled(found)
            case BlobWritten():
                return self._settled(self._installing.written(event, now))
            case RanHere():
                return self._ran(event)
            case _:
                assert_never(event)

    def _ran(self, event: RanHere) -> list[Effect]:
        deployment = self._installing.deployments.get(event.deployment)
        if deployment is None:  # taken back meanwhile: nobody counts it any more
            return []
        place = next(iter(deployment.programs))
        done = m.Done(place=place, compute_s=event.compute_s, sent_bytes=0)
        return [told(m.Ran(deployment=event.deployment, count=event.count, done=done))]

    def arrived(
        self, peer: str, message: m.Chunk | m.Gone, data: memoryview, now: float
    ) -> list[Effect]:
        """Of a blob that was asked for."""
        if isinstance(message, m.Chunk):
            return self._installing.chunk(peer, message, data, now)
        return self._settled(self._installing.gone(peer, message.digest, now))

    def hasten(self, peer: str, now: float) -> None:
        self._installing.connection_cut(peer, now)

    def due(self, now: float) -> list[Effect]:
        return self._settled(self._installing.due(now))

    def next_deadline(self) -> float | None:
        return self._installing.next_deadline()

    def _settled(self, effects: list[Effect]) -> list[Effect]:
        """What a device would tell the coordinator is settled here: it asked for nothing."""
        found: list[Effect] = []
        for effect in effects:
            if isinstance(effect, Prepare):
                own = self._coming.pop(effect.deployment)
                found += [Granted(effect.deployment, own), self._lease()]
            elif isinstance(effect, Send) and isinstance(effect.message, m.Installed):
                self._coming.pop(effect.message.deployment, None)  # requests go on by the cluster
                found += self._installing.forget(effect.message.deployment)
            else:
                found.append(effect)
        return found
