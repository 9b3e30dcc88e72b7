"""The tables of a ledger file, and how a file of an older version becomes one of this version."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing

from rdp_calc.errors import DataError

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


def check_version(connection: sqlite3.Connection, path: object) -> int:
    """The version of a ledger file. Raises DataError for another SQLite file and for a version this one cannot read."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise DataError(f"{path} is not a ledger.")
    found = version(connection)
    if not 1 <= found <= len(MIGRATIONS):
        raise DataError(
            f"{path} is a ledger of version {found}; this rdp-calc reads up to {len(MIGRATIONS)}: install a newer one."
        )
    _check_tables(connection, path, found)
    return found


def _check_tables(connection: sqlite3.Connection, path: object, version_found: int) -> None:
    """Raise DataError where something else stands in the place of a table: a view can be a query that never ends."""
    query = "SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'view') AND substr(name, 1, 7) <> 'sqlite_'"
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
        for migration in MIGRATIONS[:version_found]:
            migration(copy)
        expected = {str(name).lower(): sql for name, sql in copy.execute(query)}
    for name, sql in connection.execute(query):
        if expected.get(str(name).lower(), sql) != sql:
            raise DataError(f"{path} is damaged: {str(name)[:60]!r} is not the table of a ledger.")


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
