"""The chaos table: each case with its fault and goal (RELIABILITY.md), and how it is run."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from chaos import clocks, deaths, disks, lies, load, loading, network, soak, strangers
from chaos.arena import Arena, Run
from chaos.checker import Verdict, judge


@dataclass(frozen=True, slots=True)
class Case:
    """``own``: what an arena of its own is made with; None: it takes one that others left whole.
    ``ci``: whether it belongs to the selection of five minutes. Cases whose goal is missed today
    are not in it, nor are the longest; ``scripts/chaos --full`` runs all."""

    name: str
    fault: str
    goal: str
    act: Callable[[Run], None]
    own: dict[str, Any] | None = None
    ci: bool = True


CASES = {
    case.name: case
    for case in (
        Case(
            "C1",
            "SIGKILL a random worker",
            "all answered, 0 wrong, p99 ≤ 4 T",
            deaths.kills,
            ci=False,
        ),
        Case(
            "C2",
            "SIGSTOP 0.2–5 s",
            "0 lost, 0 wrong, p99 ≤ 5 T, extra tasks ≤ 15 %",
            deaths.freezes,
            ci=False,
        ),
        Case(
            "C3",
            "SIGKILL at each state of the protocol",
            "all answered, each state ≥ 20 times",
            deaths.states,
            own={},  # it leaves twenty models behind, for all of which each loss takes a plan
        ),
        Case(
            "C4",
            "SEGV, out of memory, an exit, an exception in a kernel",
            "0 lost, the right cause named",
            deaths.causes,
        ),
        Case(
            "C5",
            "silent partition coordinator–worker",
            "p99 ≤ 5 T, back ≤ 3 s after healing",
            network.partitions,
            ci=False,
        ),
        Case(
            "C6",
            "worker–worker partition only",
            "halo relayed by the coordinator, 0 failed",
            network.halves,
        ),
        Case(
            "C7",
            "1–10 % random loss",
            "0 wrong, p99 ≤ 10 T",
            network.lossy,
            ci=False,
        ),
        Case(
            "C8",
            "5 Mbit/s link with 8 MiB tensors",
            "0 disconnects",
            network.thin,
            ci=False,
        ),
        Case(
            "C9",
            "bit flips, truncations, duplicates, reorders",
            "100 % detected, 0 wrong",
            network.spoiled,
            own={"plaintext": True, "gates": True},
        ),
        Case(
            "C10",
            "one worker at 20 % CPU, then back",
            "≥ 0.9 of the best plan within 10 s, ≤ 2 re-plans",
            load.throttled,
            own={"devices": load.THROTTLED},
            ci=False,
        ),
        Case(
            "C11",
            "a worker that dies 1 s after each join",
            "≤ 5 tasks after its 3rd death",
            deaths.joins,
            ci=False,
        ),
        Case(
            "C12",
            "all workers dead for 10 s",
            "typed error with retry-after, recovers ≤ 3 s after the first is back",
            deaths.nobody,
        ),
        Case(
            "C13",
            "SIGKILL of the coordinator under load, clients retry by id",
            "one answer per id, ready ≤ 2 s",
            deaths.coordinators,
            ci=False,
        ),
        Case(
            "C14",
            "journal disk full, torn tail, read-only",
            "loud, no crash, no acknowledged id lost",
            disks.disks,
        ),
        Case(
            "C15",
            "a request that kills its worker",
            "fails after 3, the others p99 ≤ 4 T",
            deaths.poisoned,
            ci=False,
        ),
        Case(
            "C16",
            "10× overload",
            "goodput ≥ 90 % of peak, RSS ≤ 1.2×",
            load.overload,
            ci=False,
        ),
        Case(
            "C17",
            "300 idle connections, 4 GiB frame claims, garbage on every port",
            "p99 ≤ 3 T, RSS + ≤ 50 MiB",
            strangers.crowd,
        ),
        Case(
            "C18",
            "10,000 spoofed mDNS records; multicast filtered",
            "static addresses work, 0 unauthorised sessions",
            strangers.records,
            own={"discovery": True},
            ci=False,
        ),
        Case(
            "C21",
            "model load killed at each tenth; corrupted blobs",
            "never served",
            loading.loads,
            ci=False,
        ),
        Case(
            "C22",
            "wall clock ±1 h, ±1 year",
            "nothing changes",
            clocks.jumps,
            own={"environment": clocks.environment},
            ci=False,
        ),
        Case(
            "C23",
            "a worker that computes wrong, always or 10 %",
            "found by spot checks (1 %), 0 wrong from then on, nobody else accused",
            lies.liars,
            own={},
            ci=False,
        ),
    )
}
SOAK = Case(
    "C24",
    "all of it, for long",
    "0 lost, RSS slope < 1 MiB/h, constant threads and descriptors",
    partial(soak.soak, minutes=60.0),
    own={},
)


@dataclass(slots=True)
class Ring:
    """Runs cases one after another; an arena serves until a run leaves it other than whole."""

    folder: Path
    seed: int
    full: bool = False
    _arena: Arena | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def run(self, name: str) -> Verdict:
        """The verdict; the history is ``folder/NAME.jsonl``."""
        return self._judged(CASES[name])

    def soak(self, minutes: float) -> Verdict:
        """C24: all of it, for so long."""
        return self._judged(replace(SOAK, act=partial(soak.soak, minutes=minutes)))

    # --- inside

    def _judged(self, case: Case) -> Verdict:
        name, path = case.name, self.folder / f"{case.name}.jsonl"
        arena = self._arena_for(case)
        with Run(arena, name, self.seed, path, full=self.full) as run:
            try:
                case.act(run)
            except Exception as error:  # it goes into the table like any other miss
                run.history.write("broken", why=str(error), where=traceback.format_exc())
        verdict = judge(path)
        if case.own is not None or not verdict.met:
            self.close()
        return verdict

    def close(self) -> None:
        self._stack.close()
        self._arena = None

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _arena_for(self, case: Case) -> Arena:
        if case.own is not None:
            self.close()
        if self._arena is None:
            self._arena = self._stack.enter_context(Arena(self.folder, **(case.own or {})))
        return self._arena
