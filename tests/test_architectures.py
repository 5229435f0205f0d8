"""The architectures are sound models that keep their scale, and the oracle sees what is wrong."""

from pathlib import Path

import numpy as np
import onnx
import oracle
import pytest
from architectures import ALL, Builder, sppf, squeezenet1_1
from onnx import ModelProto, TensorProto, helper


def image_for(model: ModelProto) -> dict[str, np.ndarray]:
    (value,) = model.graph.input
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    return {value.name: np.random.default_rng(1).standard_normal(shape, dtype=np.float32)}


@pytest.fixture(scope="module", params=ALL)
def built(request: pytest.FixtureRequest) -> ModelProto:
    return ALL[request.param]()


@pytest.fixture(scope="module")
def small() -> ModelProto:
    return sppf(32, width=8)


@pytest.fixture(scope="module")
def mixed() -> ModelProto:
    """One float and one integer output."""
    b = Builder(0)
    x = b.rename(b.relu(b.conv(b.input("image", [1, 3, 8, 8]), 3, 4, 3)), "map")
    return b.model([x, b.rename(b.op("ArgMax", x, axis=1), "classes")])


# -- architectures -------------------------------------------------------------------------------


def test_is_a_valid_model_with_typed_outputs(built: ModelProto) -> None:
    onnx.checker.check_model(built, full_check=True)
    assert [i.name for i in built.graph.input] == ["image"]
    assert 8 <= built.ir_version <= 10
    assert [(o.domain, o.version) for o in built.opset_import] == [("", 17)]
    for value in built.graph.output:
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        assert all(d.dim_value > 0 for d in value.type.tensor_type.shape.dim)


def test_activations_stay_of_order_1_at_every_depth(built: ModelProto) -> None:
    types = {value.name: value for value in built.graph.value_info}
    outputs = [value.name for value in built.graph.output]
    layers = [node.output[0] for node in built.graph.node if node.op_type in ("Conv", "Gemm")]
    # Concatenated protobuf messages merge: the same model with more outputs, and no copy of it.
    more = ModelProto()
    more.graph.output.extend(types[name] for name in layers if name not in outputs)
    probe = built.SerializeToString() + more.SerializeToString()
    values = oracle.reference(probe, image_for(built))
    assert set(values) == {*outputs, *layers}
    for name, value in values.items():
        assert np.isfinite(value).all(), name
        assert 0.1 < value.std() < 10, (name, value.std())
        # Channels and places differ, so that a misplaced box is noticed.
        assert np.unique(value).size > 0.3 * value.size, name


def test_tolerance_is_tight(built: ModelProto) -> None:
    assert oracle.FLOOR <= oracle.tolerance(built, image_for(built)) < 1e-4


def test_same_arguments_give_the_same_bytes_and_another_seed_others() -> None:
    assert sppf().SerializeToString() == sppf().SerializeToString()
    assert sppf(seed=1).SerializeToString() != sppf().SerializeToString()


def test_squeezenet_at_66_has_three_pools_that_round_up() -> None:
    model = squeezenet1_1(66)
    types = {value.name: value.type.tensor_type.shape for value in model.graph.value_info}
    pools = [node.output[0] for node in model.graph.node if node.op_type == "MaxPool"]
    assert [types[name].dim[3].dim_value for name in pools] == [16, 8, 4]
    onnx.checker.check_model(model, full_check=True)
    assert oracle.assert_exact(model, image_for(model), oracle.reference(model, image_for(model)))


@pytest.mark.parametrize("name", [n for n in ALL if n != "squeezenet1_1"])
def test_a_size_that_does_not_divide_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="multiple"):
        ALL[name](65)


# -- builder -------------------------------------------------------------------------------------


def test_builder_covers_its_methods() -> None:
    b = Builder(3)
    x = b.conv(b.input("x", [1, 4, 9, 9]), 4, 8, (3, 5), dilation=2, groups=2, bias=False)
    x = b.conv(x, 8, 8, 3, 2, auto_pad="SAME_UPPER")
    x = b.avgpool(b.bn(x, 8), 3, 2, 1, ceil=True, count_include_pad=True)
    left, right = b.op("Split", [x, b.const(np.array([2, 6]))], 2, axis=1)
    x = b.concat(b.silu(right), b.leaky_relu(left))
    model = b.model([b.rename(b.gemm(b.flatten(b.gap(b.add(x, x))), 8, 5), "y")])
    assert [node.op_type for node in model.graph.node][:3] == ["Conv", "Conv", "BatchNormalization"]
    (value,) = oracle.reference(model, image_for(model)).values()
    assert value.shape == (1, 5)
    assert np.isfinite(value).all()


def test_builder_takes_symbolic_shapes_and_other_domains() -> None:
    b = Builder(0)
    x = b.conv(b.input("x", ["n", 3, None, None]), 3, 4, 3)
    x = b.op("Gelu", x, domain="com.microsoft")
    model = b.model([helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", 4, None, None])])
    assert [o.domain for o in model.opset_import] == ["", "com.microsoft"]
    (value,) = oracle.reference(model, {"x": np.ones((2, 3, 5, 6), np.float32)}).values()
    assert value.shape == (2, 4, 5, 6)


def test_builder_refuses_mistakes() -> None:
    b = Builder(0)
    x = b.input("x", [1, 3, 8, 8])
    with pytest.raises(ValueError, match="no node makes"):
        b.rename(x, "y")
    with pytest.raises(ValueError, match="groups"):
        b.conv(x, 3, 4, 3, groups=2)
    b.const(np.ones(1), "one")
    with pytest.raises(ValueError, match="already exists"):
        b.const(np.ones(1), "one")
    wrong = b.add(x, b.const(np.ones(5, np.float32)))
    with pytest.raises(onnx.shape_inference.InferenceError):
        b.model([wrong])


# -- oracle --------------------------------------------------------------------------------------


def test_oracle_takes_a_proto_its_bytes_or_its_path(small: ModelProto, tmp_path: Path) -> None:
    inputs = image_for(small)
    expected = oracle.reference(small, inputs)
    path = tmp_path / "small.onnx"
    path.write_bytes(small.SerializeToString())
    for model in (small.SerializeToString(), path, str(path)):
        assert oracle.assert_exact(model, inputs, expected)
    assert oracle.assert_exact(small, inputs, oracle.reference(small, inputs, threads=2), threads=2)


def test_oracle_notices_a_planted_error_and_says_where(small: ModelProto) -> None:
    inputs = image_for(small)
    (wrong,) = oracle.reference(small, inputs).values()
    wrong[0, 2, 3, 4] += 1e-3 * np.abs(wrong).max()
    with pytest.raises(AssertionError, match=r"'features': error 0\.001.* at \(0, 2, 3, 4\)"):
        oracle.assert_exact(small, inputs, {"features": wrong})


def test_oracle_reports_bit_identity_apart_from_tolerance(small: ModelProto) -> None:
    inputs = image_for(small)
    actual = oracle.reference(small, inputs)
    assert oracle.assert_exact(small, inputs, actual)
    near = {name: value * np.float32(1 + 1e-6) for name, value in actual.items()}
    assert not oracle.assert_exact(small, inputs, near)


def test_oracle_measures_the_tolerance_once_the_floor_is_exceeded(
    small: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = image_for(small)
    near = {k: v * np.float32(1 + 5e-5) for k, v in oracle.reference(small, inputs).items()}
    with pytest.raises(AssertionError, match="tolerance 1e-05"):
        oracle.assert_exact(small, inputs, near)
    monkeypatch.setattr(oracle, "_tolerance", lambda *_: 1e-4)
    assert not oracle.assert_exact(small, inputs, near)


def test_oracle_notices_dtype_shape_names_and_nan(small: ModelProto) -> None:
    inputs = image_for(small)
    (value,) = oracle.reference(small, inputs).values()
    hole = value.copy()
    hole[0, 0, 0, 0] = np.nan
    for actual, message in (
        ({"features": value.astype(np.float64)}, "dtype float64, expected float32"),
        ({"features": value[:, :, :-1]}, "shape"),
        ({"other": value}, "outputs"),
        ({"features": value, "other": value}, "outputs"),
        ({}, "outputs"),
        ({"features": hole}, "error inf"),
    ):
        with pytest.raises(AssertionError, match=message):
            oracle.assert_exact(small, inputs, actual)


def test_oracle_wants_integers_equal(mixed: ModelProto) -> None:
    inputs = image_for(mixed)
    actual = oracle.reference(mixed, inputs)
    assert oracle.assert_exact(mixed, inputs, actual)
    only = {"classes": actual["classes"]}
    assert oracle.assert_exact(mixed, inputs, only, outputs=["classes"])
    actual["classes"][0, 0, 5, 6] += 1
    with pytest.raises(AssertionError, match=r"'classes' must be equal.*\(0, 0, 5, 6\).*1 of 64"):
        oracle.assert_exact(mixed, inputs, actual)


def test_oracle_sees_into_sequences() -> None:
    b = Builder(0)
    x = b.op("SplitToSequence", b.input("x", [4, 2]), axis=0)
    model = b.model([b.rename(x, "parts")])
    inputs = {"x": np.arange(8, dtype=np.float32).reshape(4, 2)}
    actual = oracle.reference(model, inputs)
    assert oracle.assert_exact(model, inputs, actual)
    with pytest.raises(AssertionError, match="outputs"):
        oracle.assert_exact(model, inputs, {"parts": actual["parts"][:3]})
    actual["parts"][2][0, 1] = 0
    with pytest.raises(AssertionError, match=r"parts\[2\]"):
        oracle.assert_exact(model, inputs, actual)


def test_error_is_relative_to_the_largest_true_value() -> None:
    b = np.array([0.5, -4.0, np.inf, np.nan], np.float32)
    assert oracle.error(b, b) == 0
    assert oracle.error(b + np.float32(0.5), b) == pytest.approx(0.125)
    assert oracle.error(np.array([0.5, -4.0, 1.0, np.nan], np.float32), b) == np.inf
    assert oracle.error(np.ones(2), np.zeros(2)) == np.inf
    assert oracle.error(np.zeros((0, 3)), np.zeros((0, 3))) == 0
    with pytest.raises(ValueError, match="shapes differ"):
        oracle.error(np.ones(2), np.ones(3))
