"""What a worker computes, written where its supervisor reads it after any end: a shared page.

A page that both have mapped outlives whoever is killed, and costs a task two writes and no disk.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any

_BYTES = 4096
_LENGTH_BYTES = 4


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
        stage, task = place  # by hand: json.dumps takes ten times as long, at each task
        what = f'"request": {_quoted(request)}, "attempt": {attempt}, "place": [{stage}, {task}]'
        text = f"{{{what}}}".encode("ascii")
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
            found = json.loads(self._page[_LENGTH_BYTES : _LENGTH_BYTES + length])
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}
