"""mDNS: a hint where a coordinator may be. Never membership, never trust.

Anybody on the network can announce anything, and a crash is noticed only after many minutes. So
what is found here is tried with the keyring's key, and liveness comes from heartbeats. Where
multicast does not work, static addresses do.
"""

from __future__ import annotations

import asyncio
import ipaddress
import queue
import re
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import psutil
import structlog
from zeroconf import (
    BadTypeInNameException,
    IPVersion,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf import Error as ZeroconfError

from cluster.keyring import check_cluster_name
from cluster.keys import is_key
from meshinfer import limits

log = structlog.get_logger(__name__)

SERVICE: Final = "_meshinfer._tcp.local."
STATIC_HINT: Final = "static addresses still work: --coordinator HOST:PORT"

_VIRTUAL: Final = re.compile(r"docker|veth|br-")  # by the name's beginning
_HOST_CHARS: Final = 20  # an instance label has 63 bytes: cluster, '@', host, '-', port, and '-2'
_RESOLVE_MS: Final = 300
_RESOLVE_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class Found:
    """What somebody announced. Nothing of it is proven; ``protocol`` is (lowest, highest), ``key``:
    the public key that it says it has."""

    cluster: str
    host: str
    port: int
    protocol: tuple[int, int]
    key: str
    join_port: int
    instance: str


def interface_addresses() -> list[str]:
    """The IPv4 address of each interface that leads to other machines; loopback if none does."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: list[str] = []
    loopback: list[str] = []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        if name not in up or is_virtual(name):
            continue
        for address in addresses:
            if address.family == socket.AF_INET:
                lo = ipaddress.ip_address(address.address).is_loopback
                (loopback if lo else found).append(address.address)
    return found or loopback[:1]


def is_virtual(interface: str) -> bool:
    """Whether it leads to containers of this machine only, by its name."""
    return _VIRTUAL.match(interface) is not None


def works_at(addresses: list[str]) -> bool:
    """Whether mDNS can be opened at these addresses of this machine; the log says why not."""
    zeroconf = _open(addresses)
    if zeroconf is None:
        return False
    zeroconf.close()
    return True


class Announcement:
    """A running announcement, until ``close``; inert where mDNS does not work."""

    def __init__(self, info: Callable[[list[str]], ServiceInfo], fixed: list[str] | None) -> None:
        self._info = info
        self._fixed = fixed  # the caller's addresses; None: whatever the machine has
        self._addresses: list[str] = []
        self._zeroconf: Zeroconf | None = None
        self._registration: Future[None] | None = None
        self._closed = False
        self._start(self._now())

    @property
    def active(self) -> bool:
        """Whether anybody can find us by mDNS."""
        return self._zeroconf is not None

    def refresh(self) -> None:
        """Follow the machine's addresses; call it now and then.

        A Pi's network often comes up after its daemons, and addresses change. Costs a
        millisecond, and a quarter of a second when something did change.
        """
        addresses = self._now()
        if not self._closed and addresses != self._addresses:
            self._stop()
            self._start(addresses)

    def close(self) -> None:
        """Say goodbye, so that browsers forget us at once, and stop."""
        self._closed = True
        self._stop()

    def _now(self) -> list[str]:
        return interface_addresses() if self._fixed is None else self._fixed

    def _start(self, addresses: list[str]) -> None:
        self._addresses = addresses
        self._zeroconf = _open(addresses)
        if self._zeroconf is not None:
            assert self._zeroconf.loop is not None
            # Probing for a name conflict and announcing take about a second: not on our time.
            self._registration = asyncio.run_coroutine_threadsafe(
                _register(self._zeroconf, self._info(addresses)), self._zeroconf.loop
            )
            self._registration.add_done_callback(_log_failure)

    def _stop(self) -> None:
        zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is None:
            return
        if self._registration is not None:  # else its last packets could follow the goodbye
            self._registration.cancel()
        try:
            # This one waits for its packets; the synchronous unregister_service does not (it
            # returns with the task that sends them), and close() would cancel that.
            zeroconf.unregister_all_services()
        except (OSError, ZeroconfError, RuntimeError) as error:
            log.warning("no goodbye on mDNS", error=repr(error))
        finally:
            zeroconf.close()


async def _register(zeroconf: Zeroconf, info: ServiceInfo) -> None:
    # Another process of this name on this host: take "name-2". Twice awaited: the second is the
    # sending itself.
    await (await zeroconf.async_register_service(info, allow_name_change=True))


def _log_failure(registration: Future[None]) -> None:
    if not registration.cancelled() and (error := registration.exception()) is not None:
        log.warning("mDNS announcement failed", error=repr(error), hint=STATIC_HINT)


def announce(
    cluster: str,
    port: int,
    *,
    key: str,
    join_port: int,
    protocol: tuple[int, int],
    interfaces: Sequence[str] | None = None,
) -> Announcement:
    """Announce a coordinator that listens on ``port`` of these interfaces' addresses.

    Where that is impossible (port 5353 taken, no interface), it says so and goes on without.
    """
    check_cluster_name(cluster)
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:_HOST_CHARS]
    properties = {
        "cluster": cluster,
        "protocol": f"{protocol[0]}-{protocol[1]}",
        "key": key,
        "join": str(join_port),
    }

    def info(addresses: list[str]) -> ServiceInfo:
        return ServiceInfo(
            SERVICE,
            f"{cluster}@{host}-{port}.{SERVICE}",  # two of a host are two services
            port=port,
            properties=properties,
            parsed_addresses=addresses,
        )

    return Announcement(info, None if interfaces is None else list(interfaces))


def browse(
    cluster: str | None,
    *,
    timeout_s: float,
    interfaces: Sequence[str] | None = None,
    until: int | None = None,
    key: str | None = None,
) -> list[Found]:
    """Coordinators of this cluster (None: of any) heard of within the time, sorted by instance;
    with ``key`` only those that say they have it.

    Returns as soon as ``until`` are found. Looks at DISCOVERED names at most: a flood of forged
    records can hide a coordinator from mDNS, but cost neither memory nor more time than given.
    """
    deadline = time.monotonic() + timeout_s
    addresses = list(interfaces) if interfaces is not None else interface_addresses()
    zeroconf = _open(addresses)
    if zeroconf is None:
        return []
    # Filled by zeroconf's thread; whatever does not fit is not looked at.
    changes: queue.Queue[tuple[str, bool]] = queue.Queue(maxsize=limits.DISCOVERED)

    def changed(name: str, state_change: ServiceStateChange, **_: object) -> None:
        ours = cluster is None or name.startswith(f"{cluster}@")
        if ours and len(name) <= 63 + len(SERVICE) + 1:
            with suppress(queue.Full):
                changes.put_nowait((name, state_change is not ServiceStateChange.Removed))

    try:
        browser = ServiceBrowser(zeroconf, SERVICE, handlers=[changed])
        try:
            return _collect(zeroconf, changes, (cluster, key), deadline, until)
        finally:
            browser.cancel()
    finally:
        zeroconf.close()


def _collect(
    zeroconf: Zeroconf,
    changes: queue.Queue[tuple[str, bool]],
    wanted: tuple[str | None, str | None],
    deadline: float,
    until: int | None,
) -> list[Found]:
    found: dict[str, Found] = {}
    tries: dict[str, int] = {}
    while until is None or len(found) < until:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            break
        try:
            name, there = changes.get(timeout=remaining)
        except queue.Empty:
            break
        if not there:
            found.pop(name, None)
            continue
        if name not in tries and len(tries) >= limits.DISCOVERED:
            continue  # a flood
        if tries.setdefault(name, 0) >= _RESOLVE_TRIES:
            continue  # does not answer, or comes and goes
        tries[name] += 1
        wait_ms = min(_RESOLVE_MS, max(1, int((deadline - time.monotonic()) * 1000)))
        hit = _resolve(zeroconf, name, wanted[0], wait_ms)
        if hit is not None and wanted[1] not in (None, hit.key):
            continue  # another's, or somebody who lies in its name
        if hit is not None:
            found[name] = hit
        else:
            with suppress(queue.Full):
                changes.put_nowait((name, True))  # behind the others
    return [found[name] for name in sorted(found)]


def _resolve(zeroconf: Zeroconf, name: str, cluster: str | None, wait_ms: int) -> Found | None:
    """Ask for a name's address and text; None if they do not come or make no sense."""
    try:
        info = zeroconf.get_service_info(SERVICE, name, timeout=wait_ms)
    except (BadTypeInNameException, ZeroconfError, OSError, RuntimeError):
        return None
    if info is None or not info.port or len(info.text or b"") > limits.DISCOVERY_TXT_BYTES:
        return None
    try:
        fields = {k.decode(): (v or b"").decode() for k, v in info.properties.items()}
    except UnicodeDecodeError:
        return None
    speaks = re.fullmatch(r"(\d{1,5})-(\d{1,5})", fields.get("protocol", ""))
    named, key, join = (fields.get(name, "") for name in ("cluster", "key", "join"))
    hosts = info.parsed_addresses(IPVersion.V4Only)[: limits.DISCOVERED]
    if not speaks or not hosts or not is_key(key):
        return None
    if not re.fullmatch(r"\d{1,5}", join) or not 0 < int(join) < 65536:
        return None
    if not name.startswith(f"{named}@") or (cluster is not None and named != cluster):
        return None
    instance = name.removesuffix(f".{SERVICE}")
    protocol = (int(speaks[1]), int(speaks[2]))
    return Found(named, _nearest(hosts), info.port, protocol, key, int(join), instance)


def _nearest(hosts: list[str]) -> str:
    """Of a coordinator's addresses one on a network of ours, else the first."""
    networks = [
        ipaddress.ip_network(f"{address.address}/{address.netmask}", strict=False)
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and address.netmask
    ]
    near = [h for h in hosts if any(ipaddress.ip_address(h) in network for network in networks)]
    return (near or hosts)[0]


def _open(addresses: list[str]) -> Zeroconf | None:
    """Zeroconf on exactly these addresses (its own choice fails without a default route)."""
    # Others are sorted out here: zeroconf would leave a socket open when it fails on them.
    here = {address.address for found in psutil.net_if_addrs().values() for address in found}
    if not addresses or not here.issuperset(addresses):
        log.warning("no such network interface for mDNS", addresses=addresses, hint=STATIC_HINT)
        return None
    try:
        # In a thread of its own even if the caller has an event loop.
        return Zeroconf(interfaces=addresses, ip_version=IPVersion.V4Only, use_asyncio=False)
    except (OSError, ValueError, RuntimeError) as error:
        log.warning("mDNS does not work here", error=str(error), hint=STATIC_HINT)
        return None
