"""A run's history: one JSON object a line, each with its kind and the machine's monotonic time.

Several processes append to one file: a line is a single write, so that none is torn. Who reads
meanwhile may see the half of the last one (a run of C23 broke off for it): it is not there yet.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class History:
    """Appends to a file. Used by any thread of any process of one machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, kind: str, **fields: Any) -> None:
        """``at`` among the fields: the event was then, not now."""
        event = {"at": time.monotonic(), "kind": kind, **fields}
        os.write(self._file, json.dumps(event).encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> list[Event]:
    """All events in the order of their times, but one that is being written just now."""
    lines = path.read_text().split("\n")[:-1]
    return sorted((json.loads(line) for line in lines), key=lambda event: event["at"])
