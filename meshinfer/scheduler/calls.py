"""The programs of a plan as calls whose results are references: who is called, with whose results.

For engines that move data themselves (Ray): a piece that several tasks read is one result, and who
calls never looks into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshinfer.protocol import messages as m
from meshinfer.scheduler.recipe import Cut, Recipe

Result = tuple[m.Place, int]
"""A result: the task that makes it, and its number there."""


@dataclass(frozen=True, slots=True)
class Call:
    """One task. ``devices``: who has its program; any of them may run it if ``free``; else the
    first does, and the others in its place. ``arguments``: the results that it is given, for these
    ``slots``. ``readers``: of each result, the tasks that are given it.
    """

    program: m.Program
    devices: tuple[str, ...]
    slots: tuple[int, ...]
    arguments: tuple[Result, ...]
    readers: tuple[tuple[m.Place, ...], ...]

    @property
    def place(self) -> m.Place:
        return self.program.place

    @property
    def free(self) -> bool:
        return self.program.free


@dataclass(frozen=True, slots=True)
class Calls:
    """``tasks`` in an order in which each is behind those whose results it is given. Source and
    sink are with the caller."""

    source: Call
    tasks: tuple[Call, ...]
    sink: Call


def results_of(recipe: Recipe) -> tuple[Cut, ...]:
    """What a task makes for others, each piece once, in the order of their numbers."""
    found: dict[object, Cut] = {}
    for cut in recipe.cuts:
        found.setdefault(_same(cut.send), cut)
    return tuple(found.values())


def calls_of(programs: Mapping[str, tuple[m.Program, ...]]) -> Calls:
    """The calls of all programs of a plan, by the device that has them."""
    by_place = {p.place: p for each in programs.values() for p in each}
    made: dict[tuple[m.Place, int], Result] = {}
    readers: dict[m.Place, list[list[m.Place]]] = {}
    for place, program in sorted(by_place.items()):
        numbers: dict[object, int] = {}
        read: list[list[m.Place]] = []
        for send in program.sends:
            number = numbers.setdefault(_same(send), len(numbers))
            if number == len(read):
                read.append([])
            made[send.consumer, send.slot] = (place, number)
            read[number].append(send.consumer)
        readers[place] = read
    calls = {
        place: _call(program, programs, made, readers[place])
        for place, program in sorted(by_place.items())
    }
    source, *tasks, sink = calls.values()
    return Calls(source, tuple(tasks), sink)


def _call(
    program: m.Program,
    programs: Mapping[str, tuple[m.Program, ...]],
    made: Mapping[tuple[m.Place, int], Result],
    readers: list[list[m.Place]],
) -> Call:
    slots = sorted(piece.slot for value in program.inputs for piece in value.pieces)
    own = tuple(name for name, each in programs.items() if program in each)
    return Call(
        program=program,
        devices=program.devices or own,
        slots=tuple(slots),
        arguments=tuple(made[program.place, slot] for slot in slots),
        readers=tuple(tuple(dict.fromkeys(places)) for places in readers),
    )


def _same(send: m.Send) -> object:
    """Equal for sends of the very same bytes."""
    return send.piece, send.half
