"""One command, one fault, and everything that must hold then and after the command is repeated."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness import checks, ledgers, verbs
from harness.client import Outcome, Server
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
                self.ledgers.repeat(verb, folder, before, done=done)
            except AssertionError as error:
                return Result(verb.name, fault, _ending(outcome), str(error) or "assertion", outcome)
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
        except (AssertionError, OSError, ValueError, KeyError) as error:
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
