"""One command, one fault, and everything that must hold then and after the command is repeated."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import checks, ledgers, verbs
from harness.client import Outcome, Server
from harness.damage import HARMS, Reader
from harness.faults import DRAWS, Fault
from harness.ledgers import Ledgers, LedgerVerb
from harness.verbs import Verb


@dataclass(frozen=True)
class Undisturbed:
    """What a command does and makes when nothing goes wrong."""

    outcome: Outcome
    found: checks.Listing


@dataclass(frozen=True)
class Result:
    """``ending``: how the command under the fault ended, in a word; ``violation``: what did not hold, if anything."""

    verb: str
    fault: Fault
    ending: str
    violation: str | None
    outcome: Outcome | None = None


@dataclass
class Laboratory:
    """Folders below ``root``: one with what commands start from, and a fresh copy of it for every case."""

    server: Server
    root: Path
    _undisturbed: dict[str, Undisturbed] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self.template = self.root / "template"
        self.template.mkdir()
        verbs.write_data(self.template)
        ledgers.write_batch(self.template)
        self.ledgers = Ledgers(self.server)
        for arguments in (*verbs.PREPARED, *ledgers.PREPARED):
            done = self.server.run(self.template, arguments)
            assert done.code == 0, f"{arguments}: {done.err}"
        shutil.copy(self.template / "released" / "certificate.json", self.template)

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """A copy of what commands start from, in a folder of its own."""
        self._count += 1
        outer = self.root / str(self._count)
        shutil.copytree(self.template, outer / "work")
        yield outer / "work"
        shutil.rmtree(outer)

    def undisturbed(self, verb: Verb | LedgerVerb) -> Undisturbed:
        if isinstance(verb, LedgerVerb):
            return self._undisturbed_ledger(verb)
        if verb.name not in self._undisturbed:
            with self.fresh() as folder:
                before = checks.listing(folder)
                outcome = self.server.run(folder, verb.arguments, trace=True)
                assert outcome.code == 0, f"{verb.name}: {outcome.err}"
                checks.one_line(outcome)
                checks.durable(outcome.trace)
                _finished(verb, folder, before)
                self._undisturbed[verb.name] = Undisturbed(outcome, checks.listing(folder))
        return self._undisturbed[verb.name]

    def _undisturbed_ledger(self, verb: LedgerVerb) -> Undisturbed:
        if verb.name not in self._undisturbed:
            with self.fresh() as folder:
                before = ledgers.before(folder, verb.ledger)
                outcome = self.server.run(folder, verb.arguments, trace=True)
                assert outcome.code == 0, f"{verb.name}: {outcome.err}"
                assert self.ledgers.after(verb, Fault("none"), folder, before, outcome, silent=False)
                # What was acknowledged outlives a power cut.
                left = checks.durable(outcome.trace) & {verb.ledger, f"{verb.ledger}-wal"} if verb.appends else set()
                assert not left, f"{sorted(left)} are not on the disk when the command has ended"
                self._undisturbed[verb.name] = Undisturbed(outcome, checks.listing(folder))
        return self._undisturbed[verb.name]

    def draw(self, verb: Verb | LedgerVerb, kind: str, draws: random.Random) -> Fault:
        outcome = self.undisturbed(verb).outcome
        return DRAWS[kind](draws, outcome.events, outcome.seconds)

    def case(self, verb: Verb | LedgerVerb, fault: Fault) -> Result:
        """Run the command under the fault, check, repeat it without, check again."""
        if isinstance(verb, LedgerVerb):
            return self._ledger_case(verb, fault)
        expected = self.undisturbed(verb).found
        with self.fresh() as folder:
            before = checks.listing(folder)
            outcome = self.server.run(folder, verb.arguments, fault.spec, **fault.request)
            if outcome.skipped is not None:
                return Result(verb.name, fault, "skipped", None, outcome)
            try:
                whole = _after(verb, fault, folder, before, expected, outcome)
                self._repeat(verb, folder, before, expected, whole=whole)
            except AssertionError as error:
                return Result(verb.name, fault, _ending(outcome), str(error) or "assertion", outcome)
            return Result(verb.name, fault, _ending(outcome), None, outcome)

    def _ledger_case(self, verb: LedgerVerb, fault: Fault) -> Result:
        with self.fresh() as folder:
            before = ledgers.before(folder, verb.ledger)
            outcome = self.server.run(folder, verb.arguments, fault.spec, **fault.request)
            if outcome.skipped is not None:
                return Result(verb.name, fault, "skipped", None, outcome)
            try:
                silent = fault.kind == "reader gone"
                done = self.ledgers.after(verb, fault, folder, before, outcome, silent=silent)
                same = {name: value for name, value in fault.request.items() if name == "mutation"}
                self.ledgers.repeat(verb, folder, before, done=done, **same)
            except AssertionError as error:
                return Result(verb.name, fault, _ending(outcome), str(error) or "assertion", outcome)
            return Result(verb.name, fault, _ending(outcome), None, outcome)

    def harmed(self, reader: Reader, harm: str, draws: random.Random) -> Result:
        """A command whose input was changed: refused in one line with nothing made, or the change meant nothing."""
        fault = Fault(harm)
        with self.fresh() as folder:
            path = folder / reader.file
            if not path.exists():
                self._make_checkpoint(folder, reader)
            whole = path.read_bytes()
            content = HARMS[harm](whole, draws)
            path.write_bytes(content)
            before = checks.listing(folder)
            outcome = self.server.run(folder, reader.arguments)
            fault = Fault(harm, {"file": reader.file, "bytes": len(content)})
            try:
                checks.one_line(outcome)
                if reader.sealed and content != whole:
                    assert outcome.code != 0, "a changed file is taken"
                if outcome.code != 0:
                    beside = (f"{reader.file}-wal", f"{reader.file}-shm")
                    checks.untouched(checks.listing(folder), before, beside)
            except AssertionError as error:
                return Result(reader.name, fault, _ending(outcome), str(error), outcome)
            return Result(reader.name, fault, _ending(outcome), None, outcome)

    def _make_checkpoint(self, folder: Path, reader: Reader) -> None:
        """A run killed right after it saved."""
        trace = self.server.run(folder, f"{reader.arguments} --checkpoint-every 0.001", trace=True).trace
        shutil.rmtree(folder / "new")
        at = next(i for i, (name, paths) in enumerate(trace, 1) if name == "rename" and paths[-1] == "saved") + 1
        self.server.run(folder, f"{reader.arguments} --checkpoint-every 0.001", {"at": at, "signal": 9})
        for name in checks.partials(folder):
            (folder / name).unlink()

    def together(self, first: Verb | LedgerVerb, second: Verb | LedgerVerb, at: int) -> Result:
        """Two commands in one folder: the second runs, or waits, while the first is held up amid its writing.

        Neither may fail but for being told of the other, and what each was acknowledged is there.
        """
        fault = Fault("two at once", {"at": at})
        runs = [{"arguments": shlex.split(verb.arguments)} for verb in (first, second)]
        with self.fresh() as folder:
            names = sorted({verb.ledger for verb in (first, second) if isinstance(verb, LedgerVerb)})
            was = {name: ledgers.before(folder, name) for name in names}
            runs[0]["fault"] = {"at": at}  # type: ignore[assignment]
            outcomes = self.server.together(folder, runs)
            ending = ", ".join(map(_ending, outcomes))
            try:
                for outcome in outcomes:
                    checks.one_line(outcome)
                assert any(outcome.code == 0 for outcome in outcomes), f"both fail: {[o.err for o in outcomes]}"
                hidden = [name for name in ("saved", *checks.partials(folder)) if (folder / name).exists()]
                assert not hidden, f"left behind: {hidden}"
                for name, before in was.items():
                    self.ledgers.acknowledged(folder, name, before, outcomes)
                    # The secret beside it is its own.
                    more = self.server.run(folder, f"ledger request {name} --forget 59 -q")
                    assert more.code == 0, f"no request is taken any more: {more.err}"
                for verb, outcome in zip((first, second), outcomes, strict=True):
                    for target, check in verb.targets.items():
                        if outcome.code == 0 or (folder / target).exists():
                            check(folder / target)
            except AssertionError as error:
                return Result(f"{first.name} + {second.name}", fault, ending, str(error), outcomes[0])
            return Result(f"{first.name} + {second.name}", fault, ending, None, outcomes[0])

    def crowd(self, size: int, draws: random.Random, *, kills: int) -> Result:
        """So many processes that each register a request with one ledger at once, some of them killed."""
        name = "asked.ledger"
        rows = draws.sample(range(23, 60), size)
        runs: list[dict[str, Any]] = [
            {"arguments": ["ledger", "request", name, "--forget", str(row), "-q", "--wait", "60"]} for row in rows
        ]
        for run in draws.sample(runs, kills):
            run["fault"] = {"at": draws.randint(1, 36), "signal": int(signal.SIGKILL)}
        fault = Fault("crowd", {"processes": size, "kills": kills})
        with self.fresh() as folder:
            before = ledgers.before(folder, name)
            outcomes = self.server.together(folder, runs)
            ending = f"{sum(outcome.code == 0 for outcome in outcomes)} acknowledged"
            try:
                for outcome, run in zip(outcomes, runs, strict=True):
                    if "fault" not in run:
                        checks.one_line(outcome)
                        assert outcome.code == 0, outcome.err
                self.ledgers.acknowledged(folder, name, before, outcomes)
                added = len(ledgers.entries(folder, name)) - len(before.entries)
                assert size - kills <= added <= size, f"{added} requests of {size}"
            except AssertionError as error:
                return Result("ledger request", fault, ending, str(error))
            return Result("ledger request", fault, ending, None)

    def locked(self, verb: LedgerVerb) -> Result:
        """A command on a ledger that another process holds locked: told so in one line, and nothing changes."""
        fault = Fault("locked")
        with self.fresh() as folder:
            before = ledgers.before(folder, verb.ledger)
            with closing(sqlite3.connect(folder / verb.ledger, isolation_level=None)) as holder:
                holder.execute("BEGIN IMMEDIATE")
                outcome = self.server.run(folder, f"{verb.arguments} --wait 0.1")
                holder.execute("ROLLBACK")
            try:
                assert outcome.code == 6, f"exit code {outcome.code}: {outcome.err}"
                done = self.ledgers.after(verb, fault, folder, before, outcome, silent=False)
                self.ledgers.repeat(verb, folder, before, done=done)
            except AssertionError as error:
                return Result(verb.name, fault, _ending(outcome), str(error), outcome)
            return Result(verb.name, fault, _ending(outcome), None, outcome)

    def _repeat(
        self, verb: Verb, folder: Path, before: checks.Listing, expected: checks.Listing, *, whole: bool
    ) -> None:
        again = self.server.run(folder, verb.arguments)
        done = whole and verb.once
        if verb.mends is not None and again.code == 2 and not done:
            mended = self.server.run(folder, verb.mends[0])
            assert mended.code == 0, f"mended: exit code {mended.code}: {mended.err}"
            (folder / verb.mends[1]).write_text(mended.out)
            done = True
        assert again.code == (2 if done else 0), f"repeated: exit code {again.code}: {again.err}"
        checks.one_line(again)
        _finished(verb, folder, before)
        if verb.repeatable:
            verbs.same(verb, checks.listing(folder), expected)


def _after(
    verb: Verb,
    fault: Fault,
    folder: Path,
    before: checks.Listing,
    expected: checks.Listing,
    outcome: Outcome,
) -> bool:
    """Whether all targets are there, after checking that each is whole or as it was."""
    if fault.kills:
        assert not outcome.hung, "hangs"
        assert not outcome.outside, f"writes outside its folder: {outcome.outside}"
    else:
        checks.one_line(outcome, signals=checks.signals(fault), silent=fault.kind == "reader gone")
    found = checks.listing(folder)
    fresh = 0
    for target, check in verb.targets.items():
        if checks.below(found, target) == checks.below(before, target):
            continue
        try:
            check(folder / target)
        except Exception as error:
            raise AssertionError(f"{target} is not whole: {error}") from None
        fresh += 1
    temporary = folder.with_name("temporary")
    assert fault.kills or fault.stuck or not os.listdir(temporary), f"left in {temporary}: {os.listdir(temporary)}"
    whole = fresh == len(verb.targets)
    if whole and verb.repeatable:
        verbs.same(verb, found, expected)
    if outcome.code == 0:
        unchanged = not whole and not verb.once and not outcome.failed
        assert whole or unchanged, "exit code 0, and the result is not there"
    hidden = checks.partials(folder)
    own = (*verb.targets, *verb.beside, *verb.passing)
    checks.untouched(found, before, (*own, *hidden))
    for name in hidden:
        match = checks.PARTIAL.fullmatch(name)
        assert match is not None
        assert match["target"] in own, f"{name} is nobody's"
    assert not hidden or fault.kills or fault.stuck or _removal_failed(outcome), f"left behind: {hidden}"
    return whole


def _removal_failed(outcome: Outcome) -> bool:
    """The one call that failed was to clean up."""
    return bool(outcome.failed) and any(word in outcome.point for word in (" unlink", " rmdir"))


def _finished(verb: Verb, folder: Path, before: checks.Listing) -> None:
    """All targets whole, nothing else touched, nothing left of work in progress."""
    for target, check in verb.targets.items():
        check(folder / target)
    checks.untouched(checks.listing(folder), before, (*verb.targets, *verb.beside))


def _ending(outcome: Outcome) -> str:
    return f"signal {outcome.signal}" if outcome.signal is not None else f"code {outcome.code}"
