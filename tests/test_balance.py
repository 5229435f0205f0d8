"""A device that slows down gets less to do, where that is worth it, and never because of noise.

Virtual time and real cores; tasks take what the cost model expects, times what the test says.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from architectures import squeezenet1_1
from cores import Cluster, conv_net, image
from oracle import assert_exact
from processes import eventually

import meshinfer as mi
from meshinfer import limits
from meshinfer.plan import Plan
from meshinfer.protocol import messages as m
from meshinfer.scheduler.balance import Balance

SIZE = (96, 40)
MODEL = conv_net(SIZE)
NAMES = ("pi-1", "pi-2", "pi-3")


# --- the measure alone ----------------------------------------------------------------------------


def test_what_all_devices_take_too_long_is_the_model_s_error_and_moves_nothing() -> None:
    balance = Balance()
    for i in range(40):
        for name in NAMES:
            balance.measured("net", name, 3.7, float(i))
    assert [balance.factor(name, 40.0) for name in NAMES] == [1.0] * 3
    assert balance.drift(NAMES, {}, 0.0, 40.0) <= limits.PACE_DEVIATION


def test_a_few_slow_tasks_and_noise_below_the_threshold_are_not_enough() -> None:
    balance, rng = Balance(), random.Random(1)
    for i in range(200):
        for name in NAMES:
            ratio = 6.0 if rng.random() < 0.05 else rng.uniform(0.95, 1.05)
            balance.measured("net", name, ratio, i / 10)
        if i > limits.PACE_SAMPLES:
            assert balance.drift(NAMES, {}, 0.0, i / 10) <= limits.PACE_DEVIATION, i


def test_a_device_that_stays_slow_is_known_after_a_few_tasks_and_again_when_it_recovers() -> None:
    balance = Balance()
    for i in range(40):
        for name in NAMES:
            slow = name == "pi-2" and 10 <= i < 25
            balance.measured("net", name, 5.0 if slow else 1.0, float(i))
        if i == 16:
            assert balance.drift(NAMES, {}, 0.0, 16.0) > limits.PACE_DEVIATION
            assert balance.factor("pi-2", 16.0) == pytest.approx(5.0)
            assert balance.drift(NAMES, {"pi-2": 5.0}, 0.0, 16.0) <= limits.PACE_DEVIATION
    assert balance.factor("pi-2", 40.0) == pytest.approx(1.0)


def test_a_slow_device_without_work_is_tried_again_ever_more_seldom() -> None:
    balance = Balance()
    for i in range(8):
        for name in NAMES:
            balance.measured("net", name, 5.0 if i >= 4 and name == "pi-2" else 1.0, float(i))
    for _ in range(8):
        balance.measured("net", "pi-2", 5.0, 8.0)
    now, waited = 8.0, []
    for _ in range(7):
        start = now
        while balance.factor("pi-2", now) > 1.0:
            now += 1.0
        waited.append(now - start)
        for _ in range(limits.PACE_SAMPLES):
            balance.measured("net", "pi-2", 5.0, now)
    assert waited[0] == pytest.approx(limits.PACE_FORGOTTEN_S, abs=1.5)
    assert waited == sorted(waited) and waited[-1] > 300.0
    assert waited[-1] <= limits.PACE_FORGOTTEN_MOST_S + 1.0


# --- on a cluster ---------------------------------------------------------------------------------


def cluster(flops_per_s: float = 3e7) -> Cluster:
    made = Cluster(())
    made.by_work = True
    for name in NAMES:
        made.join(name, m.Facts(flops_per_s=flops_per_s, host=name))
    made.settle(lambda: len(made.core.members.devices) == 4)
    made.pass_time(1.0)
    return made


def stream(made: Cluster, seconds: float) -> list[m.Reply]:
    """Requests one after another for so long; each is answered right at its first attempt."""
    end, replies = made.now + seconds, []
    arrays = image(size=SIZE)
    while made.now < end:
        replies.append(made.reply(made.submit(arrays)))
        assert replies[-1].failure is None and replies[-1].attempts == 1
    made.check(made.submit(arrays), arrays, MODEL)
    return replies


def rows(reply: m.Reply) -> dict[str, int]:
    """Rows of the last map that each device makes."""
    found = dict.fromkeys(NAMES, 0)
    for stage in Plan.parse(reply.plan).stages:
        for task in stage.tasks:
            for shard in task.outputs:
                if shard.value == "y":
                    found[task.devices[0]] += shard.box[2].size
    return found


def test_a_device_that_becomes_five_times_slower_gets_less_and_as_much_as_before_when_it_recovers(
) -> None:  # fmt: skip
    made = cluster()
    made.deployed(model=MODEL)
    before = stream(made, 10.0)
    assert made.plans_asked == 1 and rows(before[-1]) == dict.fromkeys(NAMES, 32)
    fast = before[-1].total_s
    made.slowness["pi-3"] = 5.0
    slow = stream(made, 20.0)
    assert slow[0].total_s > 2.5 * fast
    assert made.plans_asked <= 3 and rows(slow[-1])["pi-3"] < 16
    assert slow[-1].total_s < 1.7 * fast, "the others do its work"
    made.slowness["pi-3"] = 1.0
    asked = made.plans_asked
    healed = stream(made, 20.0)
    assert made.plans_asked - asked <= 2 and min(rows(healed[-1]).values()) >= 28
    assert healed[-1].total_s < 1.1 * fast
    made.check_idle()


def test_a_plan_is_made_by_what_devices_do_for_long() -> None:
    """Not by how fast one is under a quota that has rested, as where it waits for another."""
    made = cluster()
    made.deployed(model=MODEL)
    assert rows(stream(made, 10.0)[-1]) == dict.fromkeys(NAMES, 32)
    made.lasting["pi-3"] = 5.0
    assert rows(stream(made, 20.0)[-1])["pi-3"] < 16


def test_devices_that_slow_down_together_are_left_alone() -> None:
    made = cluster()
    made.deployed(model=MODEL)
    stream(made, 5.0)
    made.slowness.update(dict.fromkeys(NAMES, 3.0))
    stream(made, 15.0)
    assert made.plans_asked == 1


def test_a_link_that_changed_makes_a_plan_while_requests_run_and_just_one() -> None:
    made = cluster()
    made.deployed(model=MODEL)
    stream(made, 3.0)
    made.core.members.links_changed = {("pi-1", "who has left"): 1}
    stream(made, 15.0)
    assert made.plans_asked == 1, "no link between devices of this plan"
    made.core.members.links_changed = {("pi-1", "pi-2"): 1}
    stream(made, 15.0)
    assert made.plans_asked == 2
    stream(made, 10.0)
    assert made.plans_asked == 2
    made.check_idle()


def test_noise_makes_no_plan() -> None:
    made, rng = cluster(), random.Random(3)
    made.deployed(model=MODEL)
    for _ in range(120):
        made.slowness.update({name: rng.uniform(0.9, 1.1) for name in NAMES})
        made.reply(made.submit(image(size=SIZE)))
    assert made.plans_asked == 1


def test_a_gain_that_is_not_worth_it_keeps_the_plan_and_is_not_asked_for_again() -> None:
    made = cluster(1e8)
    made.deployed(model=MODEL)
    before = stream(made, 6.0)
    made.slowness["pi-3"] = 1.2  # above the threshold; messages take their time, too: 8 % to gain
    after = stream(made, 15.0)
    assert made.plans_asked == 1  # a search would take the coordinator's device from the requests
    made.pass_time(limits.REPLAN_QUIET_S + 4 * limits.HEARTBEAT_S)
    assert made.plans_asked == 2 and after[-1].plan == before[-1].plan
    made.check_idle()


def test_what_was_in_vain_does_not_hold_up_a_search_for_an_upset() -> None:
    made = cluster(1e8)
    made.deployed(model=MODEL)
    stream(made, 6.0)
    made.slowness["pi-3"] = 1.2
    stream(made, 15.0)
    made.pass_time(limits.REPLAN_QUIET_S + 4 * limits.HEARTBEAT_S)
    assert made.plans_asked == 2
    made.slowness["pi-3"] = 8.0
    stream(made, limits.REPLAN_EVERY_S + 2.0)
    assert made.plans_asked == 3
    made.check_idle()


def searching() -> Cluster:
    """It looks for a better plan, for 20 s, since one device is a little slow; nothing runs."""
    made = cluster(1e8)
    made.deployed(model=MODEL)
    stream(made, 6.0)
    made.slowness["pi-3"] = 1.2
    stream(made, 15.0)
    made.plan_s = 20.0 * limits.SEARCH_SHARE
    made.pass_time(limits.REPLAN_QUIET_S + 4 * limits.HEARTBEAT_S)
    assert made.plans_asked == 2 and made.search is not None
    return made


def test_a_newcomer_does_not_wait_for_a_search_that_nobody_waits_for() -> None:
    made = searching()
    made.join("pi-4", m.Facts(flops_per_s=1e8, host="pi-4"))
    made.pass_time(limits.REPLAN_SETTLE_S + made.plan_s + 1.0)
    assert made.plans_asked == 3
    assert "pi-4" in made.check(made.submit(image(size=SIZE)), image(size=SIZE), MODEL).plan
    made.check_idle()


def test_a_lost_device_s_requests_do_not_wait_for_a_search_that_nobody_waits_for() -> None:
    made = searching()
    made.kill("pi-1")
    start = made.now
    reply = made.check(made.submit(image(size=SIZE)), image(size=SIZE), MODEL)
    assert "pi-1" not in reply.plan and made.now - start < made.plan_s + 1.0
    made.check_idle()


def test_a_search_given_up_for_another_model_is_made_again_later_and_not_at_once() -> None:
    made = searching()
    made.plan_s = 0.02
    made.deployed("other", MODEL)
    assert made.plans_asked == 3 and made.search is None
    stream(made, 0.5 * limits.REPLAN_EVERY_S)
    assert made.plans_asked == 3
    stream(made, 2 * limits.REPLAN_EVERY_S)
    made.pass_time(limits.REPLAN_QUIET_S + 4 * limits.HEARTBEAT_S)
    assert made.plans_asked == 4
    made.check_idle()


def test_a_search_that_fails_leaves_what_serves_and_is_not_repeated_at_once() -> None:
    made = cluster()
    plan = made.deployed(model=MODEL).plan
    stream(made, 5.0)
    made.plan_fault = lambda effect: m.Failure(error="ClusterUnavailable", message="killed")
    made.slowness["pi-3"] = 5.0
    stream(made, 3 * limits.REPLAN_EVERY_S)
    assert [each.plan for each in made.core.catalogue.deployments.values()] == [plan]
    assert 2 <= made.plans_asked <= 3, "less and less often: it may end the process that plans"
    made.plan_fault = lambda effect: None
    stream(made, 8 * limits.REPLAN_EVERY_S)
    assert plan not in [each.plan for each in made.core.catalogue.deployments.values()]
    made.check_idle()


def test_a_given_plan_stays_as_it_was_given() -> None:
    plan = cluster().deployed(model=MODEL).plan
    made = cluster()
    made.deployed("given", MODEL, plan=plan)
    made.slowness["pi-3"] = 5.0
    end, arrays = made.now + 15.0, image(size=SIZE)
    while made.now < end:
        reply = made.reply(made.submit(arrays, "given"))
        assert reply.plan == plan
    assert made.plans_asked == 1


def test_requests_in_flight_meet_a_new_plan_without_loss_or_mixture() -> None:
    made = cluster()
    made.deployed(model=MODEL)
    arrays = [image(i, SIZE) for i in range(3)]
    stream(made, 5.0)
    made.slowness["pi-2"] = 6.0
    asked = []
    for i in range(90):
        asked.append(made.submit(arrays[i % 3]))
        made.pass_time(0.25)
    replies = [made.check(r, arrays[i % 3], MODEL) for i, r in enumerate(asked)]
    assert len({reply.plan for reply in replies}) >= 2, "a new plan took over meanwhile"
    assert all(reply.attempts == 1 for reply in replies)
    made.check_idle()


# --- processes ------------------------------------------------------------------------------------


def test_a_worker_that_grows_slow_gets_less_to_do() -> None:
    model = squeezenet1_1(128)
    x = {"image": np.random.default_rng(0).standard_normal((1, 3, 128, 128)).astype(np.float32)}
    with mi.LocalCluster(2, speeds=[0.2, 0.2]) as cluster, cluster.client() as client:
        first = client.deploy("net", model, spread=True).plan
        assert first is not None

        def share(plan: str) -> float:
            """Of the rows of the first stage, those that the second worker makes."""
            rows = dict.fromkeys(cluster.names(), 0)
            for task in Plan.parse(plan).stages[0].tasks:
                rows[task.devices[0]] += task.outputs[0].box[2].size
            return rows["worker-1"] / sum(rows.values())

        for _ in range(10):
            client.infer("net", x)
        assert cluster.slow(1, 0.04) == "worker-1"
        plans: list[str] = []

        def less() -> bool:
            result = client.infer("net", x)
            plans.append(result.plan)
            assert_exact(model, x, result.outputs)
            return share(result.plan) < 0.75 * share(first)

        assert eventually(less, 60.0), [share(plan) for plan in dict.fromkeys(plans)]
        assert len(set(plans)) <= 3
    with pytest.raises(mi.InvalidInput, match="no living worker"):
        cluster.slow(0, 0.5)


def test_a_speed_that_is_none_is_refused() -> None:
    with mi.LocalCluster(1) as cluster, pytest.raises(mi.InvalidInput, match="speed 2"):
        cluster.slow(0, 2)
