"""When a better plan is looked for than the one that serves: rarely, since it takes the
coordinator's device from requests, and not before what has changed is known."""

from __future__ import annotations

from collections.abc import Collection

from meshinfer import limits
from meshinfer.scheduler.ages import Pair, among, bettered, known_links
from meshinfer.scheduler.balance import Balance, pause_of
from meshinfer.scheduler.catalogue import Catalogue, Deployment, Phase
from meshinfer.scheduler.changes import Links
from meshinfer.scheduler.membership import Device, Membership


class Replanning:
    """Mutable: owned by the coordinator's core. ``busy_at``: when requests ran last."""

    def __init__(self, members: Membership, balance: Balance) -> None:
        self._members, self._balance = members, balance
        self.busy_at = 0.0

    def planned(self, made: Deployment) -> None:
        """A plan is made by the links as they are now."""
        members = self._members
        known = known_links(members, made.candidates)
        made.links = Links(members.links_changed, members.links_bettered, known)

    def overtaken(self, coming: Deployment, serving: Deployment | None, now: float) -> bool:
        """Whether a plan that is on its way, beside one that serves, is to be dropped: it is looked
        for for a small gain, and a device has become slow; or devices are, as far as is sure, no
        more what it is for. Noted; not more than twice in turn, should they change all the time."""
        if serving is None or coming.share == 1.0:
            return False
        planning = coming.phase is Phase.PLANNING
        over = self.due(serving, now, coming.share if planning else 1.0)
        if not over and self._outdated(coming, serving, now):
            over = serving.drift.overtaken < limits.PACE_OVERTAKEN
            serving.drift.overtaken += over
        return over

    def due(self, made: Deployment, now: float, under_way: float = 0.0) -> bool:
        """Whether devices or links have changed so much that another plan may be better.

        Not where the plan was given, and not where each request's tasks go to who is free.
        ``under_way``: the share that a search takes which is: one for a small gain is over once a
        device has become slow.
        """
        if made.given or len(made.choices) == made.tasks or len(made.candidates) < 2:
            return False
        self._balance.look(made, now)
        self._look_at_links(made)
        # A search takes the coordinator's device, maybe as slow as the others, from its tasks.
        # So for a small gain it is rare, waits until nothing runs, and is rarer each time in vain;
        # and a model that nobody asks gains nothing.
        grave = self.grave(made)
        upset = made.drift.times > limits.PACE_UPSET * made.drift.tried
        pause_s = pause_of(made.search_s, made.in_vain, grave=grave, upset=upset)
        quiet = now >= self.busy_at + limits.REPLAN_QUIET_S
        asked = made.asked >= limits.REPLAN_REQUESTS
        adapted = made.drift.adapted  # a search may find better, so it comes some time
        changed = made.drift.uneven or self._links_changed(made) or adapted
        may = quiet or grave or adapted
        wanted = changed and asked and may and now >= made.since + pause_s
        if under_way:
            wanted = wanted and grave and under_way <= limits.SEARCH_SHARE
        return self._settled(made, now, grave=grave, wanted=wanted)

    def factors(
        self, names: Collection[str], present: Deployment | None, now: float
    ) -> dict[str, float]:
        """How fast devices are for a plan that is looked for now, beside a ``present`` one. While
        one of its devices keeps the others waiting, these rest and do their tasks sooner than they
        could with more to do: that they have become faster is not believed then."""
        found = {name: self._balance.factor(name, now) for name in names}
        if present is None:
            return found
        before = {n: present.factors.get(n, 1.0) for n in names if n in present.programs}
        if all(found[n] <= limits.PACE_GRAVE * factor for n, factor in before.items()):
            return found
        return {n: max(factor, min(before.get(n, 0.0), 1.0)) for n, factor in found.items()}

    def grave(self, made: Deployment) -> bool:
        """Whether so much has changed that requests need not be spared."""
        return made.drift.times > limits.PACE_GRAVE or self._links_changed(made)

    def paced(self, made: Deployment, names: Collection[str]) -> bool:
        """Whether these devices have become much faster or slower, and nothing else has changed."""
        same = tuple(names) == made.candidates and not self._links_changed(made)
        return same and made.drift.times > limits.PACE_GRAVE

    def _settled(self, made: Deployment, now: float, *, grave: bool, wanted: bool) -> bool:
        """Whether another plan is wanted, and need not wait any more.

        A device that becomes slow is so within a task: a plan for what it was on the way there
        would be followed by another, and a search for a small gain keep the one that is needed.
        """
        since, was = made.drift.wanted_at or (now, grave)
        if not wanted or was is not grave:
            since = now
        made.drift.wanted_at = (since, grave) if wanted else None
        waited = now >= since + (limits.PACE_SETTLE_S if grave else limits.PACE_SETTLE_MOST_S)
        names = made.candidates if grave else tuple(made.programs)
        return wanted and (waited or self._balance.settled(names, now))

    def _outdated(self, coming: Deployment, serving: Deployment, now: float) -> bool:
        """Whether devices are others than it is for, and what serves is not for worse ones."""
        if self._balance.count < coming.drift.looked + len(coming.candidates):
            return False  # not enough is new
        coming.drift.looked = self._balance.count
        apart = self._apart(coming, now)
        if apart <= limits.PACE_GRAVE:
            return False
        return apart * limits.PACE_DEVIATION >= self._apart(serving, now)

    def _apart(self, made: Deployment, now: float) -> float:
        """By how much devices differ from what a plan is for, as far as is sure. Who is slower yet
        than it was when left out is nobody's loss."""
        balance, planned = self._balance, made.factors.items()
        times = {n: balance.factor(n, now) / f for n, f in planned if balance.sure(n, now)}
        if made.programs:
            times = {n: t if n in made.programs else min(t, 1.0) for n, t in times.items()}
        return max(times.values(), default=1.0) / min(times.values(), default=1.0)

    def _links_changed(self, made: Deployment) -> bool:
        return made.links.nearer or bool(self.changed_links(made))

    def changed_links(self, made: Deployment) -> list[Pair]:
        """Since a plan was made, of devices that have tasks: who has none may have none since its
        links are slow."""
        then, now = made.links.changed, self._members.links_changed
        if now is then:
            return []
        ours = {*made.programs, made.head} if made.programs else self._members.devices
        changed = [pair for pair, n in now.items() if n != then.get(pair) and among(pair, ours)]
        made.links.changed = then if changed else now  # looked at no more
        return changed

    def _look_at_links(self, made: Deployment) -> None:
        """Whether devices are left out for links that are found to be much better."""
        links, members = made.links, self._members
        if links.seen == members.links_bettered:
            return
        links.seen = members.links_bettered
        here = [name for name in made.candidates if name in members.devices]
        links.nearer = bettered(links.known, known_links(members, here), made.idle)


def disturbs(catalogue: Catalogue, members: Membership, device: Device) -> bool:
    """Whether a search takes so much of a device that its tasks slow down: of the coordinator's."""
    head = members.head
    return catalogue.searching and head is not None and device.where == head.where
