"""A plan becomes the programs of its devices: submodels, what they await, what they send where.

The blobs (submodels and weights, by SHA-256) go with it, each weight made only when asked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from meshinfer import limits
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.lower import Submodel, lower
from meshinfer.ops import BARRIER, rule_of
from meshinfer.plan import Plan, Shard
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import DTYPES
from meshinfer.transfers import Flow, TaskRef, Transfer, derive


@dataclass(frozen=True, slots=True)
class Programs:
    """``by_device``: every device of the plan, source and sink included. ``blobs``: their bytes.

    ``report``: barriers, share of the FLOPs distributed, weights a device, in lines for people.
    """

    by_device: Mapping[str, tuple[m.Program, ...]]
    blobs: Mapping[str, Callable[[], bytes | memoryview]]
    report: tuple[str, ...]


def make_programs(graph: Graph, plan: Plan) -> Programs:
    """Lower every task of a valid plan. Raises ``InvalidInput`` for values that cannot travel."""
    flow = derive(graph, plan)
    ends = _Ends(flow)
    for transfer in flow.transfers:
        _check(graph, transfer.piece)
    for name in graph.outputs:
        _check(graph, Shard(name, graph.whole(name)))  # it goes to the client in one piece
    made: dict[str, list[m.Program]] = {}
    blobs: dict[str, Callable[[], bytes | memoryview]] = {}
    work = _Work()
    made.setdefault(plan.source, []).append(_source(graph, flow, ends))
    for s, stage in enumerate(plan.stages):
        for t, task in enumerate(stage.tasks):
            submodel = lower(graph, stage, task)
            digest = hashlib.sha256(submodel.model).hexdigest()
            blobs[digest] = _constant(submodel.model)
            for weight in submodel.weights:
                blobs[weight.digest] = _weight(graph, weight.shard)
            device = task.devices[0]
            work.add(device, submodel, shared=len({t.devices[0] for t in stage.tasks}) > 1)
            ref = TaskRef(s, t)
            made.setdefault(device, []).append(_task(ends, ref, submodel, digest))
    made.setdefault(plan.sink, []).append(_sink(graph, flow, ends))
    by_device = {name: tuple(each) for name, each in made.items()}
    return Programs(by_device, blobs, tuple(work.report(graph)))


class _Work:
    """What the plan comes to, for people: barriers, share of the work that is tiled, weights."""

    def __init__(self) -> None:
        self._flops = {True: 0, False: 0}
        self._weights: dict[str, dict[str, int]] = {}

    def add(self, device: str, submodel: Submodel, *, shared: bool) -> None:
        self._flops[shared] += submodel.flops
        held = self._weights.setdefault(device, {})
        held.update({weight.digest: weight.nbytes for weight in submodel.weights})

    def report(self, graph: Graph) -> Iterator[str]:
        barriers = Counter(op.type for op in graph.ops if rule_of(op) is BARRIER)
        names = ", ".join(f"{count} {name}" for name, count in sorted(barriers.items()))
        yield f"barriers, which run whole on one device: {names or 'none'}"
        share = self._flops[True] / max(1, sum(self._flops.values()))
        yield f"{share:.1%} of the FLOPs are in stages that several devices share"
        for device, held in self._weights.items():
            yield f"{device} holds {sum(held.values()) / 1e6:.1f} MB of weights"


class _Ends:
    """The transfers by the task that they leave and by the one that they reach."""

    def __init__(self, flow: Flow) -> None:
        self._out: defaultdict[TaskRef, list[Transfer]] = defaultdict(list)
        self._into: defaultdict[tuple[TaskRef, str], list[Transfer]] = defaultdict(list)
        for transfer in flow.transfers:
            self._out[transfer.producer].append(transfer)
            self._into[transfer.consumer, transfer.piece.value].append(transfer)

    def sends(self, ref: TaskRef) -> tuple[m.Send, ...]:
        return tuple(
            m.Send(piece=t.piece, device=t.receiver, consumer=_place(t.consumer))
            for t in self._out[ref]
        )

    def value(self, ref: TaskRef, name: str, shard: Shard) -> m.Value:
        pieces = tuple(
            m.Piece(shard=t.piece, producer=_place(t.producer))
            for t in self._into[ref, shard.value]
        )
        return m.Value(name=name, box=shard, pieces=pieces)


def _source(graph: Graph, flow: Flow, ends: _Ends) -> m.Program:
    return m.Program(
        place=_place(flow.source),
        outputs=tuple(
            m.Output(name=name, shard=Shard(name, graph.whole(name))) for name in graph.inputs
        ),
        sends=ends.sends(flow.source),
    )


def _task(ends: _Ends, ref: TaskRef, submodel: Submodel, digest: str) -> m.Program:
    return m.Program(
        place=_place(ref),
        model=digest,
        weights=tuple(sorted({w.digest for w in submodel.weights})),
        inputs=tuple(ends.value(ref, name, shard) for name, shard in submodel.inputs),
        outputs=tuple(m.Output(name=name, shard=shard) for name, shard in submodel.outputs),
        sends=ends.sends(ref),
    )


def _sink(graph: Graph, flow: Flow, ends: _Ends) -> m.Program:
    return m.Program(
        place=_place(flow.sink),
        inputs=tuple(
            ends.value(flow.sink, name, Shard(name, graph.whole(name)))
            for name in dict.fromkeys(graph.outputs)
        ),
    )


def _check(graph: Graph, piece: Shard) -> None:
    """Raises ``InvalidInput`` for a piece that no message can carry."""
    dtype = graph.dtype(piece.value)
    try:
        known = dtype is not None and graph.numpy_dtype(piece.value).newbyteorder("<").str in DTYPES
    except TypeError:
        known = False
    why = ""
    if not known:
        why = f"its type is {'no tensor' if dtype is None else dtype.name}"
    elif not 0 < len(piece.value) <= limits.NAME_CHARS:
        why = f"its name has {len(piece.value)} characters, more than {limits.NAME_CHARS}"
    elif graph.nbytes(piece.value, piece.box) > limits.MESSAGE_BYTES:
        why = f"a piece of it has more than {limits.MESSAGE_BYTES} bytes"
    if why:
        raise InvalidInput(
            f"value {piece.value[:80]!r} cannot travel between devices: {why}",
            hint="inputs and outputs of a deployed model, and what devices exchange, are tensors "
            "of numbers of moderate size",
        )


def _place(ref: TaskRef) -> m.Place:
    return (ref.stage, ref.task)


def _constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _weight(graph: Graph, shard: Shard) -> Callable[[], memoryview]:
    return lambda: graph.weight_bytes(shard.value, shard.box)
