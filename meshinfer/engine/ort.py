"""The onnxruntime engine: weights and room to compute in, held once a process for all sessions.

A model is optimised once at full level with its weights written beside it, then loaded again as it
is with those weights shared between sessions by content. Measured on VGG-16 against sessions that
each keep their own: 0-1 MB instead of 122 MB for each further one, same bits, same speed. Weights
are pages of a file, which the kernel can drop and read again: VGG-16 whole holds 591 MB of memory
that it cannot, and 1131 MB if read; most of it is what Gemm's and MatMul's kernels pack.

Sessions compute in one arena. Each with its own, as is onnxruntime's default, kept what it took: 12
parts of the upscaler at 451 x 300 held 430 MB after each had run twice, in one arena 25 MB, with
the same bits and speed. With arenas of their own and no memory patterns it was 255 MB, for a
pattern is a second layout beside that of the first run; with no arena 125 MB, but a part alone then
takes up to a third more processor time, for the kernel gives each run new pages.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import xxhash

from meshinfer.engine import Array, EngineError
from meshinfer.engine.tiles import Tile, optimised_as, tile_of
from meshinfer.engine.wire import external_tensors
from meshinfer.onnxrt import ort

_SHARED_FROM_BYTES = 1024
_FATAL_ONLY = 4
_REGION_BYTES = 64 << 20
_ARENA = {
    "arena_extend_strategy": 0,  # by powers of two, of which only pages that were used count
    # The first region is never given back: it is to be none. The others are as large as this, so
    # that what one session leaves is one piece for the next; 1/32 of it goes to bookkeeping.
    "initial_chunk_size_bytes": 256,
    "initial_growth_chunk_size_bytes": _REGION_BYTES,
    "max_dead_bytes_per_chunk": 4096,
}
_IDENTITY = (
    b'\x08\x08:6\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x00Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n'
    b"\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""A model of one Identity of one number: an arena is shrunk only at the end of a run."""
# onnx.TensorProto.DataType -> numpy, for the types that onnxruntime keeps as weights.
_NUMPY = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64,
    9: np.bool_, 10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip


class OrtEngine:
    """onnxruntime on the CPU. ``blobs`` is the folder where weights lie under their SHA-256.

    ``instructions``: the processor's, for the name; the architecture alone where left out.
    """

    def __init__(self, blobs: Path, threads: int = 1, instructions: str = "") -> None:
        self.blobs = blobs
        self.threads = threads
        self.name = f"onnxruntime-{ort.__version__}/{instructions or platform.machine()}/{threads}t"
        self._shared: WeakValueDictionary[str, ort.OrtValue] = WeakValueDictionary()
        self._layers: WeakValueDictionary[str, _Layers] = WeakValueDictionary()
        self._by_sizes = "sme" in instructions
        """Whether onnxruntime treats convolutions by their sizes: KleidiAI's, with Arm's SME."""

    def prepare(self, model: bytes) -> OrtPrepared:
        """Optimise and load a submodel; its weight files are no longer needed afterwards. Another
        tile of layers that are prepared is loaded with what was made of these."""
        tile = None if self._by_sizes else tile_of(model)
        known = None if tile is None else self._layers.get(tile.layers)
        try:
            # Inside ``blobs``: onnxruntime admits no external data outside the model's folder.
            with tempfile.TemporaryDirectory(dir=self.blobs, prefix="prepare-") as name:
                folder = Path(name)
                if tile is not None and known is not None:
                    made = optimised_as(known.optimised, known.tile, tile)
                    loaded = None if made is None else self._loaded(made, known, folder)
                    if loaded is not None:
                        return loaded
                self._optimise(model, folder)
                return self._load(folder, tile)
        except Exception as error:
            if _is_refusal(error):
                raise EngineError(str(error)) from error
            raise

    def give_back(self) -> None:
        """To the system: what was computed in and is not in use; the next run takes it anew."""
        _shrink(_SHRINKING)

    def _options(self, level: ort.GraphOptimizationLevel) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    def _optimise(self, model: bytes, folder: Path) -> None:
        source = self.blobs / f"{folder.name}.onnx"
        source.write_bytes(model)
        try:
            options = self._options(ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
            options.optimized_model_filepath = str(folder / "model.onnx")
            for key, value in (
                ("disable_prepacking", "1"),  # it never runs
                ("optimized_model_external_initializers_file_name", "weights"),
                (
                    "optimized_model_external_initializers_min_size_in_bytes",
                    str(_SHARED_FROM_BYTES),
                ),
            ):
                options.add_session_config_entry(f"session.{key}", value)
            try:
                ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
            except Exception:
                # A Slice behind an int8 DequantizeLinear: it moves the pair apart and then refuses.
                ort.InferenceSession(
                    str(source),
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=["QDQPropagationTransformer"],
                )
        finally:
            source.unlink()

    def _load(self, folder: Path, tile: Tile | None) -> OrtPrepared:
        model = (folder / "model.onnx").read_bytes()
        weights = dict[str, ort.OrtValue]()
        files: dict[str, np.memmap[Any, np.dtype[np.uint8]]] = {}
        whole = True
        for tensor in external_tensors(memoryview(model)):
            if tensor.data_type not in _NUMPY:
                whole = False
                continue  # a type that numpy lacks: this session reads it from its own file
            if tensor.location not in files:
                files[tensor.location] = np.memmap(folder / tensor.location, np.uint8, "c")
            data = files[tensor.location][tensor.offset : tensor.offset + tensor.length]
            weights[tensor.name] = self._share(data, _NUMPY[tensor.data_type], tensor.shape)
        layers = None if tile is None or not whole else _Layers(tile, model, weights)
        if layers is not None:
            self._layers[layers.tile.layers] = layers
        return OrtPrepared(self._session(folder, weights), weights.values(), layers)

    def _loaded(self, model: bytes, layers: _Layers, folder: Path) -> OrtPrepared | None:
        """None for what onnxruntime refuses: it is optimised as any other, then."""
        (folder / "model.onnx").write_bytes(model)
        ends = dict[str, int]()
        for tensor in external_tensors(memoryview(model)):
            end = tensor.offset + tensor.length
            ends[tensor.location] = max(end, ends.get(tensor.location, 0))
        for name, nbytes in ends.items():  # looked for, and never read
            with (folder / name).open("wb") as file:
                file.truncate(nbytes)
        try:
            session = self._session(folder, layers.weights)
        except Exception as error:
            if _is_refusal(error):
                return None
            raise
        return OrtPrepared(session, layers.weights.values(), layers)

    def _session(self, folder: Path, weights: Mapping[str, ort.OrtValue]) -> ort.InferenceSession:
        options = self._options(ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
        for name, value in weights.items():
            options.add_initializer(name, value)
        _in_the_arena(options)
        path = str(folder / "model.onnx")
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _share(
        self, data: np.ndarray[Any, Any], dtype: type[np.generic], shape: tuple[int, ...]
    ) -> ort.OrtValue:
        """The one OrtValue of this content; it shares memory with its numpy array."""
        key = f"{dtype.__name__}{shape}{xxhash.xxh3_128_hexdigest(data.data)}"
        value = self._shared.get(key)
        if value is None:
            value = ort.OrtValue.ortvalue_from_numpy(data.view(dtype).reshape(shape))
            self._shared[key] = value
        return value


def _is_refusal(error: Exception) -> bool:
    return type(error).__module__.startswith("onnxruntime")


def _in_the_arena(options: ort.SessionOptions) -> None:
    """Values go there. Weights that kernels pack do not: they stay, and would hold pieces apart."""
    options.enable_mem_pattern = False
    for key in ("use_env_allocators", "use_device_allocator_for_initializers"):
        options.add_session_config_entry(f"session.{key}", "1")


def _shrink(session: ort.InferenceSession) -> None:
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    session.run(["y"], {"x": np.zeros(1, np.float32)}, options)


def _arena() -> ort.InferenceSession:
    """Make the arena of this process: the session that shrinks it."""
    where = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    with suppress(Exception):  # documented, where the user's program has one: that is used
        ort.create_and_register_allocator(where, ort.OrtArenaCfg(_ARENA))
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    _in_the_arena(options)
    session = ort.InferenceSession(_IDENTITY, options, providers=["CPUExecutionProvider"])
    _shrink(session)  # the size that regions grow by holds from here on
    return session


_SHRINKING = _arena()
"""Made as this is imported: once, whichever threads make engines."""


class _Layers:
    """What the optimiser made of one tile, for others of the same layers: alive while one is."""

    def __init__(self, tile: Tile, optimised: bytes, weights: Mapping[str, ort.OrtValue]) -> None:
        self.tile, self.optimised, self.weights = tile, optimised, weights


class OrtPrepared:
    """One session, with the weights that it borrows, and the layers that it is a tile of."""

    def __init__(
        self,
        session: ort.InferenceSession,
        weights: Iterable[ort.OrtValue],
        layers: _Layers | None,
    ) -> None:
        self._session = session
        self._weights, self._layers = tuple(weights), layers  # alive as long as the session
        self.inputs = tuple(i.name for i in session.get_inputs())
        self.outputs = tuple(o.name for o in session.get_outputs())

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """Outputs in the submodel's order; onnxruntime releases the GIL while it computes."""
        try:
            result: Sequence[Array] = self._session.run(
                self.outputs, {name: inputs[name] for name in self.inputs}
            )
            return result
        except Exception as error:
            raise EngineError(str(error)) from error
