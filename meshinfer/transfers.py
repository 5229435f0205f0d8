"""All communication of a plan, derived: which box of which value moves from which task to which.

Scatter, halo, hand-over and gather are the same thing: a box that one task holds and another needs.
Boxes are looked up by value, so skip connections cross stages by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from meshinfer.geometry import Box
from meshinfer.graph import Graph
from meshinfer.halo import Field, receptive_field
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan, Shard


class TaskRef(NamedTuple):  # a tuple, since planning hashes millions of them
    """A task by its place in the plan. The source is stage -1, the sink stage ``len(stages)``."""

    stage: int
    task: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """``piece`` moves from the task that made it to one that reads it."""

    piece: Shard
    producer: TaskRef
    consumer: TaskRef
    sender: DeviceId
    receiver: DeviceId

    @property
    def local(self) -> bool:
        """Whether it stays on its device: no bytes on any wire."""
        return self.sender == self.receiver


@dataclass(frozen=True, slots=True)
class Flow:
    """A plan with everything derived: fields of the tasks and all transfers, in plan order."""

    plan: Plan
    fields: Mapping[TaskRef, Field]
    transfers: tuple[Transfer, ...]
    source: TaskRef
    sink: TaskRef

    def device(self, ref: TaskRef) -> DeviceId:
        if ref == self.source:
            return self.plan.source
        if ref == self.sink:
            return self.plan.sink
        return self.plan.stages[ref.stage].tasks[ref.task].devices[0]

    def halved(self, graph: Graph, transfer: Transfer) -> bool:
        """Whether a piece goes as float16: of a float32 value, from one task to another, where the
        plan lets it leave its device.

        What the source scatters and the sink gathers is as the user gave it and as it was made;
        parts of a sum are yet to be added. What the plan keeps on one device stays exact. Where any
        of several devices may take one of the two tasks, it is rounded on its own device too, so
        that a request's answer does not depend on who takes a task, nor on a second copy.
        """
        if graph.wire_share(transfer.piece.value) == 1.0 or transfer.piece.over is not None:
            return False
        if transfer.producer == self.source or transfer.consumer == self.sink:
            return False
        stages = self.plan.stages
        ends = (stages[s].tasks[t].devices for s, t in (transfer.producer, transfer.consumer))
        return len({device for devices in ends for device in devices}) > 1

    def wire_bytes(self, graph: Graph, transfer: Transfer) -> int:
        """Bytes that a piece takes on a link."""
        nbytes = graph.nbytes(transfer.piece.value, transfer.piece.box)
        return nbytes // 2 if self.halved(graph, transfer) else nbytes

    def into(self, ref: TaskRef) -> tuple[Transfer, ...]:
        return tuple(t for t in self.transfers if t.consumer == ref)

    def bytes_between(self, graph: Graph) -> dict[tuple[DeviceId, DeviceId], int]:
        """Bytes that cross each pair of devices for one request."""
        total: dict[tuple[DeviceId, DeviceId], int] = {}
        for t in self.transfers:
            if not t.local:
                key = (t.sender, t.receiver)
                total[key] = total.get(key, 0) + self.wire_bytes(graph, t)
        return total


def derive(graph: Graph, plan: Plan) -> Flow:
    """Intersect what each task needs with what earlier tasks (or the source) hold."""
    source, sink = TaskRef(-1, 0), TaskRef(len(plan.stages), 0)
    holders: dict[str, list[tuple[Shard, TaskRef, DeviceId]]] = {
        name: [(Shard(name, graph.whole(name)), source, plan.source)] for name in graph.inputs
    }
    fields: dict[TaskRef, Field] = {}
    transfers: list[Transfer] = []

    def fetch(value: str, box: Box, consumer: TaskRef, receiver: DeviceId) -> None:
        for held, producer, sender in holders[value]:
            common = held.box.intersect(box)
            if common.empty and held.box != box:
                continue
            piece = Shard(value, common, held.over)
            transfers.append(Transfer(piece, producer, consumer, sender, receiver))

    for s, stage in enumerate(plan.stages):
        refs = [TaskRef(s, t) for t in range(len(stage.tasks))]
        for ref, task in zip(refs, stage.tasks, strict=True):
            fields[ref] = receptive_field(graph, stage, task)
            for value in fields[ref].fetches:
                fetch(value, fields[ref].needs[value], ref, task.devices[0])
        for ref, task in zip(refs, stage.tasks, strict=True):
            for shard in task.outputs:
                holders.setdefault(shard.value, []).append((shard, ref, task.devices[0]))
    for value in dict.fromkeys(graph.outputs):
        if value in holders:
            fetch(value, graph.whole(value), sink, plan.sink)
    return Flow(plan, fields, tuple(transfers), source, sink)
