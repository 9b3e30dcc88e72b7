"""Releases of a ledger: planned from the whole history, made once, adopted when they were made and not recorded."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from ledger_files import (
    NOW,
    Runner,
    ask,
    chain_again,
    head_again,
    new_ledger,
    plan_next,
    plan_of,
    release,
    storied,
    without_triggers,
)

from rdp_calc.errors import DataError, InvalidInput, TargetUnreachable
from rdp_calc.history import History
from rdp_calc.ledger import LedgerState, folded
from unlearn_runtime.ledger.creating import initialise
from unlearn_runtime.ledger.planning import check_unfinished
from unlearn_runtime.ledger.secret import run_lock
from unlearn_runtime.ledger.status import status
from unlearn_runtime.ledger.store import opened
from unlearn_runtime.ledger.verification import verify_file


class Killed(BaseException):
    """What ends a process at once, as far as a test in one process can."""


def killed_when(moment: str) -> Callable[[str], None]:
    def end(now: str) -> None:
        if now == moment:
            raise Killed

    return end


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = new_ledger(tmp_path / "model.ledger")
    ask(path, [3, 17], [40, 41, 42])
    return path


def state_of(path: Path) -> LedgerState:
    with opened(path) as found:
        return folded(found.entries())


def kinds(path: Path) -> list[str]:
    with opened(path) as found:
        return [entry.kind for entry in found.entries()]


# Plans


def test_plans_follow_the_history(ledger: Path) -> None:
    planned = plan_next(ledger)
    history = History.of(plan_of())
    assert planned.plan.to_json() == history.next_plan(5).to_json()
    assert (planned.number, planned.requests) == (1, (1, 2))
    release(ledger, ledger.parent / "release-1")
    ask(ledger, [5])
    again = plan_next(ledger)
    assert again.plan.to_json() == history.after(planned.plan, 5).next_plan(1).to_json()
    assert again.plan.method.requests == ((5, planned.entry.body["turns"]), (1, again.entry.body["turns"]))  # type: ignore[attr-defined]


def test_one_by_one_plans_the_first_alone(ledger: Path) -> None:
    together = plan_next(ledger)
    alone = plan_next(ledger, one_by_one=True)
    assert (together.requests, alone.requests) == ((1, 2), (1,))
    assert alone.plan.to_json() == History.of(plan_of()).next_plan(2).to_json()
    # Both ways are told either way.
    assert alone.choices.together_cost == together.cost
    assert alone.together_turns == together.entry.body["turns"]
    assert len(alone.choices.one_by_one.turns) == 2
    with opened(ledger) as found:
        assert [row["state"] for row in status(found, now=NOW)["shown"]] == ["planned", "pending"]
    # The last plan is the one that is carried out.
    done = release(ledger, ledger.parent / "release-1")
    assert (done.requests, done.records) == ((1,), 2)
    assert [request.release for request in state_of(ledger).requests] == [1, None]
    with opened(ledger) as found:
        assert [row["state"] for row in status(found, now=NOW)["shown"]] == ["certified", "pending"]
    assert verify_file(ledger).holds


# Runs


def test_a_run_gets_what_it_needs(ledger: Path) -> None:
    planned = plan_next(ledger)
    run = Runner()
    done = release(ledger, ledger.parent / "release-1", run)
    (call,) = run.calls
    assert call["document"] == planned.plan.to_json()
    assert (call["phase"], call["continuing"]) == ("unlearn", True)
    assert call["forget"] == "3,17,40,41,42"
    assert call["start"] == ledger.parent / "learned"
    assert (done.phase, done.release, done.level, done.adopted) == ("unlearn", 1, "certified", False)
    assert kinds(ledger) == ["model", "learning", "request", "request", "plan", "execution", "certificate"]
    ask(ledger, [5])
    plan_next(ledger)
    run = Runner()
    release(ledger, ledger.parent / "release-2", run)
    # A chain goes on from the last state, and forgets what is new.
    assert run.calls[0]["start"] == ledger.parent / "release-1"
    assert run.calls[0]["forget"] == "5"
    report = verify_file(ledger)
    assert [check for check in report.checks if not check.passed] == []
    state = state_of(ledger)
    assert [len(item) for item in (state.releases, state.pending)] == [2, 0]


def test_learning_first(tmp_path: Path) -> None:
    path = tmp_path / "model.ledger"
    initialise(path, plan_of().to_json(), name="", start=None, now=NOW)
    ask(path, [1])
    plan_next(path)
    run = Runner()
    with pytest.raises(InvalidInput, match="leave --start out"):
        release(path, tmp_path / "learned", run, start=tmp_path)
    done = release(path, tmp_path / "learned", run)
    assert (done.phase, done.release, done.adopted) == ("learn", None, False)
    assert [call["phase"] for call in run.calls] == ["learn"]
    done = release(path, tmp_path / "release-1", run)
    assert (done.phase, done.release) == ("unlearn", 1)
    assert verify_file(path).holds


def test_learning_that_was_not_recorded_is_adopted(tmp_path: Path) -> None:
    path = tmp_path / "model.ledger"
    initialise(path, plan_of().to_json(), name="", start=None, now=NOW)
    Runner()(plan_of().to_json(), phase="learn", output=tmp_path / "learned")
    run = Runner()
    assert release(path, tmp_path / "learned", run).adopted
    assert run.calls == []


def test_nothing_planned_nothing_run(ledger: Path) -> None:
    with pytest.raises(InvalidInput, match="no release is planned"):
        release(ledger, ledger.parent / "release-1")
    plan_next(ledger)
    release(ledger, ledger.parent / "release-1")
    with pytest.raises(InvalidInput, match="no release is planned"):
        release(ledger, ledger.parent / "release-2")


def test_the_start_must_be_the_last_state(ledger: Path) -> None:
    plan_next(ledger)
    release(ledger, ledger.parent / "release-1")
    ask(ledger, [5])
    plan_next(ledger)
    run, before = Runner(), kinds(ledger)
    with pytest.raises(DataError, match="ledger mismatch"):
        release(ledger, ledger.parent / "release-2", run, start=ledger.parent / "learned")
    state = ledger.parent / "release-1" / "private" / "state.safetensors"
    state.write_text("state 1, changed")
    with pytest.raises(DataError, match="ledger mismatch"):
        release(ledger, ledger.parent / "release-2", run)
    state.write_text("state 1")
    (ledger.parent / "release-1").rename(ledger.parent / "moved")
    with pytest.raises(DataError, match=r"No such file|must be the folder"):
        release(ledger, ledger.parent / "release-2", run)
    assert (run.calls, kinds(ledger)) == ([], before)
    release(ledger, ledger.parent / "release-2", run, start=ledger.parent / "moved")
    assert verify_file(ledger).holds


def test_a_release_beside_the_ledger_stops_it(ledger: Path) -> None:
    plan_next(ledger)
    (ledger.parent / "learned" / "private" / "releases.txt").write_text("ab" * 32 + "\n")
    run = Runner()
    with pytest.raises(DataError, match=r"a release was made from .* that the ledger does not know"):
        release(ledger, ledger.parent / "release-1", run)
    assert run.calls == []


def test_two_ledgers_cannot_release_from_one_state_at_once(ledger: Path) -> None:
    # Whoever makes a release holds a lock on what it starts from, also for a ledger this one knows nothing of.
    plan_next(ledger)
    before, held = kinds(ledger), os.open(ledger.parent / "learned", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process makes a release"):
            release(ledger, ledger.parent / "release-1")
        assert kinds(ledger) == before
    finally:
        os.close(held)
    assert release(ledger, ledger.parent / "release-1").release == 1


def test_a_run_that_is_refused_did_not_begin(ledger: Path) -> None:
    plan_next(ledger)
    before = kinds(ledger)
    with pytest.raises(Killed):
        release(ledger, ledger.parent / "release-1", Runner(fails=killed_when("admitted")))
    (ledger.parent / "full").mkdir()
    (ledger.parent / "full" / "file").touch()
    with pytest.raises(InvalidInput, match="not empty"):
        release(ledger, ledger.parent / "full")
    assert kinds(ledger) == before


def test_a_run_that_died_is_made_again(ledger: Path) -> None:
    plan_next(ledger)
    with pytest.raises(Killed):
        release(ledger, ledger.parent / "release-1", Runner(fails=killed_when("begun")))
    said: list[str] = []
    done = release(ledger, ledger.parent / "release-1", announce=said.append)
    assert (done.release, done.adopted) == (1, False)
    assert "was begun at" in said[0]
    assert kinds(ledger)[-3:] == ["execution", "execution", "certificate"]
    report = verify_file(ledger)
    assert report.holds
    assert "1 (2 times)" in next(check.detail for check in report.checks if check.name == "runs")


@pytest.mark.parametrize("named", [True, False])
def test_a_release_that_was_not_recorded_is_adopted(named: bool, ledger: Path) -> None:
    plan_next(ledger)
    with pytest.raises(Killed):
        release(ledger, ledger.parent / "release-1", Runner(fails=killed_when("written")))
    assert kinds(ledger)[-1] == "execution"
    # Planning anew would forget that it was made.
    with opened(ledger) as found, pytest.raises(DataError, match=r"was made in .* and is not recorded yet"):
        check_unfinished(found)
    run = Runner()
    done = release(ledger, ledger.parent / ("release-1" if named else "another"), run)
    assert (done.release, done.adopted, done.output) == (1, True, ledger.parent / "release-1")
    assert run.calls == []
    assert kinds(ledger)[-2:] == ["execution", "certificate"]
    assert verify_file(ledger).holds


def test_a_moved_folder_is_adopted_where_it_is_named(ledger: Path) -> None:
    plan_next(ledger)
    with pytest.raises(Killed):
        release(ledger, ledger.parent / "release-1", Runner(fails=killed_when("written")))
    (ledger.parent / "release-1").rename(ledger.parent / "moved")
    run = Runner()
    assert release(ledger, ledger.parent / "moved", run).adopted
    assert run.calls == []


def test_another_release_is_not_adopted(ledger: Path) -> None:
    plan_next(ledger)
    with pytest.raises(Killed):
        release(ledger, ledger.parent / "release-1", Runner(fails=killed_when("written")))
    folder = ledger.parent / "release-1"
    audit = json.loads((folder / "private" / "audit.json").read_text())
    kept = ledger.parent / "kept"
    shutil.copytree(folder, kept)
    # Other rows; then it is another release, and the folder is in the way.
    (folder / "private" / "audit.json").write_text(json.dumps({**audit, "forgotten_ids": [1, 2, 3, 4, 5]}))
    with pytest.raises(InvalidInput, match="not empty"):
        release(ledger, folder)
    # Another start.
    (folder / "private" / "audit.json").write_text(json.dumps({**audit, "learning_record": {"state_sha256": "0" * 64}}))
    with pytest.raises(InvalidInput, match="not empty"):
        release(ledger, folder)
    shutil.copy(kept / "private" / "audit.json", folder / "private" / "audit.json")
    # A changed model.
    (folder / "model.safetensors").write_text("other")
    with pytest.raises(DataError, match="not the model of its certificate"):
        release(ledger, folder)
    shutil.copy(kept / "model.safetensors", folder / "model.safetensors")
    # A changed certificate.
    certificate = json.loads((folder / "certificate.json").read_text())
    (folder / "certificate.json").write_text(json.dumps({**certificate, "model_sha256": "0" * 64}))
    with pytest.raises(DataError, match="does not verify"):
        release(ledger, folder)
    assert kinds(ledger)[-1] == "execution"
    shutil.copy(kept / "certificate.json", folder / "certificate.json")
    assert release(ledger, folder).adopted


def test_one_run_at_a_time_and_requests_meanwhile(ledger: Path) -> None:
    plan_next(ledger)

    def meanwhile(moment: str) -> None:
        if moment == "begun":
            with pytest.raises(DataError, match="another process is planning or running"), run_lock(ledger):
                pass
            ask(ledger, [5])

    release(ledger, ledger.parent / "release-1", Runner(fails=meanwhile))
    assert kinds(ledger)[-3:] == ["execution", "request", "certificate"]
    assert [request.release for request in state_of(ledger).requests] == [1, 1, None]
    assert verify_file(ledger).holds


def test_a_run_rests_on_the_entries_and_not_on_the_tables(ledger: Path) -> None:
    plan_next(ledger)
    with without_triggers(ledger) as connection:
        connection.execute("UPDATE release SET turns = 0, noise = 1e-9, records = 1")
        connection.execute("UPDATE request SET planned = NULL")
    run = Runner()
    release(ledger, ledger.parent / "release-1", run)
    assert run.calls[0]["forget"] == "3,17,40,41,42"
    assert run.calls[0]["document"] == History.of(plan_of()).next_plan(5).to_json()
    with without_triggers(ledger) as connection:
        connection.execute("UPDATE entries SET body = replace(body, '\"group\":5', '\"group\":4') WHERE kind = 'plan'")
    ask(ledger, [5])
    with pytest.raises(DataError, match="hash is wrong"):
        release(ledger, ledger.parent / "release-2", run)


def test_a_plan_with_fewer_steps_is_not_run(ledger: Path) -> None:
    """Not even with the secret: the plan is derived again, and its claim proved, before anything is drawn."""
    turns = plan_next(ledger).entry.body["turns"]
    with without_triggers(ledger) as connection:
        change = f"UPDATE entries SET body = replace(body, '\"turns\":{turns}', '\"turns\":{turns - 1}')"
        assert connection.execute(f"{change} WHERE kind = 'plan'").rowcount == 1
        chain_again(connection)
    head_again(ledger)
    run = Runner()
    with pytest.raises((DataError, TargetUnreachable)):
        release(ledger, ledger.parent / "release-1", run)
    # More steps would do no harm, but they are not what was planned.
    with without_triggers(ledger) as connection:
        change = f"UPDATE entries SET body = replace(body, '\"turns\":{turns - 1}', '\"turns\":{turns + 1}')"
        assert connection.execute(f"{change} WHERE kind = 'plan'").rowcount == 1
        chain_again(connection)
    head_again(ledger)
    with pytest.raises(DataError, match="not the one that was recorded"):
        release(ledger, ledger.parent / "release-1", run)
    assert run.calls == []


# Status


def test_status(tmp_path: Path) -> None:
    path = storied(tmp_path / "model.ledger")
    ask(path, [90, 91], received="2025-12-01", due="2025-12-31")
    with opened(path) as found:
        document = status(found, next_records=2, now=NOW)
        state = folded(found.entries())
    assert document["schema"] == "rdp-calc/ledger-status/1"
    assert document["head"] == f"{state.count}:{state.head}"
    assert document["requests"] == {"total": 5, "pending": 1, "planned": 1, "certified": 3, "overdue": 1, "late": 0}
    assert document["records"] == {"requested": 9, "removed": 6}
    states = [(row["request"], row["state"], row["release"], row["overdue"]) for row in document["shown"]]
    assert states == [
        (1, "certified", 1, False),
        (2, "certified", 1, False),
        (3, "certified", 2, False),
        (4, "planned", 3, False),
        (5, "pending", None, True),
    ]
    history = state.history
    for row, group in zip(document["shown"][:3], (2, 3, 1), strict=True):
        (standing,) = history.standings([(row["release"], group)])
        assert (row["mu"], row["joint_mu"]) == (standing.mu, standing.joint_mu)
        assert (row["epsilon"], row["delta"], row["level"]) == (standing.epsilon, standing.delta, "certified")
        assert row["epsilon"] <= 1
        assert row["delta"] <= 1e-5
    following = history.next_plan(2)
    assert document["next"]["unlearn_steps"] == history.after(following, 2).made[-1].turns
    assert document["next"]["noise"] == following.noise
    together = history.next_plan(3)
    assert document["pending_together"]["records"] == 3
    assert document["pending_together"]["unlearn_steps"] == history.after(together, 3).made[-1].turns
    assert document["open_release"]["plan_digest"] == history.next_plan(1).to_json()["digest"]
    assert document["learned"] is True


def test_status_of_some_requests(ledger: Path) -> None:
    ask(ledger, *([row] for row in range(100, 140)))
    with opened(ledger) as found:
        assert [row["request"] for row in status(found, requests="2,40-41", now=NOW)["shown"]] == [2, 40, 41]
        assert len(status(found, everything=True, now=NOW)["shown"]) == 42
        for given in ({"requests": "43"}, {"requests": "1", "everything": True}, {"next_records": 0}):
            with pytest.raises((DataError, InvalidInput)):
                status(found, now=NOW, **given)  # type: ignore[arg-type]
        # What cannot be had is said, and the rest is shown.
        document = status(found, next_records=200, now=NOW)
        assert document["next"]["refused"]
        assert document["next"]["unlearn_steps"] is None
    plan_next(ledger, "1-40")
    release(ledger, ledger.parent / "release-1")
    with opened(ledger) as found:
        shown = [row["request"] for row in status(found, now=NOW)["shown"]]
    assert shown == list(range(23, 43))


def test_a_clock_that_went_back_hides_nothing(ledger: Path) -> None:
    ask(ledger, [9], due="2026-01-05", now="2026-01-02T00:00:00Z")
    ask(ledger, [10], now="2026-01-06T00:00:00Z")
    with opened(ledger) as found:
        document = status(found, now="2026-01-03T00:00:00Z")
    assert (document["time"], document["clock_behind"]) == ("2026-01-06T00:00:00Z", True)
    assert document["requests"]["overdue"] == 1
    # It stops nobody, and verify says so without failing.
    ask(ledger, [11], now="2026-01-03T00:00:00Z")
    report = verify_file(ledger)
    assert report.holds
    (clock,) = [check for check in report.checks if check.name == "clock"]
    assert "went back" in clock.detail


def test_tables_that_speed_things_up_say_what_the_entries_say(tmp_path: Path) -> None:
    path = storied(tmp_path / "model.ledger")
    state = state_of(path)
    with opened(path) as found, closing(found.connection.cursor()) as cursor:
        requests = cursor.execute("SELECT number, records, received, due, release FROM request ORDER BY number")
        expected = [(r.number, r.group, r.received, r.due, r.release) for r in state.requests]
        assert requests.fetchall() == expected
        releases = cursor.execute(
            "SELECT records, turns, noise, mu, plan_digest, state_fingerprint FROM release"
            " WHERE certificate_entry IS NOT NULL ORDER BY number"
        )
        assert releases.fetchall() == [
            (p.group, p.turns, p.noise, p.mu, p.plan_digest, r.state_fingerprint)
            for r, p in ((r, r.planned) for r in state.releases)
        ]
        records = cursor.execute("SELECT hex(hash), request FROM record")
        assert {(text.lower(), number) for text, number in records} == {
            (record, request.number) for request in state.requests for record in request.records
        }
