"""What members invent, on devices: attempts, heads, requests and samples that the coordinator never
told of. It waits aside within bounds, voids nothing that is there, and pushes out nobody else's."""

from __future__ import annotations

import numpy as np
import pytest
from cores import Cluster, image, kind
from msgspec import structs
from test_worker_core import alone, messages, told, welcome

from meshinfer import limits
from meshinfer.geometry import Box
from meshinfer.plan import Shard
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import describe, payload_of
from meshinfer.scheduler import events as e
from meshinfer.scheduler.aside import AheadKey, Aside
from meshinfer.scheduler.shares import Bounds, Shares
from meshinfer.scheduler.worker import SOURCE, WorkerCore

ARRAY = np.zeros((2,), np.float32)
WHOLE = Shard("x", Box.whole(ARRAY.shape))
EVIL = 1 << 40
"""An attempt that no coordinator has come to."""


def device(slots: int = 1) -> WorkerCore:
    """With a task that awaits pieces of the source (0), and of a task of pi-2 (1)."""
    places = (SOURCE, (0, 1))[:slots]
    values = tuple(
        m.Value(
            name=f"x{i}", box=WHOLE, dtype=ARRAY.dtype.str,
            pieces=(m.Piece(shard=WHOLE, producer=place, slot=i),),
        )
        for i, place in enumerate(places)
    )  # fmt: skip
    out = m.Output(name="y", shard=Shard("y", Box.whole(ARRAY.shape)))
    send = m.Send(piece=out.shard, device="head", consumer=(1, 0), slot=0)
    program = m.Program(
        place=(0, 0), model="a" * 64, inputs=values, outputs=(out,), sends=(send,)
    )  # fmt: skip
    head = m.Peer(device="head", incarnation="1", host="h", port=1, key="k" * 40)
    core = alone()
    told(core, welcome(), 0.0)
    makers = ((SOURCE, ("head",)), ((0, 1), ("pi-2",)))
    word = m.Install(
        deployment=5, programs=(program,), peers=(head,), head="head", makers=makers
    )  # fmt: skip
    told(core, word, 0.0)
    return core


def start(core: WorkerCore, attempt: int, head: str = "") -> list[e.Effect]:
    word = m.Start(request="r", attempt=attempt, deployment=5, client="ann#1", head=head)
    return told(core, word, 1.0)


def piece(
    core: WorkerCore,
    peer: str,
    attempt: int,
    *,
    slot: int = 0,
    number: int = 1,
    request: str = "r",
    array: np.ndarray = ARRAY,
    now: float = 1.0,
) -> list[e.Effect]:
    """What comes of it, with its acknowledgement, if there is one."""
    message = m.Deliver(
        id=number, request=request, attempt=attempt, deployment=5, consumer=(0, 0), slot=slot,
        tensor=describe("x", array),
    )  # fmt: skip
    effects = core.handle(e.Arrived(peer, message, payload_of(array)), now)
    return effects + core._computing.acks.flush()


def computes(effects: list[e.Effect]) -> list[int]:
    return [x.attempt for x in effects if isinstance(x, e.Compute)]


@pytest.mark.parametrize(
    ("peer", "head", "counts"),
    [
        ("head#1", "", True),
        ("head#1", "ann#1", True),
        ("ann#1", "ann#1", True),  # the source itself
        ("ann#1", "", False),
        ("mallory#1", "ann#1", False),
        ("pi-2#1", "", False),
    ],
)
def test_a_piece_is_of_whom_the_plan_has_make_it(peer: str, head: str, counts: bool) -> None:
    """And who stands in the head's place, the coordinator says: no piece has a word of that."""
    core = device()
    start(core, 1, head)
    effects = piece(core, peer, 1)
    assert messages(effects) == ["Ack"] and (computes(effects) == [1]) is counts


def test_a_piece_that_runs_ahead_of_its_start_is_used_then_and_acknowledged_then() -> None:
    core = device()
    assert piece(core, "ann#1", 3) == [] and not core.idle
    effects = start(core, 3, "ann#1")
    assert computes(effects) == [3]
    assert messages(core._computing.acks.flush()) == ["Ack"]


def test_an_attempt_that_a_device_invents_voids_nothing() -> None:
    """1. one of two pieces is here; 2. pi-2, which has a part, speaks of a huge attempt, and ann
    of an even larger one; 3. the other piece comes: it is computed, and so is the next attempt."""
    core = device(2)
    start(core, 1)
    piece(core, "head#1", 1)
    assert piece(core, "pi-2#1", EVIL, slot=1, number=7) == []
    assert piece(core, "ann#1", EVIL + 1, number=8) == []
    assert computes(piece(core, "pi-2#1", 1, slot=1, number=2)) == [1]
    start(core, 2)
    piece(core, "head#1", 2, number=3)
    core.handle(e.Computed("r", 1, (0, 0), (), 0.1), 1.0)
    assert computes(piece(core, "pi-2#1", 2, slot=1, number=4)) == [2]


def test_what_is_made_goes_to_the_head_that_the_coordinator_named() -> None:
    core = device()
    start(core, 1, "ann#1")
    piece(core, "ann#1", 1)
    effects = core.handle(e.Computed("r", 1, (0, 0), (ARRAY,), 0.1), 1.0)
    sent = [x.peer for x in effects if isinstance(x, e.Send) and isinstance(x.message, m.Deliver)]
    assert sent == ["ann#1"]


def test_pieces_of_requests_that_never_were_are_bounded_and_push_out_nobody_else_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "AHEAD_EACH", 4)
    monkeypatch.setattr(limits, "AHEAD", 8)
    core = device()
    piece(core, "head#1", 1)
    said = []
    for i in range(100):
        said += piece(core, f"client-red-fox-runs-{i}#1", EVIL, request=f"none {i}", number=i)
        for other in ("eve#1", "pi-2#1"):
            said += piece(core, other, EVIL, request=f"of {other} {i}", number=i)
        assert len(core._computing._aside) <= 8
    notes = [x for x in said if isinstance(x, e.Note)]
    assert messages(said) == [] and len(notes) == 9, "told of at 1, 2, 4, 8 .. that had to go"
    assert notes[-1].fields["in_all"] == 256
    assert computes(start(core, 1)) == [1], "the head's is still there"


def test_large_pieces_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    large = np.zeros((1000,), np.float32)
    monkeypatch.setattr(limits, "AHEAD_BYTES_EACH", 3 * large.nbytes)
    monkeypatch.setattr(limits, "AHEAD_BYTES", 5 * large.nbytes)
    core = device()
    for i in range(20):
        for peer in ("mallory#1", "eve#1", "bob#1"):
            piece(core, peer, EVIL, request=f"{peer} {i}", number=i, array=large)
        kept = core._computing._aside._kept.values()
        assert sum(len(k.payload) for each in kept for k in each.values()) <= 5 * large.nbytes


@pytest.mark.parametrize(
    "array", [np.zeros((1000,), np.float32), np.zeros((2,), np.float64)], ids=["shape", "type"]
)
def test_no_piece_of_another_kind_waits(array: np.ndarray) -> None:
    """Nor is it acknowledged: once its request has begun, it is told of."""
    core = device()
    effects = piece(core, "head#1", 1, array=array)
    assert not messages(effects) and not len(core._computing._aside)
    assert piece(core, "head#1", 1) == [] and len(core._computing._aside) == 1


def test_pieces_that_wait_for_too_long_go(monkeypatch: pytest.MonkeyPatch) -> None:
    core = device()
    piece(core, "mallory#1", EVIL)
    core.handle(e.Ticked(), 1.0 + limits.AHEAD_S)
    assert not core.idle
    core.handle(e.Ticked(), 1.1 + limits.AHEAD_S)
    assert core.idle and messages(core._computing.acks.flush()) == []


def test_a_release_drops_what_waits_of_its_request() -> None:
    core = device()
    piece(core, "mallory#1", 7)
    told(core, m.Release(request="r", attempt=7, client="ann#1"), 1.0)
    assert messages(core._computing.acks.flush()) == ["Ack"] and core.idle
    assert messages(piece(core, "mallory#1", 7)) == ["Ack"] and core.idle


@pytest.mark.parametrize("room", [0, 1000])
def test_honest_pieces_that_race_ahead_or_had_to_go_cost_no_attempt(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. pi-2 hears late that a request begins, when its pieces are there; 2. if there is no room,
    all of a sender but the last have had to go; 3. they are sent again."""
    monkeypatch.setattr(limits, "AHEAD_EACH", room)
    monkeypatch.setattr(limits, "AHEAD", room)
    cluster = Cluster()
    cluster.deployed()
    cluster.delay(kind(m.Start, to="pi-2"), 0.2)
    requests = [cluster.submit(image(i)) for i in range(4)]
    replies = [cluster.check(request, image(i)) for i, request in enumerate(requests)]
    assert [reply.attempts for reply in replies] == [1] * 4
    resent = max(reply.total_s for reply in replies) > limits.ACK_TIMEOUT_S
    assert resent is (room == 0)
    core = cluster.nodes["pi-2"].core
    assert isinstance(core, WorkerCore)
    assert (core._computing._aside._shares.gone > 0) is (room == 0)
    cluster.check_idle()


# --- inputs


def feed(core: WorkerCore, peer: str, request: str, nbytes: int) -> list[e.Effect]:
    array = np.zeros((nbytes,), np.uint8)
    message = m.Feed(id=1, request=request, tensor=describe("x", array), turn=1)
    return core.handle(e.Arrived(peer, message, payload_of(array)), 1.0)


def head(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> WorkerCore:
    """With room for so many bytes of one client's, and twice that."""
    monkeypatch.setattr(limits, "QUEUE_BYTES", nbytes)
    monkeypatch.setattr(limits, "CREDIT_BYTES", 0)
    core = alone(head=True)
    told(core, welcome(), 0.0)
    return core


def held(core: WorkerCore) -> dict[str, int]:
    found = core._computing._requests.items()
    return {name: sum(a.nbytes for a in each.fed.values()) for name, each in found}


def test_inputs_of_requests_that_never_were_push_out_their_own_sender_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = head(monkeypatch, 100_000)
    feed(core, "ann#1", "ann's", 60_000)
    for i in range(50):
        feed(core, f"client-red-fox-runs-{i}#1", f"none {i}", 40_000)  # one key's names
        assert sum(held(core).values()) <= 200_000
    assert held(core) == {"ann's": 60_000, "none 48": 40_000, "none 49": 40_000}
    notes = [x for x in feed(core, "client-red-fox-runs-0#2", "more", 99_000) if
             isinstance(x, e.Note)]  # fmt: skip
    assert notes == [] and "none 48" not in held(core), "told of now and then, and counted"


def test_many_small_inputs_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FED_REQUESTS", 10)
    core = head(monkeypatch, 1 << 20)
    feed(core, "ann#1", "ann's", 0)
    for i in range(50):
        for peer in ("eve#1", "mallory#1"):
            feed(core, peer, f"{peer} {i}", 0)
            assert len(held(core)) <= 20
    assert "ann's" in held(core)


def test_an_input_by_many_names_takes_room_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    core = head(monkeypatch, 100 * limits.NAME_CHARS)
    nothing = np.zeros((0,), np.uint8)
    for i in range(101):
        word = m.Feed(id=i, request="r", tensor=describe(f"x{i}", nothing), turn=1)
        core.handle(e.Arrived("mallory#1", word, payload_of(nothing)), 1.0)
    feed(core, "mallory#1", "next", 1)
    assert list(held(core)) == ["next"]


def test_inputs_that_had_to_go_are_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. requests wait for a plan; 2. so many members fill the head that ann has the most there;
    3. as hers begin, she is asked to give them again, and they are answered."""
    nbytes = image()["x"].nbytes + limits.NAME_CHARS
    monkeypatch.setattr(limits, "QUEUE_BYTES", 10 * nbytes)
    monkeypatch.setattr(limits, "CREDIT_BYTES", 10 * nbytes)
    cluster = Cluster()
    cluster.spares, cluster.plan_s = False, 1.0
    cluster.deployed()
    cluster.kill("pi-2")
    core = cluster.nodes["head"].core
    assert isinstance(core, WorkerCore)
    requests = [cluster.submit(image(i), deadline_s=30.0) for i in range(8)]
    cluster.settle(lambda: len(core._computing._requests) == 8)
    assert all(request.waiting for request in cluster.core.requests.values())
    body = np.zeros((nbytes - limits.NAME_CHARS,), np.uint8)
    for i in range(7):
        for peer in (f"eve-{k}#1" for k in range(8)):
            word = m.Feed(id=i, request=f"{peer} {i}", tensor=describe("x", body), turn=1)
            cluster.inject(cluster.nodes["head"], peer, word, bytes(body))
    left = set(requests) & set(core._computing._requests)
    assert len(core._computing._requests) == 40 and len(left) < 6
    for i, request in enumerate(requests):
        cluster.check(request, image(i))
    cluster.pass_time(limits.ORPHAN_INPUT_S + 1.0)
    cluster.check_idle()


def test_an_attempt_that_waits_for_inputs_that_had_to_go_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. one of two inputs is here, and it begins; 2. that one has to go."""
    core = head(monkeypatch, 10_000)
    outputs = tuple(m.Output(name=name, shard=WHOLE) for name in ("x", "y"))
    program = m.Program(place=SOURCE, outputs=outputs)
    told(core, m.Install(deployment=5, programs=(program,), peers=()), 0.0)
    feed(core, "ann#1", "r", 9_000)
    start(core, 1)
    said = [x for peer in ("eve#1", "bob#1") for x in feed(core, peer, f"of {peer}", 8_000)]
    assert [x.message for x in said if isinstance(x, e.Send)] == [m.NotKept(request="r", attempt=1)]
    assert "r" in held(core) and messages(start(core, 2)) == [], "it was told once"


def test_inputs_that_another_gave_before_it_began_are_not_what_it_computes() -> None:
    """1. mallory knows an id, and gives inputs last; 2. it begins, for ann: hers are asked for."""
    core = alone(head=True)
    told(core, welcome(), 0.0)
    out = m.Output(name="x", shard=WHOLE)
    program = m.Program(place=SOURCE, outputs=(out,))
    told(core, m.Install(deployment=5, programs=(program,), peers=()), 0.0)
    feed(core, "ann#1", "r", 8)
    feed(core, "mallory#1", "r", 8)
    assert messages(start(core, 1)) == ["NotKept"] and held(core) == {"r": 0}


def with_inputs(core: WorkerCore, *names: str) -> None:
    """A plan of which this is the source, and that reads so many inputs."""
    outputs = tuple(m.Output(name=name, shard=WHOLE) for name in names)
    program = m.Program(place=SOURCE, outputs=outputs)
    told(core, m.Install(deployment=5, programs=(program,), peers=()), 0.0)


def give(
    core: WorkerCore, peer: str, value: str, *, turn: int = 1, array: np.ndarray = ARRAY
) -> list[e.Effect]:
    word = m.Feed(id=1, request="r", tensor=describe(value, array), turn=turn)
    return core.handle(e.Arrived(peer, word, payload_of(array)), 1.0)


def crowd(core: WorkerCore) -> None:
    """So many members that whoever has one input has the most."""
    for i in range(7):
        feed(core, f"eve-{i}#1", f"none {i}", 0)
    assert "r" not in held(core)


@pytest.mark.parametrize("by", ["room", "another"])
def test_the_rest_of_inputs_that_had_to_go_in_part_does_not_hide_that(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. ann's first input goes, for room or since another gives some of that request; 2. her
    second comes; 3. it begins: she is asked for both, once; 4. it runs."""
    core = head(monkeypatch, 2000)
    with_inputs(core, "x", "y")
    give(core, "ann#1", "x")
    if by == "another":
        give(core, "mallory#1", "x")
    if by == "room":
        crowd(core)
    give(core, "ann#1", "y")
    assert messages(start(core, 1)) == ["NotKept"]
    give(core, "ann#1", "x", turn=2)
    give(core, "ann#1", "y", turn=2)
    assert core._computing._requests["r"].scattered
    assert messages(start(core, 2)) == [], "it was told once"


def test_inputs_given_anew_lack_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    core = head(monkeypatch, 2000)
    with_inputs(core, "x")
    give(core, "ann#1", "x")
    crowd(core)
    give(core, "ann#1", "x", turn=2)
    assert messages(start(core, 1)) == []


def test_one_restart_is_enough_where_inputs_had_to_go_and_another_gave_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = head(monkeypatch, 2000)
    with_inputs(core, "x")
    give(core, "ann#1", "x")
    give(core, "mallory#1", "x")
    assert [messages(start(core, i)) for i in (1, 2)] == [["NotKept"], []]


def test_marks_of_what_had_to_go_outlast_a_welcome_that_keeps_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = head(monkeypatch, 2000)
    give(core, "ann#1", "x")
    crowd(core)
    give(core, "ann#1", "y")
    told(core, welcome(), 0.0)
    with_inputs(core, "x", "y")
    assert messages(start(core, 1)) == ["NotKept"]


def test_a_huge_input_of_a_request_that_never_was_voids_nobody_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = head(monkeypatch, 10_000)
    feed(core, "ann#1", "ann's", 1000)
    said = feed(core, "mallory#1", "none", 50_000)
    assert held(core) == {"ann's": 1000} and any(isinstance(x, e.Note) for x in said)


def test_a_huge_input_that_the_coordinator_lets_be_open_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. it comes before its request begins, and goes; 2. it is asked for then; 3. it has room."""
    core, huge = head(monkeypatch, 2000), np.zeros((2000,), np.float32)
    shard = Shard("x", Box.whole(huge.shape))
    program = m.Program(place=SOURCE, outputs=(m.Output(name="x", shard=shard),))
    told(core, m.Install(deployment=5, programs=(program,), peers=()), 0.0)
    feed(core, "bob#1", "bob's", 1000)
    give(core, "ann#1", "x", array=huge)
    assert list(held(core)) == ["bob's"]
    assert messages(start(core, 1)) == ["NotKept"]
    give(core, "ann#1", "x", turn=2, array=huge)
    assert held(core) == {"r": huge.nbytes} and core._computing._requests["r"].scattered


def test_a_huge_input_that_a_request_does_not_await_fails_it_and_voids_nobody_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = head(monkeypatch, 2000)
    with_inputs(core, "x")
    feed(core, "bob#1", "bob's", 1000)
    start(core, 1)
    assert messages(give(core, "ann#1", "x", array=np.zeros((2000,), np.float32))) == ["TaskFailed"]
    assert held(core) == {"bob's": 1000, "r": 0}


# --- samples


def checker() -> WorkerCore:
    """Stands by for a task of pi-2, which reads the source (0) and what pi-3 or pi-4 makes (1)."""
    values = tuple(
        m.Value(name=f"x{i}", box=WHOLE, pieces=(m.Piece(shard=WHOLE, producer=place, slot=i),))
        for i, place in enumerate((SOURCE, (0, 1)))
    )
    out = m.Output(name="y", shard=Shard("y", Box.whole(ARRAY.shape)))
    program = m.Program(
        place=(1, 0), devices=("pi-2", "pi"), model="a" * 64, inputs=values, outputs=(out,),
        spare=True,
    )  # fmt: skip
    core = alone()
    told(core, welcome(), 0.0)
    makers = ((SOURCE, ("head",)), ((0, 1), ("pi-3", "pi-4")))
    for number in (5, 6):
        told(core, m.Install(deployment=number, programs=(program,), peers=(), makers=makers), 0.0)
    return core


def check(core: WorkerCore, request: str = "r", head: str = "") -> list[e.Effect]:
    own = m.Peer(device="pi", incarnation="1", host="h", port=1, key="k" * 40)
    word = m.Check(
        request=request, attempt=1, deployment=5, place=(1, 0), of="pi-2", by=own, head=head,
        makers=(((0, 1), "pi-3"),),
    )  # fmt: skip
    return told(core, word, 1.0)


def sample(
    core: WorkerCore, peer: str, slot: int = 0, *, made: bool = False, request: str = "r",
    array: np.ndarray = ARRAY, deployment: int = 5,
) -> list[e.Effect]:  # fmt: skip
    """What comes of it, with its acknowledgement, if there is one."""
    message = m.Sample(
        id=slot + 1, request=request, attempt=1, deployment=deployment, place=(1, 0), slot=slot,
        made=made, tensor=describe("x", array),
    )  # fmt: skip
    effects = core.handle(e.Arrived(peer, message, payload_of(array)), 1.0)
    return effects + core._computing.acks.flush()


def honest(core: WorkerCore, head: str = "head#1") -> list[e.Effect]:
    effects = sample(core, head)
    effects += sample(core, "pi-3#1", 1)
    return effects + sample(core, "pi-2#1", made=True)


@pytest.mark.parametrize("first", [False, True], ids=["asked before", "samples come first"])
def test_what_others_have_computed_is_not_blamed_on_a_device(first: bool) -> None:
    """Whatever others send, first or last, the check compares what those sent whose it is, and is
    not ended by it either: who lies had only to have somebody send one sample."""
    core, false = checker(), np.ones((2,), np.float32)
    said = [] if first else check(core)
    for made, peer, slot in (
        (True, "mallory#1", 0), (True, "pi-3#1", 0), (False, "mallory#1", 0), (False, "pi-2#1", 0),
        (False, "mallory#1", 1), (False, "pi-4#1", 1),  # which stands by, and has not made it
    ):  # fmt: skip
        said += sample(core, peer, slot, made=made, array=false)
    said += sample(core, "pi-3#1", 1, array=false, deployment=6)
    said += honest(core)
    said += check(core) if first else []
    (job,) = [x for x in said if isinstance(x, e.Compute)]
    assert all((array == 0).all() for array in job.inputs.values())
    result = e.Computed("r", 1, (1, 0), (ARRAY,), 0.1, again=True)
    (word,) = [x.message for x in core.handle(result, 1.1) if isinstance(x, e.Send)]
    assert isinstance(word, m.Checked) and word.error == 0.0 and not word.unequal
    core.handle(e.Ticked(), 1.2)
    assert core.next_deadline() > 1.2, "it does not spin on a check that is over"
    told(core, m.Release(request="r", attempt=1), 1.3)
    core._computing.acks.flush()
    assert core.idle


def test_a_release_that_comes_late_ends_no_check_of_a_later_attempt() -> None:
    """1. a sample of attempt 1 comes before word of it; 2. its check begins; 3. and before each of
    them a release of what was there earlier, by that id."""
    core = checker()
    sample(core, "pi-3#1", 1)
    told(core, m.Release(request="r", attempt=0), 0.9)
    assert len(core._checking._aside) == 1
    check(core)
    told(core, m.Release(request="r", attempt=0), 1.0)
    sample(core, "head#1")
    said = sample(core, "pi-2#1", made=True)
    assert [x.request for x in said if isinstance(x, e.Compute)] == ["r"]
    told(core, m.Release(request="r", attempt=1), 1.1)
    assert not core._checking


def test_a_sample_of_a_request_that_is_over_is_acknowledged() -> None:
    """Or its sender would lack its credit."""
    core = checker()
    sample(core, "pi-3#1", 1)
    assert len(core._checking._aside) == 1 and not core._computing.acks
    told(core, m.Release(request="r", attempt=1), 1.0)
    (ack,) = [x for x in core._computing.acks.flush() if isinstance(x, e.Send)]
    assert ack.peer == "pi-3#1" and isinstance(ack.message, m.Ack) and len(ack.message.ids) == 1
    assert not len(core._checking._aside)


def test_a_client_that_is_the_source_gives_samples_of_its_inputs_and_no_other() -> None:
    core = checker()
    check(core, head="ann#1")
    sample(core, "eve#1", array=np.ones((2,), np.float32))
    (job,) = [x for x in honest(core, "ann#1") if isinstance(x, e.Compute)]
    assert (job.inputs["x0"] == 0).all()


def test_samples_that_nobody_asked_for_keep_no_check_away() -> None:
    """They took the few checks that a device has at once: whoever sent some was not checked."""
    core = checker()
    for i in range(10 * limits.CHECKS_HELD):
        assert sample(core, "pi-2#1", made=True, request=f"none {i}") == []
    said = check(core) + honest(core)
    assert [x.request for x in said if isinstance(x, e.Compute)] == ["r"]
    core.handle(e.Ticked(), 1.1 + limits.AHEAD_S)
    assert not core._checking._aside


def test_no_sample_waits_that_is_larger_than_any_check_awaits() -> None:
    core, large = checker(), np.zeros((1000,), np.float32)
    for made, peer, slot in ((True, "pi-2#1", 0), (False, "head#1", 0), (False, "pi-3#1", 1)):
        assert not messages(sample(core, peer, slot, made=made, array=large))
        assert not len(core._checking._aside)
        assert not messages(sample(core, peer, slot, made=made))
        assert len(core._checking._aside) == 1
        core._checking._aside.clear()
    for made, peer, slot in ((True, "pi-3#1", 0), (True, "pi-2#1", 1), (False, "pi-2#1", 1)):
        sample(core, peer, slot, made=made)
    assert not len(core._checking._aside), "of whom no check awaits it"


def test_a_result_of_another_shape_is_not_held_and_is_a_difference() -> None:
    core, large = checker(), np.zeros((100_000,), np.float32)
    check(core)
    sample(core, "head#1")
    sample(core, "pi-3#1", 1)
    said = sample(core, "pi-2#1", made=True, array=large)
    assert [x.request for x in said if isinstance(x, e.Compute)] == ["r"]
    (held,) = core._checking._checks.values()
    assert sum(array.nbytes for array in held.theirs.values()) == 0
    result = e.Computed("r", 1, (1, 0), (ARRAY,), 0.1, again=True)
    (word,) = [x.message for x in core.handle(result, 1.1) if isinstance(x, e.Send)]
    assert isinstance(word, m.Checked) and word.unequal


# --- what was sent, and by which way


def waits_for_ack(core: WorkerCore) -> int:
    return len(core._computing.outbox)


def test_only_who_got_a_message_acknowledges_it() -> None:
    """Anybody can count; alone, or along with a piece."""
    core = device(2)
    start(core, 1)
    piece(core, "head#1", 1)
    piece(core, "pi-2#1", 1, slot=1, number=2)
    core.handle(e.Computed("r", 1, (0, 0), (ARRAY,), 0.1), 1.0)
    assert waits_for_ack(core) == 1
    ids = tuple(range(1, 9))
    core.handle(e.Arrived("pi-2#1", m.Ack(ids=ids)), 1.0)
    message = m.Deliver(
        id=9, request="r", attempt=1, deployment=5, consumer=(0, 0), slot=1, acks=ids,
        tensor=describe("x", ARRAY),
    )  # fmt: skip
    core.handle(e.Arrived("pi-2#1", message, payload_of(ARRAY)), 1.0)
    assert waits_for_ack(core) == 1
    core.handle(e.Arrived("head#1", m.Ack(ids=ids)), 1.0)
    assert waits_for_ack(core) == 0


def test_a_device_believes_the_head_alone_who_it_is_that_speaks_and_passes_nothing_on() -> None:
    core = device(2)
    relay = m.Peer(device="head", incarnation="1", host="h", port=1, key="k" * 40)
    told(core, m.Detour(peer=m.Peer(device="pi-2", incarnation="1", host="h", port=2, key="k" * 40),
                        via=relay), 0.5)  # fmt: skip
    start(core, 1)
    piece(core, "head#1", 1)
    message = m.Deliver(
        id=9, request="r", attempt=1, deployment=5, consumer=(0, 0), slot=1,
        tensor=describe("x", ARRAY),
    )  # fmt: skip
    for peer, to, believed in (
        ("mallory#1", "pi#1", False), ("pi-2#1", "pi#1", False), ("head#1", "pi-3#1", False),
        ("pi-2#1", "pi-3#1", False), ("head#1", "pi#1", True),
    ):  # fmt: skip
        word = m.Relay(to=to, origin="pi-2#1", message=message)
        effects = core.handle(e.Arrived(peer, word, payload_of(ARRAY)), 1.0)
        assert messages(effects) == [], (peer, to)
        assert (computes(effects) == [1]) is believed, (peer, to)


# --- room


def test_who_has_the_most_gives_way_its_oldest_first_and_the_newest_has_room() -> None:
    shares: Shares[str] = Shares(Bounds(100, 3, 150, 5))
    assert shares.put("a1", "ann#1", 60) == [] and shares.put("b1", "bob#1", 60) == []
    assert shares.put("a2", "ann#2", 60) == ["a1"], "of its own, beyond its part"
    assert shares.put("a3", "ann#1", 10) == [] and shares.put("a4", "ann#1", 10) == []
    assert shares.put("a5", "ann#1", 0) == ["a2"], "a fourth entry"
    assert shares.put("c1", "cy#1", 500, due=True) == ["b1", "a3", "a4", "a5"]
    assert len(shares) == 1 and shares.put("c1", "cy#1", 90) == [], "the same, not once more"
    shares.pop("c1")
    assert shares.put("d1", "dan#1", 70) == [] and shares.put("b2", "bob#1", 70) == []
    assert shares.put("e1", "eve#1", 70) == ["d1"] and shares.gone == 7
    shares.pop("b2")
    shares.pop("e1")
    assert len(shares) == 0 and shares._of == {} == shares._bytes


def test_an_entry_that_is_more_than_a_part_pushes_out_nobody_s() -> None:
    shares: Shares[str] = Shares(Bounds(100, 3, 150, 5))
    assert shares.put("a1", "ann#1", 10) == []
    assert shares.put("e1", "eve#1", 500) == ["e1"] and "a1" in shares
    assert shares.put("e1", "eve#1", 120) == [], "there is room beside what is there"
    shares.pop("a1")
    assert shares.put("e1", "eve#1", 500) == [], "it is alone"
    assert shares.put("a1", "ann#1", 10) == ["e1"]
    assert shares.put("a2", "ann#1", 160) == ["a1"], "nor its own sender's for long"
    assert shares.put("e1", "eve#1", 170) == ["e1"] and list(shares._of) == ["ann"]


def test_devices_are_one_sender_each_and_the_clients_of_a_key_are_one() -> None:
    shares: Shares[str] = Shares(Bounds(100, 3, 1000, 50))
    assert shares.put("p1", "pi-rack-a-shelf-1#1", 60) == []
    assert shares.put("p2", "pi-rack-a-shelf-2#1", 60) == []
    assert shares.put("c1", "client-a-b-c-1#1", 60) == []
    assert shares.put("c2", "client-a-b-c-2#1", 60) == ["c1"]


@pytest.mark.parametrize(
    ("granted", "each", "room"), [(0, 32, 128), (1024, 32, 128), (256, 32, 64), (64, 8, 16)]
)
def test_what_waits_takes_no_more_than_a_part_of_what_is_granted(
    granted: int, each: int, room: int
) -> None:
    hello = alone().hello
    facts = structs.replace(hello.facts, memory_bytes=granted << 20)
    bounds = WorkerCore(structs.replace(hello, facts=facts))._computing.ahead._bounds
    assert (bounds.bytes_each, bounds.bytes_in_all) == (each << 20, room << 20)


def test_pieces_and_samples_wait_in_one_room() -> None:
    """And what of it has to go is gone, wherever it was kept."""
    core = checker()
    assert core._checking._aside._shares is core._computing._aside._shares
    shares: Shares[AheadKey] = Shares(Bounds(100, 2, 1000, 10))
    pieces: Aside[m.Deliver] = Aside(shares)
    samples: Aside[m.Sample] = Aside(shares)
    fields = {"request": "r", "attempt": 1, "deployment": 5, "tensor": describe("x", ARRAY)}
    for i in (1, 2):
        word = m.Deliver(id=i, consumer=(0, 0), slot=0, **fields)
        pieces.put("pi-2#1", word, payload_of(ARRAY), 1.0)
    again = m.Sample(id=2, place=(0, 0), slot=0, **fields)
    samples.put("pi-2#1", again, payload_of(ARRAY), 1.0)
    assert [len(pieces), len(samples), len(shares)] == [1, 1, 2]
    pieces.clear()
    assert [len(pieces), len(samples), len(shares)] == [0, 1, 1]
