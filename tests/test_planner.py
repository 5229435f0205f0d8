"""Plans are legal and exact, use devices by their worth, say why, and are the same every time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
from architectures import ALL, Builder
from hypothesis import given
from hypothesis import strategies as st
from networks import Network, networks
from onnx import ModelProto

import meshinfer as mi
from meshinfer.cost import DeviceProfile, PairLink, glued_to, timeline
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.importers import open_model
from meshinfer.ops import BARRIER, rule_of
from meshinfer.planner import OBJECTIVES, Planned, axes_of, make_plan
from meshinfer.planner.choose import SURE_GAIN
from meshinfer.transfers import derive

SMALL: dict[str, dict[str, float]] = {
    "vgg16": {"width": 0.125, "classifier_width": 64},
    "resnet50": {"width": 0.125},
    "mobilenet_v2": {"width": 0.5},
    "squeezenet1_1": {"width": 0.25},
    "yolov2": {"width": 0.125},
    "unet": {"width": 8},
    "sppf": {"width": 8},
}
PI0 = DeviceId("pi-0")


@cache
def model(name: str) -> ModelProto:
    return ALL[name](**SMALL[name])


@cache
def graph(name: str) -> Graph:
    return mi.load(model(name))


def devices(count: int, speed: float = 2e8, **changes: float) -> list[DeviceProfile]:
    """Uneven ones: each is slower than the one before, the slowest has about a third of the speed.

    Slow processors and quick links, so that tiling pays even for small models.
    """
    return [
        DeviceProfile(
            DeviceId(f"pi-{i}"),
            speed / (1 + 0.35 * i),
            **{"bandwidth_bytes_per_s": 125e6, "latency_s": 1e-4, "overhead_s": 2e-4, **changes},
        )
        for i in range(count)
    ]


@cache
def planned_for(name: str, count: int, spread: bool = False, speed: float = 2e8) -> Planned:
    """The plan of a small model on uneven devices; several tests look at the same one."""
    return make_plan(graph(name), devices(count, speed), PI0, PI0, spread=spread)


def picture(proto: ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        value.name: rng.standard_normal(
            [d.dim_value for d in value.type.tensor_type.shape.dim], dtype=np.float32
        )
        for value in proto.graph.input
    }


def between_workers(g: Graph, plan: mi.Plan) -> int:
    """Bytes from a task on one device to a task on another: neither scatter nor gather."""
    flow = derive(g, plan)
    return sum(
        g.nbytes(t.piece.value, t.piece.box)
        for t in flow.transfers
        if not t.local and flow.source != t.producer and flow.sink != t.consumer
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_plans_of_uneven_devices_are_legal_and_no_slower_than_the_best_one(
    name: str, count: int
) -> None:
    g, profiles = graph(name), devices(count)
    planned, alone = planned_for(name, count), planned_for(name, 1)
    mi.validate(g, planned.plan)
    assert planned.timeline.total_s <= alone.timeline.total_s
    assert len(planned.plan.devices()) <= count
    assert timeline(g, planned.plan, profiles) == planned.timeline
    assert mi.Plan.parse(str(planned.plan)) == planned.plan


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("count", "spread"), [(1, False), (3, False), (5, False), (4, True)])
def test_plans_give_what_onnxruntime_gives(name: str, count: int, spread: bool) -> None:
    x = picture(model(name))
    planned = planned_for(name, count, spread)
    assert (len(planned.plan.devices()) > 1) == (count > 1)
    oracle.assert_exact(model(name), x, mi.run_plan(graph(name), planned.plan, x))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_spread_uses_every_device_in_several_stages_that_talk_to_each_other(
    name: str, count: int
) -> None:
    g = graph(name)
    # So fast that one alone is always quicker: the devices are used because that was asked.
    planned = make_plan(g, devices(count, speed=1e12), PI0, PI0, spread=True)
    mi.validate(g, planned.plan)
    assert set(planned.plan.devices()) == {p.id for p in devices(count)}
    assert len(planned.plan.stages) > 1
    assert between_workers(g, planned.plan) > 0
    assert make_plan(g, devices(count, speed=1e12), PI0, PI0).plan.devices() == (PI0,)


def barrier(b: Builder, x: str, rows: int, columns: int) -> str:
    """A node that has no rule: where it reads depends on data."""
    y, z = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    grid = np.stack([z, -y], axis=-1)[None].astype(np.float32)
    return str(b.op("GridSample", [x, b.const(grid)]))


def test_spread_splits_what_can_be_split_beside_barriers() -> None:
    b = Builder(0)
    x = b.relu(b.conv(b.input("image", [1, 3, 12, 10]), 3, 8, 3))
    for _ in range(3):
        x = barrier(b, x, 12, 10)
    proto = b.model([b.rename(x, "y")])
    g = mi.load(proto)
    planned = make_plan(g, devices(3, speed=1e12), PI0, PI0, spread=True)
    assert [len(stage.tasks) for stage in planned.plan.stages] == [3, 1]
    oracle.assert_exact(proto, picture(proto), mi.run_plan(g, planned.plan, picture(proto)))


def test_the_notes_admit_that_nothing_could_be_split() -> None:
    b = Builder(0)
    y = barrier(b, b.input("image", [1, 3, 12, 10]), 12, 10)
    g = mi.load(b.model([b.rename(y, "y")]))
    planned = make_plan(g, devices(3), PI0, PI0, spread=True)
    assert planned.plan.devices() == (PI0,)
    assert any("as far as this model can be split" in note for note in planned.notes)


def test_spread_over_one_device_is_that_device() -> None:
    assert make_plan(graph("sppf"), devices(1), PI0, PI0, spread=True).plan.devices() == (PI0,)


def test_multi_stage_plans_send_halos_from_worker_to_worker() -> None:
    g = graph("vgg16")
    planned = make_plan(g, devices(4), PI0, PI0)
    assert len(planned.plan.stages) > 2
    assert between_workers(g, planned.plan) > 0


def test_a_slow_device_gets_less() -> None:
    g = graph("unet")
    fast = devices(2)[0]
    slow = DeviceProfile(DeviceId("slow"), fast.flops_per_s / 3, 2e-4, 125e6, 1e-4)
    planned = make_plan(g, [fast, slow], PI0, PI0)
    assert set(planned.plan.devices()) == {"pi-0", "slow"}
    flops = {"pi-0": 0, "slow": 0}
    for span in planned.timeline.tasks:
        flops[span.device] += span.work.flops
    assert flops["slow"] < 0.5 * flops["pi-0"]


def test_a_device_that_cannot_compute_gets_nothing_and_is_named() -> None:
    g = graph("unet")
    silent = DeviceProfile(DeviceId("head"), 1e12, computes=False)
    broken = DeviceProfile(DeviceId("broken"), 0.0)
    planned = make_plan(g, [*devices(3), silent, broken], DeviceId("head"), DeviceId("far"))
    assert not {"head", "broken", "far"} & set(planned.plan.devices())
    assert (planned.plan.source, planned.plan.sink) == ("head", "far")
    assert not any(note.startswith("head idle") for note in planned.notes), "nobody expects it to"
    assert "broken idle: it does not compute" in planned.notes


def test_the_notes_say_that_devices_of_two_numeric_classes_compute_unless_the_graph_is_strict() -> (
    None
):
    g = graph("unet")
    alike = [replace(p, numeric_class="ort/aarch64") for p in devices(3)]
    mixed = [*alike[:2], replace(alike[2], numeric_class="ort/x86_64")]
    said = "2 numeric classes compute (ort/aarch64, ort/x86_64)"
    assert any(said in note for note in make_plan(g, mixed, PI0, PI0).notes)
    for others, it in ((alike, g), (mixed, g.as_strict())):
        planned = make_plan(it, others, PI0, PI0)
        assert len(planned.plan.devices()) > 1
        assert not any("numeric classes" in note for note in planned.notes)


def test_awful_links_leave_everything_on_one_device_and_the_notes_say_what_others_cost() -> None:
    g = graph("vgg16")
    planned = make_plan(g, devices(4, bandwidth_bytes_per_s=2e3, latency_s=0.2), PI0, PI0)
    assert planned.plan.devices() == (PI0,)
    assert planned.plan.mode == "on-device"
    assert any("idle: would add" in note for note in planned.notes), planned.notes


def test_one_awful_link_among_good_ones_idles_just_that_device() -> None:
    g = graph("vgg16")
    profiles = devices(4)
    profiles[1] = DeviceProfile(DeviceId("pi-1"), 2e8, bandwidth_bytes_per_s=2e3, latency_s=0.5)
    planned = make_plan(g, profiles, PI0, PI0)
    assert set(planned.plan.devices()) == {"pi-0", "pi-2", "pi-3"}
    assert any(note.startswith("pi-1 idle: would add") for note in planned.notes)


def test_a_gain_that_predictions_cannot_be_trusted_with_leaves_one_device() -> None:
    g = graph("vgg16")
    alone = planned_for("vgg16", 1).timeline.total_s
    chosen = {}
    for ms in (0, 1, 2, 3, 4, 6, 8, 16):  # the dearer a message, the less two devices gain
        profiles = devices(2, message_s=ms * 1e-3)
        planned = make_plan(g, profiles, PI0, PI0)
        chosen[ms] = len(planned.plan.devices())
        if chosen[ms] > 1:
            assert planned.timeline.total_s * SURE_GAIN < alone
        else:
            assert planned.timeline.total_s == pytest.approx(alone)
    assert list(chosen.values()) == sorted(chosen.values(), reverse=True)
    assert (chosen[0], chosen[16]) == (2, 1)


def test_a_much_faster_device_far_away_takes_it_all() -> None:
    g = graph("vgg16")
    server = DeviceProfile(DeviceId("server"), 1e12, bandwidth_bytes_per_s=125e6)
    planned = make_plan(g, [*devices(2, speed=1e7), server], PI0, PI0)
    assert planned.plan.devices() == ("server",)
    assert planned.plan.mode == "full offload"


@pytest.mark.parametrize("objective", ["latency", "throughput", "memory"])
def test_the_same_inputs_give_the_same_plan_in_any_order(objective: str) -> None:
    g = graph("squeezenet1_1")
    profiles = devices(4)
    one = make_plan(g, profiles, PI0, PI0, objective=objective)
    again = make_plan(
        mi.load(model("squeezenet1_1")), profiles[::-1], PI0, PI0, objective=objective
    )
    assert one == again
    mi.validate(g, one.plan)


def test_objectives_win_at_what_they_ask() -> None:
    g = graph("vgg16")
    plans = {
        o: make_plan(g, devices(4), PI0, PI0, objective=o).timeline
        for o in ("latency", "throughput", "memory")
    }
    peak = {o: max(u.peak_bytes for u in t.devices) for o, t in plans.items()}
    assert plans["latency"].total_s == min(t.total_s for t in plans.values())
    assert plans["throughput"].bottleneck_s == min(t.bottleneck_s for t in plans.values())
    assert peak["memory"] == min(peak.values())


def test_the_least_memory_is_not_more_than_what_the_soonest_answer_takes() -> None:
    """Of the upscaler it was twice as much: that search does not begin with many rounds."""
    source = open_model(Path(__file__).parent.parent / "cluster" / "data" / "upscale.onnx")
    g = mi.load(source, shapes={"image": (1, 300, 451, 3)}, image=source.image)
    equal = [DeviceProfile(DeviceId(f"pi-{i}"), 20e9) for i in range(4)]
    head = DeviceId("head")
    peak = {
        o: max(u.peak_bytes for u in make_plan(g, equal, head, head, objective=o).timeline.devices)
        for o in ("latency", "memory")
    }
    assert peak["memory"] <= peak["latency"]


def test_no_cut_parts_a_convolution_from_what_is_fused_with_it() -> None:
    for name in ALL:
        g = graph(name)
        for spread in (False, True):
            plan = planned_for(name, 5 if not spread else 4, spread).plan
            starts = {stage.start for stage in plan.stages}
            for op in g.ops:
                last = glued_to(g, op)
                if last >= 0:
                    assert not starts & set(range(last + 1, op.index + 1)), (name, str(op))


def test_fixed_cuts_are_kept() -> None:
    g = graph("unet")
    cuts = g.cut_points[5:30:6]
    planned = make_plan(g, devices(3), PI0, PI0, fixed_cuts=cuts, spread=True)
    assert tuple(stage.start for stage in planned.plan.stages) == (0, *cuts)
    whole = make_plan(g, devices(3), PI0, PI0, fixed_cuts=(), spread=True)
    assert len(whole.plan.stages) == 1


# -- errors --------------------------------------------------------------------------------------


def test_no_computing_device_is_an_error_with_a_hint() -> None:
    for profiles in ([], [DeviceProfile(PI0, 1e9, computes=False)]):
        with pytest.raises(mi.ClusterUnavailable) as caught:
            make_plan(graph("sppf"), profiles, PI0, PI0)
        assert caught.value.hint


def test_a_model_too_large_for_one_device_runs_on_several() -> None:
    g = graph("vgg16")
    alone = make_plan(g, devices(1), PI0, PI0)
    need = max(u.peak_bytes for u in alone.timeline.devices)
    granted = devices(4, speed=1e12, memory_bytes=int(need * 0.8))
    planned = make_plan(g, granted, PI0, PI0)
    assert len(planned.plan.devices()) > 1
    assert all(u.peak_bytes <= need * 0.8 for u in planned.timeline.devices)


def test_a_model_too_large_for_all_is_an_error_with_numbers() -> None:
    with pytest.raises(mi.NotEnoughMemory, match=r"would need .* MB of 10\.0 kB") as caught:
        make_plan(graph("vgg16"), devices(3, memory_bytes=10_000), PI0, PI0)
    assert caught.value.hint


@pytest.mark.parametrize("spread", [False, True])
def test_a_device_without_room_rests_and_is_told_why(spread: bool) -> None:
    """Spread over all devices, a plan was refused for the one that grants next to nothing."""
    profiles = devices(3, memory_bytes=1 << 30)
    full = profiles[1] = replace(profiles[1], memory_bytes=1)
    planned = make_plan(graph("vgg16"), profiles, PI0, PI0, spread=spread)
    others = {p.id for p in profiles} - {full.id}
    assert set(planned.plan.devices()) == others
    told = [note for note in planned.notes if note.startswith(f"{full.id} idle: it grants 0.0 kB")]
    assert len(told) == 1 and "a share would take" in told[0]


def test_wrong_options_are_refused() -> None:
    g = graph("sppf")
    with pytest.raises(mi.InvalidInput, match="objective"):
        make_plan(g, devices(2), PI0, PI0, objective="beauty")
    with pytest.raises(mi.InvalidInput, match="cut points"):
        make_plan(g, devices(2), PI0, PI0, fixed_cuts=[len(g.ops) + 1])
    with pytest.raises(mi.InvalidInput, match="twice"):
        make_plan(g, devices(2) * 2, PI0, PI0)


# -- graphs that are no chain of convolutions ----------------------------------------------------


def test_a_barrier_runs_whole_and_the_rest_is_tiled() -> None:
    b = Builder(0)
    x = b.input("image", [1, 3, 32, 32])
    x = b.relu(b.conv(x, 3, 8, 3))
    x = barrier(b, x, 32, 32)
    proto = b.model([b.rename(b.conv(b.relu(b.conv(x, 8, 8, 3)), 8, 4, 3), "y")])
    g = mi.load(proto)
    barriers = [op.index for op in g.ops if rule_of(op) is BARRIER]
    assert barriers
    # Where messages are dear, each device would rather compute the barrier itself.
    planned = make_plan(g, devices(3, speed=1e8, message_s=0.0), PI0, PI0, spread=True)
    for stage in planned.plan.stages:
        if stage.start <= barriers[0] < stage.stop:
            assert len(stage.tasks) == 1
    assert any(len(stage.tasks) == 3 for stage in planned.plan.stages)
    oracle.assert_exact(proto, picture(proto), mi.run_plan(g, planned.plan, picture(proto)))


def test_a_graph_of_barriers_alone_runs_on_one_device() -> None:
    b = Builder(0)
    x = barrier(b, b.input("x", [1, 1, 4, 4]), 4, 4)
    g = mi.load(b.model([b.rename(b.op("NonZero", x), "where")]))
    for spread in (False, True):
        assert len(make_plan(g, devices(3), PI0, PI0, spread=spread).plan.devices()) == 1


def test_rows_are_followed_through_transposes() -> None:
    b = Builder(0)
    x = b.op("Transpose", b.input("image", [1, 24, 16, 3]), perm=[0, 3, 1, 2])
    x = b.relu(b.conv(x, 3, 40, 3))
    proto = b.model([b.rename(b.op("Transpose", x, perm=[0, 2, 3, 1]), "y")])
    g = mi.load(proto)
    axes = axes_of(g)
    assert axes.of("y", "rows") == 1
    assert {axes.of(op.outputs[0], "rows") for op in g.ops[:-1]} == {2}
    planned = make_plan(g, devices(3, speed=1e7), PI0, PI0)
    assert len(planned.plan.devices()) == 3
    oracle.assert_exact(proto, picture(proto), mi.run_plan(g, planned.plan, picture(proto)))


def test_a_batch_of_vectors_and_integers_is_planned() -> None:
    b = Builder(0)
    x = b.gemm(b.input("x", [6, 32]), 32, 40)
    proto = b.model(
        [b.rename(b.op("Softmax", x, axis=1), "p"), b.rename(b.op("ArgMax", x, axis=1), "best")]
    )
    g = mi.load(proto)
    planned = make_plan(g, devices(3, speed=1e6), PI0, PI0, spread=True)
    oracle.assert_exact(proto, picture(proto), mi.run_plan(g, planned.plan, picture(proto)))


@given(networks(), st.integers(1, 5), st.booleans(), st.sampled_from(OBJECTIVES))
def test_any_network_is_planned_exactly(
    network: Network, count: int, spread: bool, objective: str
) -> None:
    g = mi.load(network.model)
    profiles = devices(count, speed=1e6)
    planned = make_plan(g, profiles, PI0, PI0, objective=objective, spread=spread)
    assert planned == make_plan(g, profiles, PI0, PI0, objective=objective, spread=spread)
    found = mi.run_plan(g, planned.plan, network.inputs)
    oracle.assert_exact(network.model, network.inputs, found)


def test_more_devices_than_rows() -> None:
    proto = ALL["sppf"](16, width=4)
    g = mi.load(proto)
    x = picture(proto)
    planned = make_plan(g, devices(20, speed=1e6), PI0, PI0, spread=True)
    oracle.assert_exact(proto, x, mi.run_plan(g, planned.plan, x))


# -- batches ---------------------------------------------------------------------------------------


def convolutions(batch: int) -> ModelProto:
    b = Builder(0)
    x = b.input("image", [batch, 3, 32, 24])
    for cin, cout in ((3, 8), (8, 8), (8, 16)):
        x = b.relu(b.conv(x, cin, cout, 3))
    return b.model([b.rename(x, "y")])


def test_a_batch_is_split_where_there_are_images_enough() -> None:
    proto = convolutions(8)
    g = mi.load(proto)
    equal = [replace(p, flops_per_s=1e8) for p in devices(4)]
    planned = make_plan(g, equal, PI0, PI0, spread=True).plan
    parts = [task.outputs[0].box for stage in planned.stages for task in stage.tasks]
    assert {box[0].size for box in parts} == {2} and {box[2].size for box in parts} == {32}
    assert len(planned.devices()) == 4
    oracle.assert_exact(proto, picture(proto), mi.run_plan(g, planned, picture(proto)))


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_smaller_than_the_cluster_leaves_no_device_idle_when_spread(batch: int) -> None:
    proto = convolutions(batch)
    g = mi.load(proto)
    planned = make_plan(g, devices(4, speed=1e8), PI0, PI0, spread=True).plan
    assert len(planned.devices()) == 4
    oracle.assert_exact(proto, picture(proto), mi.run_plan(g, planned, picture(proto)))


def test_the_rows_of_a_video_are_cut_and_not_its_few_frames() -> None:
    b = Builder(0)
    weights = b.const(np.random.default_rng(0).standard_normal((4, 3, 3, 3, 3), np.float32))
    y = b.op("Conv", [b.input("clip", [1, 3, 4, 24, 20]), weights], pads=[1] * 6)
    proto = b.model([b.rename(b.relu(y), "y")])
    g = mi.load(proto)
    planned = make_plan(g, devices(3, speed=1e8), PI0, PI0, spread=True).plan
    boxes = [task.outputs[0].box for task in planned.stages[-1].tasks]
    assert [box[2].size for box in boxes] == [4, 4, 4] and sum(box[3].size for box in boxes) == 24
    x = {"clip": np.random.default_rng(1).standard_normal((1, 3, 4, 24, 20), np.float32)}
    oracle.assert_exact(proto, x, mi.run_plan(g, planned, x))


def test_a_mean_over_rows_is_summed_in_bands_unless_the_graph_is_strict() -> None:
    b = Builder(0)
    x = b.relu(b.conv(b.input("image", [1, 3, 64, 48]), 3, 16, 3))
    proto = b.model([b.rename(b.op("GlobalAveragePool", [x]), "y")])
    for strict in (False, True):
        g = mi.load(proto).as_strict() if strict else mi.load(proto)
        planned = make_plan(g, devices(3, speed=1e8), PI0, PI0, spread=True).plan
        shards = [s for stage in planned.stages for task in stage.tasks for s in task.outputs]
        assert any(shard.over is not None for shard in shards) is not strict
        oracle.assert_exact(proto, picture(proto), mi.run_plan(g, planned, picture(proto)))


def test_devices_behind_a_slow_bridge_exchange_no_halos_over_it() -> None:
    g = graph("vgg16")
    plain = [replace(p, flops_per_s=2e8) for p in devices(3)]
    bridge = {"pi-1": "pi-2", "pi-2": "pi-1"}
    bridged = [
        replace(p, links=(PairLink(DeviceId(bridge[p.id]), 2e5),)) if p.id in bridge else p
        for p in plain
    ]
    blind = make_plan(g, plain, PI0, PI0)
    over = {("pi-1", "pi-2"), ("pi-2", "pi-1")}

    def crosses(planned: Planned) -> bool:
        found = timeline(g, planned.plan, bridged)
        return any((t.sender, t.receiver) in over for t in found.transfers)

    seeing = make_plan(g, bridged, PI0, PI0)
    assert crosses(blind) and not crosses(seeing)
    assert seeing.timeline.total_s < timeline(g, blind.plan, bridged).total_s
    assert len(seeing.plan.devices()) > 1
