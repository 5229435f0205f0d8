"""Local search from a candidate: borders, cuts, kinds, devices and rounds, each held against the
timeline. A change stays when the objective gains; nothing is random and no clock is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from meshinfer.identity import DeviceId
from meshinfer.planner.bands import Block, joined, splittable
from meshinfer.planner.candidates import Candidate, Choice
from meshinfer.planner.space import CHANNEL_HEAVY
from meshinfer.transfers import TaskRef

EFFORT = 14_000
"""Of one local search, see ``Choice.effort``; about a second."""
PASSES = 3
MOST_ROUNDS = 16
MOST_OVERLAPS = 4
LEAST_GAIN = 1e-3
"""A change that gains less than this share is not worth looking for another."""

_Layout = list[Block]


def refine(choice: Choice, best: Candidate, effort: int = EFFORT) -> Candidate:
    """The candidate after all changes that help, until none does or the effort is spent."""
    until = choice.effort + effort
    best = balance(choice, best)
    for _ in range(PASSES):
        before = choice.key(best)
        for moves in (_rounds, _other_cuts, _other_ways, _rounds):
            best = _climb(choice, best, moves, until)
        best = balance(choice, best)
        if choice.effort >= until or not _gained(before, choice.key(best)):
            break
    return best


_Key = tuple[int, int, float, float, int, int]


def _gained(before: _Key, after: _Key) -> bool:
    return after[:2] < before[:2] or after[2] < before[2] * (1 - LEAST_GAIN)


def _climb(choice: Choice, best: Candidate, moves: object, until: int) -> Candidate:
    assert callable(moves)
    position = 0
    while position < len(best.blocks) and choice.effort < until:
        found = best
        for name, blocks in moves(choice, best, position):
            if choice.effort >= until:
                break
            rival = choice.candidate(_variant(best, name), blocks, {})
            found = rival if choice.key(rival) < choice.key(found) else found
        if found is best:
            position += 1
        else:
            best = found
    return best


def _variant(c: Candidate, how: str) -> str:
    return f"{c.name.split(';')[0]}; {how}"


def balance(choice: Choice, best: Candidate, rounds: int = 4) -> Candidate:
    """Move the borders of every block towards devices that are done early.

    First by how long each computes, then by when each has done (those that get their input late, or
    must send before others, get less).
    """
    for how in (_by_duration, _by_end):
        for _ in range(rounds):
            weights = how(choice, best)
            blocks = [
                replace(b, shares=weights.get(i, b.shares)) for i, b in enumerate(best.blocks)
            ]
            rival = choice.candidate(_variant(best, "balanced"), blocks, {})
            if not choice.key(rival) < choice.key(best):
                best = _one_by_one(choice, best, weights)
                break
            best = rival
    return best


def _one_by_one(
    choice: Choice, best: Candidate, weights: dict[int, tuple[tuple[DeviceId, float], ...]]
) -> Candidate:
    """Where new borders everywhere do not help, they may in some blocks."""
    if len(choice.order) > 16:
        return best
    for i, shares in weights.items():
        if i < len(best.blocks) and best.blocks[i].shares != shares:
            blocks = [replace(b, shares=shares) if j == i else b for j, b in enumerate(best.blocks)]
            rival = choice.candidate(_variant(best, "balanced"), blocks, {})
            best = rival if choice.key(rival) < choice.key(best) else best
    return best


_Weights = dict[int, tuple[tuple[DeviceId, float], ...]]


def _by_duration(choice: Choice, c: Candidate) -> _Weights:
    return _weights(c, {s.ref: (0.0, s.end_s - s.start_s) for s in c.timeline.tasks})


def _by_end(choice: Choice, c: Candidate) -> _Weights:
    """As if each task had as long as from the first one's start of its stage to its own end."""
    begun: dict[int, float] = {}
    for span in c.timeline.tasks:
        stage = span.ref.stage
        begun[stage] = min(begun.get(stage, span.start_s), span.start_s)
    spans = {s.ref: (s.start_s - begun[s.ref.stage], s.end_s - s.start_s) for s in c.timeline.tasks}
    return _weights(c, spans)


def _weights(c: Candidate, spans: dict[TaskRef, tuple[float, float]]) -> _Weights:
    """New shares: as much time for each device, after waiting and fixed costs, as for the others.

    ``spans``: seconds that each task waits, and that it computes.
    """
    found: _Weights = {}
    for s, block in enumerate(c.blocks):
        if len(block.shares) < 2:
            continue
        waits = dict.fromkeys((d for d, _ in block.shares), 0.0)
        takes = dict.fromkeys(waits, 0.0)
        first: set[DeviceId] = set()
        for t, task in enumerate(c.plan.stages[s].tasks):
            wait, took = spans[TaskRef(s, t)]
            device = task.devices[0]
            if device not in first:
                waits[device] = wait
            first.add(device)
            takes[device] += took
        goal = sum(waits[d] + takes[d] for d in waits) / len(waits)
        shares = []
        for device, weight in block.shares:
            room = max(goal - waits[device], goal / 8)
            shares.append((device, weight * (room / max(takes[device], goal / 8)) ** 0.7))
        total = sum(weight for _, weight in shares)
        found[s] = tuple((d, round(w / total, 6)) for d, w in shares)
    return found


# -- moves: layouts that differ from a candidate in one block -------------------------------------


def _other_cuts(choice: Choice, c: Candidate, i: int) -> Iterator[tuple[str, Sequence[Block]]]:
    """Merge a block with the next, move the cut between them, or put another cut into it."""
    blocks, space = list(c.blocks), choice.space
    if space.fixed:
        return
    block = blocks[i]
    inside = [cut for cut in space.cuts if block.start < cut < block.stop]
    if i + 1 < len(blocks):
        after = blocks[i + 1]
        for model in (block, after):
            merged = replace(model, start=block.start, stop=after.stop)
            if _fits(choice, merged):
                yield "merged", [*blocks[:i], merged, *blocks[i + 2 :]]
        later = [cut for cut in space.cuts if after.start < cut < after.stop]
        for cut in (*inside[-1:], *later[:1]):
            pair = [replace(block, stop=cut), replace(after, start=cut)]
            if all(_fits(choice, b) for b in pair):
                yield "cut moved", [*blocks[:i], *pair, *blocks[i + 2 :]]
    for cut in _some(inside, 2):
        pair = [replace(block, stop=cut), replace(block, start=cut)]
        if all(_fits(choice, b) for b in pair):
            yield "cut", [*blocks[:i], *pair, *blocks[i + 1 :]]


def _other_ways(choice: Choice, c: Candidate, i: int) -> Iterator[tuple[str, Sequence[Block]]]:
    """Another kind of split, fewer or more devices, or one alone."""
    blocks = list(c.blocks)
    block = blocks[i]

    def changed(new: Block) -> _Layout:
        return joined([*blocks[:i], new, *blocks[i + 1 :]])

    members = [p for p in choice.order if p.id in c.shares] or list(choice.order)
    usual = tuple((p.id, p.flops_per_s) for p in members)
    shares = block.shares or usual
    allowed = choice.space.pins.allowed(block.start, block.stop)
    if allowed is not None:
        usual = tuple((p.id, p.flops_per_s) for p in choice.order if p.id in allowed)
        shares = usual
    sums = choice.space.sums.heavy
    heavy = sums[block.stop] - sums[block.start]
    counts = (len(shares), len(usual), -(-len(usual) // 2), max(2, len(usual) - 1))
    for count in dict.fromkeys(counts):
        some = shares if count == len(shares) else usual[:count]
        for kind in choice.space.axes.kinds(len(some)):
            if kind in ("channels", "slabs") and heavy > CHANNEL_HEAVY:
                continue  # each operator more would read everything again
            new = Block(block.start, block.stop, None, kind, some, block.rounds)
            if new != block and len(some) > 1 and _fits(choice, new):
                yield f"{kind} on {len(some)}", changed(new)
    near = [p for p in choice.order if any(p.beside(choice.profile(e)) for e in choice.ends)]
    for p in dict.fromkeys((*choice.order[:1], *near[:2])):
        if block.whole_on != p.id:
            yield f"whole on {p.id}", changed(Block(block.start, block.stop, p.id))


def _rounds(choice: Choice, c: Candidate, i: int) -> Iterator[tuple[str, Sequence[Block]]]:
    """More tasks than devices: where what is sent first or last could overlap with computing, and
    everywhere where memory is short, since a device holds one task's values at a time."""
    block, blocks = c.blocks[i], list(c.blocks)
    short = choice.objective == "memory" or choice.excess(c) > 0
    if block.whole_on is not None and short and not block.others:
        block = Block(block.start, block.stop, None, "rows", ((block.whole_on, 1.0),))
        if not _fits(choice, block):
            return
    if block.whole_on is None and (short or i in (0, len(blocks) - 1)):
        most = MOST_ROUNDS if short else MOST_OVERLAPS
        for rounds in (block.rounds + 1, 2 * block.rounds, block.rounds - 1):
            if 1 <= rounds <= most:
                new = replace(block, rounds=rounds)
                yield f"{rounds} rounds", [*blocks[:i], new, *blocks[i + 1 :]]


def _fits(choice: Choice, block: Block) -> bool:
    if block.whole_on is not None:
        return True
    graph, axes = choice.graph, choice.space.axes
    return splittable(graph, axes, block.start, block.stop, block.kind)


def _some(cuts: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly."""
    if len(cuts) <= most:
        return list(cuts)
    return [cuts[(2 * i + 1) * len(cuts) // (2 * most)] for i in range(most)]
