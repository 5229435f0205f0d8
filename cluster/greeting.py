"""Whether what listens at an address is encrypted, by its first words.

Of two sides that differ in that, the one that sees it first hangs up, and the other has not always
read why by then. Who says nothing of itself yet is told the other's mechanism in peace.
"""

from __future__ import annotations

import socket
import time
from typing import Final

from meshinfer import limits

# ZMTP 3.1 (ZeroMQ RFC 37): signature, version, and a mechanism of 20 bytes.
_SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"
_VERSION: Final = b"\x03"
_GREETED: Final = 32


def mechanism_at(host: str, port: int) -> str:
    """CURVE, NULL or PLAIN; empty if nobody says so within GREETING_S."""
    deadline = time.monotonic() + limits.GREETING_S
    heard = b""
    try:
        with socket.create_connection((host, port), limits.GREETING_S) as asking:
            asking.sendall(_SIGNATURE + _VERSION)
            while len(heard) < _GREETED:
                asking.settimeout(max(0.01, deadline - time.monotonic()))
                data = asking.recv(_GREETED - len(heard))
                if not data:
                    break
                heard += data
    except OSError:
        pass
    if len(heard) == _GREETED and heard[0] == 0xFF and heard[9] & 1 and heard[10] >= 3:
        return heard[12:32].rstrip(b"\0").decode("ascii", "replace")
    return ""
