"""The ledger file: made whole or not at all, append-only, one writer at a time, and clear words for what is wrong."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from ledger_files import NOW, ask, learned_folder, new_ledger, plan_of, storied
from ledgers import langevin, template

from rdp_calc.errors import DataError, InvalidInput, NotApplicable, RdpCalcError
from rdp_calc.ledger import entry_hash, folded
from unlearn_runtime.ledger import schema, store, summary
from unlearn_runtime.ledger.creating import initialise
from unlearn_runtime.ledger.planning import chosen_requests
from unlearn_runtime.ledger.secret import read_secret, run_lock, secret_path
from unlearn_runtime.ledger.status import status
from unlearn_runtime.ledger.store import opened
from unlearn_runtime.ledger.verification import verify_file

REQUEST = {"request": 1, "records": ["ab" * 32], "reason": "", "received": NOW, "due": None, "time": NOW}


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return new_ledger(tmp_path / "model.ledger")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with releases, which no test may change."""
    return storied(tmp_path_factory.mktemp("stories") / "model.ledger")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Made


def test_a_new_ledger_and_its_secret(ledger: Path) -> None:
    assert files(ledger.parent) == {"model.ledger", "model.ledger.secret", "learned"}
    private = ledger.with_name("model.ledger.secret")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    document = json.loads(private.read_text())
    assert document["schema"] == "rdp-calc/ledger-secret/1"
    salt = bytes.fromhex(document["salt"])
    assert len(salt) == 32
    with opened(ledger, secret=True) as found:
        state = folded(found.entries())
        assert found.secret is not None
        assert found.secret.record(5) == hmac.new(salt, b"rdp-calc/record/1\5\0\0\0\0\0\0\0", "sha256").digest()
        assert salt.hex() not in repr(found.secret)
        head = found.check_head()
    assert state.salt_sha256 == hashlib.sha256(salt).hexdigest()
    assert (state.count, state.head) == (head.count, head.hash) == (2, state.head)
    assert state.learning is not None
    # A state is named under the key too: a bare hash would let anyone test guesses at the data.
    plain = hashlib.sha256(b"state 0")
    assert (
        state.learning["state_fingerprint"]
        == hmac.new(salt, b"rdp-calc/ledger-state/1" + plain.digest(), "sha256").hexdigest()
    )
    assert plain.hexdigest().encode() not in ledger.read_bytes()
    with closing(sqlite3.connect(ledger)) as connection:
        settings = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "user_version")]
        assert settings == ["wal", len(schema.MIGRATIONS)]
    # Two ledgers share no secret, so that records cannot be followed from one to the other.
    assert salt.hex() not in new_ledger(ledger.parent / "second" / "m").with_name("m.secret").read_text()


def test_the_salt_is_nowhere_in_the_ledger(tmp_path: Path) -> None:
    path = storied(tmp_path / "model.ledger")
    salt = json.loads(secret_path(path).read_text())["salt"]
    content = path.read_bytes()
    assert salt.encode() not in content
    assert bytes.fromhex(salt) not in content


@pytest.mark.parametrize("name", ["model.ledger", "model.ledger.secret", "model.ledger-wal"])
def test_nothing_is_replaced(name: str, tmp_path: Path) -> None:
    plan = plan_of()
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidInput, match="exists"):
        initialise(tmp_path / "model.ledger", plan.to_json(), name="", start=None, now=NOW)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="exists"):
        initialise(tmp_path / "model.ledger", plan.to_json(), name="", start=None, now=NOW)
    assert files(tmp_path) == {name}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    document = plan_of().to_json()
    # After the secret was written.
    monkeypatch.setattr(store, "write_secret", lambda *given: (secret_path(given[0]).touch(), secret_path(given[0]))[1])
    monkeypatch.setattr(store, "replacement", full)
    with pytest.raises(OSError, match="No space"):
        initialise(tmp_path / "model.ledger", document, name="", start=None, now=NOW)
    assert files(tmp_path) == set()


def test_only_plans_that_a_history_can_be_kept_of(tmp_path: Path) -> None:
    plan = plan_of()
    document = plan.to_json()
    for changed, kind in (
        ({**document, "digest": "0" * 64}, DataError),
        ({**document, "parameters": {**document["parameters"], "sigma": 1e-9}}, DataError),
        ({"schema": "rdp-calc/run/1"}, DataError),
    ):
        with pytest.raises(kind):
            initialise(tmp_path / "model.ledger", changed, name="", start=None, now=NOW)
    with pytest.raises(InvalidInput, match="--name"):
        initialise(tmp_path / "model.ledger", document, name="two\nlines", start=None, now=NOW)
    method = replace(langevin(200, learn_steps=50), requests=((1, 5), (1, 5)), group_size=2, unlearn_steps=5)
    with pytest.raises(NotApplicable, match="--requests"):
        initialise(tmp_path / "model.ledger", template(method).to_json(), name="", start=None, now=NOW)
    assert files(tmp_path) == set()


def test_a_start_that_was_not_learned_by_the_plan(tmp_path: Path) -> None:
    document = plan_of().to_json()
    folder = learned_folder(tmp_path / "learned", plan_of(300))
    with pytest.raises(DataError, match="another plan"):
        initialise(tmp_path / "model.ledger", document, name="", start=folder, now=NOW)
    folder = learned_folder(tmp_path / "changed", plan_of())
    (folder / "private" / "state.safetensors").write_text("other")
    with pytest.raises(DataError, match="changed or damaged"):
        initialise(tmp_path / "model.ledger", document, name="", start=folder, now=NOW)
    with pytest.raises(DataError, match="folder of a learn run"):
        initialise(tmp_path / "model.ledger", document, name="", start=tmp_path / "none", now=NOW)
    assert files(tmp_path) == {"learned", "changed"}


# Append-only


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = '{}' WHERE number = 2",
        "UPDATE entries SET number = 7 WHERE number = 2",
        "DELETE FROM entries WHERE number = 2",
        "INSERT OR REPLACE INTO entries VALUES (2, 'request', '{}', zeroblob(32))",
        "INSERT INTO entries VALUES (9, 'request', '{}', zeroblob(32))",
        "INSERT INTO entries VALUES (NULL, 'request', '{}', zeroblob(31))",
    ],
)
def test_entries_are_only_ever_appended(statement: str, ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)


def test_appending_and_reading(ledger: Path) -> None:
    with opened(ledger, write=True, secret=True) as found:
        with found.writing() as writer:
            body = {
                "request": 1,
                "records": ["ab" * 32],
                "reason": "Gründe, 理由",
                "received": NOW,
                "due": None,
                "time": NOW,
            }
            entry = writer.append("request", body)
        before = found.entry(2)
        assert entry.hash == entry_hash(before.hash, 3, "request", body)
        assert found.entry(3) == entry == [*found.entries()][-1]
        assert found.check_head().hash == entry.hash
        with pytest.raises(DataError, match="no entry 4"):
            found.entry(4)
        assert folded(found.entries()).requests[0].reason == "Gründe, 理由"


def test_a_failed_transaction_leaves_no_trace(ledger: Path) -> None:
    before = ledger.read_bytes()

    def midway() -> None:
        with opened(ledger, write=True, secret=True) as found, found.writing() as writer:
            writer.append("request", REQUEST)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        midway()
    with opened(ledger) as found:
        assert found.check_head().count == 2
        assert summary.count_requests(found.connection) == 0
    assert ledger.read_bytes() == before


# Versions


def migrated(path: Path, migrations: tuple[schema.Migration, ...]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        schema.migrate(connection, migrations)


def test_older_files_are_brought_up_to_date_step_by_step(ledger: Path) -> None:
    def second(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE more (a)")

    def third(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE more ADD COLUMN b")
        connection.execute("INSERT INTO more VALUES (1, 2)")
        raise sqlite3.OperationalError("power cut")

    with pytest.raises(sqlite3.OperationalError, match="power cut"):
        migrated(ledger, (*schema.MIGRATIONS, second, third))
    with closing(sqlite3.connect(ledger)) as connection:
        # The step that worked stays, the one that did not is undone to the last column.
        assert schema.version(connection) == len(schema.MIGRATIONS) + 1
        assert [row[1] for row in connection.execute("PRAGMA table_info (more)")] == ["a"]
        assert connection.execute("SELECT count(*) FROM more").fetchone() == (0,)

    def repaired(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE more ADD COLUMN b")

    migrated(ledger, (*schema.MIGRATIONS, second, repaired))
    with closing(sqlite3.connect(ledger)) as connection:
        assert schema.version(connection) == len(schema.MIGRATIONS) + 2


def test_a_newer_ledger_is_refused(ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection:
        connection.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    before = ledger.read_bytes()
    for write in (False, True):
        with pytest.raises(DataError, match="install a newer one"), opened(ledger, write=write):
            pass
    assert ledger.read_bytes() == before


# Other files


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    text, empty, foreign = tmp_path / "text", tmp_path / "empty", tmp_path / "foreign"
    text.write_text("not a database, but long enough to be taken for one\n" * 50)
    empty.touch()
    with closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE entries (number)")
        connection.commit()
    for path in (text, empty, foreign):
        before = path.read_bytes()
        for write in (False, True):
            with pytest.raises(DataError, match="is not a ledger"), opened(path, write=write):
                pass
        assert path.read_bytes() == before
    with pytest.raises(DataError, match="does not exist"), opened(tmp_path / "none"):
        pass
    with pytest.raises(DataError, match="is not a file"), opened(tmp_path):
        pass
    assert files(tmp_path) == {"text", "empty", "foreign"}


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    path = storied(tmp_path / "model.ledger")
    whole = path.read_bytes()
    for length in (len(whole) // 2, 4096, 1000, 99):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"damaged|not a ledger|no head|no entry"):
            ask(path, [90])
    page = bytearray(whole)
    page[100:4096] = b"\xff" * 3996
    path.write_bytes(page)
    with pytest.raises(DataError, match="damaged"):
        ask(path, [90])


#: Selecting from it never ends.
ENDLESS = "CREATE VIEW endless AS WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c"


@pytest.mark.parametrize(
    "statements",
    [
        [ENDLESS, "CREATE TRIGGER slow AFTER INSERT ON entries BEGIN SELECT max(x) FROM endless; END"],
        ["CREATE INDEX another ON request (received)"],
        ["CREATE TABLE another (a)"],
        ["DROP TRIGGER entries_stay"],
        ["DROP INDEX due", "CREATE INDEX due ON request (received)"],
        ["DROP TABLE folder", ENDLESS.replace("endless", "folder", 1)],
        ["PRAGMA writable_schema = ON", "UPDATE sqlite_master SET name = 'sqlite_x' WHERE name = 'entries_stay'"],
    ],
)
def test_only_the_tables_of_a_ledger_are_worked_with(statements: list[str], ledger: Path) -> None:
    with closing(sqlite3.connect(ledger, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    for write in (False, True):
        with pytest.raises(DataError, match="damaged"), opened(ledger, write=write):
            pass
    with pytest.raises(DataError, match="damaged"):
        ask(ledger, [1])


def test_statistics_of_a_database_are_no_harm(ledger: Path) -> None:
    with closing(sqlite3.connect(ledger, isolation_level=None)) as connection:
        connection.execute("ANALYZE")
        connection.execute("VACUUM")
    assert ask(ledger, [1]).head.count == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_answered_while_the_database_works(number: int, ledger: Path) -> None:
    def working() -> None:
        with opened(ledger, write=True, secret=True) as found, found.writing() as writer:
            writer.append("request", REQUEST)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            found.connection.execute(f"{ENDLESS.partition(' AS ')[2]} WHERE x < 0").fetchall()

    def told(*_: object) -> None:
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGALRM, told)
    try:
        with pytest.raises(KeyboardInterrupt):
            working()
    finally:
        signal.signal(signal.SIGALRM, before)
    with opened(ledger) as found:
        assert found.check_head().count == 2


WRONG = ["x'6162'", "'a'", "NULL", "0.5", "-1", "4611686018427387904"]


@pytest.mark.parametrize(
    "statement",
    [
        *(f"UPDATE request SET {name} = {value}" for name in ("records", "entry") for value in WRONG),
        *(f"UPDATE request SET {name} = {value}" for name in ("received", "due") for value in ("x'61'", "x'ff'")),
        *(
            f"UPDATE request SET {name} = {value}"
            for name in ("release", "planned")
            for value in WRONG
            if value != "NULL"
        ),
        "UPDATE request SET release = 3 WHERE number = 1",
        "UPDATE request SET number = -1 WHERE number = 1",
        "UPDATE request SET number = 4611686018427387904 WHERE number = 4",
        *(f"UPDATE release SET records = {value}" for value in WRONG),
        *(f"UPDATE release SET {name} = x'61'" for name in ("noise", "mu", "turns", "level", "plan_digest")),
        "UPDATE release SET turns = 'a'",
        "UPDATE release SET plan_entry = 'a' WHERE number = 3",
        "UPDATE release SET execution_entry = 'a'",
        "UPDATE release SET number = -1 WHERE number = 1",
        "UPDATE release SET number = 4611686018427387904 WHERE number = 3",
        "DELETE FROM release WHERE number = 1",
    ],
)
def test_rows_that_no_entry_wrote(statement: str, stories: Path, tmp_path: Path) -> None:
    for name in ("model.ledger", "model.ledger.secret"):
        shutil.copy(stories.with_name(name), tmp_path)
    path = tmp_path / "model.ledger"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        try:
            connection.execute(statement)
        except sqlite3.IntegrityError:
            # Whoever means harm needs no constraint to agree.
            rows = connection.execute("SELECT count(*) FROM request").fetchone()
            connection.execute("PRAGMA writable_schema = ON")
            kept = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
            connection.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '') WHERE type = 'table'")
            connection.execute("PRAGMA schema_version = 1000")
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute(statement)
                assert other.execute("SELECT count(*) FROM request").fetchone() == rows
            connection.executemany("UPDATE sqlite_master SET sql = ? WHERE name = ?", [pair[::-1] for pair in kept])
            connection.execute("PRAGMA schema_version = 1001")
    said = []
    for work in (
        lambda: status(found, everything=True, now=NOW),
        lambda: chosen_requests(found, None),
        lambda: summary.releases(found.connection),
    ):
        with opened(path) as found:
            try:
                work()
            except RdpCalcError as error:
                said.append(str(error))
    assert any("damaged" in text for text in said)
    assert all("\n" not in text for text in said)
    assert not verify_file(path).holds


def test_a_folder_that_is_none(ledger: Path) -> None:
    for value in (b"ab", 7, "a\0b", "\x1b[2J"):
        with closing(sqlite3.connect(ledger, isolation_level=None)) as connection:
            connection.execute("INSERT OR REPLACE INTO folder VALUES ('there', ?)", (value,))
        with opened(ledger) as found:
            if isinstance(value, int):
                assert found.folder("there") == Path("7")
                continue
            with pytest.raises(DataError, match="table folder"):
                found.folder("there")


def test_a_link_to_a_ledger_is_that_ledger(ledger: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    link = tmp_path / "other" / "link"
    link.symlink_to(ledger)
    assert ask(link, [1]).head.count == 3
    assert files(tmp_path / "other") == {"link"}


# The secret


def test_without_its_secret_a_ledger_is_read_only(ledger: Path) -> None:
    private = secret_path(ledger)
    kept = private.read_text()
    private.unlink()
    with opened(ledger) as found:
        assert found.check_head().count == 2
    with pytest.raises(DataError, match=r"secret .* cannot be read"):
        ask(ledger, [1])
    for content, message in (
        ("{}", "field schema is missing"),
        (kept.replace("ledger-secret/1", "ledger-secret/2"), "schema"),
        ('{"schema": "rdp-calc/ledger-secret/1", "salt": "xy"}', "hexadecimal"),
        ('{"schema": "rdp-calc/ledger-secret/1", "salt": "' + "0" * 64 + '"}', "is not the secret of this ledger"),
    ):
        private.write_text(content)
        private.chmod(0o600)
        with pytest.raises(DataError, match=message):
            ask(ledger, [1])
    private.write_text(kept)
    private.chmod(0o640)
    with pytest.raises(DataError, match="chmod 600"):
        ask(ledger, [1])
    private.rename(private.with_name("elsewhere"))
    private.symlink_to(private.with_name("elsewhere"))
    with pytest.raises(DataError, match="not a regular file"):
        ask(ledger, [1])
    private.unlink()
    private.write_text(kept)
    private.chmod(0o600)
    assert ask(ledger, [1]).head.count == 3


def test_a_head_that_nobody_with_the_secret_wrote(ledger: Path) -> None:
    ask(ledger, [1])
    with closing(sqlite3.connect(ledger)) as connection:
        connection.execute("UPDATE head SET mac = zeroblob(32)")
        connection.commit()
    with pytest.raises(DataError, match="ledger mismatch"):
        ask(ledger, [2])
    with opened(ledger) as found:
        assert found.check_head().count == 3
        found.secret = read_secret(ledger, found.entry(1).body["salt_sha256"])
        with pytest.raises(DataError, match="ledger mismatch"):
            found.check_head()


# Processes

#: Registers one record a call, in calls that begin as soon as the last has ended.
WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ledger_files import ask
first, count = int(sys.argv[3]), int(sys.argv[4])
for row in range(first, first + count):
    receipt = ask(Path(sys.argv[2]), [row], wait=60)
    print(receipt.head, flush=True)
"""

Start = Callable[[int, int], "subprocess.Popen[str]"]


@pytest.fixture
def writer(ledger: Path) -> Start:
    tests = str(Path(__file__).parents[1])

    def start(first: int, count: int) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", WRITER, tests, str(ledger), str(first), str(count)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)

    return start


def test_writers_take_turns(ledger: Path, writer: Start) -> None:
    processes = [writer(20 * number, 12) for number in range(3)]
    receipts = [line for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    with opened(ledger) as found:
        state = folded(found.entries())
        head = found.check_head()
        hashes = {f"{entry.number}:{entry.hash}" for entry in found.entries()}
    assert (state.count, state.head) == (2 + 36, head.hash)
    # Every receipt is that of an entry, and no two are of the same.
    assert len(set(receipts)) == 36
    assert set(receipts) < hashes


@pytest.mark.parametrize("pause", [0.0, 0.004, 0.02, 0.05])
def test_a_killed_writer_leaves_whole_entries(pause: float, ledger: Path, writer: Start) -> None:
    process = writer(0, 100)
    assert process.stdout is not None
    seen = [process.stdout.readline()]
    time.sleep(pause)
    process.kill()
    seen += process.stdout.read().splitlines(keepends=True)
    process.wait()
    process.stdout.close()
    acknowledged = [line.strip() for line in seen if line.endswith("\n")]
    with opened(ledger) as found:
        state = folded(found.entries())
        head = found.check_head()
        hashes = {f"{entry.number}:{entry.hash}" for entry in found.entries()}
        assert summary.count_requests(found.connection) == len(state.requests)
    assert (state.count, state.head) == (head.count, head.hash)
    assert set(acknowledged) <= hashes
    # What was not registered may be named again, and the next writer goes on.
    assert ask(ledger, [len(state.requests)]).first == len(state.requests) + 1


def test_a_second_writer_waits_or_is_told(ledger: Path) -> None:
    with opened(ledger, write=True, secret=True) as first, first.writing():
        begun = time.monotonic()
        with pytest.raises(DataError, match=r"waited 0\.2 s, nothing was changed"):
            ask(ledger, [1], wait=0.2)
        assert time.monotonic() - begun >= 0.2
        # Readers see the ledger as it was.
        with opened(ledger) as reader:
            assert reader.check_head().count == 2
    assert ask(ledger, [1], wait=0.0).head.count == 3
    for wait in (-1.0, float("nan"), 1e9):
        with pytest.raises(InvalidInput, match="--wait"):
            ask(ledger, [2], wait=wait)


def test_a_reader_sees_one_moment(ledger: Path) -> None:
    with opened(ledger) as found:
        with found.snapshot():
            head = found.check_head()
            ask(ledger, [1])
            assert [entry.number for entry in found.entries()] == [1, 2]
            assert found.check_head() == head
        assert found.check_head().count == 3


def test_one_run_at_a_time(ledger: Path) -> None:
    with run_lock(ledger):
        with pytest.raises(DataError, match="another process is planning or running"), run_lock(ledger):
            pass
        # Requests may come meanwhile.
        assert ask(ledger, [1]).head.count == 3
    with run_lock(ledger):
        pass


def test_a_terminated_writer_undoes_its_transaction(ledger: Path) -> None:
    def terminated() -> None:
        with opened(ledger, write=True, secret=True) as found, found.writing() as writer:
            writer.append("request", REQUEST)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit):
        terminated()
    with opened(ledger) as found:
        assert found.check_head().count == 2


# Disks


def test_a_full_disk_loses_nothing(ledger: Path) -> None:
    ask(ledger, [1])
    with opened(ledger, write=True, secret=True) as found:
        found.connection.execute(
            f"PRAGMA max_page_count = {found.connection.execute('PRAGMA page_count').fetchone()[0]}"
        )
        many = sorted(f"{i:064x}" for i in range(2000))
        with pytest.raises(DataError, match="no space is left"), found.writing() as writer:
            writer.append("request", {**REQUEST, "request": 2, "records": many})
        assert found.check_head().count == 3
        assert folded(found.entries()).count == 3
    assert ask(ledger, [2]).head.count == 4


#: Reads a ledger as somebody who may not write there.
READER = """
import os, sys
from pathlib import Path
from unlearn_runtime.ledger.store import opened
from unlearn_runtime.ledger.verification import verify_file
# Once to import all that is imported late, from where another user may not look.
verify_file(Path(sys.argv[1]))
os.setgid(65534)
os.setuid(65534)
with opened(Path(sys.argv[1])) as ledger:
    print(ledger.check_head().count, verify_file(Path(sys.argv[1])).holds)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's identity")
def test_a_folder_that_cannot_be_written() -> None:
    # Not below the folder of the tests, which other users may not enter.
    folder = Path(tempfile.mkdtemp())
    try:
        path = new_ledger(folder / "model.ledger")
        ask(path, [1])
        folder.chmod(0o755)
        path.chmod(0o644)
        done = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "3 True\n"), done.stderr
        assert files(folder) == {"model.ledger", "model.ledger.secret", "learned"}
    finally:
        shutil.rmtree(folder)
