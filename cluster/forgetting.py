"""Removes what a worker keeps of a cluster: its blobs, or all of its state, keys included.

Only what a worker itself has written: a folder given by mistake keeps everything else. Flash memory
may keep removed bytes until it writes over them; who fears that has the blobs encrypted.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cluster.config import ADDRESS_FILE
from cluster.journal import FILE as JOURNAL_FILE
from cluster.processes import hold_folder
from cluster.sealing import loading_folders
from cluster.signing import KEY_FILE, SIGNER_FILE
from meshinfer.errors import ConfigurationError

BLOBS = "blobs"
_OWN = ("identity.json", "keyring.json", "place.json", "token", SIGNER_FILE, "profile.json")
_OF_COORDINATOR = (KEY_FILE, JOURNAL_FILE, ADDRESS_FILE)


def remove_blobs(state: Path) -> int:
    """Remove the submodels and weights of a state folder that this process holds; how many."""
    folder = state / BLOBS
    count = sum(1 for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0
    for each in (folder, *loading_folders(state)):
        shutil.rmtree(each, ignore_errors=True)
    return count


def forget(state: Path) -> tuple[Path, ...]:
    """Remove all that a worker has in its state folder, and the folder; what stays as it is not a
    worker's. Raises ``ConfigurationError`` for a worker that runs, and for a coordinator's folder.
    """
    if not state.exists():
        return ()
    for name in _OF_COORDINATOR:
        if (state / name).exists():
            raise ConfigurationError(
                f"{state} is a coordinator's", hint="give a worker's --name or --state-dir"
            )
    lock = hold_folder(state)
    try:
        remove_blobs(state)
        for name in _OWN:
            (state / name).unlink(missing_ok=True)
        left = tuple(sorted(path for path in state.iterdir() if path.name != "lock"))
        (state / "lock").unlink(missing_ok=True)
        if not left:
            state.rmdir()
    except OSError as error:
        raise ConfigurationError(
            f"cannot remove all of {state}: {error.strerror}", hint="see whose its files are"
        ) from error
    finally:
        os.close(lock)
    return left
