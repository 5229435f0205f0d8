"""What users ask of plans beside speed: memory, pinned values, streams; and every kind of split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import oracle
import pytest
from architectures import ALL, Builder
from onnx import ModelProto

import meshinfer as mi
from meshinfer.cost import DeviceProfile, timeline
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.planner import Block, axes_of, build, make_plan, refuse_pinned
from meshinfer.planner.bands import splittable
from meshinfer.transfers import derive

HEAD = DeviceId("head")
PIS = tuple(DeviceId(f"pi-{i}") for i in range(6))


def cluster(count: int, speed: float = 2e8, **changes: float) -> list[DeviceProfile]:
    """Equal devices, of which the first shares its host with the head."""
    plain = {"overhead_s": 2e-4, "bandwidth_bytes_per_s": 125e6, "latency_s": 1e-4, **changes}
    members = [DeviceProfile(d, speed, host=f"host of {d}", **plain) for d in PIS[:count]]
    return [replace(members[0], id=HEAD, flops_per_s=0.0, computes=False), *members]


@cache
def model(name: str) -> ModelProto:
    small: dict[str, dict[str, float]] = {
        "vgg16": {"width": 0.125, "classifier_width": 512},
        "yolov2": {"width": 0.125},
        "unet": {"width": 8},
    }
    return ALL[name](**small[name])


@cache
def graph(name: str) -> Graph:
    return mi.load(model(name))


def picture(proto: ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        v.name: rng.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim], np.float32)
        for v in proto.graph.input
    }


# -- every kind of split ---------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["rows", "channels", "grid", "slabs"])
@pytest.mark.parametrize(("count", "rounds"), [(4, 1), (5, 2)])
def test_blocks_of_every_kind_give_what_onnxruntime_gives(
    kind: str, count: int, rounds: int, strict: bool
) -> None:
    for name in ("vgg16", "yolov2"):
        g = graph(name).as_strict() if strict else graph(name)
        axes = axes_of(g, sums=not strict)
        weights = {d: 1.0 + 0.3 * i for i, d in enumerate(PIS[:count])}
        cuts = (0, *g.cut_points[3::7], len(g.ops))
        blocks = [
            Block(a, b, None, kind, rounds=rounds)  # type: ignore[arg-type]
            if splittable(g, axes, a, b, kind)  # type: ignore[arg-type]
            else Block(a, b, PIS[0])
            for a, b in pairwise(cuts)
        ]
        assert any(block.whole_on is None for block in blocks)
        plan = build(g, axes, blocks, weights, (HEAD, HEAD))
        mi.validate(g, plan)
        x = picture(model(name))
        oracle.assert_exact(model(name), x, mi.run_plan(g, plan, x))


def test_slow_links_and_large_maps_make_a_grid_and_it_is_exact() -> None:
    b = Builder(0)
    x = b.input("image", [1, 4, 64, 64])
    for _ in range(4):
        x = b.relu(b.conv(x, 4, 4, 3))
    proto = b.model([b.rename(x, "y")])
    g = mi.load(proto)
    planned = make_plan(g, cluster(4, 3e6, bandwidth_bytes_per_s=1e6), HEAD, HEAD)
    columns = [t.outputs[0].box[3].size for s in planned.plan.stages for t in s.tasks]
    assert min(columns) < 64
    x = picture(proto)
    oracle.assert_exact(proto, x, mi.run_plan(g, planned.plan, x))


# -- hosts -----------------------------------------------------------------------------------------


def test_devices_on_one_host_use_no_link() -> None:
    g = graph("unet")
    apart = [replace(p, host="") for p in cluster(2)]
    plan = make_plan(g, apart, HEAD, HEAD).plan
    together = [replace(p, host="one") for p in apart]
    sent = [sum(u.bytes_sent for u in timeline(g, plan, p).devices) for p in (apart, together)]
    assert sent[0] > 0 and sent[1] == 0
    assert timeline(g, plan, together).total_s < timeline(g, plan, apart).total_s


# -- memory ----------------------------------------------------------------------------------------


def test_tasks_run_one_after_another_where_one_device_is_too_small() -> None:
    g = graph("unet")
    alone = make_plan(g, cluster(1), HEAD, HEAD)
    need = alone.timeline.use(PIS[0])
    least = make_plan(g, cluster(1), HEAD, HEAD, objective="memory").timeline.use(PIS[0])
    granted = (need.peak_bytes + least.peak_bytes) // 2
    assert least.peak_bytes < granted < need.peak_bytes
    planned = make_plan(g, cluster(1, memory_bytes=granted), HEAD, HEAD)
    assert planned.timeline.use(PIS[0]).peak_bytes <= granted
    assert max(len(stage.tasks) for stage in planned.plan.stages) > 1
    x = picture(model("unet"))
    oracle.assert_exact(model("unet"), x, mi.run_plan(g, planned.plan, x))


def test_fully_connected_weights_are_shared_out_where_no_device_can_hold_them() -> None:
    g = graph("vgg16")
    weights = sum(g.nbytes(n) for n in g.model.graph.initializers)
    granted = int(weights * 0.45)
    planned = make_plan(g, cluster(4, memory_bytes=granted), HEAD, HEAD)
    assert all(u.peak_bytes <= granted for u in planned.timeline.devices)
    x = picture(model("vgg16"))
    oracle.assert_exact(model("vgg16"), x, mi.run_plan(g, planned.plan, x))


# -- streams ---------------------------------------------------------------------------------------


def test_a_stream_goes_whole_to_whoever_is_free() -> None:
    g = graph("unet")
    planned = make_plan(g, cluster(4), HEAD, HEAD, objective="throughput")
    (stage,) = planned.plan.stages
    assert [set(task.devices) for task in stage.tasks] == [set(PIS[:4])]
    assert planned.plan.window == 8
    alone = make_plan(g, cluster(1), HEAD, HEAD).timeline.bottleneck_s
    assert planned.timeline.bottleneck_s == pytest.approx(alone / 4)
    assert mi.Plan.parse(str(planned.plan)) == planned.plan
    assert any("one answer every" in note for note in planned.notes)


def test_a_stream_is_shared_in_proportion_to_speed() -> None:
    g = graph("unet")
    profiles = cluster(3, overhead_s=0.0, message_s=0.0)
    profiles[3] = replace(profiles[3], flops_per_s=profiles[3].flops_per_s / 4)
    course = make_plan(g, profiles, HEAD, HEAD, objective="throughput").timeline
    busy = [course.use(d).busy_s for d in PIS[:3]]
    assert busy[0] == pytest.approx(busy[1]) == pytest.approx(busy[2])


def test_a_stream_is_pipelined_where_no_device_holds_the_whole_model() -> None:
    g = graph("vgg16")
    whole = make_plan(g, cluster(1), HEAD, HEAD).timeline.use(PIS[0]).peak_bytes
    profiles = cluster(4, memory_bytes=int(whole * 0.8))
    planned = make_plan(g, profiles, HEAD, HEAD, objective="throughput")
    assert all(u.peak_bytes <= whole * 0.8 for u in planned.timeline.devices)
    assert len(planned.plan.devices()) > 1 and len(planned.plan.stages) > 1


# -- pins ------------------------------------------------------------------------------------------


def readers(g: Graph, plan: mi.Plan, value: str) -> set[DeviceId]:
    """The devices to which a value goes, and those that make it."""
    flow = derive(g, plan)
    return {d for t in flow.transfers if t.piece.value == value for d in (t.sender, t.receiver)}


@pytest.mark.parametrize("objective", ["latency", "throughput", "memory"])
def test_a_pinned_input_stays_with_the_head_and_the_workers_on_its_host(objective: str) -> None:
    g = graph("vgg16")
    free = make_plan(g, cluster(4), HEAD, HEAD).plan
    assert readers(g, free, g.inputs[0]) > {HEAD, PIS[0]}
    for pinned in ([HEAD], [PIS[0]]):
        pin = {g.inputs[0]: pinned}
        planned = make_plan(g, cluster(4), HEAD, HEAD, objective=objective, pin=pin)
        assert readers(g, planned.plan, g.inputs[0]) <= {HEAD, PIS[0]}
        refuse_pinned(g, planned.plan, cluster(4), pin)
        with pytest.raises(mi.InvalidInput, match="pinned"):
            refuse_pinned(g, free, cluster(4), pin)
    assert len(make_plan(g, cluster(4), HEAD, HEAD, pin={g.inputs[0]: [HEAD]}).plan.devices()) > 1


def test_a_picture_that_is_merely_scaled_stays_as_well_so_that_features_travel() -> None:
    proto = model("vgg16")
    spec = mi.ImageSpec(proto.graph.input[0].name)
    g = mi.load(proto, image=spec, shapes={spec.input: (1, 64, 64, 3)})
    planned = make_plan(g, cluster(3), HEAD, HEAD, pin={g.inputs[0]: [HEAD]})
    first_conv = next(op.index for op in g.ops if op.type == "Conv")
    for name in (g.inputs[0], *g.produced(0, first_conv)):
        assert readers(g, planned.plan, name) <= {HEAD, PIS[0]}, name


def turned_round() -> ModelProto:
    """Red and blue change places."""
    b = Builder(0)
    x = b.input("image", [1, 3, 32, 32])
    red, green, blue = b.op("Split", [x, b.const(np.int64([1, 1, 1]))], 3, axis=1)
    x = b.conv(b.op("Concat", [blue, green, red], axis=1), 3, 8, 3)
    return b.model([b.rename(b.conv(x, 8, 3, 3), "y")])


def beside_another() -> ModelProto:
    """A mask from somebody else lies upon the image, which behind it is there all the same."""
    b = Builder(0)
    x, mask = b.input("image", [1, 3, 32, 32]), b.input("mask", [1, 1, 32, 32])
    x = b.conv(b.op("Concat", [x, mask], axis=1), 4, 8, 3)
    return b.model([b.rename(b.conv(x, 8, 3, 3), "y")])


@pytest.mark.parametrize("made", [turned_round, beside_another])
def test_an_image_that_is_cut_up_or_put_beside_something_is_the_image_still(
    made: Callable[[], ModelProto],
) -> None:
    g = mi.load(made())
    first = next(op.index for op in g.ops if op.type == "Conv")
    pin = {"image": [HEAD]}
    planned = make_plan(g, cluster(3), HEAD, HEAD, pin=pin, spread=True)
    assert set(planned.plan.devices()) > {PIS[0]}
    for name in ("image", *g.produced(0, first)):
        assert readers(g, planned.plan, name) <= {HEAD, PIS[0]}, name
    blocks = (Block(0, first, PIS[0]), Block(first, len(g.ops), PIS[1]))
    leaking = build(g, axes_of(g), blocks, {}, (HEAD, HEAD))
    with pytest.raises(mi.InvalidInput, match="what is pinned must not go"):
        refuse_pinned(g, leaking, cluster(3), pin)


def test_a_value_in_the_middle_is_made_and_read_where_it_is_pinned() -> None:
    g = graph("unet")
    value = next(op.outputs[0] for op in g.ops if op.index == len(g.ops) // 2)
    planned = make_plan(g, cluster(3), HEAD, HEAD, pin={value: [PIS[2]]})
    touching = {
        d
        for stage in planned.plan.stages
        for op in g.ops[stage.start : stage.stop]
        if value in (*op.inputs, *op.outputs)
        for task in stage.tasks
        for d in task.devices
    }
    assert touching == {PIS[2]}
    x = picture(model("unet"))
    oracle.assert_exact(model("unet"), x, mi.run_plan(g, planned.plan, x))


def test_pins_that_cannot_be_kept_are_refused() -> None:
    g = graph("unet")
    image = g.inputs[0]
    for pin, why in (
        ({"nothing": [PIS[0]]}, "not in the model"),
        ({image: [DeviceId("ghost")]}, "not there"),
        ({image: []}, "no device"),
        ({image: [PIS[1]]}, "must hold it as an input"),
        ({g.outputs[0]: [PIS[1]]}, "must hold it as an output"),
        ({op.outputs[0]: [PIS[i % 2]] for i, op in enumerate(g.ops[:2])}, "no plan keeps"),
    ):
        with pytest.raises(mi.InvalidInput, match=why) as caught:
            make_plan(g, cluster(2), HEAD, HEAD, pin=pin)
        assert caught.value.hint
    apart = [replace(p, host="") for p in cluster(2)]
    with pytest.raises(mi.InvalidInput, match="no plan keeps"):
        make_plan(g, apart, HEAD, HEAD, pin={image: [HEAD]})
