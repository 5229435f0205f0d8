"""Flow control: what a peer has not acknowledged is bounded in bytes, the rest waits its turn."""

from __future__ import annotations

import random

import pytest
from cores import Cluster, image

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.outbox import Outbox

BODY = bytes(100)


def answer(outbox: Outbox) -> m.Answer:
    tensor = m.Tensor(name="y", dtype="|u1", shape=(100,))
    return m.Answer(id=outbox.number(), request="r", attempt=1, tensor=tensor, count=1)


def ids(effects: list[e.Effect]) -> list[int]:
    return [s.message.id for s in effects if isinstance(s, e.Send)]  # type: ignore[union-attr]


@pytest.fixture
def outbox(monkeypatch: pytest.MonkeyPatch) -> Outbox:
    monkeypatch.setattr(limits, "CREDIT_BYTES", 250)
    return Outbox()


def test_what_has_no_credit_waits_for_acknowledgements_in_its_order(outbox: Outbox) -> None:
    sent = [ids(outbox.send("a", answer(outbox), BODY, 0.0)) for _ in range(5)]
    assert sent == [[1], [2], [], [], []]
    assert ids(outbox.resend_due(1.0)[0]) == []
    outbox.acknowledge("b", [1])  # anybody can count
    assert ids(outbox.resend_due(0.0)[0]) == []
    outbox.acknowledge("a", [1])
    assert outbox.next_deadline() is not None and outbox.next_deadline() <= 1.0
    assert ids(outbox.resend_due(1.0)[0]) == [3]
    outbox.acknowledge("a", [2, 3])
    assert ids(outbox.resend_due(1.0)[0]) == [4, 5]
    outbox.acknowledge("a", [4, 5])
    assert len(outbox) == 0 and outbox.next_deadline() is None


def test_one_message_is_sent_however_large_and_peers_have_credit_of_their_own(
    outbox: Outbox,
) -> None:
    assert ids(outbox.send("a", answer(outbox), bytes(1000), 0.0)) == [1]
    assert ids(outbox.send("a", answer(outbox), BODY, 0.0)) == []
    assert ids(outbox.send("b", answer(outbox), BODY, 0.0)) == [3]


def test_what_waits_is_neither_resent_nor_given_up_and_may_be_forgotten(outbox: Outbox) -> None:
    for _ in range(4):
        outbox.send("a", answer(outbox), BODY, 0.0)
    outbox.hasten("a", 0.0)
    effects, lost = outbox.resend_due(1.0)
    assert ids(effects) == [1, 2] and lost == []
    outbox.forget(lambda message: message.id == 3)
    outbox.forget(lambda message: message.id == 4)
    assert ids(outbox.send("a", answer(outbox), BODY, 1.0)) == []
    outbox.acknowledge("a", [1])
    assert ids(outbox.resend_due(1.0)[0]) == [5]


def test_what_nobody_needs_any_more_is_not_sent_again_but_is_on_its_way(outbox: Outbox) -> None:
    for _ in range(3):
        outbox.send("a", answer(outbox), BODY, 0.0)
    outbox.forget(lambda message: message.id in (1, 2))
    assert len(outbox) == 1 and ids(outbox.resend_due(1.0)[0]) == []
    outbox.acknowledge("b", [1])
    assert ids(outbox.resend_due(1.0)[0]) == []
    outbox.acknowledge("a", [1, 1])
    assert ids(outbox.resend_due(1.0)[0]) == [3]
    outbox.acknowledge("a", [2, 3])
    assert len(outbox) == 0 and outbox.next_deadline() is None


def test_what_nobody_needs_counts_until_the_slowest_link_has_carried_it_or_its_own_is_cut(
    outbox: Outbox,
) -> None:
    for peer in "aaabbb":
        outbox.send(peer, answer(outbox), BODY, 0.0)
    outbox.forget(lambda message: message.id in (1, 2, 4, 5))
    outbox.hasten("b", 1.0)
    assert ids(outbox.resend_due(1.1)[0]) == []
    assert ids(outbox.resend_due(1.0 + limits.RESEND_AFTER_LOSS_S)[0]) == [6]
    due = outbox.next_deadline()
    assert due is not None and due >= limits.ACK_TIMEOUT_S
    effects, lost = outbox.resend_due(due + 1.0)
    assert 3 in ids(effects) and lost == []
    outbox.acknowledge("a", [1, 3])
    outbox.acknowledge("b", [6])
    assert len(outbox) == 0 and outbox.next_deadline() is None


def test_room_is_used_when_what_waited_is_forgotten_or_what_was_under_way_is_lost(
    outbox: Outbox,
) -> None:
    outbox.send("a", answer(outbox), BODY, 0.0)
    for size in (200, 100):
        outbox.send("a", answer(outbox), bytes(size), 0.0)
    outbox.forget(lambda message: message.id == 2)
    assert outbox.next_deadline() == 0.0 and ids(outbox.resend_due(0.1)[0]) == [3]
    outbox.send("a", answer(outbox), BODY, 0.1)  # it waits: those two are never acknowledged
    sent, now = list[int](), 0.1
    while 4 not in sent and (due := outbox.next_deadline()) is not None and now < 1000.0:
        now = max(now + 0.001, due)
        sent += ids(outbox.resend_due(now)[0])
    assert 4 in sent


def renewed(effects: list[e.Effect]) -> list[str]:
    return [effect.peer for effect in effects if isinstance(effect, e.Renew)]


def test_a_connection_by_which_nothing_is_acknowledged_is_made_anew_before_it_is_used_again(
    outbox: Outbox,
) -> None:
    for peer in "aab":
        outbox.send(peer, answer(outbox), BODY, 0.0)
    outbox.acknowledge("b", [3])
    outbox.send("b", answer(outbox), BODY, 0.0)
    effects, lost = outbox.resend_due(4.0)
    assert renewed(effects) == ["a", "b"] and not ids(effects) and not lost
    soon = 4.0 + limits.RESEND_AFTER_LOSS_S
    assert outbox.next_deadline() == soon  # when it is there
    effects, _ = outbox.resend_due(soon)
    assert not renewed(effects) and ids(effects) == [1, 2, 4]
    outbox.acknowledge("a", [1])  # it hears us: what else it owes takes its time
    effects, _ = outbox.resend_due(8.0)
    assert renewed(effects) == ["b"] and ids(effects) == [2]
    assert ids(outbox.resend_due(9.0)[0]) == [4]


def test_a_slow_link_has_twice_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox, now, body = Outbox(), 0.0, bytes(limits.FRAME_BYTES + 1)
    outbox.send("a", answer(outbox), body, now)
    times: list[float] = []
    for _ in range(400):
        now += 0.1
        times += [now for _ in renewed(outbox.resend_due(now)[0])]
    patience = limits.ACK_TIMEOUT_S + len(body) / limits.SLOWEST_LINK_BYTES_PER_S
    assert times and 2 * patience <= times[0] <= 2 * patience + 0.3


def test_what_is_given_up_makes_room(outbox: Outbox) -> None:
    for _ in range(3):
        outbox.send("a", answer(outbox), BODY, 0.0)
    now, lost = 0.0, []
    for _ in range(40):
        now += 1.0
        effects, gone = outbox.resend_due(now)
        lost += [entry.message.id for entry in gone]
        if 3 in ids(effects):
            break
    assert {1, 2} >= set(lost) != set()


def test_any_order_of_sends_and_acks_ends_with_all_sent_once_and_nothing_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "CREDIT_BYTES", 1000)
    for seed in range(200):
        rng, outbox = random.Random(seed), Outbox()
        under_way: dict[int, tuple[str, int]] = {}
        sent: list[int] = []
        sizes: dict[int, tuple[str, int]] = {}

        def note(effects: list[e.Effect]) -> None:
            for number in ids(effects):
                sent.append(number)  # noqa: B023
                under_way[number] = sizes[number]  # noqa: B023
            for peer in "ab":
                held = [n for p, n in under_way.values() if p == peer]  # noqa: B023
                assert sum(held) <= 1000 or len(held) == 1

        for _ in range(60):
            if under_way and rng.random() < 0.5:
                number = rng.choice(sorted(under_way))
                outbox.acknowledge(under_way.pop(number)[0], [number])
                note(outbox.resend_due(0.0)[0])
            else:
                message, peer = answer(outbox), rng.choice("ab")
                sizes[message.id] = (peer, rng.choice([1, 300, 700, 2000]))
                note(outbox.send(peer, message, bytes(sizes[message.id][1]), 0.0))
        while under_way:
            number, (peer, _) = under_way.popitem()
            outbox.acknowledge(peer, [number])
            note(outbox.resend_due(0.0)[0])
        assert sorted(sent) == sorted(sizes) and len(outbox) == 0, f"seed {seed}"


@pytest.mark.parametrize("beside", [False, True])
def test_a_cluster_with_hardly_any_credit_answers_all_the_same(
    beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CREDIT_BYTES", 200)
    monkeypatch.setattr(limits, "ACK_BYTES", 50)
    cluster = Cluster(("pi-1", "pi-2", "pi-3"), beside=beside)
    cluster.deployed(spread=True)  # else what waits so long may begin again on one device
    requests = [cluster.submit(image(i)) for i in range(8)]
    for i, request in enumerate(requests):
        assert cluster.check(request, image(i)).attempts == 1
    cluster.check_idle()
