"""Small models, and the plans that a simulation draws for them: real graphs, real programs.

Each style of plan stresses another part of the cores: halos, partial sums, choices, pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from meshinfer.cost import DeviceProfile, timeline
from meshinfer.geometry import split_even
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.legality import validate
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.planner import Block, axes_of, build, find_spares, pins_of
from meshinfer.planner.bands import splittable
from meshinfer.programs import make_programs
from meshinfer.protocol import messages as m
from meshinfer.report import report_of

STYLES = ("bands", "layers", "channels", "one", "pipeline", "any whole", "any bands", "fused")
"""Bands of rows cut in the middle · a stage an op · output channels · all on one device · a block
a device with a window · whole requests to whoever is free · bands for whoever is free · one stage.
"""


@dataclass(frozen=True, slots=True)
class Made:
    """A plan and what it comes to."""

    text: str
    window: int
    programs: dict[str, tuple[m.Program, ...]]
    blobs: dict[str, bytes]
    report: m.Report


def _weight(rng: np.random.Generator, name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) * 0.4, name)


def _info(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


@cache
def model(kind: int, version: int) -> bytes:
    """The bytes of a model: 0 convolutions with a residual and a mean, 1 a chain with pooling and
    two inputs. Each version has other weights."""
    rng = np.random.default_rng([kind, version])
    pads = [1, 1, 1, 1]
    if kind == 0:
        nodes = [
            helper.make_node("Conv", ["x", "w1"], ["a"], pads=pads),
            helper.make_node("Sigmoid", ["a"], ["s"]),
            helper.make_node("Conv", ["s", "w2"], ["c"], pads=pads),
            helper.make_node("Add", ["c", "s"], ["y"]),
            helper.make_node("GlobalAveragePool", ["y"], ["mean"]),
        ]
        inputs = [_info("x", 1, 2, 8, 5)]
        outputs = [_info("y", 1, 4, 8, 5), _info("mean", 1, 4, 1, 1)]
        weights = [_weight(rng, "w1", 4, 2, 3, 3), _weight(rng, "w2", 4, 4, 3, 3)]
    else:
        nodes = [
            helper.make_node("Conv", ["x", "w1"], ["a"], pads=pads),
            helper.make_node("Add", ["a", "z"], ["b"]),
            helper.make_node("Relu", ["b"], ["r"]),
            helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Conv", ["p", "w2"], ["y"], pads=pads),
        ]
        inputs = [_info("x", 1, 2, 12, 4), _info("z", 1, 3, 12, 4)]
        outputs = [_info("y", 1, 4, 6, 2)]
        weights = [_weight(rng, "w1", 3, 2, 3, 3), _weight(rng, "w2", 4, 3, 3, 3)]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


@cache
def graph_of(data: bytes) -> Graph:
    """Its graph, as it is: nothing is fused or folded."""
    proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(data))
    return Graph(ir.from_proto(proto))


@cache
def made(data: bytes, names: tuple[str, ...], head: str, style: str, spares: bool = False) -> Made:
    """The plan of a style for these devices, lowered; with ``spares`` for the loss of one."""
    graph = graph_of(data)
    plan = _plan(graph, tuple(map(DeviceId, names)), DeviceId(head), style)
    validate(graph, plan)
    profiles = [DeviceProfile(DeviceId(name), 1e9) for name in names]
    found = find_spares(graph, plan, profiles, pins_of(graph, plan, profiles, {}))
    programs = make_programs(graph, plan, found.devices if spares else {})
    return Made(
        str(plan),
        plan.window,
        dict(programs.by_device),
        {digest: bytes(of()) for digest, of in programs.blobs.items()},
        report_of(graph, plan, timeline(graph, plan, [])),
    )


def _plan(graph: Graph, devices: tuple[DeviceId, ...], head: DeviceId, style: str) -> Plan:
    stop = len(graph.ops)
    cuts = [0, *graph.cut_points, stop]
    ends = (head, head)
    match style:
        case "any whole":
            return for_any(graph, devices, head, [0, stop], 1, window=4)
        case "any bands":
            count = min(len(devices) + 1, 3)
            return for_any(graph, devices, head, cuts[::2] + cuts[-1:], count, window=4)
        case "one":
            cuts, wholes = [0, stop], [devices[-1]]
        case "pipeline":
            wholes = [devices[i % len(devices)] for i in range(len(cuts) - 1)]
        case "fused":
            cuts, wholes = [0, stop], [devices[0]]
        case "bands":
            cuts = sorted({0, stop, *(c for c in cuts if c % 2 == 0)})
            wholes = [devices[0]] * (len(cuts) - 1)
        case _:
            wholes = [devices[i % len(devices)] for i in range(len(cuts) - 1)]
    axes = axes_of(graph)
    kind = "channels" if style == "channels" else "rows"
    whole = style in ("one", "pipeline")
    blocks = []
    for (start, end), device in zip(pairwise(cuts), wholes, strict=True):
        split = not whole and splittable(graph, axes, start, end, kind)  # type: ignore[arg-type]
        blocks.append(Block(start, end, None if split else device, kind))  # type: ignore[arg-type]
    plan = build(graph, axes, blocks, dict.fromkeys(devices, 1.0), ends)
    if style != "pipeline":
        return plan
    return Plan(plan.graph, plan.source, plan.sink, plan.stages, window=3)


def for_any(
    graph: Graph,
    devices: tuple[DeviceId, ...],
    head: DeviceId,
    cuts: Sequence[int],
    count: int,
    *,
    window: int,
) -> Plan:
    """Tasks that any device may take: ``count`` bands of each value that has so many rows; what has
    not is whole."""
    stages = []
    for start, stop in pairwise(sorted(set(cuts))):
        held: list[list[Shard]] = [[] for _ in range(count)]
        for value in graph.live_outputs(start, stop):
            box = graph.whole(value)
            rows = split_even(box[2].size, count) if box[2].size >= count else (box[2],)
            for shards, part in zip(held, rows, strict=False):
                shards.append(Shard(value, box.replace(2, part)))
        tasks = tuple(Task(devices, tuple(shards)) for shards in held if shards)
        stages.append(Stage(start, stop, tasks))
    return Plan(graph.digest, head, head, tuple(stages), window)
