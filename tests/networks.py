"""Random small networks as ONNX: every case of every rule can be drawn, on maps small enough to
tile.

A network is a chain of drawn blocks over [batch, channels, rows, columns] maps, with taps for
residuals and extra outputs, and a drawn head. No block ends in a ReLU of its own accord: zeros hide
wrong padding. Blocks keep values of order 1 and away from jumps, so that errors mean mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from architectures import Builder
from hypothesis import strategies as st
from net import DOUBLE, FLOAT, MICROSOFT, Block, Net, axes_op
from onnx import ModelProto, TensorProto, helper

OPSETS = (17, 11, 13, 21)


# -- windows ---------------------------------------------------------------------------------------


def conv(n: Net, x: str) -> str:
    _, cin, *size = n.shape[x]
    groups = n.pick(*(g for g in range(1, cin + 1) if cin % g == 0))
    cout = groups * n.number(1, max(1, 6 // groups))
    k = (n.number(1, 5), n.number(1, 5))
    stride, dilation = (n.number(1, 3), n.number(1, 3)), (n.pick(1, 1, 2, 3), n.pick(1, 1, 2, 3))
    extents = [(a - 1) * d + 1 for a, d in zip(k, dilation, strict=True)]
    # onnxruntime refuses SAME with dilation.
    same = ("SAME_UPPER", "SAME_LOWER") if dilation == (1, 1) else ()
    auto = n.pick(None, None, None, "VALID", *same)
    if auto == "VALID" and any(e > s for e, s in zip(extents, size, strict=True)):
        auto = None
    most = [e - 1 if n.coin() else e + 1 for e in extents]  # beyond e - 1: windows of padding only
    begins = [n.number(0, m) for m in most]
    ends = [n.number(0, m) for m in most]
    ends = [max(b, e - s - a) for a, b, e, s in zip(begins, ends, extents, size, strict=True)]
    return n.conv(
        x, cin, cout, k, stride, [*begins, *ends], dilation, groups, n.coin(), auto, gain=0.7
    )


def drops(size: int, kernel: int, stride: int, begin: int, end: int) -> bool:
    """Whether rounding up would give a window that starts in the trailing padding."""
    last = -(-(size + begin + end - kernel) // stride)
    return last * stride >= size + begin


def pool(n: Net, x: str) -> str:
    size = n.shape[x][2:]
    k = [n.number(1, 4), n.number(1, 4)]
    begins, ends = ([n.number(0, a - 1) for a in k] for _ in range(2))
    ends = [max(b, a - s - p) for a, b, s, p in zip(k, ends, size, begins, strict=True)]
    k = [max(a, b + 1) for a, b in zip(k, ends, strict=True)]  # a pad must be below the kernel
    attrs: dict[str, Any] = {
        "kernel_shape": k,
        "strides": [n.number(1, 3), n.number(1, 3)],
        "pads": [*begins, *ends],
        "ceil_mode": n.number(0, 1),
    }
    if any(drops(*v) for v in zip(size, k, attrs["strides"], begins, ends, strict=True)):
        attrs["ceil_mode"] = 0  # onnx and onnxruntime disagree: see test_importers
    if max(attrs["strides"]) <= min(k) and n.rarely():  # onnxruntime refuses negative SAME pads
        attrs |= {"ceil_mode": 0, "auto_pad": n.pick("SAME_UPPER", "SAME_LOWER")}
        del attrs["pads"]
    if n.coin():
        return str(n.op("AveragePool", x, count_include_pad=n.number(0, 1), **attrs))
    extents = [2 * (a - 1) + 1 for a in k]
    fits = all(s >= e for s, e in zip(size, extents, strict=True))
    if fits and "pads" in attrs and n.rarely():
        attrs["dilations"] = [2, 2]
    return str(n.op("MaxPool", x, **attrs))


def one_axis(n: Net, x: str) -> str:
    """A 1-D convolution and pool over the flattened map, and back to four axes."""
    batch, channels, *size = n.shape[x]
    flat = n.op("Reshape", [x, n.ints(0, 0, -1)])
    weight = n.normal(channels, channels, 3, scale=0.5)
    flat = n.op("Conv", [flat, weight], pads=[1, 1], kernel_shape=[3])
    flat = n.op("MaxPool", flat, pads=[1, 1], kernel_shape=[3])
    return str(n.op("Reshape", [flat, n.ints(batch, channels, *size)]))


def quantised_weights(n: Net, x: str) -> str:
    """A convolution whose weights are int8, with a scale for all or for each output channel."""
    cin = n.shape[x][1]
    each = (4,) if n.opset >= 13 and n.coin() else ()
    weight = n.const(n.rng.integers(-60, 60, (4, cin, 3, 1)).astype(np.int8))
    scale = n.const((n.rng.random(each) * 0.01 + 0.005).astype(np.float32))
    axes = {"axis": n.pick(0, -4)} if each else {}
    weight = n.op("DequantizeLinear", [weight, scale, n.const(np.zeros(each, np.int8))], **axes)
    return str(n.op("Conv", [x, weight], pads=[1, 0, 1, 0]))


def computed_weights(n: Net, x: str) -> str:
    """A convolution whose weights are computed: their slices travel like any other value."""
    if n.coin():
        return quantised_weights(n, x)
    cin = n.shape[x][1]
    scale = n.op("Sigmoid", axes_op(n, "ReduceMean", x, [0, 1, 2, 3], 18))
    weight = n.op("Mul", [n.normal(4, cin, 3, 1, scale=0.5), scale])
    return str(n.op("Conv", [x, weight], pads=[1, 0, 1, 0]))


# -- elementwise -----------------------------------------------------------------------------------


def activation(n: Net, x: str) -> str:
    kinds = ["LeakyRelu", "PRelu", "Clip", "Sigmoid", "Softmax", "Relu", "Tanh", "Elu", "Erf"]
    kind = n.pick(*kinds, *(["HardSwish"] if n.opset >= 14 else []), "HardSigmoid")
    channels = n.shape[x][1]
    if kind == "PRelu":
        return str(n.op(kind, [x, n.normal(*n.pick((1,), (channels, 1, 1)))]))
    if kind == "Clip":
        low, high = n.const(np.float32(-0.5)), n.const(np.float32(0.8))
        return str(n.op(kind, [x, *n.pick((low, high), ("", high), (low,))]))
    if kind == "Softmax":
        return str(n.op(kind, x, axis=n.pick(1, 2, 3, -1)))
    return str(n.op(kind, x))


def broadcast(n: Net, x: str) -> str:
    batch, c, h, w = n.shape[x]
    shape = n.pick((), (c, 1, 1), (1, c, 1, 1), (h, 1), (w,), (c, 1, w), (batch, c, h, w))
    kind = n.pick("Add", "Mul", "Sub", "Div", "Max", "Min", "Where")
    other = n.normal(*shape)
    if kind == "Div":
        other = n.const(off_zero(n, shape))
    if kind == "Where":
        return str(n.op(kind, [n.const(n.rng.random(shape) < 0.5), x, n.normal(c, 1, 1)]))
    flipped = kind != "Div" and n.coin()
    return str(n.op(kind, [other, x] if flipped else [x, other]))


def off_zero(n: Net, shape: tuple[int, ...]) -> np.ndarray:
    return (n.rng.random(shape) + 0.5).astype(np.float32)


def normalise(n: Net, x: str) -> str:
    """BatchNormalization; after a conv the importer fuses it, before one it stays."""
    return n.bn(x, n.shape[x][1])


def statistics(n: Net, x: str) -> str:
    """Normalisations whose statistics are over rows and columns, or over channels and columns."""
    batch, c, h, w = n.shape[x]
    kinds = ["rows", "instance", *(["layer"] if n.opset >= 17 else [])]
    kind = n.pick(*kinds, *(["group"] if n.opset >= 18 else []))
    groups = n.pick(*(g for g in range(1, c + 1) if c % g == 0))
    if kind == "instance":
        return str(n.op("InstanceNormalization", [x, n.normal(c), n.normal(c)], epsilon=0.01))
    if kind == "layer":
        axis = n.pick(1, 2, 3, -1)
        shape = n.shape[x][axis:]
        inputs = [x, n.normal(*shape), *n.pick((), (n.normal(*shape),))]
        return str(n.op("LayerNormalization", inputs, axis=axis, epsilon=0.01))
    if kind == "group":
        size = c if n.opset >= 21 else groups
        inputs = [x, n.normal(size), n.normal(size)]
        # In one pass: the smaller epsilon, the larger what rounding before it becomes.
        y = n.op("GroupNormalization", inputs, num_groups=groups, epsilon=0.5)
        n.know(y, n.shape[x], n.type[x])
        return n.know(y, n.shape[x])
    rows = n.op("Reshape", [x, n.ints(0, groups, -1)])  # as torch exports it before opset 21
    ones = [n.const(np.full(groups, value, np.float32)) for value in (1, 0)]
    rows = n.op("InstanceNormalization", [rows, *ones], epsilon=0.01)
    y = n.op("Mul", [n.op("Reshape", [rows, n.ints(batch, c, h, w)]), n.normal(c, 1, 1)])
    return str(n.op("Add", [y, n.normal(c, 1, 1)]))


def excite(n: Net, x: str) -> str:
    """Squeeze and excite (Hu et al. 2018): a global mean in the middle, multiplied back."""
    c = n.shape[x][1]
    mean = n.gap(x) if n.coin() else axes_op(n, "ReduceMean", x, [2, 3], 18)
    return str(n.op("Mul", [x, n.op("Sigmoid", n.conv(mean, c, c, 1))]))


def centre(n: Net, x: str) -> str:
    axes = n.pick([2, 3], [1], [-1], [-2, -3], [0, 2])
    kind = n.pick("ReduceMean", "ReduceMax", "ReduceL2", "ReduceMin")
    if n.coin():
        return str(n.op("Sub", [x, axes_op(n, kind, x, axes, 18, keepdims=1)]))
    reduced = axes_op(n, kind, x, axes, 18, keepdims=0)
    return str(n.op("Sub", [x, axes_op(n, "Unsqueeze", reduced, sorted(a % 4 for a in axes), 13)]))


# -- layout ----------------------------------------------------------------------------------------


def last_channels(n: Net, x: str) -> str:
    """To NHWC and back, as models from other frameworks do; a softmax over rows between."""
    y = n.op("Transpose", x, perm=[0, 2, 3, 1])
    y = n.op("Add", [y, n.normal(n.shape[x][1])])
    y = n.op("Softmax", y, axis=n.pick(1, 2, 3)) if n.rarely() else y
    return str(n.op("Transpose", y, perm=[0, 3, 1, 2]))


def pixel_shuffle(n: Net, x: str) -> str:
    _, c, h, w = n.shape[x]
    if n.coin():
        if h % 2 or w % 2 or c > 4:
            x = n.conv(x, c, 3, (h % 2 + 1, w % 2 + 1), pads=[h % 2, w % 2, h % 2, w % 2], gain=0.7)
        return n.space_to_depth(x, 2)
    if c % 4:
        x = n.conv(x, c, 4, 1, gain=0.7)
    return n.depth_to_space(x, 2, n.pick("DCR", "CRD"))


def cut(n: Net, x: str) -> str:
    starts, ends, axes, steps = [], [], [], []
    for axis in sorted(n.draw(st.sets(st.sampled_from([1, 2, 3]), min_size=1))):
        size, step = n.shape[x][axis], n.pick(1, 2, -1, -2)
        low, high = n.number(0, (size - 1) // 2), n.number(size // 2 + 1, size)
        starts.append(low if step > 0 else n.pick(high - 1, size + 5 if high == size else high - 1))
        ends.append(high if step > 0 else (low - 1 if low else -size - n.number(1, 3)))
        axes.append(n.pick(axis, axis - 4))
        steps.append(step)
    return str(n.op("Slice", [x, *(n.ints(*v) for v in (starts, ends, axes, steps))]))


def shuffle(n: Net, x: str) -> str:
    """ShuffleNet's channel shuffle: reshape, transpose, reshape."""
    batch, c, h, w = n.shape[x]
    g = n.pick(*(g for g in range(1, c + 1) if c % g == 0))
    y = n.op("Reshape", [x, n.ints(batch, g, c // g, h, w)])
    y = n.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    return str(n.op("Reshape", [y, n.ints(0, -1, h, w)]))


def reshape(n: Net, x: str) -> str:
    batch, c, h, w = n.shape[x]
    target = n.pick((batch, c, w, h), (batch, c * h, 1, w), (batch, h, w, c), (1, batch * c, h, w))
    y = n.op("Reshape", [x, n.ints(*target)])
    if n.coin():
        y = axes_op(n, "Squeeze", axes_op(n, "Unsqueeze", y, [2], 13), [2], 13)
    return str(n.op("Tanh", y)) if n.coin() else str(y)


def split(n: Net, x: str) -> str:
    axis = n.pick(1, 2, 3, -3)
    size = n.shape[x][axis]
    if size < 2:
        return activation(n, x)
    first = n.number(1, size - 1)
    if n.opset >= 13:
        parts = n.op("Split", [x, n.ints(first, size - first)], 2, axis=axis)
    else:
        parts = n.op("Split", x, 2, axis=axis, split=[first, size - first])
    changed = n.op(n.pick("Tanh", "Neg", "Abs"), parts[1])
    return n.concat(changed, parts[0], axis=axis)


def concat(n: Net, x: str) -> str:
    c = n.shape[x][1]
    return n.concat(x, n.conv(x, c, n.number(1, 3), n.pick(1, 3), gain=0.7), *n.pick((), (x,)))


def residual(n: Net, x: str) -> str:
    c = n.shape[x][1]
    return n.add(x, n.op("LeakyRelu", n.conv(x, c, c, 3, gain=0.7), alpha=0.2))


# -- sizes -----------------------------------------------------------------------------------------


def resize(n: Net, x: str) -> str:
    size = n.shape[x][2:]
    wanted = [n.pick(2.0, 3.0, 1.7, 0.5, 0.6, 1.0) for _ in size]
    scales = [w if int(np.float32(w) * s) else 2.0 for w, s in zip(wanted, size, strict=True)]
    inputs = [x, n.const(np.zeros(0, np.float32)), n.const(np.array([1, 1, *scales], np.float32))]
    if n.rarely():
        inputs[2:] = [n.const(np.zeros(0, np.float32)), n.ints(*n.shape[x][:2], 7, 12)]
    modes = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
    mode = n.pick("nearest", "linear", "linear", "cubic")
    return str(n.op("Resize", inputs, mode=mode, coordinate_transformation_mode=n.pick(*modes)))


def conv_transpose(n: Net, x: str) -> str:
    cin = n.shape[x][1]
    group = n.pick(*(g for g in range(1, cin + 1) if cin % g == 0))
    weight = n.normal(cin, n.number(1, 3), 3, 2, scale=0.5)
    bias = [n.normal(n.shape[weight][1] * group)] if n.coin() else []
    strides, pads = [n.number(1, 2), n.number(1, 3)], [n.number(0, 1), 0, n.number(0, 1), 0]
    extra = [n.number(0, s - 1) for s in strides]
    return str(
        n.op("ConvTranspose", [x, weight, *bias], group=group, strides=strides, pads=pads,
             output_padding=extra)
    )  # fmt: skip


def padded(n: Net, x: str) -> str:
    mode = n.pick("constant", "reflect", "edge", *(["wrap"] if n.opset >= 19 else []))
    pads = [(n.number(0, min(3, s - 1)), n.number(0, min(3, s - 1))) for s in n.shape[x][1:]]
    flat = n.ints(0, *(p[0] for p in pads), 0, *(p[1] for p in pads))
    value = [n.const(np.float32(0.7))] if mode == "constant" and n.coin() else []
    return str(n.op("Pad", [x, flat, *value], mode=mode))


def powers(n: Net, x: str) -> str:
    """Local response normalisation along the channels, and the pool of the p-norm."""
    if n.coin():
        return str(n.op("LRN", x, size=n.pick(1, 3, 5)))
    k = [n.number(1, min(3, s)) for s in n.shape[x][2:]]
    pads = [n.number(0, a - 1) for a in (*k, *k)]
    return str(n.op("LpPool", x, kernel_shape=k, p=n.number(1, 3), pads=pads))


# -- barriers --------------------------------------------------------------------------------------


def indexed(n: Net, x: str) -> str:
    """What picks, repeats or orders elements; the shape stays that of a map."""
    axis = n.pick(1, 2, 3, -1)
    size = n.shape[x][axis]
    kind = n.pick(
        "Gather", "Tile", "Expand", "CumSum", "Trilu", "TopK", "GatherElements", "Scatter"
    )
    if kind == "Gather":
        return str(n.op(kind, [x, n.ints(*n.rng.integers(-size, size, n.number(1, 9)))], axis=axis))
    if kind == "Tile":
        return str(n.op(kind, [x, n.ints(1, 1, n.number(1, 3), n.number(1, 2))]))
    if kind == "Expand":
        row = n.op("Slice", [x, n.ints(0), n.ints(1), n.ints(axis)])
        return n.add(x, str(n.op(kind, [row, n.ints(*n.shape[x])])))
    if kind == "CumSum":
        return str(n.op("Tanh", n.op(kind, [x, n.ints(axis)], reverse=n.number(0, 1))))
    if kind == "Trilu" and n.opset >= 14:
        return str(n.op(kind, [x, n.const(np.array(n.number(-3, 3)))], upper=n.number(0, 1)))
    if kind == "TopK":
        values, _ = n.op(kind, [x, n.ints(n.number(1, size))], 2, axis=axis)
        return str(values)
    places = n.const(n.rng.permuted(np.indices(n.shape[x])[axis % 4], axis=axis))
    if kind == "GatherElements":
        return str(n.op(kind, [x, places], axis=axis))
    return str(n.op("ScatterElements", [x, places, n.op("Neg", x)], axis=axis))


def found(n: Net, x: str) -> str:
    """The sum of the elements above 0.1, gathered at places that depend on the data, added to
    all."""
    above = n.op("Greater", [x, n.const(np.float32(0.1))])
    places = n.op("Transpose", n.op("NonZero", above), perm=[1, 0])
    n.know(places, (1, 4), TensorProto.INT64)
    values = n.op("GatherND", [x, places])
    mean = n.op("Tanh", axes_op(n, "ReduceSum", values, [0], 13, keepdims=1))
    return n.add(x, n.know(mean, (1,)))


def branch(n: Net, x: str) -> str:
    """An If whose two subgraphs capture a value and an initializer of the outer graph."""
    shape = n.shape[x]
    mean = axes_op(n, "ReduceMean", x, [0, 1, 2, 3], 18, keepdims=0)
    above = n.op("Greater", [mean, n.const(np.float32(0.0))])
    by = n.normal(shape[1], 1, 1)
    graphs = []
    for name, kind in (("then", "Add"), ("else", "Mul")):
        out = f"{name}_{by}"
        value = helper.make_tensor_value_info(out, FLOAT, shape)
        node = helper.make_node(kind, [x, by], [out])
        graphs.append(helper.make_graph([node], name, [], [value]))
    result = Builder.op(n, "If", above, then_branch=graphs[0], else_branch=graphs[1])
    return n.know(result, shape)


def foreign(n: Net, x: str) -> str:
    """An operator of another domain, whose type only onnxruntime knows."""
    kind = n.pick("QuickGelu", "Gelu")
    return n.know(Builder.op(n, kind, x, domain=MICROSOFT), n.shape[x])


TILED: tuple[Block, ...] = (
    conv, conv, conv, pool, pool, activation, activation, broadcast, normalise, statistics, excite,
    centre, last_channels, pixel_shuffle, cut, shuffle, reshape, split, concat, residual, one_axis,
    computed_weights, indexed, activation,
    resize, conv_transpose, padded, powers,
)  # fmt: skip
BARRIERS: tuple[Block, ...] = (
    found, branch, foreign,
)  # fmt: skip


# -- heads -----------------------------------------------------------------------------------------


def gemm(n: Net, x: str, dtype: type = np.float32) -> str:
    """Every form of Gemm, on a matrix value [rows, k]."""
    rows, k = n.shape[x]
    cols, trans_a, trans_b = n.number(1, 7), n.number(0, 1), n.number(0, 1)
    if trans_a:
        x = n.op("Transpose", x, perm=[1, 0])
    weight = n.normal(*((cols, k) if trans_b else (k, cols)), scale=k**-0.5, dtype=dtype)
    bias = n.pick(None, (), (cols,), (1, cols), (rows, 1), (rows, cols))
    inputs = [x, weight] if bias is None else [x, weight, n.normal(*bias, dtype=dtype)]
    alpha, beta = n.pick(1.0, 0.5), n.pick(1.0, -0.3)
    return str(n.op("Gemm", inputs, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta))


def classifier(n: Net, x: str) -> list[str]:
    if n.coin():
        return [gemm(n, n.op("Flatten", x, axis=n.pick(1, 1, 2)))]
    return [gemm(n, gemm(n, n.flatten(n.gap(x))))]


def products(n: Net, x: str) -> list[str]:
    batch, c, _, w = n.shape[x]
    if n.opset >= 12 and n.rarely():
        weight = n.normal(w, 3, c, scale=w**-0.5)
        return [n.op("Einsum", [x, weight], equation=n.pick("nchw,wkc->nchk", "nchw,wkc->nkh"))]
    shape = n.pick((w, 3), (c, w, 3), (batch, 1, w, 3), (1, 1, w, 2))
    y = n.op("MatMul", [x, n.normal(*shape, scale=w**-0.5)])
    if n.coin():
        y = n.op("MatMul", [y, n.op("Transpose", y, perm=[0, 1, 3, 2])])
    return [y]


def whole_numbers(n: Net, x: str) -> list[str]:
    classes = n.op("ArgMax", x, axis=n.pick(1, 2), keepdims=n.number(0, 1))
    return [classes, n.op("Greater", [x, n.const(np.float32(0.05))])]


def wide(n: Net, x: str) -> list[str]:
    y = n.op("Cast", x, to=DOUBLE)
    matrix = gemm(n, n.op("Flatten", y, axis=1), np.float64)
    return [matrix, axes_op(n, "ReduceSum", y, n.pick([2, 3], [1], [0, 3]), 13, keepdims=0)]


def means(n: Net, x: str) -> list[str]:
    axes = n.pick([2, 3], [-1], [1, 2], [0])
    y = axes_op(n, "ReduceMean", x, axes, 18, keepdims=n.number(0, 1))
    return [n.op("GlobalMaxPool", x), y]


HEADS: tuple[Callable[[Net, str], list[str]], ...] = (
    lambda n, x: [x],
    classifier,
    products,
    whole_numbers,
    wide,
    means,
)


# -- networks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A model with arrays for its inputs."""

    model: ModelProto
    inputs: dict[str, np.ndarray]


def first_values(n: Net) -> tuple[str, dict[str, np.ndarray]]:
    """The network's input as a float map, and the arrays to give: uint8 pixels or floats."""
    shape = (n.pick(1, 1, 2, 3), n.number(1, 5), n.number(1, 11), n.number(1, 11))
    if n.rarely():
        x = n.input("image", shape, TensorProto.UINT8)
        x = n.op("Mul", [n.op("Cast", x, to=FLOAT), n.const(np.float32(1 / 128))])
        return x, {"image": n.rng.integers(0, 256, shape, np.uint8)}
    x = n.input("image", shape)
    arrays = {"image": n.rng.standard_normal(shape, np.float32)}
    if n.rarely():
        other = n.pick(shape, (1, shape[1], 1, 1), ())
        arrays["other"] = np.asarray(n.rng.standard_normal(other, np.float32))
        x = n.op("Add", [x, n.input("other", other)])
    return x, arrays


def outputs_of(n: Net, taps: Sequence[str], heads: Sequence[str]) -> list[Any]:
    """The heads, at times with an intermediate value, an initializer or an input as it is."""
    names = list(heads)
    if n.rarely():
        names.append(n.pick(*taps))
    if n.rarely():
        names.append(n.pick(n.normal(2, 3), "image"))
    return [n.typed(name) for name in dict.fromkeys(names)]


@st.composite
def networks(draw: st.DrawFn, barriers: bool = True) -> Network:
    """Networks of one to five blocks and a head."""
    n = Net(draw, draw(st.sampled_from(OPSETS)))
    x, arrays = first_values(n)
    taps = [x]
    for _ in range(n.number(1, 5)):
        pool_of = BARRIERS if barriers and n.pick(*[False] * 6, True) else TILED
        x = n.pick(*pool_of)(n, x)
        if prod(n.shape[x]) > 3000:  # keep it small: take every third row and column
            x = n.op("MaxPool", x, kernel_shape=[1, 1], strides=[3, 3])
        same = [t for t in taps if n.shape[t] == n.shape[x]]
        if same and n.rarely():
            x = n.add(x, n.pick(*same))
        taps.append(x)
    return Network(n.model(outputs_of(n, taps, n.pick(*HEADS)(n, x))), arrays)
