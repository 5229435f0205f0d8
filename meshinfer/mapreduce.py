"""The map (cut a value into boxes) and the reduce (place or add shards into a value).

Parts of a sum are added in the order of ``over``, so that a second attempt agrees bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meshinfer.geometry import Box
from meshinfer.plan import Shard

Array = np.ndarray[Any, Any]


def scatter(array: Array, held: Box, wanted: Box) -> Array:
    """A view of ``wanted`` in an array that holds the box ``held``; the array itself when equal."""
    return array if held == wanted else array[wanted.within(held)]


def reduce(box: Box, pieces: Sequence[tuple[Shard, Array]]) -> Array:
    """The array of ``box`` from pieces that cover it once (each reduction once as well).

    One piece that is the whole box is returned as it is; otherwise each is copied into its place of
    a new array. On a device only parts of a sum come here: other pieces are received into place.
    """
    first, array = pieces[0]
    if len(pieces) == 1 and first.box == box:
        return array
    assert all(piece.box.shape == a.shape for piece, a in pieces), "a piece of the wrong shape"
    partial = any(piece.over is not None for piece, _ in pieces)
    result = (np.zeros if partial else np.empty)(box.shape, dtype=array.dtype)
    for piece, part in sorted(pieces, key=_by_part):
        place = piece.box.within(box)
        if partial:
            result[place] += part
        else:
            result[place] = part
    return result


def _by_part(piece: tuple[Shard, Array]) -> tuple[Box, Box]:
    shard = piece[0]
    return (shard.over if shard.over is not None else Box(()), shard.box)
