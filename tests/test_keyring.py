"""Key files are private and checked, and a folder keeps the keys that it was made with."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from cluster.keyring import (
    check_cluster_name,
    load_or_create_coordinator,
    new_keyring,
    read_keyring,
    write_keyring,
)
from cluster.keys import generate_keypair, is_key
from meshinfer import limits
from meshinfer.errors import AuthError, ConfigurationError
from meshinfer.protocol.token import client_name


def test_a_key_pair_does_not_show_its_secret() -> None:
    pair = generate_keypair()
    assert is_key(pair.public) and is_key(pair.secret)
    assert pair.public in repr(pair)
    ring, own = new_keyring("home")
    assert pair.secret not in repr(pair)
    assert ring.key.secret not in repr(ring)
    assert own.secret not in repr(own)


@pytest.mark.parametrize("text", ["", "x" * 39, "x" * 41, "~" * 40, "é" * 40, "#" * 40, None, 7])
def test_what_is_no_key_is_told_apart(text: object) -> None:
    assert not is_key(text)


@pytest.mark.parametrize("name", ["", "-a", "a b", "a.b", "a/b", "ä", "a\n", "a" * 33])
def test_a_cluster_name_must_fit_an_mdns_label(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_cluster_name(name)
    assert str(limits.CLUSTER_NAME_CHARS) in caught.value.hint


def test_a_keyring_survives_the_disk_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    ring, _ = new_keyring("home")
    path = tmp_path / "keyring.json"
    old_umask = os.umask(0)
    try:
        write_keyring(path, ring)
        write_keyring(path, ring)  # again, over the old one
    finally:
        os.umask(old_umask)
    assert read_keyring(path) == ring
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["keyring.json"], "no temporary file may stay behind"


def test_only_the_keyring_of_a_plaintext_cluster_says_so(tmp_path: Path) -> None:
    path = tmp_path / "keyring.json"
    for plaintext in (False, True):
        ring, _ = new_keyring("home", plaintext=plaintext)
        write_keyring(path, ring)
        assert read_keyring(path) == ring and ring.plaintext is plaintext
        assert ("plaintext" in json.loads(path.read_text())) is plaintext
    assert not new_keyring("home")[0].plaintext


def test_a_state_folder_is_encrypted_or_not_for_its_whole_life(tmp_path: Path) -> None:
    for plaintext in (False, True):
        folder = tmp_path / str(plaintext)
        made = load_or_create_coordinator(folder, "home", plaintext=plaintext)
        before = (folder / "keyring.json").read_bytes()
        with pytest.raises(ConfigurationError, match="encrypt") as caught:
            load_or_create_coordinator(folder, "home", plaintext=not plaintext)
        assert "--state-dir" in caught.value.hint
        assert (folder / "keyring.json").read_bytes() == before
        assert load_or_create_coordinator(folder, "home", plaintext=plaintext) == made
        assert made[0].plaintext is plaintext
    assert not load_or_create_coordinator(tmp_path / "x", "home")[0].plaintext


def test_a_keyring_that_was_turned_to_plaintext_is_written_anew(tmp_path: Path) -> None:
    ring, own = load_or_create_coordinator(tmp_path, "home")
    path = tmp_path / "keyring.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "plaintext": True}))
    assert read_keyring(path).plaintext
    assert load_or_create_coordinator(tmp_path, "home") == (ring, own)
    assert read_keyring(path) == ring and not ring.plaintext


def test_a_keyring_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    ring, _ = new_keyring("home")
    with pytest.raises(ConfigurationError, match="nowhere"):
        write_keyring(tmp_path / "nowhere" / "keyring.json", ring)


def _damage(fields: dict[str, object], how: str) -> str:
    pair = fields["key"]
    assert isinstance(pair, dict)
    match how:
        case "not JSON":
            return "{"
        case "deep JSON":
            return "[" * 4000
        case "not text":
            return "\udcff"
        case "not an object":
            return "[]"
        case "field missing":
            del fields["role"]
        case "field more":
            fields["more"] = 1
        case "plaintext is no truth":
            fields["plaintext"] = 1
        case "plaintext is denied":
            fields["plaintext"] = False
        case "short key":
            fields["coordinator_public"] = "abc"
        case "key of another type":
            pair["secret"] = 5
        case "key is no pair":
            fields["key"] = "abc"
        case "halves of two pairs":
            pair["secret"] = generate_keypair().secret
        case "cluster is no text":
            fields["cluster"] = 5
        case "name is no text":
            fields["name"] = 5
        case "name is empty":
            fields["name"] = ""
        case "another role":
            fields["role"] = "king"
        case "role is no text":
            fields["role"] = ["admin"]
        case "older release":
            fields["member"] = fields.pop("key")
        case "too large":
            fields["cluster"] = "x" * limits.KEY_FILE_BYTES
        case "empty":
            return ""
    return json.dumps(fields)


@pytest.mark.parametrize(
    "how",
    [
        "not JSON",
        "deep JSON",
        "not text",
        "not an object",
        "field missing",
        "field more",
        "plaintext is no truth",
        "plaintext is denied",
        "short key",
        "empty",
        "key of another type",
        "key is no pair",
        "halves of two pairs",
        "cluster is no text",
        "name is no text",
        "name is empty",
        "another role",
        "role is no text",
        "older release",
        "too large",
    ],
)
def test_a_damaged_keyring_is_refused_with_a_hint_and_without_its_secret(
    tmp_path: Path, how: str
) -> None:
    ring, _ = new_keyring("home")
    path = tmp_path / "keyring.json"
    write_keyring(path, ring)
    text = _damage(json.loads(path.read_text()), how)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AuthError) as caught:
        read_keyring(path)
    assert str(path) in caught.value.message and caught.value.hint
    assert ring.key.secret not in str(caught.value)


def test_a_missing_keyring_says_how_to_join(tmp_path: Path) -> None:
    with pytest.raises(AuthError) as caught:
        read_keyring(tmp_path / "keyring.json")
    assert "token" in caught.value.hint


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_keyring_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    ring, _ = new_keyring("home")
    path = tmp_path / "keyring.json"
    write_keyring(path, ring)
    path.chmod(mode)
    with pytest.raises(AuthError) as caught:
        read_keyring(path)
    assert caught.value.hint == f"chmod 600 {path}"


def test_a_keyring_that_cannot_be_opened_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_keyring(tmp_path)  # a folder


def test_the_coordinator_keeps_its_identity_over_restarts(tmp_path: Path) -> None:
    state = tmp_path / "a" / "state"
    ring, own = load_or_create_coordinator(state, "home")
    assert ring.coordinator_public == own.public
    assert load_or_create_coordinator(state, "home") == (ring, own)
    assert read_keyring(state / "keyring.json") == ring
    assert ring.role == "admin" and ring.name == client_name(ring.key.public)
    assert own.secret not in (state / "keyring.json").read_text()
    for file in state.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_a_lost_or_damaged_keyring_is_written_anew_from_the_coordinators_own_file(
    tmp_path: Path,
) -> None:
    ring, own = load_or_create_coordinator(tmp_path, "home")
    admins = tmp_path / "keyring.json"
    admins.unlink()
    assert load_or_create_coordinator(tmp_path, "home") == (ring, own)
    admins.write_text("{")
    assert load_or_create_coordinator(tmp_path, "home") == (ring, own)
    assert read_keyring(admins) == ring


def test_a_lost_coordinator_key_is_not_replaced_behind_the_devices_backs(tmp_path: Path) -> None:
    load_or_create_coordinator(tmp_path, "home")
    before = (tmp_path / "keyring.json").read_bytes()
    (tmp_path / "coordinator.json").unlink()
    with pytest.raises(AuthError, match="is not"):
        load_or_create_coordinator(tmp_path, "home")
    assert (tmp_path / "keyring.json").read_bytes() == before


def test_a_state_folder_of_another_cluster_is_refused(tmp_path: Path) -> None:
    load_or_create_coordinator(tmp_path, "home")
    with pytest.raises(ConfigurationError) as caught:
        load_or_create_coordinator(tmp_path, "away")
    assert "--cluster home" in caught.value.hint


def test_a_state_folder_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError):
        load_or_create_coordinator(tmp_path / "file" / "state", "home")


def test_the_key_that_all_devices_had_in_an_older_release_makes_nobody_an_admin(
    tmp_path: Path,
) -> None:
    """It was copied to each of them: the coordinator stays who it is, its admin gets a new pair."""
    ring, own = load_or_create_coordinator(tmp_path, "home")
    file = tmp_path / "coordinator.json"
    fields = json.loads(file.read_text())
    member = fields["member"] = fields.pop("admin")
    file.write_text(json.dumps(fields))
    renewed, same = load_or_create_coordinator(tmp_path, "home")
    assert same == own and renewed.coordinator_public == own.public
    assert renewed.key != ring.key and member["public"] not in file.read_text()
    assert read_keyring(tmp_path / "keyring.json") == renewed
    assert load_or_create_coordinator(tmp_path, "home") == (renewed, own)
