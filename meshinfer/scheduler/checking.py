"""A device's part in checks: a task of a request that is answered is computed again elsewhere.

Whoever made what the task was given sends that once more, the task's own device sends what came of
it, and the one that checks computes when it has nothing else to do, compares, and tells. Only what
the coordinator asks for is checked, by what those send whom it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, array_of, describe, payload_of
from meshinfer.scheduler.aside import Aside
from meshinfer.scheduler.comparing import difference
from meshinfer.scheduler.computing import Computing
from meshinfer.scheduler.events import Array, Compute, Computed, Effect, Note
from meshinfer.scheduler.installing import Deployment, Installing
from meshinfer.scheduler.recipe import Gathering, Recipe
from meshinfer.scheduler.telling import told

_Key = tuple[str, int, m.Place]


@dataclass(slots=True)
class _Check:
    """``asked``: what the coordinator said; ``theirs``: what the task's own device made, as it is
    here; ``whole_at``: since when nothing is missing; ``inputs``: since it is computed; ``over``:
    it is, and what comes late is of no use."""

    asked: m.Check
    gathering: Gathering
    since: float
    theirs: dict[int, Array] = field(default_factory=dict)
    whole_at: float | None = None
    inputs: Mapping[str, Array] | None = None
    over: bool = False

    def may_send(self, made: Deployment, peer: str, message: m.Sample) -> bool:
        """Whether a sample is of whom it should be; else somebody may want another blamed."""
        device = peer.partition("#")[0]
        if message.deployment != self.asked.deployment:
            return False
        if message.made:
            return device == self.asked.of
        slot = self.gathering.recipe.slots.get(message.slot)
        maker = None if slot is None else dict(self.asked.makers).get(slot.producer)
        may = made.may_send(peer, message.place, message.slot, self.asked.head)
        return may and maker in (None, device)


class Checking:
    """Mutable: owned by a worker's or a client's core; clients only send."""

    def __init__(self, device: str, computing: Computing, installing: Installing) -> None:
        self._device, self._computing, self._installing = device, computing, installing
        self._checks: dict[_Key, _Check] = {}
        self._aside: Aside[m.Sample] = Aside(computing.ahead)

    def __bool__(self) -> bool:
        return bool(self._checks)

    # --- what others need

    def asked(self, check: m.Check, now: float) -> list[Effect]:
        """Send what was made here, if it is still here: of the task's inputs, and the task's own
        output."""
        effects: list[Effect] = []
        if check.by.device == self._device and self._open(check, now):
            for early in self._aside.take(check.request):
                effects += self.sampled(early.peer, early.message, early.payload, now)
        held = self._computing.holding.requests.get(check.request)
        made = self._installing.deployments.get(check.deployment)
        if held is None or made is None or not held.runs(check.attempt, check.deployment):
            return effects
        for place, arrays in held.made.items():
            for cut in made.recipes[place].cuts:
                if cut.send.consumer == check.place:
                    array, slot = cut.sent(arrays), cut.send.slot
                    effects += self._give(check, cut.send.piece.value, array, slot, now)
        if check.of == self._device:
            for slot, array in enumerate(held.made.get(check.place, ())):
                effects += self._give(check, "made", array, slot, now, made=True)
        if check.by.device != self._device and effects:
            return self._installing.connect((check.by,)) + effects
        return effects

    def _give(
        self, check: m.Check, name: str, array: Array, slot: int, now: float, *, made: bool = False
    ) -> list[Effect]:
        try:
            tensor = describe(name, array)
        except ValueError:  # it only ever stays on its device
            return []
        sample = m.Sample(
            id=self._computing.outbox.number(),
            request=check.request,
            attempt=check.attempt,
            deployment=check.deployment,
            place=check.place,
            slot=slot,
            tensor=tensor,
            made=made,
        )
        if check.by.device == self._device:
            self._take(self._device, sample, array, now)
            return []
        return self._computing.outbox.send(check.by.id, sample, payload_of(array), now)

    # --- this device checks

    def sampled(
        self, peer: str, message: m.Sample, payload: memoryview, now: float
    ) -> list[Effect]:
        key = (message.request, message.attempt, message.place)
        if key not in self._checks and self._may_come(message):
            if self._is_fit(peer, message, payload):
                return self._aside.put(peer, message, payload, now)
            return [Note("debug", "a sample that no check would await", {"peer": peer})]
        self._computing.acks.add(peer, message.id, len(payload), now)
        try:
            array = array_of(message.tensor, payload)
        except ProtocolError as error:
            fields = {"request": message.request, "peer": peer, "why": str(error)}
            return [Note("warning", "bad sample", fields)]
        return self._take(peer, message, array, now)

    def _recipe(self, deployment: int, place: m.Place) -> Recipe | None:
        """Of a task that this device can check."""
        made = self._installing.deployments.get(deployment)
        recipe = None if made is None else made.recipes.get(place)
        if recipe is None or self._device not in recipe.program.devices:
            return None
        return recipe

    def _may_come(self, message: m.Sample) -> bool:
        """Whether the coordinator may yet ask for the check that a sample is for."""
        if self._recipe(message.deployment, message.place) is None:
            return False
        return not self._computing.holding.is_over(message.request, message.attempt)

    def _is_fit(self, peer: str, message: m.Sample, payload: memoryview) -> bool:
        """Whether any check of that task would await a sample, from this peer."""
        made, slot = self._installing.deployments[message.deployment], message.slot
        recipe = made.recipes[message.place]
        if message.made:
            may = peer.partition("#")[0] in recipe.program.devices
            return may and recipe.may_make(slot, message.tensor, payload)
        may = made.may_send(peer, message.place, slot, peer)  # who is the head, a check will say
        return may and recipe.fits(slot, message.tensor, payload)

    def _open(self, check: m.Check, now: float) -> bool:
        """Begin a check that the coordinator asks for."""
        recipe = self._recipe(check.deployment, check.place)
        if recipe is None or len(self._checks) >= limits.CHECKS_HELD:
            return False
        key = (check.request, check.attempt, check.place)
        self._checks.setdefault(key, _Check(check, Gathering(recipe), now))
        return True

    def _take(self, peer: str, message: m.Sample, array: Array, now: float) -> list[Effect]:
        """A sample has come, from a peer or from this device."""
        check = self._checks.get((message.request, message.attempt, message.place))
        made = self._installing.deployments.get(message.deployment)
        if check is None or made is None or check.over or check.whole_at is not None:
            return []  # it came twice
        if not check.may_send(made, peer, message):
            # Or two have made it, of which the coordinator names the first.
            return [Note("debug", "a sample of another's", {"peer": peer})]
        outputs = check.gathering.recipe.program.outputs
        if not message.made:
            check.gathering.put(message.slot, array)
        elif message.slot < len(outputs):
            box = outputs[message.slot].shard.box
            wrong = box.axes and box.shape != array.shape  # which no comparison needs to hold
            check.theirs[message.slot] = np.empty(0, array.dtype) if wrong else array
        if check.gathering.complete and len(check.theirs) == len(outputs):
            check.whole_at = now
        return []

    def begin(self, now: float) -> list[Effect]:
        """Compute what is whole, one at a time, when nothing else runs, or has for long."""
        if not self._checks:
            return []
        self._drop(lambda _, check: now >= check.since + limits.CHECK_S)
        if self._computes:
            return []
        for (request, attempt, place), check in self._checks.items():
            if check.whole_at is None or check.over:
                continue
            if self._computing.running is None or now >= check.whole_at + limits.CHECK_IDLE_S:
                check.inputs = check.gathering.inputs()
                made = check.asked.deployment
                return [Compute(request, attempt, made, place, check.inputs, True)]
        return []

    @property
    def _computes(self) -> bool:
        return any(c.inputs is not None and not c.over for c in self._checks.values())

    def computed(self, event: Computed) -> list[Effect]:
        check = self._checks.get((event.request, event.attempt, event.place))
        if check is None or check.inputs is None or check.over:
            return []
        check.over = True
        if event.error is not None:
            return []
        theirs = [check.theirs[slot] for slot in sorted(check.theirs)]
        found = difference(theirs, event.outputs, check.inputs.values())
        word = m.Checked(
            request=event.request,
            attempt=event.attempt,
            place=event.place,
            error=found.error,
            spread=found.spread,
            unequal=found.unequal,
        )
        return [told(word)]

    # --- its end

    def drop_orphans(self, now: float) -> None:
        """Samples for checks that nobody asks for."""
        self._aside.expire(now)

    def release(self, request: str, attempt: int, now: float) -> None:
        """Up to this attempt: word of one may come when a later one of the same id is checked."""
        self._drop(lambda key, _: key[0] == request and key[1] <= attempt)
        for early in self._aside.take(request):
            if early.message.attempt > attempt:  # it was kept, so there is room
                self._aside.put(early.peer, early.message, early.payload, early.since)
            else:  # or its sender would have the less credit here, for as long as a slow link takes
                nbytes = len(early.payload)
                self._computing.acks.add(early.peer, early.message.id, nbytes, now)

    def forget(self, deployment: int) -> None:
        self._drop(lambda _, check: check.asked.deployment == deployment)

    def reset(self) -> None:
        self._drop(lambda _, check: True)
        self._aside.clear()

    def _drop(self, which: Callable[[_Key, _Check], bool]) -> None:
        self._checks = {k: c for k, c in self._checks.items() if not which(k, c)}

    def next_deadline(self) -> float | None:
        if not self._checks:
            return None
        times = [check.since + limits.CHECK_S for check in self._checks.values()]
        if not self._computes:
            whole = (check.whole_at for check in self._checks.values() if not check.over)
            times += [at + limits.CHECK_IDLE_S for at in whole if at is not None]
        return min(times, default=None)
