"""The names of things: devices and graphs. Types only, so that every layer can use them."""

from __future__ import annotations

from typing import NewType

DeviceId = NewType("DeviceId", str)
"""One worker daemon, by its configured or generated name."""

Digest = NewType("Digest", str)
"""SHA-256 of an imported graph, in hex: node indices mean nothing for another."""
