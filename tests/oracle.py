"""The oracle: an answer is right if it is what plain onnxruntime gives for the original model.

The tolerance is onnxruntime's own: what its optimiser changes on that model bounds what we may.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

Model = ModelProto | bytes | str | Path
Arrays = Mapping[str, np.ndarray]

FLOOR = 1e-5
OWN_DIFFERENCES = 4.0


def _source(model: Model) -> bytes | str:
    """What InferenceSession takes; a path stays one, since external data lies beside it."""
    if isinstance(model, ModelProto):
        return bytes(model.SerializeToString())
    return model if isinstance(model, bytes) else str(model)


def _run(
    source: bytes | str,
    inputs: Arrays,
    outputs: Sequence[str] | None,
    threads: int,
    level: ort.GraphOptimizationLevel | None = None,
) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if level is not None:
        options.graph_optimization_level = level
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()] if outputs is None else list(outputs)
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def reference(
    model: Model, inputs: Arrays, outputs: Sequence[str] | None = None, threads: int = 1
) -> dict[str, np.ndarray]:
    """The original model's outputs (all, or those named), at onnxruntime's default optimisation.

    An output that is a sequence is a list, an empty optional is None, as onnxruntime gives them.
    """
    return _run(_source(model), inputs, outputs, threads)


def _is_inexact(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.inexact)


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|, elementwise in double precision; 0 where both are the same NaN or infinity."""
    wide = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
    a, b = np.asarray(a, wide), np.asarray(b, wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(a - b)
    return np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))


def error(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|b|, b being the truth and its maximum taken over its finite elements."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    worst = float(_differences(a, b).max(initial=0.0))
    if worst == 0.0:
        return 0.0
    finite = np.where(np.isfinite(b), b, 0)
    scale = float(np.abs(finite.astype(np.result_type(b, np.float64))).max(initial=0.0))
    return worst / scale if scale else float("inf")


def _tolerance(
    source: bytes | str, inputs: Arrays, outputs: Sequence[str] | None, threads: int
) -> float:
    level = ort.GraphOptimizationLevel
    plain = _run(source, inputs, outputs, threads, level.ORT_DISABLE_ALL)
    full = _run(source, inputs, outputs, threads, level.ORT_ENABLE_ALL)
    own = [
        error(a, b)
        for (_, a), (_, b) in zip(_leaves(plain), _leaves(full), strict=True)
        if a is not None and b is not None and a.shape == b.shape and _is_inexact(b)
    ]
    return max([FLOOR] + [OWN_DIFFERENCES * e for e in own if np.isfinite(e)])


def tolerance(
    model: Model, inputs: Arrays, outputs: Sequence[str] | None = None, threads: int = 1
) -> float:
    """The error that an output of this model may have on these inputs; one for all its outputs.

    Where onnxruntime differs from itself without bound (a NaN or an infinity only one way), that
    output counts for nothing: an infinite tolerance would let everything pass.
    """
    return _tolerance(_source(model), inputs, outputs, threads)


def _leaves(values: Mapping[str, object]) -> Iterator[tuple[str, np.ndarray | None]]:
    """Each array with its name, those inside sequences as `name[i]`; None is an empty optional."""
    for name, value in values.items():
        if isinstance(value, list):
            yield from _leaves({f"{name}[{i}]": item for i, item in enumerate(value)})
        else:
            yield name, None if value is None else np.asarray(value)


def _bits_equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype == object:  # strings
        return bool(np.array_equal(a, b))
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def _at_worst(a: np.ndarray, b: np.ndarray) -> str:
    differences = _differences(a, b) if _is_inexact(b) else a != b
    index = tuple(int(i) for i in np.unravel_index(int(differences.argmax()), b.shape))
    wrong = f"{int(np.count_nonzero(differences))} of {b.size} elements differ"
    return f"worst at {index}: got {a[index]!r}, expected {b[index]!r}; {wrong}"


def assert_exact(
    model: Model,
    inputs: Arrays,
    actual: Arrays,
    outputs: Sequence[str] | None = None,
    threads: int = 1,
    truth: Arrays | None = None,
) -> bool:
    """Fails unless `actual` is the model's answer; returns whether it is so bit for bit.

    `outputs` are those that were asked for (None: all); `actual` must have them and no others.
    Integers, booleans and strings must be equal, floats within the tolerance, which is measured
    only where the floor is exceeded. `truth`: what `reference` gave, where that is known.
    """
    source = _source(model)
    truth = truth if truth is not None else _run(source, inputs, outputs, threads)
    got, expected = dict(_leaves(actual)), dict(_leaves(truth))
    assert set(actual) == set(truth), f"outputs {sorted(actual)}, expected {sorted(truth)}"
    assert set(got) == set(expected), f"outputs {sorted(got)}, expected {sorted(expected)}"

    identical, limit = True, FLOOR
    for name, b in expected.items():
        a = got[name]
        if a is None or b is None:
            assert a is b, f"output {name!r}: got {a!r}, expected {b!r}"
            continue
        assert a.dtype == b.dtype, f"output {name!r}: dtype {a.dtype}, expected {b.dtype}"
        assert a.shape == b.shape, f"output {name!r}: shape {a.shape}, expected {b.shape}"
        if _bits_equal(a, b):
            continue
        identical = False
        if not _is_inexact(b):
            assert np.array_equal(a, b), f"output {name!r} must be equal; {_at_worst(a, b)}"
            continue
        off = error(a, b)
        if off > limit == FLOOR:
            limit = _tolerance(source, inputs, outputs, threads)
        assert off <= limit, (
            f"output {name!r}: error {off:.3g} > tolerance {limit:.3g}; {_at_worst(a, b)}"
        )
    return identical
