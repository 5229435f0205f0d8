"""Which axis of each value is cut, where, and the plan that a layout of blocks stands for.

Every value is cut at the same fractions, so that what a device made it mostly reads next. The rows
of a picture are followed through the graph by asking each rule which slice of its output reads a
slice of the rows; where none does (a flatten, a Gemm) the largest axis is cut. A mean over the rows
may be cut into partial sums, one of each band.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from meshinfer.cost.model import GLUED
from meshinfer.geometry import Box, Interval, split_weighted
from meshinfer.graph import Graph, Op
from meshinfer.identity import DeviceId
from meshinfer.ops import BARRIER, rule_of
from meshinfer.ops.kernels import BLOCK
from meshinfer.plan import Plan, Shard, Stage, Task

Kind = Literal["rows", "channels", "batch"]
KINDS: tuple[Kind, ...] = ("rows", "channels", "batch")


@dataclass(frozen=True, slots=True)
class Axes:
    """The axis of each value that is cut, for each kind of split; None: the value stays whole."""

    rows: Mapping[str, int | None]
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
        maps = {"rows": self.rows, "channels": self.channels, "batch": self.batch}
        return maps[kind].get(value)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of split that this graph has at all."""
        return KINDS if self.batch else KINDS[:2]


@dataclass(frozen=True, slots=True)
class Block:
    """Ops ``[start, stop)`` as one stage: in parts of a kind, or whole on one device."""

    start: int
    stop: int
    whole_on: DeviceId | None = None
    kind: Kind = "rows"


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a value that a stage makes is cut: along ``axis`` of it, or of its reduction
    (``partial``)."""

    axis: int
    whole: Box
    partial: bool = False

    @property
    def size(self) -> int:
        return self.whole[self.axis].size

    def part(self, graph: Graph, value: str, interval: Interval) -> Shard:
        box = self.whole.replace(self.axis, interval)
        return Shard(value, graph.whole(value), box) if self.partial else Shard(value, box)


def cutting(graph: Graph, axes: Axes, value: str, kind: Kind, stop: int) -> Cutting | None:
    """How a stage that ends at ``stop`` cuts one of its live values; None where it cannot."""
    position = axes.sums.get(value) if kind == "rows" else None
    if position is not None and graph.first_use.get(value, stop) >= stop:
        op = graph.ops[graph.producer[value]]
        reduction = rule_of(op).reduction(op)
        assert reduction is not None, f"{op} sums nothing"
        return Cutting(position, reduction, partial=True)
    axis = axes.of(value, kind)
    return None if axis is None else Cutting(axis, graph.whole(value))


def axes_of(graph: Graph, *, sums: bool = True) -> Axes:
    """Follows rows, and the batch if there is one, front to back. ``sums``: partial sums may be
    used, which agree with whole ones to rounding only."""
    rows: dict[str, int | None] = {name: _input_row(graph, name) for name in graph.inputs}
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
    return Axes(rows, channels, _batch(graph), frozenset(follows), added, frozenset(rowed))


def _able(op: Op) -> list[int]:
    """Axes of the first output that can be cut with a gain."""
    rule = rule_of(op)
    if rule is BARRIER:
        return []
    shape = op.out_shape()
    return sorted({a % len(shape) for a in rule.split(op) if shape[a % len(shape)] > 1})


def _batch(graph: Graph) -> dict[str, int | None]:
    """The axis of each value along which images of a batch lie; empty for a batch of one."""
    found: dict[str, int | None] = {}
    for name in graph.inputs:
        shape = graph.shape(name) or ()
        found[name] = 0 if len(shape) > 1 and shape[0] > 1 else None
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


def _input_row(graph: Graph, name: str) -> int | None:
    """The axis of an input picture, video or signal with its rows: what is long and not channels.

    For NHWC, what a first Transpose makes axis 2.
    """
    shape = graph.shape(name) or ()
    if len(shape) not in (3, 4, 5):
        return None
    longest = max(range(2, len(shape)), key=lambda a: (len(shape) != 4 and shape[a], -a))
    same = {name}
    for op in graph.ops:
        if same & set(op.inputs):
            if op.type == "Transpose" and len(shape) == 4:
                return int(op.attributes.get("perm", (3, 2, 1, 0))[2])
            if op.type not in GLUED:
                break
            same.update(op.outputs)
    return longest


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
    """The plan of a layout. ``shares``: weight of each device; ``ends``: source and sink."""
    stages = tuple(_stage(graph, axes, block, shares) for block in _joined(blocks))
    return Plan(graph.digest, ends[0], ends[1], stages)


def _grain(size: int, weights: Sequence[float]) -> int:
    """Features go in whole blocks of onnxruntime's layout (NCHWc), or in what it can put there,
    where that leaves something for every device."""
    least = size * min(weights) / sum(weights)
    return next((g for g in (BLOCK, 8, 4) if least >= (2 * g if size % g else g)), 1)


def _joined(blocks: Sequence[Block]) -> list[Block]:
    """Neighbours that run whole on one device are one stage: nothing is gained by a cut there."""
    result: list[Block] = []
    for block in blocks:
        last = result[-1] if result else None
        if last is not None and block.whole_on is not None and last.whole_on == block.whole_on:
            result[-1] = Block(last.start, block.stop, block.whole_on)
        else:
            result.append(block)
    return result


def _stage(graph: Graph, axes: Axes, block: Block, shares: Mapping[DeviceId, float]) -> Stage:
    live = graph.live_outputs(block.start, block.stop)
    whole_on = block.whole_on
    if whole_on is None and len(shares) == 1:
        whole_on = next(iter(shares))
    if whole_on is not None:
        shards = tuple(Shard(name, graph.whole(name)) for name in live)
        return Stage(block.start, block.stop, (Task((whole_on,), shards),) if shards else ())
    parts: dict[DeviceId, list[Shard]] = {device: [] for device in shares}
    for name in live:
        cut = cutting(graph, axes, name, block.kind, block.stop)
        assert cut is not None, f"{name} cannot be split"
        features = block.kind == "channels" or (block.kind == "rows" and name not in axes.rowed)
        grain = _grain(cut.size, list(shares.values())) if features and not cut.partial else 1
        ranges = split_weighted(cut.size, list(shares.values()), grain)
        for device, interval in zip(shares, ranges, strict=True):
            if interval.size > 0:
                parts[device].append(cut.part(graph, name, interval))
    tasks = tuple(Task((d,), tuple(shards)) for d, shards in parts.items() if shards)
    return Stage(block.start, block.stop, tasks)
