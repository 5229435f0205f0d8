"""torch modules come in exactly: held against torch itself and against plain onnxruntime.

Failures must name the line of the model. torch is imported by this file alone, never by ours
before a module is given.
"""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import textwrap
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cores import banded
from oracle import assert_exact, error
from torch import Tensor, nn

import meshinfer as mi
from meshinfer.importers.torch_module import _exported

TOLERANCE = 1e-4
IMAGE = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))


class Exits(nn.Module):
    """Two answers at two depths, a residual sum between them, and a scale that may be an input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout())
        self.head = nn.Linear(8, 5)
        for each in self.modules():
            if isinstance(each, nn.BatchNorm2d):
                nn.init.normal_(each.running_mean)
                nn.init.uniform_(each.running_var, 0.5, 2.0)

    def forward(self, image: Tensor, scale: Tensor | float = 1.0) -> dict[str, Tensor]:
        x = self.stem(image)
        early = self.head(x.mean((2, 3)))
        x = torch.relu(x + self.body(x) * scale)
        return {"early": early, "late": self.head(x.mean((2, 3)))}


class Upscaler(nn.Module):
    """Convolutions, a transposed one's cousin (pixel shuffle), an interpolation and their sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b = nn.Conv2d(3, 16, 5, padding=2), nn.Conv2d(16, 12, 3, padding=1, groups=2)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, image: Tensor) -> Tensor:
        up = nn.functional.interpolate(image, scale_factor=2, mode="bilinear")
        return self.shuffle(self.b(nn.functional.gelu(self.a(image)))) + up


@dataclass
class Pair:
    first: Tensor
    second: Tensor


Point = namedtuple("Point", "x y")


class Calls(nn.Module):
    """A module that is what its function is."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, image: Any, extra: Any = None, mode: str = "plain", *more: Any) -> Any:
        return self.call(self, image, extra, mode, *more)


def names(proto: Any) -> tuple[list[str], list[str]]:
    return [v.name for v in proto.graph.input], [v.name for v in proto.graph.output]


def close(actual: Mapping[str, np.ndarray], expected: Mapping[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert error(actual[name], tensor.detach().numpy()) <= TOLERANCE, name


@pytest.mark.parametrize(
    ("module", "example", "inputs"),
    [
        (Exits(), {"image": IMAGE}, {"image": IMAGE}),
        (
            Exits(),
            (IMAGE, torch.tensor(0.5)),
            {"image": IMAGE, "scale": torch.tensor(0.5)},
        ),
        (Upscaler(), IMAGE, {"image": IMAGE}),
    ],
    ids=["one input", "two inputs", "upscaler"],
)
def test_a_module_in_bands_is_what_torch_and_onnxruntime_give(
    module: nn.Module, example: Any, inputs: dict[str, Tensor]
) -> None:
    proto, graph = mi.from_torch(module, example), mi.load(module, example)
    plan = banded(graph, ["pi-1", "pi-2", "pi-3"], "pi-1")
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    outputs = mi.run_plan(graph, plan, arrays)
    assert_exact(proto, arrays, outputs)
    with torch.no_grad():
        eager = module.eval()(**inputs)
    close(outputs, eager if isinstance(eager, dict) else {"output": eager})


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        (lambda y: y, ["output"]),
        (lambda y: (y, y + 1), ["output_0", "output_1"]),
        (lambda y: [y], ["output_0"]),
        (lambda y: {"mask": y, "aux": {"low": y + 1, "more": [y + 2]}},
         ["mask", "aux.low", "aux.more.0"]),
        (lambda y: Pair(y, y * 2), ["first", "second"]),
        (lambda y: Point(y, (y + 1, y * 2)), ["x", "y.0", "y.1"]),
        (lambda y: (y, y), ["output_0", "output_1"]),
        (lambda y: {"y": y, "none": None, "count": 3}, ["y", "count"]),
        (lambda y: {"image": y}, ["image_out"]),  # the name is the input's
    ],
)  # fmt: skip
def test_outputs_have_their_keys_fields_or_numbers(
    returns: Callable[[Tensor], Any], expected: list[str]
) -> None:
    module = Calls(lambda self, image, *_: returns(self.conv(image)))
    proto = mi.from_torch(module, IMAGE)
    assert names(proto) == (["image"], expected)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": IMAGE.numpy()})
    conv = module.conv(IMAGE).detach().numpy()
    assert error(found[0], conv) <= TOLERANCE


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (IMAGE, ["image"]),
        ((IMAGE, torch.ones(1)), ["image", "extra"]),
        ({"image": IMAGE, "extra": np.float32(2)}, ["image", "extra"]),
        ({"image": IMAGE.numpy(), "mode": "other"}, ["image"]),
        ((IMAGE, {"a": torch.ones(1), "b": [np.ones(1, np.float32)]}),
         ["image", "extra.a", "extra.b.0"]),
        ((IMAGE, None, "plain", torch.ones(1)), ["image", "more.0"]),
        ([IMAGE], ["image.0"]),
        ((IMAGE, 3.5), ["image"]),  # a Python number is an option, not an input
    ],
)  # fmt: skip
def test_inputs_have_the_names_of_the_parameters(example: Any, expected: list[str]) -> None:
    def leaves(value: Any) -> Iterator[Any]:
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each) if isinstance(each, list | dict | tuple) else [each]

    def call(self: Calls, *given: Any) -> Tensor:
        image, *others = leaves(given)
        y = self.conv(image)
        for each in others:
            if isinstance(each, Tensor | float):
                y = y * each
        return y

    proto = mi.from_torch(Calls(call), example)
    assert names(proto) == (expected, ["output"])


def test_axes_that_may_vary_are_dynamic_and_all_others_fixed() -> None:
    module = Upscaler()
    proto = mi.from_torch(module, IMAGE, shapes={"image": (1, 3, "rows", None)})
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.HasField("dim_value") for d in dims] == [True, True, False, False]
    wide = torch.rand(1, 3, 18, 30)
    graph = mi.load(proto, shapes={"image": tuple(wide.shape)})
    plan = banded(graph, ["pi-1", "pi-2"], "pi-1")
    outputs = mi.run_plan(graph, plan, {"image": wide.numpy()})
    assert_exact(proto, {"image": wide.numpy()}, outputs)
    close(outputs, {"output": module.eval()(wide)})
    with pytest.raises(mi.InvalidInput, match=r"shapes say .* the example has \[1, 3, 24, 24\]"):
        mi.from_torch(module, IMAGE, shapes={"image": (1, 3, 16, None)})
    with pytest.raises(mi.InvalidInput, match="no input 'picture'"):
        mi.from_torch(module, IMAGE, shapes={"picture": (1, 3, None, None)})


def test_a_module_takes_pixels_with_an_image_spec() -> None:
    graph = mi.load(Upscaler(), IMAGE, image=mi.ImageSpec(input="image"))
    assert graph.shape("image") == (1, 24, 24, 3) and graph.numpy_dtype("image") == np.uint8


def test_the_module_and_the_example_are_left_as_they_were() -> None:
    def call(self: Calls, image: Tensor, *_: Any) -> Tensor:
        self.calls += 1
        return self.conv(image.add_(1))

    module = Calls(call)
    module.register_buffer("calls", torch.zeros(()))
    module.train()
    module.conv.eval()
    image = IMAGE.clone()
    mi.from_torch(module, image)
    assert module.training and not module.conv.training
    assert float(module.calls) == 0.0 and torch.equal(image, IMAGE)
    assert all(p.requires_grad for p in module.parameters())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        return self.lstm(x, state)


def test_a_compiled_module_and_one_with_a_state_come_in_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's compiler, on its import
        conv = torch.compile(nn.Conv2d(3, 2, 3))
    assert names(mi.from_torch(conv, IMAGE)) == (["input"], ["output"])
    state = (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))
    proto = mi.from_torch(Recurrent(), (torch.ones(2, 3, 4), state))
    assert names(proto) == (["x", "state.0", "state.1"], ["output_0", "output_1.0", "output_1.1"])


def test_dropout_is_off_and_statistics_are_the_trained_ones() -> None:
    module = Exits().train()
    graph = mi.load(module, example={"image": IMAGE})
    assert not {"Dropout", "BatchNormalization"} & {op.type for op in graph.ops}


def test_half_precision_stays_half_precision() -> None:
    module = nn.Conv2d(3, 2, 3).half()
    graph = mi.load(module, example=IMAGE.half())
    assert graph.numpy_dtype("input") == np.float16
    assert graph.numpy_dtype("output") == np.float16


def test_weights_are_not_copied_to_be_exported() -> None:
    module = nn.Conv2d(3, 2, 3)
    model, _ = _exported(module, IMAGE, None)
    found = [v.const_value for v in model.graph.initializers.values()]
    assert module.weight.data_ptr() in {tensor.raw.data_ptr() for tensor in found}


# --- what goes wrong ------------------------------------------------------------------------------


def branches(self: Calls, image: Tensor, *_: Any) -> Tensor:
    y = self.conv(image)
    if y.mean() > 0:  # the branch
        y = y + 1
    return y


def counts(self: Calls, image: Tensor, *_: Any) -> Tensor:
    kept = image[image > 0]  # as many as the data say: a detector's boxes above a threshold
    if kept.numel() > 40:  # the count, which batched_nms of torchvision decides by
        kept = kept * 2
    return kept


class Eigenvalues(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.eigvals(image)  # the operator


def mismatched(self: Calls, image: Tensor, *_: Any) -> Tensor:
    return self.conv(image) @ torch.ones(7, 7)  # the product


@pytest.mark.parametrize(
    ("module", "code", "comment", "told"),
    [
        (Calls(branches), branches, "# the branch", "may not decide by a tensor's values"),
        (Calls(counts), counts, "# the count", "may not decide by a tensor's values"),
        (Eigenvalues(), Eigenvalues.forward, "# the operator", "has no ONNX form"),
        (Calls(mismatched), mismatched, "# the product", "fails on the example"),
    ],
)
def test_a_failure_names_the_line_of_the_model(
    module: nn.Module, code: Callable[..., Any], comment: str, told: str
) -> None:
    lines, first = inspect.getsourcelines(code)
    line = first + next(i for i, text in enumerate(lines) if comment in text)
    with pytest.raises(mi.InvalidInput) as raised:
        mi.from_torch(module, IMAGE)
    message = str(raised.value)
    assert f"{__file__}:{line}, in {code.__name__}" in message
    assert lines[line - first].strip() in message
    assert told in message and raised.value.hint


@pytest.mark.parametrize(
    ("example", "told"),
    [
        (None, "without an example"),
        (3.0, "holds no tensor"),
        ({"image": IMAGE, "size": IMAGE}, "unexpected keyword argument 'size'"),
        (IMAGE.double(), "fails on the example"),
        (IMAGE[:, :2], "fails on the example"),
    ],
)
def test_an_example_that_is_none_is_refused(example: Any, told: str) -> None:
    with pytest.raises(mi.InvalidInput, match=told):
        mi.load(Exits(), example=example)


def test_torchscript_is_refused_in_words() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Conv2d(3, 2, 3))
    with pytest.raises(mi.InvalidInput, match="Conv2d is TorchScript"):
        mi.from_torch(scripted, IMAGE)


@pytest.mark.parametrize("returned", [None, "text", ()])
def test_what_returns_no_tensor_is_refused(returned: object) -> None:
    with pytest.raises(mi.InvalidInput, match="returns"):
        mi.from_torch(Calls(lambda *_: returned), IMAGE)


def test_without_onnxscript_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(mi.ConfigurationError, match=r'pip install "meshinfer\[torch\]"'):
        mi.from_torch(Exits(), IMAGE)


# --- what is said, and what is imported -----------------------------------------------------------


def test_nothing_is_printed_but_what_the_model_prints_itself(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def call(self: Calls, image: Tensor, *_: Any) -> Any:
        print("from the model")  # noqa: T201
        return {"y": self.conv(image), "weight": self.conv.weight}

    level = logging.getLogger("torch").level
    mi.from_torch(Calls(call), IMAGE)
    assert capfd.readouterr() == ("from the model\n", "")
    assert logging.getLogger("torch").level == level
    with pytest.raises(mi.InvalidInput):
        mi.from_torch(Calls(branches), IMAGE)
    assert capfd.readouterr() == ("", "")


def test_warnings_of_the_model_are_passed_on_once_and_the_exporters_are_not() -> None:
    def call(self: Calls, image: Tensor, *_: Any) -> Tensor:
        warnings.warn("weights of a draft", stacklevel=1)
        return self.conv(image)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mi.from_torch(Calls(call), IMAGE)
    assert [str(w.message) for w in said] == ["weights of a draft"]
    assert said[0].filename == __file__


def test_torch_is_not_imported_until_a_module_is_given() -> None:
    upscaler = Path(mi.__file__).parent.parent / "cluster" / "data" / "upscale.onnx"
    script = textwrap.dedent(
        f"""
        import sys
        import meshinfer as mi
        mi.load({str(upscaler)!r}, shapes={{"image": (1, 3, 16, 16)}})
        mi.from_torch, mi.Client
        try:
            mi.load(lambda x: x)
        except mi.InvalidInput:
            pass
        print([m for m in ("torch", "onnxscript") if m in sys.modules])
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
