"""What is told of the optimiser's work on a tile is what the optimiser does of it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from architectures import Builder
from test_architectures_exact import Tiling, grid, quick, rows, tiled

import meshinfer as mi
from meshinfer.engine.ort import OrtEngine, OrtPrepared
from meshinfer.engine.tiles import Tile, optimised_as, tile_of
from meshinfer.engine.wire import external_tensors
from meshinfer.geometry import Box
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.lower import lower
from meshinfer.plan import Shard, Stage, Task

TOLD = {"vgg16": 15, "yolov2": 20, "resnet50": 19, "mobilenet_v2": 16, "squeezenet1_1": 2}
"""So many of their tiles, at least, are told from another one's."""


def submodels(graph: Graph, tiling: Tiling, folder: Path) -> list[bytes]:
    found = {}
    for stage in tiled(graph, tiling, 4, 4).stages:
        for task in stage.tasks:
            submodel = lower(graph, stage, task)
            found[submodel.model] = None
            for weight in submodel.weights:
                data = graph.weight_bytes(weight.shard.value, weight.shard.box)
                (folder / weight.digest).write_bytes(data)
    return list(found)


def optimised(engine: OrtEngine, model: bytes, name: str) -> tuple[bytes, Path]:
    """By onnxruntime itself: the model, and its weights beside it."""
    folder = engine.blobs / f"prepare-{name}"
    folder.mkdir()
    engine._optimise(model, folder)
    return (folder / "model.onnx").read_bytes(), folder


def plain(model: bytes) -> onnx.ModelProto:
    """With attributes in the order of their names, no types of values inside, and no names of
    operators, which onnxruntime numbers in any order."""
    found = onnx.load_from_string(model)
    for node in found.graph.node:
        sorted_ones = sorted(node.attribute, key=lambda each: each.name)
        del node.attribute[:]
        node.attribute.extend(sorted_ones)
        node.ClearField("name")
    del found.graph.value_info[:]
    return found


def weights(model: bytes, folder: Path) -> dict[str, bytes]:
    found = {}
    for tensor in external_tensors(memoryview(model)):
        data = (folder / tensor.location).read_bytes()
        found[tensor.name] = data[tensor.offset : tensor.offset + tensor.length]
    return found


@pytest.mark.parametrize("tiling", [rows, grid], ids=lambda tiling: tiling.__name__)
@pytest.mark.parametrize("name", TOLD)
def test_another_tile_of_the_same_layers_is_told_as_onnxruntime_optimises_it(
    name: str, tiling: Tiling, tmp_path: Path
) -> None:
    _, graph = quick(name)
    engine = OrtEngine(tmp_path)
    alike: defaultdict[str, list[tuple[bytes, Tile]]] = defaultdict(list)
    for model in submodels(graph, tiling, tmp_path):
        tile = tile_of(model)
        if tile is not None:
            alike[tile.layers].append((model, tile))
    told = 0
    for (first, known), *others in alike.values():
        if not others:
            continue
        made, of_first = optimised(engine, first, f"{told}-first")
        for model, tile in others:
            found = optimised_as(made, known, tile)
            assert found is not None, "tiles of the same layers are told one from the other"
            right, folder = optimised(engine, model, f"{told}")
            assert plain(found) == plain(right)
            assert weights(found, of_first) == weights(right, folder)
            told += 1
    assert told >= TOLD[name]


def two_layers(activated: bool = True) -> Graph:
    b = Builder(3)
    x = b.conv(b.input("image", [1, 16, 24, 24]), 16, 32, 3)
    x = b.maxpool(b.relu(x) if activated else x, 2, 2, 0)
    return mi.load(b.model([b.rename(b.conv(x, 32, 16, 3), "y")]))


def band(graph: Graph, start: int, stop: int, folder: Path) -> bytes:
    whole = graph.whole("y")
    task = Task((DeviceId("pi"),), (Shard("y", whole.replace(2, Box.of((start, stop))[0])),))
    submodel = lower(graph, Stage(0, len(graph.ops), (task,)), task)
    for weight in submodel.weights:
        data = graph.weight_bytes(weight.shard.value, weight.shard.box)
        (folder / weight.digest).write_bytes(data)
    return submodel.model


def run(prepared: OrtPrepared, height: int) -> np.ndarray:
    (name,) = prepared.inputs
    image = np.random.default_rng(4).standard_normal((1, 16, height, 24), np.float32)
    return np.asarray(prepared.run({name: image})[0])


def test_a_tile_is_prepared_without_its_weights_while_another_of_its_layers_is(
    tmp_path: Path,
) -> None:
    graph, engine = two_layers(), OrtEngine(tmp_path)
    top = engine.prepare(band(graph, 0, 5, tmp_path))
    middle = band(graph, 4, 8, tmp_path)
    needed = run(engine.prepare(middle), 14)
    for file in tmp_path.iterdir():
        file.unlink()
    again = engine.prepare(middle)
    assert np.array_equal(run(again, 14), needed)
    assert {id(w) for w in again._weights} == {id(w) for w in top._weights}
    del top
    assert np.array_equal(run(engine.prepare(middle), 14), needed), "one is enough"
    del again
    with pytest.raises(Exception, match=r"(?i)file|exist"):
        engine.prepare(middle)


def test_the_bits_are_those_of_a_tile_that_was_optimised_itself(tmp_path: Path) -> None:
    graph = two_layers()
    for start, stop in ((7, 12), (0, 3), (2, 11)):
        model = band(graph, start, stop, tmp_path)
        engine = OrtEngine(tmp_path)
        first = engine.prepare(band(graph, 4, 8, tmp_path))
        told = engine.prepare(model)
        assert told._layers is first._layers is not None
        inputs = onnx.load_from_string(model).graph.input[0].type.tensor_type.shape.dim
        own = OrtEngine(tmp_path).prepare(model)
        assert np.array_equal(run(told, inputs[2].dim_value), run(own, inputs[2].dim_value))


def test_a_sum_of_which_one_operand_may_be_repeated_is_not_told(tmp_path: Path) -> None:
    b = Builder(5)
    x, s = b.input("x", [1, 16, 8, 8]), b.input("s", [1, 16, 1, 1])
    both = b.add(b.conv(x, 16, 16, 3), b.conv(s, 16, 16, 1))
    graph = mi.load(b.model([b.rename(b.maxpool(both, 2, 2, 0), "y")]))
    assert tile_of(band(graph, 0, 2, tmp_path)) is None


def test_layers_that_may_be_optimised_by_sizes_or_are_others_are_not_told(tmp_path: Path) -> None:
    graph, other = two_layers(), two_layers(activated=False)
    top, middle = (tile_of(band(graph, a, b, tmp_path)) for a, b in ((0, 5), (4, 8)))
    assert top is not None and middle is not None
    assert top.layers == middle.layers
    bare = tile_of(band(other, 0, 5, tmp_path))
    assert bare is not None and bare.layers != top.layers, "what it computes is another"
    b = Builder(1)
    gemm = b.model([b.rename(b.gemm(b.input("x", [3, 8]), 8, 4), "y")])
    assert tile_of(gemm.SerializeToString()) is None
    assert tile_of(band(graph, 0, 5, tmp_path)[:-3]) is None, "broken"
    engine = OrtEngine(tmp_path)
    made, _ = optimised(engine, band(graph, 0, 5, tmp_path), "made")
    assert optimised_as(made, middle, top) is None, "it was not made of that"
    assert optimised_as(made, Tile("", {}, {}, ()), top) is None
