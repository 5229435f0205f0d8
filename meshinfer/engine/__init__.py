"""What an engine is: it prepares submodels and runs them. Two exist: onnxruntime and a reference.

The reference engine is slow and independent of onnxruntime; tests use it on small models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class Prepared(Protocol):
    """A submodel ready to run, any number of times."""

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """Outputs in the submodel's order. Raises ``EngineError`` when the kernel fails."""


class Engine(Protocol):
    """Prepares submodels whose weights lie in files named by their SHA-256 in one folder."""

    @property
    def name(self) -> str:
        """Engine, version and instruction set: part of the device's numeric class."""

    def prepare(self, model: bytes) -> Prepared:
        """Load an ONNX model. Raises ``EngineError`` when the engine refuses it."""

    def give_back(self) -> None:
        """Give memory that no run uses now back to the system."""


class EngineError(Exception):
    """The engine refused a model or a kernel failed; the text is the engine's own."""
