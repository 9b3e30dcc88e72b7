"""The tables that repeat what the entries say, so that no command has to read them all: kept, and asked."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rdp_calc.errors import DataError
from rdp_calc.history import Made
from unlearn_runtime.ledger.schema import DamagedLedger

#: Numbers of requests, releases and entries, and counts of records and steps, are at most this.
_MOST = 10**12


@dataclass(frozen=True)
class RequestRow:
    """One request: ``planned`` is the last release planned for it, ``release`` the certified one that answered it."""

    number: int
    entry: int
    records: int
    received: str
    due: str | None
    planned: int | None
    release: int | None


@dataclass(frozen=True)
class ReleaseRow:
    """One release: planned, begun (``execution_entry``) or certified (``certificate_entry``)."""

    number: int
    plan_entry: int
    execution_entry: int | None
    certificate_entry: int | None
    records: int
    turns: int | None
    noise: float
    mu: float | None
    plan_digest: str
    state_fingerprint: str | None
    level: str | None


def _damaged(table: str) -> DamagedLedger:
    return DamagedLedger(f"the ledger is damaged: table {table} has a row that no entry wrote; run ledger verify.")


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value <= _MOST


def _request_row(row: tuple[Any, ...]) -> RequestRow:
    found = RequestRow(*row)
    whole = all(_is_count(value) for value in (found.number, found.entry, found.records))
    optional = all(value is None or _is_count(value) for value in (found.planned, found.release))
    if not (whole and optional and isinstance(found.received, str) and isinstance(found.due, str | None)):
        raise _damaged("request")
    return found


def _release_row(row: tuple[Any, ...]) -> ReleaseRow:
    found = ReleaseRow(*row)
    whole = all(_is_count(value) for value in (found.number, found.plan_entry, found.records))
    optional = all(value is None or _is_count(value) for value in (found.execution_entry, found.certificate_entry))
    numbers = (found.turns is None or _is_count(found.turns, 0)) and isinstance(found.noise, float)
    texts = isinstance(found.plan_digest, str) and isinstance(found.state_fingerprint, str | None)
    if not (whole and optional and numbers and texts) or not (
        isinstance(found.mu, float | None) and isinstance(found.level, str | None)
    ):
        raise _damaged("release")
    return found


_REQUEST = "number, entry, records, received, due, planned, release"
_RELEASE = (
    "number, plan_entry, execution_entry, certificate_entry, records, turns, noise, mu, plan_digest, state_fingerprint,"
    " level"
)


def apply(connection: sqlite3.Connection, number: int, kind: str, body: dict[str, Any]) -> None:
    """Repeat one entry in the tables, in the caller's transaction."""
    match kind:
        case "request":
            connection.execute(
                f"INSERT INTO request ({_REQUEST}) VALUES (?, ?, ?, ?, ?, NULL, NULL)",
                (body["request"], number, len(body["records"]), body["received"], body["due"]),
            )
            connection.executemany(
                "INSERT INTO record (hash, request) VALUES (?, ?)",
                [(bytes.fromhex(text), body["request"]) for text in body["records"]],
            )
        case "plan":
            # A plan that nobody carried out gives way to the next one of the same number.
            connection.execute(
                f"INSERT INTO release ({_RELEASE}) VALUES (?, ?, NULL, NULL, ?, ?, ?, ?, ?, NULL, NULL)"
                " ON CONFLICT (number) DO UPDATE SET plan_entry = excluded.plan_entry, execution_entry = NULL,"
                " records = excluded.records, turns = excluded.turns, noise = excluded.noise, mu = excluded.mu,"
                " plan_digest = excluded.plan_digest",
                (
                    *(body["release"], number, body["group"], body["turns"], body["noise"], body["mu"]),
                    body["plan_digest"],
                ),
            )
            connection.execute(
                "UPDATE request SET planned = NULL WHERE release IS NULL AND planned = ?", (body["release"],)
            )
            connection.executemany(
                "UPDATE request SET planned = ? WHERE number = ?",
                [(body["release"], asked) for asked in body["requests"]],
            )
        case "execution":
            connection.execute("UPDATE release SET execution_entry = ? WHERE number = ?", (number, body["release"]))
        case "certificate":
            connection.execute(
                "UPDATE release SET certificate_entry = ?, state_fingerprint = ?, level = ? WHERE number = ?",
                (number, body["state_fingerprint"], body["certificate"]["claim"]["level"], body["release"]),
            )
            connection.execute(
                "UPDATE request SET release = planned WHERE release IS NULL AND planned = ?", (body["release"],)
            )


def pending_counts(connection: sqlite3.Connection, time: str) -> tuple[int, int, int]:
    """How many requests are unanswered, how many of those planned, how many overdue at a time."""
    waiting = connection.execute("SELECT count(*) FROM request WHERE release IS NULL").fetchone()[0]
    planned = connection.execute(
        "SELECT count(*) FROM request WHERE release IS NULL AND planned IS NOT NULL"
    ).fetchone()[0]
    return waiting, planned, len(overdue_numbers(connection, time))


def overdue_numbers(connection: sqlite3.Connection, time: str) -> list[int]:
    """Unanswered requests that were due before a time."""
    rows = connection.execute(
        "SELECT number FROM request WHERE release IS NULL AND due IS NOT NULL AND due < ? ORDER BY due, number", (time,)
    )
    return [row[0] for row in rows]


def pending(connection: sqlite3.Connection, most: int = -1) -> list[RequestRow]:
    """Requests that no certified release has answered, in order; the first ``most`` of them."""
    rows = connection.execute(f"SELECT {_REQUEST} FROM request WHERE release IS NULL ORDER BY number LIMIT ?", (most,))
    return [_request_row(row) for row in rows]


def last_requests(connection: sqlite3.Connection, count: int) -> list[RequestRow]:
    """The newest requests, in order."""
    rows = connection.execute(f"SELECT {_REQUEST} FROM request ORDER BY number DESC LIMIT ?", (count,))
    return [_request_row(row) for row in rows][::-1]


def requests(connection: sqlite3.Connection) -> Iterator[RequestRow]:
    """All requests in order."""
    for row in connection.execute(f"SELECT {_REQUEST} FROM request ORDER BY number"):
        yield _request_row(row)


def request(connection: sqlite3.Connection, number: int) -> RequestRow:
    """One request. Raises DataError where there is none of this number."""
    row = connection.execute(f"SELECT {_REQUEST} FROM request WHERE number = ?", (number,)).fetchone()
    if row is None:
        raise DataError(f"request {number} is not in the ledger, which has {count_requests(connection)}.")
    return _request_row(row)


def count_requests(connection: sqlite3.Connection) -> int:
    """How many requests there are; they are numbered from 1."""
    return _count(connection, "request")


def _count(connection: sqlite3.Connection, table: str) -> int:
    query = f"SELECT count(*), coalesce(max(number), 0), coalesce(min(number), 1) FROM {table}"
    count, last, first = connection.execute(query).fetchone()
    if (last, first) != (count, 1):
        raise _damaged(table)
    return int(count)


def count_records(connection: sqlite3.Connection) -> int:
    """Records of all requests."""
    found = connection.execute("SELECT coalesce(sum(records), 0) FROM request").fetchone()[0]
    if not _is_count(found, 0):
        raise _damaged("request")
    return int(found)


def repeated(connection: sqlite3.Connection, record: bytes) -> int | None:
    """The request that named a record before, None where there is none."""
    row = connection.execute("SELECT request FROM record WHERE hash = ?", (record,)).fetchone()
    if row is not None and not _is_count(row[0]):
        raise _damaged("record")
    return None if row is None else int(row[0])


def releases(connection: sqlite3.Connection) -> list[ReleaseRow]:
    """All releases in order; only the last may be without a certificate."""
    return [_release_row(row) for row in connection.execute(f"SELECT {_RELEASE} FROM release ORDER BY number")]


def open_release(connection: sqlite3.Connection) -> ReleaseRow | None:
    """The release that is planned or begun and not certified, None where there is none."""
    if not _count(connection, "release"):
        return None
    row = connection.execute(f"SELECT {_RELEASE} FROM release ORDER BY number DESC LIMIT 1").fetchone()
    found = _release_row(row)
    return found if found.certificate_entry is None else None


def last_release(connection: sqlite3.Connection) -> ReleaseRow | None:
    """The last certified release."""
    row = connection.execute(
        f"SELECT {_RELEASE} FROM release WHERE certificate_entry IS NOT NULL ORDER BY number DESC LIMIT 1"
    ).fetchone()
    return None if row is None else _release_row(row)


def made(connection: sqlite3.Connection) -> list[Made]:
    """The certified releases as the accounting takes them."""
    query = f"SELECT {_RELEASE} FROM release WHERE certificate_entry IS NOT NULL ORDER BY number"
    found = []
    for number, row in enumerate(map(_release_row, connection.execute(query)), start=1):
        if row.number != number:
            raise _damaged("release")
        found.append(Made(row.records, row.turns, row.noise, row.mu))
    return found


def certified(connection: sqlite3.Connection, numbers: Iterable[int]) -> dict[int, tuple[str | None, str]]:
    """Of some certified releases the level, and when the certificate was recorded."""
    found = {}
    for number in numbers:
        row = connection.execute(f"SELECT {_RELEASE} FROM release WHERE number = ?", (number,)).fetchone()
        entry = None if row is None else _release_row(row).certificate_entry
        if row is None or entry is None:
            raise _damaged("request")
        times = connection.execute("SELECT json_extract(body, '$.time') FROM entries WHERE number = ?", (entry,))
        time = times.fetchone()
        if time is None or not isinstance(time[0], str):
            raise _damaged("release")
        found[number] = _release_row(row).level, time[0]
    return found


def late_count(connection: sqlite3.Connection) -> int:
    """How many requests were certified after they were due."""
    due = "SELECT release, due FROM request WHERE release IS NOT NULL AND due IS NOT NULL"
    # Reading the certificate of each release once takes less than joining them with the requests.
    times = dict(
        connection.execute(
            "SELECT release.number, json_extract(entries.body, '$.time') FROM release"
            " JOIN entries ON entries.number = release.certificate_entry"
            " WHERE release.number IN (SELECT release FROM request WHERE due IS NOT NULL)"
        )
    )
    return sum(str(times.get(release, "")) > str(time) for release, time in connection.execute(due))


def learned(connection: sqlite3.Connection) -> bool:
    """Whether the ledger says what was learned; a release can only begin after that, and most ledgers begin with it."""
    found = connection.execute("SELECT 1 FROM entries WHERE number = 2 AND kind = 'learning'").fetchone()
    return found is not None or bool(
        connection.execute("SELECT EXISTS (SELECT 1 FROM entries WHERE kind = 'learning')").fetchone()[0]
    )
