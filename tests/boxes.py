"""One operator against plain onnxruntime: as a whole model, box by box, and between convolutions.

A rule is right when every box of the output that a plan can ask for is the whole model's: whole, in
two and three parts along each axis and each pair of axes, as single elements.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from oracle import reference, tolerance
from plans import check_exact, plans

import meshinfer as mi
from meshinfer.engine.ort import OrtEngine
from meshinfer.geometry import Box, Interval, split_even
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.lower import lower
from meshinfer.ops import BARRIER, rule_of, why_barrier
from meshinfer.plan import Shard, Stage, Task

PI = DeviceId("pi-1")
Arrays = Mapping[str, np.ndarray]


def load(
    node: NodeProto,
    opset: int,
    shape: Sequence[int],
    dtype: type = np.float32,
    tensors: Sequence[TensorProto] = (),
) -> ModelProto:
    """A model of one node from ``x`` to ``y``, with initializers."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        list(tensors),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def parts(whole: Box) -> Iterator[list[Box]]:
    """The whole; two and three parts along each axis, two by three along each pair; elements."""
    yield [whole]
    axes = [i for i, axis in enumerate(whole) if axis.size > 1]
    two, three = (
        {i: [r for r in split_even(whole[i].size, n) if r.size] for i in axes} for n in (2, 3)
    )
    for i in axes:
        yield [whole.replace(i, r) for r in two[i]]
        yield [whole.replace(i, r) for r in three[i]]
    for i, j in combinations(axes, 2):
        yield [whole.replace(i, a).replace(j, b) for a, b in product(two[i], three[j])]
    rng = np.random.default_rng(0)
    corners = [whole.start, tuple(s - 1 for s in whole.stop)]
    inside = [tuple(int(rng.integers(s)) for s in whole.shape) for _ in range(4)]
    yield [Box(tuple(Interval(p, p + 1) for p in point)) for point in (*corners, *inside)]


def compute(graph: Graph, boxes: Sequence[Box], inputs: Arrays) -> Iterator[np.ndarray]:
    """Each box of ``y`` by itself, all nodes in one task."""
    whole_stage = Stage(0, len(graph.ops), ())
    with tempfile.TemporaryDirectory() as folder:
        engine = OrtEngine(Path(folder))
        for box in boxes:
            submodel = lower(graph, whole_stage, Task((PI,), (Shard("y", box),)))
            for weight in submodel.weights:
                data = graph.weight_bytes(weight.shard.value, weight.shard.box)
                (Path(folder) / weight.digest).write_bytes(data)
            feeds = {
                name: np.ascontiguousarray(
                    inputs[shard.value][shard.box.within(graph.whole(shard.value))]
                )
                for name, shard in submodel.inputs
            }
            yield engine.prepare(submodel.model).run(feeds)[0]


def check_boxes(model: ModelProto, inputs: Arrays, boxes: Sequence[Box], identical: bool) -> None:
    """These boxes of ``y`` are the whole model's: within the tolerance, or bit for bit."""
    graph = mi.load(model)
    truth = reference(model, inputs)["y"]
    exact = identical or not np.issubdtype(truth.dtype, np.inexact)
    limit = 0.0 if exact else tolerance(model, inputs)
    scale = float(np.abs(np.where(np.isfinite(truth), truth, 0)).max(initial=0)) or 1.0
    for box, got in zip(boxes, compute(graph, boxes, inputs), strict=True):
        expected = truth[box.within(graph.whole("y"))]
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape, f"{box}"
        if exact:
            np.testing.assert_array_equal(got, expected, err_msg=f"{box}")
        else:
            np.testing.assert_allclose(got, expected, rtol=0, atol=limit * scale, err_msg=f"{box}")


def check_every_box(
    model: ModelProto, inputs: Arrays, identical: bool = False, ruled: bool = True
) -> None:
    """All the boxes of ``parts``; the node must follow its rule."""
    graph = mi.load(model)
    if ruled:
        assert [why_barrier(op) for op in graph.ops if rule_of(op) is BARRIER] == []
    boxes = [box for found in parts(graph.whole("y")) for box in found]
    check_boxes(model, inputs, boxes, identical)


def check_some_boxes(model: ModelProto, inputs: Arrays, identical: bool = False) -> None:
    """Eight boxes anywhere, two of them single elements; the node must follow its rule."""
    graph, rng = mi.load(model), np.random.default_rng(0)
    assert [why_barrier(op) for op in graph.ops if rule_of(op) is BARRIER] == []
    boxes = []
    for size in (None,) * 6 + (1,) * 2:
        starts = [int(rng.integers(axis.size)) for axis in graph.whole("y")]
        boxes.append(
            Box(
                tuple(
                    Interval(a, size + a if size else int(rng.integers(a + 1, axis.stop + 1)))
                    for a, axis in zip(starts, graph.whole("y"), strict=True)
                )
            )
        )
    check_boxes(model, inputs, boxes, identical)


def drawn_box(draw: st.DrawFn, whole: Box) -> Box:
    """Any box that is not empty."""
    ranges = []
    for axis in whole:
        start = draw(st.integers(0, axis.size - 1))
        ranges.append(Interval(start, draw(st.integers(start + 1, axis.size))))
    return Box(tuple(ranges))


def check_any_boxes(
    model: ModelProto, inputs: Arrays, data: st.DataObject, identical: bool = False
) -> None:
    """Three drawn boxes."""
    graph = mi.load(model)
    boxes = [drawn_box(data.draw, graph.whole("y")) for _ in range(3)]
    check_boxes(model, inputs, boxes, identical)


def check_neighbours(model: ModelProto, inputs: Arrays, data: st.DataObject) -> None:
    """Any plan of Conv, the node, Conv is exact: its footprint is another's output, and so on."""
    surrounded = ModelProto()
    surrounded.CopyFrom(model)
    graph, rng = surrounded.graph, np.random.default_rng(1)
    shape, result = inputs["x"].shape, mi.load(model).whole("y").shape
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [{"x": "before", "y": "after"}.get(n, n) for n in names]
    for name, channels in (("w1", shape[1]), ("w2", result[1])):
        array = rng.standard_normal((channels, channels, *[3] * (len(shape) - 2)), np.float32)
        graph.initializer.append(numpy_helper.from_array(array / 3, name))
    pads = [1] * 2 * (len(shape) - 2)
    graph.node.insert(0, helper.make_node("Conv", ["x", "w1"], ["before"], pads=pads))
    graph.node.append(helper.make_node("Conv", ["after", "w2"], ["y"], pads=pads))
    loaded = mi.load(surrounded)
    plan = data.draw(plans(loaded))
    mi.validate(loaded, plan)
    check_exact(surrounded, loaded, plan, inputs)
