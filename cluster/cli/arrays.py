"""Arrays in files, .npy and .npz: read or refused, whatever is in them, and never unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from meshinfer import limits
from meshinfer.errors import InvalidInput

Array = np.ndarray[Any, Any]
_HINT = "give arrays saved by numpy.save or numpy.savez"


def read_arrays(path: str) -> Array | dict[str, Array]:
    """One array, or several by name. Raises ``InvalidInput``."""
    try:
        found = _read(path)
    except InvalidInput:
        raise
    except Exception as error:  # zipfile and zlib have their own; terabytes are a MemoryError
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidInput(f"cannot read {path}: {why}"[:1000], hint=_HINT) from error
    for array in found.values() if isinstance(found, dict) else (found,):
        if not isinstance(array, np.ndarray):
            raise InvalidInput(f"{path} has other things than arrays", hint=_HINT)
    return found


def _read(path: str) -> Array | dict[str, Array]:
    with Path(path).open("rb") as file:  # numpy leaves it open when it is no archive after all
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            return loaded
        assert loaded.zip is not None
        nbytes = sum(member.file_size for member in loaded.zip.infolist())  # zipfile keeps to it
        if nbytes > limits.TENSOR_BYTES:
            raise InvalidInput(
                f"{path} unpacks to {nbytes} bytes, more than {limits.TENSOR_BYTES}",
                hint="save its arrays in several files",
            )
        return {name: loaded[name] for name in loaded.files}
