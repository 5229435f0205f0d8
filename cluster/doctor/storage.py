"""Whether a folder can be written: by writing and syncing a file there, and by the free bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from meshinfer.doctor import Room

_TRY_BYTES = 1 << 20


def room(what: str, folder: Path) -> Room:
    """Of a folder, or of the nearest one that is there and would hold it: nothing is left behind.

    What is free is not enough to ask: quotas, a mount that turned read-only and a failing card only
    show as one writes.
    """
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    failure = ""
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".meshinfer-doctor-") as file:
            file.write(bytes(_TRY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        failure = error.strerror or repr(error)
    return Room(what, str(nearest), shutil.disk_usage(nearest).free, failure)
