"""A gate that spoils what passes it, once for each time it is told to: as a bad cable or switch
would, if TCP did not notice. ``spoiler.py HOST``.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from cluster.gate import Gate, serve  # noqa: E402

KINDS = ("flip", "truncate", "duplicate", "reorder")
LEAST_BYTES = 512
"""What is spoiled is tensors, most of the time, not a heartbeat."""


class Spoiler(Gate):
    """Keeps what it is to do next; ``done`` counts what it did."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self._next: list[tuple[str, int]] = []
        self._done = 0

    def spoil(self, kind: str, seed: int) -> None:
        """The next piece that is large enough arrives otherwise than it was sent."""
        self._next.append((kind, seed))

    def done(self) -> int:
        """How many pieces were spoiled so far; those that are still to be are not any more."""
        self._next.clear()
        return self._done

    def passed(self, data: bytes) -> bytes:
        if len(data) < LEAST_BYTES or not self._next:
            return data
        kind, seed = self._next.pop()
        self._done += 1
        rng = random.Random(seed)
        at = rng.randrange(1, len(data) - 1)
        match kind:
            case "flip":
                return data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]
            case "truncate":
                return data[:at]
            case "duplicate":
                return data + data[:at]
            case _:
                return data[at:] + data[:at]


if __name__ == "__main__":
    serve(Spoiler(sys.argv[1]))
