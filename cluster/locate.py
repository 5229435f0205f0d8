"""Where the coordinator is: the given address, else $MESHINFER_COORDINATOR, else mDNS."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import msgspec

from cluster.discovery import browse
from cluster.keys import generate_keypair
from cluster.sockets import Endpoint, Plane
from cluster.transport import Transport
from meshinfer.errors import ConfigurationError, InvalidInput
from meshinfer.protocol.records import BESIDE_COORDINATOR

DEFAULT_PORT = 7433
VARIABLE = "MESHINFER_COORDINATOR"
NOT_FOUND_HINT: Final = (
    "start meshinfer coordinator, or give its address: --coordinator HOST:PORT; "
    "`meshinfer doctor` with that, run here, tells why it is not found"
)
_CONNECT_S, _POLL_S = 1.0, 0.01
_PEER = "coordinator"


def parse_address(text: str) -> tuple[str, int]:
    """``HOST`` or ``HOST:PORT``. Raises ``InvalidInput``."""
    host, _, port = text.rpartition(":")
    if not host:
        host, port = text, str(DEFAULT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidInput(f"{text!r} is no address", hint="give HOST or HOST:PORT")
    return host, int(port)


class Where(msgspec.Struct, frozen=True):
    """Where a coordinator listens: to its peers, and to strangers."""

    host: str
    port: int
    join_port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def find_coordinator(
    address: str | None,
    cluster: str,
    *,
    timeout_s: float,
    key: str | None = None,
    interfaces: Sequence[str] | None = None,
    last: Where | None = None,
) -> tuple[str, int] | None:
    """Host and port of the cluster's coordinator: as given, else where it was ``last``, else where
    mDNS says; None when nobody was found in time.

    ``key``: the coordinator's public key; whoever does not hold it is passed over, for mDNS is a
    hint only, and addresses change hands. None: anyone is believed, without encryption.
    """
    address = address or os.environ.get(VARIABLE)
    if address:
        return parse_address(address)
    if last is not None and holds_key(last, key):
        return last.host, last.port
    deadline = time.monotonic() + timeout_s
    tried: set[Where] = set()
    for until in (1, None):  # at most the first is a liar: most often there is but one
        left_s = max(0.0, deadline - time.monotonic())
        for each in browse(cluster, timeout_s=left_s, interfaces=interfaces, until=until, key=key):
            where = Where(each.host, each.port, each.join_port)
            if where not in tried and holds_key(where, key):
                return where.host, where.port
            tried.add(where)
        if not tried:
            break
    return None


def holds_key(where: Where, key: str | None) -> bool:
    """Whether who listens there proves by a handshake that it has this key; without one, whether
    anybody listens."""
    if key is None:
        with suppress(OSError), socket.create_connection((where.host, where.port), _CONNECT_S):
            return True
        return False
    transport = Transport("stranger#0", generate_keypair())  # the join socket takes any
    try:
        transport.connect(Plane.JOIN, _PEER, Endpoint(where.host, where.join_port, key))
        deadline = time.monotonic() + _CONNECT_S
        while time.monotonic() < deadline:
            lost = transport.receive(_POLL_S)
            if transport.is_up(Plane.JOIN, _PEER):
                return True
            if lost:
                return False
        return False
    finally:
        transport.close()


def local_address(towards: str) -> str:
    """The address of ours that a peer at ``towards`` can reach (nothing is sent)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))
            return str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigurationError(
                f"no route to the coordinator at {towards}: {error.strerror}",
                hint="check the address and the network",
            ) from error


def own_place(towards: str) -> str:
    """Machine and address of this process, as of a device there; ``BESIDE_COORDINATOR`` where the
    coordinator is, empty where there is no route to it."""
    try:
        own = local_address(towards)
        beside = own == socket.gethostbyname(towards)
        return BESIDE_COORDINATOR if beside else f"{socket.gethostname()} {own}"
    except (OSError, ConfigurationError):
        return ""
