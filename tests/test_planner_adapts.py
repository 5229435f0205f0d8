"""Plans made from those of before: for devices whose paces have changed, nearly as good as new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from test_planner import devices, graph

from meshinfer import limits
from meshinfer.cost import DeviceProfile
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.planner import Layout, Planned, adapt_plan, make_plan
from meshinfer.planner import candidates as planning

HEAD, PI1, PI2 = DeviceId("head"), DeviceId("pi-1"), DeviceId("pi-2")


def made(g: Graph, profiles: Sequence[DeviceProfile]) -> Planned:
    return make_plan(g, profiles, HEAD, HEAD)


def paced(**slower: float) -> list[DeviceProfile]:
    return [replace(p, flops_per_s=p.flops_per_s / slower.get(p.id, 1.0)) for p in devices(4)]


def test_a_known_layout_becomes_a_plan_for_other_paces_nearly_as_good_as_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One device is slow, another one, two are; and then all are what they were."""
    g, looked = graph("yolov2"), 0
    predict = planning.predict

    def counted(*args: object, **how: object) -> object:
        nonlocal looked
        looked += 1
        return predict(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "predict", counted)
    first = made(g, paced())
    layouts = [Layout(first.blocks, {})]
    took = {"new": 0, "adapted": 0}
    for slower in ({"pi-3": 5.0}, {"pi-0": 2.0}, {"pi-1": 3.0, "pi-2": 1.5}, {}):
        profiles = paced(**slower)
        looked = 0
        new = made(g, profiles)
        took["new"] += looked
        looked = 0
        found = adapt_plan(g, profiles, HEAD, HEAD, layouts[-limits.LAYOUTS_KNOWN :], slower)
        took["adapted"] += looked
        assert found is not None and found.timeline.total_s <= 1.1 * new.timeline.total_s
        layouts.append(Layout(found.blocks, slower))
    assert found.timeline.total_s <= first.timeline.total_s
    assert 2 * took["adapted"] < took["new"], took
    again = adapt_plan(g, paced(), HEAD, HEAD, layouts[-1:], {})
    assert again is not None and again.timeline.total_s <= found.timeline.total_s


def test_of_what_is_whole_on_one_device_follows_something_only_for_much_the_same_paces() -> None:
    """One device is three times as fast as the others, has all of some stages, and becomes slow:
    what moving borders made of it took up to 1.65 times as long as a new plan."""
    g = graph("squeezenet1_1")
    quick = [replace(p, flops_per_s=6e8) if p.id == "pi-1" else p for p in devices(4)]
    even = {p.id: 1.0 for p in quick}
    layout = Layout(made(g, quick).blocks, {**even, PI2: 1.2})
    assert any(block.whole_on for block in layout.blocks)
    assert adapt_plan(g, quick, HEAD, HEAD, [layout], {**even, PI1: 20.0}) is None
    assert adapt_plan(g, quick, HEAD, HEAD, [layout], {**even, PI1: 1.1}) is not None


def test_nothing_follows_from_plans_for_others_or_from_none() -> None:
    g = graph("yolov2")
    layout = Layout(made(g, paced()).blocks, {})
    assert adapt_plan(g, paced(), HEAD, HEAD, [], {}) is None
    assert adapt_plan(g, paced()[:3], HEAD, HEAD, [layout], {}) is None
    resting = [replace(p, computes=p.id != "pi-1") for p in paced()]
    assert adapt_plan(g, resting, HEAD, HEAD, [layout], {}) is None


def test_what_follows_must_fit_and_keep_the_pins() -> None:
    g = graph("yolov2")
    layout = Layout(made(g, paced()).blocks, {})
    little = [replace(p, memory_bytes=1000) for p in paced()]
    assert adapt_plan(g, little, HEAD, HEAD, [layout], {}) is None
    pin = {g.inputs[0]: [HEAD]}
    assert adapt_plan(g, paced(), HEAD, HEAD, [layout], {}, pin=pin) is None
