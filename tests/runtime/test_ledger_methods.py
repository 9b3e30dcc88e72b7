"""Ledgers of every kind of method: real runs, two releases each, and everything verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from rdp_calc.verify import verify_document
from unlearn_runtime.ledger.verification import verify_file

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 60
LOGISTIC = "--loss logistic --l2 0.1"
SOLVED = f"{LOGISTIC} --tolerance 1e-8 --residual 1e-8"
MLP = "--model mlp:5 --learn epochs=3,step-size=0.5,batch-size=16"

CHAINS = {
    "langevin": f"langevin {LOGISTIC} --unlearn-steps 4 --execute-learn-steps 6 --bound shifted",
    "noisy-sgd": f"noisy-sgd {LOGISTIC} --batch-size 20 --unlearn-epochs 2 --execute-learn-steps 3 --bound shifted",
    "descent-to-delete": f"descent-to-delete {LOGISTIC} --unlearn-steps 9 --execute-learn-steps 9 --bound shifted",
    "gradient-norm": f"gradient-norm {LOGISTIC} --tolerance 1e-8",
}
CUMULATIVE = {
    "newton": f"newton {SOLVED}",
    "jackknife": f"jackknife {SOLVED}",
    "hessian-free": f"hessian-free --batch-size 20 --step-size 0.5 --epochs 3 {LOGISTIC}",
    "dp-sgd": "dp-sgd --model mlp:5 --batch-size 20 --steps 5 --clip-norm 1 --step-size 0.2 --adjacency zero-out"
    " --group-size 3",
}
ANY_MODEL = {
    "noisy-finetune": f"noisy-finetune {MLP} --batch-size 16 --init-clip 1 --grad-clip 1 --step-size 0.1"
    " --unlearn-steps 6",
    "output-perturbation": "output-perturbation --model mlp:5 --init-clip 1",
}

Ledger = Callable[[str], list[list[int]]]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    chance = np.random.default_rng(5)
    rows = chance.normal(size=(SIZE + 20, 4))
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1)
    labels = np.where(rows @ np.array([1.0, -1.0, 0.5, 0.2]) + 0.1 * chance.normal(size=len(rows)) > 0, 1, -1)
    np.savez("data.npz", X_train=rows[:SIZE], y_train=labels[:SIZE], X_test=rows[SIZE:], y_test=labels[SIZE:])
    return "data.npz"


@pytest.fixture
def released(data: str) -> Ledger:
    """Rows forgotten by each of two releases of a ledger of a plan, made on the command line."""

    def call(command: str) -> None:
        assert main(command.split()) == 0, command

    def make(plan: str) -> list[list[int]]:
        call(f"plan {plan} --epsilon 2 --delta 1e-2 --data {data} --classes -1,1 -o plan.json -q")
        if plan.split(maxsplit=1)[0] in ANY_MODEL:
            target = f"--epsilon 2 --delta 1e-2 --data {data} --classes -1,1"
            call(f"plan {ANY_MODEL['noisy-finetune']} {target} -o other.json -q")
            call(f"run other.json --data {data} --phase learn -o learned -q")
            call("ledger init m.ledger --plan plan.json --start learned/model.safetensors -q")
        else:
            call("ledger init m.ledger --plan plan.json -q")
            call(f"ledger run m.ledger --data {data} -o learned -q")
        rows = []
        for number, ids in enumerate(("5,7", "9"), start=1):
            call(f"ledger request m.ledger --forget {ids} -q")
            call("ledger plan m.ledger -q")
            call(f"ledger run m.ledger --data {data} -o release-{number} -q")
            folder = Path(f"release-{number}")
            assert verify_document(json.loads((folder / "certificate.json").read_text())).holds
            rows.append(json.loads((folder / "private" / "audit.json").read_text())["forgotten_ids"])
        call("ledger status m.ledger --json")
        report = verify_file(Path("m.ledger"))
        assert [check for check in report.checks if not check.passed] == []
        return rows

    return make


def most_are_slow(names: list[str], quick: str) -> list[Any]:
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", most_are_slow([*CHAINS, *ANY_MODEL], "noisy-sgd"))
def test_releases_that_go_on_from_the_last(name: str, released: Ledger) -> None:
    assert released((CHAINS | ANY_MODEL)[name]) == [[5, 7], [9]]


@pytest.mark.parametrize("name", most_are_slow([*CUMULATIVE], "newton"))
def test_releases_that_start_from_what_was_learned(name: str, released: Ledger) -> None:
    assert released(CUMULATIVE[name]) == [[5, 7], [5, 7, 9]]


def test_a_model_without_its_folder_does_not_bring_records_back(released: Ledger) -> None:
    # Moved or renamed, a released model does not know what it forgot; the ledger does.
    assert released(ANY_MODEL["noisy-finetune"]) == [[5, 7], [9]]
    for command in (
        "ledger request m.ledger --forget 11 -q",
        "ledger plan m.ledger -q",
        "ledger run m.ledger --data data.npz --start release-2/model.safetensors -o release-3 -q",
    ):
        assert main(command.split()) == 0
    audit = json.loads(Path("release-3/private/audit.json").read_text())
    assert (audit["forgotten_ids"], audit["removed_before"]) == ([11], [5, 7, 9])
    assert verify_file(Path("m.ledger")).holds
