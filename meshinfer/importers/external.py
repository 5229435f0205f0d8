"""Weights in files of their own: read from the model's folder and from nowhere else, or made so.

A file may also be named by the SHA-256 of what is in it, as the weights of submodels are: then only
what the receiver lacks need travel, and a model of any size is a small file beside its weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from meshinfer.errors import InvalidInput
from meshinfer.importers.checks import is_external, tensor_nbytes, tensors_of

MOVED_FROM_BYTES = 1024
_ALIGNMENT = 64  # onnxruntime computes on the mapped bytes
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """Where the bytes of an external tensor lie: ``nbytes`` from ``offset`` of ``file``."""

    file: Path
    offset: int
    nbytes: int

    def read(self, start: int, length: int) -> bytes:
        """Some of the bytes, counted from the segment's start. Raises ``OSError``."""
        with self.file.open("rb") as file:
            file.seek(self.offset + start)
            return file.read(max(0, min(length, self.nbytes - start)))

    def digest(self) -> str:
        """SHA-256 (hex), read in pieces. Raises ``OSError``."""
        total = hashlib.sha256()
        with self.file.open("rb") as file:
            file.seek(self.offset)
            left = self.nbytes
            while left and (block := file.read(min(left, _READ_BYTES))):
                total.update(block)
                left -= len(block)
        return total.hexdigest()


def locations(proto: onnx.ModelProto) -> set[str]:
    """Names of the files that have the external data."""
    found = [e for t in tensors_of(proto) if is_external(t) for e in t.external_data]
    return {entry.value for entry in found if entry.key == "location"}


def check_external(proto: onnx.ModelProto, folder: Path | None) -> None:
    """Raise ``InvalidInput`` unless all external data lie inside ``folder`` (links resolved)."""
    for tensor in tensors_of(proto):
        if is_external(tensor):
            segment_of(tensor, folder)


def segment_of(tensor: onnx.TensorProto, folder: Path | None) -> Segment:
    """Where an external tensor lies. Raises ``InvalidInput`` for a place that is not allowed or
    not there, and for one that is not as long as the tensor."""
    entries = {e.key: e.value for e in tensor.external_data}
    location, what = entries.get("location", ""), f"weight {tensor.name!r}"
    if folder is None:
        raise InvalidInput(
            f"{what} lies in the file {location!r} beside the model",
            hint="give the model's path, so that its folder is known",
        )
    try:
        path = (folder / location).resolve()
        inside, there = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # no name of a file; links in a circle
        raise InvalidInput(f"{what} lies at {location[:99]!r}: {error}", hint=_BESIDE) from error
    if not inside:
        raise InvalidInput(f"{what} lies outside the model's folder, at {location!r}", hint=_BESIDE)
    if not there:
        raise InvalidInput(
            f"the file {location!r} of {what} is missing",
            hint=f"copy it to {folder}, beside the model",
        )
    wanted, size = tensor_nbytes(tensor), path.stat().st_size
    offset = _number(entries, "offset", 0, what)
    length = _number(entries, "length", wanted, what)
    if length != wanted:
        raise InvalidInput(
            f"{what} of shape {list(tensor.dims)} has {length} bytes in {location!r} instead of "
            f"{wanted}",
            hint="export the model again",
        )
    if offset + length > size:
        raise InvalidInput(
            f"{what} ends at byte {offset + length} of {location!r}, which has {size}",
            hint="copy the file again, it is truncated or of another version",
        )
    return Segment(path, offset, length)


_BESIDE = "put the weights beside the model and save it with their names"


def _number(entries: dict[str, str], key: str, default: int, what: str) -> int:
    text = entries.get(key, "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidInput(f"{what} has the {key} {text[:40]!r}", hint="export the model again")
    return int(text or default)


def move_weights(proto: onnx.ModelProto, file: Path) -> bool:
    """Move the large weights into ``file``, in place; False where some have a file already.

    onnxruntime maps that file. Serialised into the model they cost two copies more, and a second
    for every 200 MB in which no other thread of this process runs (measured on VGG-16).
    """
    if any(is_external(t) for t in tensors_of(proto)):
        return False
    with file.open("wb") as out:
        for tensor in proto.graph.initializer:
            data = tensor.raw_data
            if len(data) < MOVED_FROM_BYTES:
                continue
            out.seek(-out.tell() % _ALIGNMENT, os.SEEK_CUR)
            place = out.tell()
            out.write(data)
            _refer(tensor, file.name, place, len(data))
    return True


def name_weights(
    proto: onnx.ModelProto, folder: Path | None, least: int
) -> Iterator[tuple[str, Segment | bytes]]:
    """Let the weights of at least ``least`` bytes lie in files named by their SHA-256, in place.

    Yields the name and the bytes of each as it goes, or where these lie. Smaller weights come into
    the model. Raises ``InvalidInput`` for external data that are not there.
    """
    for tensor in tensors_of(proto):
        try:
            if is_external(tensor):
                segment = segment_of(tensor, folder)
                if segment.nbytes >= least:
                    digest = segment.digest()
                    _refer(tensor, digest, 0, segment.nbytes)
                    yield digest, segment
                else:
                    tensor.ClearField("data_location")
                    del tensor.external_data[:]
                    tensor.raw_data = segment.read(0, segment.nbytes)
                continue
        except OSError as error:
            raise InvalidInput(
                f"weight {tensor.name!r} cannot be read: {error.strerror}",
                hint="look at the weight files beside the model",
            ) from error
    for tensor in proto.graph.initializer:
        if not is_external(tensor) and len(data := tensor.raw_data) >= least:
            digest = hashlib.sha256(data).hexdigest()
            _refer(tensor, digest, 0, len(data))
            yield digest, data


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
