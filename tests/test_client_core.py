"""The client's core, event by event: it waits for a head, comes back, and never waits for ever."""

from __future__ import annotations

import numpy as np
import pytest
from cores import Cluster, kind

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import describe, payload_of
from meshinfer.scheduler import events as e
from meshinfer.scheduler.client import LATE_S
from meshinfer.scheduler.telling import COORDINATOR


def test_it_waits_for_the_head() -> None:
    cluster = Cluster(head=False)
    call = cluster.deploy()
    cluster.pass_time(0.5)
    cluster.join("head", m.Facts(computes=False, head=True, host="h"))
    assert cluster.answer(call).failure is None
    cluster.check(cluster.submit())


def test_a_client_that_reconnects_gets_its_answer() -> None:
    """1. its answer is computed; 2. its connection breaks as the reply is sent; 3. it asks."""
    cluster = Cluster()
    cluster.deployed()
    cluster.when(kind(m.Reply), lambda: cluster.cut("ann"))
    reply = cluster.check(cluster.submit())
    assert reply.attempts == 1
    cluster.check_idle()


def test_an_answer_survives_a_client_s_broken_bulk_connection() -> None:
    """1. both answers are lost with the connection; 2. it is told; 3. they come soon, not late."""
    cluster = Cluster()
    cluster.deployed()
    cluster.drop(kind(m.Answer))
    cluster.drop(kind(m.Answer))
    request = cluster.submit()
    cluster.settle(lambda: not cluster.core.requests and cluster.sent["Answer"] >= 2)
    lost = e.PeerLost("ann#1", "reset", plane=e.Plane.BULK)
    for _ in range(20):  # a flapping connection uses up no patience
        cluster._handle(cluster.nodes["head"], lost)
    start = cluster.now
    cluster.check(request)
    assert cluster.now - start < 2 * limits.RESEND_AFTER_LOSS_S
    cluster.check_idle()


def test_the_inputs_are_fed_again_to_a_new_head() -> None:
    """1. fed to the head; 2. welcomed again: not fed again; 3. the welcome names a new head."""
    cluster = Cluster(head=False)
    cluster.submit()
    core = cluster.nodes["ann"].core
    old, new = (
        m.Peer(device="head", incarnation=i, host="h", port=1, key="k" * 40) for i in ("1", "2")
    )
    fed: list[list[tuple[str, int]]] = []
    for head in (old, old, new):
        welcome = m.Welcome(coordinator="1", protocol=1, bulk=cluster.core._bulk, head=head)
        effects = core.handle(e.Arrived(COORDINATOR, welcome), cluster.now)
        sends = [x for x in effects if isinstance(x, e.Send)]
        fed.append([(x.peer, x.message.turn) for x in sends if isinstance(x.message, m.Feed)])
    assert fed == [[("head#1", 1)], [], [("head#2", 2)]]


def test_who_while_it_says_hello_changes_nothing() -> None:
    cluster = Cluster()
    cluster.pass_time(0.5)
    core = cluster.nodes["ann"].core
    for _ in range(3):
        cluster.inject(cluster.nodes["ann"], "coordinator", m.Who())
    due = core.next_deadline()
    core.handle(e.Ticked(), cluster.now)
    assert due == cluster.now and core.next_deadline() > cluster.now


def test_a_coordinator_that_stops_fails_what_is_open() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.drop(kind(m.Start))
    request = cluster.submit()
    cluster.pass_time(0.1)
    cluster.inject(cluster.nodes["ann"], "coordinator", m.Closing())
    assert cluster.failure(request).error == "ClusterUnavailable"


def test_a_silent_coordinator_is_noticed() -> None:
    cluster = Cluster()
    cluster.deployed()
    request = cluster.submit()
    cluster.kill("coordinator", silent=True)
    start = cluster.now
    assert cluster.failure(request).error == "ClusterUnavailable"
    assert cluster.now - start < limits.COORDINATOR_SILENT_S + 1.0


def test_without_any_coordinator_requests_and_questions_end() -> None:
    cluster = Cluster(head=False)
    cluster.kill("coordinator")
    request = cluster.submit(deadline_s=1.0)
    start = cluster.now
    assert cluster.failure(request).error == "ClusterUnavailable"
    assert cluster.now - start == pytest.approx(1.0 + LATE_S, abs=0.1)
    assert cluster.ask(m.ListModels).failure.error == "ClusterUnavailable"  # type: ignore[union-attr]


def test_what_is_left_of_the_deadline_is_sent_again() -> None:
    """1. no coordinator for 2 s; 2. then it comes: the request has 2 s less."""
    cluster = Cluster(head=False)
    seen: list[float] = []
    cluster.when(
        lambda s, r, x: isinstance(x, m.Submit) and (seen.append(x.deadline_s) or True), list
    )
    cluster.submit(deadline_s=10.0)
    cluster.pass_time(2.0)
    cluster.join("head", m.Facts(computes=False, head=True, host="h"))
    cluster.pass_time(0.5)
    assert seen and 7.5 < seen[0] <= 8.1


@pytest.mark.parametrize(
    "message",
    [m.Reply(request="r"), m.Closing(), m.Who(), m.Deployed(call="c")],
    ids=lambda message: type(message).__name__,
)
def test_only_the_coordinator_may_say_this(message: m.AnyMessage) -> None:
    cluster = Cluster()
    (note,) = cluster.nodes["ann"].core.handle(e.Arrived("mallory#1", message), cluster.now)
    assert isinstance(note, e.Note)


def test_closing_it_fails_and_cancels_what_is_open() -> None:
    cluster = Cluster()
    cluster.deployed()
    request = cluster.submit()
    effects = cluster.nodes["ann"].core.handle(e.StopRequested(), cluster.now)
    kinds = [type(x.message) if isinstance(x, e.Send) else type(x) for x in effects]
    assert kinds == [m.Cancel, e.Resolve, e.Stop] and request


def test_that_a_request_is_given_up_is_told_again_if_its_connection_breaks() -> None:
    """1. its inputs are with the head, and no word reaches the coordinator; 2. it is given up, and
    the connection is made anew; 3. the head holds nothing. 4. One under the same id goes on."""
    cluster = Cluster()
    cluster.deployed()
    cluster.severed.add(frozenset(("coordinator", "ann")))
    request = cluster.submit()
    cluster.pass_time(0.1)
    cluster._handle(cluster.nodes["ann"], e.Cancelled(request))
    with pytest.raises(AssertionError, match="head#1"):
        cluster.check_idle()
    cluster.severed.clear()
    cluster.cut("ann")
    cluster.pass_time(limits.ACK_TIMEOUT_S)
    cluster.check_idle()
    again = cluster.submit(request=request)
    cluster.cut("ann")
    cluster.check(again)


def test_an_admin_s_call_that_fails_is_told_as_a_failure() -> None:
    """Here: nobody has a key in this cluster. A list that does not fail is told as an answer."""
    cluster = Cluster()
    asked = {"call-a": m.Expel(call="call-a", id="pi-1"), "call-b": m.ListModels(call="call-b")}
    for call, question in asked.items():
        cluster._handle(cluster.nodes["ann"], e.Asked(call, question, 30.0))
    failed, listed = (cluster.answer(call) for call in asked)
    assert isinstance(failed.answer, m.AdmittedNow)
    assert failed.failure is not None and failed.failure.error == "ConfigurationError"
    assert isinstance(listed.answer, m.Models) and listed.failure is None


def test_an_answer_is_of_the_head_alone() -> None:
    """Others that it is connected to could make it up, under a later attempt."""
    cluster = Cluster()
    cluster.deployed()
    cluster.delay(kind(m.Answer), 1.0)
    request = cluster.submit()
    cluster.pass_time(0.1)
    forged = np.zeros((1,), np.float32)
    for peer in ("pi-1#1", "coordinator#1", "head#2"):
        answer = m.Answer(id=1, request=request, attempt=99, tensor=describe("y", forged), count=1)
        cluster.inject(cluster.nodes["ann"], peer, answer, bytes(payload_of(forged)))
    cluster.check(request)
