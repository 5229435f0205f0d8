"""``mi.batch``: a whole model on each actor of a pool, over a Ray dataset of images or arrays."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster import results
from cluster.blobs import BlobStore
from cluster.importing import Importer
from cluster.models import model_and_shapes, offer_model
from cluster.pictures import read_picture
from cluster.processor import instruction_set
from cluster.ray_backend import session
from cluster.ray_backend.nodes import Asks
from meshinfer import limits
from meshinfer.engine.ort import OrtEngine
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.image import ImageSpec
from meshinfer.importers import Source, check_image, load, open_model
from meshinfer.planner import Block, axes_of, build
from meshinfer.programs import make_programs
from meshinfer.protocol.codec import Array
from meshinfer.scheduler.recipe import Gathering, Recipe

_HERE = DeviceId("here")
Shapes = dict[str, tuple[int, ...]]


def batch(
    model: object,
    dataset: Any,
    *,
    image: ImageSpec | None = None,
    outputs: Sequence[str] | None = None,
    column: str | None = None,
    example: object = None,
    actors: int | tuple[int, int] = 1,
    batch_size: int = 16,
    cpus: float = 1.0,
    gpus: float = 0.0,
    resources: Mapping[str, float] | None = None,
) -> Any:
    """A ``ray.data.Dataset`` with the model's outputs as further columns, one row an input.

    For many independent inputs: every actor holds the whole model, and nothing is tiled. ``model``
    and ``example`` as in ``Client.deploy``. With an image spec (``image``, or the model's own) the
    input is ``column`` (default: the input's name): pictures as ``ray.data.read_images`` gives
    them, or the bytes of their files; else each input is the column of its name. An axis of 1 at
    the front of inputs and outputs may be missing, and is left out of outputs. ``actors``: how
    many, or (least, most); ``cpus``, ``gpus``, ``resources``: what each asks for. Rows are computed
    one by one, so the bits are those of ``infer`` on one device. Lazy, as all of Ray Data: what is
    wrong with a row is raised when it is computed. Raises ``InvalidInput`` for what is wrong with
    the model, ``ConfigurationError`` where Ray Data is not installed.
    """
    ray = session.imported(data=True)
    if not isinstance(dataset, ray.data.Dataset):
        raise InvalidInput(
            f"{type(dataset).__name__} is no Ray dataset",
            hint="make one: ray.data.read_images(folder), or ray.data.from_numpy(array)",
        )
    given, fixed = model_and_shapes(model, example, None)
    wanted = results.wanted_outputs(outputs)
    with tempfile.TemporaryDirectory(prefix="meshinfer-batch-") as folder:
        store = BlobStore(Path(folder))
        offer = offer_model(given, store.put)
        for digest, segment in offer.files.items():
            store.put(digest, segment.read(0, segment.nbytes))
        whole = Whole(offer.digest, store, image, wanted, column, fixed or {}, 1)
        whole.check()
        names = (offer.digest, *offer.weights)
        blobs = {d: ray.put(np.fromfile(store.path(d), np.uint8)) for d in names}
    pool = ("size",) if isinstance(actors, int) else ("min_size", "max_size")
    sizes = (actors,) if isinstance(actors, int) else actors
    asks = Asks(cpus, gpus, dict(resources or {}))
    spec = None if whole.spec is None else whole.spec.to_json()
    return dataset.map_batches(
        WholeActor,
        fn_constructor_args=(offer.digest, blobs, spec, wanted, column, fixed or {}, asks.threads),
        batch_size=batch_size,
        batch_format="numpy",
        zero_copy_batch=True,
        num_cpus=asks.cpus,
        num_gpus=asks.gpus or None,
        resources=dict(asks.resources) or None,
        compute=ray.data.ActorPoolStrategy(**dict(zip(pool, sizes, strict=True))),
    )


class Whole:
    """A model of which every row runs whole; prepared once for each set of shapes."""

    def __init__(
        self,
        digest: str,
        store: BlobStore,
        image: ImageSpec | None,
        outputs: tuple[str, ...] | None,
        column: str | None,
        fixed: Shapes,
        threads: int,
    ) -> None:
        self._store, self._outputs, self._fixed = store, outputs, fixed
        self._engine = OrtEngine(store.folder, threads, instruction_set())
        self._digest = digest
        source = self._source()
        self.spec = image or source.image
        self._inputs = {
            v.name: len(v.type.tensor_type.shape.dim)
            if v.type.tensor_type.HasField("shape")
            else None
            for v in source.inputs
        }
        self._static = source.static_shapes()
        self._column = column or (self.spec.input if self.spec else None)
        self._made: OrderedDict[Any, Any] = OrderedDict()

    def check(self) -> None:
        """Raise ``InvalidInput`` for what can be known without a row."""
        source = self._source()
        source.check()
        if self.spec is not None:
            check_image(source.proto, self.spec)
        if self.spec is None and self._column is not None:
            raise InvalidInput(
                f"column={self._column!r} was given for a model without an image spec",
                hint="give image=ImageSpec(...), or name the columns as the inputs",
            )
        shapes = {**(self._static or {}), **self._fixed}
        if len(shapes) == len(self._inputs):
            self._graph(shapes, None)

    def row(self, row: Mapping[str, Any]) -> dict[str, Array]:
        """The outputs of one row."""
        arrays = {}
        spec = self.spec
        for name, rank in self._inputs.items():
            column = (self._column or name) if spec is not None and name == spec.input else name
            if column not in row:
                raise InvalidInput(
                    f"the dataset has no column {column!r}, from which input {name!r} comes",
                    hint=f"its columns are {sorted(row)}",
                )
            if spec is not None and name == spec.input:
                arrays[name] = read_picture(_sized(row[column], spec), spec).pixels
            else:
                array = np.asarray(row[column])
                arrays[name] = array[None] if rank == array.ndim + 1 else array
        recipes, session = self._prepared({n: a.shape for n, a in arrays.items()})
        gathering = Gathering(recipes[0])
        for slot, where in recipes[0].slots.items():
            gathering.put(slot, np.ascontiguousarray(arrays[where.shard.value]))
        made = session.run(gathering.inputs())
        names = [output.shard.value for output in recipes[0].program.outputs]
        found = dict(zip(names, made, strict=True))
        return {n: a[0] if a.ndim and a.shape[0] == 1 else a for n, a in found.items()}

    def _prepared(self, shapes: Shapes) -> Any:
        key = tuple(sorted(shapes.items()))
        found = self._made.pop(key, None)
        if found is None:
            graph = self._graph(shapes, self.spec)
            whole = Block(0, len(graph.ops), _HERE)
            plan = build(graph, axes_of(graph), [whole], {_HERE: 1.0}, (_HERE, _HERE))
            programs = make_programs(graph, plan)
            for digest, data in programs.blobs.items():
                self._store.put(digest, data())
            recipes = [Recipe.of(p) for p in programs.by_device[_HERE] if p.model is not None]
            model = self._store.path(recipes[0].program.model or "").read_bytes()
            found = recipes, self._engine.prepare(model)
        self._made[key] = found
        while len(self._made) > limits.SHAPES_PER_MODEL:
            self._made.popitem(last=False)
        return found

    def _graph(self, shapes: Shapes, spec: ImageSpec | None) -> Graph:
        importer = Importer()
        try:
            return load(
                self._source(),
                shapes=shapes,
                image=spec,
                outputs=self._outputs,
                through=importer,
                scratch=self._store.folder,
            )
        finally:
            importer.close()

    def _source(self) -> Source:
        """The model, with its weights in the store: they are named by their digests."""
        source = open_model(self._store.path(self._digest).read_bytes())
        return Source(source.proto, self._store.folder)


class WholeActor:
    """``Whole`` as Ray Data makes its actors: from arrays and text."""

    def __init__(
        self,
        digest: str,
        blobs: Mapping[str, Any],
        image: str | None,
        outputs: tuple[str, ...] | None,
        column: str | None,
        fixed: Shapes,
        threads: int,
    ) -> None:
        import ray

        self._folder = tempfile.TemporaryDirectory(prefix="meshinfer-batch-")
        store = BlobStore(Path(self._folder.name))
        for name, reference in blobs.items():
            store.put(name, memoryview(ray.get(reference)))
        spec = None if image is None else ImageSpec.from_json(image)
        self._whole = Whole(digest, store, spec, outputs, column, fixed, threads)

    def __call__(self, rows: Mapping[str, Array]) -> dict[str, Any]:
        count = len(next(iter(rows.values())))
        found = [
            self._whole.row({name: values[i] for name, values in rows.items()})
            for i in range(count)
        ]
        names = list(found[0]) if found else []
        taken = sorted(set(names) & set(rows))
        if taken:
            raise InvalidInput(
                f"the dataset has a column {taken[0]!r} already, which is an output of the model",
                hint=f"rename it: dataset.rename_columns({{{taken[0]!r}: ...}})",
            )
        return {**rows, **{name: _column([row[name] for row in found]) for name in names}}


def _sized(data: Any, spec: ImageSpec) -> Any:
    """A picture of another size than the spec's as one that can be resized, as a file's would."""
    if not isinstance(data, np.ndarray) or spec.size is None or data.shape[:2] == spec.size:
        return data
    if data.dtype != np.uint8 or data.ndim not in (2, 3):
        return data
    return Image.fromarray(data[..., 0] if data.shape[2:] == (1,) else data)


def _column(values: list[Array]) -> Array:
    """One array for all rows; of objects where their shapes differ."""
    if len({value.shape for value in values}) == 1:
        return np.stack(values)
    column = np.empty(len(values), object)
    column[:] = values
    return column
