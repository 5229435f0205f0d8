"""The journal's tables of tokens and keys: who is admitted, and by what somebody may yet be.

Until when a token is good is here by the wall clock, since no other outlives a process: nowhere
else. A clock that was set back gives a token no more than the time that it was made for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import msgspec

from meshinfer.scheduler.ledger import Enrolled, Expelled, TokenMade

TABLES = """
CREATE TABLE IF NOT EXISTS tokens (
    number INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, role TEXT NOT NULL, ttl_s REAL NOT NULL,
    expires REAL NOT NULL, reusable INTEGER NOT NULL, maker TEXT NOT NULL, spent INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS keys (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, name TEXT NOT NULL, role TEXT NOT NULL,
    token TEXT NOT NULL);
"""


def read(database: sqlite3.Connection, wall: float) -> Iterator[TokenMade | Enrolled]:
    """As they are at this time of the wall clock: keys first, since what is said of a token later
    holds. Raises ``msgspec.ValidationError``."""
    for key, name, role, by in database.execute(
        "SELECT key, name, role, token FROM keys ORDER BY number"
    ):
        admission = {"key": key, "name": name, "role": role}
        yield msgspec.convert({"admission": admission, "token": by}, Enrolled)
    for hash_, role, ttl_s, expires, reusable, maker, spent in database.execute(
        "SELECT hash, role, ttl_s, expires, reusable, maker, spent FROM tokens ORDER BY number"
    ):
        token = {
            "hash": hash_,
            "role": role,
            "ttl_s": max(0.0, min(ttl_s, expires - wall)),
            "reusable": bool(reusable),
            "maker": maker,
            "spent": bool(spent),
        }
        yield msgspec.convert(token, TokenMade)


def write(
    database: sqlite3.Connection, entry: TokenMade | Enrolled | Expelled, wall: float
) -> None:
    """Within the caller's transaction. As ``Ledger.apply`` has it."""
    run = database.execute
    match entry:
        case TokenMade():
            run("DELETE FROM tokens WHERE hash IN (?, ?)", (entry.instead_of, entry.hash))
            until = (entry.ttl_s, wall + entry.ttl_s)
            run(
                "INSERT INTO tokens (hash, role, ttl_s, expires, reusable, maker, spent)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (entry.hash, entry.role, *until, entry.reusable, entry.maker, entry.spent),
            )
        case Enrolled(admission, token):
            run("DELETE FROM keys WHERE key = ?", (admission.key,))
            run(
                "INSERT INTO keys (key, name, role, token) VALUES (?, ?, ?, ?)",
                (admission.key, admission.name, admission.role, token),
            )
            run("UPDATE tokens SET spent = 1 WHERE hash = ? AND NOT reusable", (token,))
        case Expelled(key):
            run(
                "UPDATE tokens SET spent = 1 WHERE maker = ?"
                " OR hash IN (SELECT token FROM keys WHERE key = ?)",
                (key, key),
            )
            run("DELETE FROM keys WHERE key = ?", (key,))
