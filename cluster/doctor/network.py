"""Probes of the network: interfaces, a port, and mDNS, also asked of one host alone."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Final

import psutil

from cluster.discovery import SERVICE, Found, browse, interface_addresses, is_virtual, works_at
from cluster.keyring import Keyring
from cluster.locate import local_address
from cluster.sockets import FINAL, Endpoint, Lost, Plane
from cluster.transport import Transport
from meshinfer.doctor import Heard, Interface, Multicast, Reached
from meshinfer.errors import AuthError, ClusterUnavailable, ConfigurationError

_CONNECT_S: Final = 2.0
_POLL_S: Final = 0.02
_PEER: Final = "coordinator"
_AT_ONCE: Final = 32
_LISTEN_S: Final = 2.5
_SECOND_S: Final = 1.5  # a busy device answers late
_DIRECT_S: Final = 1.0
_DIRECT_TRIES: Final = 3
_MDNS_PORT: Final = 5353
_PTR, _IN = 12, 1  # RFC 1035
_DATAGRAM_BYTES: Final = 9000


def interfaces() -> list[Interface]:
    """Every IPv4 address of this machine."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return [
        Interface(
            name,
            each.address,
            up=name in up,
            loopback=ipaddress.ip_address(each.address).is_loopback,
            skipped=is_virtual(name),
        )
        for name, addresses in sorted(psutil.net_if_addrs().items())
        for each in addresses
        if each.family == socket.AF_INET
    ]


def way_to(host: str) -> str | None:
    """Our address towards a host; None without a route or a host of this name."""
    try:
        return local_address(host)
    except (ConfigurationError, OSError):
        return None


def reach_all(places: Sequence[tuple[str, int, str]]) -> list[Reached]:
    """Connect to each (host, port, what it is) at once: what is silent takes its time."""
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return list(pool.map(lambda place: reach(*place), places))


def reach(host: str, port: int, what: str = "coordinator") -> Reached:
    """Connect, and nothing more."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return Reached(host, port, "open", what)
    except ConnectionRefusedError:
        outcome = "refused"
    except TimeoutError:
        outcome = "silent"
    except socket.gaierror:
        outcome = "unknown host"
    except OSError as error:
        outcome = "refused" if error.errno == errno.ECONNRESET else os.strerror(error.errno or 0)
        # The neighbour does not answer to ARP: it is off, or its cable is out.
        outcome = "silent" if error.errno == errno.EHOSTUNREACH else outcome
    return Reached(host, port, outcome, what)


def try_key(ring: Keyring, host: str, port: int, timeout_s: float) -> None:
    """Connect with a key. Raises ``AuthError`` where it is refused, ``ClusterUnavailable``."""
    transport = Transport(f"{ring.name}#doctor", ring.key, plaintext=ring.plaintext)
    deadline = time.monotonic() + timeout_s
    try:
        transport.connect(Plane.CONTROL, _PEER, Endpoint(host, port, ring.coordinator_public))
        while time.monotonic() < deadline:
            for lost in transport.receive(_POLL_S):
                if isinstance(lost, Lost) and lost.reason in FINAL:
                    raise refusal(host, port, lost.reason)
            if transport.is_up(Plane.CONTROL, _PEER):
                return
    finally:
        transport.close()
    raise ClusterUnavailable(
        f"the coordinator at {host}:{port} does not answer in {timeout_s:g} s",
        hint="is it running? The port's finding says more",
    )


def refusal(host: str, port: int, why: str) -> AuthError:
    return AuthError(
        f"the coordinator at {host}:{port} does not let us in: {why}",
        hint="join anew with a token, which meshinfer token makes there",
    )


def is_taken(host: str, port: int) -> bool:
    """Whether a port cannot be listened at."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def listen(cluster: str, asked: Sequence[str] | None, known: str) -> Multicast:
    """What mDNS tells of a cluster. ``known``: a host to ask by itself, if nothing is heard.

    It is asked meanwhile. Other interfaces than those ``asked`` come after them: a socket hears
    what comes in at any interface on which some socket of this machine listens.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        direct = pool.submit(asked_directly, known, cluster) if known else None
        found = browse(cluster, timeout_s=_LISTEN_S, interfaces=asked or None, until=1)
        if found:  # there may be more than one
            found = browse(cluster, timeout_s=_SECOND_S, interfaces=asked or None) or found
        elsewhere: list[Found] = []
        if not found and asked:
            elsewhere = browse(cluster, timeout_s=_LISTEN_S, until=1)
        return Multicast(
            cluster=cluster,
            opened=works_at(list(asked) if asked else interface_addresses()),
            heard=tuple(map(_heard, found)),
            elsewhere=tuple(map(_heard, elsewhere)),
            direct=direct.result() if direct and not found else None,
        )


def _heard(found: Found) -> Heard:
    return Heard(found.host, found.port, found.key, found.protocol)


def asked_directly(host: str, cluster: str) -> bool:
    """Whether a host's mDNS answers a question for our service that goes to it alone (RFC 6762,
    5.5 and 6.7): it does where only multicast is filtered."""
    name = b"".join(bytes([len(label)]) + label for label in SERVICE.encode().split(b"."))
    question = struct.pack(">6H", 0, 0, 1, 0, 0, 0) + name + struct.pack(">2H", _PTR, _IN)
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        for _ in range(_DIRECT_TRIES):
            deadline = time.monotonic() + _DIRECT_S
            with suppress(OSError):
                probe.sendto(question, (host, _MDNS_PORT))
                while (left := deadline - time.monotonic()) > 0:
                    probe.settimeout(left)
                    answer = probe.recv(_DATAGRAM_BYTES)
                    if f"{cluster}@".encode() in answer and answer[2:3] >= b"\x80":  # a response
                        return True
    return False
