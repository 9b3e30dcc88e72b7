"""Ledgers under faults: whatever happens, the file verifies, every acknowledged request is in it, no entry is half
there, and the command can be repeated.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import checks, verbs
from harness.client import Outcome, Server
from harness.faults import Fault

DATA = verbs.DATA

#: What ledger commands start from, beside ``verbs.PREPARED``. The file names the state the ledger is in.
PREPARED = (
    f"run plan.json {DATA} --phase learn -o state -q",
    "ledger init fresh.ledger --plan plan.json -q",
    "ledger init asked.ledger --plan plan.json --start state -q",
    "ledger request asked.ledger --forget 3,17 -q",
    "ledger request asked.ledger --forget 20-22 --reason withdrawn --due-days 30 -q",
    "ledger init planned.ledger --plan plan.json --start state -q",
    "ledger request planned.ledger --forget 5 -q",
    "ledger plan planned.ledger -q",
    "ledger export asked.ledger -o old.jsonl -q",
)

BATCH = "30\n31,32;asked by post\n33-36\n"

Entries = list[dict[str, Any]]
Check = Callable[[Path], None]


@dataclass(frozen=True)
class LedgerVerb:
    """``appends``: the kinds of the entries of a success, in order; a fault may leave the first few where ``steps``
    says so, otherwise all or none. ``repeated``: the exit codes of a repetition after success.
    """

    name: str
    ledger: str
    arguments: str
    appends: tuple[str, ...]
    steps: bool = False
    targets: dict[str, Check] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    repeated: tuple[int, ...] = (6,)
    slow: bool = False


def is_export(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["count"] == len(lines) - 1
    assert lines[0]["head"] == lines[-1]["hash"]
    assert path.read_bytes().endswith(b"\n")


def is_chained(folder: Path) -> None:
    """The folder of a release of a chain: what the next one starts from is in it too."""
    document = json.loads((folder / "certificate.json").read_text())
    checks.canonical(document)
    found = checks.listing(folder)
    assert document["model_sha256"] == found["model.safetensors"][1]
    record = json.loads((folder / "private" / "learning.json").read_text())
    assert record["state_sha256"] == found["private/state.safetensors"][1]


VERBS = (
    LedgerVerb("ledger request", "asked.ledger", "ledger request asked.ledger --forget 7,9 -q", ("request",)),
    LedgerVerb("ledger batch", "asked.ledger", "ledger request asked.ledger --batch batch.txt -q", ("request",) * 3),
    LedgerVerb(
        "ledger plan",
        "asked.ledger",
        "ledger plan asked.ledger -o next.json -q",
        ("plan",),
        targets={"next.json": verbs.is_plan},
        repeated=(0, 2),
    ),
    LedgerVerb(
        "ledger run",
        "planned.ledger",
        f"ledger run planned.ledger {DATA} --start state -o release -q",
        ("execution", "certificate"),
        steps=True,
        targets={"release": is_chained},
        beside=("state",),
        repeated=(2, 6),
    ),
    LedgerVerb(
        "ledger run, checkpoint",
        "planned.ledger",
        f"ledger run planned.ledger {DATA} --start state -o release -q --checkpoint saved --checkpoint-every 0.001"
        " --log log",
        ("execution", "certificate"),
        steps=True,
        targets={"release": is_chained},
        beside=("state", "log", "saved"),
        repeated=(2, 6),
    ),
    LedgerVerb(
        "ledger learn",
        "fresh.ledger",
        f"ledger run fresh.ledger {DATA} -o first -q",
        ("learning",),
        targets={"first": verbs.is_learned},
        repeated=(2, 6),
    ),
    LedgerVerb(
        "ledger export",
        "asked.ledger",
        "ledger export asked.ledger -o old.jsonl -q",
        (),
        targets={"old.jsonl": is_export},
        repeated=(0,),
    ),
    LedgerVerb(
        "ledger init",
        "new.ledger",
        "ledger init new.ledger --plan plan.json --start state -q",
        ("model", "learning"),
        repeated=(2,),
    ),
)


@dataclass
class Ledgers:
    """Checks on ledgers through the command line alone, without any fault."""

    server: Server

    def verified(self, folder: Path, name: str, receipts: list[str]) -> None:
        """The ledger verifies, and holds what these receipts are for."""
        if not (folder / name).exists():
            assert not receipts, "the ledger is gone"
            return
        heads = " ".join(f"--head {receipt}" for receipt in receipts)
        done = self.server.run(folder, f"ledger verify {name} {heads} -q")
        assert (done.code, done.out.strip()) == (0, "ok"), f"verify: {done.code} {done.out} {done.err}"

    def acknowledged(self, folder: Path, name: str, before: Before, outcomes: list[Outcome]) -> None:
        """After several commands at once: all entries from before, everything acknowledged, and it verifies."""
        self.verified(folder, name, [*before.receipts, *(text for each in outcomes for text in _receipt(each))])
        now = entries(folder, name)
        assert now[: len(before.entries)] == before.entries, "entries changed or are gone"
        kinds = [entry["kind"] for entry in now]
        for kind in ("certificate", "learning"):
            assert kinds.count(kind) <= 1, f"{kinds.count(kind)} entries {kind}"

    def after(
        self, verb: LedgerVerb, fault: Fault, folder: Path, before: Before, outcome: Outcome, *, silent: bool
    ) -> bool:
        """Whether the command did all it had to, after checking that nothing is half done."""
        if fault.kills:
            assert not outcome.hung, "hangs"
        else:
            checks.one_line(outcome, signals=checks.signals(fault), silent=silent)
        assert not outcome.outside, f"writes outside its folder: {outcome.outside}"
        receipts = [*before.receipts, *_receipt(outcome)]
        self.verified(folder, verb.ledger, receipts)
        added = self._added(verb, folder, before, whole=outcome.code == 0)
        for target, check in verb.targets.items():
            path = folder / target
            if checks.below(checks.listing(folder), target) != checks.below(before.found, target):
                try:
                    check(path)
                except Exception as error:
                    raise AssertionError(f"{target} is not whole: {error}") from None
            assert outcome.code != 0 or path.exists(), f"exit code 0 without {target}"
        hidden = checks.partials(folder)
        checks.untouched(checks.listing(folder), before.found, (*_own(verb), *hidden))
        assert not hidden or fault.kills or fault.stuck or outcome.failed, f"left behind: {hidden}"
        return len(added) >= len(verb.appends)

    def repeat(self, verb: LedgerVerb, folder: Path, before: Before, *, done: bool, **request: Any) -> None:
        """The command again, without a fault: all is there then, once."""
        release = next(iter(verb.targets), "")
        certificate = folder / release / "certificate.json"
        made = certificate.read_bytes() if release and certificate.is_file() else None
        again = self.server.run(folder, verb.arguments, **request)
        orphan = not (folder / verb.ledger).exists() and (folder / f"{verb.ledger}.secret").exists()
        if orphan:
            # A secret is never deleted nor replaced: it may be that of a ledger that lies elsewhere.
            assert again.code == 2
            assert "secret" in again.err
            (folder / f"{verb.ledger}.secret").unlink()
            again = self.server.run(folder, verb.arguments)
        assert again.code in (verb.repeated if done else (0,)), f"repeated: exit code {again.code}: {again.err}"
        checks.one_line(again)
        self.verified(folder, verb.ledger, [*before.receipts, *_receipt(again)])
        if verb.name != "ledger plan":
            added = self._added(verb, folder, before, whole=True)
            assert [kind for kind in added if kind != "execution"] == [
                kind for kind in verb.appends if kind != "execution"
            ]
        for target, check in verb.targets.items():
            assert (folder / target).exists() or done, f"{target} is not there"
            if (folder / target).exists():
                check(folder / target)
        assert made is None or certificate.read_bytes() == made, "a second release was made"
        found = checks.listing(folder)
        assert "saved" not in found, "a checkpoint is left"
        checks.untouched(found, before.found, tuple(name for name in _own(verb) if not name.endswith(("-wal", "-shm"))))

    def _added(self, verb: LedgerVerb, folder: Path, before: Before, *, whole: bool) -> list[str]:
        """Kinds of the entries that the command added."""
        now = entries(folder, verb.ledger)
        old = before.entries
        assert now[: len(old)] == old, "entries changed or are gone"
        added = [entry["kind"] for entry in now[len(old) :]]
        kinds = list(verb.appends)
        allowed = [[], kinds]
        if verb.steps:
            # A run that was killed is begun again, and said so again.
            allowed += [["execution"], ["execution", *kinds]]
        if verb.name == "ledger plan":
            allowed += [["plan", "plan"]]
        assert added in allowed, f"entries added: {added}"
        assert not whole or added[-1:] == kinds[-1:], f"exit code 0, entries added: {added}"
        return added if added[-1:] == kinds[-1:] else []


@dataclass(frozen=True)
class Before:
    """A ledger before a command: its entries, receipts for requests that were acknowledged, and all files."""

    entries: Entries
    receipts: list[str]
    found: checks.Listing


def entries(folder: Path, name: str) -> Entries:
    """All entries of a ledger, read from a copy of its files without the program; none where there is no file."""
    if not (folder / name).exists():
        return []
    with tempfile.TemporaryDirectory() as place:
        for ending in ("", "-wal"):
            if (folder / (name + ending)).exists():
                shutil.copy(folder / (name + ending), place)
        with closing(sqlite3.connect(Path(place) / name)) as connection:
            rows = connection.execute("SELECT number, kind, body, hash FROM entries ORDER BY number").fetchall()
    return [{"number": n, "kind": kind, "body": json.loads(body), "hash": key.hex()} for n, kind, body, key in rows]


def before(folder: Path, name: str) -> Before:
    found = entries(folder, name)
    receipts = [f"{entry['number']}:{entry['hash']}" for entry in found]
    return Before(found, receipts, checks.listing(folder))


def _receipt(outcome: Outcome) -> list[str]:
    """The receipt that was printed, which is an acknowledgement whatever came after."""
    last = outcome.out.strip().splitlines()[-1:]
    return [text for text in last if ":" in text and len(text.partition(":")[2]) == 64]


def _own(verb: LedgerVerb) -> tuple[str, ...]:
    ledger = verb.ledger
    made = (ledger, f"{ledger}.secret") if verb.name == "ledger init" else (ledger,)
    return (*made, f"{ledger}-wal", f"{ledger}-shm", *verb.targets, *verb.beside)


def write_batch(folder: Path) -> None:
    (folder / "batch.txt").write_text(BATCH)
