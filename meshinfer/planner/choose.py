"""Finalists and the choice among them: every candidate is a whole plan with its timeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from meshinfer.cost import DeviceProfile, Timeline, timeline
from meshinfer.errors import ClusterUnavailable, InvalidInput, NotEnoughMemory
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.legality import validate
from meshinfer.plan import Plan
from meshinfer.planner.bands import Block, build, splittable
from meshinfer.planner.search import HEAVY_A_BLOCK, Space, Team, search
from meshinfer.transfers import derive

OBJECTIVES = ("latency", "throughput", "memory")
MANY = 8
"""Up to so many devices every number is tried; beyond, until two more numbers in turn are worse."""
_QUANTISING = ("QuantizeLinear", "DynamicQuantizeLinear")
TRIED_APART = 8
"""Most devices that are tried in and out of the plan one by one."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, what is expected of it, and why it is this one, in lines for people."""

    plan: Plan
    timeline: Timeline
    notes: tuple[str, ...]


def make_plan(
    graph: Graph,
    profiles: Sequence[DeviceProfile],
    source: DeviceId,
    sink: DeviceId,
    *,
    objective: str = "latency",
    fixed_cuts: Sequence[int] | None = None,
    spread: bool = False,
) -> Planned:
    """The plan expected to be best on these devices; it passes ``validate``.

    ``source`` holds the input and ``sink`` gets the answer; neither need compute, nor have a
    profile. ``objective``: "latency" (seconds of one request), "throughput" (seconds of the busiest
    device or link) or "memory" (bytes of the fullest device). ``fixed_cuts``: op indices between
    the stages, all of them. ``spread``: use every computing device, and several stages, even where
    fewer are faster. A strict graph gets no partial sums, and devices of one numeric class only.
    Raises ``ClusterUnavailable`` when no device computes, ``NotEnoughMemory`` when no plan fits,
    ``InvalidInput`` for an unknown objective, a cut that is none, or a device given twice.
    """
    profiles = sorted(profiles, key=lambda p: p.id)
    _check(graph, profiles, objective, fixed_cuts)
    able = [p for p in profiles if p.able]
    if graph.strict:
        able = _one_class(able)
    if not able:
        raise ClusterUnavailable(
            f"none of the {len(profiles)} devices can compute",
            hint="start a worker with `meshinfer worker`, or the coordinator without --no-compute",
        )
    if not graph.ops:
        nothing = Plan(graph.digest, source, sink, ())
        return Planned(nothing, timeline(graph, nothing, profiles), ("nothing to compute",))
    # What a partial sum changes in the last bit, a quantisation behind it may make a whole step.
    sums = not graph.strict and all(op.type not in _QUANTISING for op in graph.ops)
    space = Space.of(graph, fixed_cuts, sums=sums)
    choice = _Choice(graph, profiles, (source, sink), objective, space)
    order = choice.ordered(able)
    if spread and len(order) > 1:
        best = choice.best(choice.spread(order))
    else:
        best = choice.improve(choice.best(choice.finalists(order)), order)
    if choice.excess(best) > 0:
        raise choice.too_large(best)
    validate(graph, best.plan)
    return Planned(best.plan, best.timeline, tuple(choice.notes(best, order, spread)))


def _one_class(able: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    """The numeric class that computes most operations a second together."""
    power: dict[str, float] = {}
    for p in able:
        power[p.numeric_class] = power.get(p.numeric_class, 0.0) + p.flops_per_s
    best = max(power, key=lambda name: (power[name], name), default="")
    return [p for p in able if p.numeric_class == best]


def _check(
    graph: Graph, profiles: Sequence[DeviceProfile], objective: str, cuts: Sequence[int] | None
) -> None:
    if objective not in OBJECTIVES:
        raise InvalidInput(
            f"objective {objective!r} is unknown", hint=f"choose one of {', '.join(OBJECTIVES)}"
        )
    names = [p.id for p in profiles]
    if len(set(names)) != len(names):
        raise InvalidInput(f"a device is given twice among {names}", hint="give each device once")
    wrong = sorted(set(cuts or ()) - set(graph.cut_points))
    if wrong:
        raise InvalidInput(
            f"{wrong} are no cut points of this graph", hint="choose among graph.cut_points"
        )


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    blocks: tuple[Block, ...]
    shares: Mapping[DeviceId, float]
    plan: Plan
    timeline: Timeline


class _Choice:
    """The candidates for one call of ``make_plan`` and how they are compared."""

    def __init__(
        self,
        graph: Graph,
        profiles: Sequence[DeviceProfile],
        ends: tuple[DeviceId, DeviceId],
        objective: str,
        space: Space,
    ) -> None:
        self.graph, self.profiles, self.ends = graph, tuple(profiles), ends
        self.objective, self.space = objective, space
        self.by_id = {p.id: p for p in profiles}
        self.seen: dict[Plan, _Candidate] = {}

    def ordered(self, able: Sequence[DeviceProfile]) -> list[DeviceProfile]:
        """Most useful first: fast with a fast link; the ends before others, their link is saved."""
        flops = self.space.sums.flops[-1]
        largest = max((self.graph.nbytes(n) for n in self.graph.values), default=0)

        def key(p: DeviceProfile) -> tuple[float, bool, str]:
            moving = 0.0 if p.id in self.ends else largest / p.bandwidth_bytes_per_s
            return (flops / p.flops_per_s + moving, p.id not in self.ends, p.id)

        return sorted(able, key=key)

    def candidate(
        self, name: str, blocks: Sequence[Block], shares: Mapping[DeviceId, float]
    ) -> _Candidate:
        plan = build(self.graph, self.space.axes, blocks, shares, self.ends)
        if self.objective == "throughput":
            plan = replace(plan, window=min(8, max(2, len(plan.devices()))))
        if plan not in self.seen:
            flow = derive(self.graph, plan)
            found = timeline(self.graph, plan, self.profiles, flow=flow)
            self.seen[plan] = _Candidate(name, tuple(blocks), dict(shares), plan, found)
        return self.seen[plan]

    def excess(self, c: _Candidate) -> int:
        """Bytes by which a candidate's devices exceed what they granted, added up."""
        granted = ((u, self.by_id.get(u.id)) for u in c.timeline.devices)
        return sum(
            max(0, u.peak_bytes - p.memory_bytes)
            for u, p in granted
            if p is not None and p.memory_bytes
        )

    def value(self, c: _Candidate) -> float:
        """What the objective makes small, in seconds or bytes."""
        if self.objective == "throughput":
            return c.timeline.bottleneck_s
        if self.objective == "memory":
            return float(max(u.peak_bytes for u in c.timeline.devices))
        return c.timeline.total_s

    def key(self, c: _Candidate) -> tuple[int, float, float, int, int]:
        used, stages = len(c.plan.devices()), len(c.plan.stages)
        return (self.excess(c), self.value(c), c.timeline.total_s, used, stages)

    def best(self, candidates: Iterator[_Candidate]) -> _Candidate:
        return min(candidates, key=self.key)

    def team(self, members: Sequence[DeviceProfile], shares: Mapping[DeviceId, float]) -> Team:
        ends = [self.by_id.get(d) or DeviceProfile(d, 0.0, computes=False) for d in self.ends]
        return Team(tuple(members), tuple(shares[p.id] for p in members), ends[0], ends[1])

    def finalists(self, order: Sequence[DeviceProfile]) -> Iterator[_Candidate]:
        for p in order:
            yield self.single(p)
        best: _Candidate | None = None
        worse = 0
        for size in _sizes(len(order)):
            members = order[:size]
            shares = {p.id: p.flops_per_s for p in members}
            blocks = search(self.space, self.team(members, shares))
            found = self.candidate(f"{size} devices", blocks, shares)
            if best is None or self.key(found) < self.key(best):
                best, worse = found, 0
            else:
                worse += 1
            yield found
            if worse >= 2 and size > MANY and not self.excess(best):
                break
        if best is not None and len(best.shares) > 1:
            shares = dict(best.shares)
            members = [p for p in order if p.id in shares]
            for name, most in (("a stage a layer", 1), ("short blocks", 3)):
                blocks = search(self.space, self.team(members, shares), most=most, spread=True)
                yield self.candidate(f"{name}, {len(shares)} devices", blocks, shares)
            if not self.space.fixed:
                yield self.candidate(
                    f"big blocks, {len(shares)} devices", self.big(order[0].id), shares
                )
        if any(p.memory_bytes for p in order):
            yield self.handed_on(order)

    def single(self, p: DeviceProfile) -> _Candidate:
        blocks = (
            [Block(a, b, p.id) for a, b in pairwise(self.space.cuts)]
            if self.space.fixed
            else [Block(0, len(self.graph.ops), p.id)]
        )
        return self.candidate(f"{p.id} alone", blocks, {p.id: 1.0})

    def big(self, fastest: DeviceId) -> list[Block]:
        """About four blocks of equal work; whole on the fastest device what cannot be cut."""
        cuts, flops = self.space.cuts, self.space.sums.flops
        goals = [flops[-1] * i / 4 for i in range(1, 4)]
        picked = {min(cuts[1:-1], key=lambda c: abs(flops[c] - g)) for g in goals if cuts[1:-1]}
        picked |= {c for c in cuts[1:-1] if c not in self.space.axes.follows}
        bounds = sorted({0, len(self.graph.ops), *picked})
        return [Block(a, b, None if self.can_split(a, b) else fastest) for a, b in pairwise(bounds)]

    def can_split(self, start: int, stop: int) -> bool:
        i = self.space.cuts.index(stop)
        return splittable(self.graph, self.space.axes, start, stop, "rows") and start in (
            self.space.samples(i, "rows", 2, 1 << 30)
        )

    def handed_on(self, order: Sequence[DeviceProfile]) -> _Candidate:
        """Layers in turn on one device after another, each filled up to its memory."""
        blocks: list[Block] = []
        devices, held, most = list(order), 0, 0
        for a, b in pairwise(self.space.cuts):
            names = dict.fromkeys(n for op in self.graph.ops[a:b] for n in op.inputs if n)
            weights = sum(self.graph.nbytes(n) for n in names if self.graph.is_initializer(n))
            made = self.graph.produced(a, b)
            reads = max((self.graph.nbytes(n) for n in names if n not in made), default=0)
            values = reads + sum(self.graph.nbytes(n) for n in made)
            most, room = max(most, values), devices[0].memory_bytes
            if room and held and held + weights + most > room and len(devices) > 1:
                devices, held, most = devices[1:], 0, values
            held += weights
            blocks.append(Block(a, b, devices[0].id))
        return self.candidate("layers handed on", blocks, {p.id: 1.0 for p in order})

    def spread(self, order: Sequence[DeviceProfile]) -> Iterator[_Candidate]:
        """Candidates that use every device, in several stages."""
        rows = max(
            (self.graph.whole(n)[a].size for n, a in self.space.axes.rows.items() if a is not None),
            default=1,
        )
        total = sum(p.flops_per_s for p in order)
        least = 1.01 / max(rows, len(order))
        shares = {p.id: max(p.flops_per_s / total, least) for p in order}
        heavy = self.space.sums.heavy[-1]
        found = []
        longest = min(HEAVY_A_BLOCK, max(1, -(-heavy // 4)))
        for most in sorted({1, 2, longest}, reverse=True):  # the longest walk serves all
            blocks = search(self.space, self.team(order, shares), most=most, spread=True)
            found.append(self.candidate(f"all devices, {most} a block", blocks, shares))
        most_used = max(len(c.plan.devices()) for c in found)
        return (c for c in found if len(c.plan.devices()) == most_used)

    def improve(self, best: _Candidate, order: Sequence[DeviceProfile]) -> _Candidate:
        """Shift shares towards idle devices, and leave out or take in one device at a time."""
        for _ in range(3):
            found = self.best(iter([best, *self.reweighted(best), *self.without(best)]))
            if found is best:
                break
            best = found
        for p in self.idle(best, order)[:TRIED_APART]:
            best = self.best(iter([best, self.including(best, p)]))
        return best

    def reweighted(self, c: _Candidate) -> list[_Candidate]:
        """The same cuts with shares in proportion to what each device really got done a second."""
        if len(c.shares) < 2:
            return []
        busy = {d: c.timeline.use(d).busy_s for d in c.shares}
        mean = sum(busy.values()) / len(busy)
        shares = {d: w * (mean / max(busy[d], mean / 4)) ** 0.5 for d, w in c.shares.items()}
        return [self.candidate(_variant(c, "shares balanced"), c.blocks, shares)]

    def without(self, c: _Candidate) -> list[_Candidate]:
        pinned = {b.whole_on for b in c.blocks}
        least = sorted(c.shares, key=lambda d: (c.shares[d], d))
        result = []
        for device in least[:TRIED_APART] if len(c.shares) > 2 else ():
            if device not in pinned:
                shares = {d: w for d, w in c.shares.items() if d != device}
                result.append(self.candidate(_variant(c, f"without {device}"), c.blocks, shares))
        return result

    def including(self, c: _Candidate, p: DeviceProfile) -> _Candidate:
        """The plan with one device more: in its split stages, or cut anew where it has none."""
        split = any(b.whole_on is None for b in c.blocks)
        if split:
            known = [d for d in c.shares if d in self.by_id]
            speed = sum(c.shares[d] for d in known) / sum(self.by_id[d].flops_per_s for d in known)
            shares = {**c.shares, p.id: p.flops_per_s * speed}
            return self.candidate(_variant(c, f"with {p.id}"), c.blocks, shares)
        members = [self.by_id[d] for d in c.plan.devices()] + [p]
        shares = {m.id: m.flops_per_s for m in members}
        blocks = search(self.space, self.team(members, shares), spread=True)
        return self.candidate(f"{len(members)} devices", blocks, shares)

    def idle(self, c: _Candidate, order: Sequence[DeviceProfile]) -> list[DeviceProfile]:
        used = set(c.plan.devices())
        return [p for p in order if p.id not in used]

    def notes(
        self, best: _Candidate, order: Sequence[DeviceProfile], spread: bool
    ) -> Iterator[str]:
        used = best.plan.devices()
        total = best.timeline.total_s
        yield (
            f"expected {total * 1e3:.1f} ms on {len(used)} of {len(order)} computing devices in "
            f"{len(best.plan.stages)} stages, bound by {best.timeline.bound}"
        )
        if spread:
            short = "" if len(used) == len(order) else " as far as this model can be split"
            yield f"spread over all devices{short}, as was asked, even if fewer were faster"
        else:
            idle = self.idle(best, order)
            for p in idle[:TRIED_APART]:
                more = self.including(best, p)
                if p.id not in more.plan.devices():
                    yield f"{p.id} idle: too slow for a share of its own"
                else:
                    added = (self.value(more) - self.value(best)) * 1e3
                    unit = "ms" if self.objective != "memory" else "kB"
                    added = added if self.objective != "memory" else added / 1e6
                    yield f"{p.id} idle: would add {added:.0f} {unit}"
            if len(idle) > TRIED_APART:
                yield f"{len(idle) - TRIED_APART} more idle: the others do no better with them"
        for p in self.profiles:
            if not p.able:
                yield f"{p.id} idle: it does not compute"
            elif p not in order:
                yield f"{p.id} idle: {p.numeric_class} may round differently, and strict was asked"
        rivals = [c for c in self.seen.values() if c.plan != best.plan and "; " not in c.name]
        alone = sorted((c for c in rivals if len(c.shares) == 1), key=self.key)[:1]
        others = sorted((c for c in rivals if len(c.shares) > 1), key=self.key)[:4]
        for c in sorted((*alone, *others), key=self.key):
            yield f"alternative: {c.name}: {c.timeline.total_s * 1e3:.1f} ms"

    def too_large(self, best: _Candidate) -> NotEnoughMemory:
        over = []
        for use in best.timeline.devices:
            p = self.by_id.get(use.id)
            if p is not None and p.memory_bytes and use.peak_bytes > p.memory_bytes:
                mb = f"{use.peak_bytes / 1e6:.1f} MB of {p.memory_bytes / 1e6:.1f} MB"
                over.append(f"{use.id} would need {mb}")
        return NotEnoughMemory(
            f"no plan fits the devices' memory: at best {', '.join(over)}",
            hint="add a device, grant more memory (--memory), or use a smaller model or image",
        )


def _variant(c: _Candidate, how: str) -> str:
    return f"{c.name}; {how}" if not c.name.endswith(how) else c.name


def _sizes(count: int) -> list[int]:
    """How many devices are tried: each number up to 8, then about every doubling, and all."""
    return sorted(
        {k for k in (*range(2, MANY + 1), 12, 16, 24, 32, 48, 64, count) if 2 <= k <= count}
    )
