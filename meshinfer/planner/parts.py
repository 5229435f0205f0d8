"""What many layouts of one graph have in common, made once: stages, loads of tasks, messages."""

from __future__ import annotations

from collections.abc import Sequence

from meshinfer.cost import Boxes, Load, Message, load_of
from meshinfer.geometry import Box
from meshinfer.graph import Graph
from meshinfer.halo import Field, receptive_field
from meshinfer.plan import Shard, Stage, Task
from meshinfer.planner.axes import Axes
from meshinfer.planner.bands import Block, stage_of
from meshinfer.transfers import TaskRef

_SOURCE = -1

_Into = tuple[tuple[int, int, int, int, int], ...]
"""Messages into one stage: which of its makers (-1: the source), the task there, the task here,
bytes, and bytes on a link."""


class Parts:
    """Remembers by block: a layout that shares blocks with an earlier one shares their parts.

    The messages agree with those of ``meshinfer.transfers.derive``, in the same order.
    """

    def __init__(self, graph: Graph, axes: Axes) -> None:
        self.graph, self.axes = graph, axes
        self._stages: dict[Block, Stage] = {}
        self._fields: dict[tuple[int, int, tuple[Shard, ...]], tuple[Field, Load]] = {}
        self._tasks: dict[Block, tuple[tuple[Field, Load], ...]] = {}
        self._makers: dict[Block, tuple[int, ...]] = {}
        self._into: dict[tuple[Block | None, tuple[Block, ...]], _Into] = {}
        self._refs: dict[tuple[int, int], TaskRef] = {}
        self._numbers: Boxes = {}

    def ref(self, stage: int, task: int) -> TaskRef:
        known = self._refs.get((stage, task))
        if known is None:
            known = self._refs[stage, task] = TaskRef(stage, task)
        return known

    def stage(self, block: Block) -> Stage:
        if block not in self._stages:
            self._stages[block] = stage_of(self.graph, self.axes, block)
        return self._stages[block]

    def loads(self, block: Block) -> Sequence[Load]:
        return [load for _, load in self._of(block)]

    def _of(self, block: Block) -> tuple[tuple[Field, Load], ...]:
        if block not in self._tasks:
            stage = self.stage(block)
            self._tasks[block] = tuple(self._field(stage, task) for task in stage.tasks)
        return self._tasks[block]

    def _field(self, stage: Stage, task: Task) -> tuple[Field, Load]:
        key = (stage.start, stage.stop, task.outputs)
        if key not in self._fields:
            field = receptive_field(self.graph, stage, task)
            self._fields[key] = (field, load_of(self.graph, field, self._numbers))
        return self._fields[key]

    def messages(self, layout: Sequence[Block]) -> list[Message]:
        """All messages of a layout, in order of their consumers."""
        found: list[Message] = []
        where = {}  # op -> its stage
        for s, block in enumerate(layout):
            where.update(dict.fromkeys(range(block.start, block.stop), s))
        ends: list[Block | None] = [*layout, None]
        for s, end in enumerate(ends):
            stages = tuple(sorted({where[op] for op in self._made_by(end)}))
            makers = tuple(layout[i] for i in stages)
            for maker, producer, consumer, nbytes, wire in self._messages(end, makers):
                sender = _SOURCE if maker == _SOURCE else stages[maker]
                found.append((self.ref(sender, producer), self.ref(s, consumer), nbytes, wire))
        return found

    def _made_by(self, block: Block | None) -> tuple[int, ...]:
        """Ops outside a block that make what it reads; for None, what the sink reads."""
        if block is None:
            return tuple({self.graph.producer.get(n, -1) for n in self.graph.outputs} - {-1})
        if block not in self._makers:
            fetched = {name for field, _ in self._of(block) for name in field.fetches}
            ops = {self.graph.producer.get(name, -1) for name in fetched} - {-1}
            self._makers[block] = tuple(ops)
        return self._makers[block]

    def _messages(self, block: Block | None, makers: tuple[Block, ...]) -> _Into:
        """Messages into a block from the source and from the blocks that make what it reads."""
        key = (block, makers)
        if key in self._into:
            return self._into[key]
        holders: dict[str, list[tuple[Shard, int, int]]] = {
            name: [(Shard(name, self.graph.whole(name)), _SOURCE, 0)] for name in self.graph.inputs
        }
        for m, maker in enumerate(makers):
            for t, task in enumerate(self.stage(maker).tasks):
                for shard in task.outputs:
                    holders.setdefault(shard.value, []).append((shard, m, t))
        shares = {n: 1.0 if block is None else self.graph.wire_share(n) for n in holders}
        total: dict[tuple[int, int, int], tuple[int, int]] = {}
        for consumer, needs in enumerate(self._needs(block)):
            for value, box in needs:
                for shard, m, t in holders.get(value, ()):
                    nbytes = _common(self.graph, shard, box)
                    if nbytes is not None:
                        place = (m, t, consumer)
                        before, crossed = total.get(place, (0, 0))
                        half = shares[value] < 1.0 and m != _SOURCE and shard.over is None
                        wire = nbytes // 2 if half else nbytes
                        total[place] = (before + nbytes, crossed + wire)
        self._into[key] = tuple((*place, *nbytes) for place, nbytes in total.items())
        return self._into[key]

    def _needs(self, block: Block | None) -> list[list[tuple[str, Box]]]:
        """What each task of a block fetches; for None, what the sink does."""
        if block is None:
            return [[(n, self.graph.whole(n)) for n in dict.fromkeys(self.graph.outputs)]]
        return [[(n, field.needs[n]) for n in field.fetches] for field, _ in self._of(block)]


def _common(graph: Graph, held: Shard, box: Box) -> int | None:
    """Bytes that both boxes hold, None for nothing in common."""
    volume = 1
    for (a, b), (c, d) in zip(held.box.axes, box.axes, strict=True):
        low, high = (a if a > c else c), (b if b < d else d)
        if high <= low:
            return None if held.box != box else graph.nbytes(held.value, box)
        volume *= high - low
    return (
        graph.nbytes(held.value, None)
        if not box.axes
        else int(volume * graph.itemsize(held.value) + 0.999)
    )
