"""Files of arrays from anybody: arrays, or a typed error."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.cli.arrays import read_arrays
from meshinfer import limits
from meshinfer.errors import InvalidInput

ARRAY = np.arange(60, dtype=np.float32).reshape(3, 4, 5)


def npy(array: np.ndarray = ARRAY) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def head(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text


def archive(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name.replace("_", "."), data)
    return out.getvalue()


def read(folder: Path, data: bytes, name: str = "a.npy") -> np.ndarray | dict[str, np.ndarray]:
    (folder / name).write_bytes(data)
    return read_arrays(str(folder / name))


def test_arrays_are_read(tmp_path: Path) -> None:
    assert np.array_equal(read(tmp_path, npy()), ARRAY)
    found = read(tmp_path, npz(x=ARRAY, y=ARRAY[0]), "a.npz")
    assert isinstance(found, dict)
    assert sorted(found) == ["x", "y"] and np.array_equal(found["y"], ARRAY[0])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        npy(np.array([{}], dtype=object)),
        head("(1,)", "'|O'") + bytes(8),
        head("(1099511627776,)"),
        head("(1099511627776, 1099511627776)"),
        head("(-5,)"),
        head("(" * 3000 + ")" * 3000),
        head("__import__('os').system('true')"),
        npy()[:-1],
        npz(x=ARRAY)[:-30],
        archive(x_npy=head("(1099511627776,)")),
        archive(x_npy=npy(np.array([{}], dtype=object))),
        archive(readme_txt=b"hello"),
        npz(x=ARRAY).replace(b"x.npy", b"y.npy", 1),
        archive(x_npy=head("(2000000000,)", "'|u1'") + bytes(1 << 20)),
    ],
)
def test_what_is_no_array_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path, data)
    assert caught.value.hint and len(caught.value.message) < 1200


def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand to one is what deflate can do."""
    monkeypatch.setattr(limits, "TENSOR_BYTES", 1 << 20)
    data = npz(x=np.zeros(2 << 20, np.uint8))
    assert len(data) < 4096
    with pytest.raises(InvalidInput, match="unpacks"):
        read(tmp_path, data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.booleans(), st.data())
def test_a_changed_file_is_arrays_or_refused(
    tmp_path: Path, many: bool, other: bool, data: st.DataObject
) -> None:
    made = bytearray(npz(x=ARRAY, y=ARRAY) if many else npy())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(made) - 1))
        match data.draw(st.sampled_from(["set", "set", "flip", "cut"])):
            case "set":
                made[at] = data.draw(st.sampled_from([0, 1, 0x20, 0x39, 0x7F, 0xFF]))
            case "flip":
                made[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut" if at:
                del made[at:]
    try:
        found = read(tmp_path, bytes(made), "a.npz" if many != other else "a.npy")
    except InvalidInput:
        return
    for array in found.values() if isinstance(found, dict) else (found,):
        assert isinstance(array, np.ndarray) and not array.dtype.hasobject
