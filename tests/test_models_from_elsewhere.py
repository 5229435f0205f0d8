"""Models as they come: every opset, weights in other files, any inputs and outputs, any size."""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from architectures import Builder
from onnx import ModelProto, TensorProto, helper
from oracle import assert_exact
from plans import check_exact

import meshinfer as mi
from cluster.blobs import BlobStore
from cluster.models import offer_model
from cluster.offers import Offers
from cluster.planning import PlanningThread
from meshinfer import limits
from meshinfer.geometry import Box, Interval
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.ops import rule_of, why_barrier
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Buffer
from meshinfer.protocol.messages import Facts
from meshinfer.scheduler.admission import refuse_deploy
from meshinfer.scheduler.catalogue import Catalogue
from meshinfer.scheduler.events import (
    Candidate,
    MakePlan,
    ModelOpened,
    OpenModel,
    PlanReady,
    Signature,
    WriteBlob,
)
from meshinfer.scheduler.puller import Puller

DEVICES = (DeviceId("pi-1"), DeviceId("pi-2"))
Inputs = Mapping[str, np.ndarray]


def cnn(opset: int = 17, size: int | str = 12, batch: int | str = 1) -> ModelProto:
    """Convolutions, a pool, a residual sum, a mean and a classifier."""
    b = Builder(3, opset)
    x = b.input("image", [batch, 3, size, size])
    x = b.relu(b.bn(b.conv(x, 3, 8, 3), 8))
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = b.relu(b.add(b.bn(b.conv(x, 8, 8, 3, bias=False), 8), x))
    x = b.flatten(b.gap(b.conv(x, 8, 16, 1)))
    return b.model([b.rename(b.gemm(x, 16, 5), "logits")])


def newest_opset() -> int:
    """The last that both onnx and the installed onnxruntime take."""
    for opset in range(onnx.defs.onnx_opset_version(), 8, -1):
        try:
            ort.InferenceSession(cnn(opset).SerializeToString())
        except Exception:
            continue
        return opset
    raise AssertionError("onnxruntime takes no opset")


def halves(whole: Box) -> list[Box]:
    """Two parts along the last axis that has two elements; else the whole."""
    axis = next((i for i in reversed(range(len(whole))) if whole[i].size > 1), None)
    if axis is None:
        return [whole]
    start, stop = whole[axis]
    middle = (start + stop) // 2
    return [whole.replace(axis, Interval(*part)) for part in ((start, middle), (middle, stop))]


def tiled(graph: Graph) -> Plan:
    """Every node is a stage, and its values are shared by two devices where that can be."""
    stages = []
    for i, op in enumerate(graph.ops):
        parts: tuple[list[Shard], list[Shard]] = ([], [])
        for value in graph.live_outputs(i, i + 1):
            boxes = halves(graph.whole(value)) if rule_of(op).split(op) else [graph.whole(value)]
            for part, box in zip(parts, boxes, strict=False):
                part.append(Shard(value, box))
        tasks = [Task((d,), tuple(p)) for d, p in zip(DEVICES, parts, strict=True) if p]
        if tasks:
            stages.append(Stage(i, i + 1, tuple(tasks)))
    return Plan(graph.digest, DEVICES[0], DEVICES[0], tuple(stages))


def random_inputs(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.standard_normal(graph.shape(name)), graph.numpy_dtype(name))
        for name in graph.inputs
    }


def check(model: ModelProto | Path, graph: Graph) -> None:
    check_exact(model, graph, tiled(graph), random_inputs(graph))


# -- opsets ----------------------------------------------------------------------------------------


NEWEST = newest_opset()
QUICK = (9, 12, 18, NEWEST)


@pytest.mark.parametrize(
    "opset",
    [o if o in QUICK else pytest.param(o, marks=pytest.mark.slow) for o in range(9, NEWEST + 1)],
)
def test_every_opset_that_onnxruntime_knows_is_tiled_and_exact(opset: int) -> None:
    model = cnn(opset)
    graph = mi.load(model)
    assert graph.opset == opset
    assert len(tiled(graph).stages) >= 6
    check(model, graph)


def test_the_newest_opset_is_new() -> None:
    assert NEWEST >= 23


def test_initializers_listed_as_inputs_are_weights() -> None:
    model = cnn(9)
    model.ir_version = 3  # where they must be listed
    for tensor in model.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.insert(0, value)
    graph = mi.load(model)
    assert graph.inputs == ("image",)
    check(model, graph)


# -- inputs and outputs ----------------------------------------------------------------------------


def test_inputs_may_be_shared_unused_or_scalars_and_outputs_may_be_read_inside() -> None:
    b = Builder(0)
    x, y = b.input("x", [1, 4, 9, 9]), b.input("y", [1, 4, 9, 9])
    gain = b.input("gain", [])
    b.input("unused", [2, 3])
    inner = b.rename(b.conv(b.add(x, y), 4, 6, 3), "inner")
    scaled = b.rename(b.op("Mul", [inner, gain]), "scaled")
    left = b.rename(b.conv(scaled, 6, 3, 3, 2), "left")
    right = b.rename(b.op("ReduceMax", [b.op("Sub", [x, y])], keepdims=0), "right")
    model = b.model([inner, left, right, "scaled"])
    graph = mi.load(model)
    assert graph.inputs == ("x", "y", "gain", "unused")
    assert graph.outputs == ("inner", "left", "right", "scaled")
    check(model, graph)


def test_an_input_that_is_an_output_as_it_is_comes_out() -> None:
    b = Builder(0)
    x = b.input("x", [1, 4])
    model = b.model([b.rename(b.relu(x), "y")])
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4]))
    check(model, mi.load(model))


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "size"), [(1, 8), (3, 13), (2, 21)])
def test_dynamic_batch_and_image_sizes_are_fixed_at_their_use(batch: int, size: int) -> None:
    model = cnn(size="size", batch="batch")
    check(model, mi.load(model, shapes={"image": (batch, 3, size, size)}))


def two_of_one_size() -> ModelProto:
    b = Builder(0)
    made = b.add(b.input("a", ["n", 4]), b.input("b", ["n", 4]))
    return b.model([b.rename(made, "y")])


def test_two_inputs_of_one_named_size_must_agree() -> None:
    model = two_of_one_size()
    check(model, mi.load(model, shapes={"a": (3, 4), "b": (3, 4)}))
    with pytest.raises(mi.InvalidInput, match="'n' is 1 in input 'a' and 3 in 'b'"):
        mi.load(model, shapes={"a": (1, 4), "b": (3, 4)})


def test_one_input_must_agree_with_itself() -> None:
    with pytest.raises(mi.InvalidInput, match="'size' is 8 in input 'image' and 9 in 'image'"):
        mi.load(cnn(size="size"), shapes={"image": (1, 3, 8, 9)})


# -- weights in other files ------------------------------------------------------------------------


def scattered(folder: Path, model: ModelProto, locations: list[str]) -> Path:
    """The model with its weights dealt to these files, one behind the other in each."""
    for i, tensor in enumerate(model.graph.initializer):
        location = locations[i % len(locations)]
        file = folder / location
        file.parent.mkdir(parents=True, exist_ok=True)
        data = tensor.raw_data
        with file.open("ab") as out:
            out.write(b"\0" * (-out.tell() % 64))
            offset = out.tell()
            out.write(data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    "locations",
    [["weights"], [f"w{i}" for i in range(30)], ["parts/a", "parts/more/b", "c"]],
    ids=["one file", "a file each", "subfolders"],
)
def test_weights_may_lie_in_other_files(tmp_path: Path, locations: list[str]) -> None:
    path = scattered(tmp_path, cnn(), locations)
    graph = mi.load(path)
    check(cnn(), graph)
    assert graph.digest == mi.load(cnn()).digest


# -- large models: a small file, and its weights by their SHA-256 ----------------------------------


class Folder(Offers):
    """Offers that remember what was asked of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(BlobStore(folder))
        self.served: list[str] = []

    def read(self, digest: str, offset: int, length: int) -> tuple[Buffer, int] | None:
        if not offset:
            self.served.append(digest)
        return super().read(digest, offset, length)


def offered(tmp_path: Path, model: ModelProto | Path | bytes, least: int) -> Path:
    """What a coordinator that has nothing yet would make of an offer: its blob folder's model."""
    offers, here = Folder(tmp_path / "client"), tmp_path / "coordinator"
    here.mkdir()
    with offers.held(lambda put: offer_model(model, put, least)) as offer:
        for digest, nbytes in {offer.digest: offer.nbytes, **offer.weights}.items():
            found = offers.read(digest, 0, nbytes + 1)
            assert found is not None and len(found[0]) == found[1] == nbytes
            (here / digest).write_bytes(found[0])
    assert offers.read(offer.digest, 0, 1) is None
    assert not list((tmp_path / "client").iterdir()), "nothing stays when nobody needs it"
    shutil.rmtree(tmp_path / "client")
    return here / offer.digest


@pytest.mark.parametrize("form", ["proto", "bytes", "file", "outside"])
def test_a_model_travels_as_a_small_file_and_its_weights(tmp_path: Path, form: str) -> None:
    given: ModelProto | Path | bytes = cnn()
    if form == "bytes":
        given = cnn().SerializeToString()
    elif form == "file":
        given = tmp_path / "given.onnx"
        onnx.save(cnn(), given)
    elif form == "outside":
        given = scattered(tmp_path / "given", cnn(), ["w"])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    path = offered(tmp_path, given, 256)
    assert len(list(path.parent.iterdir())) == 5  # three convolutions and the classifier's weights
    check(cnn(), mi.load(path))
    assert all(p.read_bytes() == data for p, data in before.items())
    if isinstance(given, ModelProto):
        assert given == cnn(), "what is the caller's stays as it is"


def test_weights_below_the_threshold_stay_inside(tmp_path: Path) -> None:
    path = offered(tmp_path, scattered(tmp_path / "given", cnn(), ["w"]), 1 << 20)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    check(cnn(), mi.load(path))


def test_a_file_that_changes_while_it_is_offered_never_becomes_another_model(
    tmp_path: Path,
) -> None:
    """Its bytes are not those of its name any more, and whoever fetches them sees it."""
    given = scattered(tmp_path / "given", cnn(), ["w"])
    offers = Folder(tmp_path / "client")
    with offers.held(lambda put: offer_model(given, put, 256)) as offer:
        (tmp_path / "given" / "w").write_bytes(b"")
        digest = next(iter(offer.weights))
        assert offers.read(digest, 0, 1 << 20) == (b"", offer.weights[digest])
        (tmp_path / "given" / "w").unlink()
        assert offers.read(digest, 0, 1 << 20) is None


@pytest.fixture(scope="module")
def client() -> Iterator[mi.Client]:
    with mi.LocalCluster(2) as cluster, cluster.client() as made:
        yield made


def dense(seed: int, width: int = 160) -> ModelProto:
    """Two weights of 100 kB each; the second one by ``seed``."""
    b = Builder(0)
    x = b.relu(b.gemm(b.input("x", [1, width]), width, width))
    b.rng = np.random.default_rng(seed)
    return b.model([b.rename(b.gemm(x, width, width), "y")])


def test_weights_that_have_not_changed_do_not_travel_again(
    client: mi.Client, tmp_path: Path
) -> None:
    assert limits.WEIGHT_FILE_BYTES <= 160 * 160 * 4
    offers = client._offers = Folder(tmp_path / "client")
    for seed, files in ((1, 3), (2, 2), (2, 0)):
        path = scattered(tmp_path / f"{seed}{files}", dense(seed), ["weights"])
        offers.served.clear()
        client.deploy("dense", path)
        assert len(set(offers.served)) == files, "the model and each new weight, once"
        x = np.random.default_rng(0).standard_normal((1, 160)).astype(np.float32)
        assert_exact(dense(seed), {"x": x}, client.infer("dense", {"x": x}).outputs)


def test_a_weight_that_never_comes_fails_the_deployment(client: mi.Client, tmp_path: Path) -> None:
    class Losing(Folder):
        def read(self, digest: str, offset: int, length: int) -> tuple[Buffer, int] | None:
            found = super().read(digest, offset, length)
            return None if found is None or found[1] == 200 * 200 * 4 else found

    client._offers = Losing(tmp_path / "client")
    with pytest.raises(mi.InvalidInput, match="did not arrive"):
        client.deploy("lost", dense(3, width=200), timeout_s=60)
    assert all(info.name != "lost" for info in client.models())


def test_a_model_that_crashes_onnxruntime_leaves_the_cluster_as_it_was(client: mi.Client) -> None:
    """TfIdfVectorizer of 1.32 aborts on a pool of n-grams that its counts do not fit."""
    node = helper.make_node(
        "TfIdfVectorizer", ["x"], ["y"], mode="TF", min_gram_length=2, max_gram_length=2,
        max_skip_count=5, ngram_counts=[0, 4], ngram_indexes=[1, 2, 3, 4, 5, 6],
        pool_int64s=[2, 3, 5, 4, 5, 6, 7, 8, 6, 7],
    )  # fmt: skip
    values = [
        helper.make_tensor_value_info(name, dtype, [size])
        for name, dtype, size in (("x", TensorProto.INT32, 12), ("y", TensorProto.FLOAT, 7))
    ]
    tensor = helper.make_tensor("x", TensorProto.INT32, [12], [1, 1, 3, 3, 3, 7, 8, 6, 7, 5, 6, 8])
    graph = helper.make_graph([node], "g", [], values[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4)
    with pytest.raises(mi.InvalidInput, match="crashes on the model"):
        client.deploy("crashing", model, timeout_s=60)
    client.deploy("after", cnn())
    x = {"image": np.zeros((1, 3, 12, 12), np.float32)}
    assert_exact(cnn(), x, client.infer("after", x).outputs)


def huge(folder: Path, width: int, layers: int) -> Path:
    """A chain of MatMuls whose weights are a file with holes: of no size on the disk."""
    folder.mkdir()
    nodes, tensors = [], []
    nbytes = width * width * 4
    with (folder / "weights").open("wb") as file:
        for i in range(layers):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "weights", "offset": i * nbytes, "length": nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            rows = np.random.default_rng(i).standard_normal((4, width), np.float32) / 8
            for row, values in zip(range(0, width, width // 4), rows, strict=True):
                file.seek(i * nbytes + row * width * 4)
                file.write(values.tobytes())
        file.truncate(layers * nbytes)
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width])
        for name in ("v0", f"v{layers}")
    ]
    graph = helper.make_graph(nodes, "huge", ends[:1], ends[1:], tensors)
    opset = [helper.make_opsetid("", 17)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("width", "layers"),
    [(512, 3), pytest.param(8192, 9, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
    ids=["3 MB", "2.4 GB"],
)
def test_a_model_of_any_size_is_deployed_by_its_path(
    client: mi.Client, tmp_path: Path, width: int, layers: int
) -> None:
    path = huge(tmp_path / "huge", width, layers)
    client._offers = Folder(tmp_path / "client")
    client.deploy("huge", path, timeout_s=1100)
    x = {"v0": np.random.default_rng(0).standard_normal((1, width), np.float32)}
    assert_exact(path, x, client.infer("huge", x, deadline_s=300).outputs)


# -- what the coordinator fetches is bounded, and kept for as long as it is needed -----------------


def deploy_message(nbytes: int, weights: int) -> m.Deploy:
    blobs = tuple(m.Blob(digest=f"{i:064x}", nbytes=nbytes) for i in range(weights))
    return m.Deploy(call="c", name="n", digest="f" * 64, nbytes=nbytes, weights=blobs)


def test_weights_count_among_the_bytes_of_a_model() -> None:
    share = limits.MODEL_BYTES // 4
    assert refuse_deploy(Catalogue(), deploy_message(share, 3)) is None
    failure = refuse_deploy(Catalogue(), deploy_message(share, 4))
    assert failure is not None and failure.error == "InvalidInput"


def test_what_all_models_on_their_way_may_have_is_bounded() -> None:
    catalogue, whole = Catalogue(), deploy_message(limits.MODEL_BYTES // 4, 3)
    for _ in range(limits.DEPLOYING_BYTES // limits.MODEL_BYTES):
        assert refuse_deploy(catalogue, whole) is None
        catalogue.open(whole, "client", 0.0)
    failure = refuse_deploy(catalogue, whole)
    assert failure is not None and failure.error == "QueueFull"


def test_a_blob_of_another_size_than_announced_is_dropped() -> None:
    puller, digest = Puller(), "a" * 64
    puller.want(digest, "client", 0.0, 8)
    data = memoryview(b"12345678")
    assert (
        puller.arrived("client", m.Chunk(digest=digest, offset=0, total=1 << 40), data, 0.0) == []
    )
    written = puller.arrived("client", m.Chunk(digest=digest, offset=0, total=8), data, 0.0)
    assert written == [WriteBlob(digest, 0, 8, data)]


def test_trimming_spares_the_weights_of_deployed_models(tmp_path: Path) -> None:
    path = offered(tmp_path, dense(1), 1024)
    store = BlobStore(path.parent, max_bytes=0)
    other = hashlib.sha256(b"other").hexdigest()
    store.put(other, b"other")
    posted: queue.SimpleQueue[object] = queue.SimpleQueue()
    thread = PlanningThread(store, posted.put)
    try:
        thread.put(OpenModel(1, path.name, None))
        opened = posted.get(timeout=60)
        assert isinstance(opened, ModelOpened) and opened.failure is None
        files = set(path.parent.iterdir()) - {store.path(other)}
        for file in (*files, store.path(other)):
            os.utime(file, (1, 1))  # long ago
        signature = Signature(False, (("x", (1, 160)),))
        candidates = (Candidate("worker", Facts(flops_per_s=1e9, memory_bytes=1 << 30)),)
        making = MakePlan(
            deployment=1, digest=path.name, image=None, signature=signature,
            candidates=candidates, head="head", plan=None, objective="latency", spread=False,
            strict=False,
        )  # fmt: skip
        thread.put(making)
        planned = posted.get(timeout=60)
        assert isinstance(planned, PlanReady) and planned.failure is None
    finally:
        thread.close()
    assert files <= set(path.parent.iterdir())
    assert not store.path(other).exists()


def test_weights_standardised_by_the_older_exporter_are_barriers_that_say_so() -> None:
    """BiT and NFNet: a batch normalisation of weights, in training form, before a convolution."""
    b = Builder(0)
    b.opset = 13
    x = b.input("x", [1, 3, 12, 10])
    weights = b.const(np.random.default_rng(0).standard_normal((1, 8, 27), np.float32))
    ones, zeros = b.const(np.ones(8, np.float32)), b.const(np.zeros(8, np.float32))
    named = ["normed", "m", "v", "sm", "sv"]
    b.nodes.append(
        onnx.helper.make_node("BatchNormalization", [weights, ones, zeros, zeros, ones], named)
    )
    kernel = b.op("Reshape", ["normed", b.const(np.array([8, 3, 3, 3]))])
    y = b.op("Conv", [x, kernel], pads=[1] * 4)
    model = b.model([b.rename(b.relu(y), "y")])
    graph = mi.load(model)
    reasons = {why_barrier(op) for op in graph.ops if op.type == "BatchNormalization"}
    assert reasons and all("training form" in why for why in reasons)
