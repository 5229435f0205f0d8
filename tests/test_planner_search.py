"""The planner's search against trying everything: all cuts, kinds of split, devices and places."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Network, networks

import meshinfer as mi
from meshinfer.cost import DeviceProfile, timeline
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.planner import Block, build, make_plan
from meshinfer.planner.choose import SURE_GAIN
from meshinfer.planner.search import Prices, State, Team, search
from meshinfer.planner.space import Space

EVERYTHING = 1 << 30
CUTS = 8
_GRAPHS = settings(max_examples=500, suppress_health_check=list(HealthCheck))


@st.composite
def clusters(draw: st.DrawFn, most: int) -> list[DeviceProfile]:
    """One to three devices, fast to slow, on links from awful to excellent."""
    speeds = sorted(draw(st.lists(st.floats(1e5, 1e9), min_size=1, max_size=most)), reverse=True)
    link = draw(st.floats(1e4, 1e8))
    wait = draw(st.sampled_from([0.0, 1e-5, 1e-3]))
    return [
        DeviceProfile(
            DeviceId(f"pi-{i}"),
            speed,
            overhead_s=wait,
            bandwidth_bytes_per_s=link,
            latency_s=wait,
            host=draw(st.sampled_from(["", "here"])),
        )
        for i, speed in enumerate(speeds)
    ]


def head_of(profiles: Sequence[DeviceProfile]) -> DeviceProfile:
    """Holds the input and wants the answer, as a coordinator's own device does."""
    return replace(profiles[0], id=DeviceId("head"), flops_per_s=0.0, computes=False, host="here")


def teams(profiles: Sequence[DeviceProfile]) -> Iterator[Team]:
    head = head_of(profiles)
    for count in range(1, len(profiles) + 1):
        for members in combinations(profiles, count):
            yield Team(members, tuple(p.flops_per_s for p in members), head, head)


def options(space: Space, team: Team, start: int, stop: int) -> Iterator[Block]:
    """Every way to compute ops ``[start, stop)``: in parts of each kind, or whole on anyone."""
    count = len(team.members)
    for kind in space.axes.kinds(count) if count > 1 else ():
        i = space.cuts.index(stop)
        if start in space.samples(i, kind, count, EVERYTHING):
            yield Block(start, stop, None, kind)
    for p in team.members:
        yield Block(start, stop, p.id)


def cheapest(space: Space, team: Team) -> float:
    """By depth-first search over every chain; what already costs more than the best one ends."""
    prices, found = Prices(space, team), math.inf
    ends = space.cuts
    ways = {
        (a, b): [
            (block, table, prices.body(block, table))
            for block in options(space, team, a, b)
            for table in (space.samples(j, block.kind, len(team.members), EVERYTHING),)
        ]
        for j, b in enumerate(ends)
        for a in ends[:j]
    }

    def walk(at: int, state: State, cost: float) -> None:
        nonlocal found
        if cost >= found:
            return
        if at == ends[-1]:
            found = min(found, cost + prices.gather(state))
            return
        for stop in (e for e in ends if e > at):
            for block, table, body in ways[at, stop]:
                left = State(None if block.whole_on else block.kind, block.whole_on)
                walk(stop, left, cost + body + prices.fetch(block, table, state))

    walk(0, State(device=team.source.id), 0.0)
    return found


@_GRAPHS
@given(networks(), clusters(3), st.randoms(use_true_random=False))
def test_the_search_costs_what_the_best_of_all_chains_costs(
    network: Network, profiles: list[DeviceProfile], random: object
) -> None:
    g = mi.load(network.model)
    if not g.ops:
        return
    space = Space.of(g)
    inner = list(space.cuts[1:-1])
    kept = sorted(random.sample(inner, min(CUTS, len(inner))))  # type: ignore[attr-defined]
    space = replace(space, cuts=(0, *kept, len(g.ops)))
    for team in teams(profiles):
        chain = search(space, team, most=EVERYTHING)
        assert chain is not None
        assert chain.price_s == pytest.approx(Prices(space, team).of(chain.blocks, EVERYTHING))
        assert chain.price_s == pytest.approx(cheapest(space, team), rel=1e-9)


def layouts(g: Graph, space: Space, team: Team) -> Iterator[tuple[Block, ...]]:
    inner = space.cuts[1:-1]
    for count in range(len(inner) + 1):
        for cuts in combinations(inner, count):
            chains: list[tuple[Block, ...]] = [()]
            for a, b in pairwise((0, *cuts, len(g.ops))):
                chains = [(*c, o) for c in chains for o in options(space, team, a, b)]
            yield from chains


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(networks(), clusters(2))
def test_the_plan_is_expected_to_take_no_longer_than_any_other_unless_it_is_one_device(
    network: Network, profiles: list[DeviceProfile]
) -> None:
    g = mi.load(network.model)
    space = Space.of(g)
    if not g.ops or len(space.cuts) > 5:
        return
    head = head_of(profiles)
    known = [*profiles, head]
    planned = make_plan(g, known, head.id, head.id)
    alone = len(planned.plan.devices()) == 1
    for team in teams(profiles):
        for blocks in layouts(g, space, team):
            plan = build(g, space.axes, blocks, team.weights, (head.id, head.id))
            # Several devices must be expected to gain more than predictions err.
            room = SURE_GAIN if alone and len(plan.devices()) > 1 else 1.0
            most = timeline(g, plan, known).total_s * room * (1 + 1e-9)
            assert planned.timeline.total_s <= most, blocks
