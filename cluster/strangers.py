"""Before a port serves anybody: a stranger's key and a client without encryption try it.

An option that was forgotten, or a libzmq that was built without CURVE, would let everybody in and
otherwise be noticed by nobody.
"""

from __future__ import annotations

from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from cluster.keys import KeyPair, generate_keypair
from cluster.sockets import Plane
from meshinfer import limits
from meshinfer.errors import AuthError

_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 (to know it, not to bind there)
_OUTCOMES: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def try_as_stranger(
    context: zmq.Context[Any], plane: Plane, host: str, port: int, key: str
) -> None:
    """Knock at a port of ours, whose public key this is. Raises ``AuthError`` if it lets one in
    that it should not; who gets no answer within GATE_TRIED_S is not let in."""
    place = f"tcp://{'127.0.0.1' if host == _EVERYWHERE else host}:{port}"
    tries: list[tuple[str, KeyPair | None]] = [("without encryption", None)]
    if plane is not Plane.JOIN:  # which is for strangers
        tries.append(("with a key that nobody admitted", generate_keypair()))
    for what, pair in tries:
        if _gets_in(context, place, key, pair):
            raise AuthError(
                f"the {plane} port {port} lets in a client {what}: it does not serve anybody so",
                hint="this Python's libzmq does not do what it should: install pyzmq again, from "
                "a wheel (zmq.has('curve') must be true)",
            )


def _gets_in(context: zmq.Context[Any], place: str, key: str, pair: KeyPair | None) -> bool:
    with context.socket(zmq.DEALER) as knocking:
        knocking.linger = 0
        knocking.reconnect_ivl = -1
        if pair is not None:
            knocking.curve_publickey = pair.public.encode()
            knocking.curve_secretkey = pair.secret.encode()
            knocking.curve_serverkey = key.encode()
        monitor = knocking.get_monitor_socket(_OUTCOMES)
        try:
            knocking.connect(place)
            if not monitor.poll(int(limits.GATE_TRIED_S * 1000)):
                return False
            return bool(recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
        finally:
            knocking.disable_monitor()
            monitor.close(linger=0)
