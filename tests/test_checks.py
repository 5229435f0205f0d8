"""Wrong results are found by computing some tasks again elsewhere; nobody waits for that, and who
is honest is never taken for a liar.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from cores import Cluster, Node, conv_net, image, kind
from oracle import assert_exact
from test_fallback import NAMES, ready

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.records import Facts
from meshinfer.scheduler import events as e
from meshinfer.scheduler.comparing import FAR, difference
from meshinfer.scheduler.request import Request, Try
from meshinfer.scheduler.trust import Trust, Verdict

Made = tuple[np.ndarray, ...]


def wrong(made: Made) -> Made:
    return tuple(np.where(a == a.max(), a + 1, a).astype(a.dtype) for a in made)


def liar(cluster: Cluster, name: str) -> None:
    cluster.forge = lambda node, job, made: wrong(made) if node.name == name else made


def ask(cluster: Cluster, times: int) -> list[bool]:
    """So many requests, one after another: which were answered right."""
    right = []
    for i in range(times):
        outcome = cluster.outcome(cluster.submit(image(i)))
        assert isinstance(outcome.reply, m.Reply) and outcome.reply.failure is None
        try:
            assert_exact(conv_net(), image(i), outcome.arrays)
            right.append(True)
        except AssertionError:
            right.append(False)
        cluster.pass_time(0.1)
    return right


def always() -> float:
    return 0.0


def never() -> float:
    return 1.0


def drawn(seed: int = 1) -> Callable[[], float]:
    """As it is outside: a share of them, larger while devices are new."""
    return random.Random(seed).random


def liars(cluster: Cluster) -> set[str]:
    now = cluster.coordinator.last
    health = cluster.core.members.health
    return {name for name in cluster.core.members.devices if health.lies(name, now)}


def compared(cluster: Cluster) -> Counter[str]:
    """Counts verdicts of devices from now on, by the device."""
    told: Counter[str] = Counter()

    def count(sender: Node, receiver: Node, message: m.AnyMessage) -> bool:
        told[sender.name] += isinstance(message, m.Checked)
        return False

    cluster.when(count, lambda: None)
    return told


# --- a check


@pytest.mark.parametrize("beside", [False, True], ids=["by the head", "client is the head"])
def test_every_task_can_be_checked_and_the_cluster_is_empty_after(beside: bool) -> None:
    cluster = ready(beside=beside)
    cluster.draw = always
    told = compared(cluster)
    assert all(ask(cluster, 12)) and liars(cluster) == set()
    cluster.pass_time(limits.ACK_DELAY_S * 2)
    assert told.total() == 12  # one a request, of the first task that the draw hits
    assert all(node.core.idle for node in cluster.workers())
    assert not cluster.core._answering.checks._open


def test_an_answer_does_not_wait_for_its_check() -> None:
    took = []
    for draw in (never, always):
        cluster = ready()
        cluster.draw = draw
        begun = cluster.now
        cluster.check(cluster.submit())
        took.append(cluster.now - begun)
    assert took[0] == took[1]


def test_a_check_waits_until_its_device_has_nothing_else_to_do() -> None:
    cluster = ready()
    cluster.draw = always
    busy: list[bool] = []

    def note(node: Node, job: e.Compute) -> None:
        if job.again:
            busy.append(node.core._computing.running is not None)

    cluster.kernel_fault = note
    for name in [cluster.submit(image(i)) for i in range(12)]:
        cluster.outcome(name)
    cluster.pass_time(2.0)
    assert busy and not any(busy)


def test_what_a_check_needs_and_does_not_come_ends_it() -> None:
    cluster = ready()
    cluster.draw = always
    cluster.drop(kind(m.Sample))
    cluster.drop(kind(m.Checked))
    cluster.check(cluster.submit())
    cluster.pass_time(limits.CHECK_S + 2.0)
    assert not cluster.core._answering.checks._open
    assert all(node.core.idle for node in cluster.workers())


def test_a_task_is_checked_only_where_one_device_made_each_of_its_inputs() -> None:
    """Seed 2743: a liar and its second copy both made one, and who had used the honest piece was
    checked by the lie."""
    cluster = ready()
    checks, places = cluster.core._answering.checks, set[m.Place]()
    checks._draws = lambda device: True  # type: ignore[method-assign]
    cluster.draw = lambda: 0.99  # the last task first
    begin, copied = checks.begin, False

    def with_copies(request: Request, tried: Try, now: float) -> list[e.Effect]:
        if copied:
            tried.assigned |= dict.fromkeys(tried.tasks, ("pi-1", "pi-2"))
        return begin(request, tried, now)

    def note(sender: Node, receiver: Node, message: m.AnyMessage) -> bool:
        if isinstance(message, m.Check):
            places.add(message.place)
        return False

    checks.begin = with_copies  # type: ignore[method-assign]
    cluster.when(note, lambda: None)
    assert all(ask(cluster, 4)) and min(places) > (0, 9)
    places.clear()
    copied = True
    assert all(ask(cluster, 4)) and places and max(places) < (1, 0)


# --- who is wrong


def test_a_liar_is_found_and_works_no_more() -> None:
    cluster = ready()
    liar(cluster, "pi-2")
    cluster.draw = drawn()
    right = ask(cluster, 40)
    assert liars(cluster) == {"pi-2"}
    assert not right[0] and all(right[20:])
    devices = cluster.ask(m.ListDevices).answer
    assert isinstance(devices, m.Devices)
    info = next(d for d in devices.devices if d.device == "pi-2")
    assert info.state == "quarantined" and info.cause.startswith("its results differ from those of")
    reply = cluster.check(cluster.submit())
    assert reply.degraded and any("pi-2 is quarantined" in why for why in reply.reasons)


def test_one_that_lies_now_and_then_is_found_too() -> None:
    cluster = ready()
    sometimes = np.random.default_rng(1)

    def forge(node: Node, job: e.Compute, made: Made) -> Made:
        lies = node.name == "pi-1" and sometimes.random() < 0.1
        return wrong(made) if lies else made

    cluster.forge, cluster.draw = forge, drawn()
    ask(cluster, 120)
    assert liars(cluster) == {"pi-1"}
    assert all(ask(cluster, 20))


def test_devices_that_round_otherwise_are_no_liars() -> None:
    cluster = ready()
    noise = np.random.default_rng(1)

    def forge(node: Node, job: e.Compute, made: Made) -> Made:
        if node.name != "pi-2":
            return made
        return tuple(
            (a * (1 + 1e-7 * noise.standard_normal(a.shape))).astype(a.dtype) for a in made
        )

    cluster.forge, cluster.draw = forge, drawn()
    told = compared(cluster)
    assert all(ask(cluster, 30)) and liars(cluster) == set() and told.total() >= 5


def test_of_two_that_differ_the_one_less_known_works_no_more_and_may_come_back() -> None:
    cluster = Cluster(NAMES[:1])
    cluster.deployed()
    cluster.join("pi-2")
    cluster.pass_time(2.0)
    liar(cluster, "pi-1")  # it was there first, and is believed
    cluster.draw = always
    ask(cluster, 3)
    assert liars(cluster) == {"pi-2"}
    cluster.join("pi-3")
    cluster.pass_time(2.0)
    ask(cluster, 10)
    assert liars(cluster) == {"pi-1"}
    assert all(ask(cluster, 5))


def test_who_lost_a_task_for_being_slow_checks_it_only_if_nobody_else_can() -> None:
    cluster = ready()
    (made,) = cluster.core.catalogue.deployments.values()
    checks = cluster.core._answering.checks
    program = next(p for p in made.programs["pi-2"] if p.model and len(p.spares) > 1)
    taker, other = program.spares[:2]
    tried = Try(made, moved={program.place: taker})
    found = checks._other(program, tried, taker, cluster.now)
    assert found is not None and found.name == other
    made.spares.ready.discard(other)
    found = checks._other(program, tried, taker, cluster.now)
    assert found is not None and found.name == "pi-2"
    tried.twice.add(program.place)  # it may have begun it
    assert checks._other(program, tried, taker, cluster.now) is None


def test_what_is_in_flight_as_a_liar_is_found_begins_again() -> None:
    cluster = ready()
    liar(cluster, "pi-2")
    cluster.draw = drawn()
    found: list[str] = []

    def then() -> None:
        """Its tensors are with the client before the verdict, and word of that comes after; the
        right ones come after the reply."""
        found.append(cluster.submit(image(99)))
        cluster.delay(kind(m.Merged, request=found[-1]), 0.03)
        cluster.delay(kind(m.Checked), 0.03)
        cluster.delay(
            lambda by, to, word: isinstance(word, m.Answer) and bool(liars(cluster)), 0.05
        )

    for i in range(40):
        cluster.when(kind(m.Check), then)
        cluster.outcome(cluster.submit(image(i)))
        cluster.pass_time(0.1)
        if liars(cluster):
            break
    assert liars(cluster) == {"pi-2"}
    outcome = cluster.outcome(found[-1])
    assert_exact(conv_net(), image(99), outcome.arrays)
    assert isinstance(outcome.reply, m.Reply) and outcome.reply.attempts == 2


# --- pieces


def infinite(cluster: Cluster, name: str = "") -> None:
    """One device makes no finite values; or all do, since they are meant."""

    def forge(node: Node, job: e.Compute, made: Made) -> Made:
        return tuple(np.full_like(a, np.inf) for a in made) if name in node.name else made

    cluster.forge = forge


def test_values_that_are_not_finite_are_checked_at_once_and_may_be_meant() -> None:
    cluster = ready()
    infinite(cluster)
    told, checked = compared(cluster), []
    for i in range(20):
        cluster.outcome(cluster.submit(image(i)))
        cluster.pass_time(0.2)
        checked.append(told.total())
    assert checked[0] == 1  # the draw would have none of it
    [made] = cluster.core.catalogue.deployments.values()
    assert checked[-1] <= 2 * made.tasks  # each task, as often as others read it
    assert liars(cluster) == set()


def test_one_device_whose_values_are_not_finite_is_found() -> None:
    cluster = ready()
    infinite(cluster, "pi-2")
    cluster.draw = drawn()
    for i in range(20):
        cluster.outcome(cluster.submit(image(i)))
        cluster.pass_time(0.2)
    assert liars(cluster) == {"pi-2"}


def test_a_piece_of_another_type_excludes_its_sender() -> None:
    cluster = ready()

    def forge(node: Node, job: e.Compute, made: Made) -> Made:
        return tuple(a.astype(np.float64) for a in made) if node.name == "pi-2" else made

    cluster.forge = forge
    cluster.check(cluster.submit())
    now = cluster.coordinator.last
    assert cluster.core.members.devices["pi-2"].state(now) == "excluded"


# --- parts


def test_how_far_results_are_apart() -> None:
    a = np.linspace(-1, 1, 100, dtype=np.float32)
    assert difference([a], [a.copy()], []) == difference([], [], [])
    b = a.copy()
    b[50] += 0.5
    found = difference([a], [b], [a])
    assert found.error == pytest.approx(0.5, rel=0.1) and 0 < found.spread < found.error
    odd = a.copy()
    odd[3] = np.nan
    assert difference([odd], [a], [a]).error == FAR
    assert difference([odd], [odd.copy()], [a]).error == 0.0
    odd_too = odd.copy()
    odd_too[7] += 1e-3
    assert 0 < difference([odd], [odd_too], [a]).error < 1e-2
    index = np.array([3], np.int64)
    assert difference([index], [index + 1], []).unequal
    steps = np.array([[3, 100]], np.uint8)
    assert not difference([steps], [steps + 1], []).unequal
    assert difference([a], [a[:50]], []).error == FAR
    nothing = np.full(4, 1e-12, np.float32)
    assert difference([nothing], [-nothing], [a]).error < 1e-6  # what cancelled leaves noise


def test_two_others_prove_a_liar_and_clear_who_was_taken_for_one() -> None:
    trust, joined = Trust(), {"a": 1.0, "b": 2.0, "c": 3.0}
    assert trust.differ("a", "b", joined) is None
    assert trust.share("a") == trust.share("b") == 1.0
    verdict = trust.differ("b", "c", joined)
    assert verdict is not None and (verdict.liar, verdict.proven) == ("b", True)
    assert trust.share("a") < 1.0

    trust = Trust()
    verdict = trust.differ("a", "b", {"a": 1.0, "b": 2.0})
    assert verdict is not None and (verdict.liar, verdict.proven) == ("b", False)
    verdict = trust.differ("a", "c", {"a": 1.0, "c": 3.0})
    assert verdict is not None and (verdict.liar, verdict.cleared) == ("a", ("b",))


def test_who_agrees_with_others_is_believed_before_who_is_known_longer() -> None:
    """One device may do all, so that each other one is checked by it alone."""
    trust, joined = Trust(), {"old": 1.0, "other": 2.0, "hub": 3.0}
    for _ in range(20):
        trust.agree("old", "other")
    for _ in range(limits.CHECKS_UNDECIDED - 1):
        assert trust.differ("old", "hub", joined) is None
        trust.agree("hub", "other")
    verdict = trust.differ("old", "hub", joined)
    assert verdict is not None and (verdict.liar, verdict.proven) == ("old", False)
    assert verdict.why == "its results differ from those of hub, which others agree with"
    assert trust.differ("gone", "new", {"gone": 1.0, "new": 2.0}) == Verdict(
        "new", "its results differ from those of gone, which is known better", proven=False
    )


def test_a_doubt_ends_after_checks_that_agree() -> None:
    trust, joined = Trust(), {"a": 1.0, "b": 2.0, "c": 3.0}
    trust.differ("a", "b", joined)
    for _ in range(limits.DOUBT_CHECKS):
        assert trust.share("a") == 1.0
        trust.agree("a", "c")
    assert trust.share("a") == limits.CHECK_SHARE_NEW
    trust.did("a", limits.CHECK_NEW_TASKS + 1)
    assert trust.share("a") == limits.CHECK_SHARE


def test_devices_of_two_numeric_classes_are_judged_by_the_wider_bounds() -> None:
    cluster = ready()
    for name in NAMES:
        other = Facts(flops_per_s=1e9, host=name, engine=f"engine of {name}")
        cluster.join(name, other)
    cluster.pass_time(3.0)

    def forge(node: Node, job: e.Compute, made: Made) -> Made:
        """One value in a hundred is a step of a quantisation away."""
        if node.name != "pi-2":
            return made
        return tuple(
            a + (np.arange(a.size).reshape(a.shape) % 100 == 0) * a.max() / 127 for a in made
        )

    cluster.forge, cluster.draw = forge, drawn()
    ask(cluster, 15)
    assert liars(cluster) == set()
    liar(cluster, "pi-2")
    cluster.forge = lambda node, job, made: (
        tuple(a * 1.5 for a in made) if node.name == "pi-2" else made
    )
    ask(cluster, 15)
    assert liars(cluster) == {"pi-2"}
