"""The coordinator's journal on disk: SQLite, one transaction for all that waits, in its own thread.

What SQLite has committed is there after SIGKILL. After a power cut what was committed last may be
missing, but never a deployment that was told, nor who was admitted or expelled: their commits are
synced (synchronous=FULL).
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from cluster import enrolled
from cluster.loop import start_thread
from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, ConfigurationError
from meshinfer.protocol.codec import failure_of
from meshinfer.protocol.messages import Failure
from meshinfer.scheduler.events import Event, Record, Recorded, RecordFailed, Send, Stop
from meshinfer.scheduler.ledger import (
    Accepted,
    Ended,
    Enrolled,
    Entry,
    Expelled,
    Ledger,
    Planned,
    Published,
    TokenMade,
)

FILE = "journal.sqlite"
"""In the coordinator's state folder; beside it SQLite's own ``-wal``."""

_SCHEMA = 2
"""1 knew nothing of tokens and keys; such a file is given the tables that it lacks."""

_TABLES = """
CREATE TABLE IF NOT EXISTS ids (
    number INTEGER PRIMARY KEY, request TEXT NOT NULL, body TEXT NOT NULL, outcome TEXT,
    failure BLOB);
CREATE TABLE IF NOT EXISTS models (
    name TEXT NOT NULL, version INTEGER NOT NULL, entry BLOB NOT NULL,
    PRIMARY KEY (name, version));
CREATE TABLE IF NOT EXISTS plans (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL, version INTEGER NOT NULL,
    signature BLOB NOT NULL, entry BLOB NOT NULL, UNIQUE (name, version, signature));
CREATE TABLE IF NOT EXISTS life (starts INTEGER NOT NULL, tries INTEGER NOT NULL);
"""
_KEPT = 2 * limits.JOURNALED_IDS
"""Rows of ids: each has one when it is accepted and one when it ends."""

_TRIM_EVERY = 512
_WAL_HEADER, _WAL_FRAME = 32, 24
_JOIN_S = 5.0


class Journal:
    """Opened by one process at a time; any one thread may commit. ``ledger``: what was in it.

    Raises ``ConfigurationError`` for a file that is damaged, of another release, or that cannot be
    written; it is left as it is. ``wall``: seconds of the wall clock, for tokens.
    """

    def __init__(self, path: Path, wall: Callable[[], float] = time.time) -> None:
        self.path, self._wall = path, wall
        unfinished = _frames(path)
        try:
            self._database = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=1.0
            )
            try:
                self.ledger = self._begin(unfinished)
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._database.close()
                raise
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise _unusable(path, error) from error

    def _begin(self, frames: int) -> Ledger:
        run = self._database.execute
        run(f"PRAGMA page_size={limits.JOURNAL_PAGE_BYTES}")  # of a new file
        # No other process looks in, so no memory is shared: that file could outgrow a full disk.
        run("PRAGMA locking_mode=EXCLUSIVE")
        (mode,) = run("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise sqlite3.OperationalError(f"its journal mode is {mode}, not wal")
        run("PRAGMA synchronous=NORMAL")
        run(f"PRAGMA wal_autocheckpoint={limits.JOURNAL_WAL_PAGES}")
        run(f"PRAGMA cache_size=-{limits.JOURNAL_CACHE_BYTES // 1024}")  # by itself 2 MB, in time
        (schema,) = run("PRAGMA user_version").fetchone()
        if not 0 <= schema <= _SCHEMA:  # 0: it is new
            raise sqlite3.DatabaseError(f"it is of another release of MeshInfer (form {schema})")
        problems = [row[0] for row in run("PRAGMA quick_check(1)").fetchall()]
        if problems != ["ok"]:
            raise sqlite3.DatabaseError(problems[0])
        _, valid, _ = run("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if frames > max(0, valid):
            structlog.get_logger().warning(
                "the journal's last write was not finished; what was committed before is there",
                journal=str(self.path),
                pages=frames - max(0, valid),
            )
        run("BEGIN IMMEDIATE")
        for statement in (_TABLES + enrolled.TABLES).split(";"):
            run(statement)
        run(f"PRAGMA user_version={_SCHEMA}")
        ledger = self._read()
        run("INSERT INTO life SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM life)")
        run("UPDATE life SET starts = ?", (ledger.starts,))
        run("COMMIT")
        return ledger

    def _read(self) -> Ledger:
        """As the coordinator that starts now may use it."""
        run = self._database.execute
        starts = run("SELECT starts FROM life").fetchone() or (0,)
        ledger = Ledger(starts=starts[0] + 1)
        for (entry,) in run("SELECT entry FROM models ORDER BY name, version"):
            ledger.apply([msgspec.json.decode(entry, type=Published)])
        for (entry,) in run("SELECT entry FROM plans ORDER BY number"):
            ledger.apply([msgspec.json.decode(entry, type=Planned)])
        ledger.apply(list(enrolled.read(self._database, self._wall())))
        rows = run("SELECT request, body, outcome, failure FROM ids ORDER BY number")
        ledger.apply([_id_of(*row) for row in rows])
        (self._number,) = run("SELECT coalesce(max(number), 0) FROM ids").fetchone()
        self._trimmed = self._number
        return ledger

    def commit(self, entries: Sequence[Entry]) -> None:
        """Write them all, or none; nothing to write is tried as well. Raises ``sqlite3.Error``."""
        number = self._number
        rows, others = [], []
        plans: dict[Hashable, Planned] = {}
        for entry in entries:
            match entry:
                case Planned():
                    plans.pop(entry.key, None)
                    plans[entry.key] = entry
                case Accepted() | Ended():
                    number += 1
                    rows.append((number, *_row_of(entry)))
                case _:
                    others.append(entry)
        run = self._database.execute
        if others:
            run("PRAGMA synchronous=FULL")
        try:
            run("BEGIN IMMEDIATE")
            self._database.executemany("INSERT INTO ids VALUES (?, ?, ?, ?, ?)", rows)
            for other in others:
                self._write_other(other)
            for plan in plans.values():
                self._write_plan(plan)
            if not entries:
                run("UPDATE life SET tries = tries + 1")
            trims = number >= self._trimmed + _TRIM_EVERY
            if trims:
                run("DELETE FROM ids WHERE number <= ?", (number - _KEPT,))
            run("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                if self._database.in_transaction:
                    run("ROLLBACK")
            raise
        finally:
            if others:
                run("PRAGMA synchronous=NORMAL")
        self._number = number
        if trims:
            self._trimmed = number

    def _write_other(self, entry: Published | TokenMade | Enrolled | Expelled) -> None:
        if isinstance(entry, Published):
            self._write_model(entry)
        else:
            enrolled.write(self._database, entry, self._wall())

    def _write_model(self, entry: Published) -> None:
        run = self._database.execute
        row = (entry.name, entry.version, msgspec.json.encode(entry))
        run("INSERT OR REPLACE INTO models VALUES (?, ?, ?)", row)
        run(
            "DELETE FROM models WHERE name = ? AND version NOT IN"
            " (SELECT version FROM models WHERE name = ? ORDER BY version DESC LIMIT ?)",
            (entry.name, entry.name, limits.VERSIONS_PER_MODEL),
        )

    def _write_plan(self, entry: Planned) -> None:
        run = self._database.execute
        key = (entry.name, entry.version, msgspec.json.encode(entry.signature))
        run("DELETE FROM plans WHERE name = ? AND version = ? AND signature = ?", key)
        run(
            "INSERT INTO plans (name, version, signature, entry) VALUES (?, ?, ?, ?)",
            (*key, msgspec.json.encode(entry)),
        )
        run(
            "DELETE FROM plans WHERE number NOT IN"
            " (SELECT number FROM plans ORDER BY number DESC LIMIT ?)",
            (limits.JOURNALED_PLANS,),
        )

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # all that counts is committed
            self._database.close()


def _row_of(entry: Accepted | Ended) -> tuple[str, str, str | None, bytes | None]:
    if isinstance(entry, Accepted):
        return entry.request, entry.body, None, None
    failure = None if entry.failure is None else msgspec.json.encode(entry.failure)
    return entry.request, entry.body, entry.outcome, failure


def _id_of(request: str, body: str, outcome: str | None, failure: bytes | None) -> Entry:
    if outcome is None:
        return Accepted(request, body)
    decoded = None if failure is None else msgspec.json.decode(failure, type=Failure)
    return Ended(request, body, outcome, decoded)


def _frames(path: Path) -> int:
    """How many pages a process that was killed has begun to write since the last checkpoint: those
    of the write-ahead log with its header's salts (sqlite.org/fileformat2.html#walformat)."""
    try:
        data = path.with_name(f"{path.name}-wal").read_bytes()
    except OSError:
        return 0
    salts, found = data[16:24], 0
    step = _WAL_FRAME + int.from_bytes(data[8:12])
    for start in range(_WAL_HEADER, len(data), step):
        if data[start + 8 : start + 16] != salts[: max(0, len(data) - start - 8)]:
            break
        found += 1
    return found


def _unusable(path: Path, error: Exception) -> ConfigurationError:
    """Why a coordinator cannot begin with its journal. Nothing is thrown away unasked."""
    code = getattr(error, "sqlite_errorname", "")
    if code.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):
        return ConfigurationError(
            f"the journal {path} cannot be written: {error}",
            hint=f"make room on the disk of {path.parent}, and make its files writable",
        )
    if code.startswith("SQLITE_BUSY"):
        return ConfigurationError(
            f"another process has the journal {path} open", hint="end it, then start again"
        )
    return ConfigurationError(
        f"the journal {path} is damaged: {error}",
        hint=f"put a copy back, or move {path}* away to begin with an empty one: models must then "
        "be deployed again, devices and clients join again, and ids of requests from before are "
        "not known any more",
    )


def not_written(path: Path, error: sqlite3.Error) -> Failure:
    """What is told of a commit that failed, to clients as well."""
    failure = failure_of(
        ClusterUnavailable(
            f"the coordinator cannot write its journal: {error}",
            hint=f"make room on the disk of {path.parent} at the coordinator, or see its log; "
            "requests are accepted again as soon as it can be written",
        )
    )
    return msgspec.structs.replace(failure, retry_after_s=limits.JOURNAL_RETRY_S)


class Posting(Protocol):
    """How events get into the coordinator's loop; it need not be woken for all of them."""

    def __call__(self, item: Event | Send | Stop, /, *, wake: bool = True) -> None: ...


class JournalThread:
    """Commits beside the loop, with everything that has come in meanwhile in one transaction."""

    def __init__(self, journal: Journal, post: Posting) -> None:
        self._journal, self._post = journal, post
        self._records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._thread = start_thread("journal", self._run, post)

    def put(self, effect: Record) -> None:
        self._records.put(effect)

    def close(self) -> None:
        """Write what was handed in, and close the file."""
        self._records.put(None)
        self._thread.join(timeout=_JOIN_S)

    def _run(self) -> None:
        going_on = True
        while going_on:
            batch = [self._records.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._records.get_nowait())
            records = [record for record in batch if record is not None]
            going_on = len(records) == len(batch)
            if records:
                self._write(records)
        self._journal.close()

    def _write(self, records: Sequence[Record]) -> None:
        number = records[-1].number
        try:
            self._journal.commit([entry for record in records for entry in record.entries])
        except sqlite3.Error as error:
            self._post(RecordFailed(number, not_written(self._journal.path, error)))
            return
        self._post(Recorded(number), wake=any(record.awaited for record in records))
