"""A device is who its folder says, on the machine that made it and on no other."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cluster import identity
from cluster.identity import IDENTITY_FILE, machine_id, own_identity
from cluster.keys import generate_keypair, is_key
from meshinfer.errors import AuthError, ConfigurationError
from meshinfer.protocol.token import device_id


def test_a_device_keeps_its_pair_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "worker"
    pair = own_identity(folder)
    assert is_key(pair.public) and is_key(pair.secret)
    assert own_identity(folder) == pair
    assert os.listdir(folder) == [IDENTITY_FILE]
    assert stat.S_IMODE((folder / IDENTITY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert own_identity(tmp_path / "b") != pair


def test_a_copied_folder_gets_a_new_identity_on_the_other_machine_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the SD card of a Pi, cloned for the next one."""
    first, second = tmp_path / "first-machine", tmp_path / "second-machine"
    first.write_text("a" * 32 + "\n")
    second.write_text("b" * 32 + "\n")
    monkeypatch.setattr(identity, "_MACHINE_FILES", (str(first),))
    pair = own_identity(tmp_path / "card")
    shutil.copytree(tmp_path / "card", tmp_path / "clone")
    with capture_logs() as quiet:
        assert own_identity(tmp_path / "clone") == pair, "a folder may move on its machine"
    assert quiet == []
    monkeypatch.setattr(identity, "_MACHINE_FILES", ("/nowhere", str(second)))
    with capture_logs() as said:
        other = own_identity(tmp_path / "clone")
    assert other.public != pair.public
    warning = next(each for each in said if each["log_level"] == "warning")
    assert "another machine" in warning["event"] and warning["was"] == device_id(pair.public)
    assert own_identity(tmp_path / "clone") == other
    assert pair.secret not in (tmp_path / "clone" / IDENTITY_FILE).read_text()


def test_a_card_that_is_copied_byte_for_byte_is_noticed_by_the_boards_serial_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has the same machine id, too."""
    machine, serial = tmp_path / "machine-id", tmp_path / "serial-number"
    machine.write_text("a" * 32 + "\n")
    monkeypatch.setattr(identity, "_MACHINE_FILES", (str(machine),))
    monkeypatch.setattr(identity, "_SERIAL_FILE", str(serial))
    card = tmp_path / "card"
    pair = own_identity(card)  # by a release before, which did not look at it
    serial.write_bytes(b"10000000aaaaaaaa\0")
    assert own_identity(card) == pair
    serial.unlink()  # in a container, say
    assert own_identity(card) == pair
    serial.write_bytes(b"10000000bbbbbbbb\0")
    with capture_logs() as said:
        other = own_identity(card)
    assert other != pair and "another machine" in said[0]["event"]
    assert own_identity(card) == other


def test_where_machines_have_no_id_the_folder_alone_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "machine-id"
    empty.write_text("\n")
    monkeypatch.setattr(identity, "_MACHINE_FILES", ("/nowhere", str(empty), str(tmp_path)))
    assert machine_id() == ""
    assert own_identity(tmp_path / "w") == own_identity(tmp_path / "w")


@pytest.mark.parametrize("how", ["empty", "half", "other key", "more", "machine", "others"])
def test_a_damaged_identity_is_refused_and_not_replaced(tmp_path: Path, how: str) -> None:
    pair = own_identity(tmp_path)
    path = tmp_path / IDENTITY_FILE
    fields = json.loads(path.read_text())
    match how:
        case "half":
            del fields["key"]["secret"]
        case "other key":
            fields["key"]["secret"] = generate_keypair().secret
        case "more":
            fields["more"] = 1
        case "machine":
            fields["machine"] = 7
        case "others":
            path.chmod(0o644)
    path.write_text("" if how == "empty" else json.dumps(fields))
    before = path.read_bytes()
    with pytest.raises(AuthError) as caught:
        own_identity(tmp_path)
    assert caught.value.hint and str(path) in caught.value.message
    assert pair.secret not in str(caught.value) and path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError):
        own_identity(tmp_path / "file" / "state")
