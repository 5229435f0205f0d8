"""Which requests a device holds, under which attempt, and which were released: the stale are known.

Only the coordinator's word moves a request to another attempt. ``drop`` is called with each request
whose work is of no use any more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Array
from meshinfer.scheduler.held import Held
from meshinfer.scheduler.shares import Shares, of_inputs

_NEVER = (-1, "", -1)
"""What is known of a request that was not released: attempt, client and turn."""

_Given = tuple[str, str]
"""A request, and who gave inputs of it."""

Awaits = Callable[[Held, str, Array], bool]
"""Whether a request that has begun awaits such an input."""


class Holding:
    """Mutable: owned by the worker's core. ``own``: the client that this is itself, whose inputs
    take no room here; ``granted_bytes``: of this device's memory, 0 if nobody said."""

    def __init__(self, drop: Callable[[str], None], own: str, granted_bytes: int) -> None:
        self.requests: dict[str, Held] = {}
        self._released: OrderedDict[str, tuple[int, str, int]] = OrderedDict()
        self._drop = drop
        self._own = own
        self._fed: Shares[str] = Shares(of_inputs(granted_bytes))
        self._lost: Shares[_Given] = Shares(of_inputs(granted_bytes))  # of no bytes
        self._lost_turn: dict[_Given, int] = {}

    def is_released(self, name: str, client: str, turn: int) -> bool:
        """Whether what this client gave by then is of a request that is over."""
        _, known, last = self._released.get(name, _NEVER)
        return client == known and turn <= last

    def request(self, name: str, now: float) -> Held:
        if name not in self.requests:
            self.requests[name] = Held(now)
        return self.requests[name]

    # --- attempts

    def current(self, name: str, attempt: int, deployment: int, now: float) -> Held | None:
        """The request under this attempt, as the coordinator says; None when it is stale."""
        if attempt <= self._released.get(name, _NEVER)[0]:
            return None
        request = self.request(name, now)
        if attempt < request.attempt:
            return None
        if attempt > request.attempt:
            self._drop(name)
            request.renew(attempt, deployment, now)
        return request

    def told(self, name: str, attempt: int, deployment: int) -> Held | None:
        """The request, if it is at this attempt of this deployment by the coordinator's word."""
        request = self.requests.get(name)
        if request is None or not request.runs(attempt, deployment):
            return None
        return request

    def is_over(self, name: str, attempt: int) -> bool:
        """Whether there is nothing any more that word of an attempt could be for."""
        return attempt <= self._released.get(name, _NEVER)[0]

    def is_ahead(self, name: str, attempt: int) -> bool:
        """Whether the coordinator has not told of an attempt, and may."""
        request = self.requests.get(name)
        known = 0 if request is None else request.attempt
        return attempt > known and not self.is_over(name, attempt)

    # --- inputs

    def give(
        self, name: str, peer: str, turn: int, inputs: tuple[str, Array], awaits: Awaits, now: float
    ) -> tuple[Held, list[str]] | None:
        """Take an input; and whose inputs had to go for it, or its own. None: it has been given
        anew since."""
        request = self.request(name, now)
        before = request.giver, request.turn, bool(request.fed)
        if not request.take(peer, turn, *inputs):
            return None
        if before[2] and before[0] != peer:
            self._lose((name, before[0]), before[1])
        if turn > self._lost_turn.get((name, peer), turn):
            self._find((name, peer))
        return request, self._count(name, request, awaits)

    def _count(self, name: str, request: Held, awaits: Awaits = lambda *_: False) -> list[str]:
        """Find room for inputs; those that the coordinator lets be open have it."""
        if request.giver == self._own:
            return []
        nbytes = sum(limits.NAME_CHARS + array.nbytes for array in request.fed.values())
        due = all(awaits(request, value, array) for value, array in request.fed.items())
        gone = self._fed.put(name, request.giver, nbytes, due=due)
        for other in gone:
            held = self.requests[other]
            self._lose((other, held.giver), held.turn)
            held.fed.clear()
            if not held.client:
                del self.requests[other]
        return gone

    def _lose(self, given: _Given, turn: int) -> None:
        """Inputs are here no more that somebody gave, who may give the others of that turn yet."""
        self._lost_turn[given] = turn
        for other in self._lost.put(given, given[1], 0):
            del self._lost_turn[other]

    def _find(self, given: _Given) -> bool:
        """They are given, or asked for, anew; whether any were lost."""
        self._lost.pop(given)
        return self._lost_turn.pop(given, None) is not None

    @property
    def pushed_out(self) -> int:
        """How often inputs had to go."""
        return self._fed.gone

    def lacks_inputs(self, name: str) -> bool:
        """Whether a request that begins was given inputs that are not here any more, or another's
        than its client's."""
        request = self.requests[name]
        lacks = self._find((name, request.client))
        if request.fed and not request.may_give(request.giver):
            request.fed.clear()
            self._fed.pop(name)
            return True
        return lacks

    # --- the end

    def keep(
        self, request: Held, place: m.Place, arrays: Sequence[Array], nbytes: int, most: int
    ) -> None:
        """What was made, for devices that take a task of its readers later, if there is room."""
        if not nbytes or nbytes + sum(r.kept_bytes for r in self.requests.values()) <= most:
            request.keep(place, arrays, nbytes)
        else:
            request.not_kept.add(place)

    def release(self, message: m.Release) -> None:
        name = message.request
        held = self.requests.get(name)
        later = held is not None and held.attempt > message.attempt  # the same id runs once more
        request = None if later else self._pop(name)
        if not later:
            self._drop(name)
        self._released.pop(name, None)
        self._released[name] = (message.attempt, message.client, message.turn)
        while len(self._released) > limits.STALE_REQUESTS_KEPT:
            self._released.popitem(last=False)
        if request is not None and (request.giver != message.client or request.turn > message.turn):
            self._keep_inputs(name, request)  # the same id, submitted once more

    def forget(self, number: int) -> None:
        """A deployment is retired: only inputs are worth keeping, for the next attempt."""
        for name in [n for n, r in self.requests.items() if r.deployment == number]:
            self._drop(name)
            old = self._pop(name)
            if old is not None:
                self._keep_inputs(name, old)

    def reset(self, *, keep_inputs: bool) -> None:
        held = dict(self.requests)
        self.requests.clear()
        self._fed.clear()
        if not keep_inputs:
            self._lost.clear()
            self._lost_turn.clear()
        for name, request in held.items() if keep_inputs else ():
            self._keep_inputs(name, request)

    def forget_other_coordinator(self) -> None:
        """Its attempts and releases mean nothing to the next."""
        self._released.clear()

    def drop_orphans(self, now: float) -> None:
        """Inputs whose request never started: its header was refused or lost."""
        for name, request in list(self.requests.items()):
            if not request.client and now - request.since > limits.ORPHAN_INPUT_S:
                self._pop(name)
                self._drop(name)

    def _pop(self, name: str) -> Held | None:
        self._fed.pop(name)
        return self.requests.pop(name, None)

    def _keep_inputs(self, name: str, old: Held) -> None:
        if old.fed:
            kept = Held(old.since, giver=old.giver, turn=old.turn, fed=old.fed)
            self.requests[name] = kept
            self._count(name, kept)
