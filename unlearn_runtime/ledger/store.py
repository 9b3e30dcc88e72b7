"""One ledger file: opened for reading or writing, appended to in whole transactions, read entry by entry.

SQLite keeps what a power cut or a kill interrupts: an append is on disk when its transaction ends, or was never there.
The predecessor of an entry is read inside the transaction that appends it, so that two writers take turns.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sqlite3
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdp_calc.documents import canonical
from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.ledger import Entry
from unlearn_runtime.folders import check_parent, remove_stale, replacement, terminable, working_folder
from unlearn_runtime.ledger import schema, summary
from unlearn_runtime.ledger.schema import DamagedLedger
from unlearn_runtime.ledger.secret import Secret, read_secret, secret_path, write_secret

#: Seconds a writer waits for another one.
WAIT = 5.0

_NO_HASH = bytes(32)


@dataclass(frozen=True)
class Head:
    """How many entries there are, and the hash of the last one in hexadecimal: a receipt for all of them."""

    count: int
    hash: str

    def __str__(self) -> str:
        return f"{self.count}:{self.hash}"


class Ledger:
    """An open ledger file. ``secret`` is None where it was not asked for."""

    def __init__(self, path: Path, connection: sqlite3.Connection, secret: Secret | None, wait: float) -> None:
        self.path = path
        self.connection = connection
        self.secret = secret
        self._wait = wait

    @property
    def head(self) -> Head:
        """The head as stored. Raises DataError where the file has none."""
        count, last, _ = self._stored_head()
        return Head(count, last.hex())

    def _stored_head(self) -> tuple[int, bytes, bytes]:
        with named(self.path, self._wait):
            row = self.connection.execute("SELECT count, hash, mac FROM head").fetchone()
        if row is None or not all(
            isinstance(value, kind) for value, kind in zip(row, (int, bytes, bytes), strict=True)
        ):
            raise DamagedLedger(f"{self.path} is damaged: it has no head; restore it from a backup.")
        return row[0], row[1], row[2]

    def last_entry(self) -> tuple[int, bytes]:
        """Number and hash of the last entry in the file."""
        with named(self.path, self._wait):
            row = self.connection.execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        if row is None:
            return 0, _NO_HASH
        if not isinstance(row[0], int) or not isinstance(row[1], bytes):
            raise DamagedLedger(f"{self.path} is damaged: its last entry has no hash; restore it from a backup.")
        return row[0], row[1]

    @property
    def written(self) -> str:
        """The time of the last entry, as the clock said then."""
        return str(self.entry(self.last_entry()[0]).body.get("time", ""))

    def check_head(self) -> Head:
        """The head, if it is that of the last entry and, with the secret at hand, bears its code.

        Raises DataError otherwise: entries were removed or added by someone without the secret.
        """
        count, last, mac = self._stored_head()
        if (count, last) != self.last_entry():
            raise DataError(
                f"{self.path}: the head is not that of the last entry (ledger mismatch); run ledger verify."
            )
        if self.secret is not None and not hmac.compare_digest(mac, self.secret.head(count, last)):
            raise DataError(
                f"{self.path}: the head was not written with this secret (ledger mismatch); run ledger verify."
            )
        return Head(count, last.hex())

    def entry(self, number: int) -> Entry:
        """One entry. Raises DataError where there is none of this number."""
        for found, _ in self._read("WHERE number = ?", number):
            return found
        raise DataError(f"{self.path} has no entry {number}.")

    def entries(self) -> Iterator[Entry]:
        """The entries in order, one at a time; nothing about them is checked but their form.

        Raises DataError for a body that is no JSON object.
        """
        for found, _ in self._read("ORDER BY number"):
            yield found

    def spelled_entries(self) -> Iterator[tuple[Entry, str]]:
        """The entries in order, each with the text of its body."""
        yield from self._read("ORDER BY number")

    def _read(self, where: str, *values: int) -> Iterator[tuple[Entry, str]]:
        with named(self.path, self._wait):
            for number, kind, text, digest in self.connection.execute(
                f"SELECT number, kind, body, hash FROM entries {where}", values
            ):
                if not isinstance(number, int) or not isinstance(kind, str) or not isinstance(digest, bytes):
                    raise DamagedLedger(f"{self.path} is damaged: a row of entries is none; restore it from a backup.")
                yield Entry(number, kind, _body(self.path, number, text), digest.hex()), text

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Inside the block the ledger is as it was at the first look, whatever others append meanwhile."""
        with named(self.path, self._wait):
            self.connection.execute("BEGIN")
            try:
                yield
            finally:
                # SQLite has ended it already where the file turned out to be damaged.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """A transaction: everything appended in the block is in the ledger when it ends well, else nothing.

        Raises DataError where another process writes for longer than the wait, and for a head that does not fit.
        """
        assert self.secret is not None
        with terminable(), named(self.path, self._wait):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                head = self.check_head()
                writer = Writer(self.connection, head)
                yield writer
                count, last = writer.head.count, bytes.fromhex(writer.head.hash)
                self.connection.execute(
                    "UPDATE head SET count = ?, hash = ?, mac = ?", (count, last, self.secret.head(count, last))
                )
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def note_folder(self, what: str, folder: Path) -> None:
        """Remember where the folder of a state (its SHA-256) or of a release begun lies; it is a mere hint."""
        with named(self.path, self._wait):
            self.connection.execute(
                "INSERT INTO folder (what, path) VALUES (?, ?) ON CONFLICT (what) DO UPDATE SET path = excluded.path",
                (what, str(folder.absolute())),
            )

    def folder(self, what: str) -> Path | None:
        """Where such a folder was last seen, None where nobody knows."""
        with named(self.path, self._wait):
            row = self.connection.execute("SELECT path FROM folder WHERE what = ?", (what,)).fetchone()
        if row is None:
            return None
        if not isinstance(row[0], str) or not row[0].isprintable():
            raise DamagedLedger(f"{self.path} is damaged: table folder names no folder; name it with -o or --start.")
        return Path(row[0])


class Writer:
    """Appends to the chain inside one transaction."""

    def __init__(self, connection: sqlite3.Connection, head: Head) -> None:
        self.connection = connection
        self.head = head

    def append(self, kind: str, body: dict[str, Any]) -> Entry:
        """The next entry, with what the other tables say of it."""
        number = self.head.count + 1
        text = canonical(body).decode()
        digest = text_hash(bytes.fromhex(self.head.hash), number, kind, text)
        self.connection.execute(
            "INSERT INTO entries (number, kind, body, hash) VALUES (?, ?, ?, ?)", (number, kind, text, digest)
        )
        summary.apply(self.connection, number, kind, body)
        self.head = Head(number, digest.hex())
        return Entry(number, kind, body, digest.hex())


def text_hash(previous: bytes, number: int, kind: str, body: str) -> bytes:
    """The hash of an entry whose body is canonical text already; the same as ``rdp_calc.ledger.entry_hash``."""
    record = b'{"body":' + body.encode() + b',"kind":' + canonical(kind) + b',"number":' + str(number).encode() + b"}"
    return hashlib.sha256(b"rdp-calc/ledger-entry/1\0" + previous + record).digest()


def create(path: Path, secret: Secret, first: list[tuple[str, dict[str, Any]]]) -> Head:
    """Write a new ledger with its first entries, and its secret beside it; whole or not at all.

    Raises InvalidInput where a file of either name is there.
    """
    check_new(path)
    with terminable():
        content, head = _build(path, secret, first)
        private = write_secret(path, secret)
        try:
            with replacement(path, new=True) as stream:
                stream.write(content)
        except FileExistsError:
            private.unlink(missing_ok=True)
            raise InvalidInput(f"{path} exists; choose a new name for the ledger.") from None
        except BaseException:
            private.unlink(missing_ok=True)
            raise
    return head


def check_new(path: Path) -> None:
    """Raise InvalidInput where ``path`` or the files beside it exist, or their folder cannot be written."""
    for written in (path, secret_path(path)):
        remove_stale(written)
    try:
        for beside in (path, secret_path(path), *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
            if beside.is_symlink() or beside.exists():
                raise InvalidInput(f"{beside} exists; choose a new name for the ledger.")
    except OSError as error:
        raise InvalidInput(f"{str(path)[:80]} cannot be used: {error.strerror}.") from None
    check_parent(path)


def _build(target: Path, secret: Secret, first: list[tuple[str, dict[str, Any]]]) -> tuple[bytes, Head]:
    # Beside the target: what a kill leaves there is removed by the next who makes it.
    with working_folder(target) as folder:
        path = folder / "ledger"
        with named(path, WAIT), closing(_connect(f"file:{urllib.parse.quote(str(path))}", WAIT)) as connection:
            schema.migrate(connection)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("INSERT INTO head VALUES (1, 0, ?, ?)", (_NO_HASH, secret.head(0, _NO_HASH)))
            with Ledger(path, connection, secret, WAIT).writing() as writer:
                for kind, body in first:
                    writer.append(kind, body)
            head = writer.head
        return path.read_bytes(), head


@contextmanager
def opened(
    path: Path, *, write: bool = False, wait: float = WAIT, secret: bool = False, tables: bool = True
) -> Iterator[Ledger]:
    """The ledger in a file. ``write`` brings an older file up to date; ``secret`` also reads its secret. Without
    ``tables`` it is left to the caller to look whether the tables are those of a ledger before anything is read.

    Raises DataError for a file that is missing, no ledger, newer than this program, damaged, or locked for longer than
    ``wait`` seconds; InvalidInput for a wait that is no time.
    """
    if not 0 <= wait <= 3600:
        raise InvalidInput(f"--wait must be 0..3600 seconds, got {wait!r}.")
    real = Path(os.path.realpath(path))
    if not real.is_file():
        what = "does not exist" if not real.exists() else "is not a file"
        raise DataError(f"the ledger {path} {what}; make one with rdp-calc ledger init.")
    with named(path, wait):
        connection = _writable(real, wait) if write else _readable(real, wait)
        with closing(connection):
            schema.check_version(connection, path, tables=tables)
            if write:
                schema.migrate(connection)
            found = Ledger(path, connection, None, wait)
            if secret:
                found.secret = read_secret(path, _salt_sha256(found))
            yield found


def _salt_sha256(ledger: Ledger) -> str:
    return str(ledger.entry(1).body.get("salt_sha256"))


def _connect(uri: str, wait: float) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, timeout=wait, isolation_level=None, uri=True)
    # Signals are answered only where Python runs, which it does not while SQLite works.
    connection.set_progress_handler(lambda: 0, 100_000)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _writable(path: Path, wait: float) -> sqlite3.Connection:
    connection = _connect(f"file:{urllib.parse.quote(str(path))}?mode=rw", wait)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _readable(path: Path, wait: float) -> sqlite3.Connection:
    """A connection that writes nothing. Where the folder cannot be written, the file is taken as it lies there."""
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        # Only who may write can clear away the files beside a ledger that reading it needs.
        connection = _writable(path, wait)
        connection.execute("PRAGMA query_only = ON")
        return connection
    quoted = urllib.parse.quote(str(path))
    connection = _connect(f"file:{quoted}?mode=ro", wait)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        unfinished = path.with_name(path.name + "-wal")
        if unfinished.exists() and unfinished.stat().st_size:
            raise DataError(
                f"{path} lies in a folder that cannot be written, and what was appended last lies in {unfinished}; copy"
                " both to a folder of your own."
            ) from None
        return _connect(f"file:{quoted}?mode=ro&immutable=1", wait)
    return connection


@contextmanager
def named(path: Path, wait: float) -> Iterator[None]:
    """Turn what SQLite says into one line that tells what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise_if_interrupted(error)
        damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        raise (DamagedLedger if damaged else DataError)(_described(path, error, wait)) from None
    except UnicodeDecodeError:
        # Of a text in the file, which may be one of SQLite's own that it wants to complain about.
        raise DamagedLedger(f"{path} is damaged; restore it from a backup.") from None


def raise_if_interrupted(error: sqlite3.Error) -> None:
    """Raise KeyboardInterrupt where a signal ended what SQLite did: what its handler raised is lost on the way."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_INTERRUPT:
        raise KeyboardInterrupt from None


_SAID: dict[int, Callable[[Path, float], str]] = {
    sqlite3.SQLITE_BUSY: lambda path, wait: (
        f"another process is writing to {path}; waited {wait:g} s, nothing was changed: try again, or give a longer"
        " --wait"
    ),
    sqlite3.SQLITE_NOTADB: lambda path, _: f"{path} is not a ledger",
    sqlite3.SQLITE_CORRUPT: lambda path, _: f"{path} is damaged; restore it from a backup",
    sqlite3.SQLITE_FULL: lambda path, _: f"no space is left for {path}; nothing was changed",
    sqlite3.SQLITE_READONLY: lambda path, _: f"{path} cannot be written; it or its folder is read-only",
    sqlite3.SQLITE_CANTOPEN: lambda path, _: f"{path} cannot be opened; it or its folder may not be read or written",
    sqlite3.SQLITE_IOERR: lambda path, _: f"{path} cannot be read or written: input/output error; nothing was changed",
}
_SAID[sqlite3.SQLITE_LOCKED] = _SAID[sqlite3.SQLITE_BUSY]


def _described(path: Path, error: sqlite3.Error, wait: float) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    said = None if code is None else _SAID.get(code & 0xFF)
    return (f"{path}: {error}" if said is None else said(path, wait)) + "."


def _body(path: Path, number: int, text: Any) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise DamagedLedger(f"{path} is damaged: the body of entry {number} is no JSON object.")
    return body
