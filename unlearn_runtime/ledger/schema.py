"""The tables of a ledger file, and how a file of an older version becomes one of this version."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache

from rdp_calc.errors import DataError


class DamagedLedger(DataError):
    """A file that SQLite cannot read as a database, or that says what no ledger says."""


#: What marks a SQLite file as a ledger, "RdpL" in ASCII.
APPLICATION_ID = 0x5264704C

Migration = Callable[[sqlite3.Connection], None]


def _first(connection: sqlite3.Connection) -> None:
    """``entries`` is the ledger; ``request``, ``record`` and ``release`` repeat what it says, for speed; ``head`` is
    what nobody without the secret can write; ``folder`` says where folders lay when they were last seen, and nothing
    rests on it.
    """
    for statement in (
        "CREATE TABLE entries (number INTEGER PRIMARY KEY CHECK (number >= 1), kind TEXT NOT NULL, body TEXT NOT NULL,"
        " hash BLOB NOT NULL CHECK (length(hash) = 32))",
        "CREATE TRIGGER entries_follow BEFORE INSERT ON entries"
        " WHEN NEW.number IS NOT (SELECT coalesce(max(number), 0) + 1 FROM entries)"
        " BEGIN SELECT RAISE(ABORT, 'an entry must follow the last one'); END",
        "CREATE TRIGGER entries_stay BEFORE UPDATE ON entries"
        " BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END",
        "CREATE TRIGGER entries_remain BEFORE DELETE ON entries"
        " BEGIN SELECT RAISE(ABORT, 'entries are never removed'); END",
        "CREATE TABLE head (one INTEGER PRIMARY KEY CHECK (one = 1), count INTEGER NOT NULL, hash BLOB NOT NULL,"
        " mac BLOB NOT NULL)",
        "CREATE TABLE release (number INTEGER PRIMARY KEY, plan_entry INTEGER NOT NULL REFERENCES entries,"
        " execution_entry INTEGER REFERENCES entries, certificate_entry INTEGER REFERENCES entries,"
        " records INTEGER NOT NULL, turns INTEGER, noise REAL NOT NULL, mu REAL, plan_digest TEXT NOT NULL,"
        " state_fingerprint TEXT, level TEXT)",
        "CREATE TABLE request (number INTEGER PRIMARY KEY, entry INTEGER NOT NULL REFERENCES entries,"
        " records INTEGER NOT NULL, received TEXT NOT NULL, due TEXT, planned INTEGER REFERENCES release,"
        " release INTEGER REFERENCES release)",
        "CREATE INDEX pending ON request (number) WHERE release IS NULL",
        "CREATE INDEX planned ON request (planned) WHERE release IS NULL AND planned IS NOT NULL",
        "CREATE INDEX due ON request (due) WHERE release IS NULL AND due IS NOT NULL",
        "CREATE TABLE record (hash BLOB PRIMARY KEY, request INTEGER NOT NULL REFERENCES request) WITHOUT ROWID",
        "CREATE TABLE folder (what TEXT PRIMARY KEY, path TEXT NOT NULL) WITHOUT ROWID",
    ):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


#: The function at position v brings a file from version v to version v + 1.
MIGRATIONS: tuple[Migration, ...] = (_first,)

#: Tables that repeat the entries, and by what their rows are ordered.
DERIVED = {"request": "number", "record": "hash", "release": "number"}


def version(connection: sqlite3.Connection) -> int:
    """The version of the tables in the file."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def check_version(connection: sqlite3.Connection, path: object, *, tables: bool = True) -> int:
    """The version of a ledger file. Raises DataError for another SQLite file, for a version this one cannot read, and
    with ``tables`` for one whose tables, views, triggers and indices are not those of its version: a trigger can be a
    query that never ends.
    """
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise DataError(f"{path} is not a ledger.")
    found = version(connection)
    if not 1 <= found <= len(MIGRATIONS):
        raise DataError(
            f"{path} is a ledger of version {found}; this rdp-calc reads up to {len(MIGRATIONS)}: install a newer one."
        )
    odd = differences(connection, found) if tables else []
    if odd:
        raise DataError(
            f"{path} is damaged: its tables are not those of a ledger; changed, missing or added: {listed(odd)}."
        )
    return found


def differences(connection: sqlite3.Connection, version_found: int) -> list[str]:
    """Names of what is in the file and not in a ledger of this version, or is there another."""
    required, allowed = _expected(version_found)
    stored = set(connection.execute(_ALL))
    return sorted({str(row[1]) for row in (stored - allowed) | (required - stored)})


def listed(names: list[str]) -> str:
    """Names from a file, as far as they may be shown."""
    return "".join(letter if letter.isprintable() else "?" for letter in ", ".join(names))[:200]


_ALL = "SELECT type, name, tbl_name, sql FROM sqlite_master"

Rows = frozenset[tuple[str | None, ...]]


@cache
def _expected(version_found: int) -> tuple[Rows, Rows]:
    """What must be in a ledger of a version, and what may be, which is also the statistics that ANALYZE leaves."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
        for migration in MIGRATIONS[:version_found]:
            migration(copy)
        required = frozenset(copy.execute(_ALL))
        copy.execute("ANALYZE")
        return required, required | frozenset(copy.execute(_ALL))


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring the file to the newest version, each step in a transaction of its own: it is taken whole or not at all.

    ``connection`` must be in autocommit mode.
    """
    while (found := version(connection)) < len(migrations):
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have done it while this one waited.
            if version(connection) == found:
                migrations[found](connection)
                connection.execute(f"PRAGMA user_version = {found + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
