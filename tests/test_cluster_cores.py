"""All cores together over the fake link: a user's day, and the ways in which it can go wrong."""

from __future__ import annotations

import numpy as np
import pytest
from cores import Cluster, conv_net, image, kind

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import digest_of
from meshinfer.scheduler import events as e
from meshinfer.scheduler.catalogue import Phase
from meshinfer.scheduler.puller import Puller
from meshinfer.scheduler.worker import WorkerCore


def ready(cluster: Cluster) -> list[int]:
    deployments = cluster.core.catalogue.deployments.values()
    return [d.number for d in deployments if d.phase is Phase.READY]


# --- deploying ----------------------------------------------------------------------------------


def test_a_model_is_deployed_and_answers() -> None:
    cluster = Cluster()
    deployed = cluster.deployed()
    assert deployed.version == 1 and "pi-2" in (deployed.plan or "") and deployed.report
    reply = cluster.check(cluster.submit())
    assert reply.attempts == 1 and {t.device for t in reply.tasks} == {"pi-1", "pi-2"}
    assert reply.plan == deployed.plan and len(reply.tasks) == 6
    assert 0 <= reply.queue_s < reply.total_s < 1
    cluster.check_idle()


def test_a_large_model_is_fetched_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_WANT_BYTES", 500)
    cluster = Cluster()
    cluster.deployed()
    assert cluster.sent["Chunk"] > 8
    cluster.check(cluster.submit())


def test_a_lost_chunk_is_asked_for_again() -> None:
    cluster = Cluster()
    cluster.drop(kind(m.Chunk))
    cluster.drop(kind(m.Want))
    cluster.deployed()
    cluster.check(cluster.submit())


def test_a_start_that_did_not_come_is_told_again_once_the_request_is_late() -> None:
    """As where somebody in between drops whole messages. It has just said that it lives: at the
    next time it would find by itself that a word is missing, and join anew."""
    cluster = Cluster()
    cluster.deployed()
    for seed in range(8):  # until it is known how long one takes
        cluster.check(cluster.submit(image(seed)), image(seed))
    worker = cluster.nodes["pi-1"].core
    assert isinstance(worker, WorkerCore)
    cluster.pass_time(worker._beat_due - cluster.now + 0.01)
    cluster.drop(kind(m.Start, to="pi-1"))
    request = cluster.submit()
    reply = cluster.check(request)
    assert reply.attempts == 1 and reply.total_s < limits.ACK_TIMEOUT_S


def test_a_peer_that_sends_nothing_of_what_is_wanted_is_reached_by_a_new_connection() -> None:
    puller, wait = Puller(), limits.ACK_TIMEOUT_S
    puller.want("a" * 64, "c", 0.0)
    puller.want("b" * 64, "c", 0.0)

    def renewed(now: float) -> list[str]:
        effects, failed = puller.due(now)
        assert not failed and not any(isinstance(each, e.Send) for each in effects)
        return [each.peer for each in effects if isinstance(each, e.Renew)]

    assert puller.next_deadline() == wait and renewed(wait - 0.1) == []
    assert renewed(wait) == ["c"] and renewed(wait + 0.1) == []
    chunk = m.Chunk(digest="a" * 64, offset=0, total=9)
    puller.arrived("c", chunk, memoryview(b"abc"), 2 * wait - 0.1)
    assert renewed(2 * wait) == [], "it sends, if not all"
    took = 2 * wait - 0.1
    assert renewed(3 * took + wait - 0.1) == [], "it takes that long, as has been seen"
    assert renewed(3 * took + wait) == ["c"]


def wants(effects: list[e.Effect]) -> list[tuple[str, int]]:
    found = [x.message for x in effects if isinstance(x, e.Send)]
    return [(x.digest[0], x.offset) for x in found if isinstance(x, m.Want)]


def test_of_a_peer_that_sends_nothing_the_oldest_is_wanted_once_more() -> None:
    puller, wait = Puller(), limits.ACK_TIMEOUT_S
    puller.want("a" * 64, "c", 0.0)
    puller.want("b" * 64, "c", 0.1)
    assert wants(puller.due(wait + 0.1)[0]) == []
    again = wait + 0.1 + limits.RESEND_AFTER_LOSS_S
    assert puller.next_deadline() == again and wants(puller.due(again)[0]) == [("a", 0)]
    assert wants(puller.due(2 * wait + 1.0)[0]) == [], "a slow link carries it already"
    assert wants(puller.due(30.0)[0]) == [("a", 0), ("b", 0)]


def test_what_later_chunks_overtake_is_wanted_once_more() -> None:
    puller = Puller()
    puller.want("a" * 64, "c", 0.0)
    puller.want("b" * 64, "c", 0.0)
    asked = []
    for i in range(5):
        chunk = m.Chunk(digest="b" * 64, offset=i, total=9)
        asked.append(wants(puller.arrived("c", chunk, memoryview(b"x"), 0.1 + i)))
    assert asked[:3] == [[("b", i)] for i in (1, 2, 3)], "asked for at once, or overtaken twice"
    assert asked[3:] == [[("a", 0), ("b", 4)], [("b", 5)]]


def test_a_corrupted_upload_is_refused() -> None:
    cluster = Cluster()
    answer = cluster.answer(cluster.deploy(announce="a" * 64))
    assert answer.failure is not None and "SHA-256" in answer.failure.message
    cluster.check_idle()


def test_a_file_that_is_no_model_is_refused() -> None:
    answer = (cluster := Cluster()).answer(cluster.deploy(model=b"no model at all"))
    assert answer.failure is not None and answer.failure.error == "InvalidInput"


def test_a_dynamic_model_is_planned_at_the_first_request_of_each_shape() -> None:
    cluster = Cluster()
    model = conv_net(None)
    assert cluster.deployed(model=model).plan is None
    for size in [(12, 10), (9, 14), (12, 10)]:
        cluster.check(cluster.submit(image(1, size)), image(1, size), model)
    assert len(ready(cluster)) == 2
    cluster.check_idle()


def test_a_dynamic_model_with_shapes_given_is_planned_at_once() -> None:
    cluster = Cluster()
    assert cluster.deployed(model=conv_net(None), shapes={"x": (1, 3, 12, 10)}).plan
    assert (
        cluster.answer(cluster.deploy(model=conv_net(None), shapes={"other": (1,)})).failure.error
        == "InvalidInput"
    )  # type: ignore[union-attr]


def test_a_plan_given_as_text_is_used() -> None:
    cluster = Cluster()
    text = (cluster.deployed().plan or "").replace("pi-2", "pi-1")
    assert cluster.deployed(plan=text).plan == text
    reply = cluster.check(cluster.submit())
    assert reply.version == 2 and {t.device for t in reply.tasks} == {"pi-1"}


@pytest.mark.parametrize("stranger", ["elsewhere", "pi-9"])
def test_a_plan_that_names_a_stranger_is_refused(stranger: str) -> None:
    cluster = Cluster()
    text = (cluster.deployed().plan or "").replace("pi-2", stranger)
    failure = cluster.answer(cluster.deploy(plan=text)).failure
    assert failure is not None and stranger in failure.message


def test_when_the_devices_of_a_given_plan_are_gone_another_is_made() -> None:
    cluster = Cluster()
    text = cluster.deployed().plan
    cluster.deployed(plan=text)
    cluster.kill("pi-2")
    assert {t.device for t in cluster.check(cluster.submit()).tasks} == {"pi-1"}


def test_a_failure_to_plan_is_the_answer() -> None:
    cluster = Cluster()
    wanted = m.Failure(error="NotEnoughMemory", message="no plan fits")
    cluster.plan_fault = lambda effect: wanted
    assert cluster.answer(cluster.deploy()).failure == wanted
    assert cluster.ask(m.ListModels).answer.models == ()  # type: ignore[union-attr]


def test_a_failing_new_plan_does_not_take_down_the_one_that_serves() -> None:
    """1. two workers serve; 2. a third joins; 3. planning for three fails: requests go on."""
    cluster = Cluster()
    cluster.deployed()
    plans = []

    def fail(effect: e.MakePlan) -> m.Failure:
        plans.append(effect.deployment)
        return m.Failure(error="NotEnoughMemory", message="no plan fits")

    cluster.plan_fault = fail
    cluster.join("pi-3")
    cluster.pass_time(5.0)
    assert cluster.check(cluster.submit()).attempts == 1
    assert len(plans) == 1, "it is not tried over and over"


def test_no_worker_for_a_deploy_is_a_typed_error_in_time() -> None:
    cluster = Cluster(workers=())
    start = cluster.now
    failure = cluster.answer(cluster.deploy()).failure
    assert failure is not None and failure.error == "ClusterUnavailable"
    assert cluster.now - start < limits.NO_WORKER_GRACE_S + 1.0


def test_a_deploy_that_is_asked_twice_is_one_version() -> None:
    """1. deploy; 2. the answer is lost with the connection; 3. the client asks again."""
    cluster = Cluster()
    cluster.when(kind(m.Deployed), lambda: cluster.cut("ann"))
    assert cluster.deployed().version == 1
    assert [v.version for v in cluster.ask(m.ListModels).answer.models] == [1]  # type: ignore[union-attr]


def test_old_versions_are_let_go() -> None:
    cluster = Cluster()
    for _ in range(limits.VERSIONS_PER_MODEL + 3):
        cluster.deployed()
    cluster.pass_time(0.1)
    assert len(ready(cluster)) == limits.VERSIONS_PER_MODEL
    assert len(cluster.nodes["pi-1"].prepared) == limits.VERSIONS_PER_MODEL
    assert cluster.failure(cluster.submit(version=1)).error == "ModelNotFound"
    assert cluster.check(cluster.submit(version=5)).version == 5


# --- requests -----------------------------------------------------------------------------------


def test_several_requests_are_in_flight_and_each_gets_its_own_answer() -> None:
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.deployed()
    asked = [cluster.submit(image(i)) for i in range(12)]
    for i, request in enumerate(asked):
        assert cluster.check(request, image(i)).attempts == 1
    cluster.check_idle()


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x": np.zeros((1, 3, 12, 11), np.float32)}, "shape"),
        ({"x": np.zeros((1, 3, 12, 10), np.float64)}, "type"),
        ({"y": np.zeros((1, 3, 12, 10), np.float32)}, "inputs"),
        ({}, "inputs"),
    ],
)
def test_wrong_inputs_are_refused_with_a_text(arrays: dict[str, np.ndarray], text: str) -> None:
    cluster = Cluster()
    cluster.deployed()
    failure = cluster.failure(cluster.submit(arrays))
    assert failure.error == "InvalidInput" and text in failure.message and failure.hint
    cluster.check_idle()


def test_a_picture_for_a_model_without_a_spec_and_an_absurd_shape_are_refused() -> None:
    cluster = Cluster()
    cluster.deployed(model=conv_net(None))
    assert cluster.failure(cluster.submit(picture=True)).error == "InvalidInput"
    tensor = m.Tensor(name="x", dtype="<f4", shape=(1, 3, 1 << 40, 1 << 20))
    header = m.Submit(
        request="huge", model="net", version=None, inputs=(tensor,), picture=False, deadline_s=9.0
    )
    cluster.inject(cluster.coordinator, "ann#1", header)
    assert not cluster.core.requests


def test_an_unknown_model_or_version_is_named() -> None:
    cluster = Cluster()
    cluster.deployed()
    assert cluster.failure(cluster.submit(model="nett")).error == "ModelNotFound"
    assert "net v7" in cluster.failure(cluster.submit(version=7)).message


def test_a_full_queue_says_so_and_the_same_id_may_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. the queue is full: refused, released; 2. the same id later: computed."""
    monkeypatch.setattr(limits, "QUEUE_REQUESTS", 1)
    cluster = Cluster()
    cluster.deployed()
    first = cluster.submit()
    second = cluster.submit()
    failure = cluster.failure(second)
    assert failure.error == "QueueFull" and failure.retry_after_s
    cluster.check(first)
    cluster.nodes["ann"].resolved.clear()
    cluster.connect("bob")
    cluster.pass_time(0.5)
    cluster.check(cluster.submit(client="bob", request=second), client="bob")
    cluster.check_idle()


def test_a_deadline_that_passes_is_the_outcome() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.kernel_fault = lambda node, job: None
    cluster.delay(kind(m.Start), 1.0)
    start = cluster.now
    assert cluster.failure(cluster.submit(deadline_s=0.7)).error == "DeadlineExceeded"
    assert cluster.now - start == pytest.approx(0.7, abs=0.1)
    cluster.check_idle()


def test_a_cancelled_request_is_released_everywhere() -> None:
    cluster = Cluster()
    cluster.deployed()
    request = cluster.submit()
    cluster.pass_time(0.008)
    cluster._handle(cluster.nodes["ann"], e.Cancelled(request))
    cluster.check_idle()
    assert request not in cluster.nodes["ann"].resolved


def test_a_kernel_that_fails_three_times_is_reported() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.kernel_fault = lambda node, job: "division by zero" if job.place[0] == 1 else None
    failure = cluster.failure(cluster.submit())
    assert failure.error == "InvalidInput" and "3 times: division by zero" in failure.message
    cluster.kernel_fault = lambda node, job: None
    cluster.check(cluster.submit())
    cluster.check_idle()


def test_a_kernel_that_fails_once_costs_an_attempt() -> None:
    cluster = Cluster()
    cluster.deployed()
    faults = ["once"]
    cluster.kernel_fault = lambda node, job: faults.pop() if faults else None
    assert cluster.check(cluster.submit()).attempts == 2
    cluster.check_idle()


def test_the_times_of_tasks_may_come_after_the_answer() -> None:
    """1. a TasksDone is slow; 2. Merged comes; 3. the reply waits for it, but not for long."""
    for slow, tasks in ((0.1, 6), (3.0, 3)):
        cluster = Cluster()
        cluster.deployed()
        cluster.delay(kind(m.TasksDone, by="pi-1"), slow)
        assert len(cluster.check(cluster.submit()).tasks) == tasks


# --- loss of messages ---------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [m.Deliver, m.Feed, m.Answer, m.Ack])
def test_a_lost_bulk_message_is_sent_again(lost: type) -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.drop(kind(lost))
    request = cluster.submit()
    assert cluster.check(request).attempts == 1
    cluster.pass_time(limits.ACK_TIMEOUT_S)
    cluster.check_idle()


def test_a_device_that_cannot_reach_another_is_planned_around() -> None:
    """1. no piece from pi-1 to pi-2 arrives, by the head either; 2. pi-1 gives up and says so; 3.
    without one of them: pi-1, which was told to go by the head, and has its word alone."""
    cluster = Cluster()
    cluster.deployed()
    for _ in range(30):
        cluster.drop(kind(m.Deliver, by="pi-1", to="pi-2"))
        cluster.drop(kind(m.Relay, to="pi-2"))
    reply = cluster.check(cluster.submit(deadline_s=100.0))
    assert reply.attempts == 2 and {t.device for t in reply.tasks} == {"pi-2"}


def test_duplicates_are_harmless() -> None:
    """Every piece arrives twice: no task is computed twice, nothing is left."""
    cluster = Cluster()
    cluster.deployed()
    original = cluster._deliver

    def twice(sender, receiver, plane, message, payload, extra):  # type: ignore[no-untyped-def]
        original(sender, receiver, plane, message, payload, extra)
        if plane is e.Plane.BULK:
            original(sender, receiver, plane, message, payload, extra + 0.001)

    cluster._deliver = twice  # type: ignore[method-assign]
    reply = cluster.check(cluster.submit())
    assert reply.attempts == 1 and len(reply.tasks) == 6
    cluster.check_idle()


def test_late_pieces_of_a_released_request_are_dropped() -> None:
    """1. a Deliver is held back; 2. the request is cancelled and released; 3. the piece comes."""
    cluster = Cluster()
    cluster.deployed()
    cluster.delay(kind(m.Deliver, by="pi-1", to="pi-2"), 1.0)
    request = cluster.submit()
    cluster.pass_time(0.05)
    cluster._handle(cluster.nodes["ann"], e.Cancelled(request))
    cluster.pass_time(2.0)
    cluster.check_idle()


# --- loss of devices ----------------------------------------------------------------------------

MOMENTS = {
    "while planning": kind(m.Submit),
    "as it is told to install": kind(m.Install, to="pi-2"),
    "before it acknowledges": kind(m.Deliver, to="pi-2"),
    "as it acknowledges": kind(m.Ack, by="pi-2"),
    "as it tells of its tasks": kind(m.TasksDone, by="pi-2"),
    "in the middle of a halo": kind(m.Deliver, by="pi-2", to="pi-1"),
    "as it hands its part over": kind(m.Deliver, by="pi-2", to="head"),
    "as the answer is merged": kind(m.Merged),
    "as the request is released": kind(m.Release, to="pi-2"),
}


@pytest.mark.parametrize("silent", [False, True], ids=["reset", "silent"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_lost_at_any_moment_costs_no_request(moment: str, silent: bool) -> None:
    """1. a request is under way; 2. pi-2 dies at the moment; 3. others answer it."""
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.deployed(model=conv_net(None))
    cluster.when(MOMENTS[moment], lambda: cluster.kill("pi-2", silent=silent))
    start = cluster.now
    asked = [cluster.submit(image(i)) for i in range(8)]
    for i, request in enumerate(asked):
        cluster.check(request, image(i))
    assert cluster.now - start < limits.DEAD_AFTER_S + 2.0
    cluster.pass_time(limits.ACK_DELAY_S)  # it acknowledges last, where nothing goes to its peer
    assert not cluster.nodes["pi-2"].alive
    cluster.pass_time(limits.DEAD_AFTER_S + 0.5)
    assert {t.device for t in cluster.check(cluster.submit()).tasks} == {"pi-1", "pi-3"}
    cluster.check_idle()


def test_a_second_loss_during_recovery() -> None:
    """1. pi-1 dies; 2. as the next plan is installed pi-2 dies; 3. pi-3 answers alone."""
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.deployed()
    cluster.when(kind(m.Deliver, by="pi-1"), lambda: cluster.kill("pi-1"))
    request = cluster.submit()
    cluster.settle(lambda: not cluster.nodes["pi-1"].alive)
    cluster.when(kind(m.Install, to="pi-2"), lambda: cluster.kill("pi-2"))
    reply = cluster.check(request)
    assert {t.device for t in reply.tasks} == {"pi-3"} and reply.attempts == 2
    cluster.check_idle()


def test_all_workers_lost_then_one_joins() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.when(kind(m.Deliver, by="pi-1"), lambda: (cluster.kill("pi-1"), cluster.kill("pi-2")))
    request = cluster.submit()
    cluster.pass_time(2.0)
    cluster.join("pi-7")
    assert {t.device for t in cluster.check(request).tasks} == {"pi-7"}
    cluster.check_idle()


def test_all_workers_lost_is_a_typed_error_and_heals() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.kill("pi-1")
    cluster.kill("pi-2")
    failure = cluster.failure(cluster.submit())
    assert failure.error == "ClusterUnavailable" and failure.retry_after_s
    cluster.join("pi-1")
    cluster.check(cluster.submit())


def test_a_worker_joins_and_a_new_plan_takes_over_without_a_second_attempt() -> None:
    """1. requests flow; 2. pi-3 joins; 3. a plan of three is made beside the old; 4. no retry."""
    cluster = Cluster()
    cluster.deployed()
    replies = []
    for i in range(30):
        if i == 5:
            cluster.join("pi-3")
        asked = [cluster.submit(image(j)) for j in range(3)]
        replies += [cluster.check(r, image(j)) for j, r in enumerate(asked)]
    assert {r.attempts for r in replies} == {1}
    assert {t.device for t in replies[-1].tasks} == {"pi-1", "pi-2", "pi-3"}
    assert len(ready(cluster)) == 1
    cluster.check_idle()


def test_a_device_that_starts_again_is_another_peer_and_connections_do_not_pile_up() -> None:
    cluster = Cluster()
    cluster.deployed()
    for _ in range(5):
        cluster.kill("pi-2")
        cluster.join("pi-2")
        cluster.pass_time(1.0)
        assert {t.device for t in cluster.check(cluster.submit()).tasks} == {"pi-1", "pi-2"}
    assert len(cluster.nodes["pi-1"].links) == 3  # the coordinator, the head, pi-2
    assert len(cluster.nodes["pi-1"].prepared) == 1
    cluster.check_idle()


@pytest.mark.parametrize("name", ["pi-1", "head", "ann"])
@pytest.mark.parametrize("lost", [m.Start, m.Merged, m.Reply, m.Install, m.Installed, m.Submit])
def test_a_broken_control_connection_loses_no_request(name: str, lost: type) -> None:
    """1. a control message is under way; 2. the connection breaks and takes it; 3. all is well."""
    cluster = Cluster()
    cluster.deployed(model=conv_net(None))
    cluster.when(kind(lost), lambda: cluster.cut(name))
    request = cluster.submit()
    cluster.check(request)
    assert cluster.now < 106.0
    cluster.check_idle()


def test_a_head_that_starts_again_is_given_the_inputs_again() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.when(kind(m.Deliver, by="pi-1"), lambda: cluster.kill("head"))
    request = cluster.submit()
    cluster.pass_time(0.5)
    cluster.join("head", m.Facts(computes=False, head=True, host="h"))
    assert cluster.check(request).attempts == 2
    cluster.check_idle()


def test_a_coordinator_that_starts_again_is_joined_again() -> None:
    """1. it dies with a request open; 2. the next one has the deployment, and answers it."""
    cluster = Cluster()
    cluster.deployed()
    request = cluster.submit()
    cluster.when(kind(m.Deliver, by="pi-1"), cluster.restart_coordinator)
    assert cluster.check(request).version == 1
    cluster.pass_time(1.0)
    assert cluster.check(cluster.submit()).attempts == 1
    assert len(cluster.nodes["pi-1"].prepared) == 1
    cluster.check_idle()


# --- leaving ------------------------------------------------------------------------------------


def test_a_worker_that_leaves_is_dismissed_and_costs_no_attempt() -> None:
    cluster = Cluster()
    cluster.deployed()
    asked = [cluster.submit(image(i)) for i in range(6)]
    cluster.pass_time(0.01)
    cluster.stop("pi-2")
    for i, request in enumerate(asked):
        assert cluster.check(request, image(i)).attempts == 1
    cluster.pass_time(0.5)
    stopped = cluster.nodes["pi-2"].stopped
    assert stopped is not None and stopped.failure is None
    assert {t.device for t in cluster.check(cluster.submit()).tasks} == {"pi-1"}


def parted(cluster: Cluster) -> list[tuple[str, str, bool]]:
    """What the log says of members that are gone: level, words, whether it is a fault."""
    notes = cluster.coordinator.notes
    words = [n for n in notes if n.text.startswith(("device left", "device lost"))]
    return [(n.level, n.text, "cause" in n.fields) for n in words]


def test_the_log_says_that_a_stopped_worker_left_and_that_a_killed_one_was_lost() -> None:
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.deployed()
    cluster.stop("pi-2")
    cluster.pass_time(2.0)
    assert parted(cluster) == [("info", "device left", False)]
    cluster.kill("pi-3")
    cluster.pass_time(2.0)
    assert parted(cluster)[1:] == [("warning", "device lost", True)]
    assert [info.device for info in cluster.core.members.health.gone(cluster.now)] == ["pi-3"]


def test_a_worker_stopped_twice_leaves_work_behind_which_is_a_fault_but_no_death() -> None:
    """1. a request is at pi-2, which 2. is told to stop, and at once: 3. others answer it."""
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.deployed()

    def stop() -> None:
        cluster.stop("pi-2")
        cluster.stop("pi-2")

    cluster.when(kind(m.Deliver, by="pi-2"), stop)
    asked = [cluster.submit(image(i)) for i in range(4)]
    for i, request in enumerate(asked):
        cluster.check(request, image(i))
    assert parted(cluster) == [("warning", "device left with work in hand", True)]
    assert cluster.core.members.health.gone(cluster.now) == []


def test_the_last_worker_finishes_and_goes() -> None:
    """1. its requests are answered; 2. it is dismissed; 3. what comes later is told so."""
    cluster = Cluster(("pi-1",))
    cluster.deployed()
    request = cluster.submit()
    cluster.pass_time(0.01)
    cluster.stop("pi-1")
    late = cluster.submit()
    cluster.check(request)
    cluster.pass_time(0.1)
    assert cluster.nodes["pi-1"].stopped is not None
    assert cluster.failure(late).error == "ClusterUnavailable"


def test_a_coordinator_that_stops_answers_what_runs_first() -> None:
    cluster = Cluster()
    cluster.deployed()
    request = cluster.submit()
    cluster.pass_time(0.005)
    cluster._handle(cluster.coordinator, e.StopRequested())
    cluster.check(request)
    assert cluster.coordinator.stopped is not None


def test_a_closed_client_leaves_nothing_behind() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.connect("bob")
    cluster.pass_time(0.5)
    request = cluster.submit(client="bob")
    cluster.stop("bob")
    assert cluster.nodes["bob"].resolved[request]
    cluster.check_idle()


def test_a_client_that_dies_is_given_up_in_time() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.connect("bob")
    cluster.pass_time(0.5)
    cluster.drop(kind(m.Start))
    cluster.submit(client="bob", deadline_s=200.0)
    cluster.pass_time(0.1)
    cluster.kill("bob")
    cluster.pass_time(limits.COORDINATOR_SILENT_S + 1.0)
    cluster.check_idle()


def test_two_requests_of_one_id_get_one_answer_each_or_an_error() -> None:
    """1. answered; 2. the same id and body: the same reply; 3. another body: InvalidInput."""
    cluster = Cluster()
    cluster.deployed()
    first = cluster.check(cluster.submit(request="one"))
    again = m.Submit(
        request="one",
        model="net",
        version=None,
        inputs=(m.Tensor(name="x", dtype="<f4", shape=(1, 3, 12, 10)),),
        picture=False,
        deadline_s=1.0,
        turn=2,
        body=digest_of(image()),
    )
    replies: list[m.Reply] = []
    original = cluster._send

    def note(sender, send):  # type: ignore[no-untyped-def]
        if isinstance(send.message, m.Reply):
            replies.append(send.message)
        original(sender, send)

    cluster._send = note  # type: ignore[method-assign]
    cluster.inject(cluster.coordinator, "ann#1", again)
    assert replies == [first]
    other = m.Submit(
        request="one", model="net", version=1, inputs=(), picture=False, deadline_s=1.0
    )
    cluster.inject(cluster.coordinator, "ann#1", other)
    assert replies[-1].failure is not None and replies[-1].failure.error == "InvalidInput"
    cluster.check_idle()
