"""Which axis of each value is cut, where, and the plan that a layout of blocks stands for.

Every value is cut at the same fractions, so that what a device made it mostly reads next. The rows
of a picture are followed through the graph by asking each rule which slice of its output reads a
slice of the rows; where none does (a flatten, a mean, a Gemm) the largest axis is cut.
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
from meshinfer.plan import Plan, Shard, Stage, Task

Kind = Literal["rows", "channels"]
KINDS: tuple[Kind, ...] = ("rows", "channels")


@dataclass(frozen=True, slots=True)
class Axes:
    """The axis of each value that is cut, for each kind of split; None: the value stays whole."""

    rows: Mapping[str, int | None]
    channels: Mapping[str, int | None]
    follows: frozenset[int]
    """Ops whose output rows read just some of their input's rows: a band stays a band."""

    def of(self, value: str, kind: Kind) -> int | None:
        return (self.rows if kind == "rows" else self.channels).get(value)


@dataclass(frozen=True, slots=True)
class Block:
    """Ops ``[start, stop)`` as one stage: in parts of a kind, or whole on one device."""

    start: int
    stop: int
    whole_on: DeviceId | None = None
    kind: Kind = "rows"


def axes_of(graph: Graph) -> Axes:
    """One pass over the graph, front to back."""
    rows: dict[str, int | None] = {name: _input_row(graph, name) for name in graph.inputs}
    channels: dict[str, int | None] = {}
    follows: set[int] = set()
    for op in graph.ops:
        rule = rule_of(op)
        for name in op.outputs:
            rows[name] = channels[name] = None
        if rule is BARRIER:
            continue
        shape = op.out_shape()
        rank = len(shape)
        able = sorted({a % rank for a in rule.split(op) if shape[a % rank] > 1}) if rank else []
        if not able:
            continue
        axis = _following(op, able, rows)
        if axis is not None:
            follows.add(op.index)
        else:
            axis = 2 if rank >= 3 and 2 in able else max(able, key=lambda a: (shape[a], -a))
        for position, name in enumerate(op.outputs):
            if name and len(op.out_shape(position)) == rank:
                rows[name] = axis
                channels[name] = 1 if 1 in able and rank >= 3 else axis
    return Axes(rows, channels, frozenset(follows))


def _input_row(graph: Graph, name: str) -> int | None:
    """The axis of an input picture with its rows: 2, or what a first Transpose makes axis 2."""
    if len(graph.shape(name) or ()) != 4:
        return None
    same = {name}
    for op in graph.ops:
        if same & set(op.inputs):
            if op.type == "Transpose":
                return int(op.attributes.get("perm", (3, 2, 1, 0))[2])
            if op.type not in GLUED:
                break
            same.update(op.outputs)
    return 2


def _following(op: Op, able: Sequence[int], rows: Mapping[str, int | None]) -> int | None:
    """The output axis along which a slice reads a slice of an input's rows."""
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
                return axis
    return None


def band(graph: Graph, value: str, axis: int, low: float, high: float) -> Box:
    """The part of a value between two fractions of an axis; at least one element of it."""
    whole = graph.whole(value)
    size = whole[axis].size
    start = min(size - 1, round(size * low))
    return whole.replace(axis, Interval(start, max(start + 1, min(size, round(size * high)))))


def splittable(graph: Graph, axes: Axes, start: int, stop: int, kind: Kind) -> bool:
    """Whether all that a stage makes for others can be cut."""
    live = graph.live_outputs(start, stop)
    return bool(live) and all(axes.of(name, kind) is not None for name in live)


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


def _grain(size: int, parts: int) -> int:
    """Channels go in whole blocks of onnxruntime's layout (NCHWc) where there are enough."""
    return next((g for g in (16, 8, 4) if size >= 2 * g * parts), 1)


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
        axis = axes.of(name, block.kind)
        assert axis is not None, f"{name} cannot be split"
        whole = graph.whole(name)
        size = whole[axis].size
        grain = _grain(size, len(shares)) if axis == 1 and len(whole) != 3 else 1
        ranges = split_weighted(size, list(shares.values()), grain)
        for device, part in zip(shares, ranges, strict=True):
            if part.size > 0:
                parts[device].append(Shard(name, whole.replace(axis, part)))
    tasks = tuple(Task((d,), tuple(shards)) for d, shards in parts.items() if shards)
    return Stage(block.start, block.stop, tasks)
