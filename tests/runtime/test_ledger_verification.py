"""What somebody may do to a ledger file, and which check finds it."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ledger_files import NOW, ask, chain_again, head_again, plan_next, release, storied, without_triggers

from rdp_calc.documents import canonical
from rdp_calc.errors import DataError, InvalidInput, RdpCalcError
from rdp_calc.ledger import entry_hash
from rdp_calc.verify import Report
from unlearn_runtime.ledger.exporting import reading, write_export
from unlearn_runtime.ledger.secret import secret_path
from unlearn_runtime.ledger.store import opened, text_hash
from unlearn_runtime.ledger.verification import read_head, verify_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = storied(tmp_path_factory.mktemp("made") / "model.ledger")
    assert_holds(verify_file(path))
    return path


@pytest.fixture
def ledger(made: Path, tmp_path: Path) -> Path:
    """A copy to be tampered with."""
    for name in ("model.ledger", "model.ledger.secret"):
        shutil.copy(made.with_name(name), tmp_path)
    return tmp_path / "model.ledger"


def assert_holds(report: Report) -> None:
    assert [check for check in report.checks if not check.passed] == []
    assert report.holds


def failed(path: Path, **given: object) -> set[str]:
    report = verify_file(path, **given)  # type: ignore[arg-type]
    assert not report.holds
    return {check.name for check in report.checks if not check.passed}


def export(path: Path, name: str = "model.jsonl") -> Path:
    output = path.with_name(name)
    with opened(path) as found:
        write_export(found, output)
    return output


def receipt(path: Path) -> tuple[int, str]:
    with opened(path) as found:
        return found.check_head().count, found.check_head().hash


# What holds


def test_what_is_checked(ledger: Path) -> None:
    report = verify_file(ledger)
    names = [check.name for check in report.checks]
    assert names[:5] == ["file", "tables", "head", "summary", "chain"]
    assert {"clock", "claims", "releases", "open plan", "model: delta"} <= set(names)
    assert (report.claim_level, report.level) == ("certified", "interval")
    assert "no entry was dropped" in " ".join(report.not_shown)
    assert "secret" not in " ".join(report.not_shown)
    assert "no entry was dropped" not in " ".join(verify_file(ledger, heads=[receipt(ledger)]).not_shown)


def test_without_the_secret_it_says_what_it_could_not_check(ledger: Path) -> None:
    secret_path(ledger).unlink()
    report = verify_file(ledger)
    assert_holds(report)
    assert "the secret file is not here" in " ".join(report.not_shown)


def test_another_ledgers_secret(ledger: Path) -> None:
    document = json.loads(secret_path(ledger).read_text())
    secret_path(ledger).write_text(json.dumps({**document, "salt": "0" * 64}))
    assert failed(ledger) == {"head"}


def test_the_fast_hash_is_the_hash() -> None:
    body = {"b": [1, 2.5, "ä"], "a": {"x": None}}
    text = canonical(body).decode()
    assert text_hash(bytes.fromhex("ab" * 32), 7, "plan", text).hex() == entry_hash("ab" * 32, 7, "plan", body)


# Tampering. Each change is made without the secret, with all triggers out of the way; by those who know how, the chain
# is computed again over the changed entries.


def edit(connection: sqlite3.Connection) -> None:
    connection.execute('UPDATE entries SET body = replace(body, \'"reason":""\', \'"reason":"x"\') WHERE number = 3')


def drop_request(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM entries WHERE number = (SELECT max(number) - 1 FROM entries)")


def drop_last(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM entries WHERE number = (SELECT max(number) FROM entries)")


def exchange(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE entries SET number = 1000 WHERE number = 3")
    connection.execute("UPDATE entries SET number = 3 WHERE number = 4")
    connection.execute("UPDATE entries SET number = 4 WHERE number = 1000")


def insert(connection: sqlite3.Connection) -> None:
    body = {"request": 5, "records": ["ab" * 32], "reason": "", "received": NOW, "due": None, "time": NOW}
    connection.execute(
        "INSERT INTO entries SELECT max(number) + 1, 'request', ?, zeroblob(32) FROM entries",
        (canonical(body).decode(),),
    )


def change_hash(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE entries SET hash = zeroblob(32) WHERE number = 5")


def change_time(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE entries SET body = replace(body, '2026-01-01T', '2025-01-01T') WHERE number = 3")


def change_record(connection: sqlite3.Connection) -> None:
    (text,) = connection.execute("SELECT json_extract(body, '$.records[0]') FROM entries WHERE number = 3").fetchone()
    other = text[:-1] + ("0" if text[-1] != "0" else "1")
    connection.execute("UPDATE entries SET body = replace(body, ?, ?)", (text, other))


CHANGES = [edit, drop_request, drop_last, exchange, insert, change_hash, change_time, change_record]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_entries(change: Callable[[sqlite3.Connection], None], ledger: Path) -> None:
    before = receipt(ledger)
    with without_triggers(ledger) as connection:
        change(connection)
    found = failed(ledger)
    # The last entry dropped is a shorter chain that is whole; only the head knows more.
    assert "head" in found if change is drop_last else "chain" in found or "head" in found
    # Without the secret, too.
    secret_path(ledger).unlink()
    failed(ledger)
    failed(ledger, heads=[before])


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not change_hash])
def test_changed_entries_with_the_chain_made_again(change: Callable[[sqlite3.Connection], None], ledger: Path) -> None:
    before, earlier = receipt(ledger), export(ledger)
    with without_triggers(ledger) as connection:
        change(connection)
        chain_again(connection)
    assert "head" in failed(ledger)
    secret_path(ledger).unlink()
    if change is insert:
        # What was kept is still in it; only the secret tells who wrote the rest.
        return
    # A change that no longer makes sense fails before what was kept is compared.
    assert failed(ledger, heads=[before]) & {"head", "chain"}
    assert failed(ledger, against=earlier) & {"head", "chain"}
    assert failed(export(ledger, "changed.jsonl"), heads=[before]) & {"head", "chain"}
    if change not in (drop_request, exchange):
        assert "head" in failed(ledger, heads=[before])


def test_rollback_to_an_older_copy(ledger: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    older = Path(shutil.copy(ledger, tmp_path / "old"))
    shutil.copy(secret_path(ledger), tmp_path / "old")
    told = ask(ledger, [90]).head
    # The older copy is a whole ledger, its head written with the secret.
    assert_holds(verify_file(older))
    assert failed(older, heads=[(told.count, told.hash)]) == {"head"}
    assert failed(older, against=export(ledger)) == {"head"}
    assert_holds(verify_file(ledger, heads=[(told.count, told.hash)], against=export(older)))
    # Going on from the older copy makes another ledger.
    ask(older, [91])
    assert failed(older, heads=[(told.count, told.hash)]) == {"head"}


@pytest.mark.parametrize("name", ["turns", "noise", "mu", "delta_upper"])
def test_whoever_has_the_secret_proves_no_more(name: str, ledger: Path) -> None:
    """The chain and head made again, with the secret: what is claimed is proved again from the requests."""
    with without_triggers(ledger) as connection:
        number, text = connection.execute("SELECT number, body FROM entries WHERE kind = 'plan'").fetchone()
        body = json.loads(text)
        body[name] = body[name] - 1 if name == "turns" else body[name] / 2
        connection.execute("UPDATE entries SET body = ? WHERE number = ?", (canonical(body).decode(), number))
        connection.execute(
            f"UPDATE release SET {name} = ? WHERE number = 1" if name != "delta_upper" else "SELECT ?", (body[name],)
        )
        chain_again(connection)
    head_again(ledger)
    # Noise that was not learned with is no entry that follows.
    assert failed(ledger) <= ({"chain", "summary"} if name == "noise" else {"claims", "release 1"})


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE request SET release = 2 WHERE number = 4",
        "UPDATE request SET release = NULL WHERE number = 1",
        "UPDATE request SET due = '2099-01-01T00:00:00Z' WHERE number = 4",
        "UPDATE request SET records = 1 WHERE number = 1",
        "UPDATE release SET noise = noise / 2",
        "UPDATE release SET turns = turns + 1 WHERE number = 1",
        "UPDATE release SET state_fingerprint = 'x' WHERE number = 2",
        "UPDATE release SET level = 'conditional' WHERE number = 2",
        "DELETE FROM record WHERE request = 4",
        "UPDATE record SET request = 4 WHERE request = 3",
        "INSERT INTO record VALUES (zeroblob(32), 1)",
    ],
)
def test_tables_that_no_longer_say_what_the_entries_say(statement: str, ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection:
        assert connection.execute(statement).rowcount > 0
        connection.commit()
    assert failed(ledger) == {"summary"}


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TRIGGER entries_stay",
        "DROP INDEX pending",
        "CREATE TABLE extra (a)",
        "CREATE TRIGGER quiet AFTER INSERT ON request BEGIN DELETE FROM record; END",
    ],
)
def test_tables_and_triggers_that_are_not_as_made(statement: str, ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection:
        connection.execute(statement)
    assert failed(ledger) == {"tables"}


def test_numbers_beyond_any_table(ledger: Path) -> None:
    with without_triggers(ledger) as connection:
        number, text = connection.execute("SELECT number, body FROM entries WHERE kind = 'plan'").fetchone()
        body = {**json.loads(text), "turns": 10**30}
        connection.execute("UPDATE entries SET body = ? WHERE number = ?", (json.dumps(body), number))
    assert failed(ledger) & {"file", "chain", "summary"}


def test_hints_decide_nothing(ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection:
        assert connection.execute("UPDATE folder SET path = '/nowhere'").rowcount > 0
        connection.commit()
    assert_holds(verify_file(ledger))


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "", "nonsense", '{"a": NaN}', '{"reason": "", "reason": ""}', "[" * 100_000, '{"a":1e999}', "\\"],
)
def test_bodies_that_are_no_entries(text: str, ledger: Path) -> None:
    with without_triggers(ledger) as connection:
        connection.execute("UPDATE entries SET body = ? WHERE number = 3", (text,))
    assert failed(ledger) & {"file", "chain"}


def test_other_spellings_of_the_same_values(ledger: Path) -> None:
    with without_triggers(ledger) as connection:
        connection.execute("UPDATE entries SET body = replace(body, ',', ', ') WHERE number = 3")
    assert "file" in failed(ledger)


def test_certificates_that_do_not_belong(ledger: Path) -> None:
    with without_triggers(ledger) as connection:
        rows = connection.execute("SELECT number, body FROM entries WHERE kind = 'certificate'").fetchall()
        (first, one), (second, other) = ((number, json.loads(body)) for number, body in rows)
        swapped = {**one, "certificate": {**other["certificate"], "plan_digest": one["certificate"]["plan_digest"]}}
        connection.execute("UPDATE entries SET body = ? WHERE number = ?", (canonical(swapped).decode(), first))
        chain_again(connection)
    assert second > first
    assert "release 1" in failed(ledger)


def test_signers(ledger: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    assert failed(ledger, signer=public) == {"signer"}
    with pytest.raises(InvalidInput, match="--signer"):
        verify_file(ledger, signer="00" * 32)


def test_receipts() -> None:
    assert read_head(" 12:" + "ab" * 32 + "\n") == (12, "ab" * 32)
    for text in ("", "12", "12:ab", "x:" + "ab" * 32, "-1:" + "ab" * 32, "1:" + "AB" * 32, "9" * 13 + ":" + "ab" * 32):
        with pytest.raises(InvalidInput, match="--head"):
            read_head(text)


# Exports


def test_exports(ledger: Path) -> None:
    output = export(ledger)
    lines = output.read_bytes().splitlines()
    header = json.loads(lines[0])
    count, last = receipt(ledger)
    assert header == {"schema": "rdp-calc/ledger-export/1", "count": count, "head": last}
    salt = json.loads(secret_path(ledger).read_text())["salt"]
    assert salt not in output.read_text()
    with reading(output) as found, opened(ledger) as stored:
        assert [*found.entries] == [*stored.entries()]
    report = verify_file(output)
    assert_holds(report)
    assert_holds(verify_file(ledger, against=output))
    # Replaced by a newer one; nothing else is.
    ask(ledger, [90])
    assert export(ledger).read_bytes() != b"\n".join(lines)
    output.write_text("mine\n")
    with opened(ledger) as stored, pytest.raises(InvalidInput, match="not an export"):
        write_export(stored, output)
    assert output.read_text() == "mine\n"


def test_an_export_that_says_more_is_kept(ledger: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    older = tmp_path / "old" / "model.ledger"
    for path in (ledger, secret_path(ledger)):
        shutil.copy(path, older.parent)
    ask(ledger, [90])
    output = export(ledger)
    content = output.read_bytes()
    count = receipt(ledger)[0]

    def refused(path: Path, its: int) -> None:
        with (
            opened(path) as stored,
            pytest.raises(DataError, match=f"holds {count} entries and this ledger {its}: it was cut"),
        ):
            write_export(stored, output)
        assert output.read_bytes() == content

    refused(older, count - 1)
    # As long, and another; longer, and another.
    for its, row in ((count, 91), (count + 1, 92)):
        ask(older, [row])
        refused(older, its)
    ask(ledger, [91])
    assert_holds(verify_file(export(ledger)))


def test_exports_that_were_changed(ledger: Path) -> None:
    output = export(ledger)
    lines = output.read_bytes().splitlines(keepends=True)
    count = len(lines) - 1

    def variants() -> Iterator[tuple[str, list[bytes]]]:
        yield "cut", lines[:-1]
        yield "torn", [*lines[:-1], lines[-1][:-20]]
        yield "longer", [*lines, lines[-1]]
        yield "doubled", [*lines[:4], lines[3], *lines[4:]]
        yield "exchanged", [*lines[:3], lines[4], lines[3], *lines[5:]]
        yield "dropped", [*lines[:3], *lines[4:]]
        yield "recounted", [lines[0].replace(b'"count":%d' % count, b'"count":%d' % (count - 1)), *lines[1:-1]]
        yield "spaced", [*lines[:3], lines[3].replace(b'","kind"', b'", "kind"'), *lines[4:]]
        yield "edited", [*lines[:3], lines[3].replace(b'"reason":""', b'"reason":"x"'), *lines[4:]]
        yield "not UTF-8", [*lines[:3], b"\xff" + lines[3], *lines[4:]]

    for name, changed in variants():
        output.write_bytes(b"".join(changed))
        assert failed(output) & {"file", "chain"}, name
        assert "against" in failed(ledger, against=output), name
    for first in (b"", b"{}\n", b'{"schema":"rdp-calc/ledger-export/2"}\n', b'{"a":1}' * 1000):
        output.write_bytes(first + b"".join(lines[1:]))
        with pytest.raises(DataError):
            verify_file(output)


def test_a_reader_of_exports_takes_no_endless_line(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = export(ledger)
    monkeypatch.setattr("unlearn_runtime.ledger.exporting.LONGEST_LINE", 1000)
    assert failed(output) == {"file", "chain"}


# Bits


def said(path: Path) -> list[object] | None:
    """What the entries say, None where nothing can be read."""
    try:
        with opened(path) as found:
            return [*found.entries()]
    except RdpCalcError:
        return None


def flipped(path: Path, *, count: int) -> None:
    """Bits of the file flipped one at a time: whatever verifies says what was written."""
    whole, truth = path.read_bytes(), said(path)
    assert truth is not None
    chance = random.Random(7)
    # Most of a small file is room for more.
    used = [position for position, byte in enumerate(whole) if byte]
    found = 0
    for _ in range(count):
        content = bytearray(whole)
        content[chance.choice(used)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            holds = verify_file(path).holds
        except RdpCalcError:
            holds = False
        assert not holds or said(path) == truth
        found += not holds
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
    assert found > count / 2


def test_flipped_bits_of_the_file(ledger: Path) -> None:
    flipped(ledger, count=150)


@pytest.mark.slow
def test_many_flipped_bits_of_the_file(ledger: Path) -> None:
    flipped(ledger, count=10_000)


def test_each_flipped_bit_of_an_export_is_found(ledger: Path) -> None:
    output = export(ledger)
    whole = output.read_bytes()
    chance = random.Random(11)
    for _ in range(600):
        content = bytearray(whole)
        content[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        output.write_bytes(content)
        try:
            assert not verify_file(output).holds
        except DataError:
            continue


# Over time


def test_a_ledger_goes_on_after_verification(ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection:
        connection.execute("DELETE FROM folder")
        connection.commit()
    ask(ledger, [90])
    plan_next(ledger)
    folder = ledger.parent / "release-2"
    (folder / "private").mkdir(parents=True)
    (folder / "private" / "state.safetensors").write_text("state 2")
    release(ledger, ledger.parent / "release-3", start=folder)
    assert_holds(verify_file(ledger))
