"""Open requests in the order in which they came; under overload nearly all only wait their turn.

The rules are looked at with each event. What they ask of a request that was never begun is when it
is overdue, and whether it is the first of its kind: no rule looks at each of the others for that.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, ValuesView

from meshinfer.scheduler.catalogue import Model
from meshinfer.scheduler.events import Signature
from meshinfer.scheduler.request import Request

SPARE_DEADLINES = 64
"""So many of requests that are over may be kept, or as many as are open."""

Kind = tuple[int, int]
"""Of requests that run under the same deployments: a model and a signature."""


def kind_of(request: Request) -> Kind:
    return (request.model.key, id(request.signature))


class OpenRequests(Mapping[str, Request]):
    """Mutable: owned by the coordinator's core. By id, the one that came first being the first.
    ``begun``: those that had an attempt, also if they wait for another."""

    def __init__(self) -> None:
        self._all: OrderedDict[str, Request] = OrderedDict()
        self.begun: OrderedDict[str, Request] = OrderedDict()
        self._queues: dict[Kind, OrderedDict[str, Request]] = {}
        self._deadlines: list[tuple[float, int, Request]] = []
        self._count = 0

    def __getitem__(self, name: str) -> Request:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def values(self) -> ValuesView[Request]:
        return self._all.values()

    def add(self, request: Request) -> None:
        self._all[request.id] = request
        self._queues.setdefault(kind_of(request), OrderedDict())[request.id] = request
        self._count += 1
        heapq.heappush(self._deadlines, (request.deadline, self._count, request))

    def begin(self, request: Request) -> None:
        """It has an attempt."""
        if request.id not in self.begun:
            self._leave_queue(request)
            self.begun[request.id] = request

    def remove(self, request: Request) -> None:
        del self._all[request.id]
        if len(self._deadlines) > 2 * len(self._all) + SPARE_DEADLINES:  # most are over long since
            self._deadlines = [d for d in self._deadlines if self._all.get(d[2].id) is d[2]]
            heapq.heapify(self._deadlines)
        if self.begun.pop(request.id, None) is None:
            self._leave_queue(request)

    def overdue(self, now: float) -> list[Request]:
        """Those whose deadline is over; each is told of once."""
        found = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            found.append(heapq.heappop(self._deadlines)[2])
        return found

    def next_deadline(self) -> float | None:
        """The first deadline of any."""
        while (
            self._deadlines
            and self._all.get(self._deadlines[0][2].id) is not (self._deadlines[0][2])
        ):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def running(self) -> list[Request]:
        """Those that have begun and are not merged."""
        return [request for request in self.begun.values() if request.runs]

    def waiting(self) -> Iterator[tuple[Kind, list[Request]]]:
        """By kind: first those that wait for another attempt, one by one."""
        for request in [r for r in self.begun.values() if r.waiting]:
            yield kind_of(request), [request]
        for kind, queue in list(self._queues.items()):
            yield kind, list(queue.values())

    def first(self) -> Iterable[Request]:
        """Of each kind the one that waits the longest, of those never begun."""
        return [next(iter(queue.values())) for queue in self._queues.values()]

    def models(self) -> dict[int, Model]:
        """Those of open requests, by their keys."""
        return {r.model.key: r.model for r in (*self.begun.values(), *self.first())}

    def signatures(self, model: Model) -> list[Signature]:
        """Those of a model's open requests, those that have begun first."""
        ours = (r for r in (*self.begun.values(), *self.first()) if r.model is model)
        return list({id(r.signature): r.signature for r in ours}.values())

    def _leave_queue(self, request: Request) -> None:
        queue = self._queues[kind_of(request)]
        del queue[request.id]
        if not queue:
            del self._queues[kind_of(request)]
