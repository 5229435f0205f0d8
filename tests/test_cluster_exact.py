"""The cluster gives plain onnxruntime's answer, and its bytes go from worker to worker as derived.

Three uneven workers; plans by the planner and given ones: grids, channel slices, partial sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import ALL, Builder
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from networks import networks
from onnx import TensorProto, helper
from oracle import assert_exact
from plans import DEVICES, plans
from processes import small_model
from test_architectures_exact import QUICK, TILINGS, Tiling, tiled

import meshinfer as mi
from meshinfer.geometry import split_even
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.ops import rule_of
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.transfers import derive

Arrays = Mapping[str, np.ndarray]
HEAD = DeviceId("head")
WORKERS = tuple(DeviceId(f"worker-{i}") for i in range(3))
WITHIN_S = 40.0


@pytest.fixture(scope="module")
def client() -> Iterator[mi.Client]:
    with mi.LocalCluster(3, speeds=[1.0, 0.6, 0.3]) as cluster, cluster.client() as made:
        yield made


def on_workers(plan: Plan) -> Plan:
    """The plan on the cluster's devices, whatever its own were called."""
    names = {name: WORKERS[i % 3] for i, name in enumerate(("pi-0", *DEVICES))}
    stages = []
    for stage in plan.stages:
        tasks = [
            Task(tuple(dict.fromkeys(names[d] for d in task.devices)), task.outputs)
            for task in stage.tasks
        ]
        stages.append(Stage(stage.start, stage.stop, tuple(tasks)))
    return Plan(plan.graph, HEAD, HEAD, tuple(stages))


def check(
    client: mi.Client,
    model: onnx.ModelProto,
    inputs: Arrays,
    plan: Plan | None = None,
    count: bool = True,
) -> mi.Result:
    """Deploy, infer, compare with the oracle, and count the bytes against those derived.

    ``count`` is left out where sizes depend on the data, so that they cannot be derived.
    """
    deployed = client.deploy("model", model, plan=plan, spread=True)
    result = client.infer("model", inputs, deadline_s=WITHIN_S)
    assert_exact(model, inputs, result.outputs)
    assert deployed.plan is None or result.plan == deployed.plan
    if count:
        assert moved(result) == derived(mi.load(model), mi.Plan.parse(result.plan))
    return result


def moved(result: mi.Result) -> dict[str, int]:
    """Bytes that left each worker."""
    return {device: n for device, n in result.timing.sent_bytes.items() if n}


def derived(graph: Graph, plan: Plan) -> dict[str, int]:
    """Bytes that should leave each worker."""
    total: dict[str, int] = {}
    for (sender, _), nbytes in derive(graph, plan).bytes_between(graph).items():
        if sender != HEAD and nbytes:
            total[sender] = total.get(sender, 0) + nbytes
    return total


def between_workers(graph: Graph, plan: Plan) -> int:
    pairs = derive(graph, plan).bytes_between(graph)
    return sum(n for (a, b), n in pairs.items() if HEAD not in (a, b))


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def quick(name: str) -> tuple[onnx.ModelProto, Arrays]:
    model = ALL[name](**QUICK[name])
    (value,) = model.graph.input
    return model, {value.name: normal(*(d.dim_value for d in value.type.tensor_type.shape.dim))}


# --- architectures


@pytest.mark.parametrize("name", ALL)
def test_an_architecture_is_exact_under_the_planners_plan(client: mi.Client, name: str) -> None:
    model, inputs = quick(name)
    result = check(client, model, inputs)
    plan = mi.Plan.parse(result.plan)
    assert set(plan.devices()) == set(WORKERS), "spread: every device has work"


@pytest.mark.parametrize("name", ["squeezenet1_1", "sppf"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_an_architecture_is_exact_under_a_given_plan_of_many_stages(
    client: mi.Client, name: str, tiling: Tiling
) -> None:
    model, inputs = quick(name)
    graph = mi.load(model)
    plan = on_workers(tiled(graph, tiling, 3, 4))
    assert len(plan.stages) > 3
    # A plan that moves nothing from worker to worker would prove nothing here.
    assert between_workers(graph, plan) > 0
    result = check(client, model, inputs, plan)
    assert mi.Plan.parse(result.plan) == plan
    assert set(moved(result)) == set(WORKERS)


def test_the_planners_plan_of_several_stages_moves_bytes_between_workers(
    client: mi.Client,
) -> None:
    model, inputs = quick("vgg16")
    result = check(client, model, inputs)
    plan = mi.Plan.parse(result.plan)
    assert len(plan.stages) > 1
    assert between_workers(mi.load(model), plan) > 0
    to_head = sum(a.nbytes for a in result.outputs.values())
    assert sum(moved(result).values()) > to_head, "only the answer was sent: no worker to worker"


def test_partial_sums_are_added_at_their_reader(client: mi.Client) -> None:
    b = Builder(0)
    x = b.input("image", [1, 8, 12, 10])
    model = b.model([b.rename(b.conv(b.gap(b.conv(x, 8, 8, 3)), 8, 4, 1), "y")])
    graph = mi.load(model)
    mean = next(i for i, op in enumerate(graph.ops) if op.type == "GlobalAveragePool")
    value = graph.ops[mean].outputs[0]
    reduction = rule_of(graph.ops[mean]).reduction(graph.ops[mean])
    assert reduction is not None
    parts = [
        Task((WORKERS[i],), (Shard(value, graph.whole(value), part),))
        for i, part in enumerate(split(reduction, 3))
    ]
    before = graph.live_outputs(0, mean)
    first = Stage(0, mean, (Task((WORKERS[2],), tuple(Shard(n, graph.whole(n)) for n in before)),))
    last = Stage(mean + 1, len(graph.ops), (Task((WORKERS[1],), (Shard("y", graph.whole("y")),)),))
    plan = Plan(graph.digest, HEAD, HEAD, (first, Stage(mean, mean + 1, tuple(parts)), last))
    check(client, model, {"image": normal(1, 8, 12, 10)}, plan)


def split(box: Any, count: int) -> list[Any]:
    """A box in slices along its first axis."""
    return [box.replace(0, part) for part in split_even(box[0].size, count)]


# --- random networks


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_a_random_network_under_a_random_plan_is_exact(client: mi.Client, data: Any) -> None:
    network = data.draw(networks())
    graph = mi.load(network.model)
    plan = on_workers(data.draw(plans(graph)))
    assume(graph.outputs and travels(graph))
    check(client, network.model, network.inputs, plan, count=False)


def travels(graph: Graph) -> bool:
    return all(graph.dtype(name) is not None for name in (*graph.inputs, *graph.outputs))


# --- barriers, types, shapes


def model_of(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], *init: Any
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializer=list(init))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def value(name: str, kind: int, shape: list[Any] | None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


FLOAT = TensorProto.FLOAT


def barriers() -> tuple[onnx.ModelProto, Arrays]:
    """Conv, Resize, TopK and an If that captures, then data-dependent NonZero."""
    b = Builder(0)
    x = b.input("image", [1, 3, 12, 12])
    y = b.conv(x, 3, 4, 3)
    sizes = b.const(np.array([1.0, 1.0, 1.7, 1.7], np.float32))
    big = b.op("Resize", [y, "", sizes], mode="linear")
    k = b.const(np.array([5], np.int64))
    top, places = b.op("TopK", [b.flatten(big), k], outputs=2)
    found = b.op("NonZero", b.op("Greater", [top, b.const(np.float32(0.5))]))
    names = [b.rename(v, n) for v, n in ((top, "top"), (places, "places"), (found, "found"))]
    return b.model([b.rename(big, "big"), *names]), {"image": normal(1, 3, 12, 12)}


def suppression() -> tuple[onnx.ModelProto, Arrays]:
    nodes = [
        helper.make_node("Sigmoid", ["raw"], ["scores"]),
        helper.make_node(
            "NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["kept"]
        ),
    ]
    model = model_of(
        nodes,
        [value("boxes", FLOAT, [1, 20, 4]), value("raw", FLOAT, [1, 2, 20])],
        [value("kept", TensorProto.INT64, ["n", 3]), value("scores", FLOAT, [1, 2, 20])],
        helper.make_tensor("most", TensorProto.INT64, [1], [5]),
        helper.make_tensor("overlap", FLOAT, [1], [0.5]),
        helper.make_tensor("least", FLOAT, [1], [0.6]),
    )
    corners = np.sort(np.abs(normal(1, 20, 2, 2)), axis=2).reshape(1, 20, 4)
    return model, {"boxes": corners, "raw": normal(1, 2, 20)}


def branching() -> tuple[onnx.ModelProto, Arrays]:
    then = helper.make_graph(
        [helper.make_node("Mul", ["y", "two"], ["a"])], "then", [], [value("a", FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["y"], ["b"])], "else", [], [value("b", FLOAT, None)]
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "two"], ["large"]),
        helper.make_node("If", ["large"], ["z"], then_branch=then, else_branch=other),
    ]
    return (
        model_of(
            nodes,
            [value("x", FLOAT, [1, 2, 8, 8])],
            [value("z", FLOAT, [1, 2, 8, 8]), value("large", TensorProto.BOOL, [])],
            helper.make_tensor("two", FLOAT, [], [2.0]),
        ),
        {"x": normal(1, 2, 8, 8)},
    )


@pytest.mark.parametrize("make", [barriers, suppression, branching])
def test_a_model_with_barriers_is_exact(client: mi.Client, make: Any) -> None:
    model, inputs = make()
    check(client, model, inputs, count=False)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.UINT8, np.uint8),
        (TensorProto.INT64, np.int64),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.BOOL, np.bool_),
        (TensorProto.INT32, np.int32),
    ],
)
@pytest.mark.parametrize("shape", [[1, 2, 9, 7], [4, 3], [], [0, 3]])
def test_every_type_and_rank_travels(
    client: mi.Client, kind: int, dtype: Any, shape: list[int]
) -> None:
    array = np.asarray(np.abs(normal(*shape)) * 50).astype(dtype).reshape(shape)
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Cast", ["x"], ["number"], to=FLOAT),
        helper.make_node("Add", ["number", "one"], ["more"]),
    ]
    model = model_of(
        nodes,
        [value("x", kind, shape)],
        [value("same", kind, shape), value("more", FLOAT, shape)],
        helper.make_tensor("one", FLOAT, [], [1.0]),
    )
    check(client, model, {"x": array})


def test_several_inputs_are_fed_and_several_outputs_come_back(client: mi.Client) -> None:
    b = Builder(0)
    left, right = b.input("left", [1, 3, 16, 12]), b.input("right", [1, 3, 16, 12])
    total = b.add(b.conv(left, 3, 6, 3), b.conv(right, 3, 6, 3))
    model = b.model([b.rename(b.conv(total, 6, 2, 1), "y"), b.rename(b.gap(total), "mean")])
    inputs = {"left": normal(1, 3, 16, 12), "right": normal(1, 3, 16, 12) + 1}
    check(client, model, inputs)


def test_an_output_without_any_element_comes_back(client: mi.Client) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Slice", ["y", "from", "to"], ["none"]),
        helper.make_node("NonZero", ["none"], ["nothing"]),
    ]
    ends = [helper.make_tensor(n, TensorProto.INT64, [1], [0]) for n in ("from", "to")]
    model = model_of(
        nodes,
        [value("x", FLOAT, [4, 3])],
        [value("y", FLOAT, [4, 3]), value("none", FLOAT, [0, 3]),
         value("nothing", TensorProto.INT64, [2, "n"])],
        *ends,
    )  # fmt: skip
    result = check(client, model, {"x": normal(4, 3)}, count=False)
    assert result.outputs["none"].shape == (0, 3)
    assert result.outputs["nothing"].shape == (2, 0)


def test_a_plan_must_start_and_end_at_the_head(client: mi.Client) -> None:
    model = small_model()
    plan = mi.Plan.parse(client.deploy("model", model, spread=True).plan or "")
    for source, sink in ((WORKERS[0], HEAD), (HEAD, WORKERS[0])):
        moved_ends = Plan(plan.graph, source, sink, plan.stages)
        with pytest.raises(mi.InvalidInput, match="head"):
            client.deploy("model", model, plan=moved_ends, timeout_s=20)


def test_two_threads_a_worker_are_held_to_onnxruntime_with_two() -> None:
    model, inputs = quick("squeezenet1_1")
    with mi.LocalCluster(2, threads=2) as cluster, cluster.client() as client:
        assert {d.facts.threads for d in client.devices()} == {0, 2}
        client.deploy("model", model, spread=True)
        assert_exact(model, inputs, client.infer("model", inputs).outputs, threads=2)
