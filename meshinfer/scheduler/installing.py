"""A device's deployments: fetch what their programs lack, prepare them, say so, forget them.

A deployment number is never used twice, so word of a forgotten one is recognised and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import (
    BlobsFound,
    BlobWritten,
    Connect,
    Discard,
    Disconnect,
    Effect,
    FindBlobs,
    Prepare,
    Prepared,
)
from meshinfer.scheduler.puller import Puller
from meshinfer.scheduler.recipe import Recipe
from meshinfer.scheduler.telling import told


@dataclass(slots=True)
class Deployment:
    """``peers``: device -> peer id, for what the programs send; ``head``: the plan's source and
    sink; ``keep_bytes``: as in ``Install``; ``makers``: of each task, who may send what it makes;
    ``missing``: blobs to come, as soon as the store has been asked (``looking`` until then);
    ``to_load``: programs to prepare once these are here; ``parts``: of it that were told of;
    ``gentle``: what is still to come is for others, this device's own part serves or there is none;
    ``odd``: tasks whose results are not all finite, as was told."""

    programs: dict[m.Place, m.Program] = field(default_factory=dict)
    recipes: dict[m.Place, Recipe] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    head: str = ""
    keep_bytes: int = limits.KEPT_BYTES
    makers: dict[m.Place, tuple[str, ...]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    looking: bool = False
    to_load: list[m.Program] = field(default_factory=list)
    parts: int = 0
    gentle: bool = False
    odd: set[m.Place] = field(default_factory=set)

    def add(self, message: m.Install, device: str) -> None:
        """The programs come in two parts: this device's own, then those that it may take over."""
        for program in message.programs:
            self.programs[program.place] = program
            self.recipes[program.place] = Recipe.of(program)
        computing = [p for p in message.programs if p.model is not None]
        self.to_load += computing
        self.peers |= {peer.device: peer.id for peer in message.peers}
        self.makers |= dict(message.makers)
        self.head, self.keep_bytes = message.head, message.keep_bytes
        spare = all(p.spare and not p.is_own(device) for p in computing)
        self.gentle = self.parts > 0 or (bool(computing) and spare)
        self.parts += 1

    @property
    def has_spares_to_load(self) -> bool:
        return bool(self.gentle and self.to_load and not self.missing and not self.looking)

    def may_send(self, peer: str, consumer: m.Place, slot: int, head: str) -> bool:
        """Whether such a piece is a peer's to send: a task's is of the devices that have it, the
        source's is also of the client ``head`` that stands there."""
        recipe = self.recipes.get(consumer)
        awaited = None if recipe is None else recipe.slots.get(slot)
        if awaited is None:
            return False
        device = peer.partition("#")[0]
        its = device in self.makers.get(awaited.producer, ())
        return its or (awaited.producer[0] < 0 and peer == head)


class Installing:
    """Mutable: owned by the worker's core."""

    def __init__(self, device: str) -> None:
        self.deployments: dict[int, Deployment] = {}
        self._device = device
        self._connected: dict[str, str] = {}
        self._puller = Puller()
        self._spare: int | None = None
        """Of which deployment a spare task is being prepared."""
        self._slot_at = 0.0
        self._spares_from = self._spares_by = 0.0
        """When the next one may be begun: as a request begins or while none runs; in any case."""
        self._awaits_turn = False

    @property
    def idle(self) -> bool:
        return not self._puller

    @property
    def preparing(self) -> bool:
        """Whether a task of another device is being prepared: what runs meanwhile takes longer."""
        return self._spare is not None

    def install(self, message: m.Install) -> list[Effect]:
        self.deployments.setdefault(message.deployment, Deployment()).add(message, self._device)
        digests = {
            digest
            for program in message.programs
            if program.model is not None
            for digest in (program.model, *program.weights)
        }
        effects = self.connect(message.peers)
        if not digests:
            return [*effects, told(m.Installed(deployment=message.deployment))]
        self.deployments[message.deployment].looking = True
        return [*effects, FindBlobs(str(message.deployment), tuple(sorted(digests)))]

    def connect(self, peers: tuple[m.Peer, ...]) -> list[Effect]:
        """A device that has started anew is another peer; the old one never comes back."""
        effects: list[Effect] = []
        for peer in peers:
            if peer.device == self._device:
                continue
            old = self._connected.get(peer.device, peer.id)
            if old != peer.id:
                effects.append(Disconnect(old))
            self._connected[peer.device] = peer.id
            effects.append(Connect(peer))
        return effects

    def leave(self) -> list[Effect]:
        """Nobody here needs the other devices any more."""
        apart: list[Effect] = [Disconnect(peer) for peer in self._connected.values()]
        self._connected.clear()
        return apart

    def found(self, event: BlobsFound, coordinator: m.Peer, now: float) -> list[Effect]:
        number = int(event.purpose)
        deployment = self.deployments.get(number)
        if deployment is None:
            return []
        deployment.missing, deployment.looking = set(event.missing), False
        if not deployment.missing:
            return self._load(number, deployment, now)
        effects: list[Effect] = []
        for digest in event.missing:
            effects += self._puller.want(digest, coordinator.id, now, gentle=deployment.gentle)
        return effects

    def chunk(
        self, peer: str, chunk: m.Chunk, data: memoryview, now: float, *, busy: bool = False
    ) -> list[Effect]:
        """``busy``: requests run here meanwhile."""
        return self._puller.arrived(peer, chunk, data, now, busy=busy)

    def written(self, event: BlobWritten, now: float) -> list[Effect]:
        self._puller.done(event.digest)
        if event.failure is not None:
            return self._blob_failed(event.digest, event.failure.message)
        effects: list[Effect] = []
        for number, deployment in self.deployments.items():
            if event.digest in deployment.missing:
                deployment.missing.discard(event.digest)
                if not deployment.missing:
                    effects += self._load(number, deployment, now)
        return effects

    def gone(self, peer: str, digest: str, now: float) -> list[Effect]:
        """The coordinator does not hand it out, as it says."""
        asked = self._puller.gone(peer, digest, now)
        if asked is None:
            return self._blob_failed(digest, "the coordinator has lost it")
        return asked

    def _blob_failed(self, digest: str, why: str, error: str = "MeshInferError") -> list[Effect]:
        """No deployment that needs this blob can be prepared."""
        self._puller.done(digest)
        failure = m.Failure(error=error, message=f"blob {digest[:12]}: {why}")
        effects: list[Effect] = []
        for number, deployment in self.deployments.items():
            if digest in deployment.missing:
                deployment.to_load.clear()
                effects.append(told(m.Installed(deployment=number, failure=failure)))
        return effects

    def _load(self, number: int, deployment: Deployment, now: float) -> list[Effect]:
        """All blobs are here: prepare this device's own part at once; what it may take over for
        others, task by task."""
        if deployment.gentle:
            return self._load_spare(now)
        programs = tuple(deployment.to_load)
        deployment.to_load.clear()
        return [Prepare(number, programs)]

    def begins(self, attempt: int, now: float) -> list[Effect]:
        """A request begins here. Its other devices count attempts as we do, so that those whose
        pause is over prepare in the same one, if they can: two at a time slow it down no more than
        the slower of them, but two in turn do."""
        turn = attempt % limits.SPARE_EVERY == 0 and now >= self._spares_from
        return self._load_spare(now, turn=turn)

    def _load_spare(self, now: float, *, turn: bool = False) -> list[Effect]:
        """One at a time: what somebody waits for then waits for one session, and requests that run
        here meanwhile get the processor in between. A lower priority would not do: under a quota
        whoever runs while tasks wait for their pieces takes from what these get afterwards."""
        if self._spare is not None or not (turn or now >= self._spares_by):
            return []
        self._slot_at = now
        return self._next_spare()

    def _next_spare(self) -> list[Effect]:
        for number, deployment in self.deployments.items():
            if deployment.has_spares_to_load:
                self._spare = number
                return [Prepare(number, (deployment.to_load.pop(0),))]
        return []

    def prepared(self, event: Prepared, now: float, *, busy: bool) -> list[Effect]:
        """``busy``: requests run here meanwhile."""
        effects = self._loaded(event.deployment, event.failure)
        if self._spare != event.deployment:
            return [*effects, *self._load_spare(now)]
        self._spare = None
        took_s = now - self._slot_at
        if not busy:
            self._spares_from = self._spares_by = self._slot_at = now
        if (took_s < limits.SPARE_SLOT_S or not busy) and (more := self._next_spare()):
            return [*effects, *more]
        if busy:
            self._spares_from = now + limits.SPARE_PAUSE_TIMES * took_s
            self._spares_by = self._spares_from + limits.SPARE_TURN_S
            self._awaits_turn = False
        return effects

    def _loaded(self, number: int, failure: m.Failure | None) -> list[Effect]:
        deployment = self.deployments.get(number)
        if deployment is None:
            return [Discard(number)]
        if failure is not None:
            deployment.to_load.clear()
        return [] if deployment.to_load else [told(m.Installed(deployment=number, failure=failure))]

    def forget(self, number: int) -> list[Effect]:
        deployment = self.deployments.pop(number, None)
        if deployment is None:
            return []
        others = [d.missing for d in self.deployments.values()]
        for digest in sorted(deployment.missing.difference(*others)):
            self._puller.done(digest)
        return [Discard(number)]

    def reset(self) -> list[Effect]:
        """The coordinator knows nothing of what was installed."""
        self._puller.clear()
        effects: list[Effect] = [Discard(number) for number in self.deployments]
        self.deployments.clear()
        return effects

    def connection_cut(self, peer: str, now: float) -> None:
        self._puller.hasten(peer, now)

    def due(self, now: float, *, busy: bool = False) -> list[Effect]:
        """``busy``: requests run here."""
        effects, failed = self._puller.due(now)
        for digest in failed:
            why = "the coordinator does not send it"
            effects += self._blob_failed(digest, why, "ClusterUnavailable")
        self._awaits_turn = now >= self._spares_from
        return effects + self._load_spare(now, turn=self._awaits_turn and not busy)

    def next_deadline(self) -> float | None:
        due = self._puller.next_deadline()
        if self._spare is None and any(d.has_spares_to_load for d in self.deployments.values()):
            spares = self._spares_by if self._awaits_turn else self._spares_from
            return spares if due is None else min(due, spares)
        return due
