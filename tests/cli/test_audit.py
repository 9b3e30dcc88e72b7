"""rdp-calc audit: its table, JSON and files, and the exit code and the one loud line of a refuted claim."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

Call = Callable[..., Any]

FIELDS = {
    "schema": str,
    "method": str,
    "bound": str,
    "adjacency": str,
    "plan_digest": str,
    "claim": dict,
    "populations": dict,
    "score": str,
    "lower_bounds": dict,
    "gaussian_fit": dict,
    "curve": dict,
    "verdict": str,
    "exceeded": list,
    "false_alarm_rate": float,
    "statement": str,
}
PLAN = (
    "plan langevin --data worst.npz --loss huber --huber-threshold 1 --l2 0.2 --preprocess none --step-size 0.5"
    " --learn-steps 20 --unlearn-steps 7 --epsilon 1.5 --delta 0.1 -o plan.json -q"
)
AUDIT = "audit plan.json --data worst.npz --forget 0 --trials 2000 --seed 1"


@pytest.fixture
def planned(empty_folder: Path, rdp: Call) -> Path:
    """plan.json and worst.npz, a data set on which noisy descent is as far from private as claimed."""
    y = np.full(40, 50.0)
    y[0] = -50.0
    np.savez("worst.npz", X_train=np.ones((40, 1)), y_train=y)
    assert rdp(PLAN).code == 0
    return empty_folder


@pytest.fixture
def ran(planned: Path, rdp: Call) -> Path:
    """The folder of a run that kept 1000 chains of each kind."""
    done = rdp(
        "run plan.json --data worst.npz --forget 0 --trials 1000 --retrain --seed 1 --insecure-reproducible -o run -q"
    )
    assert done.code == 0
    return planned / "run"


def forge(folder: Path) -> None:
    """Put models that were never unlearned behind the released one."""
    path = folder / "private" / "chains.safetensors"
    kept = load_file(path)
    save_file({**kept, "after": np.concatenate([kept["after"][:1], kept["before"][1:]])}, path)


def test_a_plan_is_audited(planned: Path, rdp: Call) -> None:
    found = rdp(AUDIT)
    assert found.code == 0
    for text in ("claimed (certified)", "lower bounds seen (95 %)", "verdict: not refuted", "never prove", "5 %"):
        assert text in found.out
    assert "running 2 x 2000 independent models" in found.err
    quiet = rdp(f"{AUDIT} -q")
    assert quiet.err == ""
    document = rdp(f"{AUDIT} --json").json
    assert float(quiet.out) == document["lower_bounds"]["epsilon"]
    assert {name: type(value) for name, value in document.items()} == FIELDS
    assert document["schema"] == "rdp-calc/audit/1"
    assert document["claim"] == {**document["claim"], "epsilon": 1.5, "delta": 0.1, "level": "certified"}
    assert 0.6 * document["claim"]["mu"] < document["lower_bounds"]["mu"] <= document["claim"]["mu"]
    assert document["populations"]["tested"] == [1000, 1000]


def test_files_hold_the_curve(planned: Path, rdp: Call) -> None:
    names = ("curve.csv", "audit.json", "picture.png", "picture.svg")
    for _ in range(2):
        # A second time they are replaced.
        found = rdp([*AUDIT.split(), "--json", *(part for name in names for part in ("-o", name))])
        assert found.code == 0
    document = found.json
    assert json.loads((planned / "audit.json").read_text()) == document
    rows = list(csv.DictReader((planned / "curve.csv").read_text().splitlines()))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == document["curve"]["points"]
    for row in document["curve"]["points"]:
        assert 0 <= row["fpr_low"] <= row["fpr"] <= row["fpr_high"] <= 1
        assert 0 <= row["tpr_low"] <= row["tpr"] <= row["tpr_high"] <= 1
        assert row["tpr_low"] <= row["certified_tpr"] + 0.1
    assert (planned / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (planned / "picture.svg").read_text()


def test_the_models_a_run_kept_are_audited(ran: Path, rdp: Call) -> None:
    document = rdp("audit run --json").json
    assert document["populations"]["source"] == "the 1000 models that run kept"
    # Seeded runs claim nothing; the numbers of their plan can be audited all the same.
    assert document["claim"]["level"] == "none"
    assert document["verdict"] == "not refuted"


def test_a_refuted_claim_is_one_loud_line_and_exit_5(ran: Path, rdp: Call) -> None:
    forge(ran)
    found = rdp("audit run -o audit.png")
    assert found.code == 5
    assert "verdict: REFUTED" in found.out
    assert found.err.count("\n") == 1
    assert found.err.startswith("error: THE CLAIM IS REFUTED: ")
    assert "at least" in found.err
    assert Path("audit.png").exists()
    found = rdp("audit run --json")
    assert found.code == 5
    assert found.json["verdict"] == "refuted"
    assert "mu" in found.json["exceeded"]
    assert rdp("audit run -q").code == 5


def test_a_runtime_with_half_the_noise_is_refuted(planned: Path, rdp: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn_runtime.noise import GaussianSource

    fill = GaussianSource.fill
    monkeypatch.setattr(GaussianSource, "fill", lambda self, buffer: (fill(self, buffer), buffer.mul_(0.5))[0])
    assert rdp(AUDIT).code == 5


def test_a_run_that_kept_one_model_is_repeated(finished: Path, rdp: Call) -> None:
    found = rdp(f"audit {finished / 'run'} --trials 100 --seed 1 --json")
    assert found.code == 0
    assert found.json["populations"]["unlearned"] == 100
    assert found.json["claim"]["epsilon"] == 1.0


def test_too_few_trials_say_so(planned: Path, rdp: Call) -> None:
    found = rdp("audit plan.json --data worst.npz --forget 0 --trials 8 --seed 1")
    assert "could not be by so few trials" in found.out


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("audit plan.json --forget 0", 2, "--data is required"),
        ("audit plan.json --data worst.npz", 2, "--forget is required"),
        (f"{AUDIT} --confidence 1", 2, "--confidence must be in (0, 1)"),
        (f"{AUDIT} --trials 1", 2, "--trials must be an integer >= 2, got 1"),
        (f"{AUDIT} -o audit.pdf", 2, "must end in .svg, .png, .csv or .json"),
        (f"{AUDIT} -o plan.json", 2, "exists and is not an audit"),
        (f"{AUDIT} -o nowhere/a.csv", 2, "does not exist"),
        ("audit missing.json --data worst.npz --forget 0", 6, "cannot read"),
        ("audit . ", 6, "no certificate.json"),
        (AUDIT.replace("--forget 0", "--forget 40"), 6, "forget id 40"),
        (AUDIT.replace("--forget 0", "--forget 0,1"), 6, "covers at most 1"),
    ],
)
def test_bad_input_is_one_line(planned: Path, rdp: Call, text: str, code: int, says: str) -> None:
    found = rdp(text)
    assert found.code == code
    assert says in found.err
    assert found.err.count("\n") == 1
    assert found.out == ""


def test_a_plan_that_was_changed_is_refused(planned: Path, rdp: Call) -> None:
    path = planned / "plan.json"
    path.write_text(path.read_text().replace('"epsilon": 1.5', '"epsilon": 0.5'))
    found = rdp(AUDIT)
    assert found.code == 6
    assert "digest" in found.err
