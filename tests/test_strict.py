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
from onnx import ModelProto

import meshinfer as mi
from meshinfer.cost import DeviceProfile
from meshinfer.errors import InvalidInput
from meshinfer.identity import DeviceId
from meshinfer.legality import refuse_sums
from meshinfer.ops.kernels import sums_alike
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


def mean_of(channels: int) -> Callable[[], ModelProto]:
    def build() -> ModelProto:
        b = Builder(0)
        x = b.relu(b.conv(b.input("image", [1, 3, 14, 14]), 3, channels, 3))
        return b.model([b.rename(b.op("GlobalAveragePool", [x]), "y")])

    return build


CASES: dict[str, Callable[[], ModelProto]] = {
    "sums of whole blocks": lambda: residual(32),
    "sums of one and a half": lambda: residual(24),
    "a shortcut that adds": downsampled,
    "normalisation behind a concat": dense,
    "small groups": grouped,
    "small maps": small_maps,
    "means of whole blocks": mean_of(96),
    "means of broken blocks": mean_of(200),
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


def test_few_columns_add_in_longer_blocks() -> None:
    assert sums_alike(65, 3136, 2178)
    assert not sums_alike(64, 3136, 2178)
    assert not sums_alike(14, 49, 2178)
    assert sums_alike(14, 3136, 128)  # all products fit into one block
