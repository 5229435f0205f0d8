"""The ONNX project's own operator tests, run tile by tile: the harness, pure functions of a case.

A case is a model of one operator (or its function body, "expanded"), inputs and the outputs that
the ONNX project expects. Each is computed whole, in two and in three parts along each axis and each
pair of axes, as single elements and as partial sums, and held against both the expected outputs,
with the tolerance of onnx's own runner, and plain onnxruntime, with the oracle's. What onnxruntime
itself refuses or answers otherwise is told apart and never counted as passed.

The cases are made by code in the onnx package (``onnx.backend.test.case.node``), from one seed.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, numpy_helper
from oracle import FLOOR, error, tolerance

import meshinfer as mi
from meshinfer.geometry import Box, Interval, split_even
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.lower import Submodel, lower
from meshinfer.mapreduce import reduce, scatter
from meshinfer.ops import BARRIER, TABLE, is_random, rule_of, why_barrier
from meshinfer.plan import Plan, Shard, Stage, Task

ELEMENTS = 64
"""Values with more elements are sampled: so many single ones, and the corners."""
OLDER_OPSETS = (25, 24, 23, 22, 21, 19)
PI = DeviceId("pi-1")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False, slots=True)
class Case:
    """One test of the ONNX project. ``operator``: the key of the operator table it is about.

    ``frozen``: inputs that became initializers, since the rule needs them before a request comes.
    """

    name: str
    operator: str
    model: ModelProto
    inputs: Mapping[str, object]
    expected: Mapping[str, object]
    rtol: float
    atol: float
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case. ``how`` is one of ``KINDS``; ``why``: the reason, or the first mistake.

    ``parts``: different tiles that were computed; ``identical``: all have plain onnxruntime's bits.
    """

    how: str
    why: str = ""
    parts: int = 0
    identical: bool = True


KINDS = ("passed", "barrier", "refused", "failed")
"""``refused``: by onnxruntime itself, or it answers otherwise than the ONNX project expects."""


# -- the cases -------------------------------------------------------------------------------------


@cache
def cases() -> tuple[Case, ...]:
    """Every node test of the installed onnx package, those of function bodies included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs: overflows and the like, on purpose
        from onnx.backend.test.case.node import collect_testcases

        tests = collect_testcases(None)
    made, plain = [], ""
    for test in tests:
        if "_expanded" not in test.name:
            (node,) = test.model.graph.node
            plain = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
        ((inputs, outputs),) = test.data_sets
        graph = test.model.graph
        made.append(
            Case(
                test.name,
                plain,
                test.model,
                dict(zip((v.name for v in graph.input), map(as_array, inputs), strict=True)),
                dict(zip((v.name for v in graph.output), map(as_array, outputs), strict=True)),
                test.rtol,
                test.atol,
            )
        )
    return tuple(made)


def as_array(value: object) -> object:
    """A tensor as numpy has it (types that it lacks: as ml_dtypes has them); all else as it is."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def own(name: str, model: ModelProto, inputs: Arrays) -> Case:
    """A case of ours: what is expected is what plain onnxruntime gives."""
    return Case(name, "", model, inputs, answers(model, inputs), 1e-3, 1e-7)


def is_expanded(case: Case) -> bool:
    """Whether the model is the operator's function body instead of the operator."""
    return "_expanded" in case.name


@cache
def ruled() -> tuple[Case, ...]:
    """The cases of every operator that has a rule, or whose function body has one that does.

    onnxruntime puts the body in the place of an operator that it has no kernel for.
    """
    bodies = {c.operator for c in cases() if is_expanded(c) and holds_ruled(c)}
    return tuple(
        c
        for c in cases()
        if (holds_ruled(c) if is_expanded(c) else c.operator in TABLE or c.operator in bodies)
    )


def holds_ruled(case: Case) -> bool:
    nodes = case.model.graph.node
    return any((f"{n.domain}:{n.op_type}" if n.domain else n.op_type) in TABLE for n in nodes)


def sample(count: int) -> list[Case]:
    """The first case of each operator as it is, and so many others, the same each time."""
    firsts: dict[str, Case] = {}
    for case in ruled():
        if not is_expanded(case):
            firsts.setdefault(case.operator, case)
    others = [c for c in ruled() if c is not firsts.get(c.operator)]
    return [*firsts.values(), *random.Random(3).sample(others, min(count, len(others)))]


def freeze(case: Case, names: Sequence[str]) -> Case:
    """The case with these inputs as initializers, of the values that the test gives."""
    model = ModelProto()
    model.CopyFrom(case.model)
    kept = [v for v in model.graph.input if v.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name in names:
        model.graph.initializer.append(numpy_helper.from_array(case.inputs[name], name))
    left = {name: value for name, value in case.inputs.items() if name not in names}
    return replace(case, model=model, inputs=left, frozen=tuple(names))


def frozen_for_rule(case: Case) -> Case | None:
    """The case with the fewest inputs frozen that lets its operator follow its rule, if any does.

    Data stays an input: of all inputs but the first, those that the rule can do without knowing.
    """
    later = [n for n, v in list(case.inputs.items())[1:] if isinstance(v, np.ndarray)]
    if is_expanded(case) or not later or not follows(freeze(case, later)):
        return None
    for name in list(later):
        fewer = [n for n in later if n != name]
        if follows(freeze(case, fewer)):
            later = fewer
    return freeze(case, later)


def follows(case: Case) -> bool:
    """Whether importing this leaves an operator that follows a rule."""
    try:
        graph = mi.load(case.model)
    except mi.InvalidInput:
        return False
    return any(rule_of(op) is not BARRIER for op in graph.ops)


# -- tilings ---------------------------------------------------------------------------------------


def tilings(whole: Box) -> Iterator[list[Box]]:
    """The box itself; then in 2 and 3 parts along each axis, and along each pair of axes."""
    yield [whole]
    for count in (1, 2):
        for axes in combinations(range(len(whole)), count):
            for parts in (2, 3):
                if all(whole[axis].size >= parts for axis in axes):
                    yield grid(whole, axes, parts)


def grid(whole: Box, axes: Sequence[int], parts: int) -> list[Box]:
    """The box cut in so many parts along each of these axes."""
    boxes = [whole]
    for axis in axes:
        ranges = split_even(whole[axis].size, parts)
        boxes = [box.replace(axis, part) for box in boxes for part in ranges]
    return boxes


def elements(whole: Box, seed: str) -> list[Box]:
    """Boxes of single elements: all, or where there are more than ``ELEMENTS``, a sample.

    A sample has the corners and ``ELEMENTS`` places drawn by the case's name.
    """
    shape = whole.shape
    if whole.volume <= ELEMENTS:
        places = list(product(*(range(size) for size in shape)))
    else:
        draw = random.Random(seed)
        corners = product(*(sorted({0, size - 1}) for size in shape))
        drawn = (tuple(draw.randrange(size) for size in shape) for _ in range(ELEMENTS))
        places = list(dict.fromkeys([*list(corners)[:ELEMENTS], *drawn]))
    return [Box(tuple(Interval(i, i + 1) for i in place)) for place in places]


# -- computing -------------------------------------------------------------------------------------


class Tiles:
    """Computes shards of a graph's outputs from whole inputs, each different submodel once."""

    def __init__(self, graph: Graph, inputs: Arrays, folder: Path) -> None:
        self.graph, self.inputs, self.folder = graph, inputs, folder
        self.stage = Stage(0, len(graph.ops), ())
        self.sessions: dict[bytes, ort.InferenceSession] = {}
        self.made: dict[Shard, np.ndarray] = {}

    def compute(self, shard: Shard) -> np.ndarray:
        """The array of a shard, from a task that makes nothing else."""
        if shard not in self.made:
            (self.made[shard],) = self.run(lower(self.graph, self.stage, Task((PI,), (shard,))))
        return self.made[shard]

    def run(self, submodel: Submodel) -> list[np.ndarray]:
        for weight in submodel.weights:
            data = self.graph.weight_bytes(weight.shard.value, weight.shard.box)
            (self.folder / weight.digest).write_bytes(data)
        feeds = {
            name: np.ascontiguousarray(
                scatter(self.inputs[shard.value], self.graph.whole(shard.value), shard.box)
            ).reshape(shard.box.shape)
            for name, shard in submodel.inputs
        }
        if submodel.model not in self.sessions:
            self.sessions[submodel.model] = session(submodel.model, self.folder)
        results: list[np.ndarray] = self.sessions[submodel.model].run(
            [name for name, _ in submodel.outputs], feeds
        )
        return results


def answers(model: ModelProto, inputs: Mapping[str, object]) -> Arrays:
    """Plain onnxruntime's, as the oracle has them, but without a word on stderr if it refuses."""
    plain = session(model.SerializeToString(), Path())
    names = [o.name for o in plain.get_outputs()]
    return dict(zip(names, plain.run(names, dict(inputs)), strict=True))


def session(model: bytes, folder: Path) -> ort.InferenceSession:
    """A submodel prepared as a worker does, without the detour over files that saves memory."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def partial_sums(graph: Graph, name: str) -> Iterator[list[Shard]]:
    """The value as 2 and as 3 parts of its sum, along each axis that is summed away."""
    op = graph.ops[graph.producer[name]]
    over = rule_of(op).reduction(op)
    if over is None or any(name in (*other.inputs, *other.captured) for other in graph.ops):
        return
    for axis in range(len(over)):
        for parts in (2, 3):
            if over[axis].size >= parts:
                yield [Shard(name, graph.whole(name), box) for box in grid(over, (axis,), parts)]


def op_by_op(graph: Graph) -> Plan | None:
    """A stage an operator, each value in two halves along its first axis of two or more."""
    if list(graph.cut_points) != list(range(1, len(graph.ops))):
        return None
    stages = []
    for i in range(len(graph.ops)):
        shards: list[Shard] = []
        for name in graph.live_outputs(i, i + 1):
            whole = graph.whole(name)
            some = not whole.empty
            axis = next((a for a, r in enumerate(whole) if some and r.size > 1), None)
            boxes = [whole] if axis is None else grid(whole, (axis,), 2)
            shards += [Shard(name, box) for box in boxes]
        if shards:
            tasks = tuple(Task((PI,), (shard,)) for shard in shards)
            stages.append(Stage(stages[-1].stop if stages else 0, i + 1, tasks))
    return Plan(graph.digest, PI, PI, tuple(stages)) if covers(stages, graph) else None


def covers(stages: Sequence[Stage], graph: Graph) -> bool:
    return bool(stages) and stages[-1].stop == len(graph.ops)


# -- judging ---------------------------------------------------------------------------------------


class Mistake(AssertionError):
    """An answer that is not the expected one."""


@dataclass(eq=False, slots=True)
class Judge:
    """Compares arrays, or elements of them, with the expected outputs and with onnxruntime's."""

    case: Case
    truth: Arrays
    expect: bool
    limit: float = FLOOR
    identical: bool = True

    def whole(self, name: str, array: np.ndarray, where: str) -> None:
        self.compare(name, array, self.truth[name], self.case.expected[name], where)

    def compare(
        self, name: str, array: np.ndarray, truth: np.ndarray, expected: object, where: str
    ) -> None:
        if array.dtype != truth.dtype or array.shape != truth.shape:
            raise Mistake(
                f"{where}: {name} is {array.dtype}{array.shape}, not {truth.dtype}{truth.shape}"
            )
        if self.expect and (why := difference(array, expected, self.case)):
            raise Mistake(f"{where}: {name}: {why}")
        if np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(truth).tobytes():
            return
        self.identical = False
        off = self.off(name, array, truth)
        if off > self.limit == FLOOR and is_float(truth):
            self.limit = tolerance(self.case.model, self.case.inputs)
        if off > self.limit:
            raise Mistake(
                f"{where}: {name} is {off:.2g} off onnxruntime's, {self.limit:.2g} may be"
            )

    def off(self, name: str, array: np.ndarray, truth: np.ndarray) -> float:
        """The oracle's error, relative to the largest element of the *whole* value."""
        if not is_float(truth):
            return 0.0 if np.array_equal(array, truth) else float("inf")
        a, b = np.asarray(array, np.float64), np.asarray(truth, np.float64)
        full = np.asarray(self.truth[name], np.float64)
        # Beside the element stands the whole value's largest, right both times.
        finite = np.abs(full[np.isfinite(full)])
        scale = finite.max(initial=0.0)
        return error(np.append(a, scale), np.append(b, scale))


def is_float(array: np.ndarray) -> bool:
    """Floats of any width: numpy's own, and the small ones of ml_dtypes (their kind is V)."""
    return array.dtype.kind in "fcV" and not array.dtype.name.startswith(("int", "uint"))


def difference(array: np.ndarray, expected: object, case: Case) -> str:
    """How an array differs from the expected one, by the rules of onnx's own runner; or ""."""
    wanted = np.asarray(expected)
    if array.shape != wanted.shape or array.dtype != wanted.dtype:
        return f"{array.dtype}{array.shape}, expected {wanted.dtype}{wanted.shape}"
    if not is_float(wanted):
        equal = np.array_equal(array, wanted)
        return "" if equal else f"{np.count_nonzero(array != wanted)} elements are not equal"
    a, b = (np.asarray(v, np.float64) for v in (array, wanted))
    if np.allclose(a, b, rtol=case.rtol, atol=case.atol, equal_nan=True):
        return ""
    return f"not within rtol {case.rtol:g} of the expected output"


# -- a case ----------------------------------------------------------------------------------------


def run(case: Case) -> Outcome:
    """A case with its inputs as they are, through every tiling."""
    if not all(isinstance(v, np.ndarray) for v in case.inputs.values()):
        return Outcome("refused", "its inputs are no tensors")
    inputs = {name: np.asarray(value) for name, value in case.inputs.items()}
    try:
        truth = answers(case.model, inputs)
    except Exception as refusal:
        return Outcome("refused", f"onnxruntime: {first_line(refusal)}")
    if not all(isinstance(v, np.ndarray) for v in truth.values()):
        return Outcome("refused", "its outputs are no tensors")
    odd = next(
        (why for n, v in truth.items() if (why := difference(v, case.expected[n], case))), ""
    )
    judge = Judge(case, truth, expect=not odd)
    try:
        graph = mi.load(case.model)
        if any(is_random(op) and op.type != "Dropout" for op in graph.ops):
            return Outcome("barrier", "it draws random numbers: no two answers agree")
        if all(rule_of(op) is BARRIER for op in graph.ops):
            return barrier(case, graph, inputs, judge, odd)
        parts = check(case, graph, inputs, judge)
    except Exception as mistake:  # whatever is raised here is a finding: the case is named
        return Outcome("failed", f"{type(mistake).__name__}: {first_line(mistake)}")
    if odd:
        return Outcome("refused", f"onnxruntime answers otherwise: {odd}", parts, judge.identical)
    return Outcome("passed", "", parts, judge.identical)


def barrier(case: Case, graph: Graph, inputs: Arrays, judge: Judge, odd: str) -> Outcome:
    """Every operator runs whole: so does the plan, and must be right all the same."""
    for name, array in mi.run_plan(graph, one_task(graph), inputs).items():
        judge.whole(name, array, "whole")
    if odd:
        return Outcome("refused", f"onnxruntime answers otherwise: {odd}", 1, judge.identical)
    if not graph.ops:
        return Outcome("barrier", "all of it was folded", 1, judge.identical)
    about = next((op for op in graph.ops if op.type == case.operator), graph.ops[0])
    return Outcome("barrier", why_barrier(about), 1, judge.identical)


def one_task(graph: Graph) -> Plan:
    """All of it in one stage of one task."""
    live = graph.live_outputs(0, len(graph.ops))
    task = Task((PI,), tuple(Shard(name, graph.whole(name)) for name in live))
    return Plan(graph.digest, PI, PI, (Stage(0, len(graph.ops), (task,)),) if live else ())


def check(case: Case, graph: Graph, inputs: Arrays, judge: Judge) -> int:
    """Every tiling of every output, or ``Mistake``; returns how many tiles were computed."""
    for name, array in mi.run_plan(graph, one_task(graph), inputs).items():
        judge.whole(name, array, "whole, with the real engine")
    with tempfile.TemporaryDirectory(prefix="meshinfer-backend-") as folder:
        tiles = Tiles(graph, inputs, Path(folder))
        for name in graph.live_outputs(0, len(graph.ops)):
            check_value(case, tiles, name, judge)
    plan = op_by_op(graph)
    if plan is not None:
        for name, array in mi.run_plan(graph, plan, inputs).items():
            judge.whole(name, array, "op by op")
    return len(tiles.made)


def check_value(case: Case, tiles: Tiles, name: str, judge: Judge) -> None:
    whole = tiles.graph.whole(name)
    if tiles.graph.shape(name) is None:
        return  # depends on the data: made whole, by the plan of one task
    for boxes in tilings(whole):
        pieces = [(Shard(name, box), tiles.compute(Shard(name, box))) for box in boxes]
        judge.whole(name, reduce(whole, pieces), f"in {len(boxes)} like {boxes[0]}")
    for parts in partial_sums(tiles.graph, name):
        pieces = [(part, tiles.compute(part)) for part in parts]
        judge.whole(name, reduce(whole, pieces), f"as {len(parts)} sums like {parts[0].over}")
    truth, expected = judge.truth[name], np.asarray(case.expected[name])
    for box in elements(whole, case.name):
        place = box.within(whole)
        array = tiles.compute(Shard(name, box))
        judge.compare(name, array, truth[place], expected[place], f"the element {box}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without onnxruntime's address of its own code."""
    return str(error).strip().partition("\n")[0][:200]


def variants(case: Case) -> list[tuple[str, Outcome]]:
    """What comes of a case: as it is given, and where that does not try the rule, otherwise too.

    Where onnxruntime has no kernel at the case's opset: at the newest older one that it has. Where
    the rule must know an input beforehand: with that frozen.
    """
    given = run(case)
    found = [("given", given)]
    if "NOT_IMPLEMENTED" in given.why:
        case, older = at_older_opset(case)
        if older is not None:
            given = older
            found.append((f"opset {case.model.opset_import[0].version}", given))
    if given.how == "barrier" and (other := frozen_for_rule(case)) is not None:
        found.append((f"frozen: {', '.join(other.frozen)}", run(other)))
    return found


def at_older_opset(case: Case) -> tuple[Case, Outcome | None]:
    """The case, unchanged but for its opset, at the first older one that has kernels for it."""
    for opset in OLDER_OPSETS:
        if opset < case.model.opset_import[0].version:
            model = ModelProto()
            model.CopyFrom(case.model)
            model.opset_import[0].version = opset
            model.ir_version = min(model.ir_version, 11)
            other = replace(case, model=model)
            if (outcome := run(other)).how != "refused":
                return other, outcome
    return case, None


def version() -> str:
    """What the report is about."""
    return f"onnx {onnx.__version__}, onnxruntime {ort.__version__}"
