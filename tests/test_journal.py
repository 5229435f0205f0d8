"""The journal's file: it keeps what it said it has, whatever happens to its process or its disk."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.journal import FILE, Journal, JournalThread
from meshinfer import limits
from meshinfer.errors import ConfigurationError
from meshinfer.protocol import messages as m
from meshinfer.scheduler.events import Record, Recorded, RecordFailed
from meshinfer.scheduler.ledger import (
    Accepted,
    Ended,
    Enrolled,
    Entry,
    Expelled,
    Ledger,
    Planned,
    Published,
    Signature,
    TokenMade,
)

BODY = "0123456789abcdef" * 2
FAILED = m.Failure(error="DeadlineExceeded", message="no answer", hint="wait", retry_after_s=1.5)


def model(name: str = "net", version: int = 1) -> Published:
    deploy = m.Deploy(
        call="call-1",
        name=name,
        digest="a" * 64,
        nbytes=10,
        weights=(m.Blob(digest="b" * 64, nbytes=5),),
        plan="plan graph=",
        image='{"colour":"RGB"}',
        shapes={"x": (1, 3, 8, 8)},
        objective="throughput",
        spread=True,
        half_transfers=True,
        pin={"x": ("pi-1", "pi-2")},
        memory={"pi-1": 1 << 30},
    )
    inputs = {"x": ("<f4", (1, 3, None, None)), "rank": ("<i8", None)}
    return Published(version, "ann#1", deploy, inputs, {"y": ("x", "rank")}, '{"colour":"RGB"}')


def plan(name: str = "net", version: int = 1, side: int = 8) -> Planned:
    program = m.Program(
        place=(0, 1), model="c" * 64, weights=("d" * 64,), inputs=(), outputs=(), sends=()
    )
    return Planned(
        name=name,
        version=version,
        signature=Signature(False, (("x", (1, 3, side, side)),), ("y",)),
        head="head",
        candidates=("pi-1", "pi-2"),
        grants={"pi-1": 1 << 30},
        plan="plan graph=",
        programs={"pi-1": (program,), "head": ()},
        report=None,
        window=2,
        expected=(((0, 1), "pi-1", 0.25),),
    )


WALL = 1e9
KEYS, HASHES = ("k" * 40, "q" * 40), ("1" * 64, "2" * 64)
ROLES = st.sampled_from(["worker", "client", "admin"])


def enrolled(key: str, name: str, role: str, token: str) -> Enrolled:
    return Enrolled(m.Admission(key=key, name=name, role=role), token)  # type: ignore[arg-type]


NAMES = st.sampled_from(["a", "b", "é\n'\"", "x" * 40])
ENTRIES = st.one_of(
    st.builds(Accepted, NAMES, st.just(BODY)),
    st.builds(Ended, NAMES, st.just(BODY), st.just("f" * 32), st.sampled_from([None, FAILED])),
    st.builds(plan, st.sampled_from(["net", "other"]), st.integers(1, 3), st.integers(1, 3)),
    st.builds(
        TokenMade,
        st.sampled_from(HASHES),
        ROLES,
        st.integers(0, 900).map(float),
        st.booleans(),
        st.sampled_from(["", *KEYS]),
        st.sampled_from(["", *HASHES]),
    ),
    st.builds(enrolled, st.sampled_from(KEYS), NAMES, ROLES, st.sampled_from(["", *HASHES])),
    st.builds(Expelled, st.sampled_from(KEYS)),
)


def content(ledger: Ledger) -> tuple[object, ...]:
    ids, plans = list(ledger.requests.items()), list(ledger.plans.items())
    return ids, ledger.models, plans, list(ledger.tokens.items()), ledger.enrolled


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(st.lists(ENTRIES | st.just(None), max_size=6), max_size=6))
def test_it_holds_what_a_ledger_holds(tmp_path: Path, batches: list[list[Entry | None]]) -> None:
    """``None`` stands for the next version of a model; closed, and opened again, now and then."""
    path = tmp_path / f"{time.monotonic_ns()}.sqlite"
    expected, versions = Ledger(), 0
    journal = Journal(path, lambda: WALL)
    for i, batch in enumerate(batches):
        entries: list[Entry] = []
        for entry in batch:
            versions += entry is None
            entries.append(entry or model(version=versions))
        journal.commit(entries)
        expected.apply(entries)
        if i % 2:
            journal.close()
            journal = Journal(path, lambda: WALL)
            assert content(journal.ledger) == content(expected)
    journal.close()
    last = Journal(path, lambda: WALL)
    assert content(last.ledger) == content(expected)
    assert last.ledger.starts == 2 + len(batches) // 2
    last.close()


def test_a_token_lives_by_the_wall_clock_and_no_longer_than_it_was_made_for(tmp_path: Path) -> None:
    """Also by one that is set back, as that of a Pi which has none when it is powered off."""
    token = TokenMade("1" * 64, "worker", 900.0, reusable=True)
    journal = Journal(tmp_path / FILE, lambda: WALL)
    journal.commit([token])
    journal.close()
    for at, left in ((WALL + 600.0, 300.0), (WALL + 901.0, 0.0), (WALL - 5000.0, 900.0)):
        journal = Journal(tmp_path / FILE, lambda at=at: at)  # type: ignore[misc]
        (found,) = journal.ledger.tokens.values()
        assert (found.ttl_s, found.spent, found.reusable) == (left, False, True)
        journal.close()


def test_who_is_expelled_takes_its_tokens_along(tmp_path: Path) -> None:
    by, made, other = (TokenMade(c * 64, "worker", 900.0, reusable=True) for c in "123")
    made = dataclasses.replace(made, maker=KEYS[0])
    entries = [by, made, other, enrolled(KEYS[0], "pi", "admin", by.hash), Expelled(KEYS[0])]
    journal, expected = Journal(tmp_path / FILE), Ledger()
    journal.commit(entries)
    expected.apply(entries)
    journal.close()
    ledger = Journal(tmp_path / FILE).ledger
    for found in (ledger, expected):
        assert [token.spent for token in found.tokens.values()] == [True, True, False]
        assert not found.enrolled


def test_a_file_of_the_release_before_is_taken_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path / FILE)
    journal.commit([model(), plan(), Accepted("r", BODY), Ended("r", BODY, "f" * 32)])
    before = content(journal.ledger)
    journal.close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as other:  # as form 1 was
        other.execute("DROP TABLE tokens")
        other.execute("DROP TABLE keys")
        other.execute("PRAGMA user_version=1")
        other.commit()
    journal = Journal(tmp_path / FILE)
    assert content(journal.ledger) != before and journal.ledger.models and journal.ledger.plans
    assert list(journal.ledger.requests) == ["r"] and not journal.ledger.enrolled
    journal.commit([enrolled(KEYS[0], "pi", "worker", "")])
    journal.close()
    last = Journal(tmp_path / FILE)
    assert set(last.ledger.enrolled) == {KEYS[0]}
    last.close()


@pytest.mark.parametrize(
    "change", ["UPDATE keys SET role = 'king'", "UPDATE keys SET key = 'short'"]
)
def test_keys_that_make_no_sense_are_not_believed(tmp_path: Path, change: str) -> None:
    journal = Journal(tmp_path / FILE)
    journal.commit([enrolled(KEYS[0], "pi", "worker", "")])
    journal.close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as other:
        other.execute(change)
        other.commit()
    with pytest.raises(ConfigurationError, match="is damaged"):
        Journal(tmp_path / FILE)


def test_it_keeps_no_more_ids_than_its_bound_and_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.journal._KEPT", 40)
    monkeypatch.setattr("cluster.journal._TRIM_EVERY", 10)
    journal = Journal(tmp_path / FILE)
    for i in range(500):
        journal.commit([Accepted(f"r{i}", BODY)])
    journal.close()
    kept = list(Journal(tmp_path / FILE).ledger.requests)
    assert kept == [f"r{i}" for i in range(500 - len(kept), 500)]
    assert 40 <= len(kept) <= 60


# --- its process is killed ------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from cluster.journal import Journal
from meshinfer.scheduler.ledger import Accepted, Ended
journal, number = Journal(Path(sys.argv[1])), int(sys.argv[2])
while True:
    batch = [Accepted(f"r{number + i}", "b" * 32) for i in range(number % 7 + 1)]
    journal.commit(batch)
    number += len(batch)
    print(number, flush=True)
"""


def write_until_killed(path: Path, first: int, after_s: float) -> int:
    """SIGKILL a process that commits; the first number that it did not acknowledge."""
    command = [sys.executable, "-c", WRITER, str(path), str(first)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = int(process.stdout.readline())
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    lines = [line for line in process.stdout.read().split("\n")[:-1] if line]
    process.wait()
    process.stdout.close()
    return int(lines[-1]) if lines else acknowledged


def test_what_was_acknowledged_is_there_after_sigkill(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / FILE
    acknowledged = 0
    for _ in range(6):
        acknowledged = write_until_killed(path, acknowledged, rng.uniform(0, 0.05))
        journal = Journal(path)
        names = list(journal.ledger.requests)
        journal.close()
        newest = [f"r{i}" for i in range(acknowledged)][-limits.JOURNALED_IDS // 2 :]
        assert set(newest) <= set(names)
        acknowledged = max(acknowledged, 1 + max(int(name[1:]) for name in names))


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, int]:
    """A journal as a killed process left it, its log not yet in the database; how many ids."""
    path = tmp_path / FILE
    count = write_until_killed(path, 0, 0.01)
    assert (tmp_path / f"{FILE}-wal").stat().st_size > 4096
    return path, count


@pytest.mark.parametrize("tail", [b"", b"\0" * 700, os.urandom(3000), b"again"])
def test_an_unfinished_write_behind_the_last_commit_loses_nothing(
    killed: tuple[Path, int], tail: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path, count = killed
    log = path.with_name(f"{FILE}-wal")
    data = log.read_bytes()
    if tail == b"again":  # a page with the right salts whose end was not written
        tail = data[32 : 32 + 24 + 500]
    log.write_bytes(data + tail)
    journal = Journal(path)
    assert len(journal.ledger.requests) >= count
    journal.close()


def test_a_log_that_was_torn_anywhere_opens_with_what_is_before_the_tear(
    killed: tuple[Path, int], tmp_path: Path
) -> None:
    """Truncated at forty places, as by a power cut; never an error, always a prefix of commits."""
    path, _ = killed
    database, log = path.read_bytes(), path.with_name(f"{FILE}-wal").read_bytes()
    rng = random.Random(2)
    sizes = []
    for i, length in enumerate(sorted(rng.randrange(len(log)) for _ in range(40))):
        torn = tmp_path / f"torn-{i}"
        torn.write_bytes(database)
        torn.with_name(f"{torn.name}-wal").write_bytes(log[:length])
        journal = Journal(torn)
        names = [int(name[1:]) for name in journal.ledger.requests]
        assert names == list(range(len(names)))
        sizes.append(len(names))
        journal.commit([Accepted("new", BODY)])
        journal.close()
    assert sizes == sorted(sizes) and sizes[-1] > 0


def test_a_torn_tail_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it lies on the disk while it is open, and before the log begins anew in the same file."""
    path, torn = tmp_path / FILE, tmp_path / "torn"
    journal = Journal(path)
    for i in range(5):
        journal.commit([Accepted(f"r{i}", BODY)])
    torn.write_bytes(path.read_bytes())
    log = path.with_name(f"{FILE}-wal").read_bytes()
    torn.with_name("torn-wal").write_bytes(log[:-300])
    journal.close()
    Journal(torn).close()
    out = capsys.readouterr()
    assert "last write was not finished" in out.out + out.err


@pytest.mark.parametrize("how", ["zeroed", "truncated", "not a database", "of another release"])
def test_a_damaged_file_ends_the_start_with_words_and_is_left_alone(
    tmp_path: Path, how: str
) -> None:
    path = tmp_path / FILE
    journal = Journal(path)
    journal.commit([Accepted(f"r{i}", BODY) for i in range(500)])
    journal.close()
    data = path.read_bytes()
    match how:
        case "zeroed":
            path.write_bytes(data[:2048] + b"\0" * 8192 + data[2048 + 8192 :])
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "not a database":
            path.write_bytes(b"what is this?" * 1000)
        case _:
            other = sqlite3.connect(path)
            other.execute("PRAGMA user_version=99")
            other.close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError) as caught:
        Journal(path)
    assert str(path) in caught.value.message and caught.value.hint
    assert path.read_bytes() == before


def test_two_processes_never_share_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / FILE)
    with pytest.raises(ConfigurationError, match="another process"):
        Journal(tmp_path / FILE)
    journal.close()


# --- its disk ------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small file system here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_a_commit_whole_and_keeps_what_was_committed(tiny: Path) -> None:
    journal = Journal(tiny / FILE)
    batch = [Accepted(f"r{i}", BODY) for i in range(5)]
    kept = 0
    for _ in range(1000):
        try:
            journal.commit(batch)
        except sqlite3.OperationalError:
            break
        kept += 5
        batch = [Accepted(f"r{kept + i}", BODY) for i in range(5)]
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny)], check=True)
    journal.commit([Accepted("later", BODY)])
    journal.close()
    found = list(Journal(tiny / FILE).ledger.requests)
    assert found == [*(f"r{i}" for i in range(kept)), "later"] and 100 < kept < 5000


def test_a_coordinator_does_not_start_on_a_full_disk_and_says_so(tiny: Path) -> None:
    (tiny / "filler").write_bytes(b"x" * (252 << 10))
    with pytest.raises(ConfigurationError) as caught:
        Journal(tiny / FILE)
    assert "cannot be written" in caught.value.message and "room" in caught.value.hint


def test_a_disk_that_can_only_be_read_is_said_so(tiny: Path) -> None:
    journal = Journal(tiny / FILE)
    journal.commit([Accepted("r", BODY)])
    journal.close()
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    with pytest.raises(ConfigurationError) as caught:
        Journal(tiny / FILE)
    assert "cannot be written" in caught.value.message
    subprocess.run(["mount", "-o", "remount,rw", str(tiny)], check=True)
    assert list(Journal(tiny / FILE).ledger.requests) == ["r"]


def test_a_file_that_may_not_grow_fails_in_words_and_works_again_later(tmp_path: Path) -> None:
    """By the process's own limit: no root, no mount."""
    journal = Journal(tmp_path / FILE)
    posted: list[Recorded | RecordFailed] = []
    thread = JournalThread(journal, lambda item, /, *, wake=True: posted.append(item))  # type: ignore[arg-type]

    def answer(record: Record) -> Recorded | RecordFailed:
        before = len(posted)
        thread.put(record)
        for _ in range(500):
            if len(posted) > before:
                return posted[-1]
            time.sleep(0.01)
        raise AssertionError("no answer")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        failed = None
        for number in range(1, 400):
            said = answer(Record(number, (Accepted(f"r{number}", BODY),)))
            if isinstance(said, RecordFailed):
                failed = said
                break
        assert failed is not None and failed.number == number
        assert failed.failure.error == "ClusterUnavailable" and failed.failure.hint
        assert failed.failure.retry_after_s == limits.JOURNAL_RETRY_S
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert answer(Record(number, ())) == Recorded(number)
    assert answer(Record(number + 1, (Accepted("later", BODY),))) == Recorded(number + 1)
    thread.close()
    found = list(Journal(tmp_path / FILE).ledger.requests)
    assert found == [*(f"r{i}" for i in range(1, number)), "later"]


def test_all_that_waits_is_written_in_one_commit(tmp_path: Path) -> None:
    """A hundred records handed in at once; who awaits one is woken, and told of all before it."""
    journal = Journal(tmp_path / FILE)
    commits: list[int] = []
    original = journal.commit

    def counted(entries: list[Entry]) -> None:
        time.sleep(0.02)
        commits.append(len(entries))
        original(entries)

    journal.commit = counted  # type: ignore[method-assign,assignment]
    posted: list[tuple[object, bool]] = []
    thread = JournalThread(journal, lambda item, /, *, wake=True: posted.append((item, wake)))
    for number in range(1, 101):
        thread.put(Record(number, (Accepted(f"r{number}", BODY),), awaited=number == 100))
    thread.close()
    assert sum(commits) == 100 and len(commits) < 10
    assert posted[-1] == (Recorded(100), True)
    assert not any(wake for _, wake in posted[:-1])
