"""A device's requests: gather the pieces of each task, compute when the last is here, send on.

Whatever belongs to an older attempt, a retired deployment or a released request is acknowledged and
dropped: tasks are pure, and the coordinator has started, or will start, what is still wanted. What
belongs to an attempt that the coordinator has not told of waits aside: members may say anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, array_of, describe, digest_of, payload_of
from meshinfer.scheduler.acks import AckBox
from meshinfer.scheduler.aside import AheadKey, Aside
from meshinfer.scheduler.comparing import doubts
from meshinfer.scheduler.events import Array, Compute, Computed, Effect, Note
from meshinfer.scheduler.giving import Giving
from meshinfer.scheduler.held import Held
from meshinfer.scheduler.holding import Holding
from meshinfer.scheduler.installing import Deployment
from meshinfer.scheduler.links import LinkWatch
from meshinfer.scheduler.outbox import Numbered, Outbox
from meshinfer.scheduler.recipe import SOURCE, Cut, Gathering
from meshinfer.scheduler.shares import Shares, of_ahead
from meshinfer.scheduler.telling import task_failed, told, told_done, told_lacked, unreachable


class Computing:
    """Mutable: owned by a worker's or a client's core. ``deployments``: what is installed, a view.

    ``own``: the client that this is itself, if it is one; ``merged`` gets the answers to it.
    ``granted_bytes``: of this device's memory; ``ahead``: the room in it of what comes before the
    coordinator's word, pieces or samples. ``wasted``: tasks that were done when nobody wanted
    them any more.
    """

    def __init__(
        self,
        device: str,
        deployments: Mapping[int, Deployment],
        own: str = "",
        merged: Callable[[str, int, dict[str, Array]], list[Effect]] = lambda *_: [],
        granted_bytes: int = 0,
    ) -> None:
        self.outbox = Outbox()
        self.acks = AckBox()
        self.watch = LinkWatch()
        self.running: tuple[Compute, float] | None = None
        self.wasted = 0
        self._device, self._deployments = device, deployments
        self._own, self._merged = own, merged
        self.holding = Holding(self._drop_work, own, granted_bytes)
        self.giving = Giving(self.holding, self.acks, deployments, own, self._scatter)
        self._requests = self.holding.requests
        self.ahead: Shares[AheadKey] = Shares(of_ahead(granted_bytes))
        self._aside: Aside[m.Deliver] = Aside(self.ahead)
        self._queue: deque[Compute] = deque()
        self._idle_since = 0.0

    @property
    def idle(self) -> bool:
        return not self._requests and self.free

    @property
    def free(self) -> bool:
        """Whether nothing is computed here, or is to be; requests may be held for others."""
        busy = self.running is not None or self._queue or self._aside
        here, held = self._deployments, self._requests.values()
        asked = ((r, here[r.deployment].programs) for r in held if r.deployment in here)
        return not busy and not any(r.has_tasks(p.values(), self._device) for r, p in asked)

    # --- from the coordinator

    def start(self, message: m.Start, now: float) -> list[Effect]:
        if message.deployment not in self._deployments:
            return []
        request = self.holding.current(message.request, message.attempt, message.deployment, now)
        if request is None:
            return []
        name = message.request
        request.client, request.head = message.client, message.head
        if self.holding.lacks_inputs(name):
            return [told(m.NotKept(request=name, attempt=message.attempt))]
        effects = self._learn(name, request, message.assigned, now)
        effects += self._scatter(name, request, now)
        effects += self._begin_without_inputs(name, request, now)
        return effects + self._take_up(name, now) + self._try_sink(name, request, now)

    def assign(self, message: m.Assign, now: float) -> list[Effect]:
        """More devices take tasks of this attempt."""
        if message.deployment not in self._deployments:
            return []
        name = message.request
        request = self.holding.current(name, message.attempt, message.deployment, now)
        if request is None:
            return []
        request.head = message.head
        effects = self._learn(name, request, message.assigned, now)
        effects += self._begin_without_inputs(name, request, now) + self._take_up(name, now)
        if not message.asked:
            return effects
        lacked = request.lacks(self._deployments[message.deployment].recipes, self._device)
        return [*effects, told_lacked(message, lacked)]

    def release(self, message: m.Release, now: float) -> list[Effect]:
        """A request is over."""
        self.holding.release(message)
        return self._take_up(message.request, now)

    def reset(self, *, keep_inputs: bool) -> None:
        """The coordinator may have forgotten all that it had told this device."""
        self._aside.clear()
        self.holding.reset(keep_inputs=keep_inputs)
        self._queue.clear()
        self.outbox.begin_anew()

    def _drop_work(self, name: str) -> None:
        """What is queued and what is under way to other tasks; answers to the client stay."""

        def piece(message: Numbered) -> bool:
            return isinstance(message, m.Deliver | m.Sample) and message.request == name

        self._queue = deque(c for c in self._queue if c.request != name)
        self.outbox.forget(piece)

    # --- pieces

    def _begin_without_inputs(self, name: str, request: Held, now: float) -> list[Effect]:
        """Tasks that read nothing but weights have no last piece to wait for."""
        for place, program in self._deployments[request.deployment].programs.items():
            free = program.model is not None and not program.inputs and place not in request.begun
            if free and request.takes(program, self._device):
                self._begin(name, request, place, {}, now)
        return self._compute_next(now)

    def _scatter(self, name: str, request: Held, now: float) -> list[Effect]:
        """The source's part: cut the inputs and send them to the tasks, once all are here."""
        deployment = self._deployments.get(request.deployment)
        if deployment is None or request.scattered or not request.client:
            return []
        program = deployment.programs.get(SOURCE)
        if program is None or any(o.name not in request.fed for o in program.outputs):
            return []
        for output in program.outputs:
            array = request.fed[output.name]
            if output.shard.box.shape != array.shape:
                text = f"input {output.name} has shape {array.shape}, not {output.shard.box.shape}"
                return [task_failed(name, request.attempt, SOURCE, text)]
        request.scattered = True
        arrays = [request.fed[o.name] for o in program.outputs]
        effects, _ = self._send_on(name, request, deployment, SOURCE, arrays, now)
        return effects

    def deliver(
        self, peer: str, message: m.Deliver, payload: memoryview, now: float
    ) -> list[Effect]:
        self.outbox.acknowledge(peer, message.acks)
        made, name = self._deployments.get(message.deployment), message.request
        request = self.holding.told(name, message.attempt, message.deployment)
        head = peer if request is None else request.head  # nobody has said yet whose it is
        may = made is not None and made.may_send(peer, message.consumer, message.slot, head)
        if may and request is None and self.holding.is_ahead(name, message.attempt):
            recipe = self._deployments[message.deployment].recipes[message.consumer]
            if recipe.fits(message.slot, message.tensor, payload):
                return self._aside.put(peer, message, payload, now)
            return [Note("warning", "a piece of another kind", {"request": name, "peer": peer})]
        self.acks.add(peer, message.id, len(payload), now)
        if made is None:  # pieces are sent when all have installed: it is a retired one
            return []
        if not may:
            return [Note("warning", "a piece of another's", {"request": name, "peer": peer})]
        if request is None:
            return []
        if not request.pieces and not request.begun:
            request.heard = now
        try:
            array = array_of(message.tensor, payload)
        except ProtocolError as error:
            return [Note("warning", "bad piece", {"peer": peer, "why": str(error)})]
        effects = doubts(made, message, peer, array)
        return effects + self._place(name, request, message.consumer, message.slot, array, now)

    def _take_up(self, name: str, now: float) -> list[Effect]:
        """What came ahead of the coordinator's word of a request, now that there is one."""
        kept = self._aside.take(name) if self._aside else ()
        found = (self.deliver(e.peer, e.message, e.payload, now) for e in kept)
        return [effect for effects in found for effect in effects]

    def _learn(
        self, name: str, request: Held, assigned: tuple[m.Assigned, ...], now: float
    ) -> list[Effect]:
        """Who takes what: it only grows, so news may come in any order. Send what was made."""
        if assigned == request.assigned:
            return []
        new = [each for each in assigned if each not in request.assigned]
        request.assigned += tuple(new)
        deployment = self._deployments[request.deployment]
        effects: list[Effect] = []
        for place, arrays in list(request.made.items()):
            cuts = [
                (c, d) for c in deployment.recipes[place].cuts for d in request.routes(c.send, new)
            ]
            effects += self._send_cuts(name, request, place, cuts, arrays, now)[0]
        for place in sorted(request.not_kept):
            if any(request.routes(cut.send, new) for cut in deployment.recipes[place].cuts):
                effects.append(told(m.NotKept(request=name, attempt=request.attempt)))
        return effects

    def _place(
        self, name: str, request: Held, consumer: m.Place, slot: int, array: Array, now: float
    ) -> list[Effect]:
        """A piece has come (from a peer or from this device): compute when it was the last one."""
        if consumer in request.begun:
            return []  # it came twice
        gathering = request.pieces.get(consumer)
        if gathering is None:
            recipe = self._deployments[request.deployment].recipes.get(consumer)
            gathering = None if recipe is None else Gathering(recipe)
        if gathering is None or not gathering.put(slot, array):
            fields = {"request": name, "task": str(consumer), "slot": slot}
            return [Note("warning", "a piece that nobody awaits", fields)]
        request.pieces[consumer] = gathering
        if not gathering.complete:
            return []
        if gathering.recipe.program.model is None:
            return self._try_sink(name, request, now)
        self._begin(name, request, consumer, gathering.inputs(), now)
        return self._compute_next(now)

    def _try_sink(self, name: str, request: Held, now: float) -> list[Effect]:
        """The sink's part: when all outputs are here and the client is known, merge and answer."""
        if not request.client:
            return []
        for place, recipe in self._deployments[request.deployment].recipes.items():
            if recipe.program.model is not None or place == SOURCE or place in request.begun:
                continue
            gathering = request.pieces.get(place) or Gathering(recipe)
            if gathering.complete:
                request.begun.add(place)
                return self._answer(name, request, place, gathering.inputs(), now)
        return []

    def _answer(
        self, name: str, request: Held, place: m.Place, outputs: dict[str, Array], now: float
    ) -> list[Effect]:
        request.pieces.pop(place, None)
        merged = told(m.Merged(request=name, attempt=request.attempt, digest=digest_of(outputs)))
        if request.client == self._own:
            return [*self._merged(name, request.attempt, outputs), merged]
        effects: list[Effect] = []
        try:
            tensors = [describe(value, array) for value, array in outputs.items()]
        except ValueError as error:
            return [task_failed(name, request.attempt, place, str(error))]
        for tensor, array in zip(tensors, outputs.values(), strict=True):
            message = m.Answer(
                id=self.outbox.number(),
                request=name,
                attempt=request.attempt,
                tensor=tensor,
                count=len(outputs),
            )
            effects += self.outbox.send(request.client, message, payload_of(array), now)
        return [*effects, merged]

    # --- computing

    def _begin(
        self, name: str, request: Held, place: m.Place, inputs: dict[str, Array], now: float
    ) -> None:
        idle = self.running is None and not self._queue
        waited_s = max(0.0, now - max(self._idle_since, request.heard)) if idle else 0.0
        request.ready[place] = (now, waited_s)
        request.begun.add(place)
        request.pieces.pop(place, None)
        self._queue.append(Compute(name, request.attempt, request.deployment, place, inputs))

    def _compute_next(self, now: float) -> list[Effect]:
        if self.running is not None or not self._queue:
            return []
        job = self._queue.popleft()
        self.running = (job, now)
        return [job]

    def computed(self, event: Computed, now: float) -> list[Effect]:
        assert self.running is not None, f"nothing was computing when {event.request} was done"
        job, since = self.running
        self.running, self._idle_since = None, now
        effects: list[Effect] = []
        request = self._requests.get(job.request)
        if request is not None and request.runs(job.attempt, job.deployment):
            effects = self._finish(event, request, since, now)
        else:
            self.wasted += 1
        return effects + self._compute_next(now)

    def _finish(self, event: Computed, request: Held, since: float, now: float) -> list[Effect]:
        if event.error is not None:
            return [task_failed(event.request, request.attempt, event.place, event.error)]
        deployment = self._deployments[request.deployment]
        effects, sent = self._send_on(
            event.request, request, deployment, event.place, event.outputs, now
        )
        ready, waited_s = request.ready.pop(event.place, (since, 0.0))
        done = m.Done(
            place=event.place,
            compute_s=event.compute_s,
            sent_bytes=sent,
            waited_s=waited_s,
            queued_s=max(0.0, since - ready),
            handed_s=max(0.0, now - since - event.compute_s),
            lasting_s=event.lasting_s,
        )
        if not deployment.programs[event.place].is_own(self._device):
            # Told at once: it says how busy this device still is.
            return [*effects, told_done(event.request, request, [done])]
        last = request.finish(done, deployment.programs.values(), self._device)
        return [*effects, told_done(event.request, request, last)] if last else effects

    def _send_on(
        self,
        name: str,
        request: Held,
        deployment: Deployment,
        place: m.Place,
        arrays: Sequence[Array],
        now: float,
    ) -> tuple[list[Effect], int]:
        """Cut what was made for each task that reads it; and how many bytes leave this device."""
        recipe = deployment.recipes[place]
        if recipe.passes:
            kept = 0 if place == SOURCE else sum(a.nbytes for a in arrays)  # inputs are here anyway
            self.holding.keep(request, place, arrays, kept, deployment.keep_bytes)
        routed = [(cut, device) for cut in recipe.cuts for device in request.routes(cut.send)]
        return self._send_cuts(name, request, place, routed, arrays, now)

    def _send_cuts(
        self,
        name: str,
        request: Held,
        place: m.Place,
        cuts: Sequence[tuple[Cut, str]],
        arrays: Sequence[Array],
        now: float,
    ) -> tuple[list[Effect], int]:
        deployment = self._deployments[request.deployment]
        effects: list[Effect] = []
        local: list[Cut] = []
        sent = 0
        for cut, device in cuts:
            send = cut.send
            if device == self._device:
                local.append(cut)
                continue
            array = cut.sent(arrays)
            peer = deployment.peers[device]
            if request.head and device == deployment.head:
                peer = request.head
            try:
                tensor = describe(send.piece.value, array)
            except ValueError as error:
                return [task_failed(name, request.attempt, place, str(error))], 0
            message = m.Deliver(
                id=self.outbox.number(),
                request=name,
                attempt=request.attempt,
                deployment=request.deployment,
                consumer=send.consumer,
                slot=send.slot,
                tensor=tensor,
                acks=self.acks.take(peer),
            )
            payload = payload_of(array)  # the one copy of what is sent, where rows are strided
            sent += len(payload)
            effects += self.outbox.send(peer, message, payload, now)
            between = not self._own and peer != request.head  # devices, whose links plans use
            if between and len(payload) >= limits.LINK_SAMPLE_BYTES:
                effects += self.watch.sent(peer, len(payload), now)
        for cut in local:
            consumer, slot = cut.send.consumer, cut.send.slot
            effects += self._place(name, request, consumer, slot, cut.kept(arrays), now)
        return effects, sent

    def next_deadline(self) -> float | None:
        first, second = self.outbox.next_deadline(), self.acks.next_deadline()
        if first is None or second is None:
            return second if first is None else first
        return min(first, second)

    def due(self, now: float) -> list[Effect]:
        self._aside.expire(now)
        effects, lost = self.outbox.resend_due(now)
        effects = self.acks.due(now) + effects
        for entry in lost:
            effects += unreachable(entry)
        return effects
