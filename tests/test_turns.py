"""After a loss, what requests wait for is planned first; models that nobody asks come one by one.
Virtual time and real cores."""

from __future__ import annotations

from typing import Any

from cores import Cluster, conv_net, image

from meshinfer import limits
from meshinfer.scheduler.catalogue import Phase

SIZE = (48, 20)
MODEL = conv_net(SIZE)
NAMES = ("pi-1", "pi-2", "pi-3")
MODELS = ("first", "second", "third", "fourth", "fifth", "sixth")


class Shelf(Cluster):
    """Of many models. ``planned``: which were, in order; ``beside``: each beside how many others
    that were planned or installed then."""

    def __init__(self) -> None:
        super().__init__(NAMES)
        self.planned: list[str] = []
        self.beside: list[int] = []
        self.plan_s = 1.0
        for name in MODELS:
            self.deployed(name, MODEL)

    def _plan(self, node: Any, effect: Any) -> Any:
        deployments = self.core.catalogue.deployments
        self.planned.append(deployments[effect.deployment].model.name)
        coming = (Phase.PLANNING, Phase.INSTALLING)
        self.beside.append(sum(d.phase in coming for d in deployments.values()) - 1)
        return super()._plan(node, effect)

    def lose(self, name: str) -> None:
        self.planned.clear()
        self.beside.clear()
        self.kill(name)

    def stream(self, model: str, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            assert self.reply(self.submit(image(size=SIZE), model)).failure is None

    @property
    def current(self) -> set[str]:
        """Models with a plan for those that are here now."""
        here = tuple(n for n in NAMES if n in self.core.members.devices)
        made = self.core.catalogue.deployments.values()
        return {d.model.name for d in made if d.phase is Phase.READY and d.candidates == here}


def test_what_is_asked_is_planned_first_and_the_others_one_by_one() -> None:
    shelf = Shelf()
    shelf.stream("fifth", limits.UNASKED_S + 1.0)
    shelf.lose("pi-2")
    shelf.stream("fifth", 60.0)
    assert shelf.planned[0] == "fifth" and sorted(shelf.planned) == sorted(MODELS)
    assert not any(shelf.beside)
    assert shelf.current == set(MODELS)


def test_who_begins_to_ask_does_not_wait_for_the_turn_of_a_model() -> None:
    shelf = Shelf()
    shelf.pass_time(limits.UNASKED_S + 1.0)
    shelf.plan_s = 30.0
    shelf.lose("pi-2")
    shelf.pass_time(5.0)
    assert shelf.planned == [MODELS[0]]
    shelf.plan_s = 1.0
    shelf.stream("sixth", 3.0)
    assert shelf.planned == [MODELS[0], "sixth"] and "sixth" in shelf.current


def test_what_keeps_a_device_that_wants_to_leave_does_not_wait() -> None:
    shelf = Shelf()
    shelf.stream("fifth", limits.UNASKED_S + 1.0)
    shelf.planned.clear()
    shelf.core.members.devices["pi-2"].draining = True
    shelf.stream("fifth", 5 * shelf.plan_s)
    assert sorted(shelf.planned) == sorted(MODELS) and max(shelf.beside) > 0
    assert "pi-2" not in shelf.core.members.devices


def test_a_turn_ends_when_its_devices_take_too_long_to_prepare() -> None:
    shelf = Shelf()
    shelf.pass_time(limits.UNASKED_S + 1.0)
    shelf.prepare_s = 3 * limits.TURN_S
    shelf.lose("pi-2")
    shelf.pass_time(limits.TURN_S / 2)
    assert shelf.planned == [MODELS[0]]
    shelf.pass_time(limits.TURN_S)
    assert shelf.planned == list(MODELS[:2])


def test_models_that_are_all_asked_are_planned_at_once() -> None:
    shelf = Shelf()
    for name in MODELS:
        shelf.stream(name, 0.1)
    shelf.lose("pi-2")
    shelf.pass_time(5.0)
    assert max(shelf.beside) >= limits.PLANS_AT_ONCE - 1
    assert shelf.current == set(MODELS)
