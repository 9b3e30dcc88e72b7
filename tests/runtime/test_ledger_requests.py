"""Requests on their way into a ledger: every record once, all of a batch or none, times as they were told."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import pytest
from ledger_files import NOW, SIZE, ask, new_ledger, plan_next, release

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.ledger import LedgerState, folded
from unlearn_runtime.ledger.planning import chosen_requests, numbers
from unlearn_runtime.ledger.requests import Wording, read_batch, register
from unlearn_runtime.ledger.secret import secret_path
from unlearn_runtime.ledger.store import opened
from unlearn_runtime.ledger.times import after_days, now, read_time


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return new_ledger(tmp_path / "model.ledger")


def state_of(path: Path) -> LedgerState:
    with opened(path) as found:
        return folded(found.entries())


def batch(path: Path, content: str, **common: str | int) -> tuple[int, int, int]:
    """Register a batch; first and last request, and records."""
    file = path.parent / "batch.txt"
    file.write_text(content, encoding="utf-8")
    with opened(path, write=True, secret=True) as found:
        asked = read_batch(file, dataset_size=SIZE, common=Wording(**common))  # type: ignore[arg-type]
        receipt = register(found, asked, now=NOW)
    return receipt.first, receipt.last, receipt.records


def test_records_stand_as_keyed_hashes(ledger: Path) -> None:
    receipt = ask(ledger, [3, 170], reason="ticket 4711")
    assert (receipt.first, receipt.last, receipt.records, receipt.head.count) == (1, 1, 2, 3)
    salt = bytes.fromhex(json.loads(secret_path(ledger).read_text())["salt"])
    hashes = [
        hmac.new(salt, b"rdp-calc/record/1" + row.to_bytes(8, "little"), hashlib.sha256).hexdigest() for row in (3, 170)
    ]
    (request,) = state_of(ledger).requests
    assert request.records == tuple(sorted(hashes))
    assert (request.reason, request.received, request.due) == ("ticket 4711", NOW, None)


def test_no_record_is_named_twice(ledger: Path) -> None:
    ask(ledger, [3, 17], [40])
    before = state_of(ledger)
    with pytest.raises(DataError, match="forget id 17 was named by request 1"):
        ask(ledger, [5], [16, 17])
    # Not within one call, either.
    with pytest.raises(DataError, match="forget id 6 was named by request 4"):
        ask(ledger, [5], [6], [6])
    assert state_of(ledger) == before
    # Nor after a release.
    plan_next(ledger)
    release(ledger, ledger.parent / "release-1")
    with pytest.raises(DataError, match="forget id 40 was named by request 2"):
        ask(ledger, [40])
    assert ask(ledger, [5]).first == 3


def test_a_batch_is_taken_whole(ledger: Path) -> None:
    content = (
        "\ufeff# ids;reason;received;due\n\n3,17;moved away;2025-12-01;2025-12-31\n40-42\n 7 ; ticket, 2 ;2025-12-02\n"
        "9;;;2026-02-01T12:00:00+02:00\n"
    )
    assert batch(ledger, content, reason="by post", due_days=10) == (1, 4, 7)
    first, second, third, fourth = state_of(ledger).requests
    assert (first.group, first.reason) == (2, "moved away")
    # A day that something is due ends with its last second.
    assert (first.received, first.due) == ("2025-12-01T00:00:00Z", "2025-12-31T23:59:59Z")
    assert (second.group, second.reason, second.received, second.due) == (3, "by post", NOW, "2026-01-11T23:59:59Z")
    assert (third.group, third.reason, third.due) == (1, "ticket, 2", "2025-12-12T23:59:59Z")
    assert (fourth.received, fourth.due) == (NOW, "2026-02-01T10:00:00Z")


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("3,3", DataError, r"forget id 3 is repeated; .* \(line 2 of"),
        ("1", DataError, r"forget id 1 was named by request 1 before \(line 2 of"),
        (f"{SIZE}", DataError, r"out of range; allowed are 0\.\.199 \(line 2 of"),
        ("five", DataError, r"not a row number .* \(line 2 of"),
        (";reason", DataError, r"\(line 2 of"),
        ("@other.txt", DataError, r"stand in the line itself.*\(line 2 of"),
        ("5;a;2026-01-01;2026-02-01;more", DataError, r"got 5 fields \(line 2 of"),
        ("5;a;yesterday", InvalidInput, r"--received must be a date.*\(line 2 of"),
        ("5;a;2026-02-01;2026-01-31", InvalidInput, r"due .* is before received .*\(line 2 of"),
        ("5;a;2026-01-03", InvalidInput, r"--received 2026-01-03T00:00:00Z is in the future.*\(line 2 of"),
        ("5;" + "x" * 501, InvalidInput, r"at most 500 characters.*\(line 2 of"),
        ("5;a\x1b[2J", InvalidInput, r"printable.*\(line 2 of"),
    ],
)
def test_one_bad_line_and_nothing_is_registered(line: str, kind: type, message: str, ledger: Path) -> None:
    before = state_of(ledger)
    with pytest.raises(kind, match=message):
        batch(ledger, f"1\n{line}\n2\n")
    assert state_of(ledger) == before


def test_batches_that_cannot_be_read(ledger: Path) -> None:
    with pytest.raises(InvalidInput, match="no request"):
        batch(ledger, "# nothing\n\n")
    file = ledger.parent / "batch.txt"
    file.write_bytes(b"1\n\xff\xfe\n")
    with (
        opened(ledger, write=True, secret=True) as found,
        pytest.raises(DataError, match="not UTF-8"),
    ):
        register(found, read_batch(file, dataset_size=SIZE, common=Wording()), now=NOW)
    file.unlink()
    with opened(ledger, write=True, secret=True) as found, pytest.raises(DataError, match="No such file"):
        register(found, read_batch(file, dataset_size=SIZE, common=Wording()), now=NOW)
    assert state_of(ledger).count == 2


def test_times() -> None:
    assert read_time("--due", "2026-03-01") == "2026-03-01T00:00:00Z"
    assert read_time("--due", "2026-03-01", end_of_day=True) == "2026-03-01T23:59:59Z"
    assert read_time("--due", "2026-03-01T01:30:00+02:00") == "2026-02-28T23:30:00Z"
    assert read_time("--due", " 2026-03-01 10:00:00 ") == "2026-03-01T10:00:00Z"
    assert read_time("--due", "2026-03-01T10:00:00.9Z") == "2026-03-01T10:00:00Z"
    for text in ("", "soon", "2026-02-30", "2026-13-01", "0001-01-01", "9999-12-31T23:59:59-12:00", "2026-03-01T25:00"):
        with pytest.raises(InvalidInput, match="--due must be a date or time"):
            read_time("--due", text)
    assert after_days("2024-02-28T10:00:00Z", 2) == "2024-03-01T10:00:00Z"
    for days in (-1, 36_501):
        with pytest.raises(InvalidInput, match="--due-days"):
            after_days(NOW, days)
    with pytest.raises(InvalidInput, match="calendar"):
        after_days("9999-12-31T00:00:00Z", 30)
    assert read_time("now", now()) == now() or read_time("now", now()) <= now()
    with pytest.raises(InvalidInput, match="conflict"):
        Wording(due="2026-01-01", due_days=3)


def test_a_day_that_something_is_due_is_meant_whole() -> None:
    for text in ("20261231", "2026-12-31", " 2026-W53-4 "):
        assert read_time("--due", text, end_of_day=True) == "2026-12-31T23:59:59Z"
    assert read_time("--due", "20261231T10", end_of_day=True) == "2026-12-31T10:00:00Z"
    now = "2026-09-02T10:00:00Z"
    for received, due in (
        ("2026-09-01", "2026-10-01T23:59:59Z"),
        ("20260901", "2026-10-01T23:59:59Z"),
        ("2026-09-01T08:00:00Z", "2026-10-01T08:00:00Z"),
        (None, "2026-10-02T23:59:59Z"),
    ):
        assert Wording(received=received, due_days=30).times(now)[1] == due
    assert Wording(due_days=0).times(now) == (now, "2026-09-02T23:59:59Z")


def test_nobody_asks_from_the_future() -> None:
    now = "2026-09-02T10:00:00Z"
    # Another time zone is no future.
    assert Wording(received="2026-09-03").times(now) == ("2026-09-03T00:00:00Z", None)
    for received in ("2026-09-03T10:00:01Z", "2026-09-04", "9999-12-31"):
        with pytest.raises(InvalidInput, match="in the future; it is 2026-09-02T10:00:00Z now"):
            Wording(received=received).times(now)


def test_numbers_of_requests(ledger: Path) -> None:
    ask(ledger, *([row] for row in range(10)))
    with opened(ledger, write=True, secret=True) as found:
        assert numbers("--requests", "7, 1-3,5", found) == [1, 2, 3, 5, 7]
        for text in ("١", "1-٣", "1_0", "", "a", "1-", "-1", "1,,2", "1.5", "1,1", "1-3,2"):
            with pytest.raises(InvalidInput):
                numbers("--requests", text, found)
        for text in ("0", "11", "3-2", "1-11", "9" * 30):
            with pytest.raises(DataError, match=r"the requests are 1\.\.10"):
                numbers("--requests", text, found)
        assert [row.number for row in chosen_requests(found, "2-3")] == [2, 3]
        assert len(chosen_requests(found, None)) == len(chosen_requests(found, "all")) == 10
    plan_next(ledger, "2-3")
    release(ledger, ledger.parent / "release-1")
    with opened(ledger) as found:
        with pytest.raises(DataError, match="request 3 was answered by release 1"):
            chosen_requests(found, "1,3")
        assert len(chosen_requests(found, None)) == 8


def test_nothing_pending(ledger: Path) -> None:
    with pytest.raises(InvalidInput, match="no request is pending"):
        plan_next(ledger)
