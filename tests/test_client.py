"""The public client against real daemons: what it accepts, what it answers and what it refuses."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import Builder
from oracle import assert_exact, reference
from PIL import Image
from processes import growing, image, pixels, small_model

import meshinfer as mi
from meshinfer import limits
from meshinfer.cost import DeviceProfile
from meshinfer.identity import DeviceId
from meshinfer.planner import make_plan
from meshinfer.programs import make_programs
from meshinfer.protocol.messages import DeviceInfo, Failure, Submit

MODEL, IMAGE = small_model(), image()
SPEC = mi.ImageSpec(input="image", output="y", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
WITHIN_S = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(2) as made:
        yield made


@pytest.fixture(scope="module")
def client(cluster: mi.LocalCluster) -> Iterator[mi.Client]:
    with cluster.client() as made:
        made.deploy("small", MODEL)
        made.deploy("photo", small_model(), image=SPEC)
        yield made


def normalised(array: np.ndarray) -> dict[str, np.ndarray]:
    """What SPEC makes of pixels [H, W, 3], written out again."""
    scaled = array.astype(np.float32) * np.float32(1 / 255)
    scaled = (scaled - np.float32(SPEC.mean)) / np.float32(SPEC.std)
    return {"image": np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])}


# --- deploying


def test_a_model_is_deployed_from_a_path_from_bytes_and_as_a_proto(
    client: mi.Client, tmp_path: Path
) -> None:
    path = tmp_path / "small.onnx"
    onnx.save(MODEL, path)
    for model in (path, str(path), path.read_bytes(), MODEL):
        deployed = client.deploy("forms", model)
        assert_exact(MODEL, IMAGE, client.infer("forms", IMAGE).outputs)
    assert deployed.version == 4
    assert deployed.plan is not None and mi.Plan.parse(deployed.plan)


def test_a_model_with_its_weights_in_another_file_is_deployed(
    client: mi.Client, tmp_path: Path
) -> None:
    path = tmp_path / "outside.onnx"
    onnx.save(
        small_model(channels=64), path, save_as_external_data=True, location="weights",
        size_threshold=0,
    )  # fmt: skip
    client.deploy("outside", path)
    assert_exact(path, IMAGE, client.infer("outside", IMAGE).outputs)


@pytest.mark.parametrize(
    "model", [b"", b"no model", MODEL.SerializeToString()[:-200], "/nowhere/model.onnx", 7]
)
def test_what_is_no_model_is_refused(client: mi.Client, model: object) -> None:
    with pytest.raises(mi.InvalidInput) as caught:
        client.deploy("bad", model, timeout_s=WITHIN_S)
    assert caught.value.hint
    with pytest.raises(mi.ModelNotFound):
        client.infer("bad", IMAGE)


def test_an_unknown_operator_is_refused_with_onnxruntimes_words(client: mi.Client) -> None:
    b = Builder(0)
    broken = b.model([b.rename(b.op("Relu", b.input("image", [1, 3, 4, 4])), "y")])
    broken.graph.node[0].op_type = "Rumpelstilzchen"
    with pytest.raises(mi.InvalidInput, match="Rumpelstilzchen"):
        client.deploy("unknown", broken, timeout_s=WITHIN_S)


def test_a_plan_that_fits_no_device_or_no_graph_is_refused(client: mi.Client) -> None:
    plan = client.deploy("planned", MODEL).plan or ""
    assert client.deploy("planned", MODEL, plan=plan).plan == plan
    with pytest.raises(mi.InvalidInput, match="worker-99"):
        client.deploy("planned", MODEL, plan=plan.replace("worker-", "worker-99"))
    with pytest.raises(mi.InvalidInput):
        client.deploy("planned", small_model(seed=5), plan=plan)
    with pytest.raises(mi.InvalidInput):
        client.deploy("planned", MODEL, plan="no plan")


def test_two_versions_are_served_side_by_side(client: mi.Client) -> None:
    models = [small_model(seed=1), small_model(seed=2)]
    assert [client.deploy("both", model).version for model in models] == [1, 2]
    for version, model in ((1, models[0]), (2, models[1]), (None, models[1])):
        result = client.infer("both", IMAGE, version=version)
        assert result.model_version == (version or 2)
        assert_exact(model, IMAGE, result.outputs)
    listed = {(i.name, i.version): i for i in client.models()}
    assert not listed["both", 1].current and listed["both", 2].current
    with pytest.raises(mi.ModelNotFound, match="both v3"):
        client.infer("both", IMAGE, version=3)


def test_the_bytes_of_a_model_are_not_kept_by_the_client(client: mi.Client) -> None:
    client.deploy("kept", MODEL)
    assert list(Path(client._folder.name).iterdir()) == []


# --- requests


def test_a_result_says_how_it_came_about(client: mi.Client) -> None:
    result = client.infer("small", IMAGE)
    assert result.model == "small" and result.model_version == 1
    assert mi.Plan.parse(result.plan)
    assert not result.degraded and result.attempts == 1
    assert result.timing.queue_s + sum(result.timing.compute_s.values()) > 0
    assert result.timing.total_s > 0
    tasks = [t for s in mi.Plan.parse(result.plan).stages for t in s.tasks]
    assert len(result.timing.tasks) == len(tasks)
    assert result.request_id != client.infer("small", IMAGE).request_id


def test_an_answer_may_be_written_to(client: mi.Client) -> None:
    y = client.infer("small", IMAGE).outputs["y"]
    y += 1


def test_the_input_may_be_changed_as_soon_as_submit_returns(client: mi.Client) -> None:
    frame = IMAGE["image"].copy()
    futures = []
    for _ in range(8):
        futures.append(client.submit("small", {"image": frame}))
        frame[:] = np.nan
        frame[:] = IMAGE["image"]
    frame[:] = np.nan
    for future in futures:
        assert_exact(MODEL, IMAGE, future.result(WITHIN_S).outputs)


def test_slices_and_foreign_byte_orders_are_taken(client: mi.Client) -> None:
    wide = np.zeros((1, 3, 24, 48), np.float32)
    wide[..., ::2] = IMAGE["image"]
    for array in (wide[..., ::2], IMAGE["image"].astype(">f4")):
        assert_exact(MODEL, IMAGE, client.infer("small", {"image": array}).outputs)


def test_a_picture_is_taken_as_path_bytes_pil_and_pixels(client: mi.Client, tmp_path: Path) -> None:
    array = pixels()
    picture = Image.fromarray(array)
    path = tmp_path / "photo.png"
    picture.save(path)
    data = io.BytesIO()
    picture.save(data, "PNG")
    truth = reference(small_model(), normalised(array))["y"]
    for given in (path, str(path), data.getvalue(), picture, array):
        result = client.infer("photo", given)
        assert np.abs(result.outputs["y"] - truth).max() <= 1e-5 * np.abs(truth).max()
    saved = tmp_path / "out.png"
    result.picture().save(saved)
    wanted = np.clip(np.rint(truth[0].transpose(1, 2, 0).astype(np.float64) * 255), 0, 255)
    assert np.abs(np.asarray(Image.open(saved)).astype(int) - wanted).max() <= 1


def test_another_clients_redeployment_brings_its_own_image_spec(
    cluster: mi.LocalCluster, client: mi.Client
) -> None:
    with cluster.client() as other:
        client.deploy("spec", small_model(), image=SPEC)
        other.infer("spec", pixels())
        sized = mi.ImageSpec(input="image", size=(24, 24))
        client.deploy("spec", small_model(), image=sized)
        assert other.infer("spec", pixels(40, 50)).image == sized
        assert other.infer("spec", pixels(), version=1).image == SPEC


@pytest.mark.parametrize(
    "data", ["/nowhere/photo.jpg", b"no picture", np.zeros((2, 2), np.float32), 7]
)
def test_what_is_no_picture_is_refused(client: mi.Client, data: object) -> None:
    with pytest.raises(mi.InvalidInput) as caught:
        client.infer("photo", data)
    assert caught.value.hint


def test_one_array_goes_to_a_models_only_input(client: mi.Client) -> None:
    assert_exact(MODEL, IMAGE, client.infer("small", IMAGE["image"]).outputs)
    array = normalised(pixels())["image"]
    assert_exact(MODEL, {"image": array}, client.infer("photo", array).outputs)


def test_the_objective_reaches_the_planner(client: mi.Client) -> None:
    deployed = client.deploy("many", MODEL, objective="throughput")
    assert deployed.plan is not None and mi.Plan.parse(deployed.plan).window > 1
    with pytest.raises(mi.InvalidInput, match="objective 'beauty' is unknown"):
        client.deploy("many", MODEL, objective="beauty")


def test_memory_that_no_plan_fits_is_refused_with_numbers_and_enough_is_kept(
    client: mi.Client,
) -> None:
    for memory in (1000, {device.device: 1000 for device in workers(client)}):
        with pytest.raises(mi.NotEnoughMemory, match=r"would need .* of 1\.0 kB"):
            client.deploy("large", MODEL, memory=memory)
    client.deploy("large", MODEL, memory=1 << 28)
    assert_exact(MODEL, IMAGE, client.infer("large", IMAGE).outputs)
    with pytest.raises(mi.InvalidInput, match="'ghost'"):
        client.deploy("large", MODEL, memory={"ghost": 1 << 28})
    first = workers(client)[0].device
    deployed = client.deploy("large", MODEL, memory={first: 0}, spread=True)
    assert deployed.plan is not None
    assert DeviceId(first) not in mi.Plan.parse(deployed.plan).devices()


def test_a_pinned_input_goes_to_the_pinned_worker_alone(client: mi.Client) -> None:
    one, other = (device.device for device in workers(client))
    for pinned in ([one], [other]):
        deployed = client.deploy("private", MODEL, pin={"image": pinned}, spread=True)
        assert deployed.plan is not None
        stages = mi.Plan.parse(deployed.plan).stages
        assert {d for task in stages[0].tasks for d in task.devices} == set(pinned)
        assert_exact(MODEL, IMAGE, client.infer("private", IMAGE).outputs)
    for pin in ({"image": ["ghost"]}, {"nothing": [one]}):
        with pytest.raises(mi.InvalidInput, match="not"):
            client.deploy("private", MODEL, pin=pin)


def workers(client: mi.Client) -> list[DeviceInfo]:
    return [device for device in client.devices() if device.facts.computes]


def test_a_picture_for_an_unknown_model_or_version_is_not_found(client: mi.Client) -> None:
    for wanted in ({"model": "nope"}, {"model": "photo", "version": 9}):
        with pytest.raises(mi.ModelNotFound, match="deployed"):
            client.infer(data=Image.fromarray(pixels()), **wanted)


def test_a_client_that_gave_arrays_gets_the_picture_as_well(
    cluster: mi.LocalCluster, client: mi.Client
) -> None:
    with cluster.client() as other:
        picture = other.infer("photo", normalised(pixels())).picture()
    assert picture.pixels.shape == client.infer("photo", pixels()).picture().pixels.shape


def test_the_report_of_a_deployment_tells_barriers_share_and_weights(client: mi.Client) -> None:
    report = str(client.deploy("told", MODEL, spread=True).report)
    assert "barriers, which run whole on one device: none" in report
    assert "100.0% of the FLOPs are in stages that several devices share" in report
    assert "worker-0 holds" in report and "worker-1 holds" in report


def test_what_is_too_large_to_travel_is_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = mi.load(MODEL)
    head = DeviceId("head")
    plan = make_plan(graph, [DeviceProfile(DeviceId("pi"), 1e9)], head, head).plan
    assert make_programs(graph, plan).by_device
    monkeypatch.setattr("meshinfer.limits.MESSAGE_BYTES", graph.nbytes(graph.outputs[0]) - 1)
    with pytest.raises(mi.InvalidInput, match="cannot travel"):
        make_programs(graph, plan)


def test_a_picture_needs_an_image_spec(client: mi.Client) -> None:
    with pytest.raises(mi.InvalidInput, match="image spec"):
        client.infer("small", Image.fromarray(pixels()))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"image": np.zeros((1, 3, 5, 24), np.float32)}, ["1, 3, 5, 24", "1, 3, 24, 24"]),
        ({"image": np.zeros((3, 24, 24), np.float32)}, ["3, 24, 24", "1, 3, 24, 24"]),
        ({"image": np.zeros((1, 3, 24, 24), np.float64)}, ["f8", "f4"]),
        ({"picture": IMAGE["image"]}, ["picture", "image"]),
        ({}, ["image"]),
        ({"image": IMAGE["image"], "more": IMAGE["image"]}, ["more", "image"]),
        ({"image": "text"}, ["travel"]),
    ],
)
def test_an_array_that_does_not_fit_is_refused_and_both_sides_are_named(
    client: mi.Client, data: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(mi.InvalidInput) as caught:
        client.infer("small", data)
    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.hint


def test_an_unknown_model_is_not_found(client: mi.Client) -> None:
    with pytest.raises(mi.ModelNotFound, match="'nosuch'") as caught:
        client.infer("nosuch", IMAGE)
    assert "small" in caught.value.hint


def test_only_the_named_outputs_are_returned_and_an_unknown_one_is_refused(
    client: mi.Client,
) -> None:
    b = Builder(0)
    x = b.input("image", [1, 3, 24, 24])
    two = b.model([b.rename(b.relu(x), "positive"), b.rename(b.op("Neg", x), "negative")])
    client.deploy("two", two)
    assert set(client.infer("two", IMAGE).outputs) == {"positive", "negative"}
    assert list(client.infer("two", IMAGE, outputs=["negative"]).outputs) == ["negative"]
    with pytest.raises(mi.InvalidInput, match="'third'"):
        client.infer("two", IMAGE, outputs=["third"])
    with pytest.raises(mi.InvalidInput, match=r"outputs=\[\]"):
        client.infer("two", IMAGE, outputs=[])


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_deadline_that_makes_no_sense_is_refused(client: mi.Client, seconds: float) -> None:
    with pytest.raises(mi.InvalidInput, match="deadline_s"):
        client.submit("small", IMAGE, deadline_s=seconds)


def test_a_deadline_that_is_too_short_is_reported_in_time(client: mi.Client) -> None:
    started = time.monotonic()
    with pytest.raises(mi.DeadlineExceeded) as caught:
        client.infer("small", IMAGE, deadline_s=1e-4)
    assert time.monotonic() - started < 4.0
    assert caught.value.hint


def test_shapes_are_planned_at_their_first_use_and_more_than_eight_are_served(
    client: mi.Client,
) -> None:
    model = growing()
    assert client.deploy("growing", model).plan is None
    for size in [*range(8, 19), 8]:
        x = {"image": image(size)["image"][..., : size - 1]}
        assert_exact(model, x, client.infer("growing", x, deadline_s=WITHIN_S).outputs)
    (info,) = (i for i in client.models() if i.name == "growing")
    assert len(info.plans) <= 8
    fixed = client.deploy("growing", model, shapes={"image": [1, 3, 9, 9]})
    assert fixed.plan is not None


def test_map_keeps_the_order_and_a_bounded_number_open(client: mi.Client) -> None:
    model = growing(3)
    client.deploy("ordered", model)
    given: list[int] = []

    def inputs() -> Iterator[dict[str, np.ndarray]]:
        for seed in range(20):
            given.append(seed)
            yield image(12, seed)

    for done, result in enumerate(client.map("ordered", inputs(), max_in_flight=3)):
        assert len(given) <= done + 3 * limits.MAP_AHEAD + 1
        assert_exact(model, image(12, done), result.outputs)
    assert len(given) == 20


def test_big_tensors_go_in_and_out_over_several_frames(client: mi.Client) -> None:
    b = Builder(0)
    x = b.input("image", [1, 3, 1024, 1024])  # 12 MiB in, 12 MiB out
    big = b.model([b.rename(b.avgpool(x, 3, 1, pads=1), "y")])
    client.deploy("big", big, spread=True)
    array = np.random.default_rng(0).standard_normal((1, 3, 1024, 1024)).astype(np.float32)
    assert_exact(big, {"image": array}, client.infer("big", {"image": array}).outputs)


def test_what_can_never_travel_is_refused_at_once(
    client: mi.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TENSOR_BYTES", 1000)
    with pytest.raises(mi.InvalidInput, match="6912 bytes"):
        client.submit("small", IMAGE)


def test_while_the_cluster_is_full_inputs_are_not_even_read(cluster: mi.LocalCluster) -> None:
    class Large:
        nbytes = 1 << 30

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise AssertionError("its inputs were read")

    with cluster.client() as client:
        told = Failure(error="QueueFull", message="256 are open", retry_after_s=WITHIN_S)
        header = Submit("id", "small", None, (), False, 1.0)
        client._core.full.told(header, told, time.monotonic())
        future = client.submit("small", {"image": Large()})
        with pytest.raises(mi.QueueFull) as refused:
            future.result(WITHIN_S)
        assert refused.value.retry_after_s is not None
        assert 0.0 < refused.value.retry_after_s <= WITHIN_S


def test_two_clients_at_once_get_their_own_answers(
    cluster: mi.LocalCluster, client: mi.Client
) -> None:
    wrong: list[BaseException] = []

    def use(seed: int) -> None:
        try:
            with cluster.client() as mine:
                for result in mine.map("small", [image(seed=seed)] * 15, max_in_flight=4):
                    assert_exact(MODEL, image(seed=seed), result.outputs)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong


def test_a_cancelled_request_is_over_and_the_next_one_is_served(client: mi.Client) -> None:
    futures = [client.submit("small", IMAGE) for _ in range(12)]
    cancelled = [future for future in futures[4:] if future.cancel()]
    for future in futures:
        if future in cancelled:
            with pytest.raises(CancelledError):
                future.result(WITHIN_S)
        else:
            assert_exact(MODEL, IMAGE, future.result(WITHIN_S).outputs)
    assert cancelled, "none of eight could be cancelled"
    assert_exact(MODEL, IMAGE, client.infer("small", IMAGE).outputs)


def test_the_async_client_awaits_the_same(cluster: mi.LocalCluster, client: mi.Client) -> None:
    async def use() -> None:
        async with mi.AsyncClient(cluster.address, keyring=cluster.keyring) as mine:
            deployed = await mine.deploy("awaited", MODEL)
            results = await asyncio.gather(*(mine.infer("awaited", IMAGE) for _ in range(6)))
            for result in results:
                assert_exact(MODEL, IMAGE, result.outputs)
                assert result.model_version == deployed.version
            assert {"head", "worker-0"} <= {d.device for d in await mine.devices()}
            assert "awaited" in {i.name for i in await mine.models()}
            with pytest.raises(mi.ModelNotFound):
                await mine.infer("nosuch", IMAGE)
            token = await mine.admitting.token("client", ttl_s=60.0, reusable=True)
            assert (token.role, token.cluster) == ("client", cluster.cluster)
            listed = await mine.admitting.listed()
            assert {"head", "worker-0"} <= {key.name for key in listed.members}
            for refused in (mine.admitting.approve("zzzz"), mine.admitting.revoke("nobody")):
                with pytest.raises(mi.InvalidInput, match="nobody's id"):
                    await refused
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(mine.infer("awaited", IMAGE), 1e-5)
        with pytest.raises(mi.ClusterUnavailable):
            await mine.infer("awaited", IMAGE)
        with pytest.raises(mi.ClusterUnavailable):
            await mine.admitting.listed()

    asyncio.run(asyncio.wait_for(use(), 60))
