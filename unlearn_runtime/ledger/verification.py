"""Whether a ledger, or an export of one, is what was written, and whether all that it claims holds."""

from __future__ import annotations

import hmac
import itertools
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rdp_calc.documents import canonical, field
from rdp_calc.errors import DataError, InvalidInput, RdpCalcError
from rdp_calc.ledger import Entry, LedgerState
from rdp_calc.regular_files import open_regular
from rdp_calc.signature import is_public_key
from rdp_calc.verify import Check, Report
from rdp_calc.verify_ledger import verify_entries
from unlearn_runtime.ledger import schema, summary
from unlearn_runtime.ledger.exporting import reading
from unlearn_runtime.ledger.schema import DamagedLedger
from unlearn_runtime.ledger.secret import read_secret, secret_path
from unlearn_runtime.ledger.store import Ledger, opened, raise_if_interrupted

_SQLITE = b"SQLite format 3\0"

_NO_SECRET = "that the last entries were written by whoever holds the secret (the secret file is not here)"


def verify_file(
    path: Path, *, heads: Iterable[tuple[int, str]] = (), against: Path | None = None, signer: str | None = None
) -> Report:
    """Check a ledger file or an export. ``heads`` are receipts kept from earlier, ``against`` is an earlier export, of
    which the ledger must be a continuation; ``signer`` the public key, in hexadecimal, that must have signed every
    certificate. Failed checks are in the report; DataError is raised for what is no ledger at all.
    """
    if signer is not None and not is_public_key(signer):
        raise InvalidInput("--signer must be a public key of 64 hexadecimal digits.")
    kept = [*heads]
    before = []
    if against is not None:
        check, head = _export_check(against)
        before.append(check)
        kept += [] if head is None else [head]
    try:
        report = _verify_ledger(path, kept, signer) if _is_sqlite(path) else _verify_export(path, kept, signer)
    except DamagedLedger as error:
        report = Report(kind="ledger", level="none", delta_upper=None, checks=[Check("file", False, str(error))])
    return replace(report, checks=before + report.checks)


def read_head(text: str) -> tuple[int, str]:
    """A receipt NUMBER:HASH. Raises InvalidInput for another text."""
    number, _, digest = text.strip().partition(":")
    if (
        not number.isdecimal()
        or not number.isascii()
        or len(number) > 12
        or len(digest) != 64
        or set(digest) - set("0123456789abcdef")
    ):
        raise InvalidInput(f"--head must be NUMBER:HASH as request and status print it, got {text[:40]!r}.")
    return int(number), digest


def _is_sqlite(path: Path) -> bool:
    try:
        with open_regular(path) as stream:
            start = stream.read(len(_SQLITE))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None
    if start != _SQLITE and not start.startswith(b"{"):
        raise DataError(f"{path} is neither a ledger nor an export of one.")
    return start == _SQLITE


def _export_check(path: Path) -> tuple[Check, tuple[int, str] | None]:
    """Whether an export to compare with is a chain in itself, and its head."""
    try:
        with reading(path) as export:
            state = LedgerState()
            for entry in export.entries:
                state.add(entry)
    except DataError as error:
        return Check("against", False, str(error)), None
    return Check("against", True, f"{path} is a whole export of {state.count} {_entries(state.count)}"), (
        state.count,
        state.head,
    )


def _verify_export(path: Path, heads: list[tuple[int, str]], signer: str | None) -> Report:
    signers = _Signers(signer)
    with reading(path) as export:
        trouble: list[Check] = []
        report = verify_entries(_stopped(signers.seen(export.entries), "file", trouble), heads=heads)
    passed = Check("file", True, "as an export writes it")
    return replace(report, checks=[*(trouble or [passed]), *report.checks, *signers.checks()])


def _verify_ledger(path: Path, heads: list[tuple[int, str]], signer: str | None) -> Report:
    signers = _Signers(signer)
    trouble: list[Check] = []
    memory = sqlite3.connect(":memory:", isolation_level=None)
    with opened(path, tables=False) as ledger, closing(memory) as copy, ledger.snapshot():
        tables = _schema(ledger)
        if not tables.passed:
            # A view or a trigger can be a query that never ends: nothing else is looked at.
            return Report(kind="ledger", level="none", delta_upper=None, checks=[tables])
        schema.migrate(copy)
        checks = [_integrity(ledger), tables]
        copy.execute("BEGIN")
        again = _Repeated(copy)
        report = verify_entries(_stopped(again.seen(signers.seen(_strict(ledger))), "file", trouble), heads=heads)
        head, unsure = _head(ledger)
        checks += [*trouble, head]
        if not trouble:
            checks.append(again.check(ledger))
    report = replace(report, checks=[*checks, *report.checks, *signers.checks()])
    return replace(report, not_shown=(*report.not_shown, *unsure))


def _entries(count: int) -> str:
    return "entry" if count == 1 else "entries"


def _stopped(entries: Iterator[Entry], name: str, trouble: list[Check]) -> Iterator[Entry]:
    """The entries up to the first that cannot be read, which becomes a failed check."""
    try:
        yield from entries
    except DataError as error:
        trouble.append(Check(name, False, str(error)))


def _integrity(ledger: Ledger) -> Check:
    try:
        found = [str(row[0]) for row in ledger.connection.execute("PRAGMA integrity_check(3)")]
        broken = ledger.connection.execute("PRAGMA foreign_key_check").fetchone()
    except sqlite3.Error as error:
        raise_if_interrupted(error)
        found, broken = [str(error)], None
    if broken is not None:
        found = [f"table {broken[0]} refers to a row that is not there"]
    return Check("file", found == ["ok"], "the database is sound" if found == ["ok"] else "; ".join(found)[:300])


def _schema(ledger: Ledger) -> Check:
    """The tables and triggers are those of this version, so that nothing can be changed by accident."""
    try:
        odd = schema.differences(ledger.connection, schema.version(ledger.connection))
    except sqlite3.Error as error:
        raise_if_interrupted(error)
        return Check("tables", False, str(error))
    detail = "tables and triggers as made" if not odd else f"changed, missing or added: {schema.listed(odd)}"
    return Check("tables", not odd, detail)


def _strict(ledger: Ledger) -> Iterator[Entry]:
    """The entries; DataError for one that is not stored as it is written."""
    for entry, text in ledger.spelled_entries():
        try:
            same = canonical(entry.body).decode() == text
        except (ValueError, RecursionError):
            same = False
        if not same:
            raise DataError(f"entry {entry.number} is not spelled as it was written.")
        yield entry


def _head(ledger: Ledger) -> tuple[Check, tuple[str, ...]]:
    try:
        # Others may check a ledger without its secret.
        if os.access(secret_path(ledger.path), os.R_OK):
            ledger.secret = read_secret(ledger.path, str(ledger.entry(1).body.get("salt_sha256")), only_mine=False)
        head = ledger.check_head()
    except RdpCalcError as error:
        return Check("head", False, str(error)), ()
    if ledger.secret is None:
        return Check("head", True, f"entry {head.count} is the last, as the head says"), (_NO_SECRET,)
    return Check("head", True, f"entry {head.count} is the last, as whoever holds the secret wrote"), ()


class _Repeated:
    """The tables built again from the entries, to compare with those of the file."""

    def __init__(self, copy: sqlite3.Connection) -> None:
        self._copy = copy
        self._failed: str | None = None

    def seen(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if self._failed is None:
                try:
                    summary.apply(self._copy, entry.number, entry.kind, entry.body)
                except (sqlite3.Error, LookupError, TypeError, ValueError, OverflowError) as error:
                    self._failed = f"entry {entry.number} fits no table: {error}"
            yield entry

    def check(self, ledger: Ledger) -> Check:
        if self._failed is not None:
            return Check("summary", False, self._failed)
        try:
            for table, key in schema.DERIVED.items():
                query = f"SELECT * FROM {table} ORDER BY {key}"
                rows = itertools.zip_longest(ledger.connection.execute(query), self._copy.execute(query))
                for stored, expected in rows:
                    if stored != expected:
                        return Check("summary", False, f"table {table} does not say what the entries say")
        except sqlite3.Error as error:
            raise_if_interrupted(error)
            return Check("summary", False, str(error))
        return Check("summary", True, "requests, records and releases are those of the entries")


class _Signers:
    """Whose signatures the certificates bear."""

    def __init__(self, wanted: str | None) -> None:
        self._wanted = wanted
        self._others: list[int] = []
        self._count = 0

    def seen(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        for entry in entries:
            if entry.kind == "certificate" and self._wanted is not None:
                self._count += 1
                try:
                    found = field(entry.body, "certificate.signature.public_key", "text", optional=True)
                except RdpCalcError:
                    found = None
                if found is None or not hmac.compare_digest(found.encode(), self._wanted.encode()):
                    self._others.append(self._count)
            yield entry

    def checks(self) -> list[Check]:
        if self._wanted is None:
            return []
        if self._others:
            return [Check("signer", False, f"release {self._others[0]} is not signed by {self._wanted}")]
        signed = "the only release is" if self._count == 1 else f"all {self._count} releases are"
        return [Check("signer", True, f"{signed} signed by {self._wanted}")]
