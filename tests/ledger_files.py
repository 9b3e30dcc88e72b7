"""Ledger files made without torch: learned models and releases are folders whose files are short texts."""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ledgers import certificate, langevin, sha, template

from rdp_calc.documents import canonical
from rdp_calc.ledger import GENESIS
from rdp_calc.plan import Plan, plan_from_json
from unlearn_runtime.ledger.creating import initialise
from unlearn_runtime.ledger.planning import NextRelease, chosen_requests, plan_release
from unlearn_runtime.ledger.requests import Asked, Receipt, Wording, register
from unlearn_runtime.ledger.running import Done, carry_out
from unlearn_runtime.ledger.store import opened

NOW = "2026-01-01T00:00:00Z"

SIZE = 200


def plan_of(size: int = SIZE) -> Plan:
    """The plan of a small logistic problem."""
    return template(langevin(size, group_size=3, learn_steps=50))


def learned_folder(path: Path, plan: Plan) -> Path:
    """What a learn run leaves, as far as a ledger looks at it."""
    (path / "private").mkdir(parents=True)
    (path / "private" / "state.safetensors").write_text("state 0")
    record = {
        "schema": "rdp-calc/learning-record/1",
        "plan_digest": plan.to_json()["digest"],
        "state_sha256": sha("state 0"),
        "data_fingerprint": sha("data"),
        "learn_steps": plan.executed_learn_steps,
        "random_source": "os-entropy",
        "deviation": None,
    }
    (path / "private" / "learning.json").write_text(json.dumps(record))
    return path


def new_ledger(path: Path) -> Path:
    """A ledger with a learned model beside it, in the folder ``learned``."""
    plan = plan_of()
    folder = learned_folder(path.parent / "learned", plan)
    initialise(path, plan.to_json(), name="test", start=folder, now=NOW)
    return path


def ask(path: Path, *groups: list[int], now: str = NOW, wait: float = 5.0, **wording: Any) -> Receipt:
    """Register one request for each list of rows."""
    asked = [Asked(np.array(rows), Wording(**wording)) for rows in groups]
    with opened(path, write=True, secret=True, wait=wait) as ledger:
        return register(ledger, asked, now=now)


def plan_next(path: Path, requests: str | None = None, *, one_by_one: bool = False, now: str = NOW) -> NextRelease:
    """Plan the next release."""
    with opened(path, write=True, secret=True) as ledger:
        return plan_release(ledger, chosen_requests(ledger, requests), one_by_one=one_by_one, now=now)


class Runner:
    """Stands in for ``run_plan``: writes the folder that a run of the plan would, and remembers what it was asked."""

    def __init__(self, *, fails: Callable[[str], None] = lambda moment: None) -> None:
        self.calls: list[dict[str, Any]] = []
        self._fails = fails

    def __call__(self, document: dict[str, Any], *, phase: str, output: Path, **given: Any) -> dict[str, Any]:
        self.calls.append({"document": document, "phase": phase, "output": output, **given})
        plan = plan_from_json(document)
        self._fails("admitted")
        if phase == "learn":
            learned_folder(output, plan)
            return {"phase": phase}
        given["begin"]()
        self._fails("begun")
        number = len(plan.method.requests)  # type: ignore[attr-defined]
        release_folder(output, plan, number, [int(text) for text in given["forget"].split(",")], given["start"])
        self._fails("written")
        return {"phase": phase}


def release_folder(output: Path, plan: Plan, number: int, rows: list[int], start: Path) -> None:
    """What a run of ``plan`` leaves, as far as a ledger looks at it."""
    (output / "private").mkdir(parents=True)
    (output / "model.safetensors").write_text(f"model {number}")
    (output / "private" / "state.safetensors").write_text(f"state {number}")
    (output / "certificate.json").write_text(json.dumps(certificate(plan, number), indent=1) + "\n")
    state = hashlib.sha256((start / "private" / "state.safetensors").read_bytes()).hexdigest()
    audit = {"forgotten_ids": rows, "removed_before": [], "learning_record": {"state_sha256": state}}
    (output / "private" / "audit.json").write_text(json.dumps(audit))


def release(path: Path, output: Path, run: Runner | None = None, **given: Any) -> Done:
    """Carry the planned release out."""
    return carry_out(path, run or Runner(), output=output, clock=lambda: NOW, **given)


def storied(path: Path) -> Path:
    """A ledger of two releases for three requests, with one more request and a plan for it."""
    new_ledger(path)
    ask(path, [3, 17], [40, 41, 42])
    plan_next(path)
    release(path, path.parent / "release-1")
    ask(path, [5])
    plan_next(path)
    release(path, path.parent / "release-2")
    ask(path, [6], due_days=30)
    plan_next(path)
    return path


@contextmanager
def without_triggers(path: Path) -> Iterator[sqlite3.Connection]:
    """The file as somebody has it who wants to change it; the triggers are there again afterwards."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        for _, sql in triggers:
            connection.execute(sql)


def chain_again(connection: sqlite3.Connection) -> None:
    """Number and hash all entries again, and put the last into the head, as far as one can without the secret."""
    rows = connection.execute("SELECT number, kind, body FROM entries ORDER BY number").fetchall()
    connection.execute("DELETE FROM entries")
    last = GENESIS
    for number, (_, kind, body) in zip(itertools.count(1), rows, strict=False):
        content = canonical({"number": number, "kind": kind, "body": json.loads(body)})
        last = hashlib.sha256(b"rdp-calc/ledger-entry/1\0" + bytes.fromhex(last) + content).hexdigest()
        connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (number, kind, body, bytes.fromhex(last)))
    connection.execute("UPDATE head SET count = ?, hash = ?", (len(rows), bytes.fromhex(last)))


def head_again(path: Path) -> None:
    """Put the code of the last entry into the head, as whoever holds the secret can."""
    with opened(path, write=True, secret=True) as ledger:
        assert ledger.secret is not None
        code = ledger.secret.head(ledger.head.count, bytes.fromhex(ledger.head.hash))
        ledger.connection.execute("UPDATE head SET mac = ?", (code,))
