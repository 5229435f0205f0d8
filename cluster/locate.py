"""Where the coordinator is: the given address, else $MESHINFER_COORDINATOR, else mDNS."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress

from cluster.discovery import browse
from meshinfer.errors import ConfigurationError, InvalidInput
from meshinfer.protocol.records import BESIDE_COORDINATOR

DEFAULT_PORT = 7433
VARIABLE = "MESHINFER_COORDINATOR"
_CONNECT_S = 1.0


def parse_address(text: str) -> tuple[str, int]:
    """``HOST`` or ``HOST:PORT``. Raises ``InvalidInput``."""
    host, _, port = text.rpartition(":")
    if not host:
        host, port = text, str(DEFAULT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidInput(f"{text!r} is no address", hint="give HOST or HOST:PORT")
    return host, int(port)


def find_coordinator(
    address: str | None,
    cluster: str,
    *,
    timeout_s: float,
    key: str | None = None,
    interfaces: Sequence[str] | None = None,
) -> tuple[str, int] | None:
    """Host and port of the cluster's coordinator; None when nobody announced one in time.

    ``key``: the coordinator's public key; whoever announces another is passed over. mDNS is a hint
    only: that the right one answers is proven by CURVE.
    """
    address = address or os.environ.get(VARIABLE)
    if address:
        return parse_address(address)
    found = browse(cluster, timeout_s=timeout_s, interfaces=interfaces, until=1, key=key)
    return (found[0].host, found[0].port) if found else None


def answering(address: str | None) -> tuple[str, int] | None:
    """This address, if somebody listens there."""
    if address is None:
        return None
    host, port = parse_address(address)
    with suppress(OSError), socket.create_connection((host, port), timeout=_CONNECT_S):
        return host, port
    return None


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
