"""A manifest: all that a peer is told to load and do, as the one row of bytes that is signed.

It is the whole ``Install`` or ``Grant``, with the digests of submodels and weights (which fix their
lengths, too), for one peer's one process, by one process of the coordinator. So it says nothing to
another device, nor to this one once either side has begun anew.
"""

from __future__ import annotations

import msgspec

from meshinfer.protocol.messages import UNSIGNED, Grant, Install

_PURPOSE = "meshinfer manifest 1"
"""What such a signature means; whatever else the key may sign one day begins otherwise."""

_encoder = msgspec.msgpack.Encoder(order="deterministic")


def manifest(message: Install | Grant, peer: str, coordinator: str) -> bytes:
    """The bytes to sign and to verify. ``peer``: to whom it goes; ``coordinator``: the incarnation
    of the one that says so."""
    plain = msgspec.structs.replace(message, signature=UNSIGNED)
    return _encoder.encode((_PURPOSE, coordinator, peer, plain))
