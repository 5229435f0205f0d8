"""Plans made from those of before: for devices whose paces have changed, nearly as good as new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from test_planner import devices, graph

from meshinfer import limits
from meshinfer.cost import DeviceProfile
from meshinfer.identity import DeviceId
from meshinfer.planner import Layout, Planned, adapt_plan, make_plan
from meshinfer.planner import candidates as planning

HEAD = DeviceId("head")
NETWORK = "yolov2"


def made(profiles: Sequence[DeviceProfile]) -> Planned:
    return make_plan(graph(NETWORK), profiles, HEAD, HEAD)


def paced(**slower: float) -> list[DeviceProfile]:
    return [replace(p, flops_per_s=p.flops_per_s / slower.get(p.id, 1.0)) for p in devices(4)]


def test_a_known_layout_becomes_a_plan_for_other_paces_nearly_as_good_as_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One device is slow, another one, two are; and then all are what they were."""
    looked = 0
    predict = planning.predict

    def counted(*args: object, **how: object) -> object:
        nonlocal looked
        looked += 1
        return predict(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "predict", counted)
    first = made(paced())
    layouts: list[Layout] = [first.layout]
    took = {"new": 0, "adapted": 0}
    for slower in ({"pi-3": 5.0}, {"pi-0": 2.0}, {"pi-1": 3.0, "pi-2": 1.5}, {}):
        profiles = paced(**slower)
        looked = 0
        new = made(profiles)
        took["new"] += looked
        looked = 0
        found = adapt_plan(graph(NETWORK), profiles, HEAD, HEAD, layouts[-limits.LAYOUTS_KNOWN :])
        took["adapted"] += looked
        assert found is not None and found.timeline.total_s <= 1.05 * new.timeline.total_s
        layouts.append(found.layout)
    assert found.timeline.total_s <= first.timeline.total_s
    assert 2 * took["adapted"] < took["new"], took
    again = adapt_plan(graph(NETWORK), paced(), HEAD, HEAD, [found.layout])
    assert again is not None and again.timeline.total_s <= found.timeline.total_s


def test_nothing_follows_from_plans_for_others_or_from_none() -> None:
    layout = made(paced()).layout
    assert adapt_plan(graph(NETWORK), paced(), HEAD, HEAD, []) is None
    assert adapt_plan(graph(NETWORK), paced()[:3], HEAD, HEAD, [layout]) is None
    resting = [replace(p, computes=p.id != "pi-1") for p in paced()]
    assert adapt_plan(graph(NETWORK), resting, HEAD, HEAD, [layout]) is None


def test_what_follows_must_fit_and_keep_the_pins() -> None:
    g, layout = graph(NETWORK), made(paced()).layout
    little = [replace(p, memory_bytes=1000) for p in paced()]
    assert adapt_plan(g, little, HEAD, HEAD, [layout]) is None
    pin = {g.inputs[0]: [HEAD]}
    assert adapt_plan(g, paced(), HEAD, HEAD, [layout], pin=pin) is None
