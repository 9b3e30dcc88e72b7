"""Faults at random over every command that writes: ``python tests/faults/run.py --kills 500 --seed 1``.

Prints a table of commands, faults and how they ended, and every violation; exits 1 where there is one.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import ledgers, syscalls
from harness.client import Server
from harness.faults import DRAWS
from harness.laboratory import Laboratory, Result
from harness.verbs import VERBS

#: Faults of commands that take long.
_FOR_SLOW = ("kill", "term", "interrupt", "disk fills", "error once", "stdout full")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500, help="kills over all commands")
    parser.add_argument("--others", type=int, default=2, help="cases of every other fault and command")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbs", help="only commands whose name contains this")
    parser.add_argument("--faults", help="only these faults, with commas")
    parser.add_argument("--minutes", type=float, default=1e9, help="after these no case is begun")
    parser.add_argument("--servers", type=int, default=2, help="cases at once")
    chosen = parser.parse_args()
    if reason := syscalls.why_not():
        print(f"skipped: {reason}")
        return 0
    verbs = [verb for verb in (*VERBS, *ledgers.VERBS) if chosen.verbs is None or chosen.verbs in verb.name]
    kinds = list(DRAWS) if chosen.faults is None else chosen.faults.split(",")
    share = -(-chosen.kills // max(1, len([verb for verb in verbs if not verb.slow])))
    cases = []
    for verb in verbs:
        for kind in kinds:
            count = share if kind == "kill" else chosen.others
            if verb.slow:
                count = -(-count // 10) if kind in _FOR_SLOW else 0
            cases += [(verb, kind, number) for number in range(count)]
    random.Random(chosen.seed).shuffle(cases)
    begun = time.monotonic()

    def work(part: int) -> list[Result]:
        results = []
        with tempfile.TemporaryDirectory() as name, Server() as server:
            laboratory = Laboratory(server, Path(name))
            for verb, kind, number in cases[part :: chosen.servers]:
                if time.monotonic() > begun + 60 * chosen.minutes:
                    break
                draws = random.Random(f"{chosen.seed} {verb.name} {kind} {number}")
                result = laboratory.case(verb, laboratory.draw(verb, kind, draws))
                results.append(result)
                if result.violation:
                    point = result.outcome.point if result.outcome else ""
                    spec = {**result.fault.spec, **result.fault.request}
                    print(f"VIOLATION {verb.name} | {kind} {spec} | {point} | {result.violation}", flush=True)
        return results

    with ThreadPoolExecutor(chosen.servers) as pool:
        results = [result for part in pool.map(work, range(chosen.servers)) for result in part]
    show(results)
    bad = sum(result.violation is not None for result in results)
    print(f"\n{len(results)} cases in {time.monotonic() - begun:.0f} s, {bad} violations")
    return 1 if bad else 0


def show(results: list[Result]) -> None:
    """One line a command and fault: cases, how they ended, violations."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for result in results:
        row = rows.setdefault((result.verb, result.fault.kind), Counter())
        row["cases"] += 1
        row[result.ending] += 1
        row["violations"] += result.violation is not None
    print(f"{'command':<20}{'fault':<18}{'cases':>6}{'bad':>5}  endings")
    for (verb, kind), row in sorted(rows.items()):
        endings = ", ".join(f"{n} {name}" for name, n in row.items() if name not in ("cases", "violations"))
        print(f"{verb:<20}{kind:<18}{row['cases']:>6}{row['violations']:>5}  {endings}")


if __name__ == "__main__":
    sys.exit(main())
