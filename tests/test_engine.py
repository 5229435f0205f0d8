"""Two engines agree; weights are held once a process; a submodel has the weights it needs and no
more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from architectures import Builder
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto
from plans import check_exact

import meshinfer as mi
from meshinfer.engine import EngineError
from meshinfer.engine.ort import OrtEngine
from meshinfer.engine.reference import ReferenceEngine
from meshinfer.engine.wire import ExternalTensor, external_tensors
from meshinfer.geometry import Box, split_even
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.lower import Submodel, lower
from meshinfer.plan import Plan, Shard, Stage, Task

ROOT = Path(__file__).resolve().parent.parent
PI = DeviceId("pi-1")


def small() -> ModelProto:
    """Conv, padded pool, shuffle and Gemm: kernels that both engines have."""
    b = Builder(1)
    x = b.silu(b.conv(b.input("image", [1, 2, 8, 8]), 2, 8, 3))
    x = b.depth_to_space(b.maxpool(x, 3, 2, 1), 2)
    x = b.rename(b.conv(x, 2, 4, 3, groups=2), "map")
    return b.model([x, b.rename(b.gemm(b.flatten(b.gap(x)), 4, 3), "logits")])


def tiled(graph: Graph, parts: int = 2) -> Plan:
    """A stage an op, the second axis of each value cut in parts."""
    stages = []
    for op in graph.ops:
        live = graph.live_outputs(op.index, op.index + 1)
        tasks = []
        for i in range(parts):
            cuts = [(v, split_even(graph.whole(v)[1].size, parts)[i]) for v in live]
            shards = tuple(Shard(v, graph.whole(v).replace(1, c)) for v, c in cuts if c.size)
            if shards:
                tasks.append(Task((PI,), shards))
        stages.append(Stage(op.index, op.index + 1, tuple(tasks)))
    return Plan(graph.digest, PI, PI, tuple(stages))


@pytest.mark.parametrize("engine", [OrtEngine, ReferenceEngine])
def test_both_engines_give_the_answer(engine: type[OrtEngine] | type[ReferenceEngine]) -> None:
    model = small()
    graph = mi.load(model)
    image = {"image": np.random.default_rng(2).standard_normal((1, 2, 8, 8), np.float32)}
    check_exact(model, graph, tiled(graph), image, engine=engine)


# -- weights -----------------------------------------------------------------------------------


def fully_connected() -> Graph:
    b = Builder(0)
    return mi.load(b.model([b.rename(b.gemm(b.input("x", [3, 256]), 256, 400), "y")]))


def columns(graph: Graph, start: int, stop: int, rows: tuple[int, int] = (0, 3)) -> Submodel:
    return lowered(graph, Box.of(rows, (start, stop)))


def lowered(graph: Graph, box: Box) -> Submodel:
    task = Task((PI,), (Shard("y", box),))
    return lower(graph, Stage(0, len(graph.ops), (task,)), task)


def test_a_slice_of_a_layer_has_just_the_bytes_of_its_columns() -> None:
    graph = fully_connected()
    quarter = columns(graph, 100, 200)
    assert sorted(w.nbytes for w in quarter.weights) == [100 * 4, 100 * 256 * 4]
    assert len(quarter.model) < 4096, "the weights are not in the submodel itself"
    parts = [columns(graph, a, a + 100) for a in range(0, 400, 100)]
    assert sum(w.nbytes for part in parts for w in part.weights) == 400 * 257 * 4
    assert len({w.digest for part in parts for w in part.weights}) == 8


def test_equal_tasks_give_equal_bytes() -> None:
    graph = fully_connected()
    assert columns(graph, 0, 100) == columns(fully_connected(), 0, 100)
    assert columns(graph, 0, 100).model != columns(graph, 0, 101).model


def write_weights(graph: Graph, submodel: Submodel, folder: Path) -> None:
    for weight in submodel.weights:
        data = graph.weight_bytes(weight.shard.value, weight.shard.box)
        (folder / weight.digest).write_bytes(data)


def test_sessions_with_the_same_weights_hold_them_once(tmp_path: Path) -> None:
    graph, engine = fully_connected(), OrtEngine(tmp_path)
    all_rows, one_row, others = (
        columns(graph, 0, 100),
        columns(graph, 0, 100, (1, 2)),
        columns(graph, 100, 200),
    )
    prepared = []
    for submodel in (all_rows, one_row, others):
        write_weights(graph, submodel, tmp_path)
        prepared.append(engine.prepare(submodel.model))
    held = [{id(value) for value in p._weights} for p in prepared]
    assert held[0] and held[0] == held[1]
    assert not held[0] & held[2]
    del prepared
    assert len(engine._shared) == 0, "unused weights are let go"


def test_weight_files_are_not_needed_once_prepared(tmp_path: Path) -> None:
    graph, engine = fully_connected(), OrtEngine(tmp_path)
    submodel = columns(graph, 0, 400)
    write_weights(graph, submodel, tmp_path)
    prepared = engine.prepare(submodel.model)
    for file in tmp_path.iterdir():
        file.unlink()
    (y,) = prepared.run({submodel.inputs[0][0]: np.ones((3, 256), np.float32)})
    assert y.shape == (3, 400) and np.isfinite(y).all()


RESIDENT = """
import sys, tempfile
from pathlib import Path
import numpy as np, psutil
sys.path[:0] = ["tests", "."]
import test_engine as t
from architectures import Builder
import meshinfer as mi
from meshinfer.engine.ort import OrtEngine
from meshinfer.geometry import Box
b = Builder(0)
if sys.argv[2] == "Gemm":
    y, tail = b.gemm(b.input("x", [4, 4096]), 4096, 4096), ()
else:
    y, tail = b.conv(b.input("x", [4, 4096, 2, 2]), 4096, 4096, 1), ((0, 2), (0, 2))
graph = mi.load(b.model([b.rename(y, "y")]))
folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
boxes = [Box.of(rows, (0, 4096), *tail) for rows in ((0, 4), (0, 2), (1, 4), (3, 4))]
parts = [t.lowered(graph, box) for box in boxes]
t.write_weights(graph, parts[0], folder)
engine, kept = OrtEngine(folder), []
def resident():
    return psutil.Process().memory_info().rss >> 20
for part in parts:
    kept.append(engine.prepare(part.model))
    (name, shard), = part.inputs
    kept[-1].run({name: np.ones(shard.box.shape, np.float32)})
    print(resident())
"""


@pytest.mark.parametrize(("kind", "most_mib"), [("Conv", 16), ("Gemm", 80)])
def test_what_a_further_session_costs_is_known(tmp_path: Path, kind: str, most_mib: int) -> None:
    """64 MiB of weights, in a process of its own, measured after running.

    A Conv's weights are laid out when the model is optimised, then shared. A Gemm's kernel packs a
    copy of its own for each session: without packing it is up to 1.7 times slower, and other bits.
    """
    done = subprocess.run(
        [sys.executable, "-B", "-c", RESIDENT, str(tmp_path), kind],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, *further = (int(line) for line in done.stdout.split())
    assert first > 64, "it is the weights that are measured"
    assert further[-1] - first < 3 * most_mib, f"{first} then {further} MiB"


WORKING = """
import sys, tempfile
from pathlib import Path
import numpy as np, psutil
sys.path[:0] = ["tests", "."]
import test_engine as t
from architectures import Builder
import meshinfer as mi
from meshinfer.engine.ort import OrtEngine
from meshinfer.geometry import Box
ROWS = range(96, 256, 16)
b = Builder(0)
x = b.input("x", [1, 16, 256, 512])
graph = mi.load(b.model([b.rename(b.conv(b.relu(b.conv(x, 16, 16, 3)), 16, 16, 3), "y")]))
boxes = [Box.of((0, 1), (0, 16), (0, rows), (0, 512)) for rows in ROWS]
parts = [t.lowered(graph, box) for box in boxes]
folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
t.write_weights(graph, parts[-1], folder)
engine = OrtEngine(folder)
feed = np.ones((1, 16, 256, 512), np.float32)
def anonymous():
    full = psutil.Process().memory_full_info()
    return full.rss - full.shared >> 20
def run(session, part):
    (name, shard), = part.inputs
    session.run({name: np.ascontiguousarray(feed[:, :, : shard.box.shape[2]])})
kept = [engine.prepare(part.model) for part in parts]
before = anonymous()
run(kept[-1], parts[-1])
run(kept[-1], parts[-1])
largest = anonymous()
for _ in range(3):
    for session, part in zip(kept, parts):
        run(session, part)
print(largest - before, anonymous() - before)
del kept, session
engine.give_back()
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_many_sessions_hold_room_for_one_to_compute_in(tmp_path: Path) -> None:
    """Ten parts of one model, the largest with three values of 8 MiB. With an arena each they held
    ten times as much for ever."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", WORKING, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    largest, all_of_them, given_back = (int(word) for word in done.stdout.split())
    assert 16 < largest < 64, "it is the room to compute in that is measured"
    assert all_of_them < 1.5 * largest + 8, f"{largest} then {all_of_them} MiB"
    assert given_back < 12, f"{given_back} MiB are held for no session"


# -- refusals ------------------------------------------------------------------------------------


def test_an_engine_error_is_the_engines_own_words(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="ONNXRuntimeError"):
        OrtEngine(tmp_path).prepare(b"no model")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_missing_weight_is_an_engine_error(tmp_path: Path) -> None:
    submodel = columns(fully_connected(), 0, 100)
    with pytest.raises(EngineError, match=submodel.weights[0].digest[:8]):
        OrtEngine(tmp_path).prepare(submodel.model)


def test_an_array_of_the_wrong_shape_is_an_engine_error(tmp_path: Path) -> None:
    graph, engine = fully_connected(), OrtEngine(tmp_path)
    submodel = columns(graph, 0, 100)
    write_weights(graph, submodel, tmp_path)
    with pytest.raises(EngineError, match="Got invalid dimensions"):
        engine.prepare(submodel.model).run({"x": np.ones((3, 255), np.float32)})


# -- the wire format -----------------------------------------------------------------------------


def test_external_tensors_are_found_as_onnx_wrote_them() -> None:
    submodel = columns(fully_connected(), 0, 100)
    found = {t.location: t for t in external_tensors(memoryview(submodel.model))}
    assert set(found) == {w.digest for w in submodel.weights}
    for weight in submodel.weights:
        tensor = found[weight.digest]
        shape = weight.shard.box.shape
        assert tensor == ExternalTensor(
            weight.shard.value, 1, shape, weight.digest, 0, weight.nbytes
        )


def test_tensors_inside_the_model_are_not_external() -> None:
    assert list(external_tensors(memoryview(small().SerializeToString()))) == []


@given(st.binary(max_size=200))
def test_garbage_is_parsed_or_a_value_error(data: bytes) -> None:
    try:
        list(external_tensors(memoryview(data)))
    except ValueError:
        pass


@given(st.data())
def test_a_damaged_model_is_parsed_or_a_value_error(data: st.DataObject) -> None:
    model = bytearray(columns(fully_connected(), 0, 100).model)
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    try:
        list(external_tensors(memoryview(model[: data.draw(st.integers(0, len(model)))])))
    except ValueError:
        pass


@pytest.mark.parametrize("lack", ["location", "offset", "length"])
def test_an_external_tensor_without_a_true_place_is_a_value_error(lack: str) -> None:
    model = onnx.load_from_string(columns(fully_connected(), 0, 100).model)
    entry = next(e for e in model.graph.initializer[-1].external_data if e.key == lack)
    if lack == "location":
        model.graph.initializer[-1].external_data.remove(entry)
    else:
        entry.value = "-7"
    with pytest.raises(ValueError, match="has no place"):
        list(external_tensors(memoryview(model.SerializeToString())))
