"""Who may connect, and under which name: a key that is not on the list gets no session, ever.

libzmq asks on every new connection, by inproc (ZAP, ZeroMQ RFC 27). Servers set
ZAP_ENFORCE_DOMAIN, so when the gatekeeper's thread is gone, nobody is admitted.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog
import zmq
from zmq.utils import z85

from meshinfer import limits
from meshinfer.protocol.joining import Admission
from meshinfer.protocol.token import client_name

log = structlog.get_logger(__name__)

WORK_DOMAIN: Final = "meshinfer"
"""Of control and bulk sockets: the keys on the list, no other."""
JOIN_DOMAIN: Final = "meshinfer.join"
"""Of the join socket: any key, but only by CURVE, and so many a second."""

COORDINATORS: Final = frozenset({"coordinator", "head"})
"""The names of the coordinator's key: its own, and its host's device's."""
CLIENTS: Final = "client-"

_ADMITTED: Final = b"200", b"OK"
_TEMPORARY: Final = b"300", b"key not known yet"
_REFUSED: Final = b"400", b"key not admitted"
_BUSY: Final = b"500", b"too many strangers"
_ADDRESS: Final = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True)
class _Entry:
    """``names``: what its holder may call itself; ``begin``: or what begins with this."""

    admission: Admission
    names: frozenset[str]
    begin: str = ""

    def may_be(self, device: str) -> bool:
        return device in self.names or (self.begin != "" and device.startswith(self.begin))


class GateList:
    """The keys that are admitted, each under its name. ``always``: whatever the list says.

    Replaced as a whole, never changed, so any thread may read it.
    """

    def __init__(self, always: Iterable[Admission] = ()) -> None:
        self._always = {each.key: _entry(each, founder=True) for each in always}
        self._entries: Mapping[str, _Entry] = dict(self._always)
        self._known: frozenset[str] = frozenset(self._entries)

    def replace(self, members: Iterable[Admission]) -> frozenset[str]:
        """Admit these from now on; the keys that are admitted no more, or not under that name."""
        before = self._entries
        entries = {each.key: _entry(each, founder=False) for each in members} | self._always
        self._known |= entries.keys()
        if len(self._known) > _REMEMBERED:
            self._known = frozenset(before) | frozenset(entries)
        self._entries = entries
        return frozenset(key for key in before if entries.get(key) != before[key])

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def may_be(self, key: str, device: str) -> bool:
        """Whether the holder of this key may call itself so."""
        entry = self._entries.get(key)
        return entry is not None and entry.may_be(device)

    def was_here(self, key: str) -> bool:
        return key in self._known


_REMEMBERED: Final = 4 * limits.ADMITTED_KEYS


def _entry(admission: Admission, *, founder: bool) -> _Entry:
    name = admission.name
    if admission.role != "worker":
        name = client_name(admission.key)
        return _Entry(admission, frozenset({name}), f"{name}-")
    if name in COORDINATORS:
        return _Entry(admission, COORDINATORS if founder else frozenset())
    return _Entry(admission, frozenset() if name.startswith(CLIENTS) else frozenset({name}))


class Gatekeeper:
    """Answers libzmq's ZAP requests of one context, in a thread, by a ``GateList``.

    ``unknown_is_temporary``: a key that is not on the list, and never was, is turned away such
    that its holder tries again by itself (ZAP 300), for the list may be on its way; else for good.
    """

    def __init__(
        self, context: zmq.Context[Any], admitted: GateList, *, unknown_is_temporary: bool = False
    ) -> None:
        self._admitted = admitted
        self.unknown_is_temporary = unknown_is_temporary
        self._strangers = Rate(limits.JOIN_HANDSHAKES_PER_S, limits.JOIN_HANDSHAKES)
        self._too_early: deque[str] = deque(maxlen=limits.WAITING_KEYS)
        self.answered: Counter[str] = Counter()
        # libzmq asks as a REQ would; ROUTER, unlike REP, stays usable after a bad request.
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        try:
            self._socket.bind(_ADDRESS)
        except zmq.ZMQError:
            self._socket.close()
            raise
        self._stop_send, self._stop_receive = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="gatekeeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close its socket; from then on every connection is refused."""
        if self._stop_send.fileno() < 0:
            return
        self._stop_send.close()
        self._thread.join(timeout=5.0)
        self._stop_receive.close()

    def turned_away_too_early(self) -> bool:
        """Whether one who was to try again is on the list by now; asked anew, only those since."""
        early = [self._too_early.popleft() for _ in range(len(self._too_early))]
        still = [key for key in early if key not in self._admitted]
        self._too_early.extend(still)
        return len(still) < len(early)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_receive, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._stop_receive.fileno() in ready:
                    return
                if self._socket in ready:
                    self._answer_one()
        except zmq.ContextTerminated:
            pass
        except Exception as error:
            log.error("the gatekeeper died; every connection is refused now", error=repr(error))
        finally:
            self._socket.close()

    def _answer_one(self) -> None:
        request = self._socket.recv_multipart()
        try:
            verdict, public = self._judge(request)
        except Exception as error:  # a bug here must refuse this one, not stop the gate
            # No traceback: console renderers add local variables, slowly, and the peer waits.
            log.error("a connection was refused because judging it failed", error=repr(error))
            verdict, public = _REFUSED, ""
        self.answered[verdict[0].decode()] += 1
        if len(request) < 4:
            return  # nothing to answer to; the handshake times out, which is a refusal
        # Envelope and request id are repeated; the user id is the key, for the transport to check.
        user = public.encode() if verdict is _ADMITTED else b""
        self._socket.send_multipart([request[0], b"", b"1.0", request[3], *verdict, user, b""])

    def _judge(self, request: list[bytes]) -> tuple[tuple[bytes, bytes], str]:
        """The verdict, and the caller's public key. Request: RFC 27, after the envelope."""
        if len(request) != 9:
            return _REFUSED, ""
        _route, empty, version, _id, domain, _address, _identity, mechanism, key = request
        if (empty, version, mechanism) != (b"", b"1.0", b"CURVE") or len(key) != 32:
            return _REFUSED, ""
        public = z85.encode(key).decode("ascii")
        if domain == JOIN_DOMAIN.encode():
            return (_ADMITTED if self._strangers.take() else _BUSY), public
        if domain != WORK_DOMAIN.encode():
            return _REFUSED, ""
        if public in self._admitted:
            return _ADMITTED, public
        if not self.unknown_is_temporary or self._admitted.was_here(public):
            return _REFUSED, public
        self._too_early.append(public)
        return _TEMPORARY, public


class Rate:
    """At most ``per_s`` a second, and ``at_once`` after a rest. For one thread."""

    def __init__(self, per_s: float, at_once: int) -> None:
        self._per_s, self._at_once = per_s, at_once
        self._left, self._since = float(at_once), time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._left = min(self._at_once, self._left + (now - self._since) * self._per_s)
        self._since = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
