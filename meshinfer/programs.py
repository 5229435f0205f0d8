"""A plan becomes the programs of its devices: submodels, what they await, what they send where.

The blobs (submodels and weights, by SHA-256) go with it, each weight made only when asked for.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from meshinfer import limits
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.lower import Submodel, lower
from meshinfer.ops import is_random
from meshinfer.plan import Plan, Shard
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import DTYPES
from meshinfer.transfers import Flow, TaskRef, Transfer, derive


@dataclass(frozen=True, slots=True)
class Programs:
    """``by_device``: every device of the plan, source and sink included; a task with a spare device
    is with its own one. ``blobs``: their bytes."""

    by_device: Mapping[str, tuple[m.Program, ...]]
    blobs: Mapping[str, Callable[[], bytes | memoryview]]

    @property
    def spares(self) -> dict[m.Place, tuple[str, ...]]:
        """Of each task, who else prepares it."""
        return {p.place: p.spares for each in self.by_device.values() for p in each if p.spares}


def make_programs(
    graph: Graph, plan: Plan, spares: Mapping[TaskRef, tuple[DeviceId, ...]] = MappingProxyType({})
) -> Programs:
    """Lower every task of a valid plan. ``spares``: of some tasks with one device, others that are
    to run them if that is lost, the first one first. Raises ``InvalidInput`` for values that
    cannot travel."""
    flow = derive(graph, plan)
    ends = _Ends(graph, flow, spares)
    for transfer in flow.transfers:
        _check(graph, transfer.piece)
    for name in graph.outputs:
        _check(graph, Shard(name, graph.whole(name)))  # it goes to the client in one piece
    made: dict[str, list[m.Program]] = {}
    blobs: dict[str, Callable[[], bytes | memoryview]] = {}
    made.setdefault(plan.source, []).append(_source(graph, flow, ends))
    for s, stage in enumerate(plan.stages):
        for t, task in enumerate(stage.tasks):
            submodel = lower(graph, stage, task)
            digest = hashlib.sha256(submodel.model).hexdigest()
            blobs[digest] = _constant(submodel.model)
            for weight in submodel.weights:
                blobs[weight.digest] = _weight(graph, weight.shard)
            ref = TaskRef(s, t)
            devices = ends.devices(ref)
            program = _task(ends, ref, submodel, digest, devices if len(devices) > 1 else ())
            for device in devices[:1] if program.spare else devices:
                made.setdefault(device, []).append(program)
    made.setdefault(plan.sink, []).append(_sink(graph, flow, ends))
    by_device = {name: tuple(each) for name, each in made.items()}
    return Programs(by_device, blobs)


class _Ends:
    """The transfers by the task that they leave and by the one that they reach."""

    def __init__(
        self, graph: Graph, flow: Flow, spares: Mapping[TaskRef, tuple[DeviceId, ...]]
    ) -> None:
        self._graph, self._flow, self.spares = graph, flow, spares
        self._out: defaultdict[TaskRef, list[Transfer]] = defaultdict(list)
        self._into: defaultdict[tuple[TaskRef, str], list[Transfer]] = defaultdict(list)
        self._slots: defaultdict[TaskRef, dict[Shard, int]] = defaultdict(dict)
        for transfer in flow.transfers:
            self._out[transfer.producer].append(transfer)
            self._into[transfer.consumer, transfer.piece.value].append(transfer)
            slots = self._slots[transfer.consumer]
            slots.setdefault(transfer.piece, len(slots))

    def devices(self, ref: TaskRef) -> tuple[str, ...]:
        """Those that may take a task. What is drawn at random must not be drawn twice."""
        if ref in (self._flow.source, self._flow.sink):
            return (self._flow.device(ref),)
        if ref in self.spares:
            return (self._flow.device(ref), *self.spares[ref])
        stage = self._flow.plan.stages[ref.stage]
        devices = stage.tasks[ref.task].devices
        once = len(devices) > 1 and any(map(is_random, self._graph.ops[stage.start : stage.stop]))
        return devices[:1] if once else devices

    def sends(self, ref: TaskRef) -> tuple[m.Send, ...]:
        found = []
        for t in self._out[ref]:
            first, *others = self.devices(t.consumer)
            send = m.Send(
                piece=t.piece,
                device=first,
                consumer=_place(t.consumer),
                slot=self._slots[t.consumer][t.piece],
                others=tuple(others),
                half=self._flow.halved(self._graph, t),
                spare=t.consumer in self.spares,
            )
            found.append(send)
        return tuple(found)

    def value(self, ref: TaskRef, name: str, shard: Shard) -> m.Value:
        pieces = tuple(
            m.Piece(
                shard=t.piece,
                producer=_place(t.producer),
                slot=self._slots[ref][t.piece],
                half=self._flow.halved(self._graph, t),
            )
            for t in self._into[ref, shard.value]
        )
        dtype = self._graph.numpy_dtype(shard.value).newbyteorder("<").str if pieces else ""
        return m.Value(name=name, box=shard, pieces=pieces, dtype=dtype)


def _source(graph: Graph, flow: Flow, ends: _Ends) -> m.Program:
    return m.Program(
        place=_place(flow.source),
        outputs=tuple(
            m.Output(name=name, shard=Shard(name, graph.whole(name))) for name in graph.inputs
        ),
        sends=ends.sends(flow.source),
    )


def _task(
    ends: _Ends, ref: TaskRef, submodel: Submodel, digest: str, devices: tuple[str, ...]
) -> m.Program:
    return m.Program(
        place=_place(ref),
        devices=devices,
        model=digest,
        weights=tuple(sorted({w.digest for w in submodel.weights})),
        inputs=tuple(ends.value(ref, name, shard) for name, shard in submodel.inputs),
        outputs=tuple(m.Output(name=name, shard=shard) for name, shard in submodel.outputs),
        sends=ends.sends(ref),
        spare=ref in ends.spares,
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
