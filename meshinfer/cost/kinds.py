"""Which operators run at one speed: the kinds that onnxruntime's CPU kernels tell apart.

A device is measured once for each kind (``cluster.profiler`` has a probe for each). Where the
speeds lie apart was measured over the kernels of 13 networks on one thread (AVX-512, 95 GFLOP/s).
"""

from __future__ import annotations

from enum import IntEnum
from math import prod

from meshinfer.graph import Graph, Op
from meshinfer.ops.kernels import in_blocks


class OpKind(IntEnum):
    """Operators of one speed. The unit is the FLOP as the operator's rule counts it, an element
    where a rule counts elements."""

    DENSE = 0
    """Convolutions over all channels, of any window: one matrix product after another."""
    FIRST = 1
    """Convolutions of an image's few channels."""
    DEPTHWISE = 2
    GROUPED = 3
    """Convolutions in groups that fill the blocked layout (NCHWc)."""
    LOOSE = 4
    """Convolutions in groups outside that layout: copied and multiplied group by group."""
    ODD = 5
    """Depthwise convolutions outside that layout, of a number of channels that no block fits."""
    MATRIX = 6
    """Matrix products of many rows."""
    VECTOR = 7
    """Matrix products of few rows: as fast as the weights are read, which are not cached."""
    INT8 = 8
    WINDOW = 9
    """Pooling."""
    FUNCTION = 10
    """Pointwise with an exponential or the like inside, and normalisation, an element."""
    OTHER = 11
    """All else; most of it is bound by the bytes that it moves."""


FEW_CHANNELS = 8
FEW_ROWS = 4
_CONVS = ("Conv", "ConvTranspose")
_PRODUCTS = ("Gemm", "MatMul")
_INT8 = frozenset(
    (
        "QLinearConv ConvInteger QGemm QLinearMatMul MatMulInteger MatMulIntegerToFloat "
        "DynamicQuantizeMatMul"
    ).split()
)
_WINDOWS = frozenset("MaxPool AveragePool LpPool QLinearAveragePool LRN".split())
_FUNCTIONS = frozenset(
    (
        "Acos Acosh Asin Asinh Atan Atanh Celu Cos Cosh Elu Erf Exp Gelu GroupNormalization "
        "HardSwish InstanceNormalization LayerNormalization Log LogSoftmax LogSumExp "
        "LpNormalization Mish Pow QLinearSigmoid ReduceLogSumExp Selu Sigmoid Sin Sinh Softmax "
        "Softplus Softsign Sqrt Tan Tanh"
    ).split()
)


def kind_of(op: Op) -> OpKind:
    """The kind of a node. Worked out once a node."""
    known = op.graph.memo.get(("kind", op.index))
    if known is None:
        known = op.graph.memo["kind", op.index] = _kind(op)
    found: OpKind = known
    return found


def _kind(op: Op) -> OpKind:
    if op.type in _INT8:
        return OpKind.INT8
    if op.type in _CONVS:
        return OpKind.INT8 if _dequantised(op.graph, op) else _convolution(op)
    if op.type in _PRODUCTS:
        return OpKind.INT8 if _dequantised(op.graph, op) else _product(op)
    if op.type in _WINDOWS:
        return OpKind.WINDOW
    return OpKind.FUNCTION if op.type in _FUNCTIONS else OpKind.OTHER


def _dequantised(graph: Graph, op: Op) -> bool:
    """Whether onnxruntime makes an int8 kernel of it: both operands come from a DQ."""
    makers = [graph.producer.get(name, -1) for name in op.inputs[:2]]
    return all(i >= 0 and graph.ops[i].type == "DequantizeLinear" for i in makers)


def _convolution(op: Op) -> OpKind:
    weights = op.graph.shape(op.inputs[1])
    if weights is None or len(weights) < 3:
        return OpKind.DENSE
    groups = int(op.attributes.get("group", 1))
    if groups == 1:
        few = op.type == "Conv" and weights[1] < FEW_CHANNELS
        return OpKind.FIRST if few else OpKind.DENSE
    if op.type != "Conv" or not in_blocks(op):
        return OpKind.ODD if weights[1] == 1 else OpKind.LOOSE
    return OpKind.DEPTHWISE if weights[1] == 1 else OpKind.GROUPED


def _product(op: Op) -> OpKind:
    """Few rows against a matrix that is a weight: the weights are read once and used little."""
    shape = op.graph.shape(op.inputs[0])
    if shape is None or not shape or not op.graph.is_initializer(op.inputs[1]):
        return OpKind.MATRIX
    flipped = op.type == "Gemm" and bool(op.attributes.get("transA", 0))
    rows = shape[-1] if flipped else prod(shape[:-1])
    return OpKind.VECTOR if rows <= FEW_ROWS else OpKind.MATRIX
