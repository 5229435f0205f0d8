"""Links are measured one at a time, while nothing runs, and forgotten with their devices."""

from __future__ import annotations

import pytest
from cores import LATENCY_S, Cluster, image, kind

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler import events as e
from meshinfer.scheduler.links import LinkMeter

PEER = m.Peer(device="pi-2", incarnation="1", host="127.0.0.1", port=9, key="k" * 40)


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


def test_a_link_that_became_slow_is_noticed_after_a_while() -> None:
    cluster = Cluster(("pi-1",))
    cluster.pass_time(2.0)
    before = cluster.core.members.link("pi-1")
    assert before is not None
    cluster._delay = lambda: 10 * LATENCY_S
    cluster.pass_time(limits.LINK_AGE_S + 2.0)
    after = cluster.core.members.link("pi-1")
    assert after is not None
    assert after.latency_s == pytest.approx(10 * LATENCY_S)
    assert before.bytes_per_s / 2 < after.bytes_per_s < before.bytes_per_s


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
