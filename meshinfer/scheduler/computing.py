"""A device's requests: gather the pieces of each task, compute when the last is here, send on.

Whatever belongs to an older attempt, a retired deployment or a released request is acknowledged and
dropped: tasks are pure, and the coordinator has started, or will start, what is still wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, array_of, describe, digest_of, payload_of
from meshinfer.scheduler.acks import AckBox
from meshinfer.scheduler.comparing import doubts
from meshinfer.scheduler.events import Array, Compute, Computed, Effect, Note
from meshinfer.scheduler.held import Held
from meshinfer.scheduler.holding import Holding
from meshinfer.scheduler.installing import Deployment
from meshinfer.scheduler.links import LinkWatch
from meshinfer.scheduler.outbox import Numbered, Outbox
from meshinfer.scheduler.recipe import Cut, Gathering
from meshinfer.scheduler.telling import task_failed, told, told_done, told_lacked, unreachable

SOURCE: m.Place = (-1, 0)


class Computing:
    """Mutable: owned by a worker's or a client's core. ``deployments``: what is installed, a view.

    ``own``: the client that this is itself, if it is one; ``merged`` gets the answers to it.
    ``wasted``: tasks that were done when nobody wanted them any more.
    """

    def __init__(
        self,
        device: str,
        deployments: Mapping[int, Deployment],
        own: str = "",
        merged: Callable[[str, int, dict[str, Array]], list[Effect]] = lambda *_: [],
    ) -> None:
        self.outbox = Outbox()
        self.acks = AckBox()
        self.watch = LinkWatch()
        self.running: tuple[Compute, float] | None = None
        self.wasted = 0
        self._device = device
        self._own, self._merged = own, merged
        self._deployments = deployments
        self.holding = Holding(self._drop_work)
        self._requests = self.holding.requests
        self._queue: deque[Compute] = deque()
        self._idle_since = 0.0

    @property
    def idle(self) -> bool:
        return not self._requests and self.running is None and not self._queue

    # --- from the client and the coordinator

    def feed(self, peer: str, message: m.Feed, payload: memoryview, now: float) -> list[Effect]:
        name = message.request
        stale = self.holding.is_released(name, peer, message.turn)
        if not stale and name not in self._requests and len(self._requests) >= limits.FED_REQUESTS:
            # Not acknowledged: the client sends it again later.
            return [Note("warning", "too many inputs wait here", {"request": name})]
        if name in self._requests and not self._requests[name].may_give(peer):
            return [Note("warning", "inputs of another's request", {"request": name, "peer": peer})]
        self.acks.add(peer, message.id, len(payload), now)
        if stale:
            return []
        try:
            array = array_of(message.tensor, payload)
        except ProtocolError as error:
            return [Note("warning", "bad input", {"request": name, "why": str(error)})]
        request = self.holding.request(name, now)
        if not request.take(peer, message.turn, message.tensor.name, array):
            return []
        return self._scatter(name, request, now)

    def feed_here(
        self, name: str, turn: int, arrays: Mapping[str, Array], now: float
    ) -> list[Effect]:
        """The inputs of a request of this client's own; those of an earlier turn are dropped."""
        request = self.holding.request(name, now)
        request.giver, request.turn, request.fed = self._own, turn, dict(arrays)
        return self._scatter(name, request, now)

    def let_go(self, name: str, turn: int) -> None:
        """A request of this client's own is over, as it was given by this turn."""
        held = self._requests.get(name)
        attempt = 0 if held is None else held.attempt
        self.holding.release(m.Release(request=name, attempt=attempt, client=self._own, turn=turn))

    def start(self, message: m.Start, now: float) -> list[Effect]:
        if message.deployment not in self._deployments:
            return []
        request = self.holding.current(message.request, message.attempt, message.deployment, now)
        if request is None:
            return []
        request.client, request.head = message.client, message.head
        effects = self._learn(message.request, request, message.assigned, now)
        effects += self._scatter(message.request, request, now)
        effects += self._begin_without_inputs(message.request, request, now)
        return effects + self._try_sink(message.request, request, now)

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
        effects += self._begin_without_inputs(name, request, now)
        if not message.asked:
            return effects
        lacked = request.lacks(self._deployments[message.deployment].recipes, self._device)
        return [*effects, told_lacked(message, lacked)]

    def reset(self, *, keep_inputs: bool) -> None:
        """The coordinator may have forgotten all that it had told this device."""
        self.holding.reset(keep_inputs=keep_inputs)
        self._queue.clear()
        self.outbox.forget(lambda message: isinstance(message, m.Deliver | m.Sample))

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
        self.acks.add(peer, message.id, len(payload), now)
        made, name = self._deployments.get(message.deployment), message.request
        if made is None:  # pieces are sent when all have installed: it is a retired one
            return []
        if not made.may_send(peer, message.consumer, message.slot, message.head):
            return [Note("warning", "a piece of another's", {"request": name, "peer": peer})]
        request = self.holding.current(name, message.attempt, message.deployment, now)
        if request is None:
            return []
        request.head = message.head
        effects = self._learn(name, request, message.assigned, now)
        try:
            array = array_of(message.tensor, payload)
        except ProtocolError as error:
            return [*effects, Note("warning", "bad piece", {"peer": peer, "why": str(error)})]
        effects += doubts(made, message, peer, array)
        return effects + self._place(name, request, message.consumer, message.slot, array, now)

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
        )
        if not deployment.programs[event.place].is_own(self._device):
            # Told at once: it says how busy this device still is.
            return [*effects, told_done(event.request, request, [done])]
        request.done.append(done)
        if len(request.done) < deployment.tasks:
            return effects  # told with the last one: the answer cannot come before it
        return [*effects, told_done(event.request, request, request.done)]

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
                assigned=request.assigned,
                head=request.head,
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
        effects, lost = self.outbox.resend_due(now)
        effects = self.acks.due(now) + effects
        for entry in lost:
            effects += unreachable(entry)
        return effects
