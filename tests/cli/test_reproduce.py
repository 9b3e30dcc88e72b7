"""rdp-calc reproduce: tables and experiments, on the screen, as JSON, and as files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdp_calc.published import TABLES

Call = Callable[..., Any]

FIG4 = "reproduce langevin-fig4 --scale 0.01 --seed 1"


def test_an_experiment_writes_what_it_prints(rdp: Call, empty_folder: Path) -> None:
    found = rdp(f"{FIG4} --json -o out")
    assert found.code == 0, found.err
    files = sorted(path.name for path in (empty_folder / "out").iterdir())
    assert files == [f"langevin-fig4.{end}" for end in ("csv", "json", "md", "png")]
    assert found.json == json.loads((empty_folder / "out" / "langevin-fig4.json").read_text())
    assert (found.json["schema"], found.json["kind"]) == ("rdp-calc/reproduce/1", "experiment")
    assert found.json["settings"]["data"] == "builtin:digits"
    assert "records" in found.err
    assert [path.name for path in empty_folder.iterdir()] == ["out"]


def test_quiet_prints_the_answers_alone(rdp: Call) -> None:
    found = rdp(f"{FIG4} -q")
    assert (found.code, found.err) == (0, "")
    steps = [int(line) for line in found.out.split()]
    # Five epsilons for one record and for more, theirs and ours.
    assert len(steps) == 20
    assert min(steps) >= 0


def test_the_screen_shows_the_table_and_what_it_does_not_prove(rdp: Call) -> None:
    found = rdp(FIG4)
    assert found.code == 0
    shown = " ".join(found.out.split())
    for wanted in ("Langevin, ours", "retraining, same noise", "a certificate covers one released model", "chains 4"):
        assert wanted in shown
    assert "published size: rdp-calc reproduce langevin-fig4" in shown


def test_a_table_writes_the_same_files(rdp: Call, empty_folder: Path) -> None:
    found = rdp("reproduce koloskova-eps -o table --json")
    assert found.code == 0, found.err
    assert found.json["kind"] == "table"
    stored = json.loads((empty_folder / "table" / "koloskova-eps.json").read_text())
    assert stored["kind"] == "table"
    assert [row["problem"] for row in stored["rows"]] == [row["problem"] for row in found.json["rows"]]
    assert (empty_folder / "table" / "koloskova-eps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--scale 0", "scale must be in (0, 1]"),
        ("--scale 1.5", "scale must be in (0, 1]"),
        ("--scale -1", "scale must be in (0, 1]"),
        ("--scale big", "--scale"),
        ("--seed -3", "seed must be"),
        ("--device tpu", "device must be"),
        ("--label kind", "label"),
    ],
)
def test_bad_options_are_refused(arguments: str, message: str, rdp: Call, empty_folder: Path) -> None:
    found = rdp(f"reproduce langevin-fig4 {arguments} -o out")
    assert found.code == 2
    assert message in found.err
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("name", ["langevin-fig4", "koloskova-eps"])
def test_an_output_in_use_is_refused_before_any_work(
    name: str, rdp: Call, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("cli.commands.reproduce.find", never)
    monkeypatch.setattr("cli.commands.reproduce.table", never)
    (empty_folder / "out").mkdir()
    (empty_folder / "out" / "mine").write_text("kept")
    found = rdp(["reproduce", name, "-o", "out"])
    assert found.code == 2
    assert "not empty" in found.err
    assert (empty_folder / "out" / "mine").read_text() == "kept"


def test_missing_matplotlib_is_told_before_any_work(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    present = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else present(name, *rest)
    )
    found = rdp(f"{FIG4} -o out")
    assert found.code == 2
    assert "rdp-calc[plots]" in found.err


@pytest.mark.parametrize(
    "option", ["--data builtin:digits", "--scale 0.5", "--seed 1", "--device cpu", "--classes 3,8"]
)
def test_tables_take_no_options_of_experiments(option: str, rdp: Call) -> None:
    found = rdp(f"reproduce langevin-sigma {option}")
    assert found.code == 2
    assert option.split(maxsplit=1)[0] in found.err


def test_unknown_names_and_data_are_told(rdp: Call) -> None:
    found = rdp("reproduce figure-9")
    assert found.code == 2
    assert "langevin-fig3a" in found.err
    assert next(iter(TABLES)) in found.err
    found = rdp("reproduce langevin-fig4 --data nothing.npz")
    assert found.code == 6
    assert "nothing.npz" in found.err


def test_help_and_tables_import_no_torch(shell: Call, empty_folder: Path) -> None:
    code = (
        "import sys; from cli.main import main; code = main(sys.argv[1:]);"
        " assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules; sys.exit(code)"
    )
    for arguments in (["reproduce", "--help"], ["reproduce", "koloskova-eps", "-q"]):
        found = shell([sys.executable, "-W", "error", "-c", code, *arguments], empty_folder)
        assert (found.code, found.err) == (0, ""), found.err
