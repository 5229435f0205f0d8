"""Whether a plan fits its graph and computes every live value, and every reduction, exactly once.

Runs after every step of the planner and before anything is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshinfer.errors import InvalidInput
from meshinfer.geometry import Box, tiles_exactly
from meshinfer.graph import Graph
from meshinfer.ops import is_random, rule_of
from meshinfer.plan import Plan, Shard, Stage


def validate(graph: Graph, plan: Plan) -> None:
    """Raise ``InvalidInput`` unless the plan is one of this graph and computes each value once."""
    if plan.graph != graph.digest:
        raise _wrong(f"it was made for graph {plan.graph[:12]}, this one is {graph.digest[:12]}")
    if plan.window < 1:
        raise _wrong(f"window={plan.window} is below 1")
    position = 0
    for stage in plan.stages:
        if stage.start != position or stage.stop <= stage.start:
            raise _wrong(f"stage {stage.start}:{stage.stop} does not continue at op {position}")
        if stage.stop != len(graph.ops) and stage.stop not in graph.cut_points:
            raise _wrong(f"op {stage.stop} is no cut point: a value that is no tensor is alive")
        _validate_stage(graph, stage)
        position = stage.stop
    if position != len(graph.ops):
        raise _wrong(f"the stages end at op {position} of {len(graph.ops)}")


def as_asked(graph: Graph, *, strict: bool = False, half_transfers: bool = False) -> Graph:
    """The graph with the rules that a deployment asks for. Raises ``InvalidInput`` for both."""
    if strict and half_transfers:
        raise InvalidInput(
            "strict keeps every bit, half transfers round what devices exchange",
            hint="ask for one of them",
        )
    graph = graph.as_strict() if strict else graph
    return graph.with_half_transfers() if half_transfers else graph


def refuse_sums(plan: Plan) -> None:
    """Raise ``InvalidInput`` if the plan adds up partial sums, which changes the last bits."""
    for stage in plan.stages:
        for task in stage.tasks:
            for shard in task.outputs:
                if shard.over is not None:
                    raise InvalidInput(
                        f"the plan sums {shard.value!r} in parts, and strict=True was asked",
                        hint="deploy it without strict, or compute that value whole or in slices",
                    )


def _wrong(why: str) -> InvalidInput:
    return InvalidInput(f"the plan does not fit: {why}", hint="plan again for this model and shape")


def _validate_stage(graph: Graph, stage: Stage) -> None:
    where = f"stage {stage.start}:{stage.stop}"
    live = graph.live_outputs(stage.start, stage.stop)
    shards: dict[str, list[Shard]] = {name: [] for name in live}
    for task in stage.tasks:
        if not task.devices or len(set(task.devices)) != len(task.devices):
            raise _wrong(f"{where}: a task names no device, or one twice")
        if not task.outputs:
            raise _wrong(f"{where}: a task without outputs")
        for shard in task.outputs:
            if shard.value not in shards:
                raise _wrong(f"{where}: {shard.value!r} is not alive at its end")
            shards[shard.value].append(shard)
    for name, parts in shards.items():
        _validate_value(graph, stage, name, parts)
    _validate_random(graph, stage)


def _validate_value(graph: Graph, stage: Stage, name: str, parts: Sequence[Shard]) -> None:
    where = f"stage {stage.start}:{stage.stop}, value {name!r}"
    whole = graph.whole(name)
    op = graph.ops[graph.producer[name]]
    domain = Box(())
    if any(part.over is not None for part in parts):
        reduction = rule_of(op).reduction(op)
        if reduction is None:
            raise _wrong(f"{where}: {op} has no partial sums")
        if any(
            name in (*other.inputs, *other.captured)
            for other in graph.ops[stage.start : stage.stop]
        ):
            raise _wrong(f"{where}: a partial sum is read inside its own stage")
        domain = reduction
    boxes = []
    for part in parts:
        over = part.over if part.over is not None else domain
        if len(part.box) != len(whole) or len(over) != len(domain):
            raise _wrong(f"{where}: {part} has the wrong number of axes for {whole}")
        boxes.append(Box((*part.box.axes, *over.axes)))
    if not tiles_exactly(Box((*whole.axes, *domain.axes)), boxes):
        raise _wrong(f"{where}: its boxes do not cover {whole} exactly once")


def _validate_random(graph: Graph, stage: Stage) -> None:
    if any(is_random(op) for op in graph.ops[stage.start : stage.stop]) and len(stage.tasks) > 1:
        raise _wrong(
            f"stage {stage.start}:{stage.stop} holds a random operator, which must run once, "
            "but has several tasks"
        )
