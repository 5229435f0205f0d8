"""What members say to the coordinator counts from who has a part in that attempt or plan, and of
who has one: of the others nothing comes."""

from __future__ import annotations

import pytest
from cores import Cluster, Node, image, kind
from shared import graph
from test_coordinator_core import client_hello
from test_fallback import NAMES, pipeline, ready

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.records import BESIDE_COORDINATOR
from meshinfer.scheduler import events as e
from meshinfer.scheduler.worker import COORDINATOR

WHY = "x came as <f4 of shape (1,)"


def two_of_three(**fields: object) -> Cluster:
    """pi-1 runs the first half, pi-2 the second; pi-3 is there, and has no part in it. A client on
    a device's host, eve, has none either."""
    cluster = Cluster(NAMES, **fields)  # type: ignore[arg-type]
    cluster.spares = False
    cluster.deployed(plan=str(pipeline(graph(), NAMES[:2])))
    hello = client_hello("eve", where=BESIDE_COORDINATOR)
    cluster.core.handle(e.Arrived("eve#1", hello, ends=("h", "h")), cluster.now)
    assert cluster.core._heads.stands("eve#1")
    return cluster


def begun(cluster: Cluster, first: int = 0) -> tuple[str, int]:
    """A request that runs, and waits for a piece; and its attempt."""
    cluster.delay(kind(m.Deliver), 5.0)
    request = cluster.submit(image(first))
    cluster.pass_time(0.1)
    return request, cluster.core.requests[request].attempt


def say(cluster: Cluster, peer: str, message: m.AnyMessage) -> None:
    cluster.inject(cluster.coordinator, peer, message)


def excluded(cluster: Cluster) -> set[str]:
    devices = cluster.core.members.devices.values()
    return {device.name for device in devices if device.excluded_until > cluster.now}


# --- Doubtful


@pytest.mark.parametrize(
    ("peer", "of", "place"),
    [
        ("pi-3#1", "pi-1#1", (0, 0)),  # who says so has no part in it
        ("eve#1", "pi-1#1", (0, 0)),
        ("pi-2#1", "pi-3#1", (0, 0)),  # nor has who is named
        ("pi-2#1", "pi-1#1", (1, 0)),  # it is another's task
        ("pi-2#1", "pi-1#1", (7, 7)),  # nobody's
    ],
)
@pytest.mark.parametrize("why", ["", WHY])
def test_a_doubt_of_who_has_no_part_is_nothing(
    peer: str, of: str, place: m.Place, why: str
) -> None:
    cluster = two_of_three()
    request, attempt = begun(cluster)
    word = m.Doubtful(request=request, attempt=attempt, place=place, peer=of, why=why)
    say(cluster, peer, word)
    checks = cluster.core._answering.checks
    assert not excluded(cluster) and not checks._due and not checks._wanted
    assert cluster.check(request).attempts == 1


def test_what_is_not_finite_is_checked() -> None:
    cluster = two_of_three()
    request, attempt = begun(cluster)
    word = m.Doubtful(request=request, attempt=attempt, place=(0, 0), peer="pi-1#1")
    say(cluster, "pi-2#1", word)
    assert len(cluster.core._answering.checks._due) == 1
    assert cluster.check(request).attempts == 1


def test_one_word_against_another_begins_anew_and_has_both_checked_but_nobody_out() -> None:
    cluster = two_of_three()
    request, attempt = begun(cluster)
    word = m.Doubtful(request=request, attempt=attempt, place=(0, 0), peer="pi-1#1", why=WHY)
    say(cluster, "pi-2#1", word)
    assert cluster.check(request).attempts == 2 and not excluded(cluster)
    trust = cluster.core._answering.checks.trust
    assert trust.rivals("pi-1") == {"pi-2"} and trust.share("pi-1") == trust.share("pi-2") == 1.0


@pytest.mark.parametrize(
    ("words", "out"),
    [
        ([("pi-2#1", "pi-1#1", (0, 0)), ("pi-3#1", "pi-1#1", (0, 0))], "pi-1"),
        ([("pi-3#1", "pi-1#1", (0, 0)), ("pi-3#1", "pi-2#1", (1, 0))], "pi-3"),
        ([("head#1", "pi-1#1", (0, 0))], "pi-1"),  # the coordinator's own
    ],
)
def test_who_has_it_with_two_others_works_no_more_for_a_while(
    words: list[tuple[str, str, m.Place]], out: str
) -> None:
    cluster = ready(NAMES, pipeline(graph()))
    request, attempt = begun(cluster)
    for i, (peer, of, place) in enumerate(words):
        if i:
            cluster.check(request)
            request, attempt = begun(cluster, i)
        word = m.Doubtful(request=request, attempt=attempt, place=place, peer=of, why=WHY)
        say(cluster, peer, word)
    assert excluded(cluster) == {out}
    cluster.check(request, image(len(words) - 1))


def test_who_was_taken_for_a_liar_works_again_as_another_is_found_by_its_pieces() -> None:
    """1. pi-1 and pi-2 differ, none can tell who is wrong, and pi-2 is kept out; 2. pi-1 has it
    with pi-3 too."""
    cluster = ready(NAMES, pipeline(graph()))
    checks, health = cluster.core._answering.checks, cluster.core.members.health
    verdict = checks.trust.differ("pi-1", "pi-2", {"pi-1": 0.0, "pi-2": 1.0})
    assert verdict is not None and verdict.liar == "pi-2"
    checks._keep_out(verdict, cluster.now)
    request, attempt = begun(cluster)
    cluster.pass_time(1.0)
    attempt = cluster.core.requests[request].attempt
    tried = cluster.core.requests[request].tried[attempt]
    place = next(p for p in ((0, 0), (1, 0), (2, 0)) if tried.has_part("pi-1", p))
    word = m.Doubtful(request=request, attempt=attempt, place=place, peer="pi-1#1", why=WHY)
    say(cluster, "pi-3#1", word)
    assert excluded(cluster) == {"pi-1"} and not health.liars
    (note,) = [n for n in cluster.coordinator.notes if n.text == "a piece of another kind"]
    assert (note.fields["excluded"], note.fields["cleared"]) == ("pi-1", "pi-2")
    cluster.check(request)


def test_a_device_that_always_sends_what_was_not_asked_for_is_left_out_in_the_end() -> None:
    """No kernel makes that. Its results are of another shape; whom it sends them says so."""
    cluster = ready(NAMES, pipeline(graph()))

    def forge(node: Node, job: e.Compute, made):  # type: ignore[no-untyped-def]
        return tuple(a.astype("<f8") for a in made) if node.name == "pi-1" else made

    cluster.forge = forge
    reply = cluster.check(cluster.submit(deadline_s=60.0))
    assert "pi-1" not in {task.device for task in reply.tasks}
    assert 2 < reply.attempts <= limits.ATTEMPTS_PER_REQUEST


# --- the others


def test_a_task_is_told_of_by_who_had_it() -> None:
    """1. pi-3, and pi-1 of a task of pi-2, say that it is done; 2. it is done by pi-2."""
    cluster = two_of_three()
    request, attempt = begun(cluster)
    done = m.Done(place=(1, 0), compute_s=9.0, sent_bytes=0)
    for peer in ("pi-3#1", "pi-1#1"):
        say(cluster, peer, m.TasksDone(request=request, attempt=attempt, tasks=(done,)))
        assert cluster.core.requests[request].tried[attempt].tasks == {}
    assert cluster.core.members.devices["pi-3"].tasks_done == 0
    tasks = {task.place: task.device for task in cluster.check(request).tasks}
    assert tasks == {(0, 0): "pi-1", (1, 0): "pi-2"}


def test_who_was_not_asked_lacks_nothing() -> None:
    """1. pi-2 is lost, all are asked what they await; 2. eve awaits all of it."""
    cluster = ready(NAMES, pipeline(graph()))
    hello = client_hello("eve", where=BESIDE_COORDINATOR)
    cluster.core.handle(e.Arrived("eve#1", hello, ends=("h", "h")), cluster.now)
    request, attempt = begun(cluster)
    cluster.kill("pi-2")
    tried = cluster.core.requests[request].tried[attempt]
    cluster.settle(lambda: tried.question is not None)
    question = tried.question
    assert question is not None and question.asked and "eve#1" not in question.awaiting
    before = set(question.lacked)
    word = m.Lacks(request=request, attempt=attempt, asked=question.asked, lacked=question.asked)
    say(cluster, "eve#1", word)
    assert question.lacked == before and tried.question is question
    assert cluster.check(request).attempts == 1


def test_only_who_shares_a_plan_may_say_that_another_is_late() -> None:
    cluster = two_of_three()
    for peer, other in (("pi-3#1", "pi-1#1"), ("pi-1#1", "pi-3#1"), ("eve#1", "pi-1#1")):
        say(cluster, peer, m.Stalled(peer=other))
        assert cluster.core.members.apart == {}
    assert cluster.core._heads.stands("eve#1")
    say(cluster, "pi-1#1", m.Stalled(peer="pi-2#1"))
    assert cluster.core.members.apart == {("pi-1", "pi-2"): True}


def test_only_who_computes_for_a_client_may_say_that_it_is_late() -> None:
    """Else any device could have it go by the head."""
    cluster = two_of_three(beside=True)
    say(cluster, "pi-1#1", m.Stalled(peer="ann#1"))
    assert not cluster.core._heads._refused, "it has asked for nothing"
    request, _ = begun(cluster)
    say(cluster, "pi-3#1", m.Stalled(peer="ann#1"))
    assert not cluster.core._heads._refused
    say(cluster, "pi-1#1", m.Stalled(peer="ann#1"))
    assert list(cluster.core._heads._refused) == ["ann#1"]
    cluster.check(request)


def test_a_client_that_a_device_did_not_reach_is_tried_again_later_each_time() -> None:
    """1. ann goes by the head; 2. after a while it is the head of its requests again; 3. refused
    again, it goes by the head for twice as long; 4. and not so long where that was long ago."""
    cluster = two_of_three(beside=True)
    heads, ann = cluster.core._heads, cluster.nodes["ann"]
    for rest_s in (limits.EXCLUDED_S, 2 * limits.EXCLUDED_S, 4 * limits.EXCLUDED_S):
        assert heads.stands("ann#1") and cluster.check(cluster.submit()).attempts == 1
        cluster.pass_time(2.0)  # all is acknowledged
        assert len(heads.refuse("ann#1", cluster.now)) == 2
        cluster.inject(ann, COORDINATOR, m.Who())
        cluster.pass_time(rest_s - 2.0)
        assert not heads.stands("ann#1") and cluster.check(cluster.submit()).attempts == 1
        cluster.pass_time(3.0)
    assert heads.stands("ann#1")
    cluster.pass_time(limits.QUARANTINE_FORGOTTEN_S + 2.0)
    heads.refuse("ann#1", cluster.now)
    assert heads._refused["ann#1"].until == cluster.now + limits.EXCLUDED_S


def test_only_who_is_to_prepare_something_may_say_that_it_cannot() -> None:
    """1. pi-1 and pi-2 prepare; 2. pi-3, with no part in it, and pi-1, which is through, fail."""
    cluster = Cluster(NAMES)
    cluster.spares = False
    cluster.delay(kind(m.Installed, by="pi-2"), 1.0)
    call = cluster.deploy(plan=str(pipeline(graph(), NAMES[:2])))
    deployments = cluster.core.catalogue.deployments
    cluster.settle(lambda: any(made.waiting == {"pi-2"} for made in deployments.values()))
    (number,) = deployments
    failure = m.Failure(error="ConfigurationError", message="disk full")
    for peer in ("pi-3#1", "pi-1#1", "head#1"):
        say(cluster, peer, m.Installed(deployment=number, failure=failure))
        say(cluster, peer, m.Installed(deployment=number))
    assert list(deployments) == [number] and not excluded(cluster)
    said = cluster.answer(call).answer
    assert isinstance(said, m.Deployed) and said.failure is None
    assert cluster.check(cluster.submit()).attempts == 1


# --- Unreachable


def unreached(cluster: Cluster, *words: tuple[str, str]) -> None:
    """Each is said of another attempt, which is answered."""
    for i, (by, of) in enumerate(words):
        request, attempt = begun(cluster, i)
        say(cluster, by, m.Unreachable(request=request, attempt=attempt, peer=of))
        assert cluster.check(request, image(i)).attempts == 2


def test_one_device_that_does_not_reach_another_is_kept_apart_from_it_and_nobody_is_out() -> None:
    cluster = ready(NAMES, pipeline(graph()))
    request, attempt = begun(cluster)
    say(cluster, "pi-1#1", m.Unreachable(request=request, attempt=attempt, peer="pi-2#1"))
    assert not excluded(cluster) and cluster.core.members.apart == {("pi-1", "pi-2"): True}
    assert cluster.check(request).attempts == 2


@pytest.mark.parametrize(
    ("words", "out"),
    [
        ([("pi-1#1", "pi-2#1"), ("pi-3#1", "pi-2#1")], "pi-2"),
        ([("pi-1#1", "pi-2#1"), ("pi-1#1", "pi-3#1")], "pi-1"),  # one liar, who names all others
        ([("head#1", "pi-2#1")], "pi-2"),  # the coordinator's own
        ([("pi-2#1", "head#1")], "pi-2"),  # of which it says that of itself
    ],
)
def test_who_is_named_by_two_or_names_two_works_no_more_for_a_while(
    words: list[tuple[str, str]], out: str
) -> None:
    cluster = ready(NAMES, pipeline(graph()))
    unreached(cluster, *words)
    assert excluded(cluster) == {out}


def test_who_says_it_again_is_out_itself_unless_long_after() -> None:
    cluster = ready(NAMES, pipeline(graph()))
    for pause_s, out in ((0.0, set()), (limits.STRIKES_WITHIN_S + 1.0, set()), (3.0, {"pi-1"})):
        cluster.pass_time(pause_s)
        assert not cluster.core.members.apart, "an echo of their own has come back"
        unreached(cluster, ("pi-1#1", "pi-2#1"))
        assert excluded(cluster) == out


def test_a_pair_that_no_way_leads_between_is_parted_with_the_first_word() -> None:
    """1. pi-1 and pi-2 are cut off from each other, and the head relays nothing either."""
    cluster = ready(NAMES, pipeline(graph()))
    cluster.severed.add(frozenset(("pi-1", "pi-2")))
    head = cluster.nodes["head"].core
    head._detours.pass_on = lambda *_: []  # type: ignore[union-attr, method-assign]
    reply = cluster.check(cluster.submit(deadline_s=60.0))
    assert reply.attempts == 2 and len(excluded(cluster)) == 1
    assert reply.total_s < limits.ACK_TRIES * limits.ACK_TIMEOUT_S + 3.0
