"""ONNX in, graph out: shapes made static, folded and fused by onnxruntime's basic optimiser.

Whatever onnxruntime loads is accepted, and nothing else is asked of a model; what it refuses comes
back as ``InvalidInput`` with its own words.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
from google.protobuf.message import DecodeError

from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.image import METADATA_KEY, ImageSpec
from meshinfer.importers.external import MOVED_FROM_BYTES, check_external, move_weights
from meshinfer.importers.picture import with_image_input
from meshinfer.importers.sums import bring_together, fused_sums
from meshinfer.importers.types import infer_types

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """A model as it was given. ``folder`` is where its external weights lie, if it has any."""

    proto: onnx.ModelProto
    folder: Path | None

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """What a request must give: graph inputs that are not initializers as well (IR < 4)."""
        weights = {t.name for t in self.proto.graph.initializer}
        return [v for v in self.proto.graph.input if v.name not in weights]

    @property
    def image(self) -> ImageSpec | None:
        """The spec that the model carries in its metadata."""
        for entry in self.proto.metadata_props:
            if entry.key == METADATA_KEY:
                return ImageSpec.from_json(entry.value)
        return None

    def static_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the inputs when all are fixed in the model; else None."""
        found: dict[str, tuple[int, ...]] = {}
        for value in self.inputs:
            dims = value.type.tensor_type.shape.dim
            if not value.type.tensor_type.HasField("shape") or any(
                not d.HasField("dim_value") for d in dims
            ):
                return None
            found[value.name] = tuple(d.dim_value for d in dims)
        return found


def open_model(model: str | os.PathLike[str] | bytes | onnx.ModelProto | Source) -> Source:
    """Parse a model without its external weights. Raises ``InvalidInput`` for what is no ONNX
    model."""
    if isinstance(model, Source):
        return model
    if isinstance(model, onnx.ModelProto):
        return Source(model, None)
    folder = None
    if isinstance(model, bytes):
        data, name = model, "the model"
    elif isinstance(model, str | os.PathLike):
        path = Path(model)
        name, folder = str(path), path.resolve().parent
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidInput(
                f"cannot read {name}: {error.strerror}", hint="give the path of an ONNX file"
            ) from error
    else:
        raise InvalidInput(
            f"{type(model).__name__} is no model",
            hint="give a path, bytes or an onnx.ModelProto; torch modules are to come",
        )
    try:
        proto = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise InvalidInput(
            f"{name} is no ONNX model, or is truncated ({len(data)} bytes)",
            hint="export or copy it again, and check it with onnx.checker",
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise InvalidInput(f"{name} holds no graph", hint="export the model again")
    return Source(proto, folder)


def load(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto | Source,
    example: object = None,
    shapes: Shapes | None = None,
    *,
    image: ImageSpec | None = None,
) -> Graph:
    """The graph of an ONNX model for one set of input shapes.

    ``shapes``: input name -> shape, needed for every input that has dynamic axes; ``example`` may
    give arrays instead. ``image``: put this spec's arithmetic in front, so that the input becomes
    uint8 pixels [1, H, W, C], and ``shapes`` speak of those. Raises ``InvalidInput``.
    """
    source = _own(open_model(model), model)
    check_external(source.proto, source.folder)
    _check_tensors(source.proto)
    if isinstance(example, Mapping):
        shapes = {**{n: a.shape for n, a in example.items()}, **(shapes or {})}
    if image is not None:
        with_image_input(source.proto, image)
    _fix_shapes(source, shapes or {})
    with tempfile.TemporaryDirectory(prefix="meshinfer-import-") as name:
        optimised = Path(name) / "model.onnx"
        moved = move_weights(source.proto, Path(name) / "given")
        folder, data = Path(name) if moved else source.folder, source.proto.SerializeToString()
        del source  # onnxruntime makes copies enough
        _optimise(data, folder, optimised)
        infer_types(optimised)
        imported = ir.load(optimised)
        sums = fused_sums(imported, optimised)
        for value in imported.graph.initializers.values():
            if value.const_value is not None:
                value.const_value.numpy()  # maps the file now: it is unlinked below
    _tidy(imported)
    bring_together(imported, sums)
    return Graph(imported, sums)


def _own(source: Source, model: object) -> Source:
    """A source that may be changed: a copy of what is the caller's, else itself."""
    if source is not model and source.proto is not model:
        return source
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    return Source(proto, source.folder)


def _check_tensors(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        kind = value.type.WhichOneof("value")
        if kind not in (None, "tensor_type"):
            raise InvalidInput(
                f"{value.name!r} is of {kind}: only tensors come in and go out",
                hint="end the model at a tensor; sequences and optionals may be inside",
            )


def _fix_shapes(source: Source, shapes: Shapes) -> None:
    names = [v.name for v in source.inputs]
    unknown = sorted(set(shapes) - set(names))
    if unknown:
        raise InvalidInput(f"the model has no input {unknown[0]!r}", hint=f"its inputs are {names}")
    for value in source.inputs:
        tensor = value.type.tensor_type
        declared = [
            d.dim_value if d.HasField("dim_value") else (d.dim_param or "?")
            for d in tensor.shape.dim
        ]
        if value.name not in shapes:
            if value.type.HasField("tensor_type") and (
                not tensor.HasField("shape") or any(isinstance(d, str) for d in declared)
            ):
                raise InvalidInput(
                    f"input {value.name!r} has the dynamic shape {declared}",
                    hint=f"fix it: shapes={{{value.name!r}: (...)}}, or --shape {value.name}=...",
                )
            continue
        given = tuple(int(d) for d in shapes[value.name])
        fits = not tensor.HasField("shape") or (
            len(given) == len(declared)
            and all(isinstance(d, str) or d == g for d, g in zip(declared, given, strict=True))
        )
        if not fits or any(d < 0 for d in given):
            raise InvalidInput(
                f"input {value.name!r} has shape {list(given)}, the model wants {declared}",
                hint="give an array of the model's shape; names stand for sizes that may vary",
            )
        del tensor.shape.dim[:]
        for size in given:
            tensor.shape.dim.add(dim_value=size)
    del source.proto.graph.value_info[:]
    weights = {t.name for t in source.proto.graph.initializer}
    kept = [v for v in source.proto.graph.input if v.name not in weights]
    del source.proto.graph.input[:]
    source.proto.graph.input.extend(kept)
    for output in source.proto.graph.output:  # declared before the sizes were known
        if any(d.HasField("dim_param") for d in output.type.tensor_type.shape.dim):
            output.type.tensor_type.ClearField("shape")


def _optimise(data: bytes, folder: Path | None, target: Path) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # it never runs
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "weights"
    )
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(MOVED_FROM_BYTES)
    )
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
    try:
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InvalidInput(
            f"onnxruntime {ort.__version__} refuses the model: {error}",
            hint="a model must load in plain onnxruntime; check its operators, opset and files",
        ) from error


def _tidy(model: ir.Model) -> None:
    """Name every node; copy weights that are outputs, so that a task makes them; drop idle
    imports."""
    graph = model.graph
    for i, node in enumerate(graph):
        node.name = node.name or f"{node.op_type}_{i}"
    for i, value in enumerate(graph.outputs):
        if not value.is_initializer():
            continue  # an input that is an output as it is goes from the source to the sink
        name = value.name
        value.name = f"{name}/source"
        copy = ir.Node("", "Identity", [value], num_outputs=1, name=f"{name}/copy")
        copy.outputs[0].name = name
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        graph.append(copy)
        graph.outputs[i] = copy.outputs[0]
    used = {"", *(node.domain for node in graph.all_nodes())}
    for domain in [d for d in model.opset_imports if d not in used]:
        del model.opset_imports[domain]
