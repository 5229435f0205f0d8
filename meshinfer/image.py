"""How a picture becomes the input tensor of a model, said once at deployment and never guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from meshinfer.errors import InvalidInput

METADATA_KEY = "meshinfer.image"
"""The ONNX metadata property that keeps the spec with the model, as JSON."""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """The input tensor is ``(pixels * scale - mean) / std``, pixels 0..255.

    ``input``: name of the model's input. ``layout``: NCHW or NHWC. ``colour``: RGB, BGR or GRAY.
    ``mean`` and ``std``: one number a channel. ``size``: (height, width) to resize to; None keeps
    the picture's own. ``output``: name of an output that is a picture of the same layout and
    colour, with values ``pixels * scale``; None when there is none.
    """

    input: str
    layout: str = "NCHW"
    colour: str = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    size: tuple[int, int] | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in ("NCHW", "NHWC"):
            raise _bad(f"layout {self.layout!r} is neither NCHW nor NHWC")
        if self.colour not in ("RGB", "BGR", "GRAY"):
            raise _bad(f"colour {self.colour!r} is none of RGB, BGR, GRAY")
        if len(self.mean) < self.channels or len(self.std) < self.channels or 0 in self.std:
            raise _bad(f"mean and std need {self.channels} numbers, std none that is 0")
        if self.scale == 0 or not all(map(isfinite, (self.scale, *self.mean, *self.std))):
            raise _bad("scale, mean and std are finite numbers, and scale is not 0")
        if self.size is not None and min(self.size) < 1:
            raise _bad(f"size {self.size} is no height and width")

    @property
    def channels(self) -> int:
        return 1 if self.colour == "GRAY" else 3

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> ImageSpec:
        """Raises ``InvalidInput`` when the text is no spec."""
        try:
            found: Mapping[str, Any] = json.loads(text)
            size = found.get("size")
            return ImageSpec(
                input=str(found["input"]),
                layout=str(found.get("layout", "NCHW")),
                colour=str(found.get("colour", "RGB")),
                scale=float(found.get("scale", 1 / 255)),
                mean=tuple(float(v) for v in found.get("mean", (0, 0, 0))),
                std=tuple(float(v) for v in found.get("std", (1, 1, 1))),
                size=None if size is None else (int(size[0]), int(size[1])),
                output=None if found.get("output") is None else str(found["output"]),
            )
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise _bad(f"{text[:200]!r} is no image spec: {error}") from error
        except RecursionError as error:
            raise _bad(f"{text[:200]!r} is no image spec: it is nested too deeply") from error


def _bad(why: str) -> InvalidInput:
    return InvalidInput(why, hint="see meshinfer.ImageSpec for what an image spec holds")
