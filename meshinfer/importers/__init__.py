"""From what people have (an ONNX file, bytes, a proto, a torch module) to a graph. May read and
write files."""

from __future__ import annotations

from meshinfer.importers.onnx_model import Source, load, open_model
from meshinfer.importers.picture import check_image
from meshinfer.importers.pruning import inputs_needed
from meshinfer.importers.torch_module import from_torch, is_torch_module

__all__ = [
    "Source",
    "check_image",
    "from_torch",
    "inputs_needed",
    "is_torch_module",
    "load",
    "open_model",
]
