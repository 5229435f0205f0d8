"""A strict graph's tiles have the bits of the whole model: the cases where they once had others.

Each test holds a plan of every device against plain onnxruntime on the original model, bit for bit.
What differs without ``as_strict`` is said where it was measured.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
from architectures import Builder
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto

import meshinfer as mi
from meshinfer.cost import DeviceProfile
from meshinfer.errors import InvalidInput
from meshinfer.geometry import Interval
from meshinfer.identity import DeviceId
from meshinfer.legality import refuse_sums
from meshinfer.ops.kernels import filled, sums_alike
from meshinfer.planner import make_plan

HEAD = DeviceId("head")


def uneven(count: int) -> list[DeviceProfile]:
    speeds = [1.0, 0.5, 0.25, 1.0, 0.5, 0.25][:count]
    return [DeviceProfile(DeviceId(f"w{i}"), s * 1e10) for i, s in enumerate(speeds)]


def residual(channels: int) -> ModelProto:
    """Sums that onnxruntime computes inside a convolution; 24 channels are one block and a half."""
    b = Builder(0)
    x = b.relu(b.conv(b.input("image", [1, 3, 24, 20]), 3, channels, 3))
    for _ in range(3):
        inner = b.relu(b.conv(x, channels, 32, 3))
        x = b.relu(b.op("Add", [x, b.conv(inner, 32, channels, 3)]))
    return b.model([b.rename(x, "y")])


def downsampled() -> ModelProto:
    """The first operand is the shortcut's convolution: it comes first in the file, and adds."""
    b = Builder(0)
    x = b.relu(b.conv(b.input("image", [1, 3, 24, 20]), 3, 32, 3))
    shortcut = b.conv(x, 32, 64, 1)
    inner = b.relu(b.conv(b.relu(b.conv(x, 32, 32, 3)), 32, 64, 3))
    return b.model([b.rename(b.relu(b.op("Add", [shortcut, inner])), "y")])


def dense() -> ModelProto:
    """A batch normalisation behind a Concat, which becomes a convolution in the whole model."""
    b = Builder(0)
    x = b.relu(b.conv(b.input("image", [1, 3, 24, 20]), 3, 32, 3))
    for i in range(3):
        new = b.relu(b.conv(x, 32 * (i + 1), 32, 3))
        x = b.op("Concat", [x, new], axis=1)
        rng, size = np.random.default_rng(i), 32 * (i + 2)
        statistics = [rng.uniform(0.5, 2.0, size).astype(np.float32) for _ in range(4)]
        x = b.relu(b.op("BatchNormalization", [x, *map(b.const, statistics)]))
    return b.model([b.rename(b.conv(x, 128, 16, 3), "y")])


def grouped() -> ModelProto:
    """Groups of 8 channels, of which one alone would be computed in another layout."""
    b = Builder(0)
    x = b.relu(b.conv(b.input("image", [1, 3, 12, 10]), 3, 104, 3))
    x = b.relu(b.conv(x, 104, 104, 3, groups=13))
    return b.model([b.rename(x, "y")])


def small_maps() -> ModelProto:
    """242 channels go the way of matrix products, which add in longer blocks on small maps."""
    b = Builder(0)
    x = b.relu(b.conv(b.input("image", [1, 3, 14, 14]), 3, 242, 3))
    return b.model([b.rename(b.relu(b.conv(x, 242, 32, 3)), "y")])


def small_maps_doubled() -> ModelProto:
    """A transposed convolution is a matrix product of a column for each position that it reads."""
    b = Builder(0)
    x = b.relu(b.conv(b.input("image", [1, 3, 14, 14]), 3, 256, 3))
    weights = b.const(b.rng.standard_normal((256, 8, 4, 4), np.float32) / np.float32(32))
    y = b.op("ConvTranspose", [x, weights], strides=[2, 2], pads=[1, 1, 1, 1])
    return b.model([b.rename(y, "y")])


def mean_of(channels: int) -> Callable[[], ModelProto]:
    def build() -> ModelProto:
        b = Builder(0)
        x = b.relu(b.conv(b.input("image", [1, 3, 14, 14]), 3, channels, 3))
        return b.model([b.rename(b.op("GlobalAveragePool", [x]), "y")])

    return build


def attention(scaled: bool) -> ModelProto:
    """Two blocks over the patches of an image and a class token, which alone is asked for.

    ``scaled``: the square root of the scale on the query and on the key each, as torch exports it;
    onnxruntime takes both into the product.
    """
    b = Builder(0)
    pixels = b.conv(b.input("image", [1, 3, 40, 40]), 3, 64, 8, stride=8, pads=0)
    patches = b.op("Reshape", [pixels, b.const(np.array([1, 64, 25]))])
    token = b.const(b.rng.standard_normal((1, 1, 64), np.float32))
    x = b.op("Concat", [token, b.op("Transpose", [patches], perm=[0, 2, 1])], axis=1)
    split, back = b.const(np.array([1, 26, 2, 32])), b.const(np.array([1, 26, 64]))
    factor = b.const(np.array(0.42044820762685725, np.float32))

    def weights() -> str:
        return b.const(b.rng.standard_normal((64, 64), np.float32) / np.float32(8))

    for _ in range(2):
        q, k, v = (
            b.op(
                "Transpose",
                [b.op("Reshape", [b.op("MatMul", [x, weights()]), split])],
                perm=perm,
            )
            for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        )
        if scaled:
            q, k = b.op("Mul", [q, factor]), b.op("Mul", [k, factor])
        heads = b.op("MatMul", [b.op("Softmax", [b.op("MatMul", [q, k])], axis=-1), v])
        merged = b.op("Reshape", [b.op("Transpose", [heads], perm=[0, 2, 1, 3]), back])
        x = b.op("Add", [x, b.op("MatMul", [merged, weights()])])
    return b.model([b.rename(b.op("Gather", [x, b.const(np.array(0))], axis=1), "y")])


CASES: dict[str, Callable[[], ModelProto]] = {
    "sums of whole blocks": lambda: residual(32),
    "sums of one and a half": lambda: residual(24),
    "a shortcut that adds": downsampled,
    "normalisation behind a concat": dense,
    "small groups": grouped,
    "small maps": small_maps,
    "small maps doubled": small_maps_doubled,
    "means of whole blocks": mean_of(96),
    "means of broken blocks": mean_of(200),
    "means of odd channels": mean_of(201),
    "an attention": lambda: attention(scaled=False),
    "an attention with scales": lambda: attention(scaled=True),
}


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("case", CASES)
def test_a_strict_graph_has_the_bits_of_the_whole(case: str, count: int) -> None:
    model = CASES[case]()
    graph = mi.load(model).as_strict()
    plan = make_plan(graph, uneven(count), HEAD, HEAD, spread=True).plan
    assert len(plan.devices()) == count
    refuse_sums(plan)
    x = {"image": np.random.default_rng(1).standard_normal(graph.shape("image"), np.float32)}
    assert oracle.assert_exact(model, x, mi.run_plan(graph, plan, x)), "other bits"


def test_sums_in_one_kernel_are_found_and_stand_beside_their_convolution() -> None:
    graph = mi.load(downsampled())
    if not graph.sums:
        pytest.skip("this processor has no blocked layout (Arm)")
    ((name, position),) = graph.sums.items()
    add = graph.ops[graph.producer[name]]
    assert graph.producer[add.inputs[position]] == add.index - 1


def test_a_plan_that_sums_in_parts_is_none_for_a_strict_deployment() -> None:
    graph = mi.load(mean_of(96)())
    plan = make_plan(graph, uneven(3), HEAD, HEAD, spread=True).plan
    assert "over" in str(plan) or "sum" in str(plan)
    with pytest.raises(InvalidInput, match="strict"):
        refuse_sums(plan)


@given(st.integers(1, 80), st.data())
def test_channels_fill_blocks_of_either_size_just_if_all_of_them_do(
    size: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, size - 1))
    asked = Interval(start, data.draw(st.integers(start + 1, size)))
    grown = filled(asked, size)
    assert 0 <= grown.start <= asked.start < asked.stop <= grown.stop <= size
    for block in (8, 16):
        assert (grown.size % block == 0) == (size % block == 0)


def test_few_columns_add_in_longer_blocks() -> None:
    assert sums_alike(65, 3136, 2178)
    assert not sums_alike(64, 3136, 2178)
    assert not sums_alike(14, 49, 2178)
    assert sums_alike(14, 3136, 128)  # all products fit into one block
