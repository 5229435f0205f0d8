"""What a program works out when it is installed: where pieces go, what is cut for whom."""

from __future__ import annotations

import numpy as np
import pytest

from meshinfer.geometry import Box, Interval
from meshinfer.mapreduce import reduce
from meshinfer.plan import Shard
from meshinfer.protocol import messages as m
from meshinfer.scheduler.acks import AckBox
from meshinfer.scheduler.events import Array, Plane, Send
from meshinfer.scheduler.recipe import Gathering, Recipe

RNG = np.random.default_rng(3)
WHOLE = RNG.standard_normal((1, 2, 9, 5)).astype(np.float32)


def rows(start: int, stop: int) -> Box:
    return Box((Interval(0, 1), Interval(0, 2), Interval(start, stop), Interval(0, 5)))


def piece(box: Box, over: Box | None = None, slot: int = 0) -> m.Piece:
    return m.Piece(shard=Shard("x", box, over), producer=(0, 0), slot=slot)


def program(box: Box, *pieces: m.Piece, sends: tuple[m.Send, ...] = ()) -> m.Program:
    return m.Program(
        place=(1, 0),
        inputs=(m.Value(name="x", box=Shard("x", box), pieces=pieces),),
        outputs=(m.Output(name="y", shard=Shard("y", box)),),
        sends=sends,
    )


def part(box: Box) -> Array:
    return WHOLE[tuple(slice(r.start, r.stop) for r in box)]


def test_pieces_are_put_in_place_in_any_order_and_twice() -> None:
    boxes = [rows(2, 3), rows(3, 6), rows(6, 7)]
    recipe = Recipe.of(program(rows(2, 7), *(piece(b, slot=i) for i, b in enumerate(boxes))))
    gathering = Gathering(recipe)
    for i in (2, 0, 2):
        assert gathering.put(i, part(boxes[i])) and not gathering.complete
    assert gathering.put(1, part(boxes[1])) and gathering.complete
    np.testing.assert_array_equal(gathering.inputs()["x"], part(rows(2, 7)))


def test_one_piece_that_is_all_is_not_copied() -> None:
    box = rows(0, 9)
    gathering = Gathering(Recipe.of(program(box, piece(box))))
    assert gathering.put(0, WHOLE)
    assert gathering.inputs()["x"] is WHOLE


def test_parts_of_a_sum_are_added_in_their_order_whenever_they_come() -> None:
    box, spans = rows(0, 9), [Box((Interval(i, i + 1),)) for i in range(3)]
    arrays = [RNG.standard_normal(WHOLE.shape).astype(np.float32) * 10**i for i in range(3)]
    recipe = Recipe.of(program(box, *(piece(box, over, i) for i, over in enumerate(spans))))
    answers = []
    for order in ((0, 1, 2), (2, 0, 1)):
        gathering = Gathering(recipe)
        for i in order:
            assert gathering.put(i, arrays[i])
        answers.append(gathering.inputs()["x"])
    expected = reduce(box, [(Shard("x", box, s), a) for s, a in zip(spans, arrays, strict=True)])
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], expected)


@pytest.mark.parametrize(
    ("slot", "array"),
    [(1, part(rows(2, 7))), (0, part(rows(2, 6)))],
    ids=["another slot", "another shape"],
)
def test_what_nobody_awaits_is_refused(slot: int, array: Array) -> None:
    gathering = Gathering(Recipe.of(program(rows(2, 7), piece(rows(2, 7)))))
    assert not gathering.put(slot, array)
    assert not gathering.complete


def test_each_reader_gets_its_cut_of_an_output() -> None:
    sends = tuple(
        m.Send(piece=Shard("y", box), device="d", consumer=(2, 0), slot=0)
        for box in (rows(0, 9), rows(4, 5))
    )
    recipe = Recipe.of(program(rows(0, 9), piece(rows(0, 9)), sends=sends))
    whole, border = (cut.of([WHOLE]) for cut in recipe.cuts)
    assert whole is WHOLE
    np.testing.assert_array_equal(border, part(rows(4, 5)))


def test_acknowledgements_go_with_a_piece_for_the_same_peer_and_only_once() -> None:
    box = AckBox()
    for number in (1, 2, 3):
        box.add("a" if number < 3 else "b", number, 10, now=0.0)
    assert box.take("a") == (1, 2)
    assert box.take("a") == () and box.take("c") == ()
    assert box.due(60.0) == [Send(Plane.BULK, "b", m.Ack(ids=(3,)))]
