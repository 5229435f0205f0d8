"""Links are measured one at a time, while nothing runs, and forgotten with their devices."""

from __future__ import annotations

import pytest
from cores import LATENCY_S, Cluster, image, kind

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.links import LinkMeter, LinkRounds, LinkWatch

PEER = m.Peer(device="pi-2", incarnation="1", host="127.0.0.1", port=9, key="k" * 40)


def _no() -> None:
    """Nothing is done."""


def known(cluster: Cluster) -> set[tuple[str, str]]:
    devices = cluster.core.members.devices
    return {(name, peer) for name, d in devices.items() for peer in d.links}


def test_devices_that_joined_measure_their_links_with_the_head_and_with_each_other() -> None:
    cluster = Cluster(("pi-1", "pi-2", "pi-3"))
    cluster.pass_time(2.0)
    assert known(cluster) == {
        *((f"pi-{i}", "head") for i in (1, 2, 3)),
        *(("head", f"pi-{i}") for i in (1, 2, 3)),
        ("pi-1", "pi-2"),
        ("pi-1", "pi-3"),
        ("pi-2", "pi-3"),
    }
    link = cluster.core.members.link("pi-1")
    assert link is not None and link.latency_s == pytest.approx(LATENCY_S)
    assert link.bytes_per_s > 0
    (candidate, *_) = cluster.core.members.candidates(cluster.now)
    assert (candidate.device, candidate.link) == ("pi-1", link)
    cluster.check_idle()


def test_a_device_that_leaves_takes_its_links_with_it_and_one_that_joins_is_measured() -> None:
    cluster = Cluster(("pi-1", "pi-2"))
    cluster.pass_time(2.0)
    cluster.kill("pi-2")
    cluster.pass_time(limits.DEAD_AFTER_S + 1.0)
    assert known(cluster) == {("pi-1", "head"), ("head", "pi-1")}
    cluster.join("pi-3")
    cluster.pass_time(2.0)
    assert ("pi-1", "pi-3") in known(cluster) and ("pi-3", "head") in known(cluster)


def test_links_of_many_devices_are_measured_anew_one_now_and_then_and_each_in_its_turn() -> None:
    many = tuple(f"pi-{i:02}" for i in range(1, 31))
    cluster = Cluster(many)
    cluster.pass_time(8.0)
    asked: list[str] = []
    cluster.when(lambda s, r, w: isinstance(w, m.MeasureLink) and bool(asked.append(r.name)), _no)
    cluster.pass_time(limits.LINK_AGE_S)
    assert len(known(cluster)) == 2 * len(many)
    asked.clear()
    cluster.pass_time(30 * limits.LINK_AGAIN_S)
    assert 20 <= len(asked) <= 31 and len(set(asked)) == len(asked)


def test_a_link_that_became_slow_is_noticed_after_a_while() -> None:
    cluster = Cluster(("pi-1",))
    cluster.pass_time(2.0)
    before = cluster.core.members.link("pi-1")
    assert before is not None
    cluster._delay = lambda: 10 * LATENCY_S
    cluster.pass_time(limits.LINK_AGE_S + 2.0)
    after = cluster.core.members.link("pi-1")
    assert after is not None
    assert 8 * LATENCY_S < after.latency_s <= 10 * LATENCY_S
    assert after.bytes_per_s < before.bytes_per_s


def test_nothing_is_measured_while_a_request_runs() -> None:
    cluster = Cluster(("pi-1", "pi-2"))
    cluster.deployed()
    cluster.pass_time(2.0)
    request = cluster.submit(image(0))
    cluster.join("pi-3")
    seen: list[bool] = []
    cluster.when(kind(m.MeasureLink), lambda: seen.append(bool(cluster.core.requests)))
    cluster.check(request, image(0))
    cluster.pass_time(2.0)
    assert seen == [False]


def echo(effects: list[e.Effect]) -> e.Send:
    (sent,) = [x for x in effects if isinstance(x, e.Send)]
    return sent


def test_the_rate_is_that_of_long_echoes_and_the_latency_half_of_the_shortest_one() -> None:
    meter, now = LinkMeter(), 5.0
    sent = echo(meter.begin(PEER, now))
    while isinstance(sent.message, m.Echo):
        assert sent.payload is not None
        now += 0.004 + len(sent.payload) / 50e6
        assert not meter.echoed("somebody#else", sent.message.id, now)
        sent = echo(meter.echoed(PEER.id, sent.message.id, now))
    assert isinstance(sent.message, m.LinkMeasured)
    link = sent.message.link
    assert link.peer == "pi-2"
    assert link.latency_s == pytest.approx(0.002)
    assert link.bytes_per_s == pytest.approx(50e6)
    assert meter.next_deadline() is None


def test_a_slow_link_is_not_given_the_longest_echo() -> None:
    meter, now = LinkMeter(), 0.0
    sent, longest = echo(meter.begin(PEER, now)), 0
    while isinstance(sent.message, m.Echo):
        assert sent.payload is not None
        longest = max(longest, len(sent.payload))
        now += 0.01 + len(sent.payload) / 1e6
        sent = echo(meter.echoed(PEER.id, sent.message.id, now))
    assert longest == limits.LINK_BYTES[0]


def test_a_link_over_which_nothing_comes_back_is_given_up_and_stays_unknown() -> None:
    meter = LinkMeter()
    meter.begin(PEER, 0.0)
    due = meter.next_deadline()
    assert due == limits.LINK_MEASURE_S and not meter.due(due - 0.1)
    assert echo(meter.due(due)).message == m.LinkMeasured(link=m.Link(peer="pi-2"))


def watched(watch: LinkWatch, start: float, count: int, took_s: float) -> list[m.LinkMeasured]:
    """What is told of so many pieces of 256 KiB, one each second, that take so long."""
    told = []
    for i in range(count):
        now = start + i
        (sent,) = watch.sent("pi-2#1", 256 << 10, now)
        assert isinstance(sent, e.Send) and isinstance(sent.message, m.Echo)
        assert not watch.sent("pi-2#1", 256 << 10, now + 0.01), "one sample at a time"
        assert not watch.echoed("pi-9#1", sent.message.id, now + took_s)
        effects = watch.echoed("pi-2#1", sent.message.id, now + took_s)
        told += [x.message for x in effects if isinstance(x, e.Send)]
    assert all(isinstance(word, m.LinkMeasured) for word in told)
    return told  # type: ignore[return-value]


def test_real_transfers_tell_that_a_link_became_slow_and_nothing_while_it_is_not() -> None:
    watch = LinkWatch()
    assert len(watched(watch, 0.0, 8, 0.006)) == 1, "what it carries at least"
    assert not watched(watch, 8.0, 3, 0.12), "a few late ones are the receiver's"
    assert not watched(watch, 11.0, 8, 0.006)
    (word,) = watched(watch, 19.0, 5, 0.12)
    assert word.link.peer == "pi-2"
    assert word.least_bytes_per_s == pytest.approx((256 << 10) / 0.12)
    assert word.link.bytes_per_s == pytest.approx((256 << 10) / (0.12 - limits.LINK_SLACK_S))
    (again,) = watched(watch, 24.0, 6, 0.006)
    assert again.least_bytes_per_s > 10 * word.least_bytes_per_s


def test_a_link_in_doubt_is_measured_though_requests_run_and_taken_as_it_is_now() -> None:
    cluster = Cluster(("pi-1", "pi-2"))
    cluster.pass_time(2.0)
    members, rounds, now = cluster.core.members, LinkRounds(), cluster.now
    device = members.devices["pi-1"]
    device.links["pi-2"] = m.Link(peer="pi-2", bytes_per_s=1e8, latency_s=0.001)

    def doubt(at: float, most: float) -> list[e.Effect]:
        link = m.Link(peer="pi-2", bytes_per_s=most)
        rounds.seen(members, device, m.LinkMeasured(link=link, least_bytes_per_s=most / 2), at)
        return rounds.next(members, at, busy=True)

    assert not doubt(now, 9e7), "near enough"
    (asked,) = doubt(now, 3e6)
    assert isinstance(asked, e.Send) and isinstance(asked.message, m.MeasureLink)
    rounds.measured(members, device, m.Link(peer="pi-2", bytes_per_s=9.5e7), now)
    assert members.links_changed == {} and device.links["pi-2"].bytes_per_s == 1e8
    assert not doubt(now + limits.LINK_DOUBT_S, 3e6), "rarer, since it was in vain"
    assert doubt(now + 2 * limits.LINK_DOUBT_S, 3e6)
    slow = m.Link(peer="pi-2", bytes_per_s=2.5e6, latency_s=0.002)
    rounds.measured(members, device, slow, now + 11.0)
    assert members.links_changed == {("pi-1", "pi-2"): 1} and device.links["pi-2"] == slow
    (candidate,) = [c for c in members.candidates(cluster.now) if c.device == "pi-1"]
    assert slow in candidate.links, "so it is in the next plan, and shown"
