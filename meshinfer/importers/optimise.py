"""What onnxruntime and onnx do to a model on import: fold, fuse and type it, from file to file.

Their C++ can crash, hang or take all memory on a bad model: 1 of 2500 mutated ONNX test cases ends
the process (onnxruntime 1.32, onnx 1.23). So a server runs this step in a process of its own.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from meshinfer import limits
from meshinfer.errors import InvalidInput, MeshInferError
from meshinfer.importers.blocked import Blocked, find_blocked
from meshinfer.importers.checks import tensor_nbytes, tensors_of, title
from meshinfer.importers.external import MOVED_FROM_BYTES
from meshinfer.importers.rewrite import take_apart
from meshinfer.importers.types import infer_types
from meshinfer.onnxrt import ort

GIVEN, MADE = "given.onnx", "model.onnx"

Optimise = Callable[[Path, Path], Blocked]
"""Makes ``MADE`` (and its weights, beside it) from ``GIVEN`` in the first folder; the weights of
``GIVEN`` lie in the second. Returns ``find_blocked``. Raises ``InvalidInput``."""


def optimise(folder: Path, weights: Path) -> Blocked:
    """``Optimise`` in this process."""
    made = folder / MADE
    try:
        take_apart(folder / GIVEN)
    except Exception:
        _optimise(folder / GIVEN, weights, made)  # a malformed model: this says what is wrong
        raise
    _optimise(folder / GIVEN, weights, made)
    try:
        infer_types(made)
        return find_blocked(ir.load(made), made)
    except MeshInferError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"the types of the model's values cannot be worked out: {error}",
            hint="look at it with onnx.shape_inference, or export it again",
        ) from error


def weights_nbytes(folder: Path) -> int:
    """Bytes of all weights of ``GIVEN``."""
    model = onnx.load(folder / GIVEN, load_external_data=False)
    return sum(tensor_nbytes(tensor) for tensor in tensors_of(model))


def _optimise(given: Path, weights: Path, made: Path) -> None:
    data = given.read_bytes()
    options = _options(ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, weights)
    options.optimized_model_filepath = str(made)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", "weights"),
        (
            "session.optimized_model_external_initializers_min_size_in_bytes",
            str(MOVED_FROM_BYTES),
        ),
        ("optimization.constant_folding_max_output_size_in_bytes", str(limits.FOLDED_BYTES)),
    ):
        options.add_session_config_entry(key, value)
    why = _refusal(data, options)
    if why:
        raise InvalidInput(
            f"onnxruntime {ort.__version__} refuses {_refused_node(data, weights, why)}: {why}",
            hint="a model must load in plain onnxruntime; check its operators, opset and files",
        )


def _options(level: ort.GraphOptimizationLevel, weights: Path) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # it never runs
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(weights)
    )
    return options


def _refusal(data: bytes, options: ort.SessionOptions) -> str:
    """What onnxruntime says against the model; empty when it loads."""
    try:
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:
        return str(error)
    return ""


def _refused_node(data: bytes, weights: Path, why: str) -> str:
    """Which node it is, where onnxruntime does not say: the one with which the graph's beginning
    is refused and without which it is not."""
    model = onnx.load_model_from_string(data)
    nodes = list(model.graph.node)
    said = any(each.name and re.search(rf"\W{re.escape(each.name)}\W", why) for each in nodes)
    if said or not _in_order(nodes):
        return "the model"
    options = _options(ort.GraphOptimizationLevel.ORT_DISABLE_ALL, weights)

    def refused(count: int) -> bool:
        del model.graph.node[:], model.graph.output[:]
        model.graph.node.extend(nodes[:count])
        made = [name for node in nodes[:count] for name in node.output if name]
        made = made or [value.name for value in model.graph.input[:1]]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
        return _refusal(model.SerializeToString(), options) != ""

    if not refused(len(nodes)) or refused(0):
        return "the model"  # it is the optimiser, or no node at all
    return title(nodes[bisect.bisect_left(range(1, len(nodes)), True, key=refused)])


def _in_order(nodes: Sequence[onnx.NodeProto]) -> bool:
    later = {name for node in nodes for name in node.output if name}
    for node in nodes:
        if not later.isdisjoint(node.input):
            return False
        later.difference_update(node.output)
    return True
