"""What a worker computes, written where its supervisor reads it after any end: a shared page.

A page that both have mapped outlives whoever is killed, and costs a task two writes and no disk.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import msgspec

_BYTES = 4096
_LENGTH_BYTES = 4
_encode, _decode = (
    msgspec.json.Encoder().encode,
    msgspec.json.Decoder().decode,
)


def new_page() -> int:
    """A page of zeros that a child may inherit; its descriptor. The supervisor makes it."""
    try:
        page = os.memfd_create("meshinfer-doing")
    except (AttributeError, OSError):  # not Linux, or an old kernel: a file without a name
        page, path = tempfile.mkstemp(prefix="meshinfer-doing-")
        os.unlink(path)
    os.ftruncate(page, _BYTES)
    return page


class Doing:
    """The page, from either side. ``descriptor`` below 0: there is none, nobody will read it."""

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, _BYTES) if descriptor >= 0 else mmap.mmap(-1, _BYTES)

    def begin(self, request: str, attempt: int, place: tuple[int, int]) -> None:
        """A kernel starts. The length goes last: what is half written was never there."""
        text = _encode({"request": request, "attempt": attempt, "place": place})
        if len(text) > _BYTES - _LENGTH_BYTES:
            return
        self._page[_LENGTH_BYTES : _LENGTH_BYTES + len(text)] = text
        self._page[:_LENGTH_BYTES] = len(text).to_bytes(_LENGTH_BYTES, "little")

    def end(self) -> None:
        """Nothing computes."""
        self._page[:_LENGTH_BYTES] = bytes(_LENGTH_BYTES)

    def read(self) -> dict[str, Any]:
        """What computes, or did when the process ended: request, attempt and place, or nothing."""
        length = int.from_bytes(self._page[:_LENGTH_BYTES], "little")
        if not 0 < length <= _BYTES - _LENGTH_BYTES:
            return {}
        try:
            found = _decode(self._page[_LENGTH_BYTES : _LENGTH_BYTES + length])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return {}
        return found if isinstance(found, dict) else {}
