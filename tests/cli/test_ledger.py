"""rdp-calc ledger from the command line: one object, one answer, one line where something is wrong; and its page."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rdp_calc.verify import verify_document

Call = Callable[..., Any]

DATA = "--data builtin:breast-cancer"
PAGE = Path(__file__).parents[2] / "docs" / "ledger.md"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, shell: Call) -> Path:
    """A plan and a learn run of it."""
    from cli.main import main

    folder = tmp_path_factory.mktemp("learned")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in (
            f"plan langevin {DATA} --loss logistic --l2 0.05 --epsilon 1 --delta 1/n --group-size 2 --unlearn-steps 5"
            " --execute-learn-steps 20 --bound shifted -o plan.json -q",
            f"run plan.json {DATA} --phase learn -o learned -q",
        ):
            assert main(command.split()) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def start(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learned model from which nothing was released."""
    folder: Path = shutil.copytree(learned / "learned", tmp_path_factory.mktemp("start") / "learned")
    return folder


@pytest.fixture
def made(learned: Path, start: Path, rdp: Call) -> Path:
    """A ledger in the working folder."""
    found = rdp(["ledger", "init", "m.ledger", "--plan", str(learned / "plan.json"), "--start", str(start)])
    assert (found.code, found.err) == (0, "")
    return Path("m.ledger")


def test_a_model_that_was_released_from_is_not_taken(learned: Path, start: Path, rdp: Call) -> None:
    (start / "private" / "releases.txt").write_text("0" * 64 + "\n")
    found = rdp(["ledger", "init", "n.ledger", "--plan", str(learned / "plan.json"), "--start", str(start)])
    assert found.code == 6
    assert "releases were made from" in found.err
    assert not Path("n.ledger").exists()
    assert not Path("n.ledger.secret").exists()


def test_a_life(made: Path, learned: Path, rdp: Call) -> None:
    asked = rdp("ledger request m.ledger --forget 3,17 --reason why --due 2099-01-01 --json")
    assert (asked.code, asked.err) == (0, "")
    receipt = asked.json
    assert receipt["schema"] == "rdp-calc/ledger-receipt/1"
    assert (receipt["action"], receipt["request"], receipt["last_request"], receipt["records"]) == ("request", 1, 1, 2)
    assert re.fullmatch(r"3:[0-9a-f]{64}", receipt["head"])
    assert re.fullmatch(r"4:[0-9a-f]{64}\n", rdp("ledger request m.ledger --forget 40-44 -q").out)
    assert rdp("ledger status m.ledger -q").out == "2\n"

    planned = rdp("ledger plan m.ledger -o next.json --json").json
    assert planned["schema"] == "rdp-calc/ledger-plan/1"
    assert (planned["release"], planned["requests"], planned["records"]) == (1, [1, 2], 7)
    assert planned["cheaper"] in ("together", "one-by-one")
    assert planned["superseded"] is False
    document = json.loads(Path("next.json").read_text())
    assert verify_document(document).holds
    assert document["digest"] == planned["plan_digest"]
    assert document["parameters"]["requests"] == f"7:{planned['unlearn_steps']}"
    again = rdp("ledger plan m.ledger -q")
    assert (again.out, again.err) == (f"{planned['unlearn_steps']}\n", "")
    assert rdp("ledger plan m.ledger --requests 2 --json").json["superseded"] is True
    rdp("ledger plan m.ledger -q")

    done = rdp(f"ledger run m.ledger {DATA} -o r1 --json")
    assert done.code == 0, done.err
    assert done.json["schema"] == "rdp-calc/ledger-run/1"
    assert (done.json["release"], done.json["certificate_level"], done.json["adopted"]) == (1, "certified", False)
    assert done.json["run"]["schema"] == "rdp-calc/run/1"
    certificate = json.loads(Path("r1/certificate.json").read_text())
    assert verify_document(certificate).holds
    assert certificate["plan_digest"] == planned["plan_digest"]
    assert json.loads(Path("r1/private/audit.json").read_text())["forgotten_ids"] == [3, 17, 40, 41, 42, 43, 44]

    assert rdp("ledger request m.ledger --forget 5 -q").code == 0
    assert rdp("ledger plan m.ledger -q").code == 0
    quiet = rdp(f"ledger run m.ledger {DATA} -o r2 -q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "r2\n", "")

    status = rdp("ledger status m.ledger --next 3 --json").json
    assert status["schema"] == "rdp-calc/ledger-status/1"
    assert status["requests"] == {"total": 3, "pending": 0, "planned": 0, "certified": 3, "overdue": 0, "late": 0}
    assert [row["release"] for row in status["shown"]] == [1, 1, 2]
    shown = rdp("ledger status m.ledger")
    assert (shown.code, shown.err) == (0, "")
    assert "8 of 456 records removed by 2 releases" in shown.out

    exported = rdp("ledger export m.ledger -o m.jsonl --json").json
    assert exported["head"] == status["head"]
    for arguments in ("m.ledger", f"m.ledger --head {receipt['head']} --against m.jsonl", "m.jsonl"):
        report = rdp(f"ledger verify {arguments} --json")
        assert (report.code, report.err) == (0, "")
        assert report.json["schema"] == "rdp-calc/verify/1"
        assert report.json["holds"] is True
    assert rdp("ledger verify m.ledger -q").out == "ok\n"


def test_what_was_certified_late_stays_so(made: Path, rdp: Call) -> None:
    assert rdp("ledger request m.ledger --forget 3 --received 2025-01-01 --due-days 30 -q").code == 0
    assert rdp("ledger request m.ledger --forget 4 --due-days 30 -q").code == 0
    assert rdp("ledger request m.ledger --forget 5 --received 2025-01-01 -q").code == 0
    shown = rdp("ledger status m.ledger").out
    assert "1 overdue" in shown
    assert "one release for all that wait, 3 records: " in shown
    assert rdp("ledger plan m.ledger -q").code == 0
    assert rdp(f"ledger run m.ledger {DATA} -o r1 -q").code == 0
    status = rdp("ledger status m.ledger --json").json
    assert (status["requests"]["overdue"], status["requests"]["late"]) == (0, 1)
    first, second, third = status["shown"]
    assert (first["state"], first["late"], second["late"], third["late"]) == ("certified", True, False, False)
    assert first["certified_at"] == second["certified_at"] > "2025-02"
    shown = rdp("ledger status m.ledger").out
    assert "3 certified (1 late)" in shown
    assert [line.count("certified, late") for line in shown.splitlines()[3:6]] == [1, 0, 0]
    assert shown.count(first["certified_at"][:10]) >= 3


def test_each_release_continues_the_last_and_learning_comes_first(learned: Path, rdp: Call) -> None:
    assert rdp(["ledger", "init", "m.ledger", "--plan", str(learned / "plan.json"), "-q"]).code == 0
    assert rdp("ledger request m.ledger --forget 9 -q").code == 0
    assert rdp("ledger plan m.ledger -q").code == 0
    assert "the first ledger run learns" in rdp("ledger status m.ledger").out
    first = rdp(f"ledger run m.ledger {DATA} -o first --json").json
    assert (first["phase"], first["release"], first["certificate_level"]) == ("learn", None, None)
    second = rdp(f"ledger run m.ledger {DATA} -o second --json").json
    assert (second["phase"], second["release"], second["certificate_level"]) == ("unlearn", 1, "certified")
    assert rdp("ledger verify m.ledger -q").out == "ok\n"


REFUSED = [
    ("ledger request m.ledger", 2, "--forget"),
    ("ledger request m.ledger --forget 3 --batch b.txt", 2, "--batch"),
    ("ledger request m.ledger --forget 3 --due 2026-01-01 --due-days 3", 2, "conflict"),
    ("ledger request m.ledger --forget 3 --due soon", 2, "--due"),
    ("ledger request m.ledger --forget 3 --due-days 1.5", 2, "--due-days"),
    ("ledger request m.ledger --forget 3 --wait never", 2, "--wait"),
    ("ledger request m.ledger --forget 456", 6, "0..455"),
    ("ledger request m.ledger --forget 3,3", 6, "repeated"),
    ("ledger request m.ledger --forget 1", 6, "forget id 1 was named by request 1"),
    ("ledger request m.ledger --batch none.txt", 6, "none.txt"),
    ("ledger request none.ledger --forget 3", 6, "does not exist"),
    ("ledger request plan.json --forget 3", 6, "is not a ledger"),
    ("ledger plan m.ledger --requests 2", 6, "1..1"),
    ("ledger plan m.ledger --requests x", 2, "--requests"),
    ("ledger plan m.ledger -o m.ledger", 2, "is not a plan"),
    ("ledger plan m.ledger -o none/next.json", 2, "does not exist"),
    ("ledger run m.ledger --data builtin:digits -o r", 2, "no release is planned"),
    ("ledger status m.ledger --next 0", 2, "--next"),
    ("ledger status m.ledger --next 1_0", 2, "--next"),
    ("ledger status m.ledger --next ١", 2, "--next"),
    ("ledger status m.ledger --requests ١", 2, "--requests"),
    ("ledger request m.ledger --forget 3 --wait 1_0", 2, "--wait"),
    ("ledger request m.ledger --forget 3 --due-days 1_0", 2, "--due-days"),
    ("ledger request m.ledger --forget 3 --received 2999-01-01", 2, "in the future"),
    ("ledger verify m.ledger --head ١:" + "0" * 64, 2, "--head"),
    ("ledger status m.ledger --requests 7", 6, "1..1"),
    ("ledger status m.ledger --requests 1 --all", 2, "--all"),
    ("ledger verify plan.json", 6, "export"),
    ("ledger verify none", 6, "none"),
    ("ledger verify m.ledger --head 3", 2, "--head"),
    ("ledger verify m.ledger --signer x", 6, "x"),
    ("ledger export m.ledger -o plan.json", 2, "is not an export"),
    ("ledger export m.ledger -o .", 2, "folder"),
    ("ledger init m.ledger --plan plan.json", 2, "exists"),
    ("ledger init n.ledger --plan m.ledger", 6, "m.ledger"),
    ("ledger init n.ledger --plan plan.json --start .", 6, "learning.json"),
]


@pytest.mark.parametrize(("arguments", "code", "named"), REFUSED, ids=[text for text, _, _ in REFUSED])
def test_one_line_says_what_is_wrong(
    arguments: str, code: int, named: str, made: Path, learned: Path, rdp: Call
) -> None:
    Path("plan.json").write_bytes((learned / "plan.json").read_bytes())
    assert rdp("ledger request m.ledger --forget 1 -q").code == 0
    before = {path: path.read_bytes() for path in Path().iterdir()}
    found = rdp(arguments)
    assert (found.code, found.out) == (code, ""), found
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert named in found.err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_a_ledger_that_fails_names_the_check(made: Path, rdp: Call) -> None:
    head = rdp("ledger request m.ledger --forget 1 -q").out.strip()
    other = head[:-1] + ("0" if head[-1] != "0" else "1")
    found = rdp(f"ledger verify m.ledger --head {other} --json")
    assert (found.code, found.json["holds"]) == (5, False)
    assert "check head" in found.err
    assert rdp(f"ledger verify m.ledger --head {other} -q").out == "failed\n"
    assert rdp(f"ledger verify m.ledger --head {other}").out.splitlines()[-1] == "failed: head"


def test_a_clock_that_went_back_is_one_warning(made: Path, rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn_runtime.ledger import times

    monkeypatch.setattr(times, "now", lambda: "2020-01-01T00:00:00Z")
    for command in ("request m.ledger --forget 1 -q", "plan m.ledger -q", "status m.ledger -q"):
        found = rdp(f"ledger {command}")
        assert found.code == 0
        if command.startswith("request"):
            assert found.err.startswith("warning: the clock says 2020")
            assert found.err.count("\n") == 1
    assert rdp("ledger verify m.ledger -q").out == "ok\n"


def test_a_run_is_one_process(made: Path, rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = rdp(f"ledger run m.ledger {DATA} -o r")
    assert (found.code, found.out) == (2, "")
    assert "torchrun" in found.err


def test_texts_in_a_ledger_do_not_rewrite_the_terminal(made: Path, rdp: Call) -> None:
    assert rdp(["ledger", "request", "m.ledger", "--forget", "1", "--reason", "[red]a[/red] [/x]"]).code == 0
    assert "[red]a[/red] [/x]" in rdp("ledger status m.ledger").out
    assert rdp(["ledger", "request", "m.ledger", "--forget", "2", "--reason", "a\x1b[2J"]).code == 2


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE request SET received = ?, due = ?",
        "UPDATE release SET level = ? || ?",
        "UPDATE release SET plan_digest = ? || ?",
    ],
)
def test_a_changed_file_does_not_rewrite_the_terminal(change: str, made: Path, rdp: Call) -> None:
    for command in ("request m.ledger --forget 1", "plan m.ledger", f"run m.ledger {DATA} -o r1"):
        assert rdp(f"ledger {command} -q").code == 0
    with closing(sqlite3.connect(made, isolation_level=None)) as connection:
        connection.execute(change, ("\x1b[2J", "\x1b]0;a\x07"))
    found = rdp("ledger status m.ledger")
    assert found.code == 0
    assert all(letter.isprintable() or letter == "\n" for letter in found.out + found.err)


# What is imported

LOADED = """
import json, sys
from cli.main import main
code = main(sys.argv[1:])
print()
print(json.dumps([code, sorted(sys.modules)]))
"""


def test_no_verb_but_run_imports_torch(made: Path, learned: Path, shell: Call, empty_folder: Path) -> None:
    for arguments in (
        ["init", "n.ledger", "--plan", str(learned / "plan.json"), "--start", str(learned / "learned")],
        ["request", "m.ledger", "--forget", "1"],
        ["plan", "m.ledger"],
        ["status", "m.ledger"],
        ["verify", "m.ledger"],
        ["export", "m.ledger", "-o", "m.jsonl"],
    ):
        found = shell([sys.executable, "-W", "error", "-c", LOADED, "ledger", *arguments], empty_folder)
        code, modules = json.loads(found.out.splitlines()[-1])
        assert (code, found.err) == (0, "")
        assert not {"torch", "safetensors", "opacus", "scipy", "unlearn_runtime.run"} & set(modules), arguments
        if arguments[0] in ("status", "export"):
            assert "numpy" not in modules


# The page

Block = list[tuple[str, str]]

SHOWS_CODE = ' || echo "exit code $?"'


def blocks() -> list[Block]:
    """The console blocks of the page: commands and what they print."""
    found = []
    for content in re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.M):
        parts = re.split(r"^\$ ", content, flags=re.M)
        assert parts[0] == ""
        found.append([(part.split("\n", 1)[0], part.split("\n", 1)[1]) for part in parts[1:]])
    return found


def test_the_page_shows_what_the_commands_print(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn_runtime.ledger import running, times

    def now() -> str:
        return "2026-03-23T09:00:00Z"

    # The day on which the page was written.
    monkeypatch.setattr(times, "now", now)
    defaults = running.carry_out.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "clock", now)
    found = blocks()
    assert sum(len(block) for block in found) >= 15
    for command, expected in (pair for block in found for pair in block):
        program, _, rest = command.partition(" ")
        if program == "printf":
            subprocess.run(["bash", "-c", command], check=True)
            continue
        assert program == "rdp-calc"
        alone = rest.removesuffix(SHOWS_CODE)
        done = rdp(shlex.split(alone))
        shown = done.out + done.err + (f"exit code {done.code}\n" if alone != rest else "")
        assert (done.code == 0) == (alone == rest), command
        assert masked(shown) == masked(expected), command


def masked(text: str) -> list[str]:
    """Lines without what differs from ledger to ledger: hashes, which are keyed or random."""
    return [re.sub(r"[0-9a-f]{64}", "HASH", line).rstrip() for line in text.splitlines()]
