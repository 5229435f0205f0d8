"""Messages to frames and back: one msgpack header, then the raw bytes in frames of at most 1 MiB.

The header holds the payload's length and its xxh3-64, both checked before the payload is used, and
a tensor's shape is checked against the length before an array is made of it.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import xxhash

from meshinfer import limits
from meshinfer.errors import BY_NAME, MeshInferError
from meshinfer.protocol.messages import AnyMessage, Failure, Message, Tensor

Array = np.ndarray[Any, Any]
Buffer = bytes | memoryview

DTYPES = frozenset(
    ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
)
"""Element types that may travel, as numpy type strings: all little-endian."""
_BY_STRING = {name: np.dtype(name) for name in sorted(DTYPES)}
_STRINGS = {dtype: name for name, dtype in _BY_STRING.items()}


class ProtocolError(Exception):
    """Frames that are no message of ours; they are counted and dropped."""


class ChecksumError(ProtocolError):
    """A message of ours whose payload is not what was sent: what comes behind it may well be."""


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    message: AnyMessage
    nbytes: int = 0
    checksum: int = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Envelope)


def encode(message: Message, payload: Buffer | None = None) -> list[Buffer]:
    """Frames of a message. The payload is not copied and must not change until it is sent."""
    if payload is None:
        return [_encoder.encode(_Envelope(message))]  # type: ignore[arg-type]
    view = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
    digest = xxhash.xxh3_64_intdigest(view)
    header = _encoder.encode(_Envelope(message, len(view), digest))  # type: ignore[arg-type]
    size = limits.FRAME_BYTES
    return [header, *(view[i : i + size] for i in range(0, len(view), size))]


def decode(frames: Sequence[Buffer]) -> tuple[AnyMessage, memoryview]:
    """The message and its payload (empty if it has none). Raises ``ProtocolError``.

    A payload of one frame is not copied; several frames are joined, which copies them once.
    """
    if not frames or len(frames) > limits.FRAMES_PER_MESSAGE:
        raise ProtocolError(f"{len(frames)} frames")
    if len(frames[0]) > limits.CONTROL_FRAME_BYTES:
        raise ProtocolError(f"a header of {len(frames[0])} bytes")
    nbytes = 0
    for frame in frames[1:]:
        nbytes += len(frame)
        if len(frame) > limits.FRAME_BYTES:
            raise ProtocolError("a frame is too long")
    try:
        envelope = _decoder.decode(frames[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"no message: {error}") from error
    if nbytes != envelope.nbytes:
        raise ProtocolError("the payload's length is not the one announced")
    if len(frames) == 1:
        return envelope.message, memoryview(b"")
    payload = memoryview(frames[1] if len(frames) == 2 else b"".join(frames[1:])).toreadonly()
    if xxhash.xxh3_64_intdigest(payload) != envelope.checksum:
        raise ChecksumError("the payload's checksum is wrong")
    return envelope.message, payload


def string_of(dtype: np.dtype[Any]) -> str:
    """numpy's type string, looked up: numpy prints it anew each time."""
    return _STRINGS.get(dtype) or dtype.str


def describe(name: str, array: Array) -> Tensor:
    """The header of an array. Raises ``ValueError`` for types and sizes that cannot travel."""
    dtype = _STRINGS.get(array.dtype)
    if dtype is None:
        raise ValueError(f"arrays of {array.dtype} cannot travel")
    if array.nbytes > limits.TENSOR_BYTES:
        raise ValueError(f"{array.nbytes} bytes are more than {limits.TENSOR_BYTES}")
    return Tensor(name=name, dtype=dtype, shape=array.shape)


def digest_of(arrays: Mapping[str, Array]) -> str:
    """128 bits in hexadecimal of tensors with their names, types and shapes (17 us a MiB)."""
    total = xxhash.xxh3_128()
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype.str} {array.shape};".encode())
        if not array.dtype.hasobject:  # those cannot travel
            total.update(payload_of(array))
    return total.hexdigest()


def payload_of(array: Array) -> memoryview:
    """The raw bytes of an array in C order; copied only where a slice is not contiguous."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8)) if flat.size else memoryview(b"")  # type: ignore[arg-type]


def array_of(tensor: Tensor, payload: memoryview) -> Array:
    """The read-only array over a payload. Raises ``ProtocolError`` when the header does not fit."""
    dtype = _BY_STRING.get(tensor.dtype)
    if dtype is None:
        raise ProtocolError(f"elements of type {tensor.dtype!r}")
    count = 1
    for size in tensor.shape:
        count *= size
    if count * dtype.itemsize != len(payload):
        raise ProtocolError(f"{tensor.shape} of {dtype} is not {len(payload)} bytes")
    try:
        array = np.frombuffer(payload, dtype=dtype, count=count).reshape(tensor.shape)
    except ValueError as error:  # an empty tensor of absurd dimensions
        raise ProtocolError(f"{tensor.shape}: {error}") from error
    if dtype.kind == "b" and array.view(np.uint8).max(initial=0) > 1:
        raise ProtocolError("a truth value that is neither 0 nor 1")  # kernels index by them
    return array if array.flags.aligned else array.copy()


def header_bytes(message: Message) -> int:
    """How long a message's header is; more than ``limits.CONTROL_FRAME_BYTES`` cannot travel."""
    return len(_encoder.encode(_Envelope(message)))  # type: ignore[arg-type]


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a disk is full, cannot be written, or fails: no defect of ours."""
    return isinstance(error, OSError) and error.errno in _DISK


def failure_of(error: BaseException) -> Failure:
    """An exception as it travels; what is not ours becomes a plain ``MeshInferError``."""
    if is_of_the_disk(error):
        return Failure(
            error="ClusterUnavailable",
            message=f"a disk of the cluster does not take what is to be stored: {error}",
            hint="make room on the disk of the device that says so, first the coordinator's",
            retry_after_s=5.0,
        )
    if isinstance(error, MeshInferError):
        return Failure(
            error=type(error).__name__,
            message=_short(error.message),
            hint=_short(error.hint),
            retry_after_s=getattr(error, "retry_after_s", None),
        )
    return Failure(
        error="MeshInferError",
        message=_short(f"{type(error).__name__}: {error}"),
        hint="this is a defect of MeshInfer: please report it with the log",
    )


def _short(text: str) -> str:
    """What is quoted in it may be of any length, and may have halves of surrogate pairs: neither
    could travel, and nobody would hear of the error."""
    text = text if len(text) <= limits.FAILURE_CHARS else f"{text[: limits.FAILURE_CHARS]} ..."
    return text.encode("utf-8", "backslashreplace").decode()


def error_of(failure: Failure) -> MeshInferError:
    """The exception behind a failure."""
    kind = BY_NAME.get(failure.error, MeshInferError)
    error = kind(failure.message, hint=failure.hint)
    if failure.retry_after_s is not None:
        error.retry_after_s = failure.retry_after_s  # type: ignore[attr-defined]
    return error
