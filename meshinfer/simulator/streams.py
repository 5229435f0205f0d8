"""One stream of random numbers a concern: another draw in one does not shift the others."""

from __future__ import annotations

import random


class Streams:
    """``streams["delay"]`` is the same sequence for the same seed, whatever else is drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._made: dict[str, random.Random] = {}

    def __getitem__(self, concern: str) -> random.Random:
        if concern not in self._made:
            self._made[concern] = random.Random(f"{self.seed} {concern}")
        return self._made[concern]
