"""float32 that travels as float16: what is rounded and what is not, the loss, the bytes, the same
answer whoever takes a task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from architectures import Builder, mobilenet_v2, resnet50, squeezenet1_1, unet, vgg16, yolov2
from cores import Cluster, banded, conv_net, image, kind
from onnx import ModelProto
from oracle import assert_exact, error, reference
from shared import bands, graph
from test_covering import lose
from typer.testing import CliRunner

import meshinfer as mi
from cluster import loss
from cluster.cli import app
from meshinfer import limits
from meshinfer.cost import DeviceProfile, PairLink, timeline
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.halves import LARGEST, narrowed, rounded, widened
from meshinfer.identity import DeviceId
from meshinfer.legality import as_asked
from meshinfer.plan import Plan
from meshinfer.planner import Block, axes_of, build, make_plan
from meshinfer.programs import make_programs
from meshinfer.protocol import messages as m
from meshinfer.protocol.report import Rounding
from meshinfer.report import report_of
from meshinfer.transfers import derive

HEAD = DeviceId("head")
FOUR = ("pi-0", "pi-1", "pi-2", "pi-3")
NETWORKS = (vgg16, resnet50, mobilenet_v2, yolov2, unet, squeezenet1_1)


def noise(g: Graph, seed: int = 1) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {n: draw.standard_normal(g.shape(n)).astype(g.numpy_dtype(n)) for n in g.inputs}


@cache
def planned(make: Callable[[], ModelProto]) -> tuple[ModelProto, Graph, Plan]:
    """A network, its graph with half transfers, and a plan in several stages on four devices."""
    model = make()
    half = mi.load(model).with_half_transfers()
    return model, half, make_plan(half, profiles(), HEAD, HEAD, spread=True).plan


def profiles(mbit: float = 100.0) -> list[DeviceProfile]:
    return [DeviceProfile(DeviceId(n), 2e10, bandwidth_bytes_per_s=mbit * 125e3) for n in FOUR]


def worst(found: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> float:
    return max(error(found[name], b) for name, b in truth.items())


def same_bits(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


# --- one piece ------------------------------------------------------------------------------------


def test_a_piece_is_rounded_to_nearest_and_what_is_too_small_becomes_zero() -> None:
    x = np.array([1.0, 1.0 + 2**-12, 1 / 3, -LARGEST, 5.9e-8, 2e-8, 0.0], np.float32)
    half = narrowed(x)
    assert half.dtype == np.float16 and half.nbytes * 2 == x.nbytes
    expected = [1.0, 1.0, np.float16(1 / 3), -LARGEST, 2.0**-24, 0.0, 0.0]
    assert widened(half).dtype == np.float32 and widened(half).tolist() == expected


@pytest.mark.parametrize("value", [65505.0, -7e4, 3e38, np.inf, -np.inf, np.nan])
def test_a_piece_beyond_the_range_travels_as_it_is(value: float) -> None:
    x = np.array([[0.1, value], [1 / 3, 2.0]], np.float32)
    assert narrowed(x) is x and rounded(x) is x


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, np.int64, np.bool_])
def test_what_is_no_float32_travels_as_it_is(dtype: type) -> None:
    x = np.ones((2, 3), dtype)
    assert narrowed(x) is x


def test_strided_and_empty_pieces_are_narrowed_too() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)[:, 1:3]
    assert np.array_equal(narrowed(x), x) and narrowed(x).flags.c_contiguous
    assert narrowed(np.empty((0, 3), np.float32)).shape == (0, 3)


# --- a plan in this process -----------------------------------------------------------------------


@pytest.mark.parametrize("make", NETWORKS)
def test_the_loss_is_there_and_small_and_less_bytes_move(make: Callable[[], ModelProto]) -> None:
    model, half, plan = planned(make)
    exact = replace(half, half_transfers=False)
    x = noise(exact)
    truth = reference(model, x)
    assert_exact(model, x, mi.run_plan(exact, plan, x))
    off = worst(mi.run_plan(half, plan, x), truth)
    assert 1e-6 < off < 1e-3, off
    between, before = (derive(g, plan).bytes_between(g) for g in (half, exact))
    for pair, nbytes in between.items():
        at_an_end = HEAD in pair
        assert nbytes == before[pair] if at_an_end else nbytes <= before[pair] // 2 + 64, pair


def test_a_piece_beyond_the_range_comes_exact_and_the_others_rounded() -> None:
    """Two bands of 8 rows, a halo of one row each way; ``large`` rows make the lower one's overflow
    float16, and the upper one's not."""
    b = Builder(0)
    x = b.conv(b.input("image", [1, 3, 16, 16]), 3, 4, 3, bias=False)
    exact = mi.load(b.model([b.rename(b.conv(x, 4, 3, 3, bias=False), "y")]))
    half = exact.with_half_transfers()
    ends, shares = (HEAD, HEAD), dict.fromkeys(map(DeviceId, FOUR[:2]), 1.0)
    blocks = [Block(i, i + 1, None) for i in range(len(exact.ops))]
    plan = build(exact, axes_of(exact), blocks, shares, ends)
    differ = {}
    for large in (1.0, 1e6):
        given = noise(exact)
        given["image"][:, :, 9:] *= np.float32(large)
        found, truth = (mi.run_plan(g, plan, given)["y"] for g in (half, exact))
        assert np.isfinite(found).all()
        differ[large] = [bool((found != truth)[:, :, rows].any()) for rows in ([7], [8])]
    assert differ[1.0] == [True, True]
    assert differ[1e6][0] is False  # row 7 of the upper band reads row 8 of the lower one's


def test_integers_and_partial_sums_are_not_rounded() -> None:
    half = mi.load(conv_net()).with_half_transfers()
    plan = make_plan(half, profiles(), HEAD, HEAD, spread=True).plan
    flow = derive(half, plan)
    sums = [t for t in flow.transfers if t.piece.over is not None]
    assert sums and not any(flow.halved(half, t) for t in sums)
    whole = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["x"], ["n"]), onnx.helper.make_node("Abs", ["n"], ["y"])],
        "integers",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.INT32, [1, 2, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [1, 2, 8, 8])],
    )
    model = onnx.helper.make_model(
        whole, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10
    )
    g = mi.load(model).with_half_transfers()
    plan = banded(replace(g), FOUR[:1], HEAD)
    assert not any(derive(g, plan).halved(g, t) for t in derive(g, plan).transfers)
    assert all(g.wire_share(name) == 1.0 for name in g.values)


def test_input_and_answer_travel_exactly_and_what_stays_on_its_device_stays_exact() -> None:
    _, half, plan = planned(vgg16)
    flow = derive(half, plan)
    assert any(flow.halved(half, t) for t in flow.transfers)
    for t in flow.transfers:
        at_an_end = t.producer == flow.source or t.consumer == flow.sink
        if at_an_end or t.local:
            assert not flow.halved(half, t)


def test_one_device_rounds_nothing() -> None:
    exact = mi.load(vgg16())
    plan = banded(exact, FOUR[:1], HEAD)
    x = noise(exact)
    half = mi.run_plan(exact.with_half_transfers(), plan, x)
    assert same_bits(half, mi.run_plan(exact, plan, x))


def test_without_being_asked_nothing_is_rounded_and_the_report_is_silent() -> None:
    _, half, plan = planned(squeezenet1_1)
    exact = replace(half, half_transfers=False)
    sends = [s for ps in make_programs(exact, plan).by_device.values() for p in ps for s in p.sends]
    assert sends and not any(send.half for send in sends)
    assert report_of(exact, plan, timeline(exact, plan, profiles())).rounding is None


def test_strict_and_half_transfers_exclude_each_other() -> None:
    with pytest.raises(InvalidInput, match="every bit") as caught:
        as_asked(graph(), strict=True, half_transfers=True)
    assert caught.value.hint


# --- what the planner expects ---------------------------------------------------------------------


def test_the_timeline_has_half_the_bytes_between_tasks_and_is_sooner() -> None:
    _, half, plan = planned(yolov2)
    exact = replace(half, half_transfers=False)
    before, after = timeline(exact, plan, profiles()), timeline(half, plan, profiles())
    assert after.total_s < before.total_s
    ends = {-1, len(plan.stages)}
    for one, other in zip(
        sorted(before.transfers, key=lambda t: (t.producer, t.consumer)),
        sorted(after.transfers, key=lambda t: (t.producer, t.consumer)),
        strict=True,
    ):
        at_an_end = {one.producer.stage, one.consumer.stage} & ends
        assert other.nbytes == one.nbytes if at_an_end else other.nbytes <= one.nbytes // 2 + 1


def test_a_slow_link_of_a_pair_is_busy_half_as_long_too() -> None:
    _, half, plan = planned(yolov2)
    exact = replace(half, half_transfers=False)
    slow = [replace(p, links=tuple(PairLink(DeviceId(n), 1e3) for n in FOUR)) for p in profiles()]
    before, after = timeline(exact, plan, slow), timeline(half, plan, slow)
    assert before.bottleneck_s > 100 * timeline(exact, plan, profiles()).bottleneck_s
    assert after.bottleneck_s == pytest.approx(before.bottleneck_s / 2)
    assert after.total_s < 0.6 * before.total_s


def test_the_search_counts_as_the_timeline_does_and_finds_a_sooner_plan() -> None:
    half = mi.load(squeezenet1_1()).with_half_transfers()
    planned = make_plan(half, profiles(20.0), HEAD, HEAD, spread=True)
    assert timeline(half, planned.plan, profiles(20.0)).total_s == planned.timeline.total_s
    exact = make_plan(replace(half, half_transfers=False), profiles(20.0), HEAD, HEAD, spread=True)
    assert planned.timeline.total_s < exact.timeline.total_s


def test_plan_says_how_many_bytes_are_rounded(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(unet().SerializeToString())
    told = {}
    for flags in ([], ["--half-transfers"]):
        arguments = ["plan", str(path), "--devices", "4", "--spread", "--json", *flags]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        told[bool(flags)] = json.loads(result.stdout)
    assert told[False]["report"]["rounding"] is None
    assert told[True]["report"]["rounding"]["float32_bytes"] > 0
    assert told[True]["worker_to_worker_bytes"] < told[False]["worker_to_worker_bytes"]
    refused = CliRunner().invoke(app, ["plan", str(path), "--strict", "--half-transfers"])
    assert refused.exit_code == 2 and "every bit" in refused.stderr


# --- the loss -------------------------------------------------------------------------------------


def test_the_loss_is_measured_and_told_in_the_report(tmp_path: Path) -> None:
    model, half, plan = planned(vgg16)
    report = report_of(half, plan, timeline(half, plan, profiles()))
    found = loss.with_loss(half, plan, report, tmp_path).rounding
    assert found is not None and found.loss is not None and found.changed is None
    x = loss.noise(half)
    assert found.loss == pytest.approx(worst(mi.run_plan(half, plan, x), reference(model, x)), 0.01)
    assert f"loss {found.loss:.2g}" in str(found) and loss.HOW in str(found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bound", ["LOSS_FLOPS", "LOSS_BYTES"])
def test_what_would_take_long_or_much_memory_is_not_measured_and_that_is_said(
    bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, half, plan = planned(vgg16)
    monkeypatch.setattr(limits, bound, 1000)
    report = report_of(half, plan, timeline(half, plan, profiles()))
    found = loss.with_loss(half, plan, report, tmp_path).rounding
    assert found is not None and found.loss is None
    assert "not measured" in str(found)


def test_a_plan_that_rounds_nothing_says_so() -> None:
    assert "nothing" in loss.unmeasured(graph(), Rounding(float32_bytes=0))


def test_outputs_of_other_types_tell_how_many_elements_changed() -> None:
    a = {"y": np.array([1.0, 2.5], np.float32), "label": np.array([1, 2, 3, 4])}
    b = {"y": np.array([1.0, 2.0], np.float32), "label": np.array([1, 2, 3, 5])}
    assert loss.differences(a, b) == (0.25, 0.25)
    assert loss.differences({"label": a["label"]}, {"label": a["label"]}) == (None, 0.0)
    with pytest.raises(ValueError, match="shape"):
        loss.differences({"y": a["y"][:1]}, {"y": b["y"]})
    with pytest.raises(ValueError, match="finite"):
        loss.differences({"y": a["y"] * np.float32(np.inf)}, {"y": b["y"]})


# --- the cores: the same answer, whoever takes a task ---------------------------------------------

NAMES = ("pi-1", "pi-2", "pi-3")


def test_the_devices_answer_has_the_bits_of_the_plan_run_in_process() -> None:
    half = graph().with_half_transfers()
    plan = banded(half, NAMES, "head")
    cluster = Cluster(NAMES)
    cluster.deployed(plan=str(plan), half_transfers=True)
    request = cluster.submit()
    found = cluster.outcome(request)
    expected = mi.run_plan(half, plan, image())
    assert same_bits(found.arrays, expected)
    assert not same_bits(expected, mi.run_plan(graph(), plan, image()))
    assert cluster.reply(request).rounded


MOMENTS = {
    "nobody dies": None,
    "as it hands on a halo": kind(m.Deliver, by="pi-2"),
    "before it has its input": kind(m.Deliver, to="pi-2"),
    "as another computes": kind(m.TasksDone, by="pi-1"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_answer_has_the_same_bits_whoever_takes_a_task(moment: str) -> None:
    """A second copy may hold in memory what the first was sent: it rounds that as well."""
    half = graph().with_half_transfers()
    plan = bands(half, NAMES, count=6)
    cluster = Cluster(NAMES)
    cluster.deployed(plan=str(plan), half_transfers=True)
    when = MOMENTS[moment]
    if when is not None:
        cluster.when(when, lambda: lose(cluster, "pi-2"))
    expected = mi.run_plan(half, plan, image())
    takers = set()
    for _ in range(3):
        request = cluster.submit()
        outcome = cluster.outcome(request)
        assert same_bits(outcome.arrays, expected)
        reply = cluster.reply(request)
        assert reply.rounded and reply.attempts == 1
        takers.add(tuple((t.place, t.device) for t in reply.tasks))
    assert len(takers) > 1 or when is None


def test_the_order_of_a_tasks_devices_changes_no_bit() -> None:
    half = graph().with_half_transfers()
    plan = bands(half, NAMES, count=4)
    turned = bands(half, NAMES[::-1], count=4)
    assert same_bits(mi.run_plan(half, plan, image()), mi.run_plan(half, turned, image()))


def test_a_deployment_that_asks_for_both_is_refused_before_its_bytes_are_fetched() -> None:
    cluster = Cluster(NAMES)
    settled = cluster.answer(cluster.deploy(strict=True, half_transfers=True))
    failure = settled.failure or settled.answer.failure  # type: ignore[union-attr]
    assert failure is not None and failure.error == "InvalidInput" and failure.hint
    assert not cluster.sent["Want"]
