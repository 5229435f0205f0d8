"""ONNX in, graph out: shapes made static, folded and fused by onnxruntime's basic optimiser.

Whatever onnxruntime loads is accepted, and nothing else is asked of a model; what it refuses comes
back as ``InvalidInput`` with its own words.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from meshinfer import limits
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.image import METADATA_KEY, ImageSpec
from meshinfer.importers.blocked import arrange_blocked
from meshinfer.importers.checks import check_model, check_nodes
from meshinfer.importers.external import check_external, locations, move_weights
from meshinfer.importers.optimise import GIVEN, MADE, Optimise, optimise
from meshinfer.importers.picture import with_image_input
from meshinfer.importers.pruning import keep_outputs
from meshinfer.importers.quantised import arrange
from meshinfer.importers.torch_module import is_torch_module, of_example

Shapes = Mapping[str, Sequence[int]]

GIVEN_OPS = ("given ops",)
"""Where ``Graph.memo`` has the model's nodes as they were given, counted by type."""


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
    def weight_files(self) -> tuple[str, ...]:
        """Names of the files beside it that have its external weights."""
        return tuple(sorted(locations(self.proto)))

    def check(self) -> None:
        """Raise ``InvalidInput`` for what no shapes and no optimiser can mend."""
        check_model(self.proto)
        check_external(self.proto, self.folder)
        _check_tensors(self.proto)

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
        name = str(path)
        try:
            folder = path.resolve().parent
            status = path.stat()
            data = b"" if _is_no_file(status) else path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise InvalidInput(
                f"cannot read {name}: {getattr(error, 'strerror', error)}",
                hint="give the path of an ONNX file",
            ) from error
        if _is_no_file(status):
            raise InvalidInput(
                f"{name} is no ONNX file: {status.st_size} bytes, or a device",
                hint="an ONNX file has less than 2 GB; larger weights lie beside it",
            )
    else:
        raise InvalidInput(
            f"{type(model).__name__} is no model",
            hint="give a path, bytes or an onnx.ModelProto, or a torch module with its example",
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


def _is_no_file(status: os.stat_result) -> bool:
    """A pipe may never end, and a protobuf above 2 GB cannot be. (Folders say so themselves.)"""
    kind = status.st_mode
    return status.st_size > limits.MODEL_FILE_BYTES or not (S_ISREG(kind) or S_ISDIR(kind))


def load(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto | Source,
    example: object = None,
    shapes: Shapes | None = None,
    *,
    image: ImageSpec | None = None,
    outputs: Sequence[str] | None = None,
    through: Optimise = optimise,
    scratch: Path | None = None,
) -> Graph:
    """The graph of an ONNX model for one set of input shapes.

    ``shapes``: input name -> shape, needed for every input that has dynamic axes; ``example`` may
    give arrays instead. ``image``: put this spec's arithmetic in front, so that the input becomes
    uint8 pixels [1, H, W, C], and ``shapes`` speak of those. ``outputs``: only these, without what
    lies behind them and without the inputs that they do not need. A torch module is exported with
    its ``example``, see ``from_torch``. ``through`` runs what may crash, in this process or
    another; ``scratch`` is for its files. Raises ``InvalidInput``.
    """
    if is_torch_module(model):
        proto, sizes = of_example(model, example, shapes)
        if image is not None and len(sizes.get(image.input, ())) == 4:
            rows, columns = sizes[image.input][2 if image.layout == "NCHW" else 1 :][:2]
            sizes[image.input] = (1, rows, columns, image.channels)
        source, shapes = Source(proto, None), sizes
    else:
        source = _own(open_model(model), model)
    source.check()
    if isinstance(example, Mapping) and not is_torch_module(model):
        shapes = {**{n: np.shape(a) for n, a in example.items()}, **(shapes or {})}
    dropped = set() if outputs is None else keep_outputs(source.proto, outputs)
    if image is not None and image.input not in dropped:
        with_image_input(source.proto, image)
    _fix_shapes(source, {n: s for n, s in (shapes or {}).items() if n not in dropped})
    given = Counter(node.op_type for node in source.proto.graph.node)
    with tempfile.TemporaryDirectory(prefix="meshinfer-import-", dir=scratch) as name:
        folder = Path(name)
        moved = move_weights(source.proto, folder / "given")
        weights = folder if moved else source.folder or folder
        _write(source.proto, folder / GIVEN)
        del source  # onnxruntime makes copies enough
        try:
            blocked = through(folder, weights)
        except InvalidInput as error:
            raise _at_shapes(error, shapes) from error
        imported = _read(folder / MADE)
    _tidy(imported)
    arrange_blocked(imported, blocked)
    arrange(imported)
    graph = Graph(imported, blocked.sums)
    graph.memo[GIVEN_OPS] = given
    check_nodes(graph)
    return graph


def _at_shapes(error: InvalidInput, shapes: Shapes | None) -> InvalidInput:
    """The same refusal; where sizes were asked for, they may be the reason."""
    if not shapes:
        return error
    asked = ", ".join(f"{name}={list(shape)}" for name, shape in shapes.items())
    return InvalidInput(
        f"{error.message} (with {asked})",
        hint=f"{error.hint}; not every model with open sizes works at every size",
    )


def _write(proto: onnx.ModelProto, path: Path) -> None:
    try:
        path.write_bytes(proto.SerializeToString())
    except (ValueError, EncodeError) as error:
        raise InvalidInput(
            f"the model does not fit into one file of 2 GB: {error}",
            hint="save it with its weights as external data, and give its path",
        ) from error


def _read(path: Path) -> ir.Model:
    """The optimised model. Its weights are mapped at once: the file is unlinked afterwards."""
    try:
        imported = ir.load(path)
        for value in imported.graph.initializers.values():
            if value.const_value is not None:
                value.const_value.numpy()
    except Exception as error:
        raise InvalidInput(
            f"what onnxruntime made of the model cannot be read: {error}",
            hint="check the shapes of its weights and the sizes in its attributes",
        ) from error
    return imported


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
    shared: dict[str, tuple[str, int]] = {}
    for value in source.inputs:
        _fix_shape(value, shapes.get(value.name), shared)
        _check_size(value)
    del source.proto.graph.value_info[:]
    weights = {t.name for t in source.proto.graph.initializer}
    kept = [v for v in source.proto.graph.input if v.name not in weights]
    del source.proto.graph.input[:]
    source.proto.graph.input.extend(kept)
    for output in source.proto.graph.output:  # declared before the sizes were known
        if any(d.HasField("dim_param") for d in output.type.tensor_type.shape.dim):
            output.type.tensor_type.ClearField("shape")


def _fix_shape(
    value: onnx.ValueInfoProto, shape: Sequence[int] | None, shared: dict[str, tuple[str, int]]
) -> None:
    """Give an input its sizes, in place. ``shared``: which input gave a named size first."""
    tensor = value.type.tensor_type
    declared = [
        d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in tensor.shape.dim
    ]
    if shape is None:
        if value.type.HasField("tensor_type") and (
            not tensor.HasField("shape") or any(isinstance(d, str) for d in declared)
        ):
            raise InvalidInput(
                f"input {value.name!r} has the dynamic shape {declared}",
                hint=f"fix it: shapes={{{value.name!r}: (...)}}, or --shape {value.name}=...",
            )
        return
    given = tuple(int(d) for d in shape)
    fits = not tensor.HasField("shape") or (
        len(given) == len(declared)
        and all(isinstance(d, str) or d == g for d, g in zip(declared, given, strict=True))
    )
    if not fits or any(d < 0 for d in given):
        raise InvalidInput(
            f"input {value.name!r} has shape {list(given)}, the model wants {declared}",
            hint="give an array of the model's shape; names stand for sizes that may vary",
        )
    for name, size in zip(declared, given, strict=False):
        if isinstance(name, str) and name != "?":
            other, known = shared.setdefault(name, (value.name, size))
            if known != size:
                raise InvalidInput(
                    f"the size {name!r} is {known} in input {other!r} and {size} in {value.name!r}",
                    hint="sizes of one name are equal; give both inputs the same",
                )
    tensor.shape.Clear()
    for size in given:
        tensor.shape.dim.add(dim_value=size)


def _check_size(value: onnx.ValueInfoProto) -> None:
    dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
    if min(dims, default=0) < 0 or prod(dims) > limits.TENSOR_BYTES:
        raise InvalidInput(
            f"input {value.name!r} has the shape {dims}",
            hint=f"a tensor has at most {limits.TENSOR_BYTES} bytes, and no negative size",
        )


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
