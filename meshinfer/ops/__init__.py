"""The operator table: which rule a node follows. Whatever has none is a barrier and runs whole."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from meshinfer.geometry import Box
from meshinfer.graph import Op
from meshinfer.ops import (
    conv,
    conv_transpose,
    gather,
    joint,
    layout,
    matmul,
    normalise,
    pad,
    pointwise,
    pool,
    quant,
    reduce,
    resize,
)
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule

__all__ = [
    "BARRIER",
    "TABLE",
    "Boxes",
    "Emission",
    "Emitter",
    "Rule",
    "is_random",
    "rule_of",
    "why_barrier",
]

TABLE: dict[str, Rule] = {  # operators of other domains as "domain:type"
    "Conv": conv.CONV,
    "ConvTranspose": conv_transpose.CONV_TRANSPOSE,
    "Pad": pad.PAD,
    "MaxPool": pool.POOL,
    "AveragePool": pool.POOL,
    "LpPool": pool.POOL,
    "LRN": pool.LRN,
    "Gemm": matmul.GEMM,
    "MatMul": matmul.MATMUL,
    "Einsum": matmul.EINSUM,
    "Resize": resize.RESIZE,
    "Upsample": resize.RESIZE,
    **pointwise.ROWS,
    **normalise.ROWS,
    **layout.ROWS,
    **reduce.ROWS,
    **quant.ROWS,
    **gather.ROWS,
    **joint.ROWS,
}

_RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


def _whole_inputs(op: Op, outs: Boxes, over: Box | None) -> Boxes:
    return tuple(op.graph.whole(n) if n else None for n in (*op.inputs, *op.captured))


def _whole_outputs(op: Op, outs: Boxes) -> Boxes:
    # All outputs are computed; those that nobody asked for are dropped by the engine.
    return tuple(op.graph.whole(n) if n else None for n in op.outputs)


def _emit_whole(op: Op, job: Emission, e: Emitter) -> None:
    e.copy(op, job.inputs[: len(op.inputs)], job.outputs)


BARRIER = Rule(footprint=_whole_inputs, emit=_emit_whole, align=_whole_outputs, split=lambda op: ())
"""Runs whole on one device: reads and makes whole values, of any type and any shape."""


def rule_of(op: Op) -> Rule:
    """The rule of a node, or ``BARRIER``. Worked out once a node."""
    return _found(op)[0]


def why_barrier(op: Op) -> str:
    """Why a node runs whole, in words for people; empty when it follows a rule."""
    return _found(op)[1]


def _found(op: Op) -> tuple[Rule, str]:
    known = op.graph.memo.get(("rule", op.index))
    if known is None:
        rule, why = TABLE.get(_key(op)), _objection(op)
        known = (BARRIER, why) if rule is None or why else (rule, "")
        op.graph.memo["rule", op.index] = known
    found: tuple[Rule, str] = known
    return found


def _key(op: Op) -> str:
    return f"{op.domain}:{op.type}" if op.domain else op.type


def _objection(op: Op) -> str:
    rule, graph = TABLE.get(_key(op)), op.graph
    if rule is None:
        return f"{_key(op)} has no rule"
    if op.captured:
        return "a subgraph of it reads values of the outer graph"
    if op.type == "BatchNormalization" and len([n for n in op.outputs if n]) > 1:
        # Not folded either where its inputs are weights (BiT, NFNet of torch's older exporter): the
        # convolutions behind would be computed by other kernels, 1.6e-5 away in BiT.
        return "it is in training form: its statistics are of all that it reads"
    names = [n for n in (*op.inputs, *op.outputs) if n]
    if any(graph.dtype(n) in (None, ir.DataType.STRING) for n in names):
        return "it reads or makes what is no tensor of numbers"
    if any(graph.shape(n) is None for n in names):
        return "a shape of it depends on the data"
    if any(0 in (graph.shape(n) or ()) for n in op.outputs if n):
        return "its value is empty"
    if any(0 in (graph.shape(n) or ()) for n in op.inputs if n and not graph.is_initializer(n)):
        return "it reads a value without elements"
    return rule.objection(op)


def is_random(op: Op) -> bool:
    """Whether running a node twice may give two answers, so that it must run once."""
    return rule_of(op) is BARRIER and _draws(op.proto)


def _draws(node: onnx.NodeProto) -> bool:
    """Whether a node, or one inside its subgraphs, draws random numbers."""
    graphs = [g for a in node.attribute for g in (a.g, *a.graphs)]
    return node.op_type in _RANDOM or any(_draws(inner) for g in graphs for inner in g.node)
