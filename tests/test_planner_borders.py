"""Single borders of a layout moved by whole elements: never worse, always a plan, and even."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from architectures import Builder
from hypothesis import HealthCheck, given, settings
from networks import Network, networks
from test_planner_search import clusters, head_of

import meshinfer as mi
from meshinfer.cost import DeviceProfile, timeline
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.planner import Block
from meshinfer.planner.axes import Kind
from meshinfer.planner.bands import cells_of
from meshinfer.planner.borders import Cells, settle
from meshinfer.planner.candidates import Candidate, Choice
from meshinfer.planner.propose import finalists
from meshinfer.planner.space import Space

HEAD = DeviceId("head")
_GRAPHS = settings(max_examples=100, suppress_health_check=list(HealthCheck))


def choice_of(graph: Graph, profiles: Sequence[DeviceProfile]) -> Choice:
    able = [p for p in profiles if p.able]
    choice = Choice(graph, tuple(profiles), (HEAD, HEAD), "latency", Space.of(graph))
    choice.order = choice.ordered(able)
    return choice


def four_equal() -> list[DeviceProfile]:
    members = [
        DeviceProfile(DeviceId(f"pi-{i}"), 1e9, 1e-4, 1e9, 1e-5, message_s=0.0, byte_s=0.0)
        for i in range(4)
    ]
    return [DeviceProfile(HEAD, 0.0, computes=False, bandwidth_bytes_per_s=1e9), *members]


def convolutions(side: int = 30) -> Graph:
    b = Builder(0)
    x = b.input("x", [1, 16, side, side])
    x = b.relu(b.conv(x, 16, 64, 3))
    return mi.load(b.model([b.rename(x, "y")]))


def of_weights(choice: Choice, kind: Kind, weights: Sequence[float]) -> Candidate:
    shares = tuple((DeviceId(f"pi-{i}"), w) for i, w in enumerate(weights))
    block = Block(0, len(choice.graph.ops), None, kind, shares)
    return choice.candidate("uneven", [block], {})


@pytest.mark.parametrize("kind", ["rows", "grid", "channels", "slabs"])
def test_the_weights_of_cells_stand_for_just_these_cells(kind: Kind) -> None:
    choice = choice_of(convolutions(), four_equal())
    (block,) = of_weights(choice, kind, (0.31, 0.2, 0.3, 0.19)).blocks
    cells = Cells.of(choice, block)
    assert cells is not None
    graph, axes = choice.graph, choice.space.axes
    (name,) = graph.live_outputs(block.start, block.stop)
    _, before, _ = cells_of(graph, axes, block, name)
    _, after, _ = cells_of(graph, axes, cells.shares(block), name)
    assert after == before
    for less in (each for device in range(4) for each in cells.less(device)):
        assert less != cells
        assert Cells.of(choice, less.shares(block)) == less
        assert sum(less.outer) == sum(cells.outer)
        assert all(size > 0 for row in (less.outer, *less.inner) for size in row)


@pytest.mark.parametrize("kind", ["rows", "grid"])
def test_equal_devices_are_given_about_equal_work_from_wherever_borders_begin(kind: Kind) -> None:
    choice = choice_of(convolutions(), four_equal())
    begun = of_weights(choice, kind, (0.45, 0.2, 0.25, 0.1))
    found = settle(choice, begun)
    took = [span.end_s - span.start_s for span in found.timeline.tasks]
    before = [span.end_s - span.start_s for span in begun.timeline.tasks]
    assert max(before) > 1.5 * sum(before) / 4
    assert max(took) < 1.1 * sum(took) / 4
    assert choice.key(found) < choice.key(begun)


def test_a_block_with_more_devices_than_rows_is_left_as_it_is() -> None:
    choice = choice_of(convolutions(side=3), four_equal())
    begun = of_weights(choice, "rows", (0.4, 0.2, 0.2, 0.2))
    assert len(begun.timeline.tasks) < 4
    assert Cells.of(choice, begun.blocks[0]) is None
    assert settle(choice, begun) is begun


def test_effort_bounds_what_is_tried() -> None:
    choice = choice_of(convolutions(), four_equal())
    begun = of_weights(choice, "rows", (0.45, 0.2, 0.25, 0.1))
    assert settle(choice, begun, effort=0) is begun
    used = choice.effort
    settle(choice, begun, effort=40)
    assert used < choice.effort < used + 80  # the last one tried may end beyond it


@_GRAPHS
@given(networks(), clusters(3))
def test_moved_borders_are_never_worse_and_still_a_plan(
    network: Network, profiles: list[DeviceProfile]
) -> None:
    graph = mi.load(network.model)
    members = [replace(p, memory_bytes=0) for p in profiles]
    choice = choice_of(graph, [head_of(profiles), *members])
    for begun in list(finalists(choice))[:6]:
        found = settle(choice, begun, effort=300)
        mi.validate(graph, found.plan)
        assert choice.key(found) <= choice.key(begun)
        course = timeline(graph, found.plan, choice.profiles)
        assert found.timeline.total_s == pytest.approx(course.total_s)
