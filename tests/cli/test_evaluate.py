"""``rdp-calc evaluate``: tables, the JSON object, files, the one number, and errors of one line."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import main

Call = Callable[..., Any]

ATTACKS = "--attack loss --attack logistic --attack lira --attack population"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of chains, a retrained baseline and another baseline, on built-in data."""
    folder = tmp_path_factory.mktemp("folders")
    commands = [
        "plan langevin --data builtin:breast-cancer --loss logistic --l2 0.05 --epsilon 1 --delta 1/n --group-size 6"
        " --unlearn-steps 5 --execute-learn-steps 20 -o plan.json -q",
        "run plan.json --data builtin:breast-cancer --forget 3,17,40-43 --trials 20 --retrain -o run -q",
    ]
    baseline = "--data builtin:breast-cancer --model mlp:4 --learn epochs=2,step-size=0.1 --forget 3,17,40-43"
    commands += [f"baseline retrain {baseline} -o reference -q", f"baseline sisa {baseline} --shards 2 -o sisa -q"]
    with contextlib.chdir(folder):
        for command in commands:
            assert main(command.split()) == 0
    return folder


@pytest.fixture
def here(folders: Path, empty_folder: Path) -> Path:
    """The test's own folder with copies of them."""
    for name in ("run", "reference", "sisa"):
        shutil.copytree(folders / name, empty_folder / name)
    return empty_folder


@pytest.mark.usefixtures("here")
def test_table(rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    found = rdp(f"evaluate run --retrain {ATTACKS} --shadows 4 --seed 1")
    assert found.code == 0, found.err
    lines = [line.rstrip() for line in found.out.splitlines()]
    tables = [line for line in lines if line.startswith(" run")]
    assert max(map(len, tables)) <= 100
    assert tables[0].split() == [
        "run",
        "method",
        "level",
        "test",
        "retain",
        "forget",
        "distance",
        "agree",
        "KL",
        "faster",
    ]
    assert tables[1].split()[:3] == ["run", "langevin", "certified"]
    assert "…" not in found.out
    # Three models for every attack on records, and the populations.
    assert len(tables) == 2 + 1 + 3 * 3 + 1
    assert tables[-1].split()[1] == "population"
    assert "<=" in tables[-1]
    flat = " ".join(found.out.split())
    assert "lower bound on what leaks" in flat
    assert "never a guarantee" in flat
    assert "a rate of 0.001 needs 1000 non-members or more, there are 113" in flat


@pytest.mark.usefixtures("here")
def test_every_row_shows_its_level(rdp: Call) -> None:
    found = rdp("evaluate run reference sisa")
    rows = [
        line.split()
        for line in found.out.splitlines()
        if line.split()[:1] and line.split()[0] in ("run", "reference", "sisa")
    ]
    assert [(row[0], row[1], row[2]) for row in rows[1:]] == [
        ("run", "langevin", "certified"),
        ("reference", "retrain", "none"),
        ("sisa", "sisa", "none"),
    ]


@pytest.mark.usefixtures("here")
def test_json(rdp: Call) -> None:
    found = rdp(f"evaluate run --json {ATTACKS} --shadows 4")
    document = found.json
    assert document["schema"] == "rdp-calc/evaluate/1"
    assert "never a guarantee" in document["note"]
    (row,) = document["runs"]
    assert row["certificate_level"] == "certified"
    assert row["claim"]["epsilon"] == 1.0
    assert row["models"] == {"before": 20, "after": 20, "retrained": 20}
    assert [part["attack"] for part in row["attacks"]] == ["loss"] * 3 + ["logistic"] * 3 + ["lira"] * 3 + [
        "population"
    ]
    for part in row["attacks"]:
        assert part["auc"]["low"] <= part["auc"]["value"] <= part["auc"]["high"]
        assert part["advantage"]["low"] <= part["advantage"]["value"] <= part["advantage"]["high"]
        small = part["tpr_at_fpr"][0]
        assert small["value"] is None
        assert "1000 non-members" in small["reason"]
    assert row["attacks"][-1]["certified_advantage"] == row["claim"]["advantage"]


@pytest.mark.usefixtures("here")
def test_one_number_a_run(rdp: Call) -> None:
    document = rdp("evaluate run sisa --attack loss --json").json
    areas = [part["auc"]["value"] for row in document["runs"] for part in row["attacks"] if part["target"] == "after"]
    found = rdp("evaluate run sisa --attack loss -q")
    assert [float(line) for line in found.out.splitlines()] == areas
    assert found.err == ""
    accuracies = [row["metrics"]["after"]["test_accuracy"]["mean"] for row in document["runs"]]
    assert [float(line) for line in rdp("evaluate run sisa -q").out.splitlines()] == accuracies


def test_files(rdp: Call, here: Path) -> None:
    pytest.importorskip("matplotlib")
    outputs = "-o e.json -o e.csv -o e.png -o e.svg"
    found = rdp(f"evaluate run sisa --attack loss --seed 1 --json {outputs}")
    assert found.code == 0, found.err
    assert json.loads((here / "e.json").read_text()) == found.json
    with (here / "e.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    values = {(line["run"], line["model"], line["quantity"]): line for line in lines}
    row = found.json["runs"][0]
    assert float(values["run", "after", "test_accuracy"]["value"]) == row["metrics"]["after"]["test_accuracy"]["mean"]
    area = row["attacks"][0]["auc"]
    line = values["run", "before", "loss_auc"]
    assert [float(line[name]) for name in ("value", "low", "high")] == [area["value"], area["low"], area["high"]]
    assert values["sisa", "after", "loss_tpr_at_fpr_0.001"]["value"] == ""
    assert {line["certificate_level"] for line in lines} == {"certified", "none"}
    assert (here / "e.png").read_bytes().startswith(b"\x89PNG")
    assert (here / "e.svg").read_bytes().startswith(b"<?xml")
    before = (here / "e.svg").read_bytes()
    assert rdp("evaluate run sisa --attack loss --seed 1 -q -o e.json -o e.csv -o e.svg").code == 0
    assert (here / "e.svg").read_bytes() == before


@pytest.mark.usefixtures("here")
def test_reference_from_another_folder(rdp: Call) -> None:
    row = rdp("evaluate reference --retrained reference --json").json["runs"][0]
    assert row["distance"]["l2"] == 0
    assert row["predictions"]["test"]["agreement"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ("", 2, "name the folder"),
        ("run --attack guess", 2, "--attack must be one of loss"),
        ("run --attack lira --shadows 3", 2, "even number >= 4"),
        ("run --attack lira --shadows many", 2, "--shadows"),
        ("run --confidence 2", 2, "[0.5, 1)"),
        ("run --seed x", 2, "--seed"),
        ("run --retrain --retrained reference", 2, "give one of them"),
        ("run -o e.png", 2, "--attack"),
        ("run -o e.txt", 2, ".json"),
        ("run -o missing/e.json", 2, "does not exist"),
        ("run -o taken.json", 2, "not an evaluation"),
        ("run -o taken.csv", 2, "not an evaluation"),
        ("missing", 6, "not the folder"),
        ("run missing", 6, "not the folder"),
        ("run --data missing.npz", 6, "no such file"),
        ("run --data builtin:digits", 6, "digits"),
        ("reference --attack population", 2, "--trials 100 --retrain"),
        ("run --retrained sisa", 2, "holds no retrained model"),
    ],
)
def test_errors(arguments: str, code: int, named: str, rdp: Call, here: Path) -> None:
    for name in ("taken.json", "taken.csv"):
        (here / name).write_text("{}\n")
    kept = sorted(here.iterdir())
    found = rdp(f"evaluate {arguments}")
    assert found.code == code, found.err
    assert named in found.err
    assert found.out == ""
    assert len(found.err.strip().splitlines()) == 1
    assert sorted(here.iterdir()) == kept
    assert (here / "taken.json").read_text() == "{}\n"


def test_damage_is_one_line(rdp: Call, here: Path) -> None:
    (here / "run" / "model.safetensors").write_bytes(b"\x80\x04pickle")
    found = rdp("evaluate run")
    assert (found.code, found.out) == (6, "")
    assert found.err.count("\n") == 1
