"""Settings: flag > MESHINFER_* > ./meshinfer.toml > XDG config > default; and where state lives."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import platformdirs

from meshinfer.errors import ConfigurationError

FILE = "meshinfer.toml"
ADDRESS_FILE = "address.json"
"""In a coordinator's state folder: where it listens."""


def state_dir(part: str) -> Path:
    """Folder for the state of one role, such as ``coordinator-default``."""
    base = os.environ.get("MESHINFER_STATE_DIR") or platformdirs.user_state_dir("meshinfer")
    return Path(base) / part


def coordinator_state(cluster: str) -> Path:
    return state_dir(f"coordinator-{cluster}")


def user_state(cluster: str) -> Path:
    """Of a user who has joined a cluster elsewhere."""
    return state_dir(f"client-{cluster}")


def default_keyring(cluster: str) -> Path:
    """$MESHINFER_KEYRING, else the keyring of this machine's coordinator, else this user's."""
    given = os.environ.get("MESHINFER_KEYRING")
    if given:
        return Path(given)
    of_coordinator = coordinator_state(cluster) / "keyring.json"
    of_user = user_state(cluster) / "keyring.json"
    return of_user if of_user.exists() and not of_coordinator.exists() else of_coordinator


def file_settings() -> dict[str, Any]:
    """``{command: {option: value}}`` from the settings files; the nearer file wins.

    A table ``[worker]`` holds options of ``meshinfer worker``; what stands outside a table is for
    every command. Raises ``ConfigurationError`` for a file that is no TOML.
    """
    merged: dict[str, Any] = {}
    for path in (Path(platformdirs.user_config_dir("meshinfer")) / FILE, Path(FILE)):
        try:
            found = tomllib.loads(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"cannot read {path}: {error}", hint="mend or remove the file"
            ) from error
        for key, value in found.items():
            if isinstance(value, dict):
                merged.setdefault(key, {}).update(value)
            else:
                merged[key] = value
    return merged
