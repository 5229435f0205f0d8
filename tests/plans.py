"""Random plans of a graph, and the checks that every plan passes: exact, printable, each need met
once.

Nothing here is clever: a drawn plan may be foolish, and must be exact all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from oracle import Model, assert_exact

from meshinfer.engine import Engine
from meshinfer.engine.ort import OrtEngine
from meshinfer.executor import run_plan
from meshinfer.geometry import Box, Interval
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.ops import is_random, rule_of
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.transfers import Flow, TaskRef, Transfer, derive

DEVICES = tuple(DeviceId(name) for name in ("pi-1", "pi-2", "pi-3", 'pi 4, "quoted"'))
SHARDS = 8
"""At most so many of one value: more cost time and show nothing new."""


def read_within(graph: Graph, start: int, stop: int, value: str) -> bool:
    return any(value in (*op.inputs, *op.captured) for op in graph.ops[start:stop])


@st.composite
def tilings(draw: st.DrawFn, whole: Box) -> list[Box]:
    """Boxes that tile ``whole``: up to three cuts on each of up to two axes, at any places."""
    axes = [i for i, axis in enumerate(whole) if axis.size > 1]
    if not axes or whole.empty:
        return [whole]
    boxes = [whole]
    for axis in sorted(draw(st.sets(st.sampled_from(axes), max_size=2))):
        start, stop = whole[axis]
        cuts = sorted(draw(st.sets(st.integers(start + 1, stop - 1), max_size=3)))
        parts = [Interval(a, b) for a, b in zip([start, *cuts], [*cuts, stop], strict=True)]
        if len(boxes) * len(parts) <= SHARDS:
            boxes = [box.replace(axis, part) for box in boxes for part in parts]
    return boxes


@st.composite
def shards(draw: st.DrawFn, graph: Graph, start: int, stop: int, value: str) -> list[Shard]:
    """A tiling of a live value, some or all of its boxes as partial sums where that is allowed."""
    op = graph.ops[graph.producer[value]]
    reduction = rule_of(op).reduction(op)
    boxes = draw(tilings(graph.whole(value)))
    if reduction is None or read_within(graph, start, stop, value) or not draw(st.booleans()):
        return [Shard(value, box) for box in boxes]
    found: list[Shard] = []
    for box in boxes[: SHARDS // 2]:
        found += [Shard(value, box, over) for over in draw(tilings(reduction))]
    return found + [Shard(value, box) for box in boxes[SHARDS // 2 :]]


@st.composite
def stages(draw: st.DrawFn, graph: Graph, start: int, stop: int) -> Stage:
    """Shards of all live values, dealt to tasks: a task may hold several, of several values."""
    dealt: dict[int, list[Shard]] = {}
    random = any(is_random(op) for op in graph.ops[start:stop])
    for value in graph.live_outputs(start, stop):
        for shard in (
            [Shard(value, graph.whole(value))]
            if random
            else draw(shards(graph, start, stop, value))
        ):
            task = 0 if random else draw(st.integers(0, 5))
            dealt.setdefault(task, []).append(shard)
    tasks = []
    for task in sorted(dealt):
        first = draw(st.sampled_from(DEVICES))
        backups = draw(st.sampled_from([(), (), tuple(d for d in DEVICES[:2] if d != first)]))
        tasks.append(Task((first, *backups), tuple(dealt[task])))
    return Stage(start, stop, tuple(tasks))


@st.composite
def plans(draw: st.DrawFn, graph: Graph) -> Plan:
    """Any plan of the graph; source and sink may compute or not."""
    cuts: set[int] = set()
    if graph.cut_points:
        cuts = draw(st.sets(st.sampled_from(graph.cut_points), max_size=4))
    borders = [0, *sorted(cuts), len(graph.ops)]
    made = [draw(stages(graph, a, b)) for a, b in pairwise(borders)]
    source, sink = draw(st.sampled_from(DEVICES)), draw(st.sampled_from((*DEVICES, "elsewhere")))
    return Plan(graph.digest, source, DeviceId(sink), tuple(made), draw(st.integers(1, 3)))


# -- checks ----------------------------------------------------------------------------------------


def check_exact(
    model: Model,
    graph: Graph,
    plan: Plan,
    inputs: Mapping[str, np.ndarray],
    engine: Callable[[Path], Engine] = OrtEngine,
) -> bool:
    """The plan's answer is plain onnxruntime's; returns whether it is so bit for bit."""
    return assert_exact(model, inputs, run_plan(graph, plan, inputs, engine=engine))


def check_text(plan: Plan) -> None:
    """The text form reads back as the same plan."""
    assert Plan.parse(str(plan)) == plan


def check_transfers(graph: Graph, plan: Plan) -> None:
    """What each task and the sink need is brought to it exactly once, by someone who has it."""
    flow = derive(graph, plan)
    for ref, field in flow.fields.items():
        for value in field.fetches:
            check_need(graph, flow, ref, value, field.needs[value])
    for value in dict.fromkeys(graph.outputs):
        check_need(graph, flow, flow.sink, value, graph.whole(value))


def check_need(graph: Graph, flow: Flow, ref: TaskRef, value: str, box: Box) -> None:
    """Count how often each element of a needed box is brought: by painting, apart from the code."""
    brought = [t for t in flow.into(ref) if t.piece.value == value]
    assert brought, f"nobody brings {value} to {ref}"
    over = [t.piece.over for t in brought if t.piece.over is not None]
    domain: tuple[int, ...] = ()
    if over:
        domain = tuple(max(o[i].stop for o in over) for i in range(len(over[0])))
    if box.empty:
        assert len(brought) == 1
        return
    paint = np.zeros((*box.stop, *domain), dtype=np.int8)
    for transfer in brought:
        check_sender(flow, transfer)
        part = transfer.piece.over if transfer.piece.over is not None else Box.whole(domain)
        paint[tuple(slice(a, b) for a, b in (*transfer.piece.box, *part))] += 1
    inside = paint[tuple(slice(a, b) for a, b in box)]
    assert (inside == 1).all(), (
        f"{value} {box} reaches {ref} {inside.min()} to {inside.max()} times"
    )
    assert paint.sum() == inside.sum(), f"{ref} is sent more of {value} than it needs"


def check_sender(flow: Flow, transfer: Transfer) -> None:
    """A transfer starts before it ends, on the devices that the plan names, from what was made."""
    assert transfer.producer.stage < transfer.consumer.stage
    assert transfer.sender == flow.device(transfer.producer)
    assert transfer.receiver == flow.device(transfer.consumer)
    if transfer.producer != flow.source:
        task = flow.plan.stages[transfer.producer.stage].tasks[transfer.producer.task]
        assert any(
            (s.value, s.over) == (transfer.piece.value, transfer.piece.over)
            and s.box.contains(transfer.piece.box)
            for s in task.outputs
        )
