"""Rules of pools over windows, whose padding is the operator's own identity, and of LRN.

Source: the ONNX operators MaxPool, AveragePool, LpPool and LRN. MaxPool pads with minus infinity,
LpPool with 0, AveragePool counts its padding or not (``count_include_pad``); what lies beyond it
(``ceil_mode``) never counts. LRN's window lies along the channels.
"""

from __future__ import annotations

from meshinfer.geometry import Box, Interval, Window
from meshinfer.graph import Op
from meshinfer.ops.conv import align_spatial, windows
from meshinfer.ops.layout import crop
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only


def _windows(op: Op) -> list[Window]:
    return windows(op, tuple(op.attributes["kernel_shape"]))


def _objection(op: Op) -> str:
    if len([o for o in op.outputs if o]) > 1:
        return "its indices are positions in the whole value"
    if any(w.pad_begin >= w.kernel or w.pad_end >= w.kernel for w in _windows(op)):
        return "it pads by a whole kernel"
    ends = [
        w.padding(Interval(0, n))[1] for w, n in zip(_windows(op), op.out_shape()[2:], strict=True)
    ]
    if any(end >= w.kernel for w, end in zip(_windows(op), ends, strict=True)):
        # onnxruntime admits no padding of a kernel, dilated or not.
        return "its dilated windows overhang by a kernel"
    return ""


def _align(op: Op, outs: Boxes) -> Boxes:
    return (align_spatial(op, only(outs), _windows(op)), *(None for _ in outs[1:]))


def _footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box = only(outs)
    spatial = [w.footprint(box[i]) for i, w in enumerate(_windows(op), start=2)]
    return (Box((box[0], box[1], *spatial)),)


def _emit(op: Op, job: Emission, e: Emitter) -> None:
    box = only(job.outs)
    wins = _windows(op)
    pads = [w.padding(box[i]) for i, w in enumerate(wins, start=2)]
    ceil = 0
    if op.attributes.get("count_include_pad", 0) and any(
        end > w.pad_end for (_, end), w in zip(pads, wins, strict=True)
    ):
        # Only the declared padding counts; the rest of the window is left to ceil_mode.
        pads = [(b, min(end, w.pad_end)) for (b, end), w in zip(pads, wins, strict=True)]
        ceil = 1
    rounds = e.opset >= (18 if op.type == "LpPool" else 10)
    attributes: dict[str, object] = {"ceil_mode": ceil} if rounds else {}
    e.copy(
        op,
        job.inputs,
        job.outputs[:1],
        drop=("auto_pad", "ceil_mode"),
        pads=[p[0] for p in pads] + [p[1] for p in pads],
        **attributes,
    )


def _flops(op: Op, outs: Boxes) -> int:
    volume = only(outs).volume
    for k in op.attributes["kernel_shape"]:
        volume *= k
    return volume


POOL = Rule(footprint=_footprint, emit=_emit, align=_align, objection=_objection, flops=_flops)


# --- LRN ------------------------------------------------------------------------------------------


def _lrn_footprint(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    box, size = only(outs), int(op.attributes["size"])
    reach = Interval(box[1].start - (size - 1) // 2, box[1].stop + size // 2)
    return (box.replace(1, reach.intersect(Interval(0, op.shape(0)[1]))),)


def _lrn_emit(op: Op, job: Emission, e: Emitter) -> None:
    data, target = job.ins[0], e.fresh("normalised")
    assert data is not None
    e.copy(op, job.inputs, [target])
    crop(e, target, data, only(job.outs), job.outputs[0])


def _lrn_flops(op: Op, outs: Boxes) -> int:
    return (2 * int(op.attributes["size"]) + 3) * only(outs).volume


LRN = Rule(footprint=_lrn_footprint, emit=_lrn_emit, flops=_lrn_flops)
