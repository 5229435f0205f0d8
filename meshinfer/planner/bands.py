"""A layout of blocks, and the plan that it stands for: who makes which part of which value.

Every value of a stage is cut at the same fractions, so that what a device made it mostly reads
next. Each layer is cut evenly by itself, and not in multiples of what later strides leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isqrt
from typing import TypeVar

from meshinfer.geometry import Box, Interval, split_even, split_weighted
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.ops import rule_of
from meshinfer.ops.kernels import BLOCK
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.planner.axes import Axes, Kind

_T = TypeVar("_T")
Shares = tuple[tuple[DeviceId, float], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Ops ``[start, stop)`` as one stage: in parts of a kind, or whole on one device.

    ``shares``: the devices that share it, with the weight of each; empty: those of the layout.
    ``rounds``: tasks that each of them runs, one after another: less memory at a time, and the
    first can be sent on while the next is computed. ``others``: devices that may run a whole block
    as well as ``whole_on``, each for another request.
    """

    start: int
    stop: int
    whole_on: DeviceId | None = None
    kind: Kind = "rows"
    shares: Shares = ()
    rounds: int = 1
    others: tuple[DeviceId, ...] = ()

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """All that may compute it."""
        if self.whole_on is not None:
            return (self.whole_on, *self.others)
        return tuple(device for device, _ in self.shares)


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a value that a stage makes is cut: along ``axis`` of it, or of its reduction
    (``partial``), and each part along ``inner``, if there is one."""

    axis: int
    whole: Box
    inner: int | None = None
    partial: bool = False

    @property
    def size(self) -> int:
        return self.whole[self.axis].size

    @property
    def inner_size(self) -> int:
        return 1 if self.inner is None else self.whole[self.inner].size

    def part(self, graph: Graph, value: str, outer: Interval, inner: Interval) -> Shard:
        box = self.whole.replace(self.axis, outer)
        if self.inner is not None:
            box = box.replace(self.inner, inner)
        return Shard(value, graph.whole(value), box) if self.partial else Shard(value, box)


def cutting(graph: Graph, axes: Axes, value: str, kind: Kind, stop: int) -> Cutting | None:
    """How a stage that ends at ``stop`` cuts one of its live values; None where it cannot."""
    position = axes.sums.get(value) if kind == "rows" else None
    if position is not None and graph.first_use.get(value, stop) >= stop:
        op = graph.ops[graph.producer[value]]
        reduction = rule_of(op).reduction(op)
        assert reduction is not None, f"{op} sums nothing"
        return Cutting(position, reduction, partial=True)
    axis, inner = axes.of(value, kind), axes.inner(value, kind)
    if axis is None:
        return None
    if kind in ("grid", "slabs") and (inner in (None, axis) or value not in axes.rowed):
        return None
    return Cutting(axis, graph.whole(value), inner)


def groups_of(kind: Kind, count: int) -> tuple[int, ...]:
    """How many of so many devices share each band of the first axis."""
    if kind == "grid":
        bands = isqrt(count - 1) + 1  # as square as it gets, and rather wide than high
    elif kind == "slabs":
        bands = max(2, isqrt(count))
    else:
        bands = count
    return tuple(r.size for r in split_even(count, min(bands, count)))


def between(size: int, low: float, high: float) -> Interval:
    """The part of an axis between two fractions; at least one element of it."""
    start = min(size - 1, round(size * low))
    return Interval(start, max(start + 1, min(size, round(size * high))))


def splittable(graph: Graph, axes: Axes, start: int, stop: int, kind: Kind) -> bool:
    """Whether all that a stage makes for others can be cut."""
    live = graph.live_outputs(start, stop)
    return bool(live) and all(cutting(graph, axes, n, kind, stop) is not None for n in live)


def build(
    graph: Graph,
    axes: Axes,
    blocks: Sequence[Block],
    shares: Mapping[DeviceId, float],
    ends: tuple[DeviceId, DeviceId],
) -> Plan:
    """The plan of a layout. ``shares``: weight of each device, for blocks that say nothing else;
    ``ends``: source and sink."""
    stages = tuple(stage_of(graph, axes, b) for b in explicit(blocks, shares))
    return Plan(graph.digest, ends[0], ends[1], stages)


def explicit(blocks: Sequence[Block], shares: Mapping[DeviceId, float]) -> tuple[Block, ...]:
    """The same layout, where every block says which devices share it."""
    usual = tuple(shares.items())
    named = []
    for block in blocks:
        own = block.shares or usual
        if block.whole_on is not None or len(own) * block.rounds == 1:
            place = own[0][0] if block.whole_on is None else block.whole_on
            named.append(Block(block.start, block.stop, place, others=block.others))
        else:
            named.append(block if block.shares else replace(block, shares=usual))
    return tuple(joined(named))


def joined(blocks: Sequence[Block]) -> list[Block]:
    """Neighbours that run whole on one device are one stage: nothing is gained by a cut there."""
    result: list[Block] = []
    for block in blocks:
        last = result[-1] if result else None
        same = last is not None and (last.whole_on, last.others) == (block.whole_on, block.others)
        if last is not None and same and block.whole_on is not None:
            result[-1] = replace(last, stop=block.stop)
        else:
            result.append(block)
    return result


def stage_of(graph: Graph, axes: Axes, block: Block) -> Stage:
    """The stage of one block that says which devices share it."""
    live, shares = graph.live_outputs(block.start, block.stop), block.shares
    if block.whole_on is not None:
        shards = tuple(Shard(name, graph.whole(name)) for name in live)
        tasks = (Task(block.devices, shards),) if shards else ()
        return Stage(block.start, block.stop, tasks)
    parts: dict[tuple[int, int], list[Shard]] = {
        (turn, i): [] for turn in range(block.rounds) for i in range(len(shares))
    }
    for name in live:
        cut, cells, _ = cells_of(graph, axes, block, name)
        for i, (outer, inner) in enumerate(cells):
            for turn, piece in enumerate(split_even(outer.size, block.rounds)):
                if piece.size > 0 and inner.size > 0:
                    part = cut.part(graph, name, piece.shift(outer.start), inner)
                    parts[turn, i].append(part)
    return Stage(
        block.start,
        block.stop,
        tuple(Task((shares[i][0],), tuple(made)) for (_, i), made in parts.items() if made),
    )


Cell = tuple[Interval, Interval]
"""What a device gets of the first axis of a value, and of the second. Some are empty."""


def cells_of(
    graph: Graph, axes: Axes, block: Block, value: str
) -> tuple[Cutting, list[Cell], tuple[int, int]]:
    """How a block that says which devices share it cuts a value: the cell of each of them, and by
    how much a border can move on either axis."""
    cut = cutting(graph, axes, value, block.kind, block.stop)
    assert cut is not None, f"{value} cannot be split"
    by_rows = block.kind != "channels" and (block.kind != "rows" or value in axes.rowed)
    members = members_of(block.kind, [weight for _, weight in block.shares])
    sums, cells = [sum(each) for each in members], []
    grain = 1 if by_rows or cut.partial else _grain(cut.size, sums)
    widest = 1
    for outer, own in zip(split_weighted(cut.size, sums, grain), members, strict=True):
        if cut.inner is None:
            cells.append((outer, Interval(0, 1)))
            continue
        inside = _grain(cut.inner_size, own) if block.kind == "slabs" else 1
        widest = max(widest, inside)
        cells += [(outer, inner) for inner in split_weighted(cut.inner_size, own, inside)]
    return cut, cells, (grain, widest)


def members_of(kind: Kind, each: Sequence[_T]) -> list[Sequence[_T]]:
    """What is said of each device, by the bands of the first axis that they share."""
    groups = groups_of(kind, len(each))
    borders = [sum(groups[:g]) for g in range(len(groups) + 1)]
    return [each[a:b] for a, b in pairwise(borders)]


def _grain(size: int, weights: Sequence[float]) -> int:
    """Features go in whole blocks of onnxruntime's layout (NCHWc), or in what it can put there,
    where that leaves something for every device."""
    least = size * min(weights) / sum(weights)
    return next((g for g in (BLOCK, 8, 4) if least >= (2 * g if size % g else g)), 1)
