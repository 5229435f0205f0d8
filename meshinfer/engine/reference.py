"""The slow second engine: onnx's own reference evaluator, independent of onnxruntime. For tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from meshinfer.engine import Array, EngineError


class ReferenceEngine:
    """Pure numpy kernels of the onnx package; needs onnx, so workers never use it."""

    def __init__(self, blobs: Path) -> None:
        self.blobs = blobs
        self.name = f"onnx-reference-{onnx.__version__}"

    def prepare(self, model: bytes) -> ReferencePrepared:
        proto = onnx.load_from_string(model)
        onnx.load_external_data_for_model(proto, str(self.blobs))
        return ReferencePrepared(proto)

    def give_back(self) -> None:
        """Nothing: it keeps nothing."""


class ReferencePrepared:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self._evaluator = ReferenceEvaluator(proto)
        self._names = [o.name for o in proto.graph.output]
        self._weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        try:
            outputs = self._evaluator.run(self._names, dict(inputs))
        except Exception as error:
            raise EngineError(str(error)) from error
        return [np.asarray(output) for output in outputs]
