"""Where every request of a ledger stands, and what the next one would cost."""

from __future__ import annotations

from typing import Any

from rdp_calc.errors import InvalidInput, RdpCalcError
from rdp_calc.history import History, Standing, cost_of
from rdp_calc.result import jsonable
from unlearn_runtime.ledger import summary
from unlearn_runtime.ledger.planning import history, numbers, template
from unlearn_runtime.ledger.schema import DamagedLedger
from unlearn_runtime.ledger.store import Ledger
from unlearn_runtime.ledger.summary import ReleaseRow, RequestRow

STATUS_SCHEMA = "rdp-calc/ledger-status/1"

#: Requests listed where none are named: the newest, and the oldest of those that wait.
NEWEST, WAITING = 20, 100


def status(
    ledger: Ledger, *, requests: str | None = None, everything: bool = False, next_records: int = 1, now: str
) -> dict[str, Any]:
    """The status document (schema rdp-calc/ledger-status/1) as of ``now``; requests named by number, all, or those that
    wait and the newest. All epsilon, delta and mu are rounded up.

    What is overdue is judged by the later of ``now`` and the last entry's time, so that a clock that went back hides
    nothing. Raises DataError for a request that is not there, InvalidInput for a text that names none.
    """
    if requests is not None and everything:
        raise InvalidInput("--requests and --all conflict; give one.")
    with ledger.snapshot():
        return _status(ledger, requests, everything, next_records, now)


def _status(ledger: Ledger, requests: str | None, everything: bool, next_records: int, now: str) -> dict[str, Any]:
    head = ledger.check_head()
    document, past = template(ledger), history(ledger)
    written = ledger.written
    judged = max(now, written)
    rows = _shown(ledger, requests, everything, judged)
    total = summary.count_requests(ledger.connection)
    waiting, planned, overdue = summary.pending_counts(ledger.connection, judged)
    records = summary.count_records(ledger.connection)
    if (records > past.removed) != (waiting > 0):
        raise DamagedLedger(f"{ledger.path} is damaged: its tables count records differently; run ledger verify.")
    return jsonable(  # type: ignore[no-any-return]
        {
            "schema": STATUS_SCHEMA,
            "ledger": str(ledger.path),
            "name": ledger.entry(1).body.get("name"),
            "method": document["method"],
            "plan_digest": document["digest"],
            "target": document["target"],
            "dataset_size": document["problem"]["dataset_size"],
            "entries": head.count,
            "head": str(head),
            "time": judged,
            "clock_behind": now < written,
            "learned": summary.learned(ledger.connection),
            "requests": {
                "total": total,
                "pending": waiting - planned,
                "planned": planned,
                "certified": total - waiting,
                "overdue": overdue,
                "late": summary.late_count(ledger.connection),
            },
            "records": {"requested": records, "removed": past.removed},
            "releases": len(past.made),
            "open_release": _open(summary.open_release(ledger.connection)),
            "shown": _request_rows(ledger, rows, past, judged),
            "next": _next(past, next_records),
            # Where all are planned, the open release says it.
            "pending_together": _next(past, records - past.removed) if waiting > planned else None,
        }
    )


def _shown(ledger: Ledger, requests: str | None, everything: bool, judged: str) -> list[RequestRow]:
    if requests is not None:
        return [summary.request(ledger.connection, number) for number in numbers("--requests", requests, ledger)]
    if everything:
        return list(summary.requests(ledger.connection))
    late = summary.overdue_numbers(ledger.connection, judged)[:WAITING]
    found = {number: summary.request(ledger.connection, number) for number in late}
    found |= {row.number: row for row in summary.pending(ledger.connection, WAITING)}
    found |= {row.number: row for row in summary.last_requests(ledger.connection, NEWEST)}
    return [found[number] for number in sorted(found)]


def _request_rows(ledger: Ledger, rows: list[RequestRow], past: History, judged: str) -> list[dict[str, Any]]:
    # Many requests share a release and a size; one answer costs as much as a calibration.
    answered = sorted({(row.release, row.records) for row in rows if row.release is not None})
    certified = summary.certified(ledger.connection, {release for release, _ in answered})
    standings = dict(zip(answered, past.standings(answered) if answered else (), strict=True))
    shown = []
    for row in rows:
        body = ledger.entry(row.entry).body
        state = "certified" if row.release is not None else "pending" if row.planned is None else "planned"
        found: dict[str, Any] = {
            "request": row.number,
            "records": row.records,
            "reason": str(body.get("reason", "")),
            "received": row.received,
            "due": row.due,
            "state": state,
            "overdue": row.release is None and row.due is not None and row.due < judged,
            "late": False,
            "certified_at": None,
            "release": row.planned if row.release is None else row.release,
            "entry": row.entry,
        }
        if row.release is not None:
            level, time = certified[row.release]
            found |= {"certified_at": time, "late": row.due is not None and time > row.due, "level": level}
            found |= _numbers(standings[row.release, row.records])
        shown.append(found)
    return shown


def _numbers(standing: Standing) -> dict[str, Any]:
    return {
        "epsilon": standing.epsilon,
        "delta": standing.delta,
        "mu": standing.mu,
        "joint_mu": standing.joint_mu,
    }


def _open(row: ReleaseRow | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        "release": row.number,
        "records": row.records,
        "unlearn_steps": row.turns,
        "noise": row.noise,
        "plan_digest": row.plan_digest,
        "begun": row.execution_entry is not None,
    }


def _next(past: History, records: int) -> dict[str, Any]:
    """What a release for one more request would cost now; where it cannot be had, why."""
    if not records >= 1:
        raise InvalidInput(f"--next must be at least 1, got {records}.")
    found: dict[str, Any] = {"records": records}
    try:
        plan = past.next_plan(records)
    except RdpCalcError as error:
        return found | {"unlearn_steps": None, "noise": None, "noise_std": None, "cost": None, "refused": str(error)}
    made = past.after(plan, records).made[-1]
    return found | {
        "unlearn_steps": made.turns,
        "noise": plan.noise,
        "noise_std": plan.noise_std,
        "cost": cost_of(plan),
        "refused": None,
    }
