"""Who is slow is left only for those that are sooner done with its tasks and their own. Paces are
set, cores are real."""

from __future__ import annotations

from collections import deque

from msgspec import structs
from test_fallback import settled
from test_paces import Noisy

from meshinfer import limits
from meshinfer.scheduler.balance import _Pace
from meshinfer.scheduler.catalogue import Deployment

SLOW = 5.0


class Paced(Noisy):
    """``take``: what devices take for their tasks, as a multiple of what they should."""

    def __init__(self) -> None:
        super().__init__()
        self.deployed()
        settled(self)
        (self.made,) = self.core.catalogue.deployments.values()

    def take(self, **times: float) -> None:
        for name in self.made.candidates:
            ratio = times.get(name.replace("-", ""), 1.0)
            pace = self.core._balance._paces.setdefault(name, _Pace())
            pace.samples = deque([(self.now, ratio)] * limits.PACE_SAMPLES)
        self.core._balance.count += 1

    @property
    def left(self) -> dict[str, set[str]]:
        """Who is, and to whom its tasks go."""
        found = self.core._answering.leaving.tasks(self.made, self.now)
        return {name: set(takers.values()) for name, takers in found.items()}


def places(made: Deployment, name: str) -> set[object]:
    return {p.place for p in made.programs[name]}


def test_who_is_much_slower_is_left_for_who_stands_by() -> None:
    paced = Paced()
    paced.take()
    assert not paced.left
    paced.take(pi2=limits.PACE_LEFT - 0.1)
    assert not paced.left
    paced.take(pi2=SLOW)
    assert paced.left.keys() == {"pi-2"} and "pi-2" not in paced.left["pi-2"]
    found = paced.core._answering.leaving.tasks(paced.made, paced.now)["pi-2"]
    assert found.keys() == places(paced.made, "pi-2")


def test_nobody_who_is_slow_or_away_gets_tasks_of_another() -> None:
    paced = Paced()
    paced.take(pi2=SLOW)
    taker = min(paced.left["pi-2"])
    paced.take(pi2=SLOW, **{taker.replace("-", ""): SLOW})
    assert taker not in {name for names in paced.left.values() for name in names}
    paced.take(pi2=SLOW)
    paced.core.members.presence.silent.add(taker)
    assert taker not in paced.left.get("pi-2", set())


def test_who_stands_by_and_would_not_sooner_be_done_gets_nothing() -> None:
    """With its own tasks and the other's, at nearly the same pace."""
    paced = Paced()
    paced.take(pi2=limits.PACE_LEFT + 0.1)
    takers = paced.left["pi-2"]
    slow = {name.replace("-", ""): limits.PACE_LEFT - 0.1 for name in takers}
    paced.take(pi2=limits.PACE_LEFT + 0.1, **slow)
    assert paced.core._balance.slow(paced.made, paced.now).keys() == {"pi-2"} and not paced.left


def test_of_devices_that_become_slow_together_not_all_go_to_one() -> None:
    """Who did the tasks of two of them would be done no sooner."""
    paced = Paced()
    *rest, fast = paced.made.candidates
    for name in rest:
        alike = [structs.replace(p, devices=(name, fast)) for p in paced.made.programs[name]]
        paced.made.programs = {**paced.made.programs, name: tuple(alike)}
        took = {(p.place, fast): paced.made.seconds(p.place, name) or 0.0 for p in alike}
        paced.made.expected = {**paced.made.expected, **took}
    slow = [name.replace("-", "") for name in rest]
    paced.take(**dict.fromkeys(slow, limits.PACE_LEFT + 0.1))
    assert list(paced.left.values()) == [{fast}]
    paced.take(**dict.fromkeys(slow, 8 * limits.PACE_LEFT))
    assert paced.left == {name: {fast} for name in rest}


def test_who_is_left_comes_back_once_all_of_its_newest_tasks_are_fast() -> None:
    """Or it would come and go."""
    paced = Paced()
    paced.take(pi2=SLOW)
    assert "pi-2" in paced.left
    for fast in range(1, limits.PACE_SAMPLES_LEAST + 1):
        paced.core._balance._note("pi-2", 1.0, paced.now)
        assert ("pi-2" in paced.left) is (fast < limits.PACE_SAMPLES_LEAST)
    for slow in range(1, limits.PACE_SAMPLES_LEAST + 1):
        paced.core._balance._note("pi-2", SLOW, paced.now)
        assert ("pi-2" in paced.left) is (slow >= limits.PACE_SAMPLES_LEAST - 1)


def test_tasks_of_a_silent_device_go_rather_to_one_that_is_not_left() -> None:
    paced = Paced()
    paced.take()
    fallback = paced.core._answering.fallback
    first = set(fallback.takers(paced.made, {"pi-1"}).values())
    slow = min(first)
    paced.take(**{slow.replace("-", ""): SLOW})
    assert slow in paced.left
    assert slow not in fallback.takers(paced.made, {"pi-1"}, paced.left).values()


def test_who_has_no_spare_that_is_ready_keeps_its_tasks() -> None:
    paced = Paced()
    paced.take(pi2=SLOW)
    paced.made.spares.ready.clear()
    assert not paced.left
