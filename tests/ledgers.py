"""Ledgers made without running anything: entries as a store would write them, for tests."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from rdp_calc import Langevin, Target, calibrate
from rdp_calc.certificate import OS_ENTROPY, certificate_document, run_checks
from rdp_calc.ledger import GENESIS, LEDGER_SCHEMA, Entry, Kind, LedgerState
from rdp_calc.losses import proved_constants
from rdp_calc.methods import Method
from rdp_calc.plan import DataSpec, Plan, plan_from_result

SALT = bytes(range(32))
VERSIONS = {"rdp-calc": "0.1.0", "torch": "2.13.0", "numpy": "2.4.0", "python": "3.11.9"}


def langevin(dataset_size: int = 11982, **changes: Any) -> Langevin:
    """A logistic problem of the size of MNIST 3 against 8."""
    constants = proved_constants(loss="logistic", l2=0.011982, feature_norm=1.0, intercept=False)
    given: dict[str, Any] = {
        "dataset_size": dataset_size,
        "group_size": 5,
        "adjacency": "remove",
        "constants": constants,
        "step_size": 3.5,
        "learn_steps": float("inf"),
        "unlearn_steps": 10,
    }
    return Langevin(**(given | changes))


def template(method: Method, *, epsilon: float = 1.0, delta: float = 1e-5, features: int = 20) -> Plan:
    """The plan that a ledger of ``method`` begins with."""
    target = Target(epsilon=epsilon, delta=delta)
    return plan_from_result(method, calibrate.noise(method, target), target, data=DataSpec(features=features))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record(row: int) -> str:
    """The keyed hash of a row number."""
    return hmac.new(SALT, b"rdp-calc/record/1" + row.to_bytes(8, "little"), hashlib.sha256).hexdigest()


class Book:
    """A ledger in memory. Times count up by a minute an entry."""

    def __init__(self, plan: Plan, name: str = "model") -> None:
        self.entries: list[Entry] = []
        self.state = LedgerState()
        self.rows = 0
        body = {"schema": LEDGER_SCHEMA, "name": name, "plan": plan.to_json(), "version": "0.1.0"}
        self.write("model", {**body, "salt_sha256": hashlib.sha256(SALT).hexdigest()})
        learning = {"plan_digest": self.state.template_document["digest"], "state_fingerprint": sha("learned")}
        learning |= {"data_fingerprint": sha("data"), "learn_steps": plan.executed_learn_steps, "removed": 0}
        self.write("learning", {**learning, "random_source": OS_ENTROPY, "deviation": None})

    def write(self, kind: Kind, body: dict[str, Any]) -> Entry:
        count = len(self.entries)
        stamp = f"2026-01-{1 + count // 1440 % 28:02d}T{count // 60 % 24:02d}:{count % 60:02d}:00Z"
        previous = self.entries[-1].hash if self.entries else GENESIS
        entry = Entry.of(previous, count + 1, kind, {**body, "time": body.get("time", stamp)})
        self.state.add(entry)
        self.entries.append(entry)
        return entry

    def request(self, group: int) -> None:
        rows = range(self.rows, self.rows + group)
        self.rows += group
        body = {"request": len(self.state.requests) + 1, "records": sorted(record(row) for row in rows)}
        self.write("request", {**body, "reason": "", "received": "2026-01-01T00:00:00Z", "due": None})

    def plan(self, requests: Sequence[int] | None = None) -> Plan:
        numbers = list(requests or [request.number for request in self.state.pending])
        group = sum(self.state.requests[number - 1].group for number in numbers)
        history = self.state.history
        plan = history.next_plan(group)
        made = history.after(plan, group).made[-1]
        body = {"release": len(self.state.releases) + 1, "requests": numbers, "group": group, "turns": made.turns}
        body |= {"noise": plan.noise, "mu": plan.mu, "delta_upper": plan.delta_upper}
        self.write("plan", {**body, "plan_digest": plan.to_json()["digest"]})
        return plan

    def release(self, plan: Plan, **changes: Any) -> None:
        document = plan.to_json()
        number = len(self.state.releases) + 1
        shared = {"release": number, "plan_digest": document["digest"]}
        last = self.state.learning["state_fingerprint"] if self.state.learning else ""
        if self.state.releases and not self.state.cumulative:
            last = self.state.releases[-1].state_fingerprint or ""
        self.write("execution", {**shared, "start_fingerprint": last, "output": f"release-{number}"})
        written = certificate(plan, number, **changes)
        written.pop("plan")
        body = {"release": number, "certificate": written, "state_fingerprint": sha(f"state {number}")}
        self.write("certificate", body)


def certificate(plan: Plan, number: int, *, source: str = OS_ENTROPY, level: str | None = None) -> dict[str, Any]:
    """The certificate that a run of ``plan`` writes."""
    document = plan.to_json()
    executed = {"learn_steps": plan.executed_learn_steps, "noise_std": plan.noise_std, "released_chain": 0}
    steps = plan.method.steps
    executed |= {"unlearn_steps": steps[-1] if isinstance(steps, tuple) else steps, "random_source": source}
    executed |= {"generator": "numpy PCG64DXSM, float64", "device": "cpu"}
    executed |= {"matrix_dtype": "float64", "update_dtype": "float64"}
    if getattr(plan.method, "requests", ()):
        executed["request"] = len(plan.method.requests)  # type: ignore[attr-defined]
    return certificate_document(
        document,
        executed=executed,
        fingerprints={"data": sha("d"), "forget_set": sha(f"f{number}"), "model_before": sha(f"b{number}")},
        model_sha256=sha(f"model {number}"),
        checks=[{"name": name, "pass": True} for name in run_checks(plan, None)],
        versions=VERSIONS,
        level=level or ("none" if source != OS_ENTROPY else document["certificate_level"]),
    )
