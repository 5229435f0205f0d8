"""A plan becomes the programs of its devices: submodels, what they await, and what they send where.

The blobs (submodels and weights, by SHA-256) go with it, each weight made only when asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshinfer.graph import Graph
from meshinfer.lower import Submodel, lower
from meshinfer.plan import Plan, Shard
from meshinfer.protocol import messages as m
from meshinfer.transfers import Flow, TaskRef, derive


@dataclass(frozen=True, slots=True)
class Programs:
    """``by_device``: every device of the plan, source and sink included. ``blobs``: their bytes."""

    by_device: Mapping[str, tuple[m.Program, ...]]
    blobs: Mapping[str, Callable[[], bytes | memoryview]]
    flops: Mapping[str, int]


def make_programs(graph: Graph, plan: Plan) -> Programs:
    """Lower every task of a valid plan."""
    flow = derive(graph, plan)
    made: dict[str, list[m.Program]] = {}
    blobs: dict[str, Callable[[], bytes | memoryview]] = {}
    flops: dict[str, int] = {}
    made.setdefault(plan.source, []).append(_source(graph, flow))
    for s, stage in enumerate(plan.stages):
        for t, task in enumerate(stage.tasks):
            submodel = lower(graph, stage, task)
            digest = hashlib.sha256(submodel.model).hexdigest()
            blobs[digest] = _constant(submodel.model)
            for weight in submodel.weights:
                blobs[weight.digest] = _weight(graph, weight.shard)
            device = task.devices[0]
            flops[device] = flops.get(device, 0) + submodel.flops
            ref = TaskRef(s, t)
            made.setdefault(device, []).append(_task(flow, ref, submodel, digest))
    made.setdefault(plan.sink, []).append(_sink(graph, flow))
    return Programs({name: tuple(each) for name, each in made.items()}, blobs, flops)


def _source(graph: Graph, flow: Flow) -> m.Program:
    return m.Program(
        place=_place(flow.source),
        outputs=tuple(
            m.Output(name=name, shard=Shard(name, graph.whole(name))) for name in graph.inputs
        ),
        sends=_sends(flow, flow.source),
    )


def _task(flow: Flow, ref: TaskRef, submodel: Submodel, digest: str) -> m.Program:
    return m.Program(
        place=_place(ref),
        model=digest,
        weights=tuple(sorted({w.digest for w in submodel.weights})),
        inputs=tuple(_value(flow, ref, name, shard) for name, shard in submodel.inputs),
        outputs=tuple(m.Output(name=name, shard=shard) for name, shard in submodel.outputs),
        sends=_sends(flow, ref),
    )


def _sink(graph: Graph, flow: Flow) -> m.Program:
    return m.Program(
        place=_place(flow.sink),
        inputs=tuple(
            _value(flow, flow.sink, name, Shard(name, graph.whole(name)))
            for name in dict.fromkeys(graph.outputs)
        ),
    )


def _value(flow: Flow, ref: TaskRef, name: str, shard: Shard) -> m.Value:
    return m.Value(
        name=name,
        box=shard,
        pieces=tuple(
            m.Piece(shard=t.piece, producer=_place(t.producer))
            for t in flow.into(ref)
            if t.piece.value == shard.value
        ),
    )


def _sends(flow: Flow, ref: TaskRef) -> tuple[m.Send, ...]:
    return tuple(
        m.Send(piece=t.piece, device=t.receiver, consumer=_place(t.consumer))
        for t in flow.out_of(ref)
    )


def _place(ref: TaskRef) -> m.Place:
    return (ref.stage, ref.task)


def _constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _weight(graph: Graph, shard: Shard) -> Callable[[], memoryview]:
    return lambda: graph.weight_bytes(shard.value, shard.box)
