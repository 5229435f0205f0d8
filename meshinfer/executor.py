"""``run_plan``: a plan in this process, with the same lowering, engine and merge as on a
cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from meshinfer.engine import Array, Engine
from meshinfer.engine.ort import OrtEngine
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.halves import rounded
from meshinfer.legality import validate
from meshinfer.lower import lower
from meshinfer.mapreduce import reduce, scatter
from meshinfer.plan import Plan, Shard
from meshinfer.transfers import Flow, TaskRef, derive


def run_plan(
    graph: Graph,
    plan: Plan,
    inputs: Mapping[str, Array],
    *,
    engine: Callable[[Path], Engine] = OrtEngine,
    scratch: Path | None = None,
) -> dict[str, Array]:
    """The model's outputs, computed task by task as the plan says.

    ``scratch``: a folder for the weights meanwhile; the system's if None.
    ``inputs``: one array for each of ``graph.inputs``, of its static shape and element type.
    Raises ``InvalidInput`` for a plan or an array that does not fit.
    """
    validate(graph, plan)
    checked = check_inputs(graph, inputs)
    flow = derive(graph, plan)
    held: dict[tuple[TaskRef, Shard], Array] = {
        (flow.source, Shard(name, graph.whole(name))): array for name, array in checked.items()
    }
    with tempfile.TemporaryDirectory(prefix="meshinfer-", dir=scratch) as folder:
        made = engine(Path(folder))
        for s, stage in enumerate(plan.stages):
            for t, task in enumerate(stage.tasks):
                ref = TaskRef(s, t)
                submodel = lower(graph, stage, task)
                for weight in submodel.weights:
                    path = Path(folder) / weight.digest
                    if not path.exists():
                        data = graph.weight_bytes(weight.shard.value, weight.shard.box)
                        path.write_bytes(data)
                gathered = gather(graph, flow, ref, held)
                feeds = {name: gathered[shard.value] for name, shard in submodel.inputs}
                results = made.prepare(submodel.model).run(feeds)
                for (_, shard), array in zip(submodel.outputs, results, strict=True):
                    held[ref, shard] = array
    final = gather(graph, flow, flow.sink, held)
    return {name: final[name] if name in final else graph.weight(name) for name in graph.outputs}


def gather(
    graph: Graph, flow: Flow, ref: TaskRef, held: Mapping[tuple[TaskRef, Shard], Array]
) -> dict[str, Array]:
    """The merged input values of a task (or of the sink), from what others hold."""
    pieces: dict[str, list[tuple[Shard, Array]]] = {}
    for transfer in flow.into(ref):
        piece = transfer.piece
        for (producer, shard), array in held.items():
            if (
                producer == transfer.producer
                and (shard.value, shard.over) == (piece.value, piece.over)
                and shard.box.contains(piece.box)
            ):
                cut = scatter(array, shard.box, piece.box)
                if flow.halved(graph, transfer):
                    cut = rounded(cut)
                pieces.setdefault(piece.value, []).append((piece, cut))
                break
        else:
            raise AssertionError(f"{piece} was promised by {transfer.producer} and is not there")
    needs = flow.fields[ref].needs if ref in flow.fields else {}
    return {
        value: reduce(needs.get(value, graph.whole(value)), parts)
        for value, parts in pieces.items()
    }


def check_inputs(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays in C order, or ``InvalidInput`` that names both shapes, or both types."""
    unknown = sorted(set(inputs) - set(graph.inputs))
    missing = [name for name in graph.inputs if name not in inputs]
    if unknown or missing:
        raise InvalidInput(
            f"inputs {unknown or missing} {'are not of the model' if unknown else 'are missing'}",
            hint=f"the model's inputs are {list(graph.inputs)}",
        )
    checked = {}
    for name in graph.inputs:
        array, shape = np.asarray(inputs[name]), graph.shape(name)
        if shape is not None and array.shape != shape:
            raise InvalidInput(
                f"input {name!r} has shape {array.shape}, the model wants {shape}",
                hint="resize the array, or load the model for this shape",
            )
        if array.dtype != graph.numpy_dtype(name):
            raise InvalidInput(
                f"input {name!r} has type {array.dtype}, the model wants {graph.numpy_dtype(name)}",
                hint=f"convert it with array.astype('{graph.numpy_dtype(name)}')",
            )
        checked[name] = np.ascontiguousarray(array).reshape(array.shape)
    return checked
