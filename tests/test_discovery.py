"""Real mDNS on the loopback interface with random cluster names, and once across a real link."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
import structlog
from zeroconf import ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from cluster import discovery
from cluster.discovery import SERVICE, Announcement, Found, announce, browse
from cluster.keys import generate_keypair
from meshinfer import limits
from meshinfer.errors import ConfigurationError

LO = ["127.0.0.1"]
KEY = generate_keypair().public


@pytest.fixture
def cluster() -> str:
    return f"t{secrets.token_hex(6)}"


def _announce(cluster: str, port: int = 5000, key: str = KEY) -> Announcement:
    return announce(cluster, port, key=key, join_port=port + 1000, protocol=(1, 2), interfaces=LO)


@pytest.fixture
def announced(cluster: str) -> Iterator[Announcement]:
    made = _announce(cluster)
    yield made
    made.close()


def test_a_browser_finds_the_coordinators_of_its_own_cluster_only(
    cluster: str, announced: Announcement
) -> None:
    assert announced.active
    other = _announce(f"{cluster}x", port=5001)
    try:
        started = time.monotonic()
        (found,) = browse(cluster, timeout_s=5.0, interfaces=LO, until=1)
        assert time.monotonic() - started < 4.0, "returns as soon as it is found"
        instance = found.instance
        assert found == Found(cluster, "127.0.0.1", 5000, (1, 2), KEY, 6000, instance)
        assert instance.startswith(f"{cluster}@")
        assert browse(f"{cluster}x", timeout_s=5.0, interfaces=LO, until=1)[0].port == 5001
        everybody = browse(None, timeout_s=1.5, interfaces=LO)
        assert {cluster, f"{cluster}x"} <= {one.cluster for one in everybody}
    finally:
        other.close()


def test_nothing_is_found_in_the_time_given_where_nothing_is(cluster: str) -> None:
    started = time.monotonic()
    assert browse(cluster, timeout_s=0.4, interfaces=LO, until=1) == []
    assert 0.4 <= time.monotonic() - started < 2.0


def test_two_coordinators_of_one_name_on_one_host_are_both_seen(
    cluster: str, announced: Announcement
) -> None:
    key = generate_keypair().public
    second = _announce(cluster, port=5002, key=key)
    try:
        found = browse(cluster, timeout_s=20.0, interfaces=LO, until=2)
        assert {(one.port, one.key) for one in found} == {
            (5000, KEY),
            (5002, key),
        }
        assert len({one.instance for one in found}) == 2
        (mine,) = browse(cluster, timeout_s=20.0, interfaces=LO, until=1, key=key)
        assert mine.port == 5002, "the other says that it has another key"
    finally:
        second.close()


def test_the_goodbye_makes_a_running_browser_forget_at_once(
    cluster: str, announced: Announcement
) -> None:
    appeared, gone = threading.Event(), threading.Event()

    def changed(name: str, state_change: ServiceStateChange, **_: object) -> None:
        if name.startswith(f"{cluster}@"):
            (gone if state_change is ServiceStateChange.Removed else appeared).set()

    zeroconf = Zeroconf(interfaces=LO, use_asyncio=False)
    try:
        browser = ServiceBrowser(zeroconf, SERVICE, handlers=[changed])
        assert appeared.wait(15.0)
        announced.close()
        announced.close()
        assert not announced.active
        assert gone.wait(2.0)
        browser.cancel()
    finally:
        zeroconf.close()
    assert browse(cluster, timeout_s=0.5, interfaces=LO) == []


def test_closing_at_once_leaves_nothing_behind(cluster: str) -> None:
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    for _ in range(3):
        _announce(cluster).close()
    assert browse(cluster, timeout_s=0.5, interfaces=LO) == []
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_an_announcement_follows_the_addresses_of_its_machine(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "interface_addresses", list)
    made = announce(cluster, 5000, key=KEY, join_port=5001, protocol=(1, 2))
    try:
        states = [made.active]
        monkeypatch.setattr(discovery, "interface_addresses", lambda: LO)
        made.refresh()
        made.refresh()
        states.append(made.active)
        assert [one.host for one in browse(cluster, timeout_s=5.0, until=1)] == LO
    finally:
        made.close()
    made.refresh()
    assert [*states, made.active] == [False, True, False]


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        announce("no good name", 5000, key=KEY, join_port=5001, protocol=(1, 1), interfaces=LO)


# --- where mDNS does not work ------------------------------------------------------------------


def test_without_an_interface_everything_goes_on_with_a_hint(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "interface_addresses", list)
    _goes_on_with_a_hint(cluster, None)


@pytest.mark.parametrize("bad", [["192.0.2.250"], ["no address"]])
def test_interfaces_that_are_not_ours_go_on_with_a_hint(cluster: str, bad: list[str]) -> None:
    _goes_on_with_a_hint(cluster, bad)


def test_a_taken_mdns_port_goes_on_with_a_hint(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(**_: object) -> Zeroconf:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(discovery, "Zeroconf", taken)
    _goes_on_with_a_hint(cluster, LO)


def _goes_on_with_a_hint(cluster: str, interfaces: list[str] | None) -> None:
    with structlog.testing.capture_logs() as logs:
        made = announce(
            cluster, 5000, key=KEY, join_port=5001, protocol=(1, 1), interfaces=interfaces
        )
        assert not made.active
        made.close()
        assert browse(cluster, timeout_s=5.0, interfaces=interfaces) == []
    assert [(one["log_level"], one["hint"]) for one in logs] == [
        ("warning", discovery.STATIC_HINT)
    ] * 2
    assert "--coordinator HOST:PORT" in discovery.STATIC_HINT


# --- what strangers announce -------------------------------------------------------------------


def _stranger(cluster: str, number: int, fields: dict[str, str | bytes]) -> ServiceInfo:
    properties = {"cluster": cluster, "protocol": "1-2", "key": KEY, "join": "5001"} | fields
    name = f"{cluster}@s{number}.{SERVICE}"
    return ServiceInfo(
        SERVICE, name, 6000 + number, properties=properties, parsed_addresses=LO, server=name
    )


def test_records_that_make_no_sense_are_not_reported(cluster: str) -> None:
    bad: list[dict[str, str | bytes]] = [
        {"cluster": "another"},
        {"protocol": "one"},
        {"protocol": "1-2-3"},
        {"key": "../../etc"},
        {"key": b"\xff\xfe"},
        {"key": KEY[1:]},
        {"join": "0"},
        {"join": "65536"},
        {"join": ""},
        {"more": "x" * 200, "and": "y" * 200, "again": "z" * 200},
    ]
    zeroconf = Zeroconf(interfaces=LO, use_asyncio=False)
    try:
        for number, fields in enumerate([{}, *bad]):
            zeroconf.registry.async_add(_stranger(cluster, number, fields))
        found = browse(cluster, timeout_s=1.5, interfaces=LO)
        assert [one.port for one in found] == [6000]
    finally:
        zeroconf.close()


def test_a_flood_of_records_costs_no_more_than_its_bound(cluster: str) -> None:
    zeroconf = Zeroconf(interfaces=LO, use_asyncio=False)
    try:
        for number in range(300):
            zeroconf.registry.async_add(_stranger(cluster, number, {}))
        started = time.monotonic()
        found = browse(cluster, timeout_s=2.0, interfaces=LO)
        assert 0 < len(found) <= limits.DISCOVERED
        assert time.monotonic() - started < 4.0
    finally:
        zeroconf.close()


# --- interfaces --------------------------------------------------------------------------------


def _interfaces(monkeypatch: pytest.MonkeyPatch, **addresses: str) -> list[str]:
    """interface_addresses() on a made-up machine; a name that ends in _down is down."""
    family = socket.AF_INET
    monkeypatch.setattr(
        psutil,
        "net_if_stats",
        lambda: {name: SimpleNamespace(isup=not name.endswith("_down")) for name in addresses},
    )
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {
            name: [
                SimpleNamespace(family=socket.AF_INET6, address="fe80::1"),
                SimpleNamespace(family=family, address=address),
            ]
            for name, address in addresses.items()
        },
    )
    return discovery.interface_addresses()


def test_only_interfaces_that_lead_to_other_machines_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything = {
        "lo": "127.0.0.1",
        "eth0": "10.0.0.2",
        "wlan0": "10.0.1.2",
        "docker0": "172.17.0.1",
        "veth12": "172.17.0.3",
        "br-3f": "172.18.0.1",
        "eth1_down": "10.0.2.2",
    }
    assert _interfaces(monkeypatch, **everything) == ["10.0.0.2", "10.0.1.2"]


def test_the_loopback_is_used_when_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _interfaces(monkeypatch, lo="127.0.0.1", eth0_down="10.0.0.2") == ["127.0.0.1"]
    assert _interfaces(monkeypatch) == []


def test_of_several_addresses_one_on_our_own_network_is_preferred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = SimpleNamespace(family=socket.AF_INET, address="10.0.1.9", netmask="255.255.255.0")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [ours]})
    assert discovery._nearest(["10.0.0.2", "10.0.1.2"]) == "10.0.1.2"
    assert discovery._nearest(["10.0.0.2", "10.0.3.2"]) == "10.0.0.2"


# --- across a link -----------------------------------------------------------------------------

ANNOUNCER = """
import sys, time
from cluster.discovery import announce
made = announce(sys.argv[1], 5000, key=sys.argv[2], join_port=5001, protocol=(1, 1))
sys.stdin.read()
made.close()
"""

BROWSER = """
import dataclasses, json, sys
from cluster.discovery import browse, interface_addresses
found = browse(sys.argv[1], timeout_s=float(sys.argv[3]), until=1)
json.dump([interface_addresses(), [dataclasses.asdict(one) for one in found]], sys.stdout)
"""


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=15).stdout


def _inside(namespace: str, script: str, *arguments: str) -> list[str]:
    enter = ["nsenter", f"--net=/run/netns/{namespace}"]
    return [*enter, sys.executable, "-c", script, *arguments]


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable, with an address each and no default route."""
    tag = secrets.token_hex(3)
    names = (f"mi{tag}a", f"mi{tag}b")
    made: list[str] = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        ends = ["eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0"]
        _run("ip", "link", "add", *ends, "netns", names[1])
        for number, name in enumerate(names, start=1):
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        for name in names:  # the kernel tells of the carrier up to a second late
            for _ in range(100):
                if "state UP" in _run("ip", "-n", name, "link", "show", "eth0"):
                    break
                time.sleep(0.05)
        yield names
    finally:
        for name in made:  # the cable goes with them
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=15)


@pytest.mark.root
def test_across_a_link_it_is_found_and_its_goodbye_is_heard(
    cluster: str, two_hosts: tuple[str, str]
) -> None:
    first, second = two_hosts
    announcer = subprocess.Popen(
        _inside(first, ANNOUNCER, cluster, KEY), stdin=subprocess.PIPE, text=True
    )
    try:
        seen = json.loads(_run(*_inside(second, BROWSER, cluster, KEY, "8.0")))
        assert seen[0] == ["10.77.0.2"]
        (found,) = seen[1]
        assert (found["host"], found["port"]) == ("10.77.0.1", 5000)
        assert found["key"] == KEY and found["join_port"] == 5001
        assert announcer.stdin is not None
        announcer.stdin.close()
        assert announcer.wait(10) == 0
        assert json.loads(_run(*_inside(second, BROWSER, cluster, KEY, "0.5")))[1] == []
    finally:
        announcer.kill()
        announcer.wait(10)
        if announcer.stdin is not None:
            announcer.stdin.close()
