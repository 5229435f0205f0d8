"""Which device this is: a key pair made once, for this machine alone.

A state folder that was copied, as with an SD card, must not give two machines one identity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import structlog

from cluster.keys import (
    KeyPair,
    check_fields,
    generate_keypair,
    make_folder,
    pair_fields,
    pair_of,
    read_private,
    write_private,
)
from meshinfer.errors import AuthError
from meshinfer.protocol.token import device_id

log = structlog.get_logger(__name__)

IDENTITY_FILE: Final = "identity.json"
_MACHINE_FILES: Final = ("/etc/machine-id", "/var/lib/dbus/machine-id")


def own_identity(state_dir: Path) -> KeyPair:
    """This device's pair: that of ``identity.json``, or a new one if there is none, or if that was
    made on another machine."""
    path = state_dir / IDENTITY_FILE
    hint = f"restore {path} from a backup, or remove it: the device then has to join anew"
    make_folder(state_dir)
    machine = machine_id()
    if path.exists():
        fields = read_private(path, "identity", hint)
        check_fields(path, fields, {"machine", "key"}, hint)
        if not isinstance(fields["machine"], str):
            raise AuthError(f"the machine in {path} is not text", hint=hint)
        pair = pair_of(path, "key", fields["key"], hint)
        if fields["machine"] == machine:
            return pair
        log.warning(
            "this state folder comes from another machine: a new identity is made, and the old "
            "one is left to it",
            folder=str(state_dir),
            was=device_id(pair.public),
        )
    pair = generate_keypair()
    write_private(path, {"machine": machine, "key": pair_fields(pair)})
    log.info("this device has an identity", id=device_id(pair.public))
    return pair


def machine_id() -> str:
    """systemd's id of this installation; empty where there is none, and copies are not noticed."""
    for name in _MACHINE_FILES:
        try:
            found = Path(name).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if found:
            return found
    return ""
