"""Finalists: layouts worth a timeline, from single devices to every device in several stages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise, permutations

from meshinfer.cost import DeviceProfile, variable_seconds
from meshinfer.identity import DeviceId
from meshinfer.planner.bands import Block, splittable
from meshinfer.planner.candidates import Candidate, Choice
from meshinfer.planner.search import FEW, search
from meshinfer.planner.space import HEAVY_A_BLOCK

Members = tuple[DeviceProfile, ...]

EVERYTHING = 1200
"""Most layouts of a small graph for which all are tried."""
MANY = 8
"""Requests go whole to each number of devices up to so many, and to all."""


def finalists(choice: Choice) -> Iterator[Candidate]:
    """Candidates without ``spread``: whoever is best may be improved further."""
    order = choice.order
    alone = [single(choice, p) for p in order]
    yield from alone
    top = choice.key(choice.best(alone))
    best: Candidate | None = None
    team: Members = ()
    worse = 0
    for members in teams(choice):
        shares = {p.id: p.flops_per_s for p in members}
        chain = search(choice.space, choice.team(members, shares))
        if chain is None:
            continue
        found = choice.candidate(f"{len(members)} devices", chain.blocks, shares)
        if best is None or choice.key(found) < choice.key(best):
            best, team, worse = found, members, 0
        else:
            worse += 1
        yield found
        gained = choice.key(best) < top and not choice.excess(best)
        if len(order) > FEW and worse >= (1 if gained else 3):
            break
    if team:
        yield from variants(choice, team)
    if any(p.memory_bytes for p in order):
        yield handed_on(choice)
    yield from everything(choice)
    if choice.objective == "throughput":
        yield from streams(choice)


def everything(choice: Choice) -> Iterator[Candidate]:
    """Every layout of a graph with so few cuts that each can have its timeline: all cuts, kinds,
    sets of devices that share, and places; none where that would be more than EVERYTHING."""
    space, order = choice.space, choice.order
    if len(order) > FEW or space.fixed:
        return
    sets = [members for n in range(1, len(order) + 1) for members in combinations(order, n)]
    inner = len(space.cuts) - 2
    ways = [len(m) + (len(space.axes.kinds(len(m))) if len(m) > 1 else 0) for m in sets]
    if sum(w * (1 + w) ** inner for w in ways) > EVERYTHING:
        return
    for members in sets:
        shares = {p.id: p.flops_per_s for p in members}
        kinds = space.axes.kinds(len(members)) if len(members) > 1 else ()
        chains: dict[int, list[tuple[Block, ...]]] = {0: [()]}
        for i, stop in enumerate(space.cuts[1:], start=1):
            found = {k: space.samples(i, k, len(members), 1 << 30) for k in kinds}
            chains[stop] = [
                (*chain, block)
                for start in space.cuts[:i]
                for block in (
                    *(Block(start, stop, None, k) for k in kinds if start in found[k]),
                    *(Block(start, stop, p.id) for p in members),
                )
                for chain in chains[start]
            ]
        for blocks in chains[space.cuts[-1]]:
            yield choice.candidate(f"{len(members)} devices, cut anyhow", blocks, shares)


def teams(choice: Choice) -> Iterator[Members]:
    """Sets of devices to search with: all there are of a few devices, else the most useful ones,
    from all downwards. Where links of pairs differ, it matters who is whose neighbour."""
    order = choice.order
    if len(order) <= FEW:
        ways = permutations if any(p.links for p in order) else combinations
        for count in range(len(order), 1, -1):
            yield from ways(order, count)
        return
    for count in reversed(_sizes(len(order))):
        yield order[:count]


def variants(choice: Choice, members: Members) -> Iterator[Candidate]:
    """Other layouts for the devices that seem to be the right ones."""
    shares, space = {p.id: p.flops_per_s for p in members}, choice.space
    for name, most in (("a stage a layer", 1), ("short blocks", 3)):
        chain = search(space, choice.team(members, shares), most=most, spread=True)
        if chain is not None:
            yield choice.candidate(f"{name}, {len(shares)} devices", chain.blocks, shares)
    if not space.fixed:
        blocks = big(choice, members[0].id)
        yield choice.candidate(f"big blocks, {len(shares)} devices", blocks, shares)


def single(choice: Choice, p: DeviceProfile) -> Candidate:
    """Everything on one device."""
    cuts = choice.space.cuts
    blocks = [Block(a, b, p.id) for a, b in pairwise(cuts)]  # which become one
    return choice.candidate(f"{p.id} alone", blocks, {p.id: 1.0})


def big(choice: Choice, fastest: DeviceId) -> list[Block]:
    """About four blocks of equal work; whole on the fastest device what cannot be cut."""
    cuts, flops = choice.space.cuts, choice.space.sums.flops
    goals = [flops[-1] * i / 4 for i in range(1, 4)]
    picked = {min(cuts[1:-1], key=lambda c: abs(flops[c] - g)) for g in goals if cuts[1:-1]}
    picked |= {c for c in cuts[1:-1] if c not in choice.space.axes.follows}
    bounds = sorted({cuts[0], cuts[-1], *picked})
    return [Block(a, b, None if _can_split(choice, a, b) else fastest) for a, b in pairwise(bounds)]


def _can_split(choice: Choice, start: int, stop: int) -> bool:
    space = choice.space
    i = space.cuts.index(stop)
    return splittable(space.graph, space.axes, start, stop, "rows") and start in (
        space.samples(i, "rows", 2, 1 << 30)
    )


def handed_on(choice: Choice) -> Candidate:
    """Layers in turn on one device after another, each filled up to its memory."""
    graph, blocks = choice.graph, list[Block]()
    devices, held, most = list(choice.order), 0, 0
    for a, b in pairwise(choice.space.cuts):
        names = dict.fromkeys(n for op in graph.ops[a:b] for n in op.inputs if n)
        weights = sum(graph.nbytes(n) for n in names if graph.is_initializer(n))
        made = graph.produced(a, b)
        reads = max((graph.nbytes(n) for n in names if n not in made), default=0)
        values = reads + sum(graph.nbytes(n) for n in made)
        most, room = max(most, values), devices[0].memory_bytes
        if room and held and held + weights + most > room and len(devices) > 1:
            devices, held, most = devices[1:], 0, values
        held += weights
        blocks.append(Block(a, b, devices[0].id))
    return choice.candidate("layers handed on", blocks, {p.id: 1.0 for p in choice.order})


def streams(choice: Choice) -> Iterator[Candidate]:
    """For a stream of requests: whole ones to whoever is free, and pipelines."""
    order, space = choice.order, choice.space
    alone = {p.id: single(choice, p) for p in order}
    fits = [p for p in order if not choice.excess(alone[p.id]) and not alone[p.id].breach]
    for count in sorted({len(fits), *range(2, min(MANY, len(fits)))}):
        if count > 1 and not space.fixed:
            first, *others = (p.id for p in fits[:count])
            block = Block(0, space.cuts[-1], first, others=tuple(others))
            yield choice.candidate(f"whole requests to {count} devices", [block], {first: 1.0})
    for count in _sizes(len(order)):
        blocks = pipeline(choice, order[:count])
        if blocks:
            shares = {p.id: p.flops_per_s for p in order[:count]}
            yield choice.candidate(f"pipeline of {count} devices", blocks, shares)


def pipeline(choice: Choice, members: Members) -> list[Block]:
    """Consecutive blocks on consecutive devices, so that the busiest device or link has least to
    do (the linear partition problem)."""
    graph, cuts, sums = choice.graph, choice.space.cuts, choice.space.sums
    lives: dict[int, float] = {
        c: sum(graph.nbytes(n) * graph.wire_share(n) for n in graph.live(c)) for c in cuts[1:-1]
    }
    lives[0] = sum(graph.nbytes(n) for n in graph.inputs)
    lives[cuts[-1]] = sum(graph.nbytes(n) for n in graph.outputs)

    def busy(a: int, b: int, p: DeviceProfile) -> float:
        compute = variable_seconds(sums.work[b] - sums.work[a], p.unit_costs) + p.overhead_s
        return max(compute, max(lives[a], lives[b]) / p.bandwidth_bytes_per_s)

    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for p in members:
        here: dict[int, tuple[float, int]] = {}
        for b in cuts[1:]:
            for a, (cost, _) in best[-1].items():
                if a < b and max(cost, busy(a, b, p)) < here.get(b, (float("inf"), 0))[0]:
                    here[b] = (max(cost, busy(a, b, p)), a)
        best.append(here)
    blocks: list[Block] = []
    stop = cuts[-1]
    for p, here in zip(reversed(members), reversed(best[1:]), strict=True):
        if stop not in here:
            return []
        blocks.append(Block(here[stop][1], stop, p.id))
        stop = here[stop][1]
    return blocks[::-1]


def spread_out(choice: Choice) -> Iterator[Candidate]:
    """Candidates that use every device, in several stages."""
    order, space = choice.order, choice.space
    rows = max(
        (choice.graph.whole(n)[a].size for n, a in space.axes.rows.items() if a is not None),
        default=1,
    )
    total = sum(p.flops_per_s for p in order)
    least = 1.01 / max(rows, len(order))
    shares = {p.id: max(p.flops_per_s / total, least) for p in order}
    heavy = space.sums.heavy[-1]
    found = []
    longest = min(HEAVY_A_BLOCK, max(1, -(-heavy // 4)))
    for most in sorted({1, 2, longest}, reverse=True):  # the longest walk serves all
        chain = search(space, choice.team(order, shares), most=most, spread=True)
        if chain is not None:
            name = f"all devices, {most} a block"
            found.append(choice.candidate(name, chain.blocks, shares))
    most_used = max((len(c.plan.devices()) for c in found), default=0)
    return (c for c in found if len(c.plan.devices()) == most_used)


def _sizes(count: int) -> list[int]:
    """How many devices are tried: all, and about every doubling in two steps below that."""
    return sorted({k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, count) if 2 <= k <= count})
