"""The timeline adds up: by hand for small plans, by its invariants for all."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from architectures import Builder, unet

import meshinfer as mi
from meshinfer.cost import (
    DeviceProfile,
    OpKind,
    Timeline,
    Work,
    alike,
    field_work,
    seconds,
    timeline,
)
from meshinfer.cost.alike import apart_links
from meshinfer.cost.model import whole_flops
from meshinfer.cost.profile import RATIOS, PairLink
from meshinfer.cost.timeline import KEPT
from meshinfer.geometry import Box, split_even
from meshinfer.graph import Graph
from meshinfer.halo import receptive_field
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.transfers import derive

A, B, C = DeviceId("a"), DeviceId("b"), DeviceId("c")
MESSAGE = 256


@cache
def chain() -> Graph:
    """Two 3x3 convolutions of 2 channels over 8x8, each with a Relu."""
    b = Builder(0)
    x = b.relu(b.conv(b.input("image", [1, 2, 8, 8]), 2, 2, 3))
    return mi.load(b.model([b.rename(b.relu(b.conv(x, 2, 2, 3)), "y")]))


def profile(device: DeviceId, **changes: float) -> DeviceProfile:
    plain = {
        "flops_per_s": 1e6,
        "overhead_s": 0.0,
        "bandwidth_bytes_per_s": 1e5,
        "latency_s": 0.25,
        "memory_bytes_per_s": 1e30,
        "message_s": 0.0,
        "byte_s": 0.0,
    }
    return DeviceProfile(device, **{**plain, **changes})


def bands(g: Graph, cuts: tuple[int, ...], devices: tuple[DeviceId, ...]) -> Plan:
    """Equal row bands, all stages alike."""
    bounds = (0, *cuts, len(g.ops))
    stages = []
    for start, stop in pairwise(bounds):
        tasks = []
        for i, device in enumerate(devices):
            shards = []
            for name in g.live_outputs(start, stop):
                whole = g.whole(name)
                part = split_even(whole[2].size, len(devices))[i]
                shards.append(Shard(name, whole.replace(2, part)))
            tasks.append(Task((device,), tuple(shards)))
        stages.append(Stage(start, stop, tuple(tasks)))
    return Plan(g.digest, devices[0], devices[0], tuple(stages))


CONV = 2 * 2 * 64 * 18  # operations of one convolution: 2 channels of 64 elements, 18 products each
RELU = 2 * 64
TIME = (CONV / RATIOS[OpKind.FIRST] + RELU) / 1e6  # of both at 1e6 FLOP/s: the channels are few


def test_one_device_alone_takes_just_its_operations() -> None:
    g = chain()
    found = timeline(g, bands(g, (), (A,)), [profile(A)])
    assert sum(whole_flops(g, op) for op in g.ops) == 2 * (CONV + RELU)
    assert found.total_s == pytest.approx(2 * TIME)
    assert found.transfers == ()
    assert found.bound == "compute of a"
    assert found.use(A).busy_s == found.total_s == found.bottleneck_s
    assert found.use(B).peak_bytes == 0


def test_overhead_and_bytes_are_added() -> None:
    g = chain()
    field = receptive_field(g, *_only(bands(g, (), (A,))))
    work = field_work(g, field)
    weights = sum(g.nbytes(name) for name in field.weights)
    # Each convolution reads one value and its weights and writes one; Relus are fused. What comes
    # in and what goes out is read and written once more.
    assert work.nbytes == 4 * g.nbytes("y") + weights + 2 * 2 * g.nbytes("y")
    assert work.kernels == 2
    slow = profile(A, overhead_s=3.0, memory_bytes_per_s=10.0, kernel_s=0.5)
    assert seconds(work, slow) == pytest.approx(2 * TIME + work.nbytes / 10 + 2 * 0.5 + 3)
    assert seconds(work, profile(A, flops_per_s=0.0)) == math.inf


def _only(plan: Plan) -> tuple[Stage, Task]:
    return plan.stages[0], plan.stages[0].tasks[0]


def test_peak_is_what_is_alive_at_once() -> None:
    g = chain()
    one = g.nbytes("y")
    work = field_work(g, receptive_field(g, *_only(bands(g, (), (A,)))))
    assert work.peak_bytes == 2 * one  # a reader and what it reads, never more
    weights = sum(g.nbytes(n) for n in g.values if g.is_initializer(n))
    use = timeline(g, bands(g, (), (A,)), [profile(A)]).use(A)
    assert (use.weight_bytes, use.peak_bytes) == (weights, weights + 2 * one)


def test_a_halo_costs_its_bytes_and_a_latency() -> None:
    g = chain()
    plan = bands(g, (2,), (A, B))
    found = timeline(g, plan, [profile(A), profile(B)])
    row = 2 * 8 * 4
    half = TIME / 2
    sent = {(t.sender, t.receiver, t.producer.stage): t for t in found.transfers}
    assert {k: t.nbytes for k, t in sent.items()} == {
        (A, B, -1): 5 * row,  # scatter: its four rows and one of halo
        (A, B, 0): row,
        (B, A, 0): row,
        (B, A, 1): 4 * row,  # gather
    }
    scatter = (5 * row + MESSAGE) / 1e5 + 0.25
    halo = (row + MESSAGE) / 1e5 + 0.25
    gather = (4 * row + MESSAGE) / 1e5 + 0.25
    first = scatter + half  # b's first task ends and its halo leaves for a
    second = max(first, scatter - 0.25 + halo)  # a's halo leaves when the scatter is off its link
    assert found.total_s == pytest.approx(max(first + halo, second + gather) + half)
    assert found.bound.startswith("link of")
    assert found.use(B).bytes_sent == 5 * row
    assert found.use(B).bytes_received == 6 * row


def test_messages_take_the_processors_of_both_ends() -> None:
    g = chain()
    plan = bands(g, (2,), (A, B))
    row = 2 * 8 * 4
    free = timeline(g, plan, [profile(A), profile(B)])
    found = timeline(g, plan, [profile(A), profile(B, message_s=3.0, byte_s=0.01)])
    # b receives its scatter and a halo, sends a halo and its part, and puts its own rows in place.
    bytes_s = 0.01 * ((5 + 1 + 1 + 4) * row + KEPT * 4 * row)
    assert found.use(B).busy_s == pytest.approx(free.use(B).busy_s + 4 * 3.0 + bytes_s)
    assert found.use(A).busy_s == pytest.approx(free.use(A).busy_s)
    sender = timeline(g, plan, [profile(A, message_s=3.0), profile(B)])
    assert sender.use(A).busy_s == pytest.approx(free.use(A).busy_s + 4 * 3.0)


def test_the_heads_work_delays_the_device_on_its_host() -> None:
    g, head = chain(), DeviceId("head")
    plan = replace(bands(g, (), (A, B)), source=head, sink=head)
    charges = {"message_s": 1.0, "request_s": 6.0, "report_s": 0.5}
    ends = profile(head, flops_per_s=0.0, **charges)

    def run(host: str, *others: DeviceProfile) -> Timeline:
        devices = (profile(A), profile(B), *others)
        hosted = [replace(p, host=h) for p, h in zip(devices, ("one", "two", "one"), strict=False)]
        return timeline(g, plan, [*hosted, replace(ends, host=host)])

    starts = {s.device: s.start_s for s in run("one").tasks}
    # Half of the request's cost comes first, then one message after the other; a's is no transfer.
    assert starts[A] == pytest.approx(3.0 + 2 * 1.0)
    beside, apart = run("one"), run("three")
    assert beside.use(A).busy_s == pytest.approx(apart.use(A).busy_s + 6.0 + 4 * 1.0 + 2 * 0.5)
    assert apart.use(head).busy_s == pytest.approx(6.0 + 4 * 1.0 + 2 * 0.5)
    # a's part comes first, b's while the head is busy with it; then the answer, and what was told.
    ends_at = {s.device: s.end_s for s in beside.tasks}
    assert beside.total_s == pytest.approx(ends_at[A] + 2 * 1.0 + 3.0 + 2 * 0.5)
    # With a second computing device on that host there is room beside either.
    crowd = run("one", profile(C))
    assert crowd.use(head).busy_s == apart.use(head).busy_s


def test_a_device_runs_one_task_at_a_time_and_a_link_sends_one_message_at_a_time() -> None:
    g = mi.load(unet(64, width=4))
    cuts = tuple(op.index for op in g.ops if op.type == "Conv" and op.index)[:9]
    found = timeline(g, bands(g, cuts, (A, B, C)), [profile(d) for d in (A, B, C)])
    for device in (A, B, C):
        _apart([(t.start_s, t.end_s) for t in found.tasks if t.device == device])
        for end in ("sender", "receiver"):
            mine = [t for t in found.transfers if getattr(t, end) == device]
            _apart([(t.start_s, t.end_s - 0.25) for t in mine])


def _apart(spans: list[tuple[float, float]]) -> None:
    spans.sort()
    for (_, end), (start, _) in pairwise(spans):
        assert start >= end - 1e-9


def test_nothing_starts_before_its_inputs_are_there() -> None:
    g = mi.load(unet(64, width=4))
    cuts = tuple(op.index for op in g.ops if op.type == "Conv" and op.index)[:9]
    plan = bands(g, cuts, (A, B, C))
    found = timeline(g, plan, [profile(d) for d in (A, B, C)])
    starts = {t.ref: t.start_s for t in found.tasks}
    ends = {t.ref: t.end_s for t in found.tasks}
    assert len(starts) == sum(len(s.tasks) for s in plan.stages)
    for t in found.transfers:
        assert t.start_s >= ends.get(t.producer, 0.0)
        assert t.end_s <= starts.get(t.consumer, found.total_s)
    for t in derive(g, plan).transfers:
        assert ends.get(t.producer, 0.0) <= starts.get(t.consumer, found.total_s) + 1e-9
    assert found.total_s == max(t.end_s for t in found.transfers)


@pytest.mark.parametrize(
    "change",
    [{"flops_per_s": 2e6}, {"bandwidth_bytes_per_s": 1e6}, {"latency_s": 0.01}],
)
def test_better_devices_are_not_slower(change: dict[str, float]) -> None:
    g = mi.load(unet(64, width=4))
    plan = bands(g, (5, 15), (A, B))
    slow = [profile(A), profile(B)]
    fast = [replace(p, **change) for p in slow]
    assert timeline(g, plan, fast).total_s < timeline(g, plan, slow).total_s


def test_a_task_where_nothing_computes_never_ends() -> None:
    g = chain()
    plan = bands(g, (2,), (A, B))
    assert timeline(g, plan, [profile(A)]).total_s == math.inf
    assert timeline(g, plan, [profile(A), profile(B, flops_per_s=0.0)]).total_s == math.inf


def test_source_and_sink_need_no_profile() -> None:
    g = chain()
    plan = replace(bands(g, (), (A,)), source=DeviceId("camera"), sink=DeviceId("screen"))
    found = timeline(g, plan, [profile(A)])
    assert {(t.sender, t.receiver) for t in found.transfers} == {("camera", "a"), ("a", "screen")}
    assert math.isfinite(found.total_s)
    assert found.use(DeviceId("camera")).bytes_sent == g.nbytes("image")


def test_work_is_nothing_by_default_and_derived_memory_speed_follows_the_processor() -> None:
    assert (Work().flops, Work().nbytes, Work().kernels, Work().peak_bytes) == (0, 0, 0, 0)
    assert DeviceProfile(A, 2e9).copy_bytes_per_s == 2 * DeviceProfile(A, 1e9).copy_bytes_per_s
    assert DeviceProfile(A, 1e9, computes=False).able is False
    assert Box.whole((1, 2, 8, 8)).volume * 4 == chain().nbytes("y")


def test_devices_that_measured_alike_become_equal_and_others_stay() -> None:
    names = [DeviceId(f"pi-{i}") for i in range(6)]
    speeds = (1.0, 1.05, 0.93, 0.5, 1.01, 0.52)
    measured = [
        DeviceProfile(d, 1e9 * s, rates=(1e9 * s, 2e8 * s), overhead_s=1e-3 / s)
        for d, s in zip(names, speeds, strict=True)
    ]
    found = alike(measured)
    assert [p.id for p in found] == names
    assert {p.flops_per_s for p in found} == {1.005e9, 0.51e9}
    assert {(p.rates, p.overhead_s) for p in found if p.flops_per_s > 6e8} == {
        (found[0].rates, found[0].overhead_s)
    }
    assert alike(measured[::-1]) == found[::-1]
    assert alike([replace(p, numeric_class=p.id) for p in measured])[3].flops_per_s == 0.5e9
    far = [DeviceProfile(A, 1e9), DeviceProfile(B, 1.3e9), DeviceProfile(C, 0.0, computes=False)]
    assert alike(far) == far


def test_what_noise_does_not_explain_stays_apart_kind_by_kind() -> None:
    """Two boards of one speed for convolutions, one with half the memory bandwidth."""
    measured = [
        DeviceProfile(A, 1.0e9, rates=(1.0e9, 2.0e8, 3e8), memory_bytes_per_s=8e9),
        DeviceProfile(B, 1.1e9, rates=(1.1e9, 2.2e8, 1e8), memory_bytes_per_s=4e9),
    ]
    found = alike(measured)
    assert [p.flops_per_s for p in found] == pytest.approx([1.05e9, 1.05e9])
    assert [p.rates[1] for p in found] == pytest.approx([2.1e8, 2.1e8])
    assert [p.rates[2] for p in found] == [3e8, 1e8]
    assert [p.memory_bytes_per_s for p in found] == [8e9, 4e9]


def test_devices_of_one_model_are_equals_though_something_slowed_a_measurement() -> None:
    """Measured in the lab: six equal devices, the first of them beside a starting coordinator."""
    speeds, pools = (17.0, 22.3, 22.9, 21.7, 22.3, 22.9), (6.0, 2.3, 6.0, 1.2, 7.3, 2.8)
    measured = [
        DeviceProfile(
            DeviceId(f"pi-{i}"), 1e9 * s, rates=(1e9 * s, 1e9 * w), memory_bytes_per_s=1e9 * w
        )
        for i, (s, w) in enumerate(zip(speeds, pools, strict=True))
    ]
    known = [replace(p, model="Raspberry Pi 4") for p in measured]
    assert len({(p.flops_per_s, p.rates, p.memory_bytes_per_s) for p in alike(known)}) == 1
    assert alike(known)[0].flops_per_s == pytest.approx(22.3e9)
    assert alike(measured)[0].flops_per_s == 17.0e9
    other = [replace(known[0], model="Raspberry Pi 3"), *known[1:]]
    assert alike(other)[0].flops_per_s == 17.0e9
    halved = [replace(known[0], flops_per_s=11e9), *known[1:]]
    assert alike(halved)[0].flops_per_s == 11e9
    assert alike(known[::-1]) == alike(known)[::-1]


def test_links_that_measured_alike_are_as_good_as_the_best_of_them() -> None:
    rates, waits = (118e6, 90e6, 20e6, 110e6), (3e-4, 2e-4, 1e-4, 5e-3)
    names = (A, B, C, DeviceId("far"))
    measured = [
        DeviceProfile(d, 1e9, bandwidth_bytes_per_s=r, latency_s=w)
        for d, r, w in zip(names, rates, waits, strict=True)
    ]
    found = [(p.bandwidth_bytes_per_s, p.latency_s) for p in alike(measured)]
    assert found == [(118e6, 2e-4), (118e6, 2e-4), (20e6, 1e-4), (118e6, 5e-3)]


def test_a_slow_pair_holds_up_its_own_message_and_nothing_else_of_its_ends() -> None:
    """What A and B send each other takes ten times as long, and C gets its part as before."""
    g = chain()
    plan = bands(g, (2,), (A, B, C))
    even = [profile(d) for d in (A, B, C)]
    slow = [
        replace(even[0], links=(PairLink(B, 1e4, 0.5),)),
        replace(even[1], links=(PairLink(A, 1e4, 0.5),)),
        even[2],
    ]
    before, after = timeline(g, plan, even), timeline(g, plan, slow)
    passed = {(A, B): 0.0, (B, A): 0.0}
    for t in after.transfers:
        way = (t.sender, t.receiver)
        if way in passed:  # one after another, each in ten times the time
            passed[way] = max(t.start_s, passed[way]) + (t.nbytes + MESSAGE) / 1e4
            assert t.end_s == pytest.approx(passed[way] + 0.5)
        else:
            assert t.end_s == pytest.approx(t.start_s + (t.nbytes + MESSAGE) / 1e5 + 0.25)
    assert all(passed.values())
    scatter = [[t for t in x.transfers if t.producer.stage < 0] for x in (before, after)]
    assert [t.start_s for t in scatter[0]] == [t.start_s for t in scatter[1]]
    assert after.total_s > before.total_s


def test_pairs_that_their_ends_explain_are_not_kept_and_either_end_may_have_measured() -> None:
    ends = [profile(d, latency_s=0.001) for d in (A, B, C)]
    measured = [
        replace(ends[0], links=(PairLink(B, 5e4, 0.001), PairLink(C, 9e4, 0.002))),
        replace(ends[1], links=(PairLink(C, 1e5, 0.0),)),
        ends[2],
    ]
    found = apart_links(measured)
    assert [p.links for p in found] == [(PairLink(B, 5e4),), (PairLink(A, 5e4),), ()]
    uniform = [replace(p, links=tuple(PairLink(d, 1e5, 0.001) for d in (A, B, C))) for p in ends]
    assert apart_links(uniform) == ends, "so predictions are the same to the last bit"
