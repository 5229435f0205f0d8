"""The ONNX project's own operator tests pass, however their answers are cut; and the harness that
says so can fail.

A bounded sample runs always, all cases with --full; ``scripts/operators --report`` has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import backend
import numpy as np
import pytest
from backend import Case, Outcome, Tiles, elements, frozen_for_rule, run, tilings

from meshinfer.geometry import Box, Interval, tiles_exactly
from meshinfer.graph import Op
from meshinfer.ops import TABLE, Boxes, normalise, pool
from meshinfer.ops import reduce as reductions

SLICES = 16


def mistakes(cases: Sequence[Case]) -> list[str]:
    """What fails of these, as it is given or with shapes and axes frozen."""
    return [
        f"{case.name} ({variant}): {outcome.why}"
        for case in cases
        for variant, outcome in backend.variants(case)
        if outcome.how == "failed"
    ]


def named(name: str) -> Case:
    return next(case for case in backend.cases() if case.name == name)


def test_a_sample_with_every_operator_is_exact_in_all_its_parts() -> None:
    sample = backend.sample(40)
    assert {"Conv", "ReduceMean", "Softmax", "Slice"} <= {case.operator for case in sample}
    assert mistakes(sample) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(SLICES))
def test_every_case_is_exact_in_all_its_parts(part: int) -> None:
    assert mistakes(backend.ruled()[part::SLICES]) == []


def test_most_cases_run_and_pass() -> None:
    """So that a harness that refuses everything is noticed."""
    assert len(backend.ruled()) > 1000
    hows = [run(case).how for case in backend.sample(0)[:60]]
    assert hows.count("passed") > 40, hows


def test_the_operators_that_have_a_rule_have_cases() -> None:
    """Operators of other domains, and these, are tested by networks of ours only."""
    tested = {case.operator for case in backend.cases()}
    untested = {name for name in TABLE if ":" not in name} - tested
    assert untested <= {"GlobalLpPool"}, untested


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("test_reduce_mean_keepdims_random", ("axes",)),
        ("test_slice_neg_steps", ("starts", "ends", "axes", "steps")),
        ("test_reshape_negative_dim", ()),
    ],
)
def test_inputs_like_axes_are_frozen_and_data_is_not(name: str, frozen: tuple[str, ...]) -> None:
    case = named(name)
    other = frozen_for_rule(case) if run(case).how == "barrier" else None
    assert (other.frozen if other else ()) == frozen
    assert other is None or run(other) == replace(run(other), how="passed", why="")


# -- tilings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (5, 1, 2, 3)])
def test_every_tiling_covers_the_value_once(shape: tuple[int, ...]) -> None:
    whole = Box.whole(shape)
    assert all(tiles_exactly(whole, boxes) for boxes in tilings(whole))


def test_a_map_is_cut_along_each_axis_and_each_pair_of_axes() -> None:
    grids = [len(boxes) for boxes in tilings(Box.whole((2, 3, 4)))]
    assert grids == [1, 2, 2, 3, 2, 3, 4, 4, 4, 9]


def test_a_large_value_is_sampled_with_its_corners() -> None:
    few, many = elements(Box.whole((8, 8)), "a"), elements(Box.whole((9, 8, 2)), "a")
    assert len(few) == 64 and tiles_exactly(Box.whole((8, 8)), few)
    assert 8 < len(many) <= 72 and Box.of((8, 9), (7, 8), (1, 2)) in many
    assert many == elements(Box.whole((9, 8, 2)), "a") != elements(Box.whole((9, 8, 2)), "b")


# -- the harness can fail ------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def short_window(patch: pytest.MonkeyPatch) -> None:
    """A pool reads its windows at the place of the first output."""

    def footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
        (box,) = RIGHT_POOL(op, outs, over)
        assert box is not None
        return (Box((*box.axes[:2], *(Interval(0, r.size) for r in box.axes[2:]))),)

    RIGHT_POOL = pool.POOL.footprint
    patch.setitem(TABLE, "MaxPool", replace(pool.POOL, footprint=footprint))


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """A part of a mean is divided by its own count."""

    def emit(op: Op, job: Any, e: Any) -> None:
        if job.over is None:
            reductions.REDUCE.emit(op, job, e)
        else:
            axes = e.ints(reductions._axes(op))
            e.node("ReduceMean", [job.inputs[0], axes], job.outputs, keepdims=1)

    patch.setitem(TABLE, "ReduceMean", replace(reductions.REDUCE, emit=emit))


def apart_though_joint(patch: pytest.MonkeyPatch) -> None:
    """A softmax is computed for a box as if nothing lay beside it."""

    def footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
        return outs

    rule = replace(normalise.JOINT, align=lambda op, outs: outs, footprint=footprint)
    patch.setitem(TABLE, "Softmax", rule)


def first_columns(patch: pytest.MonkeyPatch) -> None:
    """Whatever is asked of a broadcast sum, the second operand is read from its start."""

    def footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
        a, b = right.footprint(op, outs, over)
        assert b is not None
        return (a, Box(tuple(Interval(0, r.size) for r in b)))

    right = TABLE["Add"]
    patch.setitem(TABLE, "Add", replace(right, footprint=footprint))


def forgotten_statistics(patch: pytest.MonkeyPatch) -> None:
    """A tile's batch normalisation takes the first channels' mean and variance."""

    def footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
        data, *rest = right.footprint(op, outs, over)
        return (data, *(Box.of((0, box[0].size)) if box else None for box in rest))

    right = TABLE["BatchNormalization"]
    patch.setitem(TABLE, "BatchNormalization", replace(right, footprint=footprint))


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (short_window, "test_maxpool_2d_pads"),
        (mean_of_means, "test_reduce_mean_keepdims_random"),
        (apart_though_joint, "test_softmax_axis_1"),
        (first_columns, "test_add_bcast"),
        (forgotten_statistics, "test_batchnorm_example"),
    ],
)
def test_a_planted_mistake_is_found(
    plant: Plant, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = named(name)
    sound = [outcome.how for _, outcome in backend.variants(case)]
    assert sound[-1] == "passed"
    plant(monkeypatch)
    found = [outcome for _, outcome in backend.variants(case)]
    assert found[-1].how == "failed", found


def test_a_wrong_element_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tiles.compute

    def compute(self: Tiles, shard: Any) -> Any:
        array = right(self, shard)
        first = shard.box.start == tuple(0 for _ in shard.box) and shard.box.volume == 1
        return array + np.ones_like(array) if first else array

    monkeypatch.setattr(Tiles, "compute", compute)
    outcome = run(named("test_abs"))
    assert outcome.how == "failed" and "the element" in outcome.why


def test_what_onnxruntime_gets_wrong_is_never_counted_as_passed() -> None:
    case = named("test_abs")
    ((name, expected),) = case.expected.items()
    assert isinstance(expected, np.ndarray)
    outcome = run(replace(case, expected={name: expected + 1}))
    assert outcome.how == "refused" and "answers otherwise" in outcome.why


def test_what_onnxruntime_refuses_is_told_with_its_words() -> None:
    case = named("test_abs")
    broken = replace(case, inputs={"x": np.zeros(3, np.int8)})
    assert run(broken) == Outcome("refused", run(broken).why)
    assert run(broken).why.startswith("onnxruntime: ")


def test_integers_must_be_equal_even_where_the_runner_is_lenient() -> None:
    case = named("test_cast_DOUBLE_to_FLOAT")
    large = np.array([1_000_000])
    assert backend.difference(large + 1, large, case) == "1 elements are not equal"
    assert backend.difference(large + 1.0, large * 1.0, case) == ""
