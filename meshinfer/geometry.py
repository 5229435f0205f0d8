"""Half-open intervals and boxes, and the window arithmetic of convolutions; nothing else.

A *box* spans all axes of a value, so a band of rows, a grid cell, a channel slice and a batch
slice are one thing. Units are elements. A scalar has the box with no axes, of volume 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class Interval(NamedTuple):
    """``[start, stop)``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def intersect(self, other: Interval) -> Interval:
        """The common part; empty (size <= 0) when there is none."""
        start = self[0] if self[0] > other[0] else other[0]
        return Interval(start, self[1] if self[1] < other[1] else other[1])

    def hull(self, other: Interval) -> Interval:
        return Interval(min(self.start, other.start), max(self.stop, other.stop))

    def shift(self, offset: int) -> Interval:
        return Interval(self.start + offset, self.stop + offset)


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """One interval for each axis of a value."""

    axes: tuple[Interval, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """The box of a whole value of this shape."""
        return Box(tuple(Interval(0, n) for n in shape))

    @staticmethod
    def of(*ranges: tuple[int, int]) -> Box:
        """``Box.of((0, 1), (0, 3))``: from plain pairs."""
        return Box(tuple(Interval(a, b) for a, b in ranges))

    def __len__(self) -> int:
        return len(self.axes)

    def __iter__(self) -> Iterator[Interval]:
        return iter(self.axes)

    def __getitem__(self, axis: int) -> Interval:
        return self.axes[axis]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(r.size for r in self.axes)

    @property
    def start(self) -> tuple[int, ...]:
        return tuple(r.start for r in self.axes)

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(r.stop for r in self.axes)

    @property
    def volume(self) -> int:
        volume = 1
        for start, stop in self.axes:  # no generator: this is asked a million times a plan
            volume *= stop - start if stop > start else 0
        return volume

    @property
    def empty(self) -> bool:
        return any(stop <= start for start, stop in self.axes)

    def replace(self, axis: int, interval: Interval) -> Box:
        return Box((*self.axes[:axis], interval, *self.axes[axis + 1 :]))

    def intersect(self, other: Box) -> Box:
        """The common part; ``.empty`` when there is none."""
        assert len(self) == len(other), f"boxes of rank {len(self)} and {len(other)}"
        return Box(tuple(a.intersect(b) for a, b in zip(self.axes, other.axes, strict=True)))

    def hull(self, other: Box) -> Box:
        """The smallest box that holds both."""
        assert len(self) == len(other), f"boxes of rank {len(self)} and {len(other)}"
        return Box(tuple(a.hull(b) for a, b in zip(self.axes, other.axes, strict=True)))

    def contains(self, other: Box) -> bool:
        return len(self) == len(other) and all(
            a.start <= b.start and b.stop <= a.stop
            for a, b in zip(self.axes, other.axes, strict=True)
        )

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The slices that cut this box out of an array that holds ``outer``."""
        assert outer.contains(self), f"{self} is not inside {outer}"
        return tuple(
            slice(r.start - o.start, r.stop - o.start)
            for r, o in zip(self.axes, outer.axes, strict=True)
        )

    def __str__(self) -> str:
        return "[" + ",".join(f"{r.start}:{r.stop}" for r in self.axes) + "]"


def hull(boxes: Iterable[Box]) -> Box:
    """The smallest box that holds all of them (at least one)."""
    result: Box | None = None
    for box in boxes:
        result = box if result is None else result.hull(box)
    assert result is not None, "hull of no boxes"
    return result


def tiles_exactly(whole: Box, parts: Sequence[Box]) -> bool:
    """Whether the parts cover ``whole`` once: inside, pairwise disjoint, volumes adding up.

    An empty whole is one part: itself.
    """
    if whole.empty:
        return list(parts) == [whole]
    if any(part.empty or not whole.contains(part) for part in parts):
        return False
    if sum(part.volume for part in parts) != whole.volume:
        return False
    # Sweep along the first axis, so that a band split costs n log n and not n squared.
    ordered = sorted(parts)
    for i, part in enumerate(ordered):
        for other in ordered[i + 1 :]:
            if part.axes and other[0].start >= part[0].stop:
                break
            if not part.intersect(other).empty:
                return False
    return True


def split_even(size: int, parts: int) -> list[Interval]:
    """``parts`` intervals over ``[0, size)`` whose sizes differ by at most one; some may be
    empty."""
    return split_weighted(size, [1.0] * parts)


def split_weighted(size: int, weights: Sequence[float], grain: int = 1) -> list[Interval]:
    """Intervals over ``[0, size)`` in proportion to the weights; some may be empty.

    Borders lie at multiples of ``grain``, and the last part is no smaller than that.
    """
    total = sum(weights)
    assert total > 0 and all(w >= 0 for w in weights), f"weights {weights}"
    borders = [0]
    done = 0.0
    most = size if grain == 1 else size // grain * grain - (grain if size % grain else 0)
    for weight in weights[:-1]:
        done += weight
        borders.append(max(0, min(most, round(size * done / total / grain) * grain)))
    borders.append(size)
    return [Interval(a, b) for a, b in pairwise(borders)]


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window on one axis (Dumoulin and Visin 2016, "A guide to convolution arithmetic").

    Output ``o`` reads inputs ``o*stride - pad_begin + [0, dilation, .., (kernel-1)*dilation]`` of
    an axis of ``size`` elements; whatever lies outside ``[0, size)`` is padding.
    """

    size: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    pad_begin: int = 0
    pad_end: int = 0

    @property
    def extent(self) -> int:
        return (self.kernel - 1) * self.dilation + 1

    def reach(self, out: Interval) -> Interval:
        """What the outputs read, padding included: may lie outside ``[0, size)``."""
        start = out.start * self.stride - self.pad_begin
        return Interval(start, (out.stop - 1) * self.stride - self.pad_begin + self.extent)

    def touching(self, out: Interval) -> Interval:
        """The outputs, grown where all that they read is padding until one real element is read.

        An operator cannot be emitted for an empty input, so such a task computes a neighbour too
        and crops it.
        """
        reach = self.reach(out)
        if reach.stop <= 0:
            # The first output whose window ends beyond element 0.
            need = -(-(self.pad_begin + 1 - self.extent) // self.stride)
            return Interval(out.start, max(out.stop, need + 1))
        if reach.start >= self.size:
            need = (self.size - 1 + self.pad_begin) // self.stride
            return Interval(min(out.start, need), out.stop)
        return out

    def footprint(self, out: Interval) -> Interval:
        """The real elements that the outputs (grown by ``touching``) read; never empty."""
        result = self.reach(self.touching(out)).intersect(Interval(0, self.size))
        assert result.size > 0, f"{self} reads nothing for {out}"
        return result

    def padding(self, out: Interval) -> tuple[int, int]:
        """What ``footprint`` clipped away at the beginning and at the end: the pads to emit."""
        reach = self.reach(self.touching(out))
        return max(0, -reach.start), max(0, reach.stop - self.size)
