"""The picture is well formed and whole: each stage, device and halo is there, names escaped."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from architectures import ALL, Builder
from hypothesis import given, settings
from hypothesis import strategies as st

import meshinfer as mi
from meshinfer.cost import DeviceProfile
from meshinfer.draw import draw
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan, Stage, Task
from meshinfer.planner import make_plan

SVG = "{http://www.w3.org/2000/svg}"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


@cache
def graph(name: str) -> Graph:
    small = {"vgg16": {"width": 0.125, "classifier_width": 64}, "unet": {"width": 4}}
    return mi.load(ALL[name](**small.get(name, {"width": 8 if name == "sppf" else 0.125})))


def plan_of(g: Graph, count: int, *, spread: bool = True) -> Plan:
    devices = [
        DeviceProfile(DeviceId(f"pi-{i}"), 2e8 / (1 + i % 3), bandwidth_bytes_per_s=1e8)
        for i in range(count)
    ]
    return make_plan(g, devices, devices[0].id, devices[0].id, spread=spread).plan


def texts(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_shows_every_stage_and_every_device(name: str, count: int) -> None:
    g = graph(name)
    plan = plan_of(g, count)
    svg = draw(g, plan)
    words = texts(svg)
    for s, stage in enumerate(plan.stages):
        (title,) = [w for w in words if w.startswith(f"Stage {s + 1} ")]
        assert str(stage.start) in title
    for device in plan.devices():
        assert any(w.startswith(device) and "of work" in w for w in words), device
    assert plan.mode.capitalize() in words
    assert any(plan.graph[:12] in w for w in words)


def test_every_task_has_a_tile_within_the_picture() -> None:
    g = graph("unet")
    plan = plan_of(g, 4)
    root = ET.fromstring(draw(g, plan))
    tiles = [r for r in root.iter(f"{SVG}rect") if r.get("fill-opacity") == "0.62"]
    assert len(tiles) == sum(len(stage.tasks) for stage in plan.stages)
    assert all(float(r.get("width", "0")) > 0 and float(r.get("height", "0")) > 0 for r in tiles)
    width = float(root.get("width", "0"))
    assert all(0 <= float(r.get("x", "0")) <= width for r in root.iter(f"{SVG}rect"))
    assert width <= 1200


def test_halos_are_hatched_in_the_colour_of_who_reads_them() -> None:
    g = graph("unet")
    plan = plan_of(g, 3)
    root = ET.fromstring(draw(g, plan))
    halos = [r for r in root.iter(f"{SVG}rect") if r.get("fill", "").startswith("url(#halo")]
    patterns = {p.get("id"): p for p in root.iter(f"{SVG}pattern")}
    assert halos
    for rect in halos:
        assert re.sub(r"url\(#(.*)\)", r"\1", rect.get("fill", "")) in patterns
    assert not [r for r in ET.fromstring(draw(g, plan_of(g, 1))).iter() if "url(#" in str(r.attrib)]


def test_a_stage_run_whole_says_so() -> None:
    b = Builder(0)
    grid = b.const(np.zeros((1, 8, 8, 2), np.float32))
    x = b.op("GridSample", [b.relu(b.input("x", [1, 2, 8, 8])), grid])
    g = mi.load(b.model([b.rename(x, "y")]))
    assert any("whole on pi-0" in w for w in texts(draw(g, plan_of(g, 2))))


def test_names_are_escaped() -> None:
    g = graph("sppf")
    plan = plan_of(g, 2)
    bad = {d: DeviceId(f"<b>&\"'\x00\x1b\ud800 {d}]]>") for d in plan.devices()}
    svg = draw(g, renamed(plan, bad))
    assert "<b>" not in svg
    ET.fromstring(svg.encode())
    assert any("<b>&\"'" in w for w in texts(svg))


def renamed(plan: Plan, names: dict[DeviceId, DeviceId]) -> Plan:
    stages = tuple(
        Stage(s.start, s.stop, tuple(Task((names[t.devices[0]],), t.outputs) for t in s.tasks))
        for s in plan.stages
    )
    return replace(plan, source=names[plan.source], sink=names[plan.sink], stages=stages)


@given(st.lists(st.text(min_size=1, max_size=40), min_size=3, max_size=3, unique=True))
def test_any_names_give_well_formed_xml(names: list[str]) -> None:
    g = graph("sppf")
    plan = plan_of_three()
    svg = draw(g, renamed(plan, dict(zip(plan.devices(), map(DeviceId, names), strict=True))))
    ET.fromstring(svg.encode())


@cache
def plan_of_three() -> Plan:
    return plan_of(graph("sppf"), 3)


@settings(max_examples=settings().max_examples // 3)  # of eighty that there are
@given(st.integers(1, 40), st.booleans())
def test_any_number_of_devices_fits(count: int, spread: bool) -> None:
    g = graph("sppf")
    root = ET.fromstring(draw(g, plan_of(g, count, spread=spread)))
    assert float(root.get("width", "0")) <= 1200
    colours = [p[0].get("stroke") for p in root.iter(f"{SVG}pattern")]
    assert len(set(colours)) == len(colours)


def test_a_picture_is_embedded_once() -> None:
    g = graph("sppf")
    for data, kind in ((PNG, "png"), (b"\xff\xd8\xff\xe0" + bytes(9), "jpeg")):
        svg = draw(g, plan_of(g, 2), picture=data)
        (image,) = ET.fromstring(svg).iter(f"{SVG}image")
        assert image.get("href", "").startswith(f"data:image/{kind};base64,")
    with pytest.raises(mi.InvalidInput, match="PNG"):
        draw(g, plan_of(g, 2), picture=b"GIF89a")


def test_refers_to_nothing_outside_itself() -> None:
    svg = draw(graph("sppf"), plan_of(graph("sppf"), 2), picture=PNG)
    assert re.findall(r'(?:href|src)="(?!data:)[^"]*"', svg) == []
    assert "<script" not in svg


def test_the_same_plan_gives_the_same_picture() -> None:
    g = graph("sppf")
    assert draw(g, plan_of(g, 3)) == draw(g, plan_of(g, 3))
