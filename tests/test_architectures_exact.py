"""Real architectures, tiled in the ways that planners tile them, give plain onnxruntime's answer.

Bit-identity was seen for row bands of VGG-16, SqueezeNet, YOLOv2, U-Net and SPPF. It is reported
(``pytest -rP``), not asserted: kernels may choose another order of sums for another size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from architectures import ALL
from onnx import ModelProto
from plans import check_exact, check_text, check_transfers

import meshinfer as mi
from meshinfer.geometry import Box, split_even, split_weighted
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.ops import rule_of
from meshinfer.plan import Plan, Shard, Stage, Task

QUICK: dict[str, dict[str, Any]] = {
    "vgg16": {"classifier_width": 128, "width": 0.125},
    "resnet50": {"width": 0.125},
    "mobilenet_v2": {"width": 0.25},
    "squeezenet1_1": {"size": 66, "width": 0.25},
    "yolov2": {"width": 0.0625},
    "unet": {"width": 4},
    "sppf": {},
}
BAND_IDENTICAL = ("vgg16", "squeezenet1_1", "yolov2", "unet", "sppf")
Tiling = Callable[[Box, int], list[Box]]


def along(whole: Box, axis: int, devices: int) -> list[Box]:
    parts = split_even(whole[axis].size, devices)
    return [whole.replace(axis, part) for part in parts if part.size]


def rows(whole: Box, devices: int) -> list[Box]:
    """Bands of rows; slices of channels where there are no rows."""
    if len(whole) == 4 and whole[2].size > 1:
        return along(whole, 2, devices)
    return channels(whole, devices)


def channels(whole: Box, devices: int) -> list[Box]:
    return along(whole, 1, devices)


def grid(whole: Box, devices: int) -> list[Box]:
    """Two uneven columns of bands."""
    if len(whole) < 4 or whole[3].size < 2:
        return rows(whole, devices)
    halves = [c for c in split_weighted(whole[3].size, [3, 2]) if c.size]
    return [box.replace(3, half) for half in halves for box in rows(whole, (devices + 1) // 2)]


TILINGS: tuple[Tiling, ...] = (rows, grid, channels)


def tiled(graph: Graph, tiling: Tiling, devices: int, ops_a_stage: int) -> Plan:
    """A stage every few ops; tile i of every value is on device i."""
    cuts = [c for c in graph.cut_points if c % ops_a_stage == 0]
    stages = []
    for start, stop in zip([0, *cuts], [*cuts, len(graph.ops)], strict=True):
        dealt: list[list[Shard]] = [[] for _ in range(2 * devices)]
        for name in graph.live_outputs(start, stop):
            for i, box in enumerate(tiling(graph.whole(name), devices)):
                dealt[i].append(Shard(name, box))
        tasks = [
            Task((DeviceId(f"pi-{i % devices}"),), tuple(held))
            for i, held in enumerate(dealt)
            if held
        ]
        stages.append(Stage(start, stop, tuple(tasks)))
    return Plan(graph.digest, DeviceId("pi-0"), DeviceId("pi-0"), tuple(stages))


@cache
def quick(name: str) -> tuple[ModelProto, Graph]:
    model = ALL[name](**QUICK[name])
    return model, mi.load(model)


def image_for(graph: Graph) -> dict[str, np.ndarray[Any, Any]]:
    (name,) = graph.inputs
    shape: Sequence[int] = graph.whole(name).shape
    return {name: np.random.default_rng(1).standard_normal(shape, dtype=np.float32)}


def check(model: ModelProto, graph: Graph, plan: Plan) -> bool:
    mi.validate(graph, plan)
    check_text(plan)
    check_transfers(graph, plan)
    return check_exact(model, graph, plan, image_for(graph))


def report(case: str, identical: bool) -> None:
    print(f"{case}: {'bit-identical' if identical else 'within tolerance'}")  # noqa: T201


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("name", ALL)
def test_row_bands_are_exact(name: str, devices: int) -> None:
    model, graph = quick(name)
    identical = check(model, graph, tiled(graph, rows, devices, 4))
    report(f"{name} in row bands on {devices}", identical)


@pytest.mark.parametrize("tiling", [grid, channels], ids=lambda tiling: tiling.__name__)
@pytest.mark.parametrize("name", ALL)
def test_grids_and_channel_slices_are_exact(name: str, tiling: Tiling) -> None:
    model, graph = quick(name)
    for devices, ops_a_stage in ((3, 5), (4, 11)):
        check(model, graph, tiled(graph, tiling, devices, ops_a_stage))


@pytest.mark.parametrize("name", BAND_IDENTICAL)
def test_one_device_gives_the_same_bits(name: str) -> None:
    model, graph = quick(name)
    stage = Stage(
        0,
        len(graph.ops),
        (Task((DeviceId("pi"),), tuple(Shard(v, graph.whole(v)) for v in graph.outputs)),),
    )
    assert check(model, graph, Plan(graph.digest, DeviceId("pi"), DeviceId("pi"), (stage,)))


@pytest.mark.parametrize("name", ALL)
def test_every_op_of_the_architectures_has_a_rule(name: str) -> None:
    _, graph = quick(name)
    barriers = [str(op) for op in graph.ops if not rule_of(op).split(op)]
    assert barriers == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling.__name__)
@pytest.mark.parametrize("name", ALL)
def test_full_widths_are_exact(name: str, tiling: Tiling) -> None:
    model = ALL[name]()
    graph = mi.load(model)
    for devices in (2, 5):
        identical = check(model, graph, tiled(graph, tiling, devices, 6))
        report(f"{name} in {tiling.__name__} on {devices}", identical)
