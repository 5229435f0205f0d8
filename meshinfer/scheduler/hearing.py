"""What devices and clients say of an attempt, believed of those who have a part in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import outcomes
from meshinfer.scheduler.balance import Balance
from meshinfer.scheduler.catalogue import Catalogue
from meshinfer.scheduler.covering import Covering
from meshinfer.scheduler.events import Effect, Note, Plane, Send
from meshinfer.scheduler.membership import Membership
from meshinfer.scheduler.replanning import disturbs
from meshinfer.scheduler.request import Request, told_by

Fail = Callable[[Request, m.Failure, float], list[Effect]]


class Hearing:
    """Owned by the coordinator's core; has no state of its own. ``open_`` is a view of the open
    requests; ``fail`` ends one."""

    def __init__(
        self,
        open_: Mapping[str, Request],
        members: Membership,
        catalogue: Catalogue,
        balance: Balance,
        covering: Covering,
        fail: Fail,
    ) -> None:
        self._open, self._members, self._catalogue = open_, members, catalogue
        self._balance, self._covering, self._fail = balance, covering, fail

    def tasks_done(self, peer: str, message: m.TasksDone, now: float) -> list[Effect]:
        device = self._members.by_peer(peer)
        assert device is not None
        request = self._open.get(message.request)
        tried = None if request is None else request.tried.get(message.attempt)
        if tried is None:
            device.tasks_done += len(message.tasks)
            device.stale += len(message.tasks)
            return []
        tasks = message.tasks
        if not all(tried.has_part(device.name, done.place) for done in tasks):
            fields = {**device.ids, "request": message.request}
            return [Note("warning", "tasks of others are told of", fields)]
        device.tasks_done += len(tasks)
        if not disturbs(self._catalogue, self._members, device):  # or a search caused the next
            self._balance.note(tried.deployment, device.name, tasks, now)
        self._covering.done(tried, device.name, tasks, now)
        for done in tasks:  # of two that took a task, the first is who did it
            took = m.TaskTime(device=device.name, **structs.asdict(done))
            tried.tasks.setdefault(done.place, took)
        return []

    def merged(self, peer: str, message: m.Merged, now: float) -> list[Effect]:
        request = self._open.get(message.request)
        if (
            request is not None
            and request.merged is None
            and request.since <= message.attempt in request.tried
            and request.tried[message.attempt].merges_at(peer, self._head, request.client)
        ):
            request.merged, request.outcome = (now, message.attempt), message.digest
        return []

    def task_failed(self, peer: str, message: m.TaskFailed, now: float) -> list[Effect]:
        request = told_by(self._open, peer, message)
        if request is None:
            return []
        request.kernel_failures += 1
        request.deployment = None
        fields = {"request": request.id, "attempt": message.attempt, "why": message.text}
        note = self._members.faults.note("error", "a task failed", fields)
        if request.kernel_failures < limits.KERNEL_FAILURES_PER_REQUEST:
            return [note]
        return [note, *self._fail(request, outcomes.kernel_failed(request, message.text), now)]

    def unreachable(self, peer: str, message: m.Unreachable) -> bool:
        """Whether this is news of an attempt that runs; it starts again.

        None of one that goes on without that peer.
        """
        request = told_by(self._open, peer, message)
        if request is None or message.peer not in request.tried[request.attempt].peers().values():
            return False
        request.deployment = None
        return True

    def not_kept(self, peer: str, message: m.NotKept) -> list[Effect]:
        """Where it is the head that says so, inputs are gone, and only the client has them."""
        request = told_by(self._open, peer, message)
        if request is None or request.merged is not None:
            return []
        request.deployment = None
        return [Send(Plane.CONTROL, request.client, m.Who())] if peer == self._head else []

    def share_attempt(self, client: str, other: str) -> bool:
        """Whether a client and a device have a part in an attempt of a request of the client's."""
        mine = (r for r in self._open.values() if r.client == client)
        tries = (tried.peers().values() for request in mine for tried in request.tried.values())
        return any({client, other} <= set(peers) for peers in tries)

    @property
    def _head(self) -> str:
        head = self._members.head
        return "" if head is None else head.peer
