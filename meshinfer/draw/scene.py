"""What each panel of a plan's picture shows: tiles and halos as fractions of a drawing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from meshinfer.cost.model import field_work, whole_flops
from meshinfer.geometry import Box
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.planner.axes import axes_of
from meshinfer.transfers import Flow, TaskRef


@dataclass(frozen=True, slots=True)
class Tile:
    """One task in its stage's panel: fractions (left, top, right, bottom) of the drawing."""

    device: DeviceId
    own: tuple[float, float, float, float]
    reads: tuple[float, float, float, float] | None
    rows: str


@dataclass(frozen=True, slots=True)
class Panel:
    """What one stage's panel shows."""

    title: str
    ops: str
    shape: str
    how: str
    aspect: float
    tiles: tuple[Tile, ...]
    share: float
    again: float
    moved: Mapping[DeviceId, int]


def panels_of(graph: Graph, flow: Flow) -> list[Panel]:
    axes = axes_of(graph).rows
    total = sum(whole_flops(graph, op) for op in graph.ops) or 1
    moved: dict[int, Counter[DeviceId]] = {}
    for t in flow.transfers:
        if not t.local:
            count = moved.setdefault(t.consumer.stage, Counter())
            count[t.receiver] += graph.nbytes(t.piece.value, t.piece.box)
    panels = []
    for s, stage in enumerate(flow.plan.stages):
        main = _main(graph, flow, s)
        whole = graph.whole(main) if main else Box(())
        once = sum(whole_flops(graph, op) for op in graph.ops[stage.start : stage.stop])
        refs = [TaskRef(s, t) for t in range(len(stage.tasks))]
        done = sum(field_work(graph, flow.fields[ref]).flops for ref in refs)
        tall, wide = _canvas(whole, axes.get(main))
        kinds = Counter(op.type for op in graph.ops[stage.start : stage.stop])
        panels.append(
            Panel(
                title=f"Stage {s + 1} · {_span(stage.start, stage.stop, 'op')}",
                ops=", ".join(f"{n}× {k}" if n > 1 else k for k, n in kinds.most_common()),
                shape=" × ".join(str(n) for n in whole.shape) or "scalar",
                how=_how(flow, s, main, whole),
                aspect=min(2.2, max(0.28, tall / wide)),
                tiles=tuple(_tile(graph, flow, ref, main, axes) for ref in refs),
                share=once / total,
                again=done / once - 1 if once else 0.0,
                moved=dict(sorted(moved.get(s, Counter()).items())),
            )
        )
    return panels


def _span(start: int, stop: int, what: str) -> str:
    return f"{what} {start}" if stop == start + 1 else f"{what}s {start}–{stop - 1}"


def _main(graph: Graph, flow: Flow, s: int) -> str:
    """The output to draw: a spatial one if there is any, then the largest, then the first."""
    stage = flow.plan.stages[s]
    live = graph.live_outputs(stage.start, stage.stop)
    return max(
        live, key=lambda n: (len(graph.whole(n)) >= 3, graph.nbytes(n), -live.index(n)), default=""
    )


def _across(whole: Box, row: int | None) -> tuple[int | None, int | None]:
    """The axes drawn downwards and sideways: rows and columns, or a vector's only long axis."""
    if len(whole) >= 3:
        down = row if row is not None and row > 0 else (2 if len(whole) >= 4 else 1)
        side = next((a for a in range(down + 1, len(whole))), None)
        if side is not None and len(whole) >= 4:
            return down, side
        return down, None
    longest = max(range(len(whole)), key=lambda a: whole[a].size, default=None)
    return None, longest


def _canvas(whole: Box, row: int | None) -> tuple[float, float]:
    down, side = _across(whole, row)
    tall = whole[down].size if down is not None else 1
    wide = whole[side].size if side is not None else 1
    if down is None or side is None:
        return 0.34, 1.0
    return float(tall), float(wide)


def _how(flow: Flow, s: int, main: str, whole: Box) -> str:
    tasks = flow.plan.stages[s].tasks
    if len(tasks) == 1:
        return f"whole on {tasks[0].devices[0]}"
    boxes = [x.box for t in tasks for x in t.outputs if x.value == main]
    axes = [a for a in range(len(whole)) if any(b[a] != whole[a] for b in boxes)]
    names = {0: "batch", 1: "channels", 2: "rows", 3: "columns"}
    if any(x.over is not None for t in tasks for x in t.outputs):
        return f"{len(tasks)} partial sums"
    if len(whole) == 2:
        names = {0: "batch", 1: "features"}
    return f"{len(tasks)} parts along " + " and ".join(names.get(a, f"axis {a}") for a in axes)


def _tile(
    graph: Graph, flow: Flow, ref: TaskRef, main: str, axes: Mapping[str, int | None]
) -> Tile:
    task = flow.plan.stages[ref.stage].tasks[ref.task]
    whole = graph.whole(main) if main else Box(())
    boxes = [shard.box for shard in task.outputs if shard.value == main]
    box = boxes[0] if boxes else whole
    own = _fractions(box, whole, axes.get(main))
    reads = None
    found = flow.fields[ref]
    spatial = [n for n in found.fetches if len(graph.whole(n)) == len(whole) >= 3]
    if spatial and boxes:
        value = max(spatial, key=lambda n: (graph.nbytes(n), n))
        reads = _fractions(found.needs[value], graph.whole(value), axes.get(value))
    down, side = _across(whole, axes.get(main))
    span = box[down] if down is not None else box[side] if side is not None else None
    rows = _span(span.start, span.stop, "element") if span is not None else "all"
    return Tile(task.devices[0], own, reads, rows)


def _fractions(box: Box, whole: Box, row: int | None) -> tuple[float, float, float, float]:
    """Where a box lies in its value, as (left, top, right, bottom) between 0 and 1.

    A slice of channels of a picture is drawn as an upright bar: it has all rows of some channels.
    """
    down, side = _across(whole, row)
    sliced = [a for a in range(len(box)) if box[a] != whole[a]]
    if len(whole) >= 3 and sliced and down not in sliced and side not in sliced:
        down, side = None, sliced[0]
    left, right, top, bottom = 0.0, 1.0, 0.0, 1.0
    if side is not None and whole[side].size:
        left, right = box[side].start / whole[side].size, box[side].stop / whole[side].size
    if down is not None and whole[down].size:
        top, bottom = box[down].start / whole[down].size, box[down].stop / whole[down].size
    return left, top, right, bottom
