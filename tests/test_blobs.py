"""Blobs on a worker's disk: what was changed there is never loaded; sealed ones show nothing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
from onnx import TensorProto
from processes import image, small_model

from cluster import sealing
from cluster.blobs import BlobDamaged, BlobStore
from cluster.cli.at_rest import forget_all
from cluster.forgetting import forget
from cluster.processes import hold_folder
from cluster.sealing import SealedStore, sealed_store
from cluster.storing import StoreThread
from meshinfer import limits
from meshinfer.engine.ort import OrtEngine
from meshinfer.errors import AuthError, ConfigurationError, InvalidInput
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Prepare, Prepared

WORDS = b"the weights of a model, as they are " * 9
DIGEST = hashlib.sha256(WORDS).hexdigest()
PIECE = 100


def sealed(tmp_path: Path, key: bytes = bytes(32)) -> SealedStore:
    loading = tmp_path / "loading"
    loading.mkdir(parents=True, exist_ok=True)
    return SealedStore(tmp_path / "blobs", key, loading)


def plain(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs", sole=True)


KINDS = pytest.mark.parametrize("make", [plain, sealed])


def write(store: BlobStore, data: bytes = WORDS) -> str:
    """As it comes over a wire, in pieces."""
    digest = hashlib.sha256(data).hexdigest()
    for start in range(0, max(1, len(data)), PIECE):
        whole = store.write(digest, start, len(data), memoryview(data)[start : start + PIECE])
    assert whole
    return digest


@KINDS
@pytest.mark.parametrize("data", [WORDS, b"", b"x", WORDS[: 2 * PIECE]])
def test_what_was_written_is_loaded(tmp_path: Path, make: type, data: bytes) -> None:
    store = make(tmp_path)
    digest = write(store, data)
    for again in (store, make(tmp_path)):  # and by the next process
        assert again.missing((digest,)) == ()
        assert again.load(digest) == data
        with again.opened((digest,)):
            assert (again.loading / digest).read_bytes() == data


@KINDS
def test_what_was_put_is_loaded(tmp_path: Path, make: type) -> None:
    store = make(tmp_path)
    data = os.urandom(1 << 20) + b"more"
    digest = hashlib.sha256(data).hexdigest()
    store.put(digest, data)
    assert store.load(digest) == data
    assert [path.name for path in store.folder.iterdir()] == [digest]


@KINDS
def test_bytes_that_are_not_the_blob_s_are_not_admitted(tmp_path: Path, make: type) -> None:
    store = make(tmp_path)
    with pytest.raises(ValueError):
        store.write(DIGEST, 0, 4, memoryview(b"else"))
    assert list(store.folder.iterdir()) == []


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    other.replace(path)


def _with_old_times(path: Path) -> None:
    """As who hides it would."""
    before = path.stat()
    _flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = pytest.mark.parametrize(
    "change", [_flip, _truncate, _replace, _with_old_times, Path.unlink]
)


@KINDS
@CHANGES
def test_what_changed_since_it_was_verified_is_not_loaded(
    tmp_path: Path, make: type, change: object
) -> None:
    for by in ("opened", "load", "missing"):
        store = make(tmp_path)
        digest = write(store)
        assert store.missing((digest,)) == ()
        assert callable(change)
        change(store.path(digest))
        if by == "missing":
            assert store.missing((digest,)) == (digest,)
        elif by == "load":
            with pytest.raises((BlobDamaged, FileNotFoundError)):
                store.load(digest)
        else:
            with pytest.raises(BlobDamaged), store.opened((digest,)):
                pytest.fail("it was opened")
        assert store.missing((digest,)) == (digest,)


@KINDS
def test_of_blobs_that_were_not_used_for_long_nothing_is_held(
    tmp_path: Path, make: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. of five blobs two may be held as verified; 2. all are found whole; 3. one of which nothing
    is held is changed: it is not loaded."""
    monkeypatch.setattr(limits, "BLOBS_VERIFIED", 2)
    store = make(tmp_path)
    digests = tuple(write(store, b"blob %d, " % i * 9) for i in range(5))
    assert len(store._verified) == 2
    assert store.missing(digests) == () and len(store._verified) == 2
    path = store.path(digests[0])
    path.write_bytes(path.read_bytes()[::-1])
    assert store.missing(digests) == digests[:1]
    with pytest.raises(BlobDamaged), store.opened(digests[:1]):
        pass


def test_a_worker_does_not_prepare_what_was_changed_on_its_disk(tmp_path: Path) -> None:
    """The file is sound when the store is asked, and is changed before the engine reads it."""
    model = small_model()
    made = {}
    for tensor in model.graph.initializer:
        made[hashlib.sha256(tensor.raw_data).hexdigest()] = tensor.raw_data
        _outside(tensor)
    data = model.SerializeToString()
    submodel = hashlib.sha256(data).hexdigest()
    for change_what in ("nothing", "a weight", "the submodel"):
        store = plain(tmp_path)
        for each in (data, *made.values()):
            write(store, each)
        assert store.missing((submodel, *made)) == ()
        largest = max(made, key=lambda digest: len(made[digest]))
        if change_what != "nothing":
            _with_old_times(store.path(largest if change_what == "a weight" else submodel))
        answers: list[Prepared] = []
        engine = OrtEngine(store.loading)
        thread = StoreThread(store, lambda engine=engine: engine, answers.append)
        program = m.Program(place=(0, 0), model=submodel, weights=tuple(made))
        thread.put(Prepare(1, (program,)))
        thread.close()
        (answer,) = answers
        if change_what == "nothing":
            assert answer.failure is None
            assert thread.prepared[1][0, 0].run(image())[0].shape == (1, 3, 24, 24)
        else:
            assert answer.failure is not None and "not loaded" in answer.failure.message
            assert answer.failure.hint and thread.prepared == {}


def _outside(tensor: TensorProto) -> None:
    """Its bytes in a file of their own, as in submodels."""
    digest, size = hashlib.sha256(tensor.raw_data).hexdigest(), len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", digest), ("offset", "0"), ("length", str(size))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


# --- sealed


def test_a_sealed_folder_shows_nothing(tmp_path: Path) -> None:
    store = sealed(tmp_path)
    half = hashlib.sha256(WORDS + b".").hexdigest()
    write(store)
    store.put(hashlib.sha256(WORDS[1:]).hexdigest(), WORDS[1:])
    store.write(half, 0, len(WORDS) + 1, memoryview(WORDS))
    found = list(store.folder.iterdir())
    assert len(found) == 3
    for path in found:
        assert b"weights" not in path.read_bytes(), path
    assert store.read(DIGEST, 0, 10) is None
    assert list(store.loading.iterdir()) == []


def test_a_sealed_blob_lies_in_the_clear_only_while_it_is_loaded(tmp_path: Path) -> None:
    store = sealed(tmp_path)
    write(store)
    with store.opened((DIGEST,)):
        assert [path.name for path in store.loading.iterdir()] == [DIGEST]
    assert list(store.loading.iterdir()) == []
    with pytest.raises(BlobDamaged), store.opened((DIGEST, "0" * 64)):
        pytest.fail("it was opened")
    assert list(store.loading.iterdir()) == []


def test_with_another_key_nothing_is_there(tmp_path: Path) -> None:
    write(sealed(tmp_path))
    assert sealed(tmp_path, bytes(31) + b"1").missing((DIGEST,)) == (DIGEST,)


def test_a_piece_counts_only_at_its_place_of_its_blob(tmp_path: Path) -> None:
    store = sealed(tmp_path)
    write(store)
    path = store.path(DIGEST)
    head, rest = path.read_bytes()[: len(sealing._MAGIC)], path.read_bytes()[len(sealing._MAGIC) :]
    size = 4 + 12 + PIECE + 16
    first, second, more = rest[:size], rest[size : 2 * size], rest[2 * size :]
    for changed in (head + second + first + more, head + first + more, head + b"\xff" * 4 + rest):
        path.write_bytes(changed)
        with pytest.raises(OSError, match="sealed"):
            list(store._files.blocks(path))
    path.write_bytes(head + first + second)  # all sound, but not all
    with pytest.raises(BlobDamaged), store.opened((DIGEST,)):
        pytest.fail("it was opened")
    other = path.with_name("0" * 64)
    other.write_bytes(head + rest)
    with pytest.raises(OSError, match="sealed"):
        list(store._files.blocks(other))
    path.write_bytes(head + rest)
    assert b"".join(store._files.blocks(path)) == WORDS


def _key_file(tmp_path: Path, data: bytes = b"k" * 32) -> Path:
    path = tmp_path / "elsewhere" / "key"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def test_what_cannot_be_opened_is_removed_at_the_start(tmp_path: Path) -> None:
    state = tmp_path / "state"
    hold_folder(state)
    write(BlobStore(state / "blobs", sole=True))  # in the clear, of before
    store = sealed_store(state, str(_key_file(tmp_path)))
    assert list(store.folder.iterdir()) == []
    write(store)
    again = sealed_store(state, str(_key_file(tmp_path)))
    assert again.missing((DIGEST,)) == () and again.load(DIGEST) == WORDS
    ephemeral = sealed_store(state, "")
    assert list(ephemeral.folder.iterdir()) == []
    write(ephemeral)
    (ephemeral.loading / "left").write_bytes(WORDS)  # of one that is killed
    last = sealed_store(state, "")
    assert list(last.folder.iterdir()) == [] and list(last.loading.iterdir()) == []
    assert sealing._is_in_memory(last.loading) and last.loading.stat().st_mode & 0o77 == 0
    last.loading.rmdir()


def test_a_key_that_would_protect_nothing_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    hold_folder(state)
    inside = state / "key"
    inside.write_bytes(b"k" * 32)
    inside.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(inside)
    for path in (inside, link):
        with pytest.raises(ConfigurationError, match="beside what it protects"):
            sealed_store(state, str(path))
    with pytest.raises(ConfigurationError, match="No such file") as caught:
        sealed_store(state, str(tmp_path / "none"))
    assert "urandom" in caught.value.hint
    for data in (b"k" * 31, b"", b"k" * 4097):
        with pytest.raises(ConfigurationError, match="32 to 4096"):
            sealed_store(state, str(_key_file(tmp_path, data)))
    _key_file(tmp_path).chmod(0o640)
    with pytest.raises(AuthError, match="640"):
        sealed_store(state, str(tmp_path / "elsewhere" / "key"))


def test_another_user_s_folder_in_memory_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can make a link of that name in /dev/shm."""
    folder = sealing._loading_folder(tmp_path)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    try:
        with pytest.raises(ConfigurationError, match=r"cannot make .*File exists"):
            sealing._loading_folder(tmp_path)
    finally:
        folder.unlink()
    monkeypatch.setattr(sealing, "_is_in_memory", lambda path: False)
    with pytest.raises(ConfigurationError, match="in memory"):
        sealing._loading_folder(tmp_path)


# --- forgetting


def _state(tmp_path: Path) -> Path:
    state = tmp_path / "worker"
    store = BlobStore(state / "blobs", sole=True)
    write(store)
    (store.folder / "prepare-x").mkdir()
    for name in ("identity.json", "keyring.json", "signer.json", "token", "lock", "profile.json"):
        (state / name).write_text("{}")
    return state


def test_a_device_forgets_all_that_is_its_own(tmp_path: Path) -> None:
    state = _state(tmp_path)
    assert forget(state) == ()
    assert not state.exists()
    assert forget(state) == ()  # there is nothing


def test_what_is_not_a_worker_s_stays(tmp_path: Path) -> None:
    state = _state(tmp_path)
    (state / "thesis.txt").write_text("mine")
    assert forget(state) == (state / "thesis.txt",)
    assert [path.name for path in state.iterdir()] == ["thesis.txt"]


def test_a_coordinator_or_a_running_worker_does_not_forget(tmp_path: Path) -> None:
    state = _state(tmp_path)
    lock = hold_folder(state)
    before = sorted(state.rglob("*"))
    with pytest.raises(ConfigurationError, match="another process"):
        forget(state)
    os.close(lock)
    (state / "signing.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="coordinator"):
        forget(state)
    (state / "signing.json").unlink()
    assert sorted(state.rglob("*")) == before


def test_nobody_s_folder_is_forgotten_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = _state(tmp_path)
    with pytest.raises(InvalidInput) as caught:  # no terminal
        forget_all(state, yes=False)
    assert "--yes" in caught.value.hint and (state / "identity.json").exists()
    (state / "thesis.txt").write_text("mine")
    forget_all(state, yes=True)
    assert f"{state / 'thesis.txt'} stays" in capsys.readouterr().out
    assert not (state / "identity.json").exists()
    forget_all(tmp_path / "none", yes=False)
    assert "nothing to forget" in capsys.readouterr().out


def test_two_engines_give_the_same_bits_from_a_sealed_store(tmp_path: Path) -> None:
    """Nothing of a model's weights is lost or turned on the way through memory."""
    model = small_model()
    outside: dict[str, bytes] = {}
    for tensor in model.graph.initializer:
        outside[hashlib.sha256(tensor.raw_data).hexdigest()] = tensor.raw_data
        _outside(tensor)
    answers = []
    for make in (plain, sealed):
        store = make(tmp_path / make.__name__)
        for each in outside.values():
            write(store, each)
        with store.opened(tuple(outside)):
            prepared = OrtEngine(store.loading).prepare(model.SerializeToString())
        answers.append(prepared.run(image())[0])
    assert np.array_equal(*answers)


def test_pieces_that_were_on_their_way_at_once_leave_no_memory_behind(tmp_path: Path) -> None:
    """What is freed between small things that stay is of no use to anybody else."""
    store, data = BlobStore(tmp_path), os.urandom(1 << 20)
    digest = hashlib.sha256(data).hexdigest()
    store.put(digest, data)
    hashlib.sha256(bytes(8 << 20))  # once that is freed, the allocator keeps what is smaller
    pieces, small = [], []
    for _ in range(32):
        pieces.append(store.read(digest, 0, len(data)))
        small.append(bytes(4096))
    assert pieces[-1] == (data, len(data))
    held = psutil.Process().memory_info().rss
    pieces.clear()
    assert held - psutil.Process().memory_info().rss > 24 << 20
