"""The receptive field of a fused block: which boxes a task computes and reads. Derived, backwards.

A task names boxes of its stage's live values; walking the ops back to front gives for each value
the hull of all that is read of it. What a device reads beyond its own box is its halo.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshinfer.geometry import Box, hull
from meshinfer.graph import Graph, Op
from meshinfer.ops import Boxes, rule_of
from meshinfer.plan import Shard, Stage, Task


@dataclass(frozen=True, slots=True)
class Job:
    """One op computed for one task: aligned output boxes, what it reads, which part of its sum.

    ``partial`` is the shard that a partial sum is computed for; None when ``over`` is.
    """

    op: Op
    outs: Boxes
    ins: Boxes
    over: Box | None
    partial: Shard | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """Names behind ``ins``: inputs, then captured values for a barrier."""
        return (*self.op.inputs, *self.op.captured)[: len(self.ins)]


@dataclass(frozen=True, slots=True)
class Field:
    """A task's receptive field. ``jobs`` in order of computation; ``needs``: box of each value
    read.

    ``fetches`` are the needed values that come from outside the stage (other tasks or the source),
    ``weights`` those that are initializers.
    """

    jobs: tuple[Job, ...]
    needs: dict[str, Box]
    fetches: tuple[str, ...]
    weights: tuple[str, ...]


def receptive_field(graph: Graph, stage: Stage, task: Task) -> Field:
    """Walk the stage back to front from the task's outputs (Luo et al. 2016, "receptive field")."""
    needs: dict[str, Box] = {}
    partial: dict[str, list[Shard]] = {}
    for shard in task.outputs:
        if shard.over is not None:
            partial.setdefault(shard.value, []).append(shard)
        else:
            _need(needs, shard.value, shard.box)
    jobs: list[Job] = []
    for op in reversed(graph.ops[stage.start : stage.stop]):
        for outs, part in reversed(_asked(op, needs, partial)):
            rule = rule_of(op)
            aligned = rule.align(op, outs)
            over = part.over if part is not None else None
            job = Job(op, aligned, rule.footprint(op, aligned, over), over, part)
            for name, box in zip(job.reads, job.ins, strict=True):
                if name and box is not None:
                    _need(needs, name, box)
            jobs.append(job)
    inside = set(graph.produced(stage.start, stage.stop))
    return Field(
        jobs=tuple(reversed(jobs)),
        needs=needs,
        fetches=tuple(n for n in needs if n not in inside and not graph.is_initializer(n)),
        weights=tuple(n for n in needs if n not in inside and graph.is_initializer(n)),
    )


def _need(needs: dict[str, Box], value: str, box: Box) -> None:
    needs[value] = hull((needs[value], box)) if value in needs else box


def _asked(
    op: Op, needs: dict[str, Box], partial: dict[str, list[Shard]]
) -> list[tuple[Boxes, Shard | None]]:
    """What is asked of an op: its needed outputs at once, and each partial sum by itself."""
    asked: list[tuple[Boxes, Shard | None]] = [
        ((shard.box,), shard) for name in op.outputs if name for shard in partial.get(name, ())
    ]
    outs: Boxes = tuple(needs.get(name) if name else None for name in op.outputs)
    if any(box is not None for box in outs):
        asked.append((outs, None))
    return asked
