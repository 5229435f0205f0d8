"""What tasks compute in a simulation: symbols that show at once where they came from, or tensors.

A symbolic kernel checks its inputs element by element and answers garbage where one is wrong, so
that a mistake of the cores reaches the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import xxhash

from meshinfer.engine import Engine
from meshinfer.engine import Prepared as Session
from meshinfer.geometry import Box
from meshinfer.plan import Shard
from meshinfer.protocol import messages as m
from meshinfer.simulator.models import Made, graph_of

Array = np.ndarray[Any, Any]
_MODULUS = 251  # sums of a value's parts are whole numbers, exact in float32
_GARBAGE = -1.0


class Kernels(Protocol):
    """``data``: a model; ``seed``: of a request's input; ``wrong``: what was noticed."""

    wrong: list[str]

    def inputs(self, data: bytes, seed: int) -> dict[str, Array]:
        """A request's inputs."""

    def prepare(self, data: bytes, made: Made, program: m.Program) -> Any:
        """What ``run`` needs of a program."""

    def run(self, prepared: Any, inputs: Mapping[str, Array], seed: int) -> tuple[Array, ...]:
        """A task's outputs."""

    def is_right(self, data: bytes, seed: int, outputs: Mapping[str, Array]) -> bool:
        """Whether this is the answer."""


# --- Symbols ------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def symbol(model: int, seed: int, value: str, shape: tuple[int, ...]) -> Array:
    """The whole value: small whole numbers that depend on all of this and on the index."""
    mixed = xxhash.xxh3_64_intdigest(f"{model} {seed} {value}".encode())
    count = int(np.prod(shape, dtype=np.int64))
    step = mixed % (_MODULUS - 1) + 1
    found = (np.arange(count, dtype=np.int64) * step + (mixed >> 20) % _MODULUS) % _MODULUS
    array = (found + 1).astype(np.float32).reshape(shape)
    array.flags.writeable = False
    return array


class _Symbolic:
    """A program of one model: what each shard of it ought to hold."""

    def __init__(self, data: bytes, made: Made, program: m.Program) -> None:
        self.program = program
        self._graph = graph_of(data)
        self._model = xxhash.xxh3_64_intdigest(data)
        self._parts: dict[tuple[str, Box], list[Box]] = {}
        for each in made.programs.values():
            for shard in (output.shard for p in each for output in p.outputs):
                known = self._parts.setdefault((shard.value, shard.box), [])
                if shard.over is not None and shard.over not in known:
                    known.append(shard.over)

    def value(self, shard: Shard, seed: int) -> Array:
        """An input means the same to all models; all else is of this one."""
        shape = self._graph.shape(shard.value)
        assert shape is not None
        model = 0 if shard.value in self._graph.inputs else self._model
        whole = symbol(model, seed, shard.value, shape)[
            shard.box.within(self._graph.whole(shard.value))
        ]
        if shard.over is None:
            return whole
        parts = sorted(self._parts[shard.value, shard.box])
        i, n = parts.index(shard.over), len(parts)
        return np.floor(whole * (i + 1) / n) - np.floor(whole * i / n)


class Symbolic:
    """Symbols for kernels. ``wrong``: tasks that were given what is not theirs."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self._known: dict[tuple[int, m.Place], _Symbolic] = {}

    def inputs(self, data: bytes, seed: int) -> dict[str, Array]:
        graph = graph_of(data)
        shapes = {name: graph.shape(name) for name in graph.inputs}
        return {n: symbol(0, seed, n, s) for n, s in shapes.items() if s is not None}

    def prepare(self, data: bytes, made: Made, program: m.Program) -> _Symbolic:
        key = (id(made), program.place)  # plans are kept, so that no other has this number
        if key not in self._known:
            self._known[key] = _Symbolic(data, made, program)
        return self._known[key]

    def run(self, prepared: Any, inputs: Mapping[str, Array], seed: int) -> tuple[Array, ...]:
        assert isinstance(prepared, _Symbolic)
        program = prepared.program
        ok = True
        for value in program.inputs:
            expected, given = prepared.value(value.box, seed), inputs[value.name]
            if expected.shape != given.shape or not np.array_equal(expected, given):
                self.wrong.append(f"task {program.place}: {value.name} is not of input {seed}")
                ok = False
        made = [prepared.value(o.shard, seed) for o in program.outputs]
        return tuple(a if ok else np.full_like(a, _GARBAGE) for a in made)

    def is_right(self, data: bytes, seed: int, outputs: Mapping[str, Array]) -> bool:
        graph = graph_of(data)
        model = xxhash.xxh3_64_intdigest(data)
        if set(outputs) != set(graph.outputs):
            return False
        for name, array in outputs.items():
            shape = graph.shape(name)
            assert shape is not None
            if not np.array_equal(symbol(model, seed, name, shape), array):
                return False
        return True


# --- Tensors ------------------------------------------------------------------------------------


class Tensors:
    """Real kernels. ``keep`` puts a blob where the engine finds it by its digest; ``oracle`` runs
    the whole model; ``tolerance``: of the largest error, relative to the largest value."""

    def __init__(
        self,
        engine: Engine,
        keep: Callable[[str, bytes], None],
        oracle: Callable[[bytes, Mapping[str, Array]], Mapping[str, Array]],
        tolerance: float = 1e-5,
    ) -> None:
        self.wrong: list[str] = []
        self._engine, self._keep, self._tolerance = engine, keep, tolerance
        self._oracle = oracle
        self._sessions: dict[str, Session] = {}
        self._answers: dict[tuple[bytes, int], Mapping[str, Array]] = {}

    def inputs(self, data: bytes, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        graph = graph_of(data)
        shapes = {name: graph.shape(name) for name in graph.inputs}
        return {
            n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items() if s is not None
        }

    def prepare(self, data: bytes, made: Made, program: m.Program) -> Session:
        assert program.model is not None
        found = self._sessions.get(program.model)
        if found is None:
            for digest in (program.model, *program.weights):
                self._keep(digest, made.blobs[digest])
            found = self._sessions[program.model] = self._engine.prepare(made.blobs[program.model])
        return found

    def run(self, prepared: Any, inputs: Mapping[str, Array], seed: int) -> tuple[Array, ...]:
        return tuple(prepared.run(inputs))

    def is_right(self, data: bytes, seed: int, outputs: Mapping[str, Array]) -> bool:
        expected = self._answers.get((data, seed))
        if expected is None:
            expected = self._oracle(data, self.inputs(data, seed))
            self._answers[data, seed] = expected
        if set(expected) != set(outputs):
            return False
        return all(_near(outputs[n], b, self._tolerance) for n, b in expected.items())


def _near(a: Array, b: Array, tolerance: float) -> bool:
    if a.shape != b.shape or not np.isfinite(a).all():
        return False
    return float(np.abs(a - b).max()) <= tolerance * float(np.abs(b).max())
