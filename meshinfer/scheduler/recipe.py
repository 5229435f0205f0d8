"""A program with its geometry worked out once, when it is installed: a request costs no boxes.

Each awaited piece has its place in an input, each piece to send its place in an output. Pieces are
received into place: a request's input is put together while its last halo still flies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from meshinfer.halves import narrowed, rounded, widened
from meshinfer.mapreduce import reduce
from meshinfer.plan import Shard
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import ProtocolError, array_of, string_of
from meshinfer.scheduler.events import Array

SOURCE: m.Place = (-1, 0)
"""Of the inputs of requests, where a task is meant."""

_Where = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an awaited piece goes: which input, and which part of it (None: it is all of it).

    ``shape``: of the piece; None where it is known only when it comes; ``dtype``: of its elements,
    empty where nobody said. ``half``: it is float32 and may come as float16. ``producer``: the task
    that makes it.
    """

    shard: Shard
    value: int
    where: _Where | None
    shape: tuple[int, ...] | None
    half: bool = False
    dtype: str = ""
    producer: m.Place = SOURCE

    def fits(self, array: Array) -> bool:
        """Whether a piece is of the shape and the type that are awaited."""
        dtype = string_of(array.dtype)
        same = dtype == self.dtype or not self.dtype or (self.half and dtype == "<f2")
        return same and (self.shape is None or self.shape == array.shape)


@dataclass(frozen=True, slots=True)
class Cut:
    """What is cut for one reader: which output, and which part of it (None: all of it)."""

    send: m.Send
    output: int
    where: _Where | None

    def of(self, outputs: Sequence[Array]) -> Array:
        """A view; the output itself where all of it is wanted."""
        array = outputs[self.output]
        return array if self.where is None else array[self.where]

    def sent(self, outputs: Sequence[Array]) -> Array:
        """As it travels: a copy if it is rounded."""
        return narrowed(self.of(outputs)) if self.send.half else self.of(outputs)

    def kept(self, outputs: Sequence[Array]) -> Array:
        """What this device itself reads: the values that another would have been sent."""
        return rounded(self.of(outputs)) if self.send.half else self.of(outputs)


@dataclass(frozen=True, slots=True)
class Recipe:
    """``shapes``: of each input that is put together from several pieces, else None; ``sums``: the
    inputs whose pieces are added; ``passes``: whether another device may take this task or
    a reader's, so that what it makes is kept."""

    program: m.Program
    slots: Mapping[int, Slot]
    shapes: tuple[tuple[int, ...] | None, ...]
    sums: frozenset[int]
    cuts: tuple[Cut, ...]
    passes: bool = False

    @staticmethod
    def of(program: m.Program) -> Recipe:
        slots: dict[int, Slot] = {}
        shapes: list[tuple[int, ...] | None] = []
        sums = set()
        for position, value in enumerate(program.inputs):
            whole = value.box.box
            alone = len(value.pieces) == 1 and value.pieces[0].shard.box == whole
            shapes.append(None if alone else whole.shape)
            if any(piece.shard.over is not None for piece in value.pieces):
                sums.add(position)
            for piece in value.pieces:
                box = piece.shard.box
                where = None if alone else box.within(whole)
                shape = box.shape if box.axes else None
                slots[piece.slot] = Slot(
                    piece.shard, position, where, shape, piece.half, value.dtype, piece.producer
                )
        cuts = tuple(_cut(program, send) for send in program.sends)
        passes = bool(program.devices) or any(send.others for send in program.sends)
        return Recipe(program, slots, tuple(shapes), frozenset(sums), cuts, passes)

    def fits(self, slot: int, tensor: m.Tensor, payload: memoryview) -> bool:
        """Whether a message is whole, and of the shape and the type that are awaited."""
        try:
            return slot in self.slots and self.slots[slot].fits(array_of(tensor, payload))
        except ProtocolError:
            return False

    def may_make(self, output: int, tensor: m.Tensor, payload: memoryview) -> bool:
        """Whether a message is whole, and no more than what is made: it may well be wrong."""
        try:
            array = array_of(tensor, payload)
        except ProtocolError:
            return False
        if output >= len(self.program.outputs):
            return False
        box = self.program.outputs[output].shard.box
        return not box.axes or array.size <= prod(box.shape)


def _cut(program: m.Program, send: m.Send) -> Cut:
    piece = send.piece
    for position, output in enumerate(program.outputs):
        shard = output.shard
        same = (shard.value, shard.over) == (piece.value, piece.over)
        if same and shard.box.contains(piece.box):
            whole = shard.box == piece.box
            return Cut(send, position, None if whole else piece.box.within(shard.box))
    raise AssertionError(f"{piece} is not among the outputs of {program.place}")


class Gathering:
    """The inputs of one task of one request while their pieces come. Mutable: owned by the core.

    Parts of a sum are kept until all are here and then added in order (``mapreduce.reduce``); any
    other piece is copied into its place as it comes, which is the one copy of what is received.
    """

    __slots__ = ("_missing", "_parts", "_values", "recipe")

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._missing = set(recipe.slots)
        self._values: list[Array | None] = [None] * len(recipe.shapes)
        self._parts: dict[int, list[tuple[Shard, Array]]] = {}

    @property
    def missing(self) -> frozenset[int]:
        return frozenset(self._missing)

    @property
    def complete(self) -> bool:
        return not self._missing

    def put(self, number: int, array: Array) -> bool:
        """Whether somebody awaits such a piece. One that comes again changes nothing."""
        slot = self.recipe.slots.get(number)
        if slot is None or not slot.fits(array):
            return False
        if number not in self._missing:
            return True
        self._missing.discard(number)
        if slot.value in self.recipe.sums:
            self._parts.setdefault(slot.value, []).append((slot.shard, array))
        elif slot.where is None:
            self._values[slot.value] = widened(array) if slot.half else array
        else:
            value = self._values[slot.value]
            if value is None:
                shape = self.recipe.shapes[slot.value]
                assert shape is not None, "an input of one piece has no part"
                dtype = np.dtype(np.float32) if slot.half else array.dtype
                value = self._values[slot.value] = np.empty(shape, dtype)
            value[slot.where] = array  # float16 becomes float32 on the way into place
        return True

    def inputs(self) -> dict[str, Array]:
        """The task's inputs by name, once all are here."""
        assert self.complete, f"pieces are missing: {self._missing}"
        for position, parts in self._parts.items():
            self._values[position] = reduce(self.recipe.program.inputs[position].box.box, parts)
        found: dict[str, Array] = {}
        for value, array in zip(self.recipe.program.inputs, self._values, strict=True):
            assert array is not None, f"{value.name} has no pieces"
            found[value.name] = array
        return found
