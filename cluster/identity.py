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
_SERIAL_FILE: Final = "/sys/firmware/devicetree/base/serial-number"


def own_identity(state_dir: Path) -> KeyPair:
    """This device's pair: that of ``identity.json``, or a new one if there is none, or if that was
    made on another machine."""
    path = state_dir / IDENTITY_FILE
    hint = f"restore {path} from a backup, or remove it: the device then has to join anew"
    make_folder(state_dir)
    machine, serial = machine_id(), board_serial()
    here = f"{machine} {serial}".strip()
    if path.exists():
        fields = read_private(path, "identity", hint)
        check_fields(path, fields, {"machine", "key"}, hint)
        if not isinstance(fields["machine"], str):
            raise AuthError(f"the machine in {path} is not text", hint=hint)
        pair = pair_of(path, "key", fields["key"], hint)
        its_machine, _, its_serial = fields["machine"].partition(" ")
        if its_machine == machine and (not its_serial or not serial or its_serial == serial):
            if serial and not its_serial:  # of a release before
                write_private(path, {"machine": here, "key": pair_fields(pair)})
            return pair
        log.warning(
            "this state folder comes from another machine: a new identity is made, and the old "
            "one is left to it",
            folder=str(state_dir),
            was=device_id(pair.public),
        )
    pair = generate_keypair()
    write_private(path, {"machine": here, "key": pair_fields(pair)})
    log.info("this device has an identity", id=device_id(pair.public))
    return pair


def machine_id() -> str:
    """systemd's id of this installation; empty where there is none. A card that is copied byte for
    byte has the same."""
    for name in _MACHINE_FILES:
        try:
            found = Path(name).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if found:
            return found
    return ""


def board_serial() -> str:
    """Of a board with a device tree, as a Pi: a copy of a card has its machine id, and another
    serial number. Empty elsewhere."""
    try:
        return Path(_SERIAL_FILE).read_text("ascii").strip("\0 \n")
    except (OSError, UnicodeDecodeError):
        return ""
