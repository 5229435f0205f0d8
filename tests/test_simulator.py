"""The simulator: seeds hold every promise, replays are the same, and planted bugs are found.

``.ci/run`` runs many more: ``scripts/simulate --seeds 2000``, ``--seeds 300 --tensors``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.simulate import Seed, main, read_kept, simulate
from meshinfer.simulator.kernels import Symbolic
from meshinfer.simulator.models import STYLES, graph_of, made, model
from meshinfer.simulator.mutants import MUTANTS, planted
from meshinfer.simulator.run import Failed, Result, Scenario, run
from meshinfer.simulator.streams import Streams

KEPT = Path(__file__).with_name("simulator_seeds.txt")
NAMES = ("pi-1", "pi-2", "pi-3")


def holds(seed: Seed) -> Result:
    found = simulate(seed)
    if isinstance(found, Failed):
        story = simulate(seed, story=True)
        lines = story.story[-80:] if isinstance(story, Failed) else ()
        raise AssertionError("\n".join([*lines, found.why, str(seed)]))
    return found


@pytest.mark.parametrize("seed", read_kept(KEPT), ids=str)
def test_what_failed_once_holds(seed: Seed) -> None:
    holds(seed)


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_seeds_hold_every_promise(first: int) -> None:
    results = [holds(Seed(number)) for number in range(first, first + 15)]
    assert sum(r.answered for r in results) > 30
    assert any(r.faults for r in results)
    assert all(not r.failed for r in results if r.calm)


@pytest.mark.parametrize("first", range(0, 12, 4))
def test_real_kernels_agree_with_plain_onnxruntime_under_the_same_faults(first: int) -> None:
    for number in range(first, first + 4):
        holds(Seed(number, tensors=True))


@pytest.mark.parametrize("seed", [3, 7, 21])
def test_a_replay_is_the_same_to_the_last_event(seed: int) -> None:
    first, second, other = holds(Seed(seed)), holds(Seed(seed)), holds(Seed(seed + 1))
    assert first.log == second.log != other.log


def test_a_story_changes_nothing() -> None:
    told = simulate(Seed(6), story=True)
    assert isinstance(told, Result) and told.log == holds(Seed(6)).log


def test_another_draw_of_one_concern_does_not_shift_the_others() -> None:
    one, other = Streams(5), Streams(5)
    other["faults"].random()
    assert one["delay"].random() == other["delay"].random()
    assert one["faults"].random() != other["faults"].random()


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("style", STYLES)
def test_symbols_of_all_tasks_make_the_symbols_of_the_answer(kind: int, style: str) -> None:
    """Each program is run by hand, its pieces cut from what others made; sums are exact."""
    data = model(kind, 1)
    plan, kernels = made(data, NAMES, "head", style), Symbolic()
    graph = graph_of(data)
    programs = {p.place: p for each in plan.programs.values() for p in each}
    values = dict(kernels.inputs(data, 3))
    for place in sorted(p for p, program in programs.items() if program.model is not None):
        program = programs[place]
        prepared = kernels.prepare(data, plan, program)
        inputs = {
            v.name: values[v.box.value][v.box.box.within(graph.whole(v.box.value))]
            for v in program.inputs
        }
        outputs = kernels.run(prepared, inputs, 3)
        for output, array in zip(program.outputs, outputs, strict=True):
            shard = output.shard
            shape = graph.shape(shard.value)
            assert shape is not None
            whole = values.setdefault(shard.value, np.zeros(shape, np.float32))
            where = shard.box.within(graph.whole(shard.value))
            whole[where] = array if shard.over is None else whole[where] + array
    assert not kernels.wrong
    answer = {name: values[name] for name in graph.outputs}
    assert kernels.is_right(data, 3, answer)
    assert not kernels.is_right(data, 4, answer)
    assert not kernels.is_right(model(kind, 2), 3, answer)


def test_a_kernel_that_is_given_another_requests_input_answers_garbage() -> None:
    data, kernels = model(0, 1), Symbolic()
    plan = made(data, NAMES, "head", "one")
    (program,) = (p for each in plan.programs.values() for p in each if p.model is not None)
    prepared = kernels.prepare(data, plan, program)
    outputs = kernels.run(prepared, kernels.inputs(data, 1), 2)
    assert kernels.wrong and all((array == -1.0).all() for array in outputs)


@pytest.mark.parametrize(
    "mutant",
    ["Release forgotten", "lost device kept", "answered twice", "silent for ever",
     "poison never proven", "unwritten ids kept", "no reset on joining again",
     "silent device's tasks untold", "wrong incarnation heard", "stale attempt accepted",
     "gaps accepted"],
)  # fmt: skip
def test_planted_bugs_are_found(mutant: str) -> None:
    """Those that few seeds find; ``scripts/simulate --mutants`` looks for all of them."""
    with planted(mutant):
        assert any(isinstance(run(seed, Symbolic()), Failed) for seed in range(80))
    owner, method, _ = MUTANTS[mutant]
    assert not hasattr(getattr(owner, method), "__wrapped__"), "it is still planted"


def test_a_failure_prints_its_story_and_the_command_that_replays_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with planted("Release forgotten"):
        assert main(["4"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].strip() == "scripts/simulate 4"
    assert "FAILED at" in lines[-2] and any("Submit(" in line for line in lines)
    assert main(["4"]) == 0


def test_damaged_payloads_are_dropped_by_the_real_codec_and_sent_again() -> None:
    damaged = resent = 0
    for seed in (17, 18, 19, 21, 22):
        scenario = Scenario(seed, Symbolic(), story=False)
        scenario._noise.damage = 0.3
        assert scenario.run().answered > 0
        damaged += scenario.world.damaged
        resent += scenario.world.resent
    assert damaged > 0 and resent > 0


def test_every_hardship_strikes_some_seed_and_is_borne() -> None:
    """A checker that never sees its fault checks nothing."""
    here = told = ended = failed = refused = silent = swallowed = again = crashed = 0
    for seed in (2, 3, 7, 11, 19, 24, 29):
        scenario = Scenario(seed, Symbolic(), story=False)
        scenario.run()
        world = scenario.world
        here, told = here + world.granted.ran.total(), told + world.granted.counted.total()
        ended += sum(tries.total() for tries in world.deaths.values())
        failed += world.kernel_failures.total()
        refused += len(world.disk_refused)
        again += world.copies
        if "client crash" not in scenario.kinds:  # but as it was answered
            crashed += sum(mishap.what == "client crash" for mishap in world.mishaps)
        notes = (note.text for node in world.nodes.values() for note in node.notes)
        swallowed += world.swallowed
        silent += sum(text == "a device says nothing" for text in notes)
    assert here >= told > 0 and ended > 0 and failed > 0 and refused > 0 and silent > 0
    assert again > 0 and crashed > 0
    assert swallowed > 0
