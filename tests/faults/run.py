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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import ledgers, syscalls
from harness.client import Server
from harness.damage import HARMS, READERS
from harness.faults import DRAWS
from harness.laboratory import Laboratory, Result
from harness.pairs import EVERY, PAIRS
from harness.verbs import VERBS

Job = Callable[[Laboratory], Result]

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
    jobs: list[Job] = [_fault(*case, chosen.seed) for case in cases]
    if chosen.verbs is None and chosen.faults is None:
        jobs += _others(chosen.others, chosen.seed)
    random.Random(chosen.seed).shuffle(jobs)
    begun = time.monotonic()

    def work(part: int) -> list[Result]:
        results = []
        with tempfile.TemporaryDirectory() as name, Server() as server:
            laboratory = Laboratory(server, Path(name))
            for job in jobs[part :: chosen.servers]:
                if time.monotonic() > begun + 60 * chosen.minutes:
                    break
                result = job(laboratory)
                results.append(result)
                if result.violation:
                    point = result.outcome.point if result.outcome else ""
                    spec = {**result.fault.spec, **result.fault.request}
                    print(f"VIOLATION {result.verb} | {result.fault.kind} {spec} | {point} | {result.violation}")
        return results

    with ThreadPoolExecutor(chosen.servers) as pool:
        results = [result for part in pool.map(work, range(chosen.servers)) for result in part]
    show(results)
    bad = sum(result.violation is not None for result in results)
    kills = sum(result.fault.kills and result.ending.startswith("signal") for result in results)
    print(f"\n{kills} processes killed; {len(results)} cases in {time.monotonic() - begun:.0f} s, {bad} violations")
    return 1 if bad else 0


def _fault(verb: Any, kind: str, number: int, seed: int) -> Job:
    draws = random.Random(f"{seed} {verb.name} {kind} {number}")
    return lambda laboratory: laboratory.case(verb, laboratory.draw(verb, kind, draws))


def _others(count: int, seed: int) -> Iterator[Job]:
    """Damaged inputs, two commands at once, crowds and locks on ledgers."""
    for number in range(count):
        draws = random.Random(f"{seed} {number}")
        for reader in READERS:
            for harm in HARMS:
                yield lambda laboratory, r=reader, h=harm, d=draws: laboratory.harmed(r, h, d)
        for pair in PAIRS:
            share = draws.random()
            yield lambda laboratory, p=pair, s=share: laboratory.together(
                *p, 1 + int(s * laboratory.undisturbed(p[0]).outcome.events)
            )
        for kills in (0, 10):
            yield lambda laboratory, d=draws, k=kills: laboratory.crowd(24, d, kills=k)
        for name in ("ledger request", "ledger plan", "ledger run"):
            yield lambda laboratory, n=name: laboratory.locked(EVERY[n])


def show(results: list[Result]) -> None:
    """One line a command and fault: cases, how they ended, violations."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for result in results:
        row = rows.setdefault((result.verb, result.fault.kind), Counter())
        row["cases"] += 1
        row[result.ending] += 1
        row["violations"] += result.violation is not None
    print(f"{'command':<24}{'fault':<18}{'cases':>6}{'bad':>5}  endings")
    for (verb, kind), row in sorted(rows.items()):
        endings = ", ".join(f"{n} {name}" for name, n in row.items() if name not in ("cases", "violations"))
        print(f"{verb:<24}{kind:<18}{row['cases']:>6}{row['violations']:>5}  {endings}")


if __name__ == "__main__":
    sys.exit(main())
