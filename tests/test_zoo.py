"""Real architectures deploy on uneven clusters and are exact; refilled fixtures are sane.

Fifteen of torchvision's here, one of each kind, every other one on six devices and the rest on
three; all of them on both with --full, the largest last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import oracle
import pytest
import zoo
from uneven import SPEEDS, Clusters

import meshinfer as mi

ARCHIVE_BYTES = 15_000_000
REST = sorted(set(zoo.names()) - set(zoo.SAMPLE), key=lambda n: (zoo.weight_bytes(n), n))


@pytest.fixture(scope="module")
def clusters() -> Iterator[Clusters]:
    with Clusters() as made:
        yield made


@pytest.fixture
def folder() -> Iterator[Path]:
    """Gone after the test: pytest would keep gigabytes of weights."""
    with tempfile.TemporaryDirectory(prefix="meshinfer-zoo-") as made:
        yield Path(made)


def check(clusters: Clusters, name: str, folder: Path, sizes: Iterable[int]) -> None:
    """The refilled model deploys over all devices of each cluster, and its answer is exact."""
    path = zoo.fill_file(name, folder)
    inputs = zoo.inputs(name)
    truth = oracle.reference(path, inputs)
    for devices in sizes:
        client = clusters.client(devices, zoo.weight_bytes(name))
        try:
            deployment = client.deploy("zoo", path, spread=True)
            used = mi.Plan.parse(deployment.plan or "").devices()
            assert len(used) == devices, f"{len(used)} of {devices} devices take part: {used}"
            result = client.infer("zoo", inputs)
            oracle.assert_exact(path, inputs, result.outputs, truth=truth)
        except BaseException:
            clusters.stop(devices)  # the next model gets a fresh one
            raise


@pytest.mark.parametrize(
    ("name", "devices"), [(name, 3 if i % 2 else 6) for i, name in enumerate(zoo.SAMPLE)]
)
def test_a_model_of_each_kind_is_exact_on_three_or_on_six_uneven_devices(
    clusters: Clusters, name: str, devices: int, folder: Path
) -> None:
    check(clusters, name, folder, [devices])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [(name, [6 if i % 2 else 3]) for i, name in enumerate(zoo.SAMPLE)]
    + [(name, [*SPEEDS]) for name in REST],
)
def test_every_model_is_exact_on_three_and_on_six_uneven_devices(
    clusters: Clusters, name: str, sizes: list[int], folder: Path
) -> None:
    """What the quick test above has left out."""
    check(clusters, name, folder, sizes)


def test_the_zoo_has_every_architecture_and_is_small() -> None:
    assert len(zoo.names()) == 121
    assert sum(zoo.path_of(name).stat().st_size for name in zoo.names()) < ARCHIVE_BYTES


def test_the_sample_has_every_kind() -> None:
    kinds = {zoo.info(name).kind for name in zoo.names()}
    assert {zoo.info(name).kind for name in zoo.SAMPLE} == kinds
    assert len(zoo.SAMPLE) == 15


@pytest.mark.parametrize("name", ["squeezenet1_1", "raft_small"])
def test_refilling_twice_gives_the_same_bytes(name: str, folder: Path) -> None:
    first, second = (zoo.fill_file(name, folder / part) for part in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    weights = f"{name}.onnx.data"
    assert (folder / "a" / weights).read_bytes() == (folder / "b" / weights).read_bytes()
    assert zoo.fill(name) == zoo.fill(name)


def test_quantising_twice_gives_the_same_model() -> None:
    first, second = (zoo.fill("quantized_shufflenet_v2_x0_5") for _ in range(2))
    assert first == second
    kinds = {node.op_type for node in first.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} < kinds
    assert any(t.data_type == onnx.TensorProto.INT8 for t in first.graph.initializer)


def test_a_file_holds_the_same_model_as_the_one_in_memory(folder: Path) -> None:
    path = zoo.fill_file("resnet18", folder)
    inputs = zoo.inputs("resnet18")
    whole = oracle.reference(zoo.fill("resnet18"), inputs)
    assert oracle.reference(path, inputs)["scores"].tobytes() == whole["scores"].tobytes()


def test_refilled_tensors_have_the_statistics_of_their_source() -> None:
    kept = {t.name: t for t in zoo.fixture("resnet18").graph.initializer if zoo.is_stripped(t)}
    filled = {t.name: t for t in zoo.fill("resnet18").graph.initializer}
    assert len(kept) > 30
    for name, tensor in kept.items():
        said = {e.key: e.value for e in tensor.external_data}
        values = np.frombuffer(filled[name].raw_data, np.float32)
        assert values.size == np.prod(tensor.dims)
        std, within = float(said["std"]), 6 / np.sqrt(values.size)
        assert abs(values.std() - std) < within * std
        if "floor" not in said:
            assert abs(values.mean() - float(said["mean"])) < within * std


@pytest.mark.parametrize("name", zoo.SAMPLE)
def test_a_refilled_model_neither_explodes_nor_saturates_nor_ignores_its_input(
    name: str, folder: Path
) -> None:
    path = zoo.fill_file(name, folder)
    first, second = (oracle.reference(path, zoo.inputs(name, seed)) for seed in (0, 9))
    for output, array in first.items():
        assert np.isfinite(array).all()
        scale = float(np.abs(array).max())
        assert 1e-2 < scale < 1e3
        assert array.std() > 1e-3 * scale
        assert np.abs(array - second[output]).max() > 1e-3 * scale
        ends = np.isin(array, [array.min(), array.max()])
        assert array.size < 8 or ends.mean() < 0.5
