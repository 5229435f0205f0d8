"""Rule of Pad: a box reads what lies inside, or what its border repeats; the rest is made anew.

Source: the ONNX operator Pad (opsets 2 to newest): constant, reflect, edge, wrap; negative pads
crop. Pads and axes must be constants; the constant value may be computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshinfer.geometry import Box, Interval
from meshinfer.graph import Op
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only


def _mode(op: Op) -> str:
    return str(op.attributes.get("mode", b"constant").decode())


def _pads(op: Op) -> list[tuple[int, int]]:
    """Pads at the beginning and end of each axis of the input."""
    rank = len(op.shape(0))
    if op.graph.opset < 11:
        values, axes = list(op.attributes["pads"]), list(range(rank))
    else:
        given, chosen = op.constant(1), op.constant(3)
        assert given is not None
        values = [int(v) for v in given.reshape(-1)]
        axes = list(range(rank)) if chosen is None else [int(a) % rank for a in chosen.reshape(-1)]
    found = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        found[axis] = (values[i], values[i + len(axes)])
    return found


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of ``size`` inputs, of which ``[start, stop)`` are kept; output ``begin`` is the
    first that is not made by padding."""

    mode: str
    start: int
    stop: int
    begin: int

    def index(self, out: Interval) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """The input that each output repeats; for constant padding those outside do not count."""
        kept = self.stop - self.start
        x = np.arange(out.start, out.stop, dtype=np.int64) - self.begin
        if self.mode == "wrap":
            x = x % kept
        elif self.mode == "reflect":
            x = np.abs(x) % max(1, 2 * (kept - 1))
            x = np.minimum(x, 2 * (kept - 1) - x)
        return np.clip(x, 0, kept - 1) + self.start

    def inside(self, out: Interval) -> Interval:
        """The outputs that are not made by padding; may be empty."""
        return out.intersect(Interval(self.begin, self.begin + self.stop - self.start))

    def touching(self, out: Interval) -> Interval:
        """The outputs, grown to the nearest that is not made by padding."""
        last = self.begin + self.stop - self.start - 1
        return Interval(min(out.start, last), max(out.stop, self.begin + 1))

    def reads(self, out: Interval) -> Interval:
        if self.mode == "constant":
            return self.inside(out).shift(self.start - self.begin)
        index = self.index(out)
        return Interval(int(index.min()), int(index.max()) + 1)

    def pads(self, out: Interval) -> tuple[int, int] | None:
        """How a Pad of what ``reads`` gives makes these outputs; None when it would not."""
        inside, reads = self.inside(out), self.reads(out)
        pads = inside.start - out.start, out.stop - inside.stop
        if inside.size <= 0 or reads.size + sum(pads) != out.size:
            return None
        own = _Axis(self.mode, 0, reads.size, pads[0])
        made = own.index(Interval(0, out.size)) + reads.start
        return pads if np.array_equal(made, self.index(out)) else None


def _axes(op: Op) -> list[_Axis]:
    return [
        _Axis(_mode(op), max(0, -begin), size - max(0, -end), max(0, begin))
        for size, (begin, end) in zip(op.shape(0), _pads(op), strict=True)
    ]


def _objection(op: Op) -> str:
    if op.graph.opset >= 11 and (op.constant(1) is None or (op.has(3) and op.constant(3) is None)):
        return "its pads are computed"
    for axis, (begin, end) in zip(_axes(op), _pads(op), strict=True):
        kept = axis.stop - axis.start
        if kept <= 0:
            return "nothing of its input is left"
        if _mode(op) != "constant" and max(begin, end) > kept - (_mode(op) == "reflect"):
            return "it pads by more than there is"
    return ""


def _align(op: Op, outs: Boxes) -> Boxes:
    box = only(outs)
    if _mode(op) == "constant":
        box = Box(tuple(a.touching(r) for a, r in zip(_axes(op), box, strict=True)))
    return (box,)


def _footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    data = Box(tuple(a.reads(r) for a, r in zip(_axes(op), only(outs), strict=True)))
    value = op.graph.whole(op.inputs[2]) if op.has(2) and _mode(op) == "constant" else None
    return (data, None, value, None)[: len(op.inputs)]


def _emit(op: Op, job: Emission, e: Emitter) -> None:
    box, data, source = only(job.outs), job.ins[0], job.inputs[0]
    assert data is not None
    pads = [axis.pads(r) for axis, r in zip(_axes(op), box, strict=True)]
    # An axis that no Pad of the crop can make is gathered; a copy either way.
    for i, (axis, r) in enumerate(zip(_axes(op), box, strict=True)):
        if pads[i] is None:
            target = e.fresh("gathered")
            e.node("Gather", [source, e.array(axis.index(r) - data[i].start)], [target], axis=i)
            source = target
    amounts = [p or (0, 0) for p in pads]
    flat = [p[0] for p in amounts] + [p[1] for p in amounts]
    if not any(flat):
        e.node("Identity", [source], job.outputs)
    elif e.opset < 11:
        e.copy(op, [source], job.outputs, pads=flat)
    else:
        value = job.inputs[2:3] if job.inputs[2:3] != ("",) else ()
        e.copy(op, [source, e.ints(flat), *value], job.outputs)


PAD = Rule(footprint=_footprint, emit=_emit, align=_align, objection=_objection)
