"""From what people have (an ONNX file, bytes, a proto) to a graph. May read and write files."""

from __future__ import annotations

from meshinfer.importers.onnx_model import Source, load, open_model

__all__ = ["Source", "load", "open_model"]
