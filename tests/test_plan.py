"""A plan is refused unless it computes each live value once; its text reads back, or names a
line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from architectures import Builder
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import meshinfer as mi
from meshinfer.errors import InvalidInput
from meshinfer.geometry import Box, Interval
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId, Digest
from meshinfer.plan import Plan, Shard, Stage, Task

PI_1, PI_2 = DeviceId("pi-1"), DeviceId("pi-2")


@pytest.fixture(scope="module")
def graph() -> Graph:
    """A conv [1,4,8,8], its mean [1,4,1,1] that is an output too, and their product."""
    b = Builder(0)
    x = b.rename(b.conv(b.input("image", [1, 3, 8, 8]), 3, 4, 3), "map")
    mean = b.rename(b.gap(x), "mean")
    return mi.load(b.model([mean, b.rename(b.op("Mul", [x, mean]), "out")]))


def halves(value: str, whole: Box, over: Box | None = None) -> list[Task]:
    """Two tasks, each a half of the rows; of the sum where ``over`` is given."""
    rows = [Interval(0, 4), Interval(4, 8)]
    if over is not None:
        parts = [Shard(value, whole, over.replace(0, r)) for r in rows]
    else:
        parts = [Shard(value, whole.replace(2, r)) for r in rows]
    return [Task((PI_1,), (parts[0],)), Task((PI_2, PI_1), (parts[1],))]


def good(graph: Graph) -> Plan:
    stages = (
        Stage(0, 1, tuple(halves("map", graph.whole("map")))),
        Stage(1, 2, tuple(halves("mean", graph.whole("mean"), Box.of((0, 8), (0, 8))))),
        Stage(2, 3, tuple(halves("out", graph.whole("out")))),
    )
    return Plan(graph.digest, PI_1, PI_2, stages)


def with_stage(plan: Plan, index: int, tasks: list[Task]) -> Plan:
    stages = list(plan.stages)
    stages[index] = replace(stages[index], tasks=tuple(tasks))
    return replace(plan, stages=tuple(stages))


def refused(graph: Graph, plan: Plan, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as caught:
        mi.validate(graph, plan)
    assert caught.value.hint


def test_a_good_plan_is_accepted_and_reads_back(graph: Graph) -> None:
    mi.validate(graph, good(graph))
    assert Plan.parse(str(good(graph))) == good(graph)


def test_a_plan_of_another_graph_is_refused(graph: Graph) -> None:
    refused(graph, replace(good(graph), graph=Digest("0" * 64)), "made for graph 0000")


def test_the_same_nodes_under_another_opset_are_another_graph() -> None:
    digests = set()
    for opset in (11, 17):
        b = Builder(0, opset)
        digests.add(mi.load(b.model([b.op("Tanh", b.input("x", [2, 3]))])).digest)
    assert len(digests) == 2


def shrunk(task: Task, axis: int, by: tuple[int, int]) -> Task:
    (shard,) = task.outputs
    old = shard.box[axis]
    box = shard.box.replace(axis, Interval(old.start + by[0], old.stop + by[1]))
    return replace(task, outputs=(replace(shard, box=box),))


@pytest.mark.parametrize(
    ("axis", "by"),
    [
        pytest.param(2, (1, 0), id="gap"),
        pytest.param(2, (-1, 0), id="overlap"),
        pytest.param(2, (0, 1), id="out of range"),
        pytest.param(3, (-1, 0), id="negative"),
        pytest.param(2, (4, 0), id="empty"),
    ],
)
def test_boxes_that_do_not_tile_a_value_are_refused(
    graph: Graph, axis: int, by: tuple[int, int]
) -> None:
    plan = good(graph)
    tasks = [plan.stages[0].tasks[0], shrunk(plan.stages[0].tasks[1], axis, by)]
    refused(graph, with_stage(plan, 0, tasks), r"stage 0:1.*'map'.*exactly once")


def test_a_value_that_nobody_computes_is_refused(graph: Graph) -> None:
    plan = replace(good(graph), stages=(Stage(0, 3, tuple(halves("out", graph.whole("out")))),))
    refused(graph, plan, "'mean'.*exactly once")


def test_a_value_that_is_not_alive_is_refused(graph: Graph) -> None:
    tasks = [Task((PI_1,), (Shard("map", graph.whole("map")),))]
    refused(graph, replace(good(graph), stages=(Stage(0, 3, tuple(tasks)),)), "not alive")


def test_a_box_of_another_rank_is_refused(graph: Graph) -> None:
    tasks = [Task((PI_1,), (Shard("map", Box.of((0, 1))),))]
    refused(graph, with_stage(good(graph), 0, tasks), "wrong number of axes")


@pytest.mark.parametrize(
    "devices", [pytest.param((), id="none"), pytest.param((PI_1, PI_1), id="one twice")]
)
def test_a_task_of_no_device_or_of_one_twice_is_refused(
    graph: Graph, devices: tuple[DeviceId, ...]
) -> None:
    tasks = [Task(devices, (Shard("map", graph.whole("map")),))]
    refused(graph, with_stage(good(graph), 0, tasks), "no device, or one twice")


def test_a_task_without_outputs_is_refused(graph: Graph) -> None:
    plan = good(graph)
    refused(graph, with_stage(plan, 0, [*plan.stages[0].tasks, Task((PI_1,), ())]), "outputs")


CHANGED_STAGES: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "left out": (lambda p: replace(p, stages=(p.stages[0], p.stages[2])), "continue at op 1"),
    "ending early": (lambda p: replace(p, stages=p.stages[:2]), "end at op 2 of 3"),
    "none": (lambda p: replace(p, stages=()), "end at op 0 of 3"),
    "no window": (lambda p: replace(p, window=0), "window=0"),
}


@pytest.mark.parametrize("name", CHANGED_STAGES)
def test_stages_that_do_not_follow_each_other_are_refused(graph: Graph, name: str) -> None:
    change, why = CHANGED_STAGES[name]
    refused(graph, change(good(graph)), why)


# -- partial sums --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overs",
    [
        pytest.param([(0, 4), (0, 4)], id="doubled"),
        pytest.param([(0, 4), (5, 8)], id="a part missing"),
        pytest.param([(0, 4), (3, 8)], id="overlapping"),
        pytest.param([(0, 4), (4, 9)], id="beyond the end"),
    ],
)
def test_parts_that_do_not_make_a_sum_once_are_refused(
    graph: Graph, overs: list[tuple[int, int]]
) -> None:
    shards = [Shard("mean", graph.whole("mean"), Box.of(o, (0, 8))) for o in overs]
    plan = with_stage(good(graph), 1, [Task((PI_1,), tuple(shards))])
    refused(graph, plan, "'mean'.*exactly once")


def test_a_partial_sum_of_an_op_that_has_none_is_refused(graph: Graph) -> None:
    tasks = [Task((PI_1,), (Shard("out", graph.whole("out"), Box.of((0, 3))),))]
    refused(graph, with_stage(good(graph), 2, tasks), "no partial sums")


def test_a_partial_sum_that_its_own_stage_reads_is_refused_though_it_is_an_output(
    graph: Graph,
) -> None:
    tasks = halves("mean", graph.whole("mean"), Box.of((0, 8), (0, 8)))
    tasks += halves("out", graph.whole("out"))
    stages = (good(graph).stages[0], Stage(1, 3, tuple(tasks)))
    refused(graph, replace(good(graph), stages=stages), "read inside its own stage")


# -- what cannot be cut ----------------------------------------------------------------------------


def one_task(graph: Graph, start: int, stop: int) -> Stage:
    live = graph.live_outputs(start, stop)
    return Stage(start, stop, (Task((PI_1,), tuple(Shard(v, graph.whole(v)) for v in live)),))


def test_a_cut_where_a_sequence_is_alive_is_refused() -> None:
    b = Builder(0)
    parts = b.op("SplitToSequence", b.input("x", [1, 4, 2]), axis=1)
    graph = mi.load(b.model([b.op("ConcatFromSequence", parts, axis=1)]))
    assert graph.cut_points == ()
    stages = (one_task(graph, 0, 1), one_task(graph, 1, 2))
    refused(graph, Plan(graph.digest, PI_1, PI_1, stages), "op 1 is no cut point")


def random_model(inside: bool) -> Graph:
    """Noise added to a value, by a node of the graph or by one inside an If."""
    b = Builder(0)
    x = b.input("x", [2, 6])
    if inside:
        value = helper.make_tensor_value_info("noise", TensorProto.FLOAT, [2, 6])
        node = helper.make_node("RandomNormalLike", [x], ["noise"])
        body = helper.make_graph([node], "body", [], [value])
        above = b.op("Greater", [b.op("ReduceMean", x, keepdims=0), b.const(np.float32(0))])
        noise = b.op("If", above, then_branch=body, else_branch=body)
    else:
        noise = b.op("RandomNormalLike", x)
    return mi.load(b.model([b.op("Add", [x, noise])]))


@pytest.mark.parametrize("inside", [False, True], ids=["a node", "inside an If"])
def test_a_random_operator_in_several_tasks_is_refused(inside: bool) -> None:
    graph = random_model(inside)
    (name,), last = graph.outputs, len(graph.ops)
    parts = [graph.whole(name).replace(1, Interval(*r)) for r in ((0, 3), (3, 6))]
    tasks = tuple(Task((PI_1,), (Shard(name, part),)) for part in parts)
    refused(graph, Plan(graph.digest, PI_1, PI_1, (Stage(0, last, tasks),)), "must run once")
    stages = (one_task(graph, 0, last - 1), Stage(last - 1, last, tasks))
    mi.validate(graph, Plan(graph.digest, PI_1, PI_1, stages))


# -- the text form -------------------------------------------------------------------------------

TEXT = """plan graph=ab source=pi-1 sink=pi-2 window=1
stage 0:2
  task pi-1,pi-2
    map [0:1,0:4] over [0:8]
    "a b" []
"""


def test_the_text_form_is_read() -> None:
    plan = Plan.parse(TEXT)
    assert plan.stages[0].tasks[0].outputs == (
        Shard("map", Box.of((0, 1), (0, 4)), Box.of((0, 8))),
        Shard("a b", Box(())),
    )
    assert str(plan) == TEXT


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("stage 0:2", "stage 0-2", 2),
        ("stage 0:2", "stage " + "9" * 5000 + ":2", 2),
        ("  task pi-1,pi-2", "  task", 3),
        ("  task pi-1,pi-2", "  task pi-1,,pi-2", 3),
        ("[0:1,0:4]", "[0:1,0]", 4),
        ("[0:1,0:4]", "[0:" + "1" * 5000 + "]", 4),
        (" over [0:8]", " above [0:8]", 4),
        ('"a b"', '"a b', 5),
        ("    map", "   map", 4),
        ("plan graph=ab", "plane graph=ab", 1),
    ],
)
def test_an_error_names_its_line(old: str, new: str, line: int) -> None:
    assert old in TEXT
    with pytest.raises(InvalidInput, match=rf"^plan, line {line}: "):
        Plan.parse(TEXT.replace(old, new))


def test_a_head_that_lacks_a_key_is_refused() -> None:
    with pytest.raises(InvalidInput, match="expected plan graph="):
        Plan.parse(TEXT.replace(" window=1", ""))


LINES = st.sampled_from([*TEXT.splitlines(), "stage 1:9999999999999999999999", '    "\\ud800" []'])


@given(st.one_of(st.text(), st.lists(st.one_of(LINES, st.text())).map("\n".join)))
def test_any_text_is_a_plan_or_invalid_input(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except InvalidInput:
        return
    assert Plan.parse(str(plan)) == plan


@given(st.text(), st.text(min_size=1), st.text(min_size=1))
def test_any_name_survives_the_text_form(value: str, device: str, other: str) -> None:
    tasks = (Task((DeviceId(device), DeviceId(other)), (Shard(value, Box.of((0, 2))),)),)
    plan = Plan(Digest("ab"), DeviceId(device), DeviceId(other), (Stage(0, 1, tasks),))
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize("name", [r'"\ud800"', r'"a\udfff"'])
def test_half_a_character_is_no_name(name: str) -> None:
    """It could not travel on."""
    with pytest.raises(InvalidInput, match="no quoted name"):
        Plan.parse(f"plan graph={name} source=a sink=a window=1\n")


def test_what_is_quoted_of_a_long_line_is_short() -> None:
    with pytest.raises(InvalidInput) as caught:
        Plan.parse("plan " + "!" * 1_000_000)
    assert len(caught.value.message) < 1000
