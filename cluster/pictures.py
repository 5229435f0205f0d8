"""Pictures to pixels and back, with Pillow: PNG, JPEG, WebP and BMP, bounded before decoding."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from meshinfer import limits
from meshinfer.errors import InvalidInput
from meshinfer.image import ImageSpec

Array = np.ndarray[Any, Any]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """``pixels``: uint8 [1, height, width, channels], RGB or grey."""

    pixels: Array

    @staticmethod
    def from_tensor(tensor: Array, spec: ImageSpec) -> Picture:
        """Of an output ``pixels * scale`` in the spec's layout and colour; rounded and clipped."""
        array = np.asarray(tensor)
        if array.ndim != 4 or array.shape[0] != 1:
            raise InvalidInput(
                f"an output of shape {array.shape} is no picture",
                hint=f"ImageSpec.output must name a value of layout {spec.layout}, batch 1",
            )
        if spec.layout == "NCHW":
            array = array.transpose(0, 2, 3, 1)
        if spec.colour == "BGR":
            array = array[..., ::-1]
        if array.dtype != np.uint8:
            array = np.clip(np.rint(array.astype(np.float64) / spec.scale), 0, 255)
        return Picture(np.ascontiguousarray(array.astype(np.uint8)))

    @property
    def image(self) -> Image.Image:
        """As a Pillow image."""
        pixels = self.pixels[0]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it; the ending says how (.png, .jpg, ...). Raises ``InvalidInput``."""
        try:
            self.image.save(path)
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"cannot write {os.fspath(path)}: {error}",
                hint="choose another folder, and an ending such as .png",
            ) from error


def read_picture(data: object, spec: ImageSpec) -> Picture:
    """Pixels for an image spec, from a path, bytes, a Pillow image or a uint8 array [H, W, C].

    Resized to ``spec.size`` (bicubic) if it has one. Raises ``InvalidInput``.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, spec)
    if isinstance(data, Image.Image):
        image = data
    else:
        image = _decode(*_bytes(data))
    image = image.convert("L" if spec.colour == "GRAY" else "RGB")
    if spec.size is not None and image.size != (spec.size[1], spec.size[0]):
        image = image.resize((spec.size[1], spec.size[0]), Image.Resampling.BICUBIC)
    array = np.asarray(image, dtype=np.uint8)
    return Picture(array.reshape(1, *array.shape[:2], spec.channels))


def _bytes(data: object) -> tuple[bytes, str]:
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data), "the picture"
    if not isinstance(data, str | os.PathLike):
        raise InvalidInput(
            f"{type(data).__name__} is no picture",
            hint="give a path, bytes, a Pillow image, a uint8 array or {input name: array}",
        )
    path = Path(data)
    try:
        if path.stat().st_size > limits.IMAGE_FILE_BYTES:
            raise InvalidInput(
                f"{path} has more than {limits.IMAGE_FILE_BYTES} bytes", hint="shrink it first"
            )
        return path.read_bytes(), str(path)
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror}", hint="check the path"
        ) from error


def _decode(data: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():  # our own bound is below, with an error of its own
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > limits.IMAGE_PIXELS:
            raise InvalidInput(
                f"{name} has {image.width} x {image.height} pixels, "
                f"more than {limits.IMAGE_PIXELS}",
                hint="shrink it first",
            )
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise InvalidInput(
            f"{name} is no picture that can be read", hint=f"give one of {', '.join(FORMATS)}"
        ) from error
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise InvalidInput(
            f"{name} is no picture that can be read: {error}",
            hint=f"give one of {', '.join(FORMATS)}",
        ) from error


def _from_array(array: Array, spec: ImageSpec) -> Picture:
    if array.ndim == 2 and spec.channels == 1:
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != spec.channels:
        raise InvalidInput(
            f"an array of {array.dtype} {array.shape} is no picture",
            hint=f"pixels are uint8 [height, width, {spec.channels}]; tensors go in as "
            f"{{{spec.input!r}: array}}",
        )
    return Picture(np.ascontiguousarray(array))
