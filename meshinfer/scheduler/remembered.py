"""Plans of an earlier coordinator, taken up again while their devices are as they were.

So a restart costs no search, no lowering and no process that plans: devices have all the blobs.
"""

from __future__ import annotations

from meshinfer import limits
from meshinfer.scheduler.catalogue import Catalogue, Deployment, Model
from meshinfer.scheduler.events import PlanReady
from meshinfer.scheduler.ledger import Planned, Signature
from meshinfer.scheduler.membership import Membership

_Key = tuple[int, Signature]


def entry_of(made: Deployment, members: Membership) -> Planned:
    """What is written down of a plan that is ready."""
    here = [name for name in made.members if name in members.devices and name != made.head]
    devices = {name: members.devices[name] for name in here}
    return Planned(
        name=made.model.name,
        version=made.model.reserved,
        signature=made.signature,
        head=made.head,
        candidates=made.candidates,
        grants={name: device.hello.facts.memory_bytes for name, device in devices.items()},
        plan=made.plan,
        programs=made.programs,
        report=made.report,
        window=made.window,
        expected=tuple((*key, seconds) for key, seconds in made.expected.items()),
    )


class Remembered:
    """Mutable: owned by the coordinator's core. Devices have until ``_until`` to come back."""

    def __init__(self, members: Membership) -> None:
        self._members = members
        self._plans: dict[_Key, Planned] = {}
        self._until = 0.0

    def begin(self, now: float) -> None:
        self._until = now + limits.RESUME_WAIT_S

    def add(self, model: Model, entry: Planned) -> None:
        self._plans[model.key, entry.signature] = entry

    def awaits(self, model: Model, signature: Signature, now: float) -> bool:
        """Whether there is a plan, and its devices may still come."""
        if now >= self._until:
            self._plans.clear()
        return (model.key, signature) in self._plans

    def take_up(
        self, catalogue: Catalogue, model: Model, signature: Signature, now: float
    ) -> PlanReady | None:
        """A deployment of what an earlier coordinator had, if its devices are back."""
        entry = self._take(model, signature, now)
        if entry is None:
            return None
        devices = self._members.devices
        members = {name: devices[name].peer for name in (*entry.grants, entry.head)}
        made = catalogue.new_deployment(model, signature, members, entry.candidates, now)
        made.head, made.given = entry.head, model.plan is not None
        made.links.changed = self._members.links_changed
        return PlanReady(
            made.number,
            entry.plan,
            entry.programs,
            entry.report,
            window=entry.window,
            expected={(place, device): seconds for place, device, seconds in entry.expected},
        )

    def _take(self, model: Model, signature: Signature, now: float) -> Planned | None:
        """The plan, as soon as its devices are here as they were."""
        entry = self._plans.get((model.key, signature))
        head = self._members.head
        if entry is None or head is None or head.name != entry.head:
            return None
        ready = {*self._members.ready(now), head.name}
        if not {*entry.grants, *entry.programs} <= ready:
            return None
        for name, grant in entry.grants.items():
            if self._members.devices[name].hello.facts.memory_bytes < grant:
                del self._plans[model.key, signature]
                return None
        return self._plans.pop((model.key, signature))

    def next_deadline(self) -> float | None:
        return self._until if self._plans else None
