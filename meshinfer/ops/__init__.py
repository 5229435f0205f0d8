"""The operator table: which rule a node follows. Whatever has none is a barrier and runs whole."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from meshinfer.geometry import Box
from meshinfer.graph import Op
from meshinfer.ops import conv, layout, matmul, pointwise, pool, reduce
from meshinfer.ops.rule import Boxes, Emission, Emitter, Rule

__all__ = ["BARRIER", "TABLE", "Boxes", "Emission", "Emitter", "Rule", "is_random", "rule_of"]

TABLE: dict[str, Rule] = {
    "Conv": conv.CONV,
    "MaxPool": pool.POOL,
    "AveragePool": pool.POOL,
    "Gemm": matmul.GEMM,
    "MatMul": matmul.MATMUL,
    **pointwise.ROWS,
    **layout.ROWS,
    **reduce.ROWS,
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
    """The rule of a node, or ``BARRIER``: no row, unknown shapes, or a case the row does not
    cover. Worked out once a node."""
    known = op.graph.memo.get(("rule", op.index))
    if known is None:
        known = op.graph.memo["rule", op.index] = _find_rule(op)
    assert isinstance(known, Rule)
    return known


def _find_rule(op: Op) -> Rule:
    rule = TABLE.get(op.type) if op.domain == "" else None
    if rule is None or op.captured:
        return BARRIER
    graph = op.graph
    names = [n for n in (*op.inputs, *op.outputs) if n]
    tensors = all(graph.dtype(n) not in (None, ir.DataType.STRING) for n in names)
    if not tensors or any(graph.shape(n) is None for n in names):
        return BARRIER
    if any(0 in (graph.shape(n) or ()) for n in op.outputs if n):
        return BARRIER  # nothing to split in an empty value
    return rule if rule.applies(op) else BARRIER


def is_random(op: Op) -> bool:
    """Whether running a node twice may give two answers, so that it must run once."""
    return rule_of(op) is BARRIER and _draws(op.proto)


def _draws(node: onnx.NodeProto) -> bool:
    """Whether a node, or one inside its subgraphs, draws random numbers."""
    graphs = [g for a in node.attribute for g in (a.g, *a.graphs)]
    return node.op_type in _RANDOM or any(_draws(inner) for g in graphs for inner in g.node)
