"""Pictures to pixels and back, with Pillow: PNG, JPEG, WebP and BMP, bounded before decoding.

No other decoder is ever opened. Of an animation the first picture is taken.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from meshinfer import limits
from meshinfer.errors import InvalidInput
from meshinfer.image import ImageSpec

Array = np.ndarray[Any, Any]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_START_OF_SCAN = b"\xff\xda"


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
    mode = "L" if spec.colour == "GRAY" else "RGB"
    if isinstance(data, Image.Image):
        image = data.convert(mode)
    else:
        image = _decode(*_bytes(data), mode)
    if spec.size is not None and image.size != (spec.size[1], spec.size[0]):
        _check_pixels(spec.size[1], spec.size[0], "what the model takes")
        image = image.resize((spec.size[1], spec.size[0]), Image.Resampling.BICUBIC)
    array = np.asarray(image, dtype=np.uint8)
    return Picture(array.reshape(1, *array.shape[:2], spec.channels))


def _bytes(data: object) -> tuple[bytes, str]:
    if isinstance(data, bytes | bytearray | memoryview):
        _check_length(len(data), "the picture")
        return bytes(data), "the picture"
    if not isinstance(data, str | os.PathLike):
        raise InvalidInput(
            f"{type(data).__name__} is no picture",
            hint="give a path, bytes, a Pillow image, a uint8 array or {input name: array}",
        )
    path = Path(data)
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):  # a pipe may never end
            raise InvalidInput(f"{path} is no file", hint="give a file, or its bytes")
        _check_length(status.st_size, str(path))
        return path.read_bytes(), str(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InvalidInput(
            f"cannot read {path}: {getattr(error, 'strerror', error)}", hint="check the path"
        ) from error


def _check_length(nbytes: int, name: str) -> None:
    if nbytes > limits.IMAGE_FILE_BYTES:
        raise InvalidInput(
            f"{name} has more than {limits.IMAGE_FILE_BYTES} bytes", hint="shrink it first"
        )


def _check_pixels(width: int, height: int, name: str) -> None:
    if width * height > limits.IMAGE_PIXELS or max(width, height) > limits.IMAGE_SIDE:
        raise InvalidInput(
            f"{name} has {width} x {height} pixels, more than {limits.IMAGE_PIXELS} in all or "
            f"{limits.IMAGE_SIDE} a side",
            hint="shrink it first",
        )


def _decode(data: bytes, name: str, mode: str) -> Image.Image:
    """Whatever a decoder says of strange bytes, it is no picture. Its warnings go to nobody: the
    bounds are ours, with errors of their own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_pixels(image.width, image.height, name)
            if image.format in ("JPEG", "MPO") and data.count(_START_OF_SCAN) > limits.IMAGE_SCANS:
                raise InvalidInput(
                    f"{name} is a JPEG of more than {limits.IMAGE_SCANS} scans",
                    hint="save it again, as a plain JPEG",
                )
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == mode else image.convert(mode)
    except InvalidInput:
        raise
    except Exception as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f": {error}"[:300]
        raise InvalidInput(
            f"{name} is no picture that can be read{why}",
            hint=f"give one of {', '.join(FORMATS)}, whole",
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
