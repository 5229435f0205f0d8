"""The report of a deployment: what was folded, what is a barrier and why, who holds how much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import onnx
import pytest
from architectures import Builder
from cores import banded
from typer.testing import CliRunner

import meshinfer as mi
from cluster.cli import app
from meshinfer import limits
from meshinfer.cost import DeviceProfile, timeline
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.lower import lower
from meshinfer.ops import BARRIER, rule_of, why_barrier
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.planner import make_plan
from meshinfer.protocol.report import Report
from meshinfer.report import report_of

HEAD, ONE, TWO = DeviceId("head"), DeviceId("pi-1"), DeviceId("pi-2")


def folding() -> onnx.ModelProto:
    """Convolutions with BatchNormalization, an Identity, and determinants, which have no rule."""
    b = Builder(5)
    x = b.input("image", [1, 3, 24, 24])
    for channels in (3, 8):
        x = b.relu(b.bn(b.conv(x, channels, 8, 3), 8))
    return b.model([b.rename(b.op("Det", b.op("Identity", x)), "y")])


def wide(layers: int = 2) -> onnx.ModelProto:
    b = Builder(6)
    x = b.input("image", [1, 3, 32, 32])
    for channels in (3, *([16] * (layers - 1))):
        x = b.relu(b.conv(x, channels, 16, 3))
    return b.model([b.rename(x, "y")])


def expected(graph: Graph, plan: Plan) -> Report:
    profiles = [DeviceProfile(id=device, flops_per_s=1e9) for device in (ONE, TWO)]
    return report_of(graph, plan, timeline(graph, plan, profiles), ("a note",))


def spread(graph: Graph) -> Plan:
    """A planned one, since barriers are in the way of bands."""
    profiles = [DeviceProfile(id=device, flops_per_s=1e9) for device in (ONE, TWO)]
    return make_plan(graph, profiles, HEAD, HEAD, spread=True).plan


def whole(graph: Graph, device: DeviceId, start: int, stop: int) -> Stage:
    """A stage in one task on one device."""
    outputs = tuple(Shard(name, graph.whole(name)) for name in graph.live_outputs(start, stop))
    return Stage(start, stop, (Task((device,), outputs),))


def test_what_was_folded_is_counted_by_operator() -> None:
    report = expected(graph := mi.load(folding()), banded(graph, [ONE], HEAD))
    given = [node.op_type for node in folding().graph.node]
    assert report.folded.before == len(given)
    assert report.folded.after == len(graph.ops)
    assert report.folded.gone["BatchNormalization"] == 2 and report.folded.gone["Identity"] == 1
    gone, new = report.folded.gone, report.folded.new
    assert report.folded.before - sum(gone.values()) + sum(new.values()) == len(graph.ops)
    assert "2 BatchNormalization" in str(report)


def test_barriers_are_grouped_with_their_reasons() -> None:
    graph = mi.load(folding())
    report = expected(graph, spread(graph))
    barriers = [op for op in graph.ops if rule_of(op) is BARRIER]
    assert sum(each.count for each in report.barriers) == len(barriers) > 0
    found = {each.op: each for each in report.barriers}
    (det,) = (op for op in barriers if op.type == "Det")
    assert found["Det"].why == why_barrier(det) != ""
    assert found["Det"].nodes == (det.proto.name,)
    assert f"barrier, whole on one device: 1 Det: {why_barrier(det)}" in report.lines


def test_a_model_without_barriers_says_so() -> None:
    graph = mi.load(wide())
    report = expected(graph, banded(graph, [ONE, TWO], HEAD))
    assert report.barriers == ()
    assert "barriers, which run whole on one device: none" in report.lines


def test_the_share_distributed_is_that_of_nodes_on_two_devices_and_more() -> None:
    graph = mi.load(wide(4))
    ends = (graph.digest, HEAD, HEAD)
    alone = Plan(*ends, (whole(graph, ONE, 0, len(graph.ops)),))
    assert expected(graph, alone).distributed == 0.0
    assert expected(graph, banded(graph, [ONE, TWO], HEAD)).distributed == 1.0
    cut = graph.cut_points[len(graph.cut_points) // 2]
    rest = banded(graph, [ONE, TWO], HEAD).stages
    (cut,) = [c for c in graph.cut_points if c == 4]
    half = Plan(*ends, (whole(graph, ONE, 0, cut), *(s for s in rest if s.start >= cut)))
    mi.validate(graph, half)
    # The first of four convolutions reads 3 channels, the others 16; ReLUs are one an element.
    inner, outer, relu = 2 * 16 * 16 * 9, 2 * 16 * 3 * 9, 16
    share = 2 * (inner + relu) / (3 * inner + outer + 4 * relu)
    assert expected(graph, half).distributed == pytest.approx(share, abs=0.02)


def test_a_pipeline_is_not_distributed_and_overlap_does_not_count() -> None:
    graph = mi.load(wide(4))
    ends = (graph.digest, HEAD, HEAD)
    pipeline = Plan(*ends, (whole(graph, ONE, 0, 4), whole(graph, TWO, 4, len(graph.ops))))
    assert expected(graph, pipeline).distributed == 0.0
    y = graph.whole("y")
    halves = [y.replace(2, type(y[2])(a, b)) for a, b in ((0, 16), (16, 32))]
    tasks = tuple(Task((d,), (Shard("y", b),)) for d, b in zip((ONE, TWO), halves, strict=True))
    fused = Plan(*ends, (Stage(0, len(graph.ops), tasks),))
    mi.validate(graph, fused)
    assert expected(graph, fused).distributed == 1.0


def test_each_device_holds_the_weights_that_its_tasks_read() -> None:
    graph = mi.load(wide(3))
    plan = banded(graph, [ONE, TWO], HEAD)
    report = expected(graph, plan)
    assert [each.device for each in report.devices] == [ONE, TWO]
    for each in report.devices:
        held = {
            weight.digest: weight.nbytes
            for stage in plan.stages
            for task in stage.tasks
            if task.devices[0] == each.device
            for weight in lower(graph, stage, task).weights
        }
        small = 3 * 16 * 4  # biases lie in the submodels
        assert each.weights_bytes == pytest.approx(sum(held.values()), abs=small) and held
        largest = 16 * 16 * 32 * 4  # what one task makes, at least
        assert each.peak_bytes >= each.weights_bytes + largest


def test_a_report_travels_and_nothing_else_passes_for_one() -> None:
    graph = mi.load(folding())
    report = expected(graph, spread(graph))
    data = msgspec.msgpack.encode(report)
    assert msgspec.msgpack.decode(data, type=Report) == report
    fields = msgspec.to_builtins(report)
    line = "x" * (limits.REPORT_LINE_CHARS + 1)
    for wrong in (
        {**fields, "more": 1},
        {**fields, "distributed": 1.5},
        {**fields, "notes": [line]},
        {**fields, "barriers": fields["barriers"] * (limits.REPORT_ENTRIES + 1)},
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, Report)


def test_long_names_and_many_kinds_of_barriers_fit_into_a_report() -> None:
    b = Builder(0)
    x = b.input("image", [4, 4])
    outputs = [b.op("Det", x)]
    model = b.model([b.rename(outputs[0], "y")])
    model.graph.node[0].name = "n" * 5000
    graph = mi.load(model)
    report = expected(graph, banded(graph, [ONE], HEAD))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=Report) == report
    assert len(report.barriers[0].nodes[0]) == limits.REPORT_LINE_CHARS


def test_lines_are_the_notes_and_then_the_facts() -> None:
    graph = mi.load(wide())
    report = expected(graph, banded(graph, [ONE, TWO], HEAD))
    assert report.lines[0] == "a note" and report.lines[1:] == report.facts
    assert str(report) == "\n".join(report.lines)
    assert any(line.startswith("pi-1 holds ") for line in report.facts)


# --- where people meet it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(2) as made:
        yield made


def test_deploy_returns_the_report(cluster: mi.LocalCluster) -> None:
    with cluster.client() as client:
        made = client.deploy("folding", folding(), spread=True)
        again = client.deploy("folding", folding(), plan=made.plan)
    report = made.report
    assert report is not None and report.folded.gone["BatchNormalization"] == 2
    assert {each.op for each in report.barriers} >= {"Det"}
    assert 0.9 < report.distributed <= 1.0 and report.expected_s > 0 and report.bound
    assert {each.device for each in report.devices} == {"worker-0", "worker-1"}
    assert again.report is not None and again.report.notes[0] == "the plan was given"
    same = ("folded", "barriers", "distributed", "devices")
    assert all(getattr(again.report, name) == getattr(report, name) for name in same)


def test_the_command_line_prints_the_report(cluster: mi.LocalCluster, tmp_path: Path) -> None:
    path = str(tmp_path / "folding.onnx")
    onnx.save_model(folding(), path)
    where = ["--coordinator", cluster.address, "--keyring", str(cluster.keyring)]
    where += ["--cluster", cluster.cluster]
    plan = CliRunner().invoke(app, ["plan", path, "--devices", "2", "--spread"])
    mi.Plan.parse(plan.stdout)
    for words in ("2 BatchNormalization", "1 Det: ", "of the FLOPs", "worker-0 holds "):
        assert words in plan.stderr
    shown = CliRunner().invoke(app, ["plan", path, "--devices", "2", "--spread", "--json"])
    planned = msgspec.convert(json.loads(shown.stdout)["report"], Report)
    done = CliRunner().invoke(app, ["deploy", "told", path, "--spread", "--json", *where])
    deployed = msgspec.convert(json.loads(done.stdout)["report"], Report)
    assert (planned.folded, planned.barriers) == (deployed.folded, deployed.barriers)
    said = CliRunner().invoke(app, ["deploy", "told", path, "--spread", *where])
    assert "1 Det: " in said.stderr and "of the FLOPs" in said.stderr
