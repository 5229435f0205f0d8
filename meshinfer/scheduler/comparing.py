"""By how much two devices' results of one task differ, and whether a piece is what was asked for.

Values that are not finite are no fault by themselves (masks, padding): only if another device has
finite ones in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Array, Effect
from meshinfer.scheduler.installing import Deployment
from meshinfer.scheduler.telling import told

FAR = 1e9
"""An error without bound, as it travels."""


@dataclass(frozen=True, slots=True)
class Difference:
    """As in ``m.Checked``: the worst of a task's outputs."""

    error: float = 0.0
    spread: float = 0.0
    unequal: bool = False


def difference(
    theirs: Sequence[Array], ours: Sequence[Array], inputs: Iterable[Array]
) -> Difference:
    """Between the outputs of one task on two devices, which had the same inputs."""
    worst = Difference()
    least = -1.0
    for a, b in zip(theirs, ours, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return Difference(FAR, FAR, unequal=True)
        if np.array_equal(a, b):
            continue
        if a.dtype.kind == "b" or (a.dtype.kind != "f" and a.dtype.itemsize > 1):
            worst = Difference(worst.error, worst.spread, unequal=True)
            continue
        if least < 0.0:  # rarely needed
            least = limits.CHECK_LEAST * max(map(_largest, inputs), default=0.0)
        error, spread = _apart(a, b, least)
        worst = Difference(max(worst.error, error), max(worst.spread, spread), worst.unequal)
    return worst


def _largest(array: Array) -> float:
    """Of its finite values."""
    if array.dtype.kind == "f":
        return float(np.abs(np.where(np.isfinite(array), array, 0)).max(initial=0.0))
    return float(np.abs(array.astype(np.float64)).max(initial=0.0))


def _apart(a: Array, b: Array, least: float) -> tuple[float, float]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)):
        return FAR, FAR
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return FAR, FAR
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    apart = a - b
    largest = max(float(np.abs(a).max()), float(np.abs(b).max()), least)
    norm = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)), least)
    error, spread = float(np.abs(apart).max()) / largest, float(np.linalg.norm(apart)) / norm
    return min(error, FAR), min(spread, FAR)


def doubts(made: Deployment, piece: m.Deliver, peer: str, array: Array) -> list[Effect]:
    """Tell the coordinator of a piece that is not what is awaited, or whose values are not all
    finite; of those once for each task, since they may be meant."""
    recipe = made.recipes.get(piece.consumer)
    slot = None if recipe is None else recipe.slots.get(piece.slot)
    if recipe is None or slot is None:
        return []
    why = ""
    if not slot.fits(array):
        why = f"{slot.shard.value} came as {array.dtype} of shape {array.shape}"
    elif array.dtype.kind != "f" or np.isfinite(array).all():
        return []
    pieces = (p for value in recipe.program.inputs for p in value.pieces)
    producer = next(p.producer for p in pieces if p.slot == piece.slot)
    if not why and (producer in made.odd or producer[0] < 0):  # the user's own are the user's
        return []
    made.odd.add(producer)
    name, attempt = piece.request, piece.attempt
    return [told(m.Doubtful(request=name, attempt=attempt, place=producer, peer=peer, why=why))]
