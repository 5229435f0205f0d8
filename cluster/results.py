"""What goes into a request and what comes out: arrays, pictures, timing, a model as deployed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import numpy as np

from cluster.pictures import Picture, read_picture
from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, InvalidInput, ModelNotFound
from meshinfer.image import ImageSpec
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Array, describe, error_of
from meshinfer.protocol.codec import digest_of as digest_of


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. ``total_s`` on the coordinator, of it ``queue_s`` before the first task started.

    ``tasks``: for each task its device, place (stage, task), bytes sent, seconds of computing, of
    waiting for its last piece, for its turn, and of handing it over.
    """

    total_s: float
    queue_s: float
    tasks: tuple[m.TaskTime, ...]

    @property
    def compute_s(self) -> dict[str, float]:
        """Seconds of computing by device."""
        total: dict[str, float] = {}
        for task in self.tasks:
            total[task.device] = total.get(task.device, 0.0) + task.compute_s
        return total

    @property
    def sent_bytes(self) -> dict[str, int]:
        """Bytes that left each device for others."""
        total: dict[str, int] = {}
        for task in self.tasks:
            total[task.device] = total.get(task.device, 0) + task.sent_bytes
        return total


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one request. ``attempts`` above 1: devices were lost on the way. ``rounded``:
    float32 values went from task to task as float16 (``half_transfers``).

    ``degraded``, for ``reasons``: something failed on the way, or devices are kept out.
    ``devices_lost`` while it ran there; ``added_s``: seconds from its start until what was lost was
    begun again, elsewhere.
    """

    request_id: str
    outputs: Mapping[str, Array]
    model: str
    model_version: int
    plan: str
    timing: Timing
    degraded: bool
    attempts: int
    image: ImageSpec | None = field(default=None, repr=False)
    rounded: bool = False
    reasons: tuple[str, ...] = ()
    devices_lost: tuple[str, ...] = ()
    added_s: float = 0.0

    def picture(self) -> Picture:
        """The output that is a picture (``ImageSpec.output``). Raises ``InvalidInput``."""
        if self.image is None or self.image.output is None:
            raise InvalidInput(
                f"{self.model} has no output that is a picture",
                hint="say which with ImageSpec(output=...)",
            )
        if self.image.output not in self.outputs:
            raise InvalidInput(
                f"{self.image.output!r}, the picture, was not asked for",
                hint=f"leave outputs= out, or name it there: outputs=[{self.image.output!r}]",
            )
        return Picture.from_tensor(self.outputs[self.image.output], self.image)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model version as it was deployed.

    ``plan`` and ``report`` are None until the first shape is known. The report says what was
    folded, which nodes run whole on one device and why, the share of the FLOPs that is distributed,
    and the bytes that each device holds; print it.
    """

    name: str
    version: int
    plan: str | None
    report: m.Report | None
    image: ImageSpec | None


def image_of(info: m.ModelInfo | m.Deployed | m.Reply) -> ImageSpec | None:
    """The image spec that a model was deployed with."""
    return None if info.image is None else ImageSpec.from_json(info.image)


def input_arrays(
    data: object, info: m.ModelInfo | None, *, copy: bool = True
) -> tuple[dict[str, Array], bool]:
    """The input arrays of a request, copied, and whether they are a picture's pixels.

    ``info``: the model, unless ``data`` names its inputs. A picture needs the model's image spec;
    one array that is no picture goes to a model's only input. Raises ``InvalidInput``.
    """
    if isinstance(data, Mapping):
        return {str(name): _array(array, copy) for name, array in data.items()}, False
    spec = None if info is None else image_of(info)
    if hasattr(data, "__array__") and not hasattr(data, "getbands"):  # no Pillow image
        data = array = _array(data, copy)
        if info is not None and len(info.inputs) == 1 and (spec is None or array.dtype != np.uint8):
            return {info.inputs[0]: array}, False
    if spec is None:
        raise InvalidInput(
            f"{type(data).__name__} was given to a model without an image spec",
            hint="give {input name: array}, or deploy the model with image=ImageSpec(...)",
        )
    return {spec.input: _array(read_picture(data, spec).pixels, copy)}, True


def size_of(data: object) -> int:
    """Bytes of what a request is given, where that is known before it is read; else 0."""
    arrays = data.values() if isinstance(data, Mapping) else [data]
    return sum(int(getattr(array, "nbytes", 0)) for array in arrays)


def _array(data: object, copy: bool) -> Array:
    """An array in C order and in this machine's byte order, a copy if ``copy`` says so. Raises
    ``InvalidInput`` for what numpy has no type."""
    if hasattr(data, "detach"):  # a torch tensor: it may have gradients, or lie on a GPU
        try:
            data = data.numpy(force=True)  # type: ignore[attr-defined]
        except TypeError as error:
            raise InvalidInput(str(error), hint="convert it: tensor.float()") from error
    array = np.asarray(data)
    make = np.array if copy else np.asarray
    return make(array, dtype=array.dtype.newbyteorder("="), order="C")


def describe_inputs(arrays: Mapping[str, Array]) -> tuple[m.Tensor, ...]:
    """Their headers. Raises ``InvalidInput`` for what cannot travel."""
    for name, array in arrays.items():
        if array.nbytes > limits.TENSOR_BYTES:
            raise InvalidInput(
                f"input {name!r} has {array.nbytes} bytes, more than {limits.TENSOR_BYTES}",
                hint="give it in parts",
            )
    try:
        return tuple(describe(name, array) for name, array in arrays.items())
    except ValueError as error:
        raise InvalidInput(str(error), hint="use an array of numbers") from error


def wanted_outputs(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Each once, in order. Raises ``InvalidInput`` for what cannot be a list of names."""
    if names is None:
        return None
    if isinstance(names, str) or not names or not all(isinstance(n, str) and n for n in names):
        raise InvalidInput(
            f"outputs={names!r} are no names of outputs",
            hint="give a list of them, or leave it out for all: client.models() has the names",
        )
    found = tuple(dict.fromkeys(names))
    if len(found) > limits.OUTPUTS_ASKED or any(len(n) > limits.NAME_CHARS for n in found):
        raise InvalidInput(
            f"{len(found)} outputs, the longest name of {max(map(len, found))} characters",
            hint=f"at most {limits.OUTPUTS_ASKED}, of {limits.NAME_CHARS} characters",
        )
    return found


def deadline(seconds: float | None) -> float:
    """The deadline of a request: the longest if none is given. Raises ``InvalidInput``."""
    if seconds is None:
        return limits.REQUEST_DEADLINE_S
    if not 0 < seconds < math.inf:
        raise InvalidInput(f"deadline_s={seconds}", hint="give seconds above 0")
    return seconds


def result_of(
    model: str,
    reply: m.Reply,
    arrays: Mapping[str, Array],
    wanted: tuple[str, ...] | None,
) -> Result:
    """The result of a reply, its outputs as they were asked for. Raises a failure's typed error."""
    if reply.failure is not None:
        raise error_of(reply.failure)
    return Result(
        request_id=reply.request,
        # Copies, for what came in cannot be written to.
        outputs={name: arrays[name].copy() for name in (arrays if wanted is None else wanted)},
        model=model,
        model_version=reply.version,
        plan=reply.plan,
        timing=Timing(reply.total_s, reply.queue_s, reply.tasks),
        degraded=reply.degraded,
        attempts=reply.attempts,
        image=image_of(reply),
        rounded=reply.rounded,
        reasons=reply.reasons,
        devices_lost=reply.lost,
        added_s=reply.added_s,
    )


def chosen(known: Sequence[m.ModelInfo], model: str, version: int | None) -> m.ModelInfo:
    """A version of a model, the current one if None. Raises ``ModelNotFound``."""
    for info in known:
        wanted = info.current if version is None else info.version == version
        if info.name == model and wanted:
            return info
    what = model if version is None else f"{model} version {version}"
    raise ModelNotFound(
        f"no model {what!r} is deployed",
        hint=f"deployed are {sorted({i.name for i in known})[:8]}",
    )


def in_order(
    submit: Callable[[str, object], Future[Result]],
    model: str,
    data: Iterable[object],
    max_in_flight: int,
) -> Iterator[Result]:
    """The results of ``Client.map``."""
    open_: deque[Future[Result]] = deque()
    try:
        for each in data:
            while full(open_, max_in_flight):
                yield open_.popleft().result()
            open_.append(submit(model, each))
        while open_:
            yield open_.popleft().result()
    finally:  # one failed, or nobody wants the rest
        for future in open_:
            future.cancel()


def full(open_: Sequence[Future[Result]], most: int) -> bool:
    """Whether the next result must be taken before another request is submitted.

    Waits while all that may be open is open and the next result is not there.
    """
    while len(open_) < most * limits.MAP_AHEAD:
        running = [future for future in open_ if not future.done()]
        if len(running) < most:
            return False
        if open_[0].done():
            return True
        wait(running, return_when=FIRST_COMPLETED)
    return True


def closed_error() -> ClusterUnavailable:
    return ClusterUnavailable("the client is closed", hint="make a new Client")
