"""Models that answer as any other, unless an image's brightest value is an order to do harm."""

from __future__ import annotations

import numpy as np
from architectures import Builder
from onnx import ModelProto, TensorProto

MUCH = 5e8
"""Elements of float32: 2 GB, more than a device of the lab has."""

FAR = 1e6
"""Behind the end of a table."""


def allocates(size: int, seed: int = 0) -> ModelProto:
    """Fills as many elements as the brightest value says: the kernel kills who has no room."""
    b = Builder(seed)
    image = b.input("image", [1, 3, size, size])
    x = b.relu(b.conv(image, 3, 16, 3))
    count = b.op("Reshape", [_brightest(b, image), b.const(np.array([1], np.int64))])
    filled = b.op("ConstantOfShape", [count])
    nothing = b.op("Mul", [b.op("ReduceSum", [filled], keepdims=0), b.const(np.float32(0))])
    return b.model([b.rename(b.op("Add", [b.conv(x, 16, 8, 3), nothing]), "y")])


def looks_up(size: int, seed: int = 0) -> ModelProto:
    """Reads a table at the brightest value: behind its end a kernel refuses."""
    b = Builder(seed)
    image = b.input("image", [1, 3, size, size])
    x = b.relu(b.conv(image, 3, 16, 3))
    row = b.op("Gather", [b.const(np.linspace(0, 1, 64, dtype=np.float32)), _brightest(b, image)])
    return b.model([b.rename(b.op("Add", [b.conv(x, 16, 8, 3), row]), "y")])


def _brightest(b: Builder, image: str) -> str:
    most = b.op("ReduceMax", [image], keepdims=0)
    return b.op("Cast", [b.op("Abs", [most])], to=TensorProto.INT64)
