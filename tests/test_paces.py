"""A device that becomes slow and recovers costs one plan each time, noise none; and who is left out
for a wrong first figure is found out. Virtual time and real cores, and tasks as noisy as real ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cores import Cluster, _imported, banded, conv_net, image, kind

from meshinfer import limits
from meshinfer.cost import DeviceProfile
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan
from meshinfer.planner import find_spares, pins_of
from meshinfer.planner.spares import TIMED
from meshinfer.protocol import messages as m
from meshinfer.scheduler.balance import Balance
from meshinfer.scheduler.catalogue import Deployment, Phase
from meshinfer.scheduler.computing import Computing
from meshinfer.scheduler.events import Computed, Send, Signature
from meshinfer.scheduler.installing import Installing
from meshinfer.scheduler.replanning import Replanning, disturbs
from meshinfer.scheduler.trying import Trying, made_up

SIZE = (48, 20)
MODEL = conv_net(SIZE)
NAMES = ("pi-1", "pi-2", "pi-3", "pi-4")
FLOPS = 5e6
"""A request then takes half a second on all four."""
NOISE = 0.15
SLOW = 5.0
SOON_S = 10.0
"""Within so long after a change the best plan is to serve."""
LATE_S = 0.02
"""A link that seems that slow is not worth using."""


class Noisy(Cluster):
    """Four devices whose tasks take up to NOISE more or less than they should.

    ``useless``: so many times slower than the fastest, a device gets no task; nor one with a link
    of LATE_S. ``booting``: its echoes are late. ``searched``: when, and by which paces; ``paced``:
    whether plans of before would do. ``adapts``: then one is made from them.
    """

    def __init__(
        self, seed: int = 0, *, useless: float = 3.0, booting: str = "", **flops: float
    ) -> None:
        super().__init__(())
        self.by_work, self.rng = True, random.Random(seed)
        self.useless, self.booting = useless, booting
        self.searched: list[tuple[float, dict[str, float]]] = []
        self.paced: list[bool] = []
        self.adapts = False
        for name in NAMES:
            facts = m.Facts(flops_per_s=flops.get(name.replace("-", ""), FLOPS), host=name)
            self.join(name, facts)
        self.settle(lambda: len(self.core.members.devices) == 1 + len(NAMES))
        self.pass_time(5.0)  # all links are known

    def _seconds(self, node: Any, job: Any) -> float:
        return super()._seconds(node, job) * self.rng.uniform(1 - NOISE, 1 + NOISE)

    def _deliver(self, sender: Any, receiver: Any, plane: Any, message: Any, payload: Any,
                 extra: float) -> None:  # fmt: skip
        echo = isinstance(message, m.Echo | m.Echoed)
        late = echo and self.booting in (sender.name, receiver.name)
        super()._deliver(sender, receiver, plane, message, payload, extra + LATE_S * late)

    def _plan(self, node: Any, effect: Any) -> Any:
        speeds = {c.device: c.facts.flops_per_s / c.slowdown for c in effect.candidates}
        late = {c.device for c in effect.candidates if c.link and c.link.latency_s >= LATE_S}
        best = max(speeds.values())
        used = [n for n, s in speeds.items() if s * self.useless > best and n not in late]
        self.searched.append((self.now, {c.device: c.slowdown for c in effect.candidates}))

        def planner(graph: Graph, names: Sequence[str]) -> Plan:
            return banded(graph, used, effect.head, [round(speeds[n]) for n in used])

        self.planner = planner
        self.paced.append(effect.paced)
        return replace(super()._plan(node, effect), adapted=self.adapts and effect.paced)

    def stream(self, seconds: float) -> list[m.Reply]:
        """Requests one after another."""
        end, replies, arrays = self.now + seconds, [], image(size=SIZE)
        while self.now < end:
            replies.append(self.reply(self.submit(arrays)))
            assert replies[-1].failure is None and replies[-1].attempts == 1
        return replies

    @property
    def deployments(self) -> list[Deployment]:
        """The newest last."""
        return list(self.core.catalogue.deployments.values())

    def uses(self, reply: m.Reply) -> set[str]:
        return {d for s in Plan.parse(reply.plan).stages for t in s.tasks for d in t.devices}


def on(reply: m.Reply) -> set[str]:
    """Who did tasks of it."""
    return {task.device for task in reply.tasks}


class Saving(Noisy):
    """Whoever is slow has a quota, of which half a period's is saved up while it has nothing to do:
    so long its tasks are as fast as ever."""

    PERIOD_S = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[str, float] = {}
        self.until: dict[str, float] = {}

    def _seconds(self, node: Any, job: Any) -> float:
        took, name = super()._seconds(node, job), node.name
        slowness = self.slowness.get(name, 1.0)
        if self.now > self.until.get(name, 0.0) + self.PERIOD_S:
            self.saved[name] = self.PERIOD_S / 2
        if slowness > 1.0 and self.saved.get(name, 0.0) > 0.0:
            took /= slowness
            self.saved[name] -= took
        self.until[name] = self.now + took
        return took


class Between(Noisy):
    """Whoever is slow has a quota that ends between two runs of a short task, not within one."""

    def post(self, node: Any, event: Any, *more: Any) -> None:
        slowness = self.slowness.get(node.name, 1.0)
        if isinstance(event, Computed) and not event.request and slowness > 1.0:
            event = replace(event, compute_s=event.compute_s / slowness)
        super().post(node, event, *more)


# --- one plan for each change


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("useless", [3.0, 99.0])
def test_a_device_that_becomes_slow_and_recovers_costs_one_plan_each_time(
    seed: int, useless: float
) -> None:
    """C10. It is left out meanwhile, or given a little."""
    made = Noisy(seed, useless=useless)
    made.deployed(model=MODEL)
    made.stream(12.0)
    assert len(made.searched) == 1, "of noise"
    slow_at = made.now
    made.slowness["pi-3"] = SLOW
    (*_, last) = made.stream(60.0)
    assert ("pi-3" in made.uses(last)) is (useless > SLOW)
    back_at = made.now
    made.slowness["pi-3"] = 1.0
    (*_, last) = made.stream(40.0)
    assert made.uses(last) == set(NAMES)
    (_, (first_at, slow), (second_at, back)) = made.searched
    assert slow["pi-3"] == pytest.approx(SLOW, rel=0.25)
    assert back["pi-3"] == pytest.approx(1.0, rel=0.25)
    assert first_at - slow_at < SOON_S and second_at - back_at < SOON_S
    made.check_idle()


@pytest.mark.parametrize("quota", [Saving, Between])
def test_what_a_quota_gives_a_device_that_was_left_out_makes_it_no_fast_one(quota: Any) -> None:
    made = quota()
    made.deployed(model=MODEL)
    made.stream(12.0)
    made.slowness["pi-3"] = SLOW
    made.stream(60.0)
    assert len(made.searched) == 2 and made.searched[1][1]["pi-3"] > 3.0
    made.slowness["pi-3"] = 1.0
    (*_, last) = made.stream(20.0)
    assert made.uses(last) == set(NAMES) and len(made.searched) == 3


def test_what_was_made_from_plans_of_before_is_followed_by_one_search_while_requests_run() -> None:
    made = Noisy()
    made.adapts, made.plan_s = True, 0.3
    made.deployed(model=MODEL)
    made.stream(12.0)
    made.slowness["pi-3"] = SLOW
    made.stream(15.0)
    assert made.paced == [False, True]
    made.stream(made.plan_s / limits.REPLAN_SHARE + 10.0)
    assert made.paced == [False, True, False], "then it is known that there is nothing better"
    made.slowness["pi-3"] = 1.0
    made.stream(15.0)
    assert made.paced == [False, True, False, True]


def test_a_plan_waits_until_it_is_known_how_slow_a_device_has_become() -> None:
    balance = Balance()
    for i in range(20):
        for name in NAMES:
            ratios = [*[1.0] * 12, 2.6, 2.4, 5.2, 3.6, 4.5, 4.4, 4.6, 4.5]
            balance.measured("net", name, ratios[i] if name == "pi-2" else 1.0, float(i))
        if i == 15:
            assert balance.factor("pi-2", 15.0) < 3.0 and not balance.settled(NAMES, 15.0)
            assert balance.settled(NAMES, 16.0 + limits.PACE_FORGOTTEN_S), "nobody is timed"
        if i == 17:
            assert balance.factor("pi-2", 17.0) > 4.0 and balance.settled(NAMES, 17.0)


def test_noise_alone_is_never_grave_whatever_the_seed() -> None:
    for seed in range(200):
        balance, rng = Balance(), random.Random(seed)
        for i in range(200):
            for name in NAMES:
                balance.measured("net", name, rng.uniform(1 - NOISE, 1 + NOISE), float(i))
            drift = balance.drift(NAMES, {}, 0.0, float(i))
            assert drift <= limits.PACE_GRAVE, f"seed {seed}, after {i} tasks each: {drift}"


def test_a_base_that_was_taken_in_a_bad_moment_makes_not_all_fast_and_no_newcomer_slow() -> None:
    balance = Balance()
    for i in range(20):
        for name in NAMES[:3]:
            own = 1.25 if name == "pi-2" else 1.0
            balance.measured("net", name, own * (4.0 if i < 4 else 1.0), float(i))
    factors = {name: balance.factor(name, 20.0) for name in NAMES}
    assert factors == pytest.approx({"pi-1": 0.8, "pi-2": 1.0, "pi-3": 0.8, "pi-4": 0.8})
    assert balance.drift(NAMES, factors, 0.0, 20.0) == pytest.approx(1.0)


def test_who_is_not_known_any_more_is_planned_as_most_are_and_that_is_no_drift() -> None:
    balance = Balance()
    for i in range(20):
        for name, ratio in zip(NAMES, (1.0, 1.6, 1.6, 1.6), strict=True):
            if name != "pi-4" or i < 10:
                balance.measured("net", name, ratio * (1.0 if i > 8 else 0.7), 10.0 * i)
    now = 200.0
    factors = {name: balance.factor(name, now) for name in NAMES}
    assert factors["pi-4"] == factors["pi-3"] > 1.2 * factors["pi-1"]
    assert balance.drift(NAMES, factors, 0.0, now) == pytest.approx(1.0)


def test_that_others_have_become_faster_is_not_believed_while_they_wait_for_one() -> None:
    """Who rests meanwhile has more of its quota, or of the machine that it shares."""
    made = Noisy()
    made.deployed(model=MODEL)
    made.stream(10.0)
    made.slowness.update({"pi-1": 0.6, "pi-3": SLOW})
    made.stream(20.0)
    paces = made.searched[1][1]
    assert paces["pi-3"] > 3.0 and paces["pi-1"] > 0.9
    made.stream(60.0)
    assert made.searched[-1][1]["pi-1"] < 0.75, "but if it lasts"


def test_what_was_measured_before_a_plan_was_made_is_no_drift_from_it() -> None:
    balance = Balance()
    for i in range(12):
        for name in NAMES:
            balance.measured("net", name, 4.0 if name == "pi-2" and i >= 6 else 1.0, float(i))
    assert balance.drift(NAMES, {}, 0.0, 12.0) == pytest.approx(4.0)
    assert balance.drift(NAMES, {"pi-2": 2.0}, 11.5, 12.0) == 1.0


def test_that_a_device_without_tasks_is_slower_yet_is_no_drift_but_that_it_is_faster_is() -> None:
    balance = Balance()
    for i in range(12):
        for name in NAMES:
            balance.measured("net", name, 3.0 if name == "pi-2" else 1.0, float(i))
    assert balance.drift(NAMES, {}, 0.0, 12.0, idle=("pi-2",)) == 1.0
    assert balance.drift(NAMES, {"pi-2": 9.0}, 0.0, 12.0, idle=("pi-2",)) == pytest.approx(3.0)


# --- devices that the plan leaves out


def test_a_device_that_measured_itself_too_slow_is_found_out_and_used() -> None:
    """As one that is busy booting does."""
    made = Noisy(pi4=FLOPS / 10)
    made.slowness["pi-4"] = 0.1
    made.deployed(model=MODEL)
    first, *_, last = made.stream(2 * SOON_S)
    assert "pi-4" not in made.uses(first) and made.uses(last) == set(NAMES)
    assert len(made.searched) == 2
    made.check_idle()


def test_a_device_that_really_is_slow_is_tried_for_a_small_part_of_its_time_and_left_alone(
) -> None:  # fmt: skip
    made = Noisy(pi4=FLOPS / 10)
    made.deployed(model=MODEL)
    replies = made.stream(40.0)
    assert not any("pi-4" in made.uses(reply) for reply in replies) and len(made.searched) == 1
    assert limits.PACE_SAMPLES_LEAST <= made.sent["Tried"] <= 40.0 / limits.TRY_S + 4


def test_nobody_is_tried_whom_the_plan_uses_or_while_nobody_asks() -> None:
    made = Noisy()
    made.deployed(model=MODEL)
    made.stream(10.0)
    assert not made.sent["Try"]
    made = Noisy(pi4=FLOPS / 10)
    made.deployed(model=MODEL)
    made.stream(10.0)
    before = made.sent["Try"]
    assert before
    made.pass_time(4 * limits.TRY_S)
    assert made.sent["Try"] <= before + 1


def test_after_a_process_that_ended_while_it_was_tried_nobody_is_for_that_plan() -> None:
    made = Noisy(pi4=FLOPS / 10)
    made.deployed(model=MODEL)
    made.when(kind(m.Try, to="pi-4"), lambda: made.kill("pi-4"))
    made.stream(5.0)
    assert made.sent["Try"] == 1 and "pi-4" not in made.core.members.devices
    made.join("pi-5", m.Facts(flops_per_s=FLOPS / 10, host="pi-5"))
    made.stream(20.0)
    spoilt = set(made.core._tries._spoilt)
    assert not spoilt & made.core.catalogue.deployments.keys(), "a new plan was made"
    assert made.sent["Try"] > 1
    made.check_idle()


def test_who_may_have_ended_of_a_try_is_tried_ever_more_seldom() -> None:
    """Each end costs a plan."""
    made = Noisy(pi4=FLOPS / 10)
    made.deployed(model=MODEL)
    at = list[float]()

    def end() -> None:
        at.append(made.now)
        made.kill("pi-4")

    for _ in range(3):
        made.when(kind(m.Try, to="pi-4"), end)
        before = len(at)
        while len(at) == before:
            made.pass_time(20.0)
            made.stream(2.0)
        made.join("pi-4", m.Facts(flops_per_s=FLOPS / 10, host="pi-4"))
    pauses = [b - a for a, b in pairwise(at)]
    assert all(p > 4 * limits.TRY_VAIN_S for p in pauses) and pauses[1] > 3 * pauses[0]
    made.stream(5.0)
    made.check_idle()


def test_who_cannot_run_a_task_on_made_up_inputs_says_so_and_is_asked_seldom() -> None:
    made = Noisy(pi4=FLOPS / 10)
    made.deployed(model=MODEL)
    worker: Any = made.nodes["pi-4"].core
    worker._trying._running = (0, (0, 0))  # it never ends
    made.stream(20.0)
    assert 2 <= made.sent["Try"] == made.sent["Tried"] <= 4


def test_a_try_waits_for_what_is_being_prepared() -> None:
    """At a tenth of a core that takes seconds, and makes a device seem many times slower yet."""
    installing, computing = Installing("pi-1"), SimpleNamespace(free=True)
    trying = Trying(cast(Computing, computing), installing)
    word = m.Try(deployment=1, place=(0, 0))
    assert not installing.preparing and len(trying.asked(word, 0.0)) == 1 and not trying.wanted
    installing._spare = (1, 0.0)
    assert trying.asked(word, 0.0) == [] and trying.wanted
    assert trying.prepared(1.0) == [] and trying.wanted, "that was another deployment"
    installing._spare = None
    (told,) = trying.prepared(2.0)
    assert isinstance(told, Send) and isinstance(told.message, m.Tried) and not trying.wanted
    assert trying.prepared(3.0) == []


def test_inputs_are_made_up_by_their_kinds() -> None:
    made = Noisy(pi4=FLOPS / 10)
    made.deployed(model=MODEL)
    made.stream(5.0)
    worker: Any = made.nodes["pi-4"].core
    (deployment,) = worker._installing.deployments.values()
    recipe = next(r for r in deployment.recipes.values() if r.program.model)
    inputs = made_up(recipe)
    assert inputs is not None
    assert {n: a.dtype.str for n, a in inputs.items()} == {
        value.name: value.dtype for value in recipe.program.inputs
    }
    assert all((a == 0.5).all() and a.size for a in inputs.values())


# --- links of devices that the plan leaves out


@pytest.mark.parametrize("busy", [False, True])
def test_a_link_that_measured_too_slow_at_first_is_measured_again_and_its_device_used(
    busy: bool,
) -> None:
    made = Noisy(booting="pi-4")
    made.deployed(model=MODEL)
    made.stream(5.0)
    made.booting = ""
    if busy:  # there is no moment at which nothing runs
        arrays = image(size=SIZE)
        open_ = [made.submit(arrays) for _ in range(4)]
        for _ in range(80):
            open_.append(made.submit(arrays))
            last = made.reply(open_.pop(0))
    else:
        (*_, last) = made.stream(60.0)
    assert made.uses(last) == set(NAMES)
    assert len(made.searched) <= 3


def test_a_search_for_a_small_gain_ends_when_a_device_becomes_slow() -> None:
    """1. While nothing runs, a search begins that takes long; 2. a device becomes slow; 3. the next
    search, by what it is now, does not wait for the first, whose plan nobody gets."""
    made = Noisy()
    made.deployed(model=MODEL)
    made.stream(12.0)
    made.slowness["pi-2"] = 1.3
    made.plan_s = 30.0
    made.stream(12.0)
    made.pass_time(10.0)
    assert len(made.searched) == 2 and made.searched[1][1]["pi-2"] < 1.5
    made.slowness["pi-3"] = SLOW
    made.plan_s = 0.3
    (*_, last) = made.stream(25.0)
    assert [round(paces["pi-3"]) for _, paces in made.searched] == [1, 1, 5]
    assert "pi-3" not in made.uses(last) and not last.degraded


def test_a_plan_that_is_being_prepared_when_a_device_becomes_slow_serves_nobody() -> None:
    """It gives that device as much as ever, and would keep the one waiting that is needed."""
    made = Noisy()
    made.deployed(model=MODEL)
    made.stream(12.0)
    made.slowness["pi-2"] = 1.3
    made.stream(12.0)
    made.prepare_s = 40.0
    made.pass_time(10.0)
    assert len(made.searched) == 2 and made.searched[1][1]["pi-2"] < 1.5
    (_, coming) = made.core.catalogue.deployments.values()
    assert coming.phase is Phase.INSTALLING
    made.slowness["pi-3"] = SLOW
    made.prepare_s = 0.1
    replies = made.stream(25.0)
    assert [round(paces["pi-3"]) for _, paces in made.searched] == [1, 1, 5]
    assert coming.phase is Phase.RETIRED and all(d is not coming for d in made.deployments)
    assert "pi-3" not in made.deployments[-1].programs and not replies[-1].degraded


def test_others_do_the_tasks_of_a_device_that_becomes_slow_until_there_is_a_plan() -> None:
    """Once it is sure; and its own again when it is as fast as before, which is seen by tries."""
    made = Noisy()
    made.deployed(model=MODEL)
    made.stream(12.0)
    made.plan_s = 1000.0
    made.slowness["pi-3"] = SLOW
    replies = made.stream(2 * limits.PACE_FORGOTTEN_S)
    slow = [i for i, reply in enumerate(replies) if "pi-3" in on(reply)]
    assert slow == list(range(len(slow))) and len(slow) < limits.PACE_SAMPLES
    later = replies[len(slow) :]
    assert all("pi-3 had become slow: " in reply.reasons[0] for reply in later)
    took = [reply.total_s for reply in replies]
    assert max(took[len(slow) :]) < 0.5 * min(took[: len(slow)])
    made.slowness["pi-3"] = 1.0
    made.stream(SOON_S)
    assert all(on(reply) == set(NAMES) and not reply.degraded for reply in made.stream(5.0))
    assert made.plan_s > made.now - made.searched[-1][0], "it is by no other plan"
    made.check_idle()


def test_a_search_disturbs_the_coordinator_s_own_device_and_no_other() -> None:
    """While one takes more than its tenth, what that device's tasks took says nothing."""
    made = Noisy()
    made.deployed(model=MODEL)
    made.stream(12.0)
    made.plan_s = 1000.0
    made.slowness["pi-3"] = SLOW
    made.stream(30.0)
    core, devices = made.core, made.core.members.devices
    assert core.catalogue.searching
    assert not any(disturbs(core.catalogue, core.members, devices[name]) for name in NAMES)
    count = core._balance.count
    made.stream(5.0)
    assert core._balance.count > count
    head = core.members.head
    assert head is not None and disturbs(core.catalogue, core.members, head)


@pytest.mark.parametrize("why", ["spread", "given"])
def test_a_slow_device_keeps_its_tasks_where_the_user_wants_that(why: str) -> None:
    made = Noisy()
    graph = _imported(MODEL, None, Signature(False, (("x", (1, 3, *SIZE)),)))
    given = str(banded(graph, NAMES, "head"))
    made.deployed(model=MODEL, **({"plan": given} if why == "given" else {"spread": True}))
    made.plan_s = 1000.0
    made.stream(12.0)
    made.slowness["pi-3"] = SLOW
    assert all(on(reply) == set(NAMES) for reply in made.stream(30.0))


def test_devices_that_change_all_the_time_get_a_plan_all_the_same() -> None:
    """However often one is outdated before it is ready."""
    made = Noisy()
    made.deployed(model=MODEL)
    made.stream(12.0)
    made.prepare_s = 15.0
    served = set[int]()
    for turn in range(6):
        made.slowness["pi-3"] = 1.0 if turn % 2 else SLOW
        made.stream(12.0)
        served |= {d.number for d in made.deployments if d.phase is Phase.READY}
    assert len(served) > 1


def test_a_search_for_a_small_gain_waits_for_a_device_that_just_becomes_fast() -> None:
    """It would keep the plan waiting that is needed then. A request takes two seconds."""
    made = Noisy(useless=99.0, **{name.replace("-", ""): FLOPS / 8 for name in NAMES})
    made.adapts, made.plan_s = True, 1.0
    made.deployed(model=MODEL)
    made.stream(60.0)
    made.slowness["pi-3"] = SLOW
    made.stream(60.0)
    assert made.paced == [False, True]
    search_at = made.searched[-1][0] + made.plan_s / limits.REPLAN_SHARE
    made.stream(search_at - 1.5 - made.now)
    assert made.paced == [False, True], "one for a small gain is not yet due"
    made.slowness["pi-3"] = 1.0
    made.stream(40.0)
    assert made.paced[-1] and all(paces["pi-3"] < 1.5 for _, paces in made.searched[2:])


@pytest.mark.parametrize("kinds", ["", "avx2", "neon"], ids=["any", "of its kind", "of another"])
def test_who_has_no_task_prepares_one_by_which_it_is_tried(kinds: str) -> None:
    """However slow it is, and beside those that would take over; not what it may not compute."""
    graph = _imported(MODEL, None, Signature(False, (("x", (1, 3, *SIZE)),)))
    plan, left_out = banded(graph, NAMES, "head"), [f"slow-{i}" for i in range(3)]
    four = [DeviceProfile(DeviceId(n), 1e9, numeric_class="avx2") for n in NAMES]
    slow = [DeviceProfile(DeviceId(n), 1e7, numeric_class=kinds) for n in left_out]
    strict = bool(kinds)
    before, after = (
        find_spares(graph, plan, each, pins_of(graph, plan, each, {}), strict=strict).devices
        for each in (four, [*four, *slow])
    )
    more = {ref: after[ref][len(before[ref]) :] for ref in before if after[ref] != before[ref]}
    assert all(after[ref][: len(before[ref])] == before[ref] for ref in before)
    once = [] if kinds == "neon" else [(name,) for name in left_out]
    assert sorted(more.values()) == once  # a task each
    few = find_spares(graph, plan, [*four, *slow], pins_of(graph, plan, four, {}), twice=False)
    assert not {name for each in few.devices.values() for name in each} & set(left_out)


def test_of_many_devices_without_a_task_those_prepare_one_that_may() -> None:
    graph = _imported(MODEL, None, Signature(False, (("x", (1, 3, *SIZE)),)))
    plan = banded(graph, NAMES, "head")
    kinds = dict.fromkeys(NAMES, "avx2") | {f"arm-{i}": "neon" for i in range(9)}
    kinds |= {f"slow-{i:02}": "avx2" for i in range(12)}
    all_ = [DeviceProfile(DeviceId(n), 1e7, numeric_class=kind) for n, kind in kinds.items()]
    pins = pins_of(graph, plan, all_, {})
    spares = find_spares(graph, plan, all_[: len(NAMES)], pins, strict=True).devices
    extra = find_spares(graph, plan, all_, pins, strict=True).devices
    more = [each for ref, each in extra.items() if each != spares[ref]]
    assert {name for each in more for name in each if name[:3] not in ("pi-", "slo")} == set()
    assert sum(name.startswith("slow") for each in more for name in each) >= TIMED


def test_a_slow_device_that_is_only_timed_makes_no_late_task_usual() -> None:
    made = Noisy()
    made.deployed(model=MODEL)
    *_, serving = made.core.catalogue.deployments.values()
    place = next(iter(serving.takers))
    serving.takers = {place: ("pi-1", "pi-2", "pi-3", "pi-4")}
    serving.expected = {(place, name): float(i) for i, name in enumerate(NAMES)}
    assert serving.longest_s == 2.0
    serving.choices = serving.takers
    assert serving.longest_s == 3.0, "it may go to any of them"


def test_patience_for_samples_to_agree_begins_anew_where_a_change_becomes_grave() -> None:
    made = Noisy()
    made.deployed(model=MODEL)
    made.stream(3.0)
    (serving,) = made.core.catalogue.deployments.values()
    rules = Replanning(made.core.members, balance := Balance())
    for name in NAMES:
        for i in range(12):  # they do not agree in the end
            balance.measured("net", name, 4.0 if i == 11 else 1.0, 100.0)
    last = 100.0 + limits.PACE_SETTLE_MOST_S
    for now, grave, may in (
        (100.0, False, False),
        (last - 0.1, False, False),
        (last, True, False),
        (last + limits.PACE_SETTLE_S, True, True),
    ):
        assert rules._settled(serving, now, grave=grave, wanted=True) is may, now
