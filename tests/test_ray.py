"""The client over a Ray cluster of three nodes on this machine, held against plain onnxruntime.

One cluster for the file, on loopback, with a token. Whoever kills a node comes last.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from architectures import Builder
from onnx import ModelProto
from oracle import assert_exact, reference
from processes import eventually, growing, image, pixels, small_model

import meshinfer as mi
from cluster.ray_backend.batch import WholeActor
from cluster.ray_backend.client import RayClient
from cluster.ray_backend.probe import probe
from meshinfer.errors import BY_NAME
from meshinfer.geometry import split_even
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.transfers import derive

ROOT = Path(__file__).resolve().parent.parent
TOKEN = secrets.token_hex(16)
STORE_BYTES = 80_000_000
CAMERA: dict[str, Any] = {"cpus": 0.1, "resources": {"camera": 0.1}}
"""What only one node has: a client beside the one that most tests share."""
SPEC = mi.ImageSpec(input="image", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # everything on loopback
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
os.environ.update(SETTINGS)  # Ray reads them when it is imported, in this process and its own

pytestmark = [
    # Ray's own: files and sockets that it leaves to the collector, and what it says of releases.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
    pytest.mark.filterwarnings(r"ignore::FutureWarning:ray\..*"),
]


class Shelf:
    """Three Ray nodes: the head, on which this process is, and two more, one with a camera and what
    it says is a GPU."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from ray.cluster_utils import Cluster

        usual = {
            "num_cpus": 1,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "node_ip_address": "127.0.0.1",
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=usual)
        self.others = [
            self.cluster.add_node(wait=False, **usual),
            self.cluster.add_node(wait=False, resources={"camera": 1.0}, num_gpus=1, **usual),
        ]
        self.cluster.wait_for_nodes()
        self.address = f"ray://{self.cluster.address}"


@pytest.fixture(scope="module")
def shelf() -> Iterator[Shelf]:
    with tempfile.TemporaryDirectory(prefix="mi-ray-", ignore_cleanup_errors=True) as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", folder)
            made = Shelf()
            try:
                yield made
            finally:
                import ray

                ray.shutdown()
                made.cluster.shutdown()


@pytest.fixture(scope="module")
def client(shelf: Shelf) -> Iterator[RayClient]:
    made: Any = mi.Client(shelf.address, cpus=0.5)
    with made:
        yield made


def tried(address: str, **environment: str) -> str:
    """The name of the error that a process of its own gets, or that it has a client."""
    program = (
        "import sys, meshinfer as mi\n"
        "try:\n    mi.Client(sys.argv[1], timeout_s=5).close()\n    print('a client')\n"
        "except mi.MeshInferError as error:\n    print(type(error).__name__, error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, address],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ready(client: RayClient) -> list[str]:
    return [d.device for d in client.devices() if d.state == "ready" and d.facts.computes]


def bands(model: ModelProto, devices: list[str]) -> Plan:
    """A stage an op, each in bands of rows on all devices: halos from node to node."""
    graph, head, stages = mi.load(model), DeviceId("head"), []
    for op in graph.ops:
        whole = graph.whole(op.outputs[0])
        rows = split_even(whole[2].stop, len(devices))
        tasks = tuple(
            Task((DeviceId(name),), (Shard(op.outputs[0], whole.replace(2, band)),))
            for name, band in zip(devices, rows, strict=True)
        )
        stages.append(Stage(op.index, op.index + 1, tasks))
    return Plan(graph.digest, head, head, tuple(stages))


def long_model(size: int = 96, convolutions: int = 12) -> ModelProto:
    """Long enough to kill something in the middle of it."""
    b = Builder(3)
    x = b.conv(b.input("image", [1, 3, size, size]), 3, 32, 3)
    for _ in range(convolutions):
        x = b.relu(b.conv(x, 32, 32, 3))
    return b.model([b.rename(b.conv(x, 32, 3, 3), "y")])


# --- who cannot have a client


def test_without_ray_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(mi.ConfigurationError, match="not installed") as caught:
        mi.Client("ray://auto")
    assert "pip install 'meshinfer[ray]'" in caught.value.hint
    with pytest.raises(mi.ConfigurationError, match="not installed"):
        mi.batch(small_model(), None)


def test_an_old_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "__version__", "2.9.3")
    with pytest.raises(mi.ConfigurationError, match=r"2\.9\.3 is not supported"):
        mi.Client("ray://auto")


@pytest.mark.parametrize("address", ["ray://", "ray://host", "ray://:1", "ray://h:0", "ray://h:x"])
def test_a_wrong_address_is_told(address: str) -> None:
    with pytest.raises(mi.InvalidInput, match="no address of a Ray cluster"):
        mi.Client(address)


@pytest.mark.parametrize("options", [{"keyring": "k"}, {"cpus": 0.0}, {"gpus": -1.0}])
def test_options_that_are_not_for_ray_are_refused(options: Mapping[str, Any]) -> None:
    with pytest.raises(mi.InvalidInput):
        mi.Client("ray://auto", **options)


def test_nobody_at_the_address_is_soon_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(mi.ClusterUnavailable, match="no Ray cluster is at"):
        mi.Client(f"ray://127.0.0.1:{port}")


def test_who_listens_and_is_no_ray_is_told_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(mi.ClusterUnavailable, match="within 2 s"):
            probe(address, 2.0)


def test_a_client_with_another_token_is_refused(shelf: Shelf) -> None:
    assert tried(shelf.address, RAY_AUTH_TOKEN="b" * 32).startswith("AuthError set RAY_AUTH_MODE")


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_process_without_a_token_is_refused(
    shelf: Shelf, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(mi.AuthError) as caught:
        probe(shelf.cluster.address, 10.0)
    assert "RAY_AUTH_TOKEN" in caught.value.hint


# --- who computes


def test_each_node_is_a_device_that_was_measured(client: RayClient) -> None:
    head, *nodes = client.devices()
    assert head.device == "head" and not head.facts.computes
    assert len(nodes) == len(ready(client)) == 3
    for node in nodes:
        assert node.facts.flops_per_s > 1e8 and node.facts.engine.startswith("onnxruntime")
        assert node.facts.memory_bytes > 1e8 and node.facts.overhead_s > 0
    assert sum(node.link is None for node in nodes) == 1, "the node on which we are has no link"


def test_a_node_without_what_is_asked_for_is_left_out_and_a_client_can_be_awaited(
    client: RayClient, shelf: Shelf
) -> None:
    async def main() -> None:
        async with mi.AsyncClient(shelf.address, **CAMERA) as made:
            (device,) = [d.device for d in await made.devices() if d.state == "ready"][1:]
            others = [d for d in await made.devices() if d.state == "excluded"]
            assert [d.cause for d in others] == ["it has 0 camera, 0.1 asked for"] * 2
            deployed = await made.deploy("m", small_model(), spread=True)
            assert Plan.parse(deployed.plan or "").devices() == (device,)
            assert deployed.report is not None
            assert any("0 camera" in note for note in deployed.report.notes)
            result = await made.infer("m", image())
            assert_exact(small_model(), image(), result.outputs)

    asyncio.run(main())
    assert len(ready(client)) == 3, "another client's end is none of ours"


def test_who_asks_for_a_gpu_gets_the_nodes_that_have_one(shelf: Shelf) -> None:
    made: Any = mi.Client(shelf.address, cpus=0.1, gpus=1.0)
    with made:
        assert len(ready(made)) == 1
        others = [d for d in made.devices() if d.state == "excluded"]
        assert [d.cause for d in others] == ["it has 0 GPU, 1 asked for"] * 2
    with pytest.raises(mi.ClusterUnavailable, match="it has 1 GPU, 2 asked for"):
        mi.Client(shelf.address, cpus=0.1, gpus=2.0)


AUTO = """
import sys, numpy as np, meshinfer as mi
with mi.Client("ray://auto", cpus=0.1, resources={"camera": 0.1}) as client:
    client.deploy("m", open(sys.argv[1], "rb").read())
    result = client.infer("m", np.load(sys.argv[2], allow_pickle=False))
    (output,) = result.outputs.values()
    np.save(sys.argv[3], output)
"""


def test_auto_is_the_cluster_that_this_machine_is_in(shelf: Shelf, tmp_path: Path) -> None:
    """As a program on a node has it: Ray knows, or RAY_ADDRESS says it."""
    model, data = small_model(), image()
    files = [tmp_path / name for name in ("m.onnx", "in.npy", "out.npy")]
    files[0].write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    (array,) = data.values()
    np.save(files[1], array)
    done = subprocess.run(
        [sys.executable, "-c", AUTO, *map(str, files)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": shelf.cluster.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert_exact(model, data, {"y": np.load(files[2])})


def test_where_no_node_has_room_it_is_said_what_they_lack(client: RayClient, shelf: Shelf) -> None:
    with pytest.raises(mi.ClusterUnavailable, match="it has 1 CPU, 8 asked for"):
        mi.Client(shelf.address, cpus=8)
    with pytest.raises(mi.ClusterUnavailable, match="has not started 1 CPU"):
        mi.Client(shelf.address, cpus=1, timeout_s=3)


# --- answers


def test_the_planners_plan_is_exact_and_spreads(client: RayClient) -> None:
    model = small_model(48, 8)
    deployed = client.deploy("spread", model, spread=True)
    assert deployed.version == 1 and deployed.report is not None
    result = client.infer("spread", image(48))
    assert_exact(model, image(48), result.outputs)
    assert set(Plan.parse(result.plan).devices()) == set(ready(client))
    assert (result.attempts, result.degraded, result.model_version) == (1, False, 1)
    assert set(result.timing.compute_s) == set(ready(client))


def test_pieces_go_from_node_to_node_with_the_bits_of_a_local_cluster(client: RayClient) -> None:
    model = small_model(48, 8)
    plan = bands(model, ready(client))
    client.deploy("bands", model, plan=plan)
    result = client.infer("bands", image(48))
    graph = mi.load(model)
    head = DeviceId("head")
    wanted: dict[str, int] = {}
    for (sender, _), nbytes in derive(graph, plan).bytes_between(graph).items():
        if sender != head:
            wanted[sender] = wanted.get(sender, 0) + nbytes
    assert result.timing.sent_bytes == wanted
    with mi.LocalCluster(3) as cluster, cluster.client() as ours:
        ours.deploy("bands", model, plan=bands(model, cluster.names()))
        other = ours.infer("bands", image(48))
    np.testing.assert_array_equal(result.outputs["y"], other.outputs["y"])
    assert_exact(model, image(48), result.outputs)


def test_halves_travel_as_halves(client: RayClient) -> None:
    model = small_model(48, 8)
    plan = bands(model, ready(client))
    client.deploy("halves", model, plan=plan, half_transfers=True)
    half, whole = client.infer("halves", image(48)), client.infer("bands", image(48))
    assert half.rounded and not whole.rounded
    sent, full = half.timing.sent_bytes, whole.timing.sent_bytes
    assert sum(sent.values()) < sum(full.values())
    assert_exact(model, image(48), whole.outputs)
    np.testing.assert_allclose(half.outputs["y"], whole.outputs["y"], atol=1e-2)


def test_a_picture_goes_as_pixels(client: RayClient) -> None:
    client.deploy("picture", small_model(), image=SPEC)
    result = client.infer("picture", pixels())
    assert_exact(small_model(), {"image": tensor(pixels())}, result.outputs)


def tensor(picture: np.ndarray) -> np.ndarray:
    """By the image spec, in numpy."""
    scaled = picture.astype(np.float32) * np.float32(SPEC.scale)
    normal = (scaled - np.float32(SPEC.mean)) / np.float32(SPEC.std)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None], np.float32)


def test_any_shape_of_a_dynamic_model_and_versions(client: RayClient) -> None:
    first, second = growing(0), growing(1)
    assert client.deploy("growing", first).plan is None
    assert client.deploy("growing", second).version == 2
    for size, version, model in ((16, None, second), (24, 1, first), (16, 2, second)):
        result = client.infer("growing", image(size), version=version)
        assert_exact(model, image(size), result.outputs)
    infos = [i for i in client.models() if i.name == "growing"]
    assert [(i.version, i.current) for i in infos] == [(1, False), (2, True)]


def test_only_the_outputs_that_are_asked_for(client: RayClient) -> None:
    b = Builder(0)
    x = b.rename(b.conv(b.input("image", [1, 3, 16, 16]), 3, 4, 3), "early")
    model = b.model([x, b.rename(b.gap(b.conv(x, 4, 4, 3)), "late")])
    client.deploy("exits", model, strict=True)
    assert set(client.infer("exits", image(16)).outputs) == {"early", "late"}
    result = client.infer("exits", image(16), outputs=["early"])
    assert set(result.outputs) == {"early"}
    assert_exact(model, image(16), result.outputs, ["early"])


def test_many_at_once_come_in_order(client: RayClient) -> None:
    client.deploy("many", small_model(), objective="throughput")
    inputs = [image(seed=i) for i in range(12)]
    for given, result in zip(inputs, client.map("many", inputs, max_in_flight=6), strict=True):
        assert_exact(small_model(), given, result.outputs)
    given = image()
    future = client.submit("many", given)
    given["image"][:] = 0  # it was copied
    assert_exact(small_model(), image(), future.result(timeout=30).outputs)


@pytest.mark.parametrize(
    ("error", "name", "data", "options"),
    [
        ("ModelNotFound", "nothing", image(), {}),
        ("ModelNotFound", "nothing", pixels(), {}),
        ("ModelNotFound", "spread", image(48), {"version": 9}),
        ("InvalidInput", "spread", image(24), {}),
        ("InvalidInput", "spread", {"other": image(48)["image"]}, {}),
        ("InvalidInput", "spread", pixels(), {}),
        ("InvalidInput", "spread", image(48), {"outputs": ["nothing"]}),
        ("InvalidInput", "spread", image(48), {"deadline_s": -1.0}),
        ("DeadlineExceeded", "spread", image(48), {"deadline_s": 1e-6}),
    ],
)
def test_a_wrong_request_gets_its_typed_error(
    client: RayClient, error: str, name: str, data: Any, options: Mapping[str, Any]
) -> None:
    if not any(info.name == "spread" for info in client.models()):
        client.deploy("spread", small_model(48, 8), spread=True)
    with pytest.raises(BY_NAME[error]) as caught:
        client.infer(name, data, **options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("error", "model", "options"),
    [
        ("InvalidInput", small_model(), {"pin": {"image": ["head"]}}),
        ("InvalidInput", b"no model", {}),
        ("InvalidInput", small_model(), {"objective": "beauty"}),
        ("InvalidInput", small_model(), {"strict": True, "half_transfers": True}),
        ("InvalidInput", small_model(), {"plan": "plan"}),
        ("NotEnoughMemory", small_model(), {"memory": 64}),
    ],
)
def test_a_wrong_deployment_gets_its_typed_error(
    client: RayClient, error: str, model: Any, options: Mapping[str, Any]
) -> None:
    with pytest.raises(BY_NAME[error]) as caught:
        client.deploy("wrong", model, **options)
    assert caught.value.hint
    assert not any(info.name == "wrong" for info in client.models())


def test_who_may_join_is_no_matter_of_ours(client: RayClient) -> None:
    with pytest.raises(mi.InvalidInput, match="admits its own"):
        _ = client.admitting


# --- large sets of images


@pytest.fixture(scope="module")
def data(client: RayClient) -> Any:
    """Ray Data, beside the client on the same nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.data
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray.data


def test_a_dataset_of_pictures_gets_the_outputs_as_columns(data: Any) -> None:
    pictures = np.stack([np.roll(pixels(), i, axis=0) for i in range(10)])
    rows = [{"number": i, "photo": picture} for i, picture in enumerate(pictures)]
    made = mi.batch(
        small_model(), data.from_items(rows), image=SPEC, column="photo", cpus=0.2, batch_size=4
    )
    found = {row["number"]: row for row in made.take_all()}
    assert len(found) == 10
    for i, picture in enumerate(pictures):
        truth = reference(small_model(), {"image": tensor(picture)})["y"]
        np.testing.assert_allclose(found[i]["y"][None], truth, atol=1e-5)
        np.testing.assert_array_equal(found[i]["photo"], picture)


def test_rows_of_arrays_have_the_bits_of_one_device(client: RayClient) -> None:
    import ray

    arrays = np.stack([image(seed=i)["image"][0] for i in range(4)])
    model = small_model().SerializeToString()
    digest = hashlib.sha256(model).hexdigest()
    blobs = {digest: ray.put(np.frombuffer(model, np.uint8))}
    made = WholeActor(digest, blobs, None, ("y",), None, {}, 1)(
        {"image": arrays, "n": np.arange(4)}
    )
    for array, row in zip(arrays, made["y"], strict=True):
        np.testing.assert_array_equal(
            row[None], reference(small_model(), {"image": array[None]})["y"]
        )
    np.testing.assert_array_equal(made["n"], np.arange(4))


def test_what_is_wrong_with_a_batch_is_told_before_it_runs(data: Any) -> None:
    rows = data.from_items([{"image": pixels()}])
    wrong: list[tuple[Any, Any, dict[str, Any]]] = [
        (small_model(), [pixels()], {}),
        (b"no model", rows, {}),
        (small_model(), rows, {"image": mi.ImageSpec(input="other")}),
        (small_model(), rows, {"column": "photo"}),
        (small_model(), rows, {"outputs": ["nothing"]}),
    ]
    for model, dataset, options in wrong:
        with pytest.raises(mi.InvalidInput):
            mi.batch(model, dataset, **options)


# --- who is lost


def actor_processes() -> list[psutil.Process]:
    """Of all clients of this cluster, on all of its nodes: they come from this process's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            own = process.environ().get("RAY_AUTH_TOKEN") == TOKEN
            if own and "NodeActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_process_that_is_killed_in_the_middle_costs_no_answer(client: RayClient) -> None:
    model = long_model()
    client.deploy("long", model, plan=bands(model, ready(client)))
    client.infer("long", image(96))
    wanted = reference(model, image(96))
    futures = [client.submit("long", image(96), deadline_s=60) for _ in range(6)]
    futures[0].result(timeout=60)
    actor_processes()[0].kill()
    for future in futures:
        result = future.result(timeout=60)
        np.testing.assert_allclose(result.outputs["y"], wanted["y"], rtol=1e-3, atol=1e-5)
    assert eventually(lambda: len(ready(client)) == 3, 40), "its node lives, and gets another"


def test_a_process_that_stands_still_is_passed_over(client: RayClient) -> None:
    client.deploy("still", small_model(48, 8), plan=bands(small_model(48, 8), ready(client)))
    assert_exact(small_model(48, 8), image(48), client.infer("still", image(48)).outputs)
    stopped = actor_processes()[0]
    stopped.suspend()
    try:
        result = client.infer("still", image(48), deadline_s=60)
    finally:
        stopped.kill()
    assert_exact(small_model(48, 8), image(48), result.outputs)
    assert result.degraded and result.attempts > 1
    (device,) = result.devices_lost
    assert device not in Plan.parse(result.plan).devices()
    assert eventually(lambda: len(ready(client)) == 3, 40)


def test_a_node_that_is_killed_in_the_middle_costs_no_answer(
    client: RayClient, shelf: Shelf
) -> None:
    model = long_model()
    client.deploy("node", model, spread=True)
    client.infer("node", image(96))
    futures = [client.submit("node", image(96), deadline_s=60) for _ in range(8)]
    futures[0].result(timeout=60)
    shelf.cluster.remove_node(shelf.others.pop(0), allow_graceful=False)
    results = [future.result(timeout=60) for future in futures]
    results += [client.infer("node", image(96), deadline_s=60) for _ in range(3)]
    for result in results:
        assert_exact(model, image(96), result.outputs)
    lost = {name for result in results for name in result.devices_lost}
    assert all(result.degraded for result in results if result.attempts > 1)
    assert eventually(lambda: len(ready(client)) == 2, 40)
    after = client.infer("node", image(96))
    assert not set(Plan.parse(after.plan).devices()) & lost
    assert_exact(model, image(96), after.outputs)


def test_what_is_open_fails_when_the_client_closes_and_actors_end(shelf: Shelf) -> None:
    made: Any = mi.Client(shelf.address, **CAMERA)
    before = len(actor_processes())
    made.deploy("long", long_model())
    future = made.submit("long", image(96))
    made.close()
    made.close()
    error = future.exception(timeout=30)
    assert error is None or isinstance(error, mi.ClusterUnavailable)
    for call in (made.models, lambda: made.infer("long", image(96))):
        with pytest.raises(mi.ClusterUnavailable, match="closed"):
            call()
    assert eventually(lambda: len(actor_processes()) < before, 20)
