"""Which axis of each value is cut, for each kind of split.

The rows of a picture are followed through the graph by asking each rule which slice of its output
reads a slice of the rows; so are its columns, and the images of a batch. Where none does (a
flatten, a Gemm) the largest axis is cut. A mean over the rows may be cut into partial sums, one of
each band.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from meshinfer.cost.model import GLUED
from meshinfer.geometry import Interval
from meshinfer.graph import Graph, Op
from meshinfer.ops import BARRIER, rule_of

Kind = Literal["rows", "channels", "batch", "grid", "slabs"]
KINDS: tuple[Kind, ...] = ("rows", "channels", "batch", "grid", "slabs")
"""A grid is rows x columns, slabs are rows x channels: shorter borders, and even parts of maps with
few rows."""


@dataclass(frozen=True, slots=True)
class Axes:
    """The axis of each value that is cut, for each kind of split; None: the value stays whole."""

    rows: Mapping[str, int | None]
    columns: Mapping[str, int | None]
    channels: Mapping[str, int | None]
    batch: Mapping[str, int | None]
    follows: frozenset[int]
    """Ops whose output rows read just some of their input's rows: a band stays a band."""
    sums: Mapping[str, int]
    """Values that sum over rows, so that bands of rows give parts of the sum: value -> position of
    the rows among the axes of the reduction."""
    rowed: frozenset[str]
    """Values whose ``rows`` are rows of an input still, and not features that are cut instead."""

    def of(self, value: str, kind: Kind) -> int | None:
        """The first axis that this kind of split cuts."""
        if kind == "channels":
            return self.channels.get(value)
        return (self.batch if kind == "batch" else self.rows).get(value)

    def inner(self, value: str, kind: Kind) -> int | None:
        """The second one, of a grid or of slabs."""
        if kind not in ("grid", "slabs"):
            return None
        return (self.columns if kind == "grid" else self.channels).get(value)

    def kinds(self, parts: int) -> tuple[Kind, ...]:
        """The kinds of split into so many parts that this graph has at all."""
        few = ("grid", "slabs") if parts < FEWEST_CELLS else ()
        return tuple(k for k in KINDS if k not in few and (k != "batch" or self.batch))


FEWEST_CELLS = 4
"""Fewer parts than this are bands, and no grid."""


def axes_of(graph: Graph, *, sums: bool = True) -> Axes:
    """Follows rows, and the batch if there is one, front to back. ``sums``: partial sums may be
    used, which agree with whole ones to rounding only."""
    rows: dict[str, int | None] = {name: _input_axis(graph, name, 2) for name in graph.inputs}
    channels: dict[str, int | None] = {}
    follows: set[int] = set()
    added: dict[str, int] = {}
    rowed = set(graph.inputs)
    for op in graph.ops:
        for name in op.outputs:
            rows[name] = channels[name] = None
        able = _able(op)
        if not able:
            continue
        shape = op.out_shape()
        rank = len(shape)
        found = _following(op, able, rows)
        if found is not None:
            follows.add(op.index)
            axis, fine = found[0], found[1] in rowed
        else:
            fine = False
            position = _summing(op, rows) if sums else None
            if position is not None:
                added[op.outputs[0]] = position
            axis = 2 if rank == 4 and 2 in able else max(able, key=lambda a: (shape[a], -a))
        for position, name in enumerate(op.outputs):
            if name and len(op.out_shape(position)) == rank:
                rows[name] = axis
                rowed.update((name,) if fine else ())
                channels[name] = 1 if 1 in able and rank >= 3 else axis
    columns = _traced(graph, {name: _input_axis(graph, name, 3) for name in graph.inputs})
    batch = {name: _batch_axis(graph, name) for name in graph.inputs}
    return Axes(
        rows=rows,
        columns=columns,
        channels=channels,
        batch=_traced(graph, batch) if any(a is not None for a in batch.values()) else {},
        follows=frozenset(follows),
        sums=added,
        rowed=frozenset(rowed),
    )


def _able(op: Op) -> list[int]:
    """Axes of the first output that can be cut with a gain."""
    rule = rule_of(op)
    if rule is BARRIER:
        return []
    shape = op.out_shape()
    return sorted({a % len(shape) for a in rule.split(op) if shape[a % len(shape)] > 1})


def _batch_axis(graph: Graph, name: str) -> int | None:
    shape = graph.shape(name) or ()
    return 0 if len(shape) > 1 and shape[0] > 1 else None


def _traced(graph: Graph, found: dict[str, int | None]) -> dict[str, int | None]:
    """An axis of the inputs, followed to that axis of each value along which it lies."""
    if all(axis is None for axis in found.values()):
        return {}
    for op in graph.ops:
        able = _able(op)
        followed = _following(op, able, found) if able else None
        axis = followed[0] if followed is not None else None
        for position, name in enumerate(op.outputs):
            same = name and able and len(op.out_shape(position)) == len(op.out_shape())
            found[name] = axis if same else None
    return found


def _input_axis(graph: Graph, name: str, which: int) -> int | None:
    """The axis of an input picture, video or signal with its rows (``which`` is 2): what is long
    and not channels; or of a picture with its columns (3).

    For NHWC, what a first Transpose makes axis ``which``.
    """
    shape = graph.shape(name) or ()
    if len(shape) not in (3, 4, 5) or (which == 3 and len(shape) != 4):
        return None
    longest = max(range(2, len(shape)), key=lambda a: (len(shape) != 4 and shape[a], -a))
    same = {name}
    for op in graph.ops:
        if same & set(op.inputs):
            if op.type == "Transpose" and len(shape) == 4:
                return int(op.attributes.get("perm", (3, 2, 1, 0))[which])
            if op.type not in GLUED:
                break
            same.update(op.outputs)
    return longest if which == 2 else which


def _summing(op: Op, rows: Mapping[str, int | None]) -> int | None:
    """Which axis of the reduction is an input's rows, so that a band of them gives a part."""
    rule = rule_of(op)
    whole = rule.reduction(op)
    if whole is None:
        return None
    outs = tuple(op.graph.whole(n) if n else None for n in op.outputs)
    everything = rule.footprint(op, outs, whole)
    for position, axis in enumerate(whole):
        if axis.size < 2:
            continue
        half = whole.replace(position, Interval(axis.start, axis.start + axis.size // 2))
        read = rule.footprint(op, outs, half)
        for name, some, all_of_it in zip(op.inputs, read, everything, strict=False):
            row = rows.get(name)
            if row is None or some is None or all_of_it is None:
                continue
            if some[row].size < all_of_it[row].size:
                return position
    return None


def _following(
    op: Op, able: Sequence[int], rows: Mapping[str, int | None]
) -> tuple[int, str] | None:
    """The output axis along which a slice reads a slice of an input's rows, and that input."""
    rule = rule_of(op)
    outs = tuple(op.graph.whole(n) if n else None for n in op.outputs)
    for position, name in enumerate(op.inputs):
        if not name or op.graph.is_initializer(name):
            continue
        row = rows.get(name)
        # Some operators read less than all even for their whole output (a 1x1 kernel, stride 2).
        all_of_it = rule.footprint(op, rule.align(op, outs), None)[position]
        if row is None or all_of_it is None or all_of_it[row].size < 2:
            continue
        for axis in able:
            size = op.out_shape()[axis]
            part = Interval(0, -(-size // 2))
            asked = tuple(
                b.replace(axis, part)
                if b is not None and len(b) > axis and b[axis].size == size
                else b
                for b in outs
            )
            read = rule.footprint(op, rule.align(op, asked), None)[position]
            if read is not None and read[row].size < all_of_it[row].size:
                return axis, name
    return None
