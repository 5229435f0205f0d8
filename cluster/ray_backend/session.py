"""This process's one connection to Ray: imported when it is asked for, joined once, and left when
the last client that made it is closed. Who has called ``ray.init`` before keeps what they have."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from typing import Any

from cluster.locate import parse_address
from cluster.ray_backend.address import SCHEME
from cluster.ray_backend.probe import probe
from meshinfer.errors import ClusterUnavailable, ConfigurationError, InvalidInput

LEAST = (2, 60)
"""What this was tested with; token authentication came with 2.52."""
_INSTALL = "pip install 'meshinfer[ray]'"
_JOIN_S = 30.0
_QUIET = "RAY_IGNORE_UNHANDLED_ERRORS"

_lock = threading.Lock()
_clients = 0
"""Open ones that use a connection which we have made."""


def imported(*, data: bool = False) -> Any:
    """The ``ray`` module; ``data``: with Ray Data, too. Raises ``ConfigurationError``."""
    try:
        import ray

        if data:
            import ray.data
    except ImportError as error:
        raise ConfigurationError(
            f"Ray is not installed here: {error}", hint=f"install it: {_INSTALL}"
        ) from error
    release = tuple(int(n) for n in re.findall(r"\d+", ray.__version__)[:2])
    if release < LEAST:
        raise ConfigurationError(
            f"Ray {ray.__version__} is not supported",
            hint=f"install {'.'.join(map(str, LEAST))} or later: {_INSTALL}",
        )
    return ray


def gcs_address(address: str) -> str:
    """``auto`` or HOST:PORT of a ``ray://`` address. Raises ``InvalidInput``."""
    text = address.removeprefix(SCHEME)
    if text == "auto":
        return text
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidInput(
            f"{address!r} is no address of a Ray cluster",
            hint="give ray://auto, or ray://HOST:PORT of its head's GCS (6379 by default)",
        )
    return text


def join(address: str, timeout_s: float) -> tuple[Any, bool]:
    """``ray``, connected, and whether to ``leave`` it once. Raises ``ConfigurationError``,
    ``InvalidInput``, ``ClusterUnavailable``, ``AuthError``."""
    global _clients
    where, ray = gcs_address(address), imported()
    with _lock:
        if ray.is_initialized():
            _check_same(ray, where)
            _clients += _clients > 0
            return ray, _clients > 0
        ends = time.monotonic() + timeout_s
        if where != "auto":
            _reach(where, timeout_s)
        probe(where, max(1.0, ends - time.monotonic()))
        _init(ray, where)
        _clients = 1
        return ray, True


def leave(ray: Any) -> None:
    global _clients
    with _lock:
        _clients -= 1
        if not _clients:
            with contextlib.suppress(Exception):  # whatever has become of the cluster
                ray.shutdown()


def _init(ray: Any, where: str) -> None:
    """In a thread: a cluster that has ended since would hold us for minutes.

    What nobody asks for any more fails with the node that was to make it; Ray would print that.
    """
    os.environ.setdefault(_QUIET, "1")
    failed: list[BaseException] = []

    def init() -> None:
        try:
            ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=init, name="ray-init", daemon=True)
    thread.start()
    thread.join(_JOIN_S)
    if thread.is_alive() or failed:
        why = failed[0] if failed else f"it does not answer within {_JOIN_S:.0f} s"
        raise ClusterUnavailable(
            f"the Ray cluster at {where} was there and cannot be joined now: {why}",
            hint="look at it with ray status",
        )


def _check_same(ray: Any, where: str) -> None:
    here = ray.get_runtime_context().gcs_address
    if where == "auto":
        return
    (host, port), (own, own_port) = parse_address(where), parse_address(here)
    if port != own_port or _numeric(host) not in (_numeric(own), "127.0.0.1"):
        raise InvalidInput(
            f"this process is connected to the Ray cluster at {here}, not at {where}",
            hint="give ray://auto, or call ray.shutdown() first",
        )


def _numeric(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return host


def _reach(where: str, timeout_s: float) -> None:
    """Ray would try for more than a minute where nobody listens."""
    host, port = parse_address(where)
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        raise ClusterUnavailable(
            f"no Ray cluster is at {where}: {error.strerror or error}",
            hint="start one (ray start --head), and give the address of its GCS: ray://HOST:6379",
        ) from error
