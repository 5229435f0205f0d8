"""The coordinator's core, event by event: who is admitted, who is gone, when it wants to tick."""

from __future__ import annotations

import pytest
from cores import Cluster, image, kind
from msgspec import structs

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.records import BESIDE_COORDINATOR, TaskTime
from meshinfer.scheduler import events as e
from meshinfer.scheduler.coordinator import CoordinatorCore
from meshinfer.scheduler.journal import Journal
from meshinfer.scheduler.request import Answered


def sends(effects: list[e.Effect], kind_: type) -> list[e.Send]:
    return [x for x in effects if isinstance(x, e.Send) and isinstance(x.message, kind_)]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"protocol": (7, 9)}, "ProtocolMismatch", ["7 to 9", "5 to 6", "version 0"]),
        ({"cluster": "away"}, "ConfigurationError", ["'away'", "'home'"]),
        ({"role": "boss"}, "InvalidInput", ["'boss'"]),
        ({"bulk": None}, "InvalidInput", []),
        ({"bulk": m.Peer(device="x", incarnation="1", host="h", port=1, key="k" * 40)},
         "InvalidInput", []),
    ],
)  # fmt: skip
def test_a_stranger_is_refused_with_a_text_for_both_sides(
    changes: dict[str, object], error: str, words: list[str]
) -> None:
    cluster = Cluster()
    node = cluster.join("pi-9", **changes)
    cluster.settle(lambda: node.stopped is not None)
    failure = node.stopped.failure  # type: ignore[union-attr]
    assert failure is not None and failure.error == error
    assert all(word in failure.message for word in words)
    assert any(n.text == failure.message for n in cluster.coordinator.notes)
    assert "pi-9" not in cluster.core.members.devices


def test_a_client_that_is_refused_stops_with_the_reason() -> None:
    cluster = Cluster()
    node = cluster.connect("eve", cluster="away")
    cluster.settle(lambda: node.stopped is not None)
    assert node.stopped.failure.error == "ConfigurationError"  # type: ignore[union-attr]


def test_a_name_that_is_alive_on_another_host_is_taken() -> None:
    cluster = Cluster()
    first = cluster.nodes["pi-1"]
    second = cluster.join("pi-1", m.Facts(flops_per_s=1e9, host="other"))
    cluster.settle(lambda: second.stopped is not None)
    assert "alive on" in second.stopped.failure.message  # type: ignore[union-attr]
    assert cluster.core.members.devices["pi-1"].peer == first.id


def test_two_workers_of_one_name_on_one_host_do_not_chase_each_other_away() -> None:
    """1. pi-1 lives; 2. another pi-1 says hello; 3. the first beats on: the second is refused."""
    cluster = Cluster()
    first = cluster.nodes["pi-1"]
    second = cluster.join("pi-1")
    cluster.nodes["pi-1, the first"] = first
    cluster.settle(lambda: second.stopped is not None, within=4.0)
    assert cluster.core.members.devices["pi-1"].peer == first.id


def test_a_worker_that_starts_again_unnoticed_is_admitted_soon() -> None:
    """1. pi-1 dies without a reset; 2. it starts again at once; 3. the old one beats no more."""
    cluster = Cluster()
    cluster.kill("pi-1", silent=True)
    again = cluster.join("pi-1")
    cluster.settle(lambda: again.core.joined, within=2.2)  # type: ignore[union-attr]
    assert cluster.core.members.devices["pi-1"].peer == again.id


def test_a_silent_worker_is_dead_after_two_seconds() -> None:
    cluster = Cluster()
    cluster.kill("pi-1", silent=True)
    start = cluster.now
    cluster.settle(lambda: "pi-1" not in cluster.core.members.devices)
    assert cluster.now - start <= limits.DEAD_AFTER_S + 0.1


def test_a_death_is_noticed_even_when_another_event_comes_just_before_the_tick() -> None:
    """1. its time is over; 2. before the tick something else arrives; 3. it is dead."""
    cluster = Cluster()
    cluster.kill("pi-1", silent=True)
    core, heard = cluster.core, cluster.now
    for after in (0.5, 1.0, 1.5, limits.DEAD_AFTER_S + 0.1):
        assert "pi-1" in core.members.devices
        core.handle(e.PeerLost("nobody", "?"), heard + after)
    assert "pi-1" not in core.members.devices


def test_hello_said_twice_resets_nothing_until_something_was_installed() -> None:
    cluster = Cluster()
    hello = cluster.nodes["pi-1"].core.hello  # type: ignore[union-attr]
    device = cluster.core.members.devices["pi-1"]
    cluster.inject(cluster.coordinator, "pi-1#1", hello)
    assert cluster.core.members.devices["pi-1"] is device
    cluster.deployed()
    cluster.inject(cluster.coordinator, "pi-1#1", hello)
    assert cluster.core.members.devices["pi-1"] is not device
    cluster.check(cluster.submit())


def test_whoever_is_unknown_is_asked_who_it_is() -> None:
    core = CoordinatorCore("home", "0", Cluster(()).core._bulk, None)
    for message in (m.Heartbeat(), m.ListModels(call="c"), m.Merged(request="r", attempt=1)):
        (send,) = sends(core.handle(e.Arrived("x#1", message), 1.0), m.Who)
        assert send.peer == "x#1"
    assert core.handle(e.Arrived("x#1", m.Probe()), 1.0) == []


def test_a_cut_bulk_connection_is_no_death_and_an_unnamed_reset_is_looked_into() -> None:
    cluster = Cluster()
    core = cluster.core
    core.handle(e.PeerLost("pi-1#1", "cut", plane=e.Plane.BULK), cluster.now)
    assert "pi-1" in core.members.devices
    probes = sends(core.handle(e.PeerLost("", "reset"), cluster.now), m.Probe)
    assert [p.peer for p in probes] == ["ann#1", "head#1", "pi-1#1", "pi-2#1"]


def test_news_of_a_stale_attempt_changes_nothing() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.delay(kind(m.Deliver), 5.0)
    request = cluster.submit()
    cluster.pass_time(0.1)
    before = cluster.core.requests[request].attempt
    for message in (
        m.TaskFailed(request=request, attempt=before + 7, place=(0, 0), text="no"),
        m.Merged(request=request, attempt=before + 7),
        m.TaskFailed(request="other", attempt=1, place=(0, 0), text="no"),
        m.Unreachable(request=request, attempt=before - 1, peer="pi-2#1"),
    ):
        cluster.inject(cluster.coordinator, "pi-1#1", message)
    assert cluster.core.requests[request].attempt == before
    cluster.check(request)


def test_only_who_has_a_part_in_an_attempt_may_say_that_it_fails() -> None:
    """1. a piece is slow; 2. a client on a device's host, and one that is nobody's, say so."""
    cluster = Cluster()
    cluster.deployed()
    hello = client_hello("eve", where=BESIDE_COORDINATOR)
    cluster.core.handle(e.Arrived("eve#1", hello, ends=("h", "h")), cluster.now)
    assert cluster.core._heads.stands("eve#1")
    cluster.delay(kind(m.Deliver), 5.0)
    request = cluster.submit()
    cluster.pass_time(0.1)
    attempt = cluster.core.requests[request].attempt
    for message in (
        m.TaskFailed(request=request, attempt=attempt, place=(0, 0), text="no"),
        m.NotKept(request=request, attempt=attempt),
        m.Unreachable(request=request, attempt=attempt, peer="pi-2#1"),
    ):
        for peer in ("eve#1", "mallory#1"):
            cluster.inject(cluster.coordinator, peer, message)
        assert cluster.core.requests[request].deployment is not None, message
    assert cluster.check(request).attempts == 1


def client_hello(name: str, where: str) -> m.Hello:
    return m.Hello(
        role="client", device=name, incarnation="1", cluster="home", protocol=m.PROTOCOL,
        where=where,
    )  # fmt: skip


def test_only_the_head_may_say_that_an_answer_is_merged() -> None:
    """1. a piece is slow; 2. pi-1 says that it has merged; 3. the request is still computed."""
    cluster = Cluster()
    cluster.deployed()
    cluster.delay(kind(m.Deliver), 5.0)
    request = cluster.submit()
    cluster.pass_time(0.1)
    attempt = cluster.core.requests[request].attempt
    cluster.inject(cluster.coordinator, "pi-1#1", m.Merged(request=request, attempt=attempt))
    cluster.pass_time(2 * limits.TIMING_GRACE_S)
    assert request in cluster.core.requests
    assert cluster.check(request).attempts == 1


def test_a_request_whose_devices_are_lost_over_and_over_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. pi-1 dies in the first attempt, pi-2 in the second; 2. there is no third for pi-3."""
    monkeypatch.setattr(limits, "ATTEMPTS_PER_REQUEST", 2)
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.deployed()
    cluster.when(kind(m.Deliver, by="pi-1", attempt=1), lambda: cluster.kill("pi-1"))
    cluster.when(kind(m.Deliver, by="pi-2", attempt=2), lambda: cluster.kill("pi-2"))
    reply = cluster.reply(cluster.submit())
    assert reply.failure is not None and reply.failure.error == "WorkerLost"
    assert "2 times" in reply.failure.message and reply.attempts == 2
    assert cluster.check(cluster.submit()).attempts == 1
    cluster.check_idle()


def test_only_the_last_answered_ids_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. two are answered, one id is kept; 2. bob asks by the first id: it is computed anew."""
    monkeypatch.setattr(limits, "ANSWERED_IDS_KEPT", 1)
    cluster = Cluster(clients=("ann", "bob"))
    cluster.deployed()
    for request in ("first", "second"):
        cluster.check(cluster.submit(request=request))
    cluster.check(cluster.submit(request="first", client="bob"), client="bob")
    cluster.check_idle()


def test_of_older_answers_what_their_tasks_took_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two answers of two tasks each, of which three may be kept; both can be told again."""
    monkeypatch.setattr(limits, "TASK_TIMES_KEPT", 3)
    journal, told = Journal(None), []
    times = [TaskTime(place=(0, i), compute_s=0.1, sent_bytes=1, device="pi-1") for i in range(2)]
    for name in ("first", "second"):
        asked = m.Submit(
            request=name, model="net", version=3, inputs=(), picture=False, deadline_s=1.0
        )
        journal.accepted(asked)
        reply = m.Reply(request=name, version=3, tasks=tuple(times))
        journal.ended(Answered(reply, "head", "ann"), "", e.Note("info", "told", {}))
        told.append((asked, reply))
    again = [journal.outcome(asked, "ann", "head") for asked, _ in told]
    assert again == [structs.replace(told[0][1], tasks=()), told[1][1]]


def test_a_device_that_cannot_prepare_is_left_out_for_a_while() -> None:
    cluster = Cluster()
    original = cluster._prepare

    def prepare(node, effect):  # type: ignore[no-untyped-def]
        if node.name == "pi-2":
            failure = m.Failure(error="ConfigurationError", message="disk full")
            return e.Prepared(effect.deployment, failure)
        return original(node, effect)

    cluster._prepare = prepare  # type: ignore[method-assign]
    said = cluster.answer(cluster.deploy()).answer
    assert isinstance(said, m.Deployed) and said.report is not None
    assert said.report.notes[0] == "pi-2 is left out: disk full"
    assert {t.device for t in cluster.check(cluster.submit()).tasks} == {"pi-1"}
    cluster._prepare = original  # type: ignore[method-assign]
    cluster.pass_time(limits.EXCLUDED_S + 1.0)
    assert {t.device for t in cluster.check(cluster.submit()).tasks} == {"pi-1", "pi-2"}


def test_when_nobody_can_prepare_the_deploy_fails() -> None:
    cluster = Cluster()
    failure = m.Failure(error="ConfigurationError", message="disk full")
    cluster._prepare = lambda node, effect: e.Prepared(effect.deployment, failure)  # type: ignore
    answer = cluster.answer(cluster.deploy())
    assert answer.failure == failure


def test_a_model_that_no_device_prepares_is_not_tried_on_all_of_them_for_ever() -> None:
    """1. Ten devices refuse, one after another. 2. The first are no longer excluded by the time
    the last are asked. 3. The deploy fails after INSTALL_ATTEMPTS all the same."""
    cluster = Cluster()
    for number in range(3, 11):
        cluster.join(f"pi-{number}")
    failure = m.Failure(error="EngineError", message="incompatible dimensions")
    asked = []

    def prepare(node, effect):  # type: ignore[no-untyped-def]
        asked.append(effect.deployment)
        for device in cluster.core.members.devices.values():
            device.excluded_until = 0.0
        return e.Prepared(effect.deployment, failure)

    cluster._prepare = prepare  # type: ignore[method-assign]
    assert cluster.answer(cluster.deploy()).failure == failure
    assert len(set(asked)) <= limits.INSTALL_ATTEMPTS


def test_a_coordinator_that_stood_still_blames_nobody_for_what_it_has_not_read_yet() -> None:
    """1. its process stands still for 5 s; 2. it goes on, heartbeats unread; 3. silence is silence
    again."""
    cluster = Cluster()
    cluster.deployed()
    core, now = cluster.core, cluster.now + 5.0
    before = set(core.members.devices)
    core.handle(e.Ticked(), now)
    assert set(core.members.devices) == before
    for _ in range(5):
        due = core.next_deadline()
        assert due is not None and now < due <= now + limits.HEARTBEAT_S
        now = due
        core.handle(e.Ticked(), now)
    while now < cluster.now + 5.0 + limits.DEAD_AFTER_S + limits.HEARTBEAT_S:
        now += limits.HEARTBEAT_S
        core.handle(e.Ticked(), now)
    assert not core.members.devices


def test_an_install_that_never_ends_is_given_up() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.drop(kind(m.Installed, by="pi-3"))
    cluster.join("pi-3", protocol=(5, 5))  # which does not count what it says
    cluster.pass_time(limits.INSTALL_S + 5.0)
    assert cluster.core.members.devices["pi-3"].excluded_until > 0
    cluster.check(cluster.submit())


def test_numbers_of_deployments_are_another_coordinator_s_never() -> None:
    first, second = Cluster(()), Cluster(())
    second.restart_coordinator()
    assert first.core.catalogue.first_deployment != second.core.catalogue.first_deployment


def test_more_shapes_than_are_kept_are_all_answered() -> None:
    """A waiting request keeps its shape planned, however many others come."""
    from cores import conv_net

    cluster = Cluster()
    model = conv_net(None)
    cluster.deployed(model=model)
    sizes = [(8 + i, 9) for i in range(limits.SHAPES_PER_MODEL + 3)]
    asked = [cluster.submit(image(1, s)) for s in sizes]
    for size, request in zip(sizes, asked, strict=True):
        cluster.check(request, image(1, size), model)
    cluster.pass_time(0.5)
    assert len(cluster.core.catalogue.deployments) == limits.SHAPES_PER_MODEL
    cluster.check_idle()
