"""Boxes and windows against brute force: every element is counted one by one."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshinfer.geometry import (
    Box,
    Interval,
    Window,
    hull,
    split_even,
    split_weighted,
    tiles_exactly,
)

SIZES = st.integers(0, 4)


@st.composite
def boxes(draw: st.DrawFn, rank: int, size: int = 4) -> Box:
    ranges = []
    for _ in range(rank):
        start = draw(st.integers(0, size - 1))
        ranges.append(Interval(start, draw(st.integers(start, size))))
    return Box(tuple(ranges))


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(a, b) for a, b in box)))


@st.composite
def windows(draw: st.DrawFn) -> tuple[Window, int]:
    """A window with the number of its outputs: any, kernels larger than the axis included."""
    window = Window(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 6)),
        draw(st.integers(0, 6)),
    )
    free = window.size + window.pad_begin + window.pad_end - window.extent
    return window, free // window.stride + 1


def taps(window: Window, out: Interval) -> list[int]:
    """Places that the outputs read, padding as places outside the axis."""
    return [
        o * window.stride - window.pad_begin + k * window.dilation
        for o in range(*out)
        for k in range(window.kernel)
    ]


@given(windows(), st.data())
def test_a_footprint_holds_every_real_element_read_and_padding_is_the_rest(
    drawn: tuple[Window, int], data: st.DataObject
) -> None:
    window, count = drawn
    if count < 1:
        return
    start = data.draw(st.integers(0, count - 1))
    out = Interval(start, data.draw(st.integers(start + 1, count)))
    grown, held = window.touching(out), window.footprint(out)
    assert grown.start <= out.start and out.stop <= grown.stop
    assert 0 <= held.start < held.stop <= window.size
    read = taps(window, grown)
    real = [i for i in read if 0 <= i < window.size]
    assert all(held.start <= i < held.stop for i in real)
    begin, end = window.padding(out)
    # The emitted operator, on the cropped axis with these pads, reads the very same places.
    assert min(read) >= held.start - begin and max(read) < held.stop + end
    assert begin == max(0, held.start - min(read)) and end == max(0, max(read) + 1 - held.stop)
    assert (held.size + begin + end - window.extent) // window.stride + 1 == grown.size


@given(windows(), st.data())
def test_outputs_that_touch_the_axis_are_not_grown(
    drawn: tuple[Window, int], data: st.DataObject
) -> None:
    window, count = drawn
    if count < 1:
        return
    start = data.draw(st.integers(0, count - 1))
    out = Interval(start, data.draw(st.integers(start + 1, count)))
    if any(0 <= i < window.size for i in taps(window, out)):
        assert window.touching(out) == out


@given(st.integers(1, 3), st.data())
def test_boxes_tile_a_whole_when_each_element_is_in_one_of_them(
    rank: int, data: st.DataObject
) -> None:
    whole = Box.whole([data.draw(st.integers(1, 3)) for _ in range(rank)])
    parts = data.draw(st.lists(boxes(rank), max_size=6))
    if data.draw(st.booleans()):  # often a true tiling, at times with one part changed
        parts = [whole]
        for axis in range(rank):
            cut = data.draw(st.integers(0, whole[axis].stop))
            halves = [Interval(0, cut), Interval(cut, whole[axis].stop)]
            parts = [p.replace(axis, h) for p in parts for h in halves if h.size]
        if data.draw(st.booleans()):
            parts[data.draw(st.integers(0, len(parts) - 1))] = data.draw(boxes(rank))
    counted = [e for part in parts for e in elements(part)]
    truth = sorted(counted) == sorted(elements(whole)) and not any(p.empty for p in parts)
    assert tiles_exactly(whole, parts) == truth


def test_an_empty_whole_is_tiled_by_itself_alone() -> None:
    empty = Box.of((0, 0), (0, 3))
    assert tiles_exactly(empty, [empty])
    assert not tiles_exactly(empty, [])
    assert not tiles_exactly(empty, [empty, empty])
    assert tiles_exactly(Box(()), [Box(())])
    assert not tiles_exactly(Box(()), [])


@given(st.integers(1, 3).flatmap(lambda rank: st.tuples(boxes(rank), boxes(rank))))
def test_intersections_hulls_and_containment_are_those_of_sets(pair: tuple[Box, Box]) -> None:
    a, b = pair
    common = elements(a) & elements(b)
    assert elements(a.intersect(b)) == common
    assert a.intersect(b).empty == (not common)
    assert elements(a) | elements(b) <= elements(hull([a, b]))
    assert a.volume == len(elements(a))
    if a.contains(b):
        assert elements(b) <= elements(a)
        assert [s.stop - s.start for s in b.within(a)] == list(b.shape)


@given(st.integers(0, 50), st.lists(st.floats(0, 10), min_size=1, max_size=6))
def test_weighted_parts_cover_all_in_order_and_in_proportion(
    size: int, weights: list[float]
) -> None:
    if sum(weights) < 1e-6:
        weights[0] = 1.0
    parts = split_weighted(size, weights)
    assert len(parts) == len(weights)
    assert parts[0].start == 0 and parts[-1].stop == size
    assert all(a.stop == b.start for a, b in pairwise(parts))
    for part, weight in zip(parts, weights, strict=True):
        assert part.size >= 0
        assert abs(part.size - size * weight / sum(weights)) <= 1 + 1e-9


@given(st.integers(0, 50), st.integers(1, 9))
def test_even_parts_differ_by_at_most_one(size: int, parts: int) -> None:
    sizes = [part.size for part in split_even(size, parts)]
    assert sum(sizes) == size and max(sizes) - min(sizes) <= 1


def test_a_box_outside_an_array_cannot_be_cut_from_it() -> None:
    with pytest.raises(AssertionError, match="is not inside"):
        Box.of((0, 3)).within(Box.of((1, 4)))
