"""The inputs of requests, as clients give them to the head: from whom, and for how many there is
room."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, array_of
from meshinfer.scheduler.acks import AckBox
from meshinfer.scheduler.aside import noted
from meshinfer.scheduler.events import Array, Effect, Note
from meshinfer.scheduler.held import Held
from meshinfer.scheduler.holding import Holding
from meshinfer.scheduler.installing import Deployment
from meshinfer.scheduler.recipe import SOURCE
from meshinfer.scheduler.telling import task_failed, told

Scatter = Callable[[str, Held, float], list[Effect]]


class Giving:
    """Has no state of its own. ``deployments``: what is installed, a view; ``own``: the client that
    this is itself, if it is one; ``scatter`` cuts inputs once all are here."""

    def __init__(
        self,
        holding: Holding,
        acks: AckBox,
        deployments: Mapping[int, Deployment],
        own: str,
        scatter: Scatter,
    ) -> None:
        self._holding, self._acks, self._deployments = holding, acks, deployments
        self._own, self._scatter = own, scatter

    def feed(self, peer: str, message: m.Feed, payload: memoryview, now: float) -> list[Effect]:
        name, holding = message.request, self._holding
        stale = holding.is_released(name, peer, message.turn)
        if name in holding.requests and not holding.requests[name].may_give(peer):
            return [Note("warning", "inputs of another's request", {"request": name, "peer": peer})]
        self._acks.add(peer, message.id, len(payload), now)
        if stale:
            return []
        try:
            array = array_of(message.tensor, payload)
        except ProtocolError as error:
            return [Note("warning", "bad input", {"request": name, "why": str(error)})]
        before = holding.pushed_out
        inputs = message.tensor.name, array
        given = holding.give(name, peer, message.turn, inputs, self._awaits, now)
        if given is None:
            return []
        request, gone = given
        effects = noted(before, holding.pushed_out, {"request": name, "peer": peer})
        for other in gone:
            effects += self._begin_anew(other) if other != name else self._refuse(name, *inputs)
        return effects + self._scatter(name, request, now)

    def _awaits(self, held: Held, value: str, array: Array) -> bool:
        """The coordinator knows how large what it lets begin is: no other thing is given for it."""
        made = self._deployments.get(held.deployment)
        program = None if made is None or not held.client else made.programs.get(SOURCE)
        outputs = () if program is None else program.outputs
        return any(o.name == value and o.shard.box.shape == array.shape for o in outputs)

    def _refuse(self, name: str, value: str, array: Array) -> list[Effect]:
        """There is no room for what was given; before it begins, that is asked for again then."""
        fields = {"request": name, "bytes": array.nbytes}
        note = Note("warning", "inputs for which there is no room", fields)
        held = self._holding.requests.get(name)
        if held is None or held.scattered or not held.client:
            return [note]
        text = f"input {value} of shape {array.shape} is not awaited, and there is no room for it"
        return [note, task_failed(name, held.attempt, SOURCE, text)]

    def _begin_anew(self, name: str) -> list[Effect]:
        """Inputs had to go that an attempt waits for; those of one that begins later are asked for
        then."""
        held = self._holding.requests.get(name)
        if held is None or held.scattered or not held.client:
            return []
        self._holding.lacks_inputs(name)
        return [told(m.NotKept(request=name, attempt=held.attempt))]

    def feed_here(
        self, name: str, turn: int, arrays: Mapping[str, Array], now: float
    ) -> list[Effect]:
        """The inputs of a request of this client's own; those of an earlier turn are dropped."""
        request = self._holding.request(name, now)
        request.giver, request.turn, request.fed = self._own, turn, dict(arrays)
        return self._scatter(name, request, now)

    def let_go(self, name: str, turn: int) -> None:
        """A request of this client's own is over, as it was given by this turn."""
        held = self._holding.requests.get(name)
        attempt = 0 if held is None else held.attempt
        word = m.Release(request=name, attempt=attempt, client=self._own, turn=turn)
        self._holding.release(word)
