"""Which requests a device holds, under which attempt, and which were released: the stale are known.

``drop`` is called with each request whose work is of no use any more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Array
from meshinfer.scheduler.held import Held

_NEVER = (-1, "", -1)
"""What is known of a request that was not released: attempt, client and turn."""


class Holding:
    """Mutable: owned by the worker's core."""

    def __init__(self, drop: Callable[[str], None]) -> None:
        self.requests: dict[str, Held] = {}
        self._released: OrderedDict[str, tuple[int, str, int]] = OrderedDict()
        self._drop = drop

    def is_released(self, name: str, client: str, turn: int) -> bool:
        """Whether what this client gave by then is of a request that is over."""
        _, known, last = self._released.get(name, _NEVER)
        return client == known and turn <= last

    def request(self, name: str, now: float) -> Held:
        if name not in self.requests:
            self.requests[name] = Held(now)
        return self.requests[name]

    def current(self, name: str, attempt: int, deployment: int, now: float) -> Held | None:
        """The request under this attempt; None when the attempt is stale, or is no attempt of this
        deployment: a member may say anything."""
        if attempt <= self._released.get(name, _NEVER)[0]:
            return None
        request = self.request(name, now)
        if attempt < request.attempt:
            return None
        if attempt == request.attempt and deployment != request.deployment:
            return None
        if attempt > request.attempt:
            self._drop(name)
            request.renew(attempt, deployment, now)
        return request

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
        request = None if later else self.requests.pop(name, None)
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
            self._keep_inputs(name, self.requests.pop(name))

    def reset(self, *, keep_inputs: bool) -> None:
        held = dict(self.requests)
        self.requests.clear()
        for name, request in held.items() if keep_inputs else ():
            self._keep_inputs(name, request)

    def forget_other_coordinator(self) -> None:
        """Its attempts and releases mean nothing to the next."""
        self._released.clear()

    def drop_orphans(self, now: float) -> None:
        """Inputs whose request never started: its header was refused or lost."""
        for name, request in list(self.requests.items()):
            if not request.client and now - request.since > limits.ORPHAN_INPUT_S:
                del self.requests[name]
                self._drop(name)

    def _keep_inputs(self, name: str, old: Held) -> None:
        if old.fed:
            self.requests[name] = Held(old.since, giver=old.giver, turn=old.turn, fed=old.fed)
