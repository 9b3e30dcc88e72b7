"""The demo holds, shows what unlearning did, and what it keeps can be verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdp_calc.errors import GuardFailed

Call = Callable[..., Any]


def check(document: dict[str, Any]) -> None:
    assert document["schema"] == "rdp-calc/demo/1"
    assert document["holds"] is True
    assert document["certificate_level"] == "certified"
    assert document["sigma"] > 0
    assert document["target"] == {"epsilon": 1.0, "delta": 1 / 1438}
    for model in ("before", "after", "retrained"):
        for part in ("train", "test", "forget"):
            value = document["metrics"][model][f"{part}_accuracy"]
            assert value["chains"] == 20
            assert 0 <= value["mean"] <= 1
        # Ten balanced classes: guessing gives 0.1. The demo is there to show a model that works.
        assert document["metrics"][model]["test_accuracy"]["mean"] > 0.8


def test_demo_keeps_files_that_verify(rdp: Call, empty_folder: Path) -> None:
    found = rdp("demo --json -o kept")
    assert (found.code, found.err) == (0, "")
    check(found.json)
    assert sorted(p.name for p in empty_folder.iterdir()) == ["kept"]
    assert sorted(p.name for p in (empty_folder / "kept").iterdir()) == ["learned", "plan.json", "unlearned"]
    assert rdp("verify kept/plan.json -q").out == "ok\n"
    verified = rdp(
        "verify kept/unlearned/certificate.json --model kept/unlearned/model.safetensors --plan kept/plan.json"
        " --record kept/unlearned/private/audit.json --data builtin:digits --forget 100-109 --json"
    )
    assert (verified.code, verified.json["holds"]) == (0, True)


@pytest.mark.slow
def test_demo_for_people_leaves_nothing(rdp: Call, empty_folder: Path) -> None:
    found = rdp("demo")
    assert found.code == 0
    for word in ("plan", "learn", "unlearn", "verify", "all pass", "unlearned", "retrained", "certified"):
        assert word in found.out
    assert not list(empty_folder.iterdir())
    assert rdp("demo -q").out == "ok\n"


def test_demo_refuses_a_taken_folder(rdp: Call, empty_folder: Path) -> None:
    (empty_folder / "note").write_text("mine")
    for output in ("note", ".", "missing/demo"):
        found = rdp(f"demo -o {output}")
        assert (found.code, found.out) == (2, "")
        assert found.err.startswith("error: ")
        assert found.err.count("\n") == 1
    assert [p.name for p in empty_folder.iterdir()] == ["note"]


def test_demo_that_fails_leaves_nothing(rdp: Call, empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import unlearn_runtime.run as module

    def failing(*args: Any, **settings: Any) -> Any:
        raise GuardFailed("no.")

    monkeypatch.setattr(module, "run_plan", failing)
    found = rdp("demo -q -o kept")
    assert (found.code, found.out, found.err) == (4, "", "error: no.\n")
    assert not list(empty_folder.iterdir())
