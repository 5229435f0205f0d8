"""A plan as calls on references: whoever makes the calls in order gets what ``run_plan`` gives.

The actors are those of the Ray backend, as plain objects in this process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from networks import Network, networks
from plans import plans
from processes import image, small_model

import meshinfer as mi
from cluster.ray_backend.actor import NodeActor, Ran
from cluster.ray_backend.serving import Serving, spare_programs
from meshinfer.geometry import split_even
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.programs import Programs, make_programs
from meshinfer.protocol import messages as m
from meshinfer.scheduler.calls import Calls, calls_of, results_of
from meshinfer.scheduler.events import PlanReady, Signature
from meshinfer.scheduler.recipe import Gathering, Recipe
from meshinfer.transfers import TaskRef

Arrays = Mapping[str, np.ndarray]


@contextmanager
def actors(programs: Programs) -> Iterator[dict[str, NodeActor]]:
    """One for each device of a plan, with its programs prepared."""
    with ExitStack() as stack:
        made = {}
        for name, each in programs.by_device.items():
            own = tuple(p for p in each if p.model is not None)
            made[name] = actor = NodeActor(1)
            stack.callback(actor.end)
            for digest in {d for p in own for d in (p.model, *p.weights)}:
                data = np.frombuffer(programs.blobs[digest or ""](), np.uint8)
                assert actor.keep(digest or "", data) == b""
            assert actor.prepare(7, msgspec.msgpack.encode(own)) == b""
        yield made


def call_all(calls: Calls, on: Mapping[str, NodeActor], inputs: Arrays) -> dict[str, np.ndarray]:
    """What a driver does, with arrays for references."""
    source = Recipe.of(calls.source.program)
    given = [inputs[output.name] for output in calls.source.program.outputs]
    made: dict[Any, Any] = {
        (calls.source.place, i): cut.sent(given) for i, cut in enumerate(results_of(source))
    }
    for call in calls.tasks:
        pieces = [made[argument] for argument in call.arguments]
        answer = on[call.devices[0]].run(7, call.place, call.slots, *pieces)
        told, *results = answer if call.readers else [answer]
        ran = msgspec.msgpack.decode(told, type=Ran)
        assert ran.failed is None and len(ran.nbytes) == len(results) == len(call.readers)
        made |= {(call.place, i): each for i, each in enumerate(results)}
    merged = Gathering(Recipe.of(calls.sink.program))
    for slot, argument in zip(calls.sink.slots, calls.sink.arguments, strict=True):
        assert merged.put(slot, made[argument])
    return merged.inputs()


def banded(graph: Graph, devices: int) -> Plan:
    """A stage an op, each in bands of rows on all devices: halos everywhere."""
    stages = []
    for op in graph.ops:
        (value,) = op.outputs
        bands = split_even(graph.whole(value)[2].stop, devices)
        boxes = [graph.whole(value).replace(2, band) for band in bands]
        tasks = [Task((DeviceId(f"pi-{i}"),), (Shard(value, box),)) for i, box in enumerate(boxes)]
        stages.append(Stage(op.index, op.index + 1, tuple(tasks)))
    return Plan(graph.digest, DeviceId("head"), DeviceId("head"), tuple(stages))


@given(networks(), st.data())
def test_calls_of_any_plan_give_the_bits_of_run_plan(network: Network, data: st.DataObject) -> None:
    graph = mi.load(network.model)
    plan = data.draw(plans(graph))
    programs = make_programs(graph, plan)
    with actors(programs) as on:
        outputs = call_all(calls_of(programs.by_device), on, network.inputs)
    for name, array in mi.run_plan(graph, plan, network.inputs).items():
        np.testing.assert_array_equal(outputs[name], array)
        assert outputs[name].dtype == array.dtype and outputs[name].shape == array.shape


def test_a_piece_that_several_tasks_read_is_one_result() -> None:
    graph = mi.load(small_model(24))
    plan = banded(graph, 3)
    calls = calls_of(make_programs(graph, plan).by_device)
    places = [call.place for call in calls.tasks]
    assert places == sorted(places)
    middle = next(call for call in calls.tasks if call.place == (0, 1))
    sent = {(s.piece, s.consumer) for s in middle.program.sends}
    assert len(middle.readers) == len({piece for piece, _ in sent}) < len(sent) + 1
    assert sorted(place for places in middle.readers for place in places) == sorted(
        consumer for _, consumer in sent
    )


def test_a_task_that_fails_tells_why_and_those_behind_it_say_nothing() -> None:
    graph = mi.load(small_model(24))
    programs = make_programs(graph, banded(graph, 2))
    calls = calls_of(programs.by_device)
    first, second = calls.tasks[0], next(c for c in calls.tasks if c.place == (1, 0))
    with actors(programs) as on:
        wrong = [np.zeros((1, 1, 1, 1), np.float32) for _ in first.slots]
        told, *results = on["pi-0"].run(7, first.place, first.slots, *wrong)
        assert "shape" in (msgspec.msgpack.decode(told, type=Ran).failed or "")
        assert results == [None] * len(first.readers)
        told, *results = on["pi-0"].run(7, second.place, second.slots, *[None] * len(second.slots))
        assert msgspec.msgpack.decode(told, type=Ran).failed == ""
        assert results == [None] * len(second.readers)


def test_an_actor_leaves_no_files_and_holds_a_submodel_once() -> None:
    graph = mi.load(small_model(24))
    programs = make_programs(graph, banded(graph, 1))
    with actors(programs) as on:
        actor = on["pi-0"]
        assert not actor._folder.exists()
        models = tuple(p.model or "" for p in programs.by_device["pi-0"] if p.model)
        assert actor.lacks((*models, "0" * 64)) == ("0" * 64,)
        own = tuple(p for p in programs.by_device["pi-0"] if p.model)
        assert actor.prepare(8, msgspec.msgpack.encode(own)) == b""  # nothing is kept for it
        actor.forget(7)
        assert actor.lacks(models) == ()
        actor.forget(8)
        assert actor.lacks(models) == models
        failure = msgspec.msgpack.decode(
            actor.prepare(9, msgspec.msgpack.encode(own)), type=m.Failure
        )
        assert "cannot prepare" in failure.message


def test_a_kept_blob_that_is_not_what_its_name_says_is_refused() -> None:
    actor = NodeActor(1)
    try:
        told = actor.keep("0" * 64, np.zeros(3, np.uint8))
        assert "SHA-256" in msgspec.msgpack.decode(told, type=m.Failure).message
    finally:
        actor.end()
    assert actor.keep(hashlib.sha256(b"").hexdigest(), np.zeros(0, np.uint8)) != b""
    assert not actor._folder.exists(), "it takes nothing once it has ended"


def test_a_lost_device_s_task_goes_to_who_has_prepared_it() -> None:
    graph = mi.load(small_model(24))
    plan = banded(graph, 2)
    spares = {TaskRef(0, 0): (DeviceId("pi-1"),)}
    made = PlanReady(1, str(plan), make_programs(graph, plan, spares).by_device)
    calls = calls_of(made.programs)
    model: Any = None
    devices = {"pi-0": object(), "pi-1": object()}
    serving = Serving(1, model, Signature(False, ()), tuple(devices), made, calls, devices)
    assert spare_programs(made) == {"pi-1": (calls.tasks[0].program,)}

    def without_first(name: str, actor: object) -> bool:
        return name != "pi-0" and devices[name] is actor

    first, second, *_ = calls.tasks
    assert serving.device(first, lambda *_: True) == "pi-0"
    assert serving.device(first, without_first) is None, "it is not prepared there yet"
    serving.spares.add((first.place, "pi-1"))
    assert serving.device(first, without_first) == "pi-1"
    assert serving.device(second, lambda *_: False) is None
    assert not serving.is_whole(without_first), "other tasks of pi-0 have no spare"
    ran = {call.place: call.devices[0] for call in calls.tasks} | {first.place: "pi-1"}
    moved = Plan.parse(serving.plan(ran))
    assert moved.stages[0].tasks[0].devices == ("pi-1",)
    assert moved.stages[1:] == plan.stages[1:]


def test_images_of_the_same_size_are_told_apart_by_nothing_but_their_bytes() -> None:
    """Two requests through the same actors, one after the other, share nothing."""
    graph = mi.load(small_model(24))
    plan = banded(graph, 2)
    programs = make_programs(graph, plan)
    calls = calls_of(programs.by_device)
    with actors(programs) as on:
        for seed in (0, 1, 0):
            outputs = call_all(calls, on, image(24, seed))
            wanted = mi.run_plan(graph, plan, image(24, seed))
            np.testing.assert_array_equal(outputs["y"], wanted["y"])
