"""The last refinement of a layout: single borders between devices, moved by whole rows, columns or
features away from whoever holds a stage up. A move stays when the timeline gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from meshinfer.identity import DeviceId
from meshinfer.planner.bands import Block, cells_of, members_of
from meshinfer.planner.candidates import Candidate, Choice

EFFORT = 7_000
"""See ``Choice.effort``; about half a second."""
LATEST = 2
"""Of each block, so many of the devices that are done last give something away."""


@dataclass(frozen=True, slots=True)
class Cells:
    """A split block in whole elements of its largest value: how many each group of devices has of
    the first axis, and each device of the second."""

    outer: tuple[int, ...]
    inner: tuple[tuple[int, ...], ...]
    steps: tuple[int, int]

    @staticmethod
    def of(choice: Choice, block: Block) -> Cells | None:
        """The cells of a block; None where nothing is split, or somebody has nothing."""
        if len(block.shares) < 2 or block.whole_on is not None:
            return None
        graph, live = choice.graph, choice.graph.live_outputs(block.start, block.stop)
        largest = max(live, key=graph.nbytes)
        _, cells, steps = cells_of(graph, choice.space.axes, block, largest)
        rows = members_of(block.kind, cells)
        outer = tuple(row[0][0].size for row in rows)
        inner = tuple(tuple(inside.size for _, inside in row) for row in rows)
        if not min(min(outer), *map(min, inner)):
            return None  # zero weights stand for no cells
        return Cells(outer, inner, steps)

    def shares(self, block: Block) -> Block:
        """The block with the weights that stand for these cells."""
        weights = [
            rows * columns / sum(row)
            for rows, row in zip(self.outer, self.inner, strict=True)
            for columns in row
        ]
        names = [device for device, _ in block.shares]
        return replace(block, shares=tuple(zip(names, weights, strict=True)))

    def less(self, device: int) -> Iterator[Cells]:
        """Cells where this device, by its place in the block, has a little less."""
        stops = list(accumulate(len(row) for row in self.inner))
        group = next(g for g, stop in enumerate(stops) if device < stop)
        place = device - stops[group] + len(self.inner[group])
        for outer in _given(self.outer, group, self.steps[0]):
            yield replace(self, outer=outer)
        for row in _given(self.inner[group], place, self.steps[1]):
            rows = (*self.inner[:group], row, *self.inner[group + 1 :])
            yield replace(self, inner=rows)


def _given(sizes: tuple[int, ...], place: int, step: int) -> Iterator[tuple[int, ...]]:
    """One part gives a step, or an eighth of it, to another; nobody is left with nothing."""
    for amount in dict.fromkeys((sizes[place] // 8 // step * step, step)):
        if 0 < amount < sizes[place]:
            for other in range(len(sizes)):
                if other != place:
                    new = list(sizes)
                    new[place], new[other] = new[place] - amount, new[other] + amount
                    yield tuple(new)


def settle(choice: Choice, best: Candidate, effort: int = EFFORT) -> Candidate:
    """The candidate after all moves of one border that help, until none does or the effort is
    spent. Never worse than it was, by ``Choice.key``."""
    until = choice.effort + effort
    moved = True
    while moved and choice.effort < until:
        moved = False
        for i in _by_slack(best):
            found = _of_one(choice, best, i, until)
            moved = moved or found is not best
            best = found
    return best


def _of_one(choice: Choice, best: Candidate, i: int, until: int) -> Candidate:
    """The best moves within one block, one after another."""
    while choice.effort < until and i < len(best.blocks):
        found = best
        for blocks in _moves(choice, best, i):
            if choice.effort >= until:
                break
            rival = choice.candidate(f"{best.name.split(';')[0]}; borders moved", blocks, {})
            found = rival if _rank(choice, rival) < _rank(choice, found) else found
        if found is best:
            break
        best = found
    return best


def _moves(choice: Choice, best: Candidate, i: int) -> Iterator[Sequence[Block]]:
    block = best.blocks[i]
    cells = Cells.of(choice, block)
    if cells is None:
        return
    names = [device for device, _ in block.shares]
    for device in _latest(best, i)[:LATEST]:
        for other in cells.less(names.index(device)):
            yield [*best.blocks[:i], other.shares(block), *best.blocks[i + 1 :]]


def _rank(choice: Choice, c: Candidate) -> tuple[float, ...]:
    """As ``Choice.key``, then how uneven tasks are: two devices that hold a stage up alike must
    both be given less before anything is gained."""
    uneven = sum((span.end_s - span.start_s) ** 2 for span in c.timeline.tasks)
    return (*choice.key(c), uneven)


def _latest(best: Candidate, i: int) -> list[DeviceId]:
    """The devices of a block, the one that is done last first."""
    ends: dict[DeviceId, float] = {}
    for span in best.timeline.tasks:
        if span.ref.stage == i:
            ends[span.device] = max(ends.get(span.device, 0.0), span.end_s)
    return sorted(ends, key=lambda d: (-ends[d], d))


def _by_slack(best: Candidate) -> list[int]:
    """The blocks, the one first whose devices compute for the most different times."""
    times: dict[int, dict[str, float]] = {}
    for span in best.timeline.tasks:
        own = times.setdefault(span.ref.stage, {})
        own[span.device] = own.get(span.device, 0.0) + span.end_s - span.start_s
    gaps = {s: max(own.values()) - sum(own.values()) / len(own) for s, own in times.items()}
    return sorted(gaps, key=lambda s: (-gaps[s], s))
