"""Where links between devices keep requests for longer than one device would take alone, that one
does all of each, until the links are what the plan was made by.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from cores import Cluster, Node, _imported, banded, conv_net, image, kind
from msgspec import structs
from test_covering import lose
from test_fallback import NAMES, Watched, settled

from meshinfer import limits
from meshinfer.cost import DeviceProfile
from meshinfer.identity import DeviceId
from meshinfer.planner import find_spares, pins_of
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.catalogue import Catalogue, Phase
from meshinfer.scheduler.retreat import _all_late, _Sample
from meshinfer.transfers import TaskRef

FLOPS_PER_S = 5e6
"""Then one device takes four times as long alone as three do together."""
SLOW_S = 0.8
"""So late it is no reason to begin again."""
STALLED_S = 2.5
ROUND = limits.RETREAT_REQUESTS


class Lossy(Watched):
    """``extra_s``: what each piece between two devices takes longer on its way."""

    extra_s = 0.0

    def __init__(self, **fields: object) -> None:
        super().__init__((), **fields)
        self.by_work = True
        for name in NAMES:
            self.join(name, m.Facts(flops_per_s=FLOPS_PER_S, host=name))
        self.settle(lambda: all(map(self.joined, self.living())))

    def _deliver(self, sender: Node, receiver: Node, plane: e.Plane, message: m.AnyMessage,
                 payload: memoryview, extra: float) -> None:  # fmt: skip
        between = {sender.name, receiver.name} <= set(NAMES)
        extra += self.extra_s if between else 0.0
        super()._deliver(sender, receiver, plane, message, payload, extra)


def lossy(*, beside: bool = False, **fields: object) -> Lossy:
    cluster = Lossy(beside=beside)
    cluster.deployed(**fields)
    settled(cluster)
    cluster.plan_s = 1000.0  # none of what is seen here is another plan's
    return cluster


def ask(cluster: Cluster, seed: int) -> tuple[m.Reply, float]:
    """A request, held against plain onnxruntime: the reply, and what it took."""
    since = cluster.now
    reply = cluster.check(cluster.submit(image(seed)), image(seed))
    return reply, cluster.now - since


def together(cluster: Cluster) -> list[m.Reply]:
    requests = [cluster.submit(image(i)) for i in range(limits.RUNNING_REQUESTS)]
    return [cluster.check(request, image(i)) for i, request in enumerate(requests)]


def on(reply: m.Reply) -> set[str]:
    return {task.device for task in reply.tasks}


def retreated(cluster: Lossy) -> tuple[str, float]:
    """Requests, until one device does all; who that is, and what one takes there."""
    cluster.extra_s = SLOW_S
    for i in range(ROUND):
        reply, took = ask(cluster, i)
        assert took > SLOW_S and on(reply) == set(NAMES)
    reply, took = ask(cluster, 9)
    (device,) = on(reply)
    assert took < SLOW_S and reply.degraded
    assert f"waited for links of its plan: {device} ran all tasks" in reply.reasons[0]
    return device, took


@pytest.mark.parametrize("beside", [False, True], ids=["by the head", "client is the head"])
def test_one_device_does_all_while_links_are_slow_and_the_plan_serves_after(beside: bool) -> None:
    cluster = lossy(beside=beside)
    reply, took = ask(cluster, 0)
    assert on(reply) == set(NAMES)
    _, alone = retreated(cluster)
    assert alone > 1.5 * took, "it is not only messages that take time here"
    cluster.extra_s = 0.0
    cluster.pass_time(limits.RETREAT_S)
    for i in range(ROUND):
        reply, _ = ask(cluster, i)
        assert on(reply) == set(NAMES) and not reply.degraded, "to see"
    cluster.extra_s = SLOW_S
    reply, _ = ask(cluster, 1)
    assert on(reply) == set(NAMES), "all of them again, and not to see"
    cluster.check_idle()


def probes(cluster: Lossy, device: str, deadline_s: float) -> list[float]:
    """When requests went by the plan though one device does all; for those it was too long."""
    tried = []
    for i in range(400):
        since, begun = cluster.now, cluster.sent["Start"]
        reply = cluster.reply(cluster.submit(image(i), deadline_s=deadline_s))
        if on(reply) != {device}:
            tried.append(since)
        assert cluster.sent["Start"] > begun
        cluster.pass_time(0.25)
    return tried


def test_who_is_seen_to_be_slow_yet_is_tried_again_later_each_time() -> None:
    cluster = lossy()
    device, _ = retreated(cluster)
    tried = probes(cluster, device, 30.0)
    apart = [b - a for a, b in pairwise(tried)]
    assert len(apart) >= 3 and apart == sorted(apart) and apart[-1] > 3 * apart[0], tried
    assert apart[0] > limits.RETREAT_S
    cluster.check_idle()


def test_one_that_is_not_back_when_the_next_may_go_was_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "RETREAT_S", 0.5)
    cluster = lossy()
    device, _ = retreated(cluster)
    requests = []
    for i in range(100):
        requests.append(cluster.submit(image(i)))
        cluster.pass_time(0.2)
    by_plan = sum(on(cluster.check(r, image(i))) != {device} for i, r in enumerate(requests))
    assert 2 <= by_plan <= 5


def test_few_requests_are_risked_whose_deadline_the_plan_would_miss() -> None:
    """Not as soon as others, and ever more rarely; and not never."""
    cluster = lossy()
    device, alone = retreated(cluster)
    assert 2 * alone < SLOW_S
    since = cluster.now
    tried = probes(cluster, device, SLOW_S)
    assert 1 <= len(tried) <= 6 and tried[0] > since + 2 * limits.RETREAT_S


def test_the_plan_serves_again_though_all_deadlines_are_short() -> None:
    cluster = lossy()
    cluster.extra_s = SLOW_S
    for i in range(ROUND):
        assert cluster.failure(cluster.submit(image(i), deadline_s=SLOW_S)).error
    cluster.extra_s = 0.0
    for i in range(30):
        reply = cluster.reply(cluster.submit(image(i), deadline_s=SLOW_S))
        cluster.pass_time(2.0)
    assert on(reply) == set(NAMES)


def test_requests_that_the_plan_fails_by_their_deadlines_are_reason_too() -> None:
    cluster = lossy()
    cluster.extra_s = SLOW_S
    for i in range(ROUND):
        assert cluster.failure(cluster.submit(image(i), deadline_s=SLOW_S)).error
    reply, _ = ask(cluster, 9)
    assert len(on(reply)) == 1


def test_several_at_once_are_no_reason_where_links_are_good() -> None:
    """They take longer each, as they would on one device."""
    cluster = lossy()
    for i in range(10):
        assert all(on(reply) == set(NAMES) for reply in together(cluster)), i


def test_one_bad_moment_is_no_reason() -> None:
    """All that run then take long."""
    cluster = lossy()
    cluster.extra_s = SLOW_S
    together(cluster)
    cluster.extra_s = 0.0
    for i in range(3):
        assert all(on(reply) == set(NAMES) for reply in together(cluster)), i


def test_several_at_once_are_done_by_one_device_where_links_are_slow() -> None:
    cluster = lossy()
    cluster.extra_s = STALLED_S
    for _ in range(3):
        replies = together(cluster)
    assert all(len(on(reply)) == 1 for reply in replies)
    assert len(set.union(*map(on, replies))) == 1


@pytest.mark.parametrize("at_once", [1, limits.RUNNING_REQUESTS])
def test_what_waits_while_nothing_is_answered_begins_again_on_one_device(at_once: int) -> None:
    cluster = lossy()
    cluster.extra_s = SLOW_S
    ask(cluster, 0)
    cluster.extra_s = STALLED_S
    since = cluster.now
    requests = [cluster.submit(image(i)) for i in range(at_once)]
    replies = [cluster.check(request, image(i)) for i, request in enumerate(requests)]
    assert cluster.now - since < limits.RETREAT_STALL_S + (at_once + 1) * 0.4
    assert [reply.attempts for reply in replies] == [2] * at_once
    assert len(set.union(*map(on, replies))) == 1
    cluster.pass_time(limits.AHEAD_S)
    cluster.check_idle()


def test_one_that_goes_by_the_plan_to_see_begins_again_too() -> None:
    cluster = lossy()
    device, took = retreated(cluster)
    cluster.extra_s = STALLED_S
    cluster.pass_time(limits.RETREAT_S)
    since = cluster.now
    reply, _ = ask(cluster, 1)
    assert on(reply) == {device} and reply.attempts == 2
    assert cluster.now - since < limits.RETREAT_STALL_S + 2 * took
    assert ask(cluster, 2)[0].attempts == 1


def test_what_a_slow_device_computes_goes_on_there() -> None:
    """Until its pace is known; then others do that."""
    cluster = lossy()
    cluster.slowness["pi-2"] = 10 * STALLED_S
    for i in range(limits.PACE_SAMPLES):
        reply, took = ask(cluster, i)
        assert reply.attempts == 1
        if on(reply) != set(NAMES):
            break
        assert took > limits.RETREAT_STALL_S
    assert i >= limits.PACE_SAMPLES_LEAST - 1 and "pi-2" not in on(reply) and len(on(reply)) > 1
    assert took < limits.RETREAT_STALL_S


def test_one_that_goes_by_the_plan_begins_again_though_that_device_is_busy() -> None:
    cluster = lossy()
    device, _ = retreated(cluster)
    cluster.extra_s = 3 * STALLED_S
    cluster.pass_time(limits.RETREAT_S)
    probe, others = cluster.submit(image(0)), []
    for i in range(30):
        others.append(cluster.submit(image(i)))
        cluster.pass_time(0.2)
    reply = cluster.check(probe, image(0))
    assert reply.attempts == 2 and reply.total_s < STALLED_S
    for i, request in enumerate(others):
        assert on(cluster.check(request, image(i))) == {device}


@pytest.mark.parametrize("good", [False, True], ids=["links as before", "links are good"])
def test_a_new_plan_is_tried_by_one_request_first(good: bool) -> None:
    cluster = lossy()
    device, _ = retreated(cluster)
    (before,) = cluster.core.catalogue.deployments
    cluster.plan_s = 0.02
    cluster.join("pi-4", m.Facts(flops_per_s=FLOPS_PER_S, host="pi-4"))
    cluster.settle(lambda: before not in cluster.core.catalogue.deployments)
    settled(cluster)
    cluster.extra_s = 0.0 if good else SLOW_S
    cluster.pass_time(SLOW_S)
    seen = [on(ask(cluster, i)[0]) for i in range(2 * ROUND)]
    assert seen[0] == {*NAMES, "pi-4"}, "to see"
    others = seen[1:] if good else seen[:1]
    assert all(each == {*NAMES, "pi-4"} for each in others), seen
    assert good or all(each == {device} for each in seen[1:]), seen
    cluster.check_idle()


def test_a_coordinator_that_stood_still_blames_no_link() -> None:
    cluster = lossy()
    ask(cluster, 0)
    cluster.pass_time(1.5 * limits.RETREAT_STALL_S)
    requests = [cluster.submit(image(i)) for i in range(2)]
    cluster.pass_time(0.02)
    cluster.coordinator.frozen_until = cluster.now + STALLED_S
    for i, request in enumerate(requests):
        reply = cluster.check(request, image(i))
        assert reply.attempts == 1 and on(reply) == set(NAMES)
    assert on(ask(cluster, 3)[0]) == set(NAMES)


def test_a_journal_that_is_slow_is_no_link() -> None:
    cluster = lossy()
    cluster.timing = replace(cluster.timing, disk_s=1.5 * limits.RETREAT_STALL_S)
    for i in range(2 * ROUND):
        reply, took = ask(cluster, i)
        assert took > limits.RETREAT_STALL_S
        assert reply.attempts == 1 and on(reply) == set(NAMES)


def test_a_client_that_stopped_as_its_own_head_blames_no_link() -> None:
    cluster = lossy(beside=True)
    cluster.connect("bob")
    cluster.pass_time(0.5)
    cluster.check(cluster.submit(client="bob"), client="bob")
    cluster.pass_time(1.5 * limits.RETREAT_STALL_S)
    requests = [cluster.submit(client="bob", deadline_s=3.0) for _ in range(ROUND)]
    cluster.nodes["bob"].frozen_until = cluster.now + 5.0
    cluster.pass_time(4.0)
    assert on(ask(cluster, 1)[0]) == set(NAMES) and requests


@pytest.mark.parametrize("beside", [False, True], ids=["by the head", "client is the head"])
def test_one_device_whose_own_link_is_worse_is_left_for_the_plan(
    beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So little may be under way to a peer that three are four times as quick as one."""
    monkeypatch.setattr(limits, "CREDIT_BYTES", 200)
    monkeypatch.setattr(limits, "ACK_BYTES", 50)
    cluster = Cluster(NAMES, beside=beside)
    cluster.deployed()
    requests = [cluster.submit(image(i)) for i in range(8)]
    for i, request in enumerate(requests):
        cluster.check(request, image(i))
    cluster.check_idle()


def test_what_inputs_take_to_come_is_seen_to_be_no_reason() -> None:
    """On one device they take as long: it does all of a few, and then no more."""
    cluster = Uploading()
    cluster.deployed()
    settled(cluster)
    cluster.plan_s = 1000.0
    devices = [on(ask(cluster, i)[0]) for i in range(40)]
    assert all(each == set(NAMES) for each in devices[-20:])


class Uploading(Lossy):
    """Inputs take long to reach the head."""

    def _deliver(self, sender: Node, receiver: Node, plane: e.Plane, message: m.AnyMessage,
                 payload: memoryview, extra: float) -> None:  # fmt: skip
        extra += 1.5 * limits.RETREAT_STALL_S * isinstance(message, m.Feed)
        super()._deliver(sender, receiver, plane, message, payload, extra)


@pytest.mark.parametrize("why", ["spread", "plan", "throughput", "it was expected to"])
def test_what_is_to_be_so_stays_with_the_plan(why: str) -> None:
    fields = {"spread": {"spread": True}, "plan": {"plan": _plan()}}
    fields["throughput"] = {"objective": "throughput"}
    cluster = lossy(**fields.get(why, {}))
    (made,) = cluster.core.catalogue.deployments.values()
    if why == "it was expected to":
        assert made.report is not None
        made.report = structs.replace(made.report, expected_s=SLOW_S)
    cluster.extra_s = SLOW_S
    for i in range(3 * ROUND):
        assert on(ask(cluster, i)[0]) == set(NAMES)


def _plan() -> str:
    other = Cluster(NAMES)
    other.deployed()
    (made,) = other.core.catalogue.deployments.values()
    return made.plan


def test_a_device_that_is_as_slow_alone_is_left_for_the_plan() -> None:
    """It was expected to be quick, and others compete for it now."""
    cluster = lossy()
    device, _ = retreated(cluster)
    cluster.slowness[device] = 20.0
    replies = [ask(cluster, i)[0] for i in range(2 + ROUND)]
    assert on(replies[0]) == {device}
    own = [on(reply) - {device} for reply in replies[-ROUND:]]  # others may do its tasks
    assert all(names == set(NAMES) - {device} for names in own)


@pytest.mark.parametrize("amid", [False, True], ids=["between requests", "within one"])
def test_when_that_device_is_lost_requests_go_on_without_it(amid: bool) -> None:
    cluster = lossy()
    device, _ = retreated(cluster)
    if amid:
        cluster.when(kind(m.TasksDone, by=device), lambda: lose(cluster, device))
    else:
        lose(cluster, device)
    reply, _ = ask(cluster, 3)
    assert device not in on(reply) and reply.degraded
    assert "ran all tasks" not in "".join(reply.reasons)
    cluster.check_idle()


def test_what_nobody_has_prepared_as_a_whole_stays_with_the_plan() -> None:
    cluster = Lossy()
    cluster.spares = False
    cluster.deployed()
    cluster.extra_s = SLOW_S
    for i in range(2 * ROUND):
        assert on(ask(cluster, i)[0]) == set(NAMES)


@pytest.mark.parametrize("quick", [0, 1, 2, 3, 4])
def test_the_quickest_device_has_all_tasks_prepared(quick: int) -> None:
    """Whatever each does by the plan, which may leave it out."""
    signature = e.Signature(False, (("x", (1, 3, 12, 10)),))
    names = [f"pi-{i}" for i in range(5)]
    graph = _imported(conv_net(), None, signature)
    plan = banded(graph, names[:4], "head")
    speeds = [2e9 if i == quick else 1e9 for i in range(5)]
    profiles = [DeviceProfile(DeviceId(n), s) for n, s in zip(names, speeds, strict=True)]
    spares = find_spares(graph, plan, profiles, pins_of(graph, plan, profiles, {})).devices
    for s, stage in enumerate(plan.stages):
        for t, task in enumerate(stage.tasks):
            assert names[quick] in (*task.devices, *spares[TaskRef(s, t)])


@pytest.mark.parametrize("pause_s", [0.25, 0.0], ids=["now and then", "one after another"])
def test_who_becomes_slow_while_one_device_does_all_is_seen_and_planned_for(pause_s: float) -> None:
    """All others are tried meanwhile, and no request waits for that. One device does all under the
    next plan, too, once that has spares: links are as bad as they were."""
    cluster = lossy()
    device, _ = retreated(cluster)
    slow, *_ = (name for name in NAMES if name != device)
    balance = cluster.core._balance
    assert balance.factor(slow, cluster.now) < 1.2
    cluster.slowness[slow], cluster.plan_s = 5.0, 0.3
    rest = tuple(name for name in NAMES if name != slow)
    cluster.planner = lambda graph, _: banded(graph, rest, "head")
    until, seen = cluster.now + 30.0, list[set[str]]()
    while cluster.now < until:
        reply, _ = ask(cluster, 1)
        seen.append(on(reply))
        cluster.pass_time(pause_s)
    assert balance.factor(slow, cluster.coordinator.last) > 4.0
    (made,) = cluster.core.catalogue.deployments.values()
    assert made.factors[slow] > 4.0 and made.drift.by_one == device
    by_plan = [i for i, names in enumerate(seen) if names != {device}]
    assert len(by_plan) <= 4, f"{by_plan} of {len(seen)}, some of them to see"
    cluster.check_idle()


def test_a_newer_plan_waits_for_who_does_all_and_not_for_long() -> None:
    catalogue, signature, peers = Catalogue(), e.Signature(False, ()), {"one": "", "two": ""}
    deploy = m.Deploy(call="c", name="n", digest="0" * 64, nbytes=1)
    model = catalogue.open(deploy, "ann", 0.0)
    old, new = (
        catalogue.new_deployment(model, signature, peers, tuple(peers), 0.0) for _ in range(2)
    )
    old.phase = new.phase = Phase.READY
    new.spares.peers = peers

    def serves(after_s: float, by_one: str, *ready: str) -> bool:
        old.drift.by_one, new.spares.ready = by_one, set(ready)
        return catalogue.running(model, signature, new.ready_at + after_s) is new

    assert serves(0.0, "one", "one") and not serves(0.0, "one", "two")
    assert not serves(limits.SPARES_WAIT_S, "one", "two")
    assert serves(limits.RETREAT_SPARES_S, "one", "two")
    for other in ("", "who does not stand by"):
        assert not serves(0.0, other, "one") and serves(limits.SPARES_WAIT_S, other)


def test_what_one_device_does_is_checked_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of all stages: what they read had one maker."""
    monkeypatch.setattr(limits, "RETREAT_S", 1000.0)
    cluster, rng, checked = lossy(), random.Random(0), set()
    device, _ = retreated(cluster)
    cluster.draw = rng.random
    cluster.when(_noting(checked), lambda: None)
    for i in range(40):
        assert on(ask(cluster, i)[0]) == {device}
        cluster.pass_time(2.0)
    assert {stage for stage, _ in checked} == {0, 1, 2}


def _noting(checked: set[m.Place]) -> Callable[[Node, Node, m.AnyMessage], bool]:
    def note(sender: Node, receiver: Node, message: m.AnyMessage) -> bool:
        if isinstance(message, m.Check):
            checked.add(message.place)
        return False

    return note


def test_those_that_ran_beside_the_first_would_have_been_done_before_it() -> None:
    """Four at a time, each of them as quick as on one device; and then alone, and not."""
    four = [_Sample(t, t + 4.0, 3, 1.0, 0.0) for t in (0.0, 1.0, 2.0, 4.0)]
    assert not _all_late(four)
    one = [_Sample(t, t + 4.0, 0, 1.0, 0.0) for t in (0.0, 4.0, 8.0, 12.0)]
    assert _all_late(one)
    assert not _all_late(one[:3])
    slow = [_Sample(s.since, s.until, 0, 1.0, 0.0, busiest_s=3.0) for s in one]
    assert not _all_late(slow), "a device computed for most of it"
