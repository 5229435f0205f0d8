"""The zoo: torchvision's architectures as ONNX graphs without their weights, refilled from a seed.

A fixture keeps of each large float tensor its type, shape, mean and standard deviation, so that the
refilled network behaves like the one it was exported from; all else is kept as it was. The same
fixture gives the same bytes anywhere. `scripts/make_zoo` makes them; `tests/zoo/README.md` tells.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

FOLDER = Path(__file__).resolve().parent / "zoo"
SUFFIX = ".onnx.xz"
STRIPPED = "refill"
"""The `location` of a tensor whose values were left out; mean and std stand beside it."""
_CALIBRATION = 4
SAMPLE = (
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "efficientnet_b0",
    "resnet18",
    "convnext_tiny",
    "swin_t",
    "lraspp_mobilenet_v3_large",
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "r3d_18",
    "raft_small",
    "quantized_shufflenet_v2_x0_5",
)
"""One of each kind, and small: what the quick tests take."""


@dataclass(frozen=True, slots=True)
class Info:
    """What a fixture is: `kind` of network, whether it is a CNN, what of the model it has."""

    kind: str
    cnn: bool
    scope: str
    int8: bool
    made_with: str


def names() -> list[str]:
    """All fixtures, by name."""
    return sorted(path.name.removesuffix(SUFFIX) for path in FOLDER.glob("*" + SUFFIX))


def path_of(name: str) -> Path:
    return FOLDER / (name + SUFFIX)


def fixture(name: str) -> ModelProto:
    """The graph as it is stored: large tensors have no values."""
    return onnx.load_model_from_string(lzma.decompress(path_of(name).read_bytes()))


def info(name: str) -> Info:
    """What `scripts/make_zoo` wrote about this fixture."""
    said = {p.key: p.value for p in fixture(name).metadata_props}
    return Info(
        kind=said["kind"],
        cnn=said["cnn"] == "1",
        scope=said["scope"],
        int8=said["int8"] == "1",
        made_with=said["made_with"],
    )


def fill(name: str) -> ModelProto:
    """The model with all its weights. For models above 2 GB, which no file holds: `fill_file`."""
    model = fixture(name)
    quantise = info(name).int8
    del model.metadata_props[:]
    for tensor in model.graph.initializer:
        if is_stripped(tensor):
            values = _values(name, tensor)
            _forget(tensor)
            tensor.raw_data = values.tobytes()
    return _quantised(name, model) if quantise else model


def fill_file(name: str, folder: Path) -> Path:
    """Write the model into `folder`, its weights beside it; one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    if info(name).int8:
        onnx.save_model(fill(name), str(path))
        return path
    model = fixture(name)
    del model.metadata_props[:]
    data = folder / f"{name}.onnx.data"
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if is_stripped(tensor):
                values = _values(name, tensor)
                _forget(tensor)
                tensor.data_location = TensorProto.EXTERNAL
                place = {"location": data.name, "offset": file.tell(), "length": values.nbytes}
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                file.write(values.data)
    onnx.save_model(model, str(path))
    return path


def inputs(name: str, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """One array for each input: coarse structure with noise on it, of mean 0 and variance 1."""
    return inputs_of(name, fixture(name), seed)


def inputs_of(name: str, model: ModelProto, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """The same for a model at hand."""
    found = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        found[value.name] = picture(_rng(name, value.name, str(seed)), shape)
    return found


def weight_bytes(name: str) -> int:
    """What the weights of a model come to, before any quantisation."""
    return sum(4 * int(np.prod(t.dims)) for t in fixture(name).graph.initializer if is_stripped(t))


def is_stripped(tensor: TensorProto) -> bool:
    """Whether a tensor of a fixture has statistics instead of values."""
    return any(e.key == "location" and e.value == STRIPPED for e in tensor.external_data)


def values_of(name: str, tensor: TensorProto) -> np.ndarray[Any, Any]:
    """The values of a tensor of a fixture, drawn if it was stripped."""
    return _values(name, tensor) if is_stripped(tensor) else numpy_helper.to_array(tensor)


def _forget(tensor: TensorProto) -> None:
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT


def _rng(*names: str) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def _values(name: str, tensor: TensorProto) -> np.ndarray[Any, Any]:
    """Normal with the mean and the standard deviation of the source, and not below its floor."""
    kept = {e.key: e.value for e in tensor.external_data}
    assert tensor.data_type == TensorProto.FLOAT, f"{name}: {tensor.name} is not float32"
    values = _rng(name, tensor.name).standard_normal(tuple(tensor.dims), dtype=np.float32)
    values *= np.float32(kept["std"])
    values += np.float32(kept["mean"])
    if "floor" in kept:
        np.maximum(values, np.float32(kept["floor"]), out=values)
    return values


def picture(rng: np.random.Generator, shape: list[int]) -> np.ndarray[Any, Any]:
    """Blocks of 8 pixels along the last two axes, and noise: a shift by one shows everywhere."""
    height, width = shape[-2:]
    coarse = rng.standard_normal([*shape[:-2], -(-height // 8), -(-width // 8)], dtype=np.float32)
    blocks = coarse.repeat(8, axis=-2).repeat(8, axis=-1)[..., :height, :width]
    noise = rng.standard_normal(shape, dtype=np.float32)
    return np.ascontiguousarray(np.float32(0.8) * blocks + np.float32(0.6) * noise)


def _quantised(name: str, model: ModelProto) -> ModelProto:
    """The int8 model that onnxruntime makes of it: QDQ, weights per channel, uint8 activations."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._arrays: Iterator[dict[str, Any]] = (
                inputs(name, seed) for seed in range(1, _CALIBRATION + 1)
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self._arrays, None)

    with tempfile.TemporaryDirectory(prefix="meshinfer-zoo-") as folder:
        path = Path(folder) / "int8.onnx"
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it advises to optimise first: the exporter has done so
        try:
            quantize_static(
                model,
                str(path),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
            )
        finally:
            logging.disable(before)
        return onnx.load_model(str(path))
