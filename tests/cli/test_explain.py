"""rdp-calc explain: every bound has a statement, assumptions and a page; nothing heavy is loaded."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdp_calc import registry

Call = Callable[..., Any]

ROOT = Path(__file__).resolve().parents[2]

BOUNDS = registry.bound_names()


@pytest.mark.parametrize("name", BOUNDS)
def test_every_bound_is_explained(rdp: Call, name: str) -> None:
    bound = registry.bound(name)
    found = rdp(["explain", name, "--json"]).json
    assert found["schema"] == "rdp-calc/explain/1"
    assert (found["name"], found["id"], found["other_ids"]) == (name, bound.id, list(bound.other_ids))
    # The class itself speaks, not a class it inherits from.
    assert found["statement"].startswith((type(bound).__doc__ or "").split("\n")[0])
    assert found["statement"]
    assert found["assumptions"]
    assert "Assumes" not in found["statement"] + found["assumptions"]
    assert found["methods"] == [m for m in registry.method_names() if name in registry.method(m).BOUNDS]
    assert found["methods"]
    assert found["page"] == f"docs/theory/{name}.md"
    assert (found["largest_epsilon"] is None) == (bound.largest_epsilon == float("inf"))


@pytest.mark.parametrize("name", BOUNDS)
def test_text_keeps_every_word_and_formula_of_the_docstring(rdp: Call, name: str) -> None:
    bound, outcome = registry.bound(name), rdp(["explain", name])
    assert (outcome.code, outcome.err) == (0, "")
    text = inspect.getdoc(type(bound)) or ""
    assert " ".join(text.split()) in " ".join(outcome.out.split())
    for line in text.splitlines():
        assert not line.startswith(" ") or line.rstrip() in outcome.out
    for part in (bound.id, *bound.other_ids, bound.summary, bound.verification_level, f"docs/theory/{name}.md"):
        assert part in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120


@pytest.mark.parametrize("name", BOUNDS)
def test_each_id_finds_its_bound(rdp: Call, name: str) -> None:
    bound = registry.bound(name)
    for known in (bound.id, *bound.other_ids):
        assert rdp(["explain", known, "-q"]).out == f"{bound.id}\n"


def test_without_a_bound_all_are_listed(rdp: Call) -> None:
    listed = rdp("explain").out
    assert all(name in listed for name in BOUNDS)
    assert rdp("explain -q").out.split() == list(BOUNDS)
    document = rdp("explain --json").json
    assert document["schema"] == "rdp-calc/explain/1"
    assert [entry["name"] for entry in document["bounds"]] == list(BOUNDS)


def test_brackets_are_printed_and_not_interpreted(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(registry.bound("shifted"))
    monkeypatch.setattr(kind, "__doc__", "States [bold]x[/bold] in [0, 1].\n\nAssumes: [a] and \x1b[2J nothing.")
    monkeypatch.setattr(kind, "summary", "All of [red]it.")
    out = rdp("explain shifted").out
    assert "States [bold]x[/bold] in [0, 1]." in out
    assert "Assumes: [a] and ?[2J nothing." in out
    assert "All of [red]it." in rdp("explain").out


@pytest.mark.parametrize("name", ["nothing", "shifted-gdp/general/v2", "best", ""])
def test_unknown_names_are_refused_with_the_list(rdp: Call, name: str) -> None:
    outcome = rdp(["explain", name])
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert ", ".join(BOUNDS) in outcome.err


@pytest.mark.parametrize("arguments", ["explain", "explain pld", "explain --json", "explain shifted-gdp/general/v1"])
def test_explaining_loads_no_science(shell: Call, empty_folder: Path, arguments: str) -> None:
    code = (
        "import json, sys\nfrom cli.main import main\ncode = main(sys.argv[1:])\n"
        "print()\nprint(json.dumps([code, sorted(sys.modules)]))"
    )
    found = shell([sys.executable, "-W", "error", "-c", code, *arguments.split()], empty_folder)
    assert found.err == ""
    code, modules = json.loads(found.out.splitlines()[-1])
    assert code == 0
    assert not {"numpy", "scipy", "torch", "mpmath"} & set(modules)
