"""Runs simulations: one with its story, many on all cores, with planted bugs, or of many devices.
See ``scripts/simulate``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from cluster import crowd
from meshinfer.engine.ort import OrtEngine
from meshinfer.errors import InvalidInput
from meshinfer.onnxrt import ort
from meshinfer.simulator.kernels import Array, Kernels, Symbolic, Tensors
from meshinfer.simulator.mutants import MUTANTS, planted
from meshinfer.simulator.run import Failed, Result, run

MUTANT_SEEDS = 1000
_CHUNK = 20
_STORY_LINES = 120


@dataclass(frozen=True, slots=True)
class Seed:
    """What is simulated: a seed, with symbols for kernels or with tensors."""

    number: int
    tensors: bool = False

    def __str__(self) -> str:
        return f"scripts/simulate {self.number}{' --tensors' if self.tensors else ''}"


@cache
def _kernels(tensors: bool) -> Kernels:
    return real_kernels(_scratch()) if tensors else Symbolic()


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="meshinfer-simulate-")


def _scratch() -> Path:
    return Path(_folder().name)


def real_kernels(folder: Path) -> Tensors:
    """onnxruntime's, for tasks and for the whole models that answers are held against."""

    def keep(digest: str, data: bytes) -> None:
        path = folder / digest
        if not path.exists():
            path.write_bytes(data)

    def oracle(model: bytes, inputs: Mapping[str, Array]) -> dict[str, Array]:
        session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        found = session.run(names, dict(inputs))
        return {name: np.asarray(array) for name, array in zip(names, found, strict=True)}

    return Tensors(OrtEngine(folder), keep, oracle)


def simulate(seed: Seed, *, story: bool = False) -> Result | Failed:
    """One seed, in this process."""
    return run(seed.number, _kernels(seed.tensors), story=story)


def _chunk(tensors: bool, numbers: Sequence[int]) -> list[tuple[Seed, Result | Failed]]:
    seeds = [Seed(number, tensors) for number in numbers]
    return [(seed, simulate(seed)) for seed in seeds]


def many(
    seeds: Sequence[int], jobs: int, *, tensors: bool
) -> Iterator[tuple[Seed, Result | Failed]]:
    """All of them, on so many processes, in any order of chunks."""
    chunks = [seeds[i : i + _CHUNK] for i in range(0, len(seeds), _CHUNK)]
    if jobs <= 1 or len(chunks) <= 1:
        for chunk in chunks:
            yield from _chunk(tensors, chunk)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for found in pool.map(partial(_chunk, tensors), chunks):
            yield from found


def find(mutant: str, seeds: Sequence[int]) -> tuple[int | None, float, str]:
    """The first seed that finds a planted bug, the seconds that this took, and what it saw."""
    started = time.monotonic()
    with planted(mutant):
        for number in seeds:
            found = run(number, _kernels(False))
            if isinstance(found, Failed):
                return number, time.monotonic() - started, found.why
    return None, time.monotonic() - started, "NOT FOUND"


def read_kept(path: Path) -> list[Seed]:
    """Seeds that failed once: a line each, ``symbolic 17`` or ``tensors 17``, and why."""
    kept = []
    for line in path.read_text().splitlines():
        words = line.partition("#")[0].split()
        if words:
            kept.append(Seed(int(words[1]), words[0] == "tensors"))
    return kept


def _say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# --- The command ----------------------------------------------------------------------------------


def _replay(seed: Seed) -> int:
    found = simulate(seed, story=True)
    if isinstance(found, Result):
        _say(found)
        again = simulate(seed)
        if not isinstance(again, Result) or again.log != found.log:
            _say("its second run was another")
            return 1
        return 0
    tell(seed, found, lines=10_000)
    return 1


def tell(seed: Seed, failed: Failed, lines: int = _STORY_LINES) -> None:
    """Print what broke, the story, and how to see it again."""
    for line in failed.story[-lines:]:
        _say(line)
    _say(f"FAILED at {failed.at:.3f} s: {failed.why}\n    {seed}")


def _many(first: int, count: int, jobs: int, *, tensors: bool) -> int:
    started = time.monotonic()
    seeds = list(range(first, first + count))
    results: list[Result] = []
    failures: list[Seed] = []
    for seed, found in many(seeds, jobs, tensors=tensors):
        if isinstance(found, Result):
            results.append(found)
            continue
        failures.append(seed)
        with_story = simulate(seed, story=True)
        tell(seed, with_story if isinstance(with_story, Failed) else found)
    again = [r for r in results if r.seed % 50 == 1]
    for result in again:  # the log is the same on every replay
        replay = simulate(Seed(result.seed, tensors))
        if not isinstance(replay, Result) or replay.log != result.log:
            failures.append(Seed(result.seed, tensors))
            _say(f"a replay of seed {result.seed} is another run")
    kind = "tensors" if tensors else "symbolic"
    healed = sorted(r.healed_s for r in results)
    _say(
        f"{kind}: {count} seeds from {first}, {len(failures)} failed, "
        f"{sum(r.calm for r in results)} calm, {sum(r.answered for r in results)} answers, "
        f"{sum(r.failed for r in results)} typed errors, {sum(r.messages for r in results)} "
        f"messages, {len(again)} replayed the same, well after at most {healed[-1:]} s; "
        f"{time.monotonic() - started:.0f} s on {jobs} processes"
    )
    for seed in failures:
        _say(f"    {seed}")
    return 1 if failures else 0


def _mutants(names: Sequence[str], count: int, jobs: int) -> int:
    missed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for name, (seed, took_s, why) in zip(
            names, pool.map(partial(find, seeds=range(count)), names), strict=True
        ):
            missed += seed is None
            _say(f"{name:32} seed {seed!s:>4} {took_s:6.1f} s  {why[:120]}")
    _say(f"{len(names) - missed} of {len(names)} planted bugs found within {count} seeds")
    return 1 if missed else 0


def _crowd(counts: Sequence[int], side: int) -> int:
    try:
        crowd.tell(counts, _say, side)
    except InvalidInput as error:
        sys.stderr.write(f"{error.message}: {error.hint}\n")
        return error.exit_code
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="replay this one, with its story")
    parser.add_argument("--seeds", type=int, default=0, help="run so many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--symbolic", action="store_true", help="symbols for kernels (default)")
    parser.add_argument(
        "--tensors", action="store_true", help="real kernels, held against the model"
    )
    parser.add_argument("--kept", type=Path, help="run the seeds of this file")
    parser.add_argument("--mutants", nargs="*", metavar="NAME", help="plant bugs, one at a time")
    parser.add_argument(
        "--devices",
        nargs="*",
        type=int,
        metavar="N",
        help="no faults, but so many devices (none given: 8, 64, 250 and 1000): what planning, "
        "joining, resting and each request take of the coordinator, with ResNet-50 for latency and "
        "for throughput; some minutes for 1000",
    )
    parser.add_argument("--side", type=int, default=crowd.SIDE, help="of the image, for --devices")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if options.mutants is not None:
        names = options.mutants or list(MUTANTS)
        return _mutants(names, options.seeds or MUTANT_SEEDS, options.jobs)
    if options.devices is not None:
        return _crowd(options.devices or crowd.COUNTS, options.side)
    if options.kept is not None:
        return max((_replay(seed) for seed in read_kept(options.kept)), default=0)
    if options.seeds:
        return _many(options.first, options.seeds, options.jobs, tensors=options.tensors)
    if options.seed is None:
        parser.error("give a seed, --seeds, --mutants or --devices")
    return _replay(Seed(options.seed, options.tensors))
