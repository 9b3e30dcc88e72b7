"""Wall time of `rdp-calc ledger` verbs, process start included, and the size of a ledger with 100,000 requests.

    python benchmarks/ledger.py [--requests 100000] [--releases 1000] [--one-by-one] [--verify] [--folder DIR]

Builds a ledger through the library, without running any model: nine tenths of the requests (one record each, of a
million) are answered by the releases, the rest waits. Certificates are documents of the form that runs write. With
--one-by-one every request but the last ten is answered by a release of its own, the longest history such a ledger can
have; then plan digests are made up, since each plan names all requests before it, and --verify would refuse them.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rdp_calc import Langevin, Target, calibrate
from rdp_calc.certificate import certificate_document, run_checks
from rdp_calc.history import Made
from rdp_calc.ledger import LEDGER_SCHEMA
from rdp_calc.plan import DataSpec, Plan, plan_from_result
from unlearn_runtime.ledger import summary
from unlearn_runtime.ledger.planning import chosen_requests, history, plan_release
from unlearn_runtime.ledger.requests import Asked, Wording, register
from unlearn_runtime.ledger.secret import Secret
from unlearn_runtime.ledger.store import Ledger, Writer, create, opened

_SIZE = 1_000_000
_NOW = "2026-01-01T00:00:00Z"
_RUNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--releases", type=int, default=1000)
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--verify", action="store_true", help="also time verify, which proves everything again")
    parser.add_argument("--folder", type=Path, help="where to build; default a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = (given.folder or Path(temporary)) / "bench.ledger"
        begun = time.perf_counter()
        if given.one_by_one:
            _build_one_by_one(path, given.requests)
        else:
            _build(path, given.requests, given.releases)
        print(f"built in {time.perf_counter() - begun:.1f} s; {path.stat().st_size / 1e6:.1f} MB")
        verbs = {"status": ["status"], "status --json": ["status", "--json"], "plan": ["plan"], "export": ["export"]}
        for name, (verb, *options) in verbs.items():
            extra = ["-o", str(path.with_suffix(".jsonl"))] if verb == "export" else []
            times = [_time([verb, str(path), *options, *extra]) for _ in range(_RUNS)]
            print(f"{name:16} {statistics.median(times):6.2f} s   (of {_RUNS}: {min(times):.2f} to {max(times):.2f})")
        _time_request(path)
        if given.verify:
            print(f"{'verify':16} {_time(['verify', str(path)]):6.2f} s")


def _time(arguments: list[str]) -> float:
    script = str(Path(sys.executable).with_name("rdp-calc"))
    begun = time.perf_counter()
    subprocess.run([script, "ledger", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _time_request(path: Path) -> None:
    times = [_time(["request", str(path), "--forget", str(_SIZE - 1 - number)]) for number in range(_RUNS)]
    print(f"{'request':16} {statistics.median(times):6.2f} s   (of {_RUNS}: {min(times):.2f} to {max(times):.2f})")


def _template() -> Plan:
    method = Langevin.from_options(
        dataset_size=_SIZE, adjacency="remove", loss="logistic", l2=0.05, unlearn_steps=20, group_size=90
    )
    target = Target(epsilon=1.0, delta=1e-6)
    result = calibrate.noise(method, target, bound="shifted")
    return plan_from_result(method, result, target, data=DataSpec(features=100))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _create(path: Path, template: Plan) -> None:
    secret, document = Secret.new(), template.to_json()
    model = {"schema": LEDGER_SCHEMA, "name": "benchmark", "plan": document, "salt_sha256": secret.sha256}
    learning = {
        "plan_digest": document["digest"],
        "state_fingerprint": _sha("learned"),
        "data_fingerprint": _sha("data"),
    }
    learning |= {"learn_steps": template.executed_learn_steps, "removed": 0}
    learning |= {"random_source": "os-entropy", "deviation": None, "time": _NOW}
    create(path, secret, [("model", {**model, "version": "0", "time": _NOW}), ("learning", learning)])


def _asked(first: int, count: int) -> list[Asked]:
    # Rows in an order of their own; the factor has no divisor in common with the size.
    rows = (np.arange(first, first + count) * 611_953) % (_SIZE - 1000)
    return [Asked(rows[i : i + 1], Wording(reason="account closed", due_days=30)) for i in range(count)]


def _build(path: Path, requests: int, releases: int) -> None:
    template = _template()
    _create(path, template)
    each, made = requests * 9 // 10 // releases, 0
    with opened(path, write=True, secret=True) as ledger:
        for number in range(1, releases + 1):
            register(ledger, _asked(made, each), now=_NOW)
            made += each
            planned = plan_release(ledger, chosen_requests(ledger, None), one_by_one=False, now=_NOW)
            with ledger.writing() as writer:
                _release(ledger, writer, number, certificate_of(planned.plan, number))
        register(ledger, _asked(made, requests - made), now=_NOW)


def _build_one_by_one(path: Path, requests: int) -> None:
    template = _template()
    _create(path, template)
    with opened(path, write=True, secret=True) as ledger:
        register(ledger, _asked(0, requests), now=_NOW)
        # The second release needs what all later ones need, to a turn.
        past = history(ledger)
        for _ in range(3):
            plan = past.next_plan(1)
            past = past.after(plan, 1)
        turns = (past.made[-1].turns or 0) + 1
        made = Made(1, turns, template.noise)
        written = certificate_of(plan, 3)
        with ledger.writing() as writer:
            for number in range(1, requests - 9):
                body = {"release": number, "requests": [number], "group": 1, "turns": made.turns, "noise": made.noise}
                digest = _sha(f"plan {number}")
                body |= {"mu": plan.mu, "delta_upper": plan.delta_upper, "plan_digest": digest, "time": _NOW}
                writer.append("plan", body)
                _release(ledger, writer, number, {**written, "plan_digest": digest})


def _release(ledger: Ledger, writer: Writer, number: int, certificate: dict[str, Any]) -> None:
    found = summary.last_release(ledger.connection)
    last = _sha("learned") if found is None else found.state_fingerprint
    shared = {"release": number, "time": _NOW}
    digest = certificate["plan_digest"]
    writer.append(
        "execution", {**shared, "plan_digest": digest, "start_fingerprint": last, "output": f"release-{number}"}
    )
    writer.append("certificate", {**shared, "certificate": certificate, "state_fingerprint": _sha(f"state {number}")})


def certificate_of(plan: Plan, number: int) -> dict[str, Any]:
    """The certificate, without its plan, that a run of ``plan`` would write."""
    steps = plan.method.steps
    executed: dict[str, Any] = {
        "learn_steps": plan.executed_learn_steps,
        "unlearn_steps": steps[-1] if isinstance(steps, tuple) else steps,
        "noise_std": plan.noise_std,
        "released_chain": 0,
        "random_source": "os-entropy",
        "generator": "numpy PCG64DXSM, float64",
        "device": "cpu",
        "matrix_dtype": "auto",
        "update_dtype": "float64",
        "request": len(plan.method.requests),  # type: ignore[attr-defined]
    }
    document = certificate_document(
        plan.to_json(),
        executed=executed,
        fingerprints={name: _sha(f"{name} {number}") for name in ("data", "forget_set", "model_before", "retained")},
        model_sha256=_sha(f"model {number}"),
        checks=[{"name": name, "pass": True} for name in run_checks(plan, None)],
        versions={"rdp-calc": "0.1.0", "torch": "2.6.0", "numpy": "2.0.0", "python": "3.11.9"},
        level=plan.certificate_level,
    )
    document.pop("plan")
    return document


if __name__ == "__main__":
    main()
