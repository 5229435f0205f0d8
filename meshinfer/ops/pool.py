"""Rules of MaxPool and AveragePool: windows whose padding is the operator's own identity.

Source: the ONNX operators MaxPool and AveragePool. MaxPool pads with minus infinity, AveragePool
counts its padding or not (``count_include_pad``); what lies beyond it (``ceil_mode``) never counts.
"""

from __future__ import annotations

from meshinfer.geometry import Box, Window
from meshinfer.graph import Op
from meshinfer.ops.conv import align_spatial, windows
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule, only


def _windows(op: Op) -> list[Window]:
    return windows(op, tuple(op.attributes["kernel_shape"]))


def _objection(op: Op) -> str:
    if len([o for o in op.outputs if o]) > 1:
        return "its indices are positions in the whole value"
    if any(w.pad_begin >= w.kernel or w.pad_end >= w.kernel for w in _windows(op)):
        return "it pads by a whole kernel"
    dilated = any(d != 1 for d in op.attributes.get("dilations", [1]))
    ceil = bool(op.attributes.get("ceil_mode", 0))
    # A dilated window overhangs by more than the padding that onnxruntime admits.
    odd = dilated and (ceil or op.type == "AveragePool")
    return "its dilated windows overhang" if odd else ""


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
    attributes: dict[str, object] = {"ceil_mode": ceil} if e.opset >= 10 else {}
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
