"""The worker's core, event by event: joining, what it may be told by whom, and what it drops."""

from __future__ import annotations

import numpy as np
import pytest
from cores import Cluster, image, kind

from meshinfer import limits
from meshinfer.geometry import Box
from meshinfer.plan import Shard
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import describe, payload_of
from meshinfer.scheduler import events as e
from meshinfer.scheduler.worker import COORDINATOR, SOURCE, WorkerCore


def alone(*, head: bool = False) -> WorkerCore:
    """A device; or the coordinator's own, to which alone clients give inputs."""
    peer = m.Peer(device="pi", incarnation="1", host="h", port=1, key="k" * 40)
    return WorkerCore(
        m.Hello(
            role="worker", device="pi", incarnation="1", cluster="c", protocol=(1, 1), bulk=peer,
            facts=m.Facts(head=head),
        )
    )  # fmt: skip


def told(core: WorkerCore, message: m.AnyMessage, now: float) -> list[e.Effect]:
    return core.handle(e.Arrived(COORDINATOR, message), now)


def welcome(incarnation: str = "1") -> m.Welcome:
    bulk = m.Peer(device=COORDINATOR, incarnation=incarnation, host="h", port=1, key="k" * 40)
    return m.Welcome(coordinator=incarnation, protocol=1, bulk=bulk)


def messages(effects: list[e.Effect]) -> list[str]:
    return [type(x.message).__name__ for x in effects if isinstance(x, e.Send)]


def test_it_says_hello_until_it_is_welcome_then_beats() -> None:
    core = alone()
    assert messages(core.handle(e.Ticked(), 0.0)) == ["Hello"]
    assert core.next_deadline() == limits.HELLO_RETRY_S
    assert messages(core.handle(e.Ticked(), 1.0)) == ["Hello"]
    told(core, welcome(), 1.5)
    assert messages(core.handle(e.Ticked(), 1.5)) == ["Heartbeat"]
    assert core.next_deadline() == 1.5 + limits.HEARTBEAT_S


def test_many_questions_who_it_is_get_one_hello() -> None:
    core = alone()
    told(core, welcome(), 0.0)
    for _ in range(3):
        told(core, m.Who(), 1.0)
        said = messages(core.handle(e.Ticked(), 1.0))
        assert said == (["Hello"] if _ == 0 else [])


@pytest.mark.parametrize(
    "message",
    [
        m.Install(deployment=1, programs=(), peers=()),
        m.Start(request="r", attempt=1, deployment=1, client="c"),
        m.Release(request="r"),
        m.Forget(deployment=1),
        m.Dismiss(),
        m.Closing(),
        m.Who(),
        m.Refused(failure=m.Failure(error="AuthError", message="no")),
        welcome("2"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_only_the_coordinator_may_say_this(message: m.AnyMessage) -> None:
    core = alone()
    told(core, welcome(), 0.0)
    (note,) = core.handle(e.Arrived("mallory#1", message), 1.0)
    assert isinstance(note, e.Note) and core.joined


def test_a_refused_key_stops_it_only_before_it_ever_joined() -> None:
    lost = e.PeerLost(COORDINATOR, "refused", refused=True)
    (stop,) = alone().handle(lost, 0.0)
    assert isinstance(stop, e.Stop) and stop.failure and stop.failure.error == "AuthError"
    core = alone()
    told(core, welcome(), 0.0)
    effects = core.handle(lost, 1.0)
    assert not any(isinstance(x, e.Stop) for x in effects) and core.next_deadline() == 1.0


def test_a_revoked_key_stops_it_also_when_it_has_joined() -> None:
    core = alone()
    told(core, welcome(), 0.0)
    lost = e.PeerLost(COORDINATOR, "refused", refused=True, unadmitted=True)
    (stop,) = core.handle(lost, 1.0)
    assert isinstance(stop, e.Stop) and stop.failure and stop.failure.error == "AuthError"
    assert "revoked" in stop.failure.message and "token" in stop.failure.hint


def test_a_coordinator_that_stays_away_is_looked_for_by_a_new_worker_process() -> None:
    core = alone()
    told(core, welcome(), 0.0)
    core.handle(e.PeerLost(COORDINATOR, "cut"), 1.0)
    effects = core.handle(e.Ticked(), 1.0 + limits.COORDINATOR_SILENT_S)
    assert not any(isinstance(x, e.Stop) for x in effects)
    (stop,) = core.handle(e.Ticked(), 1.1 + limits.COORDINATOR_SILENT_S)
    assert isinstance(stop, e.Stop) and stop.failure
    assert stop.failure.error == "ClusterUnavailable"  # exit 69: the supervisor starts it again


def test_a_second_signal_stops_at_once_and_so_does_the_end_of_patience() -> None:
    core = alone()
    told(core, welcome(), 0.0)
    assert messages(core.handle(e.StopRequested(), 1.0)) == ["Goodbye"]
    told(core, welcome(), 2.0)  # joined again meanwhile: it says so again
    assert core.handle(e.Ticked(), 1.0 + limits.DRAIN_S) == [e.Stop()]
    assert core.handle(e.StopRequested(), 3.0) == [e.Stop()]
    assert alone().handle(e.StopRequested(), 0.0) == [e.Stop()]


def test_another_coordinator_finds_nothing_installed() -> None:
    core = alone()
    told(core, welcome("1"), 0.0)
    told(core, m.Install(deployment=5, programs=(), peers=()), 0.0)
    effects = told(core, welcome("2"), 1.0)
    assert e.Discard(5) in effects and e.Disconnect(f"{COORDINATOR}#1") in effects
    assert core.handle(e.Prepared(5), 1.0) == [e.Discard(5)]


def feed(core: WorkerCore, turn: int, peer: str = "ann#1") -> list[e.Effect]:
    """What comes of it, with its acknowledgement, which waits for others."""
    array = np.zeros((2,), np.float32)
    message = m.Feed(id=1, request="r", tensor=describe("x", array), turn=turn)
    effects = core.handle(e.Arrived(peer, message, payload_of(array)), 1.0)
    return effects + core._computing.acks.flush()


def test_inputs_that_come_after_the_release_are_dropped_but_not_those_of_a_new_turn() -> None:
    core = alone(head=True)
    told(core, welcome(), 0.0)
    told(core, m.Release(request="r", attempt=3, client="ann#1", turn=1), 0.5)
    assert messages(feed(core, 1)) == ["Ack"] and core.idle
    assert messages(feed(core, 2)) == ["Ack"] and not core.idle
    told(core, m.Release(request="r", attempt=3, client="ann#1", turn=1), 1.5)
    assert not core.idle
    told(core, m.Release(request="r", attempt=3, client="ann#1", turn=2), 1.5)
    assert core.idle
    feed(core, 1, "bob#1")
    assert not core.idle


def test_another_coordinator_s_releases_do_not_swallow_the_same_id() -> None:
    """1. released; 2. the same coordinator welcomes it: still so; 3. another one: a new request."""
    core = alone(head=True)
    told(core, welcome("1"), 0.0)
    told(core, m.Release(request="r", attempt=3, client="ann#1", turn=1), 0.5)
    told(core, welcome("1"), 0.6)
    assert messages(feed(core, 1)) == ["Ack"] and core.idle
    told(core, welcome("2"), 1.0)
    assert messages(feed(core, 1)) == ["Ack"] and not core.idle


def test_only_the_last_releases_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STALE_REQUESTS_KEPT", 2)
    core = alone(head=True)
    told(core, welcome(), 0.0)
    for name in ("r", "second"):
        told(core, m.Release(request=name, attempt=3, client="ann#1", turn=1), 0.5)
    feed(core, 1)
    assert core.idle
    told(core, m.Release(request="third", attempt=3, client="ann#1", turn=1), 0.6)
    feed(core, 1)
    assert not core.idle


def test_inputs_that_nobody_starts_are_dropped_in_the_end() -> None:
    core = alone(head=True)
    told(core, welcome(), 0.0)
    feed(core, 1)
    core.handle(e.Ticked(), limits.ORPHAN_INPUT_S + 2.0)
    assert core.idle


def test_only_the_head_takes_inputs() -> None:
    core = alone()
    told(core, welcome(), 0.0)
    assert [type(x) for x in feed(core, 1)] == [e.Note] and core.idle


def test_a_piece_for_an_unknown_deployment_is_acknowledged_and_dropped() -> None:
    cluster = Cluster()
    cluster.deployed()
    seen: list[m.AnyMessage] = []
    cluster.when(lambda s, r, x: isinstance(x, m.Deliver) and (seen.append(x) or True), list)
    cluster.check(cluster.submit())
    core = alone()
    assert core.handle(e.Arrived("head#1", seen[0], memoryview(b"")), 1.0) == []
    assert messages(core._computing.acks.flush()) == ["Ack"] and core.idle


def test_a_piece_of_an_older_attempt_is_acknowledged_but_never_used() -> None:
    """1. attempt 2 starts; 2. the only input of attempt 1 comes late; 3. then that of attempt 2."""
    core = alone()
    array = np.zeros((2,), np.float32)
    shard = Shard("x", Box.whole(array.shape))
    value = m.Value(name="x", box=shard, pieces=(m.Piece(shard=shard, producer=SOURCE, slot=0),))
    program = m.Program(place=(0, 0), model="a" * 64, inputs=(value,))
    told(core, welcome(), 0.0)
    makers = ((SOURCE, ("head",)),)
    told(core, m.Install(deployment=5, programs=(program,), peers=(), makers=makers), 0.0)
    told(core, m.Start(request="r", attempt=2, deployment=5, client="ann#1"), 0.5)
    made: list[list[int]] = []
    for attempt in (1, 2):
        piece = m.Deliver(
            id=attempt,
            request="r",
            attempt=attempt,
            deployment=5,
            consumer=(0, 0),
            slot=0,
            tensor=describe("x", array),
        )
        effects = core.handle(e.Arrived("head#1", piece, payload_of(array)), 1.0)
        assert messages(core._computing.acks.flush()) == ["Ack"]
        made.append([x.attempt for x in effects if isinstance(x, e.Compute)])
    assert made == [[], [2]]


def test_a_device_works_on_one_task_at_a_time() -> None:
    cluster = Cluster(("pi-1",))
    cluster.deployed()
    running: list[int] = []
    original = cluster._perform

    def perform(node, effect):  # type: ignore[no-untyped-def]
        if isinstance(effect, e.Compute):
            pending = [x for _, _, n, x in cluster._events if isinstance(x, e.Computed)]
            running.append(len(pending))
        original(node, effect)

    cluster._perform = perform  # type: ignore[method-assign]
    asked = [cluster.submit(image(i)) for i in range(4)]
    for i, request in enumerate(asked):
        cluster.check(request, image(i))
    assert set(running) == {0}


def test_a_task_of_a_retired_deployment_that_was_computing_is_wasted_and_harmless() -> None:
    """1. pi-1 computes; 2. pi-2 dies: the deployment is forgotten; 3. pi-1 is done with it."""
    cluster = Cluster()
    cluster.deployed()
    cluster.when(kind(m.Deliver, by="pi-2"), lambda: cluster.kill("pi-2"))
    assert cluster.check(cluster.submit()).attempts == 2
    cluster.check_idle()


def test_the_heartbeat_tells_what_is_computed_and_since_when() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.submit()
    core = cluster.nodes["pi-1"].core
    assert isinstance(core, WorkerCore)
    cluster.settle(lambda: core._computing.running is not None)
    beat = core._heartbeat(cluster.now + 2.0)
    assert "(0, 0)" in beat.computing and beat.since_s == pytest.approx(2.0, abs=0.01)


def test_pieces_of_one_peer_are_acknowledged_together_after_a_moment() -> None:
    """1. three inputs of ann, one of bob; 2. nothing is said; 3. soon there is one Ack for each."""
    core = alone(head=True)
    told(core, welcome(), 0.0)
    core.handle(e.Ticked(), 1.0)
    array = np.zeros((2,), np.float32)
    for number, peer in ((1, "ann#1"), (2, "ann#1"), (7, "bob#1"), (3, "ann#1")):
        piece = m.Feed(id=number, request=f"{peer} {number}", tensor=describe("x", array))
        effects = core.handle(e.Arrived(peer, piece, payload_of(array)), 1.0)
        assert messages(effects) == []
    said = []
    while (now := core.next_deadline()) <= 1.0 + limits.ACK_DELAY_S:
        said += [(now, x) for x in core.handle(e.Ticked(), now) if messages([x]) != ["Heartbeat"]]
    due = 1.0 + limits.ACK_DELAY_S
    assert said == [
        (due, e.Send(e.Plane.BULK, "ann#1", m.Ack(ids=(1, 2, 3)))),
        (due, e.Send(e.Plane.BULK, "bob#1", m.Ack(ids=(7,)))),
    ]


def test_much_data_is_acknowledged_at_once_and_a_device_that_ends_owes_nobody() -> None:
    core = alone(head=True)
    told(core, welcome(), 0.0)
    core.handle(e.Ticked(), 1.0)
    large, small = (np.zeros((n,), np.uint8) for n in (limits.ACK_BYTES, 1))
    for number, array in ((1, large), (2, small)):
        piece = m.Feed(id=number, request="r", tensor=describe(f"x{number}", array))
        core.handle(e.Arrived("ann#1", piece, payload_of(array)), 1.0)
        assert core.next_deadline() == 1.0
    assert core.handle(e.Ticked(), 1.0) == [e.Send(e.Plane.BULK, "ann#1", m.Ack(ids=(1, 2)))]
    core.handle(e.Arrived("ann#1", piece, payload_of(array)), 1.0)
    assert messages(told(core, m.Dismiss(), 1.0)) == ["Ack"]


def test_a_device_tells_of_its_tasks_once_for_a_request() -> None:
    cluster = Cluster()
    cluster.deployed()
    before = cluster.sent["TasksDone"]
    reply = cluster.check(cluster.submit())
    assert len(reply.tasks) == 6 and cluster.sent["TasksDone"] - before == 2


def test_a_stream_of_requests_needs_far_fewer_acknowledgements_than_pieces() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.pass_time(1.0)
    before = cluster.sent.copy()
    for i in range(10):
        cluster.check(cluster.submit(image(i)), image(i))
    cluster.pass_time(1.0)
    sent = cluster.sent - before
    pieces = sent["Deliver"] + sent["Feed"] + sent["Answer"]
    assert pieces > 100 and sent["Ack"] < pieces / 2


def test_inputs_are_of_who_asked() -> None:
    """Once it has begun, nobody else's count: they would be what its next attempt computes."""
    core = alone(head=True)
    told(core, welcome(), 0.0)
    program = m.Program(place=SOURCE)
    told(core, m.Install(deployment=5, programs=(program,), peers=()), 0.0)
    feed(core, 1, "ann#1")
    told(core, m.Start(request="r", attempt=1, deployment=5, client="ann#1"), 0.5)
    assert [type(x) for x in feed(core, 2, "mallory#1")] == [e.Note], "and not acknowledged"
    assert messages(feed(core, 2, "ann#2")) == ["Ack"]  # the same user's next process


def installed(core: WorkerCore, number: int, spares: int, now: float) -> list[e.Effect]:
    """Its own task is installed, then those that it may take over."""
    own, *others = (m.Program(place=(0, i), model=f"{number}{i}") for i in range(1 + spares))
    last: list[e.Effect] = []
    for programs in ((own,), tuple(others)):
        told(core, m.Install(deployment=number, programs=programs, peers=()), now)
        last = core.handle(e.BlobsFound(str(number), ()), now)
        if programs[0] is own:
            assert places(last) == [(0, 0)]
            assert messages(core.handle(e.Prepared(number), now)) == ["Installed"]
    return last


def places(effects: list[e.Effect]) -> list[m.Place]:
    return [p.place for x in effects if isinstance(x, e.Prepare) for p in x.programs]


def test_spare_tasks_are_prepared_one_by_one_and_requests_have_the_processor_in_between() -> None:
    core = alone()
    told(core, welcome(), 0.0)
    assert places(installed(core, 5, 3, 1.0)) == [(0, 1)]
    assert places(core.handle(e.Prepared(5), 1.5)) == [(0, 2)]  # nothing else to do
    told(core, m.Start(request="r", attempt=1, deployment=5, client="c"), 1.6)
    assert not core.idle
    assert core.handle(e.Prepared(5), 2.0) == []
    due = 2.0 + limits.SPARE_PAUSE_TIMES * 0.5 + limits.SPARE_TURN_S
    for now in (2.1, due - 0.1):
        assert places(core.handle(e.Ticked(), now)) == []
        core._beat_due = 99.0
        assert core.next_deadline() <= due
    assert places(core.handle(e.Ticked(), due)) == [(0, 3)]
    assert messages(core.handle(e.Prepared(5), due + 0.1)) == ["Installed"]


def test_a_device_on_which_nothing_runs_any_more_waits_for_no_request_to_begin() -> None:
    core = alone()
    told(core, welcome(), 0.0)
    installed(core, 5, 2, 1.0)
    told(core, m.Start(request="r", attempt=1, deployment=5, client="c"), 1.1)
    assert core.handle(e.Prepared(5), 2.0) == []
    told(core, m.Release(request="r", attempt=1), 2.1)
    core.handle(e.Computed("r", 1, (0, 0), (), 0.1), 2.2)
    assert core._computing.idle
    due = 2.0 + limits.SPARE_PAUSE_TIMES * 1.0
    core._beat_due = 99.0
    assert places(core.handle(e.Ticked(), due - 0.1)) == [] and core.next_deadline() == due
    core._beat_due = 99.0
    assert places(core.handle(e.Ticked(), due)) == [(0, 2)]


def test_spare_tasks_are_prepared_as_one_of_the_attempts_begins_that_all_devices_wait_for() -> None:
    """What they do in turn, each would make the others wait for."""

    def begin(core: WorkerCore, attempt: int, now: float) -> list[m.Place]:
        start = m.Start(request=f"r{attempt}", attempt=attempt, deployment=5, client="c")
        return places(told(core, start, now))

    for took_s in (0.3, 0.7):  # one device is slower than the other
        core = alone()
        told(core, welcome(), 0.0)
        assert places(installed(core, 5, 5, 1.0)) == [(0, 1)]
        assert begin(core, 1, 1.1) == []  # one at a time
        ended, spare = 1.0, 1
        while places(core.handle(e.Prepared(5), ended + took_s)):  # in a row, while that is short
            ended, spare = ended + took_s, spare + 1
        assert spare == (2 if took_s < limits.SPARE_SLOT_S else 1)
        attempts = range(2, 50)
        times = [ended + took_s + 0.2 * attempt for attempt in attempts]
        found = [n for n, at in zip(attempts, times, strict=True) if begin(core, n, at)]
        assert found == found[:1] and found[0] % limits.SPARE_EVERY == 0
        assert 0.2 * found[0] >= limits.SPARE_PAUSE_TIMES * spare * took_s
        assert 0.2 * (found[0] - limits.SPARE_EVERY) < limits.SPARE_PAUSE_TIMES * spare * took_s


def test_what_a_device_needs_itself_does_not_wait_for_spare_tasks() -> None:
    core = alone()
    told(core, welcome(), 0.0)
    assert places(installed(core, 5, 3, 1.0)) == [(0, 1)]
    assert places(installed(core, 6, 2, 1.0)) == []  # but for its own: after the one under way
    assert places(core.handle(e.Prepared(5), 1.5)) == [(0, 2)]
    told(core, m.Forget(deployment=5), 1.6)
    effects = core.handle(e.Prepared(5), 1.7)
    assert e.Discard(5) in effects and places(effects) == [(0, 1)]
    assert places(core.handle(e.Prepared(6), 1.8)) == [(0, 2)]
    assert messages(core.handle(e.Prepared(6), 1.9)) == ["Installed"]


def test_spare_tasks_wait_for_their_weights_and_end_with_the_first_that_fails() -> None:
    core = alone()
    told(core, welcome(), 0.0)
    assert places(installed(core, 5, 3, 1.0)) == [(0, 1)]
    own, other = (m.Program(place=(0, i), model=f"6{i}") for i in range(2))
    told(core, m.Install(deployment=6, programs=(own,), peers=()), 1.0)
    assert places(core.handle(e.BlobsFound("6", ()), 1.0)) == [(0, 0)]
    core.handle(e.Prepared(6), 1.0)
    told(core, m.Install(deployment=6, programs=(other,), peers=()), 1.0)
    failure = m.Failure(error="ConfigurationError", message="disk full")
    effects = core.handle(e.Prepared(5, failure), 1.5)
    assert messages(effects) == ["Installed"] and places(effects) == []
    core.handle(e.BlobsFound("6", ("61",)), 1.6)
    assert places(core.handle(e.Ticked(), 1.7)) == []
    assert places(core.handle(e.BlobWritten("61"), 1.8)) == [(0, 1)]


def standing_by() -> WorkerCore:
    """A device without a task of its own, which is told of two that it may take over."""
    core = alone()
    told(core, welcome(), 0.0)
    others = tuple(
        m.Program(place=(i, 0), model=f"5{i}", devices=("a", "pi"), spare=True) for i in range(2)
    )
    told(core, m.Install(deployment=5, programs=others, peers=()), 1.0)
    return core


def test_a_device_that_only_stands_by_prepares_one_by_one_too() -> None:
    core = standing_by()
    assert places(core.handle(e.BlobsFound("5", ()), 1.0)) == [(0, 0)]
    assert places(core.handle(e.Prepared(5), 1.1)) == [(1, 0)]
    assert messages(core.handle(e.Prepared(5), 1.2)) == ["Installed"]


def test_spare_tasks_of_which_a_blob_does_not_come_are_not_prepared_later() -> None:
    core = standing_by()
    core.handle(e.BlobsFound("5", ("51",)), 1.0)
    failure = m.Failure(error="MeshInferError", message="disk full")
    assert messages(core.handle(e.BlobWritten("51", failure), 1.1)) == ["Installed"]
    assert places(core.handle(e.BlobWritten("51"), 1.2)) == []
    assert places(core.handle(e.Ticked(), 9.0)) == []
