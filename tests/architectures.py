"""Real architectures as ONNX models with seeded weights: the same arguments give the same bytes.

Depths and channel widths are the published ones, only the images are small. Weights are
He-initialised and BatchNormalization's statistics are not trivial, so that activations stay of
order 1 at every depth: a tile that is wrong anywhere shows in the output, and none is hidden by
values that vanish or explode.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Pair = int | tuple[int, int]

IR_VERSION = 10
AFTER_MAX_POOL = 0.75
"""Gain of a layer that reads a max-pooled value: pooling keeps the largest, so the scale grows."""
BRANCH = 0.3
"""Gain of a residual branch: the sums of a deep chain of blocks then grow little."""
LINEAR = 0.5**0.5
"""Gain of a layer that reads a value with no ReLU before it: He's factor 2 is then one too many."""


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _four(pads: int | Sequence[int]) -> list[int]:
    return [pads] * 4 if isinstance(pads, int) else list(pads)


class Builder:
    """Builds one ONNX graph, node by node; every method returns the name of the value it made.

    `gain` multiplies the standard deviation that He's rule gives to a layer's weights.
    """

    def __init__(self, seed: int, opset: int = 17) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._count = 0

    def _fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem.lower()}_{self._count}"

    # -- primitives ------------------------------------------------------------------------------

    def input(
        self, name: str, shape: Sequence[int | str | None], dtype: int = TensorProto.FLOAT
    ) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, array: np.ndarray, name: str | None = None) -> str:
        """An initializer."""
        name = name or self._fresh("const")
        if name in self.initializers:
            raise ValueError(f"initializer {name!r} already exists")
        self.initializers[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    @overload
    def op(
        self,
        op_type: str,
        inputs: str | Sequence[str],
        outputs: Literal[1] = 1,
        *,
        domain: str = "",
        **attrs: Any,
    ) -> str: ...

    @overload
    def op(
        self,
        op_type: str,
        inputs: str | Sequence[str],
        outputs: int,
        *,
        domain: str = "",
        **attrs: Any,
    ) -> tuple[str, ...]: ...

    def op(
        self,
        op_type: str,
        inputs: str | Sequence[str],
        outputs: int = 1,
        *,
        domain: str = "",
        **attrs: Any,
    ) -> str | tuple[str, ...]:
        """Any node; the name of its output, or a tuple of names if `outputs` is not 1.

        An empty input name is an optional input left out.
        """
        inputs = [inputs] if isinstance(inputs, str) else list(inputs)
        name = self._fresh(op_type)
        names = (name,) if outputs == 1 else tuple(f"{name}_{i}" for i in range(outputs))
        self.nodes.append(
            helper.make_node(op_type, inputs, names, name=name, domain=domain, **attrs)
        )
        return name if outputs == 1 else names

    def rename(self, value: str, name: str) -> str:
        """Gives the value that a node made another name, wherever it is written and read so far."""
        if not any(value in node.output for node in self.nodes):
            raise ValueError(f"no node makes {value!r}")
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, old in enumerate(names):
                    if old == value:
                        names[i] = name
        return name

    def known(self) -> list[ValueInfoProto]:
        """Types of values that onnx does not infer."""
        return []

    def model(self, outputs: Sequence[str | ValueInfoProto]) -> ModelProto:
        """The checked model; its outputs' types come from shape inference.

        An output that onnx cannot type (after an op of another domain) is given as ValueInfoProto.

        A stand-in without the weights' bytes is what is inferred and checked, because both copy
        the model several times; constants of up to 1024 elements stay, since shapes may hang on
        them.
        """
        graph = helper.make_graph(
            self.nodes,
            "graph",
            self.inputs,
            [ValueInfoProto(name=o) if isinstance(o, str) else o for o in outputs],
            value_info=self.known(),
        )
        domains = {node.domain for node in self.nodes} - {"", "ai.onnx"}
        model = helper.make_model(
            graph,
            producer_name="meshinfer-tests",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", self.opset)]
            + [helper.make_opsetid(domain, 1) for domain in sorted(domains)],
        )
        for tensor in self.initializers.values():
            if np.prod(tensor.dims) > 1024:
                model.graph.input.append(
                    helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
            else:
                model.graph.initializer.append(tensor)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        onnx.checker.check_model(model)
        del model.graph.input[len(self.inputs) :]
        del model.graph.initializer[:]
        model.graph.initializer.extend(self.initializers.values())
        return model

    # -- layers ----------------------------------------------------------------------------------

    def _normal(self, shape: Sequence[int], std: float) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def _uniform(self, low: float, high: float, size: int) -> np.ndarray:
        return self.rng.uniform(low, high, size).astype(np.float32)

    def conv(
        self,
        x: str,
        cin: int,
        cout: int,
        k: Pair,
        stride: Pair = 1,
        pads: int | Sequence[int] | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        auto_pad: str | None = None,
        *,
        gain: float = 1.0,
    ) -> str:
        """2-D Conv. `pads`: None keeps the size at stride 1 (odd k); else all four or one for all.

        `pads` is [top, left, bottom, right]; `auto_pad` replaces it.
        """
        kernel, dilations = _pair(k), _pair(dilation)
        if cin % groups or cout % groups:
            raise ValueError(f"{cin} and {cout} channels do not divide into {groups} groups")
        if pads is None:
            pads = [(n - 1) // 2 * d for n, d in zip(kernel, dilations, strict=True)] * 2
        shape = (cout, cin // groups, *kernel)
        inputs = [x, self.const(self._normal(shape, gain * (2 / np.prod(shape[1:])) ** 0.5))]
        if bias:
            inputs.append(self.const(self._normal((cout,), 0.1)))
        return self.op(
            "Conv",
            inputs,
            kernel_shape=kernel,
            strides=_pair(stride),
            dilations=dilations,
            group=groups,
            **({"auto_pad": auto_pad} if auto_pad else {"pads": _four(pads)}),
        )

    def bn(self, x: str, channels: int, *, gain: float = 1.0) -> str:
        """BatchNormalization for inference; keeps the scale of `x` but for `gain`."""
        scale = self._uniform(0.6, 1.25, channels) * np.float32(gain)
        bias, mean = self._normal((channels,), 0.1), self._normal((channels,), 0.1)
        var = self._uniform(0.5, 1.5, channels)
        parameters = [self.const(array) for array in (scale, bias, mean, var)]
        return self.op("BatchNormalization", [x, *parameters], epsilon=1e-5)

    def gemm(self, x: str, cin: int, cout: int, *, gain: float = 1.0) -> str:
        """A fully connected layer, its weight [cout, cin] as torch exports it."""
        weight = self.const(self._normal((cout, cin), gain * (2 / cin) ** 0.5))
        return self.op("Gemm", [x, weight, self.const(self._normal((cout,), 0.1))], transB=1)

    def maxpool(
        self, x: str, k: Pair, stride: Pair = 1, pads: int | Sequence[int] = 0, ceil: bool = False
    ) -> str:
        return self.op(
            "MaxPool",
            x,
            kernel_shape=_pair(k),
            strides=_pair(stride),
            pads=_four(pads),
            ceil_mode=int(ceil),
        )

    def avgpool(
        self,
        x: str,
        k: Pair,
        stride: Pair = 1,
        pads: int | Sequence[int] = 0,
        ceil: bool = False,
        count_include_pad: bool = False,
    ) -> str:
        return self.op(
            "AveragePool",
            x,
            kernel_shape=_pair(k),
            strides=_pair(stride),
            pads=_four(pads),
            ceil_mode=int(ceil),
            count_include_pad=int(count_include_pad),
        )

    def gap(self, x: str) -> str:
        return self.op("GlobalAveragePool", x)

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def leaky_relu(self, x: str, alpha: float = 0.1) -> str:
        return self.op("LeakyRelu", x, alpha=alpha)

    def clip(self, x: str, low: float, high: float) -> str:
        bounds = [self.const(np.array(bound, np.float32)) for bound in (low, high)]
        return self.op("Clip", [x, *bounds])

    def silu(self, x: str) -> str:
        return self.op("Mul", [x, self.op("Sigmoid", x)])

    def add(self, a: str, b: str) -> str:
        return self.op("Add", [a, b])

    def concat(self, *values: str, axis: int = 1) -> str:
        return self.op("Concat", values, axis=axis)

    def flatten(self, x: str) -> str:
        return self.op("Flatten", x, axis=1)

    def depth_to_space(self, x: str, block: int, mode: str = "CRD") -> str:
        return self.op("DepthToSpace", x, blocksize=block, mode=mode)

    def space_to_depth(self, x: str, block: int) -> str:
        return self.op("SpaceToDepth", x, blocksize=block)


def _image(b: Builder, size: int, multiple: int) -> str:
    if size < multiple or size % multiple:
        raise ValueError(f"size {size} is not a positive multiple of {multiple}")
    return b.input("image", [1, 3, size, size])


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


# -- classifiers ---------------------------------------------------------------------------------


def vgg16(
    size: int = 64, seed: int = 0, *, classifier_width: int = 4096, width: float = 1.0
) -> ModelProto:
    """Simonyan and Zisserman's configuration D: a plain chain, then fully connected layers.

    The first Gemm reads what `size` leaves of the image (7x7 at 224, 2x2 at 64).
    """
    b = Builder(seed)
    x, channels, gain = _image(b, size, 32), 3, LINEAR
    for depth, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            cout = _scaled(depth, width)
            x = b.relu(b.conv(x, channels, cout, 3, gain=gain))
            channels, gain = cout, 1.0
        x, gain = b.maxpool(x, 2, 2), AFTER_MAX_POOL
    x, features = b.flatten(x), channels * (size // 32) ** 2
    x = b.relu(b.gemm(x, features, classifier_width, gain=gain))
    x = b.relu(b.gemm(x, classifier_width, classifier_width))
    return b.model([b.rename(b.gemm(x, classifier_width, 1000), "logits")])


def _bottleneck(b: Builder, x: str, cin: int, inner: int, stride: int, gain: float) -> str:
    cout = 4 * inner
    y = b.relu(b.bn(b.conv(x, cin, inner, 1, bias=False, gain=gain), inner))
    y = b.relu(b.bn(b.conv(y, inner, inner, 3, stride, bias=False), inner))
    y = b.bn(b.conv(y, inner, cout, 1, bias=False), cout, gain=BRANCH)
    if stride != 1 or cin != cout:
        x = b.bn(b.conv(x, cin, cout, 1, stride, bias=False, gain=gain), cout)
    return b.relu(b.add(y, x))


def resnet50(size: int = 64, seed: int = 0, *, width: float = 1.0) -> ModelProto:
    """He et al., with the stride on the 3x3 conv (v1.5, torchvision's); BatchNormalization is kept
    as nodes, for the importer to fuse."""
    b = Builder(seed)
    x, channels = _image(b, size, 32), _scaled(64, width)
    x = b.conv(x, 3, channels, 7, 2, bias=False, gain=LINEAR)
    x, gain = b.maxpool(b.relu(b.bn(x, channels)), 3, 2, 1), AFTER_MAX_POOL
    for level, repeats in enumerate((3, 4, 6, 3)):
        inner = _scaled(64, width) * 2**level
        for i in range(repeats):
            stride = 2 if level and not i else 1
            x = _bottleneck(b, x, channels, inner, stride, gain)
            channels, gain = 4 * inner, 1.0
    return b.model([b.rename(b.gemm(b.flatten(b.gap(x)), channels, 1000), "logits")])


def _relu6(b: Builder, x: str) -> str:
    return b.clip(x, 0.0, 6.0)


def _inverted_residual(b: Builder, x: str, cin: int, cout: int, stride: int, expand: int) -> str:
    inner, y = cin * expand, x
    if expand != 1:
        y = _relu6(b, b.bn(b.conv(y, cin, inner, 1, bias=False, gain=LINEAR), inner))
    y = b.conv(y, inner, inner, 3, stride, groups=inner, bias=False)
    y = _relu6(b, b.bn(y, inner))
    residual = stride == 1 and cin == cout
    y = b.conv(y, inner, cout, 1, bias=False)
    y = b.bn(y, cout, gain=BRANCH if residual else 1.0)
    return b.add(x, y) if residual else y


def mobilenet_v2(size: int = 64, seed: int = 0, *, width: float = 1.0) -> ModelProto:
    """Sandler et al.: inverted residuals with depthwise convs, Relu6 as Clip, linear bottlenecks.

    The first gain is three times the usual, so that some values reach Relu6's upper bound.
    """
    b = Builder(seed)
    x, channels = _image(b, size, 32), _scaled(32, width)
    x = _relu6(b, b.bn(b.conv(x, 3, channels, 3, 2, bias=False, gain=3 * LINEAR), channels))
    for expand, depth, repeats, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        cout = _scaled(depth, width)
        for i in range(repeats):
            x = _inverted_residual(b, x, channels, cout, 1 if i else first_stride, expand)
            channels = cout
    last = _scaled(1280, width)
    x = _relu6(b, b.bn(b.conv(x, channels, last, 1, bias=False, gain=LINEAR), last))
    return b.model([b.rename(b.gemm(b.flatten(b.gap(x)), last, 1000), "logits")])


def _fire(b: Builder, x: str, cin: int, squeeze: int, expand: int, gain: float) -> str:
    x = b.relu(b.conv(x, cin, squeeze, 1, gain=gain))
    branches = (b.relu(b.conv(x, squeeze, expand, k)) for k in (1, 3))
    return b.concat(*branches)


def squeezenet1_1(size: int = 64, seed: int = 0, *, width: float = 1.0) -> ModelProto:
    """Iandola et al., version 1.1: fire modules, pools that round up; Dropout is left out.

    At the default size no pool has a remainder to round; at 66 each of the three has.
    """
    b = Builder(seed)
    x, channels = _image(b, size, 1), _scaled(64, width)
    x = b.relu(b.conv(x, 3, channels, 3, 2, pads=0, gain=LINEAR))
    for fires in (
        ((16, 64), (16, 64)),
        ((32, 128), (32, 128)),
        ((48, 192), (48, 192), (64, 256), (64, 256)),
    ):
        x, gain = b.maxpool(x, 3, 2, ceil=True), AFTER_MAX_POOL
        for squeeze, expand in fires:
            expand = _scaled(expand, width)
            x = _fire(b, x, channels, _scaled(squeeze, width), expand, gain)
            channels, gain = 2 * expand, 1.0
    x = b.relu(b.conv(x, channels, 1000, 1))
    return b.model([b.rename(b.flatten(b.gap(x)), "logits")])


# -- dense outputs -------------------------------------------------------------------------------


def yolov2(size: int = 96, seed: int = 0, *, width: float = 1.0) -> ModelProto:
    """Redmon and Farhadi: Darknet-19, the passthrough route, 5 anchors x (80 classes + 5).

    DeepThings' own model. The reorg layer is SpaceToDepth(2), the permutation that the paper
    describes (Darknet's code permutes differently; its weights would need reordering).
    """
    b = Builder(seed)
    x, channels, gain = _image(b, size, 32), 3, LINEAR

    def unit(x: str, cin: int, cout: int, k: int, gain: float = 1.0) -> str:
        return b.leaky_relu(b.bn(b.conv(x, cin, cout, k, bias=False, gain=gain), cout))

    route = ""
    for depths in (
        (32,),
        (64,),
        (128, 64, 128),
        (256, 128, 256),
        (512, 256, 512, 256, 512),
        (1024, 512, 1024, 512, 1024),
    ):
        if channels != 3:
            route, gain = x, AFTER_MAX_POOL
            x = b.maxpool(x, 2, 2)
        for i, depth in enumerate(depths):
            cout = _scaled(depth, width)
            x = unit(x, channels, cout, 1 if i % 2 else 3, gain)
            channels, gain = cout, 1.0
    for _ in range(2):
        x = unit(x, channels, channels, 3)
    side = _scaled(64, width)
    reorg = b.space_to_depth(unit(route, _scaled(512, width), side, 1), 2)
    x = unit(b.concat(reorg, x), 4 * side + channels, channels, 3)
    return b.model([b.rename(b.conv(x, channels, 425, 1), "detections")])


def _double_conv(b: Builder, x: str, cin: int, cout: int, gain: float = 1.0) -> str:
    x = b.relu(b.conv(x, cin, cout, 3, gain=gain))
    return b.relu(b.conv(x, cout, cout, 3))


def unet(
    size: int = 64, seed: int = 0, *, width: int = 16, levels: int = 4, classes: int = 2
) -> ModelProto:
    """Ronneberger et al., padded so that sizes hold; `width` channels (64 in the paper) at the top.

    Upsampling is a 1x1 conv to 4C channels and DepthToSpace(2), a pixel shuffle: the same
    arithmetic as the paper's 2x2 transposed conv of stride 2 (each output pixel reads one input
    pixel through one of four sets of weights), written as a conv, which tiles as any other, and a
    permutation of channels into space, whose box rule nothing else here tests.
    """
    b = Builder(seed)
    x, channels, gain = _image(b, size, 2**levels), 3, LINEAR
    skips: list[str] = []
    for level in range(levels):
        cout = width * 2**level
        x = _double_conv(b, x, channels, cout, gain)
        skips.append(x)
        x, channels, gain = b.maxpool(x, 2, 2), cout, AFTER_MAX_POOL
    x = _double_conv(b, x, channels, 2 * channels, gain)
    for skip in reversed(skips):
        up = b.depth_to_space(b.conv(x, 2 * channels, 4 * channels, 1), 2)
        x = _double_conv(b, b.concat(skip, up), 2 * channels, channels)
        channels //= 2
    return b.model([b.rename(b.conv(x, 2 * channels, classes, 1), "mask")])


def sppf(size: int = 64, seed: int = 0, *, width: int = 32) -> ModelProto:
    """A small net around YOLOv5's SPPF block: three chained 5x5 max-pools, concatenated.

    SiLU, and a conv with no activation right before the pools: negative values reach the padded
    max-pool, so padding a tile with 0 in place of -inf is seen.
    """
    b = Builder(seed)
    x = b.silu(b.conv(_image(b, size, 4), 3, width, 3, 2, gain=LINEAR))
    x = b.silu(b.conv(x, width, 2 * width, 3, 2))
    pooled = [b.conv(x, 2 * width, width, 1)]
    for _ in range(3):
        pooled.append(b.maxpool(pooled[-1], 5, 1, 2))
    x = b.silu(b.conv(b.concat(*pooled), 4 * width, 2 * width, 1, gain=0.5 * LINEAR))
    return b.model([b.rename(b.conv(x, 2 * width, width, 3), "features")])


ALL: dict[str, Callable[..., ModelProto]] = {
    function.__name__: function
    for function in (vgg16, resnet50, mobilenet_v2, squeezenet1_1, yolov2, unet, sppf)
}
