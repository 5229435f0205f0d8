"""The models that are measured, built from seeds, and the pictures that they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import zoo
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

Array = np.ndarray[Any, Any]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PICTURES = 2
_YOLO_SEED = 2018
_SLOPE = 0.1

# DeepThings' work: Darknet's yolov2.cfg, layers 0 to 15. (kernel, channels), None: maximum of 2×2.
YOLO_LAYERS: tuple[tuple[int, int] | None, ...] = (
    (3, 32),
    None,
    (3, 64),
    None,
    (3, 128),
    (1, 64),
    (3, 128),
    None,
    (3, 256),
    (1, 128),
    (3, 256),
    None,
    (3, 512),
    (1, 256),
    (3, 512),
    (1, 256),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One picture: ``feeds`` for onnxruntime, and what MeshInfer's client is given.

    ``picture``: uint8 pixels [H, W, C] for a model with an image spec, else None: the feeds.
    """

    feeds: Mapping[str, Array]
    picture: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that must reach the model."""
        if self.picture is not None:
            return int(self.picture.nbytes)
        return sum(int(array.nbytes) for array in self.feeds.values())


@dataclass(frozen=True, slots=True)
class Model:
    """A model's file, its requests, and its title."""

    name: str
    title: str
    path: Path
    requests: tuple[Request, ...]


def make(name: str, folder: Path) -> Model:
    """Write the model into ``folder``; its pictures. ``KeyError`` for an unknown name."""
    title, maker = MODELS[name]
    path, requests = maker(folder)
    return Model(name, title, path, tuple(requests))


def yolo(size: int) -> onnx.ModelProto:
    """YOLOv2's first 16 layers for pictures of size × size, weights from a seed.

    LeakyReLU of 0.1 after each convolution, batch normalisation folded into weights and bias.
    """
    rng = np.random.Generator(np.random.PCG64(_YOLO_SEED))
    nodes, weights = [], []
    value, channels, side = "image", 3, size
    for i, layer in enumerate(YOLO_LAYERS):
        if layer is None:
            nodes.append(
                helper.make_node("MaxPool", [value], [f"v{i}"], kernel_shape=[2, 2], strides=[2, 2])
            )
            value, side = f"v{i}", side // 2
            continue
        kernel, made = layer
        scale = np.sqrt(2 / ((1 + _SLOPE**2) * channels * kernel**2))
        shape = (made, channels, kernel, kernel)
        drawn = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        bias = rng.standard_normal(made, dtype=np.float32) * np.float32(0.05)
        weights += [numpy_helper.from_array(drawn, f"w{i}"), numpy_helper.from_array(bias, f"b{i}")]
        nodes += [
            helper.make_node(
                "Conv",
                [value, f"w{i}", f"b{i}"],
                [f"c{i}"],
                kernel_shape=[kernel, kernel],
                pads=[kernel // 2] * 4,
            ),
            helper.make_node("LeakyRelu", [f"c{i}"], [f"v{i}"], alpha=_SLOPE),
        ]
        value, channels = f"v{i}", made
    graph = helper.make_graph(
        nodes,
        f"yolov2-16-{size}",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, channels, side, side])],
        initializer=weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


# ---------------------------------------------------------------------- pictures


def pictures(width: int, height: int) -> list[Array]:
    """Photographs of this size, uint8 [H, W, 3]; scikit-image's where it is installed."""
    found: list[Array] = []
    try:
        from skimage import data

        found = [data.astronaut(), data.coffee()]
    except ImportError:  # only with the development packages
        pass
    cat = files("cluster").joinpath("data/photo.jpg")
    with cat.open("rb") as file:
        chelsea = np.asarray(Image.open(file, formats=["JPEG"]).convert("RGB"))
    found += [chelsea, np.ascontiguousarray(chelsea[:, ::-1])]
    return [
        np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC))
        for p in found[:_PICTURES]
    ]


def _tensor(picture: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    scaled = picture.astype(np.float32) / np.float32(255)
    scaled = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[np.newaxis])


def _from_zoo(name: str) -> Callable[[Path], tuple[Path, list[Request]]]:
    def maker(folder: Path) -> tuple[Path, list[Request]]:
        path = zoo.fill_file(name, folder)
        (value,) = zoo.fixture(name).graph.input
        height, width = (d.dim_value for d in value.type.tensor_type.shape.dim[-2:])
        return path, [
            Request({value.name: _tensor(p, *_IMAGENET)}) for p in pictures(width, height)
        ]

    return maker


def _yolo(size: int) -> Callable[[Path], tuple[Path, list[Request]]]:
    def maker(folder: Path) -> tuple[Path, list[Request]]:
        path = folder / f"yolo{size}.onnx"
        onnx.save_model(yolo(size), str(path))
        unit = ((0.0,) * 3, (1.0,) * 3)
        return path, [Request({"image": _tensor(p, *unit)}) for p in pictures(size, size)]

    return maker


def _upscaler(width: int, height: int) -> Callable[[Path], tuple[Path, list[Request]]]:
    def maker(folder: Path) -> tuple[Path, list[Request]]:
        from meshinfer.importers import open_model

        data = files("cluster").joinpath("data/upscale.onnx").read_bytes()
        path = folder / "upscale.onnx"
        path.write_bytes(data)
        spec = open_model(data).image
        assert spec is not None
        requests = []
        for p in pictures(width, height):
            tensor = (p.astype(np.float32) * np.float32(spec.scale)).transpose(2, 0, 1)
            feeds = {spec.input: np.ascontiguousarray(tensor[np.newaxis])}
            requests.append(Request(feeds, picture=p))
        return path, requests

    return maker


MODELS: dict[str, tuple[str, Callable[[Path], tuple[Path, list[Request]]]]] = {
    "vgg16": ("VGG-16, 224²", _from_zoo("vgg16")),
    "resnet50": ("ResNet-50, 224²", _from_zoo("resnet50")),
    "mobilenet_v2": ("MobileNetV2, 224²", _from_zoo("mobilenet_v2")),
    "yolo416": ("YOLOv2-16, 416²", _yolo(416)),
    "yolo608": ("YOLOv2-16, 608²", _yolo(608)),
    "upscale1080": ("Upscaler, 960×540 to 1080p", _upscaler(960, 540)),
    "upscale2160": ("Upscaler, 1080p to 2160p", _upscaler(1920, 1080)),
}
