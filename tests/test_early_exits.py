"""A model with several outputs is asked for some of them: what lies behind them is not computed.

Shown by a node behind the exit that fails when it runs, and by the tasks that ran.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from architectures import Builder
from cores import Cluster, banded, conv_net, image, kind
from onnx import TensorProto, helper
from oracle import assert_exact
from typer.testing import CliRunner

import meshinfer as mi
from cluster.cli import app
from meshinfer import limits
from meshinfer.importers import inputs_needed
from meshinfer.protocol import messages as m
from meshinfer.scheduler.admission import signature_of
from meshinfer.scheduler.catalogue import Catalogue, Model

NAMES = ("exit1", "exit2", "late")
SUBSETS = [wish for count in (1, 2, 3) for wish in itertools.combinations(NAMES, count)]
SIZE = 24


def exits(*, fails: bool = False, rows: int | str = SIZE) -> onnx.ModelProto:
    """Three depths. ``late`` needs a second input, too; ``fails``: behind it a kernel fails."""
    b = Builder(3)
    image = b.input("image", [1, 3, rows, SIZE])
    bias = b.input("bias", [1])
    one = b.relu(b.conv(image, 3, 4, 3))
    two = b.relu(b.conv(one, 4, 6, 3))
    three = b.conv(two, 6, 2, 3)
    late = b.op("Add", [three, bias])
    if fails:  # rows far behind the last
        row = b.op("Cast", b.op("ReduceMax", late, keepdims=0), to=TensorProto.INT64)
        far = b.op("Add", [row, b.const(np.int64(10**6))])
        late = b.op("Gather", [late, far], axis=2)
    return b.model(
        [
            b.rename(b.op("GlobalAveragePool", one), "exit1"),
            b.rename(b.op("GlobalMaxPool", two), "exit2"),
            b.rename(late, "late"),
        ]
    )


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    return {"image": image, "bias": np.ones(1, np.float32)}


# --- in this process ------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", SUBSETS, ids="+".join)
def test_each_set_of_outputs_is_the_models_own_in_bands(outputs: tuple[str, ...]) -> None:
    model = exits()
    graph = mi.load(model, outputs=outputs)
    plan = banded(graph, ["pi-1", "pi-2", "pi-3"], "pi-1")
    given = {name: array for name, array in inputs().items() if name in graph.inputs}
    assert_exact(model, inputs(), mi.run_plan(graph, plan, given), outputs=outputs)


def test_what_lies_behind_an_exit_is_not_in_its_graph() -> None:
    whole, early = mi.load(exits()), mi.load(exits(), outputs=["exit1"])
    assert early.outputs == ("exit1",) and early.inputs == ("image",)
    assert sum(op.type == "Conv" for op in early.ops) == 1 < len(whole.ops) / 3
    kept = {early.shape(name) for name in early.model.graph.initializers}
    assert (4, 3, 3, 3) in kept and (6, 4, 3, 3) not in kept
    assert early.digest != whole.digest


def test_the_shape_of_an_input_that_is_not_needed_may_be_given() -> None:
    graph = mi.load(
        exits(rows="rows"),
        shapes={"image": (1, 3, 16, SIZE), "bias": (1,)},
        outputs=["exit2"],
    )
    assert graph.shape("image") == (1, 3, 16, SIZE)


@pytest.mark.parametrize(("outputs", "told"), [(["exit3"], "'exit3'"), ([], "no output")])
def test_what_is_no_output_is_refused_and_the_outputs_are_listed(
    outputs: list[str], told: str
) -> None:
    with pytest.raises(mi.InvalidInput, match=told) as raised:
        mi.load(exits(), outputs=outputs)
    assert str(list(NAMES)) in raised.value.hint


def test_what_a_subgraph_reads_from_outside_is_kept() -> None:
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["kept"], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, [2])],
        )
        for op in ("Neg", "Abs")
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["kept"]),
        helper.make_node("Exp", ["x"], ["dropped"]),
        helper.make_node("If", ["which"], ["a"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Log", ["dropped"], ["b"]),
    ]
    value = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [value("x", TensorProto.FLOAT, [2]), value("which", TensorProto.BOOL, [])],
            [value("a", TensorProto.FLOAT, [2]), value("b", TensorProto.FLOAT, [2])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=10,
    )
    assert inputs_needed(model) == {"a": ("x", "which"), "b": ("x",)}
    graph = mi.load(model, outputs=["a"])
    assert {op.type for op in graph.ops} == {"Relu", "If"}
    given = {"x": np.array([-1, 2], np.float32), "which": np.array(True)}
    plan = banded(graph, ["pi-1"], "pi-1")
    assert_exact(model, given, mi.run_plan(graph, plan, given), outputs=["a"])


# --- what the coordinator keeps -------------------------------------------------------------------


def opened() -> Model:
    digest = "0" * 64
    model = Catalogue().open(m.Deploy(call="c", name="n", digest=digest, nbytes=1), "ann", 0.0)
    model.inputs = {"image": ("<f4", (1, None)), "bias": ("<f4", (1,))}
    model.outputs = {
        "late": ("image", "bias"),
        **{f"exit{i}": ("image",) for i in range(3 * limits.EXITS_PER_MODEL)},
    }
    return model


def submit(outputs: tuple[str, ...] | None, rows: int = 1, bias: bool = True) -> m.Submit:
    tensors = [m.Tensor(name="image", dtype="<f4", shape=(1, rows))]
    if bias:
        tensors.append(m.Tensor(name="bias", dtype="<f4", shape=(1,)))
    return m.Submit(
        request="r",
        model="n",
        version=None,
        inputs=tuple(tensors),
        picture=False,
        deadline_s=1.0,
        outputs=outputs,
    )


def test_plans_of_exits_are_bounded_and_do_not_push_out_those_of_all_outputs() -> None:
    model = opened()
    everything = signature_of(model, submit(None))
    model.asked_for(everything)
    for name in model.outputs:
        model.asked_for(signature_of(model, submit((name,))))
    assert everything in model.signatures
    assert len(model.signatures) == 1 + limits.EXITS_PER_MODEL
    for rows in range(3 * limits.SHAPES_PER_MODEL):
        model.asked_for(signature_of(model, submit(None, rows)))
    assert len(model.signatures) == limits.SHAPES_PER_MODEL + limits.EXITS_PER_MODEL


def test_equal_wishes_share_a_plan() -> None:
    model = opened()
    every = tuple(model.outputs)
    same = [
        {signature_of(model, submit(wish)) for wish in wishes}
        for wishes in (
            [None, every, tuple(reversed(every))],
            [("exit1", "exit2"), ("exit2", "exit1"), ("exit1", "exit2", "exit1")],
        )
    ]
    assert [len(each) for each in same] == [1, 1]
    early = ("exit1",)
    assert signature_of(model, submit(early)) == signature_of(model, submit(early, bias=False))


def test_an_exit_starts_again_when_a_worker_is_lost_and_the_default_plan_stays() -> None:
    cluster = Cluster()
    cluster.deployed()
    cluster.check(cluster.submit())
    cluster.when(kind(m.Deliver, by="pi-1"), lambda: cluster.kill("pi-2"))
    request = cluster.submit(outputs=("mean",))
    outcome = cluster.outcome(request)
    assert isinstance(outcome.reply, m.Reply) and outcome.reply.failure is None
    assert outcome.reply.attempts == 2
    assert_exact(conv_net(), image(), outcome.arrays, outputs=["mean"])
    assert cluster.check(cluster.submit()).attempts == 1
    kept = {d.signature.outputs for d in cluster.core.catalogue.deployments.values()}
    assert kept == {None, ("mean",)}
    refused = cluster.failure(cluster.submit(outputs=("nope",)))
    assert refused.error == "InvalidInput" and "['y', 'mean']" in refused.hint
    cluster.check_idle()


# --- on a cluster ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(2) as made:
        yield made


@pytest.fixture(scope="module")
def client(cluster: mi.LocalCluster) -> Iterator[mi.Client]:
    with cluster.client() as made:
        made.deploy("exits", exits(), spread=True)
        yield made


def check(result: mi.Result, outputs: Mapping[str, Any] | tuple[str, ...]) -> None:
    assert list(result.outputs) == list(outputs)
    assert_exact(exits(), inputs(), result.outputs, outputs=list(outputs))


def test_an_exit_before_a_kernel_that_fails_is_answered(client: mi.Client) -> None:
    client.deploy("fails", exits(fails=True))
    with pytest.raises(mi.InvalidInput, match="a task failed"):
        client.infer("fails", inputs(), deadline_s=30)
    result = client.infer("fails", inputs(), outputs=["exit2"], deadline_s=30)
    check(result, ("exit2",))
    assert result.attempts == 1


def test_an_exit_runs_no_task_of_what_lies_behind(client: mi.Client) -> None:
    whole, early = client.infer("exits", inputs()), None
    check(whole, NAMES)
    early = client.infer("exits", inputs(), outputs=["exit1"])
    check(early, ("exit1",))
    plan = mi.Plan.parse(early.plan)
    assert plan.graph == mi.load(exits(), outputs=["exit1"]).digest
    assert {task.place for task in early.timing.tasks} == {
        (s, t) for s, stage in enumerate(plan.stages) for t in range(len(stage.tasks))
    }
    assert plan.stages[-1].stop < mi.Plan.parse(whole.plan).stages[-1].stop


def test_outputs_come_in_the_order_asked_and_once(client: mi.Client) -> None:
    check(client.infer("exits", inputs(), outputs=["late", "exit1", "late"]), ("late", "exit1"))


def test_inputs_that_an_exit_does_not_need_may_be_left_out(client: mi.Client) -> None:
    image = {"image": inputs()["image"]}
    check(client.infer("exits", image, outputs=["exit1", "exit2"]), ("exit1", "exit2"))
    for outputs in (None, ["late"]):
        with pytest.raises(mi.InvalidInput, match="was given the inputs") as raised:
            client.infer("exits", image, outputs=outputs)
        assert "bias" in raised.value.hint


@pytest.mark.parametrize("outputs", [["exit9"], [], "exit1", [""], [None], ["x" * 600]])
def test_names_that_are_no_outputs_are_refused(client: mi.Client, outputs: Any) -> None:
    with pytest.raises(mi.InvalidInput) as raised:
        client.infer("exits", inputs(), outputs=outputs)
    assert raised.value.hint
    if outputs == ["exit9"]:
        assert str(list(NAMES)) in raised.value.hint


def test_a_model_lists_its_outputs(client: mi.Client) -> None:
    (found,) = (info for info in client.models() if info.name == "exits")
    assert found.outputs == NAMES and found.inputs == ("image", "bias")


def test_submit_map_and_the_async_client_take_outputs(
    cluster: mi.LocalCluster, client: mi.Client
) -> None:
    check(client.submit("exits", inputs(), outputs=["exit2"]).result(timeout=60), ("exit2",))
    for result in client.map("exits", [inputs()] * 3, outputs=["exit1"]):
        check(result, ("exit1",))

    async def use() -> None:
        async with mi.AsyncClient(
            cluster.address, keyring=cluster.keyring, cluster=cluster.cluster
        ) as other:
            check(await other.infer("exits", inputs(), outputs=["exit1"]), ("exit1",))

    asyncio.run(use())


def test_a_given_plan_serves_all_outputs_and_exits_get_their_own(client: mi.Client) -> None:
    text = client.deploy("given", exits(), spread=True).plan
    client.deploy("given", exits(), plan=text)
    assert client.infer("given", inputs()).plan == text
    result = client.infer("given", inputs(), outputs=["exit1"])
    check(result, ("exit1",))
    assert result.plan != text


def test_dynamic_models_have_exits_of_each_shape(client: mi.Client) -> None:
    model = exits(rows="rows")
    client.deploy("dynamic", model)
    for rows in (16, 20):
        given = inputs()
        given["image"] = np.ascontiguousarray(given["image"][:, :, :rows])
        result = client.infer("dynamic", given, outputs=["exit2"])
        assert_exact(model, given, result.outputs, outputs=["exit2"])


def test_a_picture_that_was_not_asked_for_is_refused_in_words(client: mi.Client) -> None:
    b = Builder(0)
    b.op("Identity", b.input("image", [1, 3, 8, 8]))
    y = b.rename(b.relu("image"), "y")
    mean = b.rename(b.op("GlobalAveragePool", y), "mean")
    client.deploy("pictures", b.model([y, mean]), image=mi.ImageSpec(input="image", output="y"))
    pixels = np.zeros((8, 8, 3), np.uint8)
    assert client.infer("pictures", pixels).picture().pixels.shape == (1, 8, 8, 3)
    result = client.infer("pictures", pixels, outputs=["mean"])
    with pytest.raises(mi.InvalidInput, match="'y', the picture, was not asked for"):
        result.picture()


# --- from the command line ------------------------------------------------------------------------


def test_the_command_line_asks_for_outputs(
    cluster: mi.LocalCluster, client: mi.Client, tmp_path: Path
) -> None:
    np.savez(tmp_path / "in.npz", **inputs())  # type: ignore[arg-type]
    where = ["--coordinator", cluster.address, "--keyring", str(cluster.keyring)]
    where += ["--cluster", cluster.cluster, "--json"]
    asked = ["--output", "exit2", "--output", "exit1"]
    done = CliRunner().invoke(app, ["infer", "exits", str(tmp_path / "in.npz"), *asked, *where])
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["outputs"]) == ["exit2", "exit1"]


def test_meshinfer_plan_plans_an_exit(tmp_path: Path) -> None:
    onnx.save_model(exits(), tmp_path / "exits.onnx")
    path = str(tmp_path / "exits.onnx")
    texts = {
        outputs: CliRunner().invoke(app, ["plan", path, *outputs]).stdout
        for outputs in ((), ("--output", "exit1"))
    }
    plans = [mi.Plan.parse(text) for text in texts.values()]
    assert plans[1].graph == mi.load(exits(), outputs=["exit1"]).digest != plans[0].graph
    refused = CliRunner().invoke(app, ["plan", path, "--output", "exit9"])
    assert refused.exit_code != 0
