"""A device's part in checks: a task of a request that is answered is computed again elsewhere.

Whoever made what the task was given sends that once more, the task's own device sends what came of
it, and the one that checks computes when it has nothing else to do, compares, and tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, array_of, describe, payload_of
from meshinfer.scheduler.comparing import difference
from meshinfer.scheduler.computing import Computing
from meshinfer.scheduler.events import Array, Compute, Computed, Effect, Note
from meshinfer.scheduler.installing import Installing
from meshinfer.scheduler.recipe import Gathering
from meshinfer.scheduler.telling import told

_Key = tuple[str, int, m.Place]


@dataclass(slots=True)
class _Check:
    """``theirs``: what the task's own device made, as it comes; ``whole_at``: since when nothing is
    missing; ``inputs``: since it is computed. ``asked``: what the coordinator said of it;
    ``givers``: peers that gave the source's pieces, and devices that say they made the result."""

    deployment: int
    gathering: Gathering
    since: float
    theirs: dict[int, Array] = field(default_factory=dict)
    whole_at: float | None = None
    inputs: Mapping[str, Array] | None = None
    asked: m.Check | None = None
    givers: set[tuple[str, bool]] = field(default_factory=set)

    @property
    def honest(self) -> bool:
        """Whether all is from those whose it is; else somebody tries to have another blamed."""
        word = self.asked
        return word is not None and self.givers <= {(word.head, False), (word.of, True)}


class Checking:
    """Mutable: owned by a worker's or a client's core; clients only send."""

    def __init__(self, device: str, computing: Computing, installing: Installing) -> None:
        self._device, self._computing, self._installing = device, computing, installing
        self._checks: dict[_Key, _Check] = {}

    def __bool__(self) -> bool:
        return bool(self._checks)

    # --- what others need

    def asked(self, check: m.Check, now: float) -> list[Effect]:
        """Send what was made here, if it is still here: of the task's inputs, and the task's own
        output."""
        if check.by.device == self._device:
            mine = self._check_of(check.request, check.attempt, check.deployment, check.place, now)
            if mine is not None:
                mine.asked = check
        held = self._computing.holding.requests.get(check.request)
        made = self._installing.deployments.get(check.deployment)
        if held is None or made is None or not held.runs(check.attempt, check.deployment):
            return []
        effects: list[Effect] = []
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
            self._take(sample, array, now)
            return []
        return self._computing.outbox.send(check.by.id, sample, payload_of(array), now)

    # --- this device checks

    def sampled(
        self, peer: str, message: m.Sample, payload: memoryview, now: float
    ) -> list[Effect]:
        self._computing.acks.add(peer, message.id, len(payload), now)
        try:
            array = array_of(message.tensor, payload)
        except ProtocolError as error:
            fields = {"request": message.request, "peer": peer, "why": str(error)}
            return [Note("warning", "bad sample", fields)]
        check = self._check_of(
            message.request, message.attempt, message.deployment, message.place, now
        )
        if check is None:
            return []
        made, device = self._installing.deployments[message.deployment], peer.partition("#")[0]
        if message.made:
            check.givers.add((device, True))
        elif not made.may_send(peer, message.place, message.slot, peer):
            return [Note("warning", "a sample of another's", {"peer": peer})]
        elif not made.may_send(peer, message.place, message.slot, ""):
            check.givers.add((peer, False))
        self._take(message, array, now)
        return []

    def _check_of(
        self, request: str, attempt: int, deployment: int, place: m.Place, now: float
    ) -> _Check | None:
        """A check that this device can do, whoever speaks of it first."""
        made = self._installing.deployments.get(deployment)
        recipe = None if made is None else made.recipes.get(place)
        if recipe is None or self._device not in recipe.program.devices:
            return None
        key = (request, attempt, place)
        if key not in self._checks and len(self._checks) < limits.CHECKS_HELD:
            self._checks[key] = _Check(deployment, Gathering(recipe), now)
        return self._checks.get(key)

    def _take(self, message: m.Sample, array: Array, now: float) -> None:
        check = self._check_of(
            message.request, message.attempt, message.deployment, message.place, now
        )
        if check is None or check.whole_at is not None:
            return  # it came twice
        outputs = len(check.gathering.recipe.program.outputs)
        if message.made and message.slot < outputs:
            check.theirs[message.slot] = array
        elif not message.made:
            check.gathering.put(message.slot, array)
        if check.gathering.complete and len(check.theirs) == outputs:
            check.whole_at = now

    def begin(self, now: float) -> list[Effect]:
        """Compute what is whole, one at a time, when nothing else runs, or has for long."""
        if not self._checks:
            return []
        self._drop(lambda _, check: now >= check.since + limits.CHECK_S)
        if self._computes:
            return []
        for (request, attempt, place), check in self._checks.items():
            if check.whole_at is None or not check.honest:
                continue
            if self._computing.running is None or now >= check.whole_at + limits.CHECK_IDLE_S:
                check.inputs = check.gathering.inputs()
                return [Compute(request, attempt, check.deployment, place, check.inputs, True)]
        return []

    @property
    def _computes(self) -> bool:
        return any(check.inputs is not None for check in self._checks.values())

    def computed(self, event: Computed) -> list[Effect]:
        check = self._checks.pop((event.request, event.attempt, event.place), None)
        if check is None or check.inputs is None or event.error is not None:
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

    def release(self, request: str) -> None:
        self._drop(lambda key, _: key[0] == request)

    def forget(self, deployment: int) -> None:
        self._drop(lambda _, check: check.deployment == deployment)

    def reset(self) -> None:
        self._drop(lambda _, check: True)

    def _drop(self, which: Callable[[_Key, _Check], bool]) -> None:
        self._checks = {k: c for k, c in self._checks.items() if not which(k, c)}

    def next_deadline(self) -> float | None:
        times = [check.since + limits.CHECK_S for check in self._checks.values()]
        if not self._computes:
            whole = (check.whole_at for check in self._checks.values() if check.honest)
            times += [at + limits.CHECK_IDLE_S for at in whole if at is not None]
        return min(times, default=None)
