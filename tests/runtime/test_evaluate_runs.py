"""Folders of runs and baselines as they are evaluated: every number against numpy, damaged folders refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import expit, log_softmax, softmax

from rdp_calc.documents import digest
from rdp_calc.errors import DataError, InvalidInput, RdpCalcError
from unlearn_runtime.evaluate import metrics, recipes
from unlearn_runtime.evaluate.report import Options, evaluate
from unlearn_runtime.evaluate.runs import read_run

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
Command = Callable[..., str]

LANGEVIN = "langevin --loss logistic --l2 0.1 --unlearn-steps 4 --execute-learn-steps 6 --group-size 3"
LEARN = "epochs=3,step-size=0.5,batch-size=16,momentum=0.9"


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, two_classes: str, rdp_calc_command: Command
) -> Callable[[str, str], Path]:
    """The folder of a run of a plan, or of a baseline, each made once."""
    folder = tmp_path_factory.mktemp("made")
    known: dict[tuple[str, str], Path] = {}

    def make(plan: str, arguments: str = "--forget 3,17,20") -> Path:
        key = (plan, arguments)
        if key not in known:
            path = folder / str(len(known))
            if plan.startswith("baseline"):
                rdp_calc_command(f"{plan} --data {two_classes} {arguments} -o {path} -q")
            else:
                rdp_calc_command(f"plan {plan} --data {two_classes} --epsilon 5 --delta 1e-3 -o {path}.json -q")
                rdp_calc_command(f"run {path}.json --data {two_classes} {arguments} -o {path} -q")
            known[key] = path
        return known[key]

    return make


@pytest.fixture
def copied(made: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of such a folder that a test may damage."""

    def copy(*arguments: str) -> Path:
        target = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(made(*arguments), target)
        return target

    return copy


@pytest.fixture
def records(two_classes: str) -> dict[str, tuple[Array, Array]]:
    """Rows and labels -1/+1 by part, records 3, 17 and 20 forgotten."""
    with np.load(two_classes) as arrays:
        x, y = arrays["X_train"], 2.0 * arrays["y_train"] - 1
        test = arrays["X_test"], 2.0 * arrays["y_test"] - 1
    gone = np.isin(np.arange(60), (3, 17, 20))
    return {"retained": (x[~gone], y[~gone]), "forgotten": (x[gone], y[gone]), "test": test}


def one_row(path: Path, **options: Any) -> dict[str, Any]:
    (row,) = evaluate([path], Options(**options)).document["runs"]
    return dict(row)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def binary_kl(p: Array, q: Array) -> float:
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())


def test_every_number_of_a_run(made: Callable[..., Path], records: Any) -> None:
    path = made(LANGEVIN, "--forget 3,17,20 --trials 5 --retrain")
    row = one_row(path)
    chains = load_file(path / "private" / "chains.safetensors")
    assert (row["kind"], row["method"], row["certificate_level"]) == ("run", "langevin", "certified")
    assert row["models"] == {"before": 5, "after": 5, "retrained": 5}
    assert row["records"] == {"retained": 57, "forgotten": 3, "test": 15}
    for state, weights in chains.items():
        for part, (x, y) in records.items():
            margins = y[:, None] * (x @ weights.T)
            accuracy, losses = (margins > 0).mean(axis=0), np.logaddexp(0, -margins).mean(axis=0)
            for name, values in (("accuracy", accuracy), ("loss", losses)):
                found = row["metrics"][state][f"{part}_{name}"]
                assert found["mean"] == pytest.approx(values.mean(), abs=1e-12)
                assert found["std"] == pytest.approx(values.std(ddof=1), abs=1e-12)
                assert found["chains"] == 5
    gaps = np.linalg.norm(chains["after"] - chains["retrained"], axis=1).mean()
    distance = row["distance"]
    assert distance["l2"] == pytest.approx(gaps)
    assert distance["relative_to_retrained"] == pytest.approx(gaps / np.linalg.norm(chains["retrained"], axis=1).mean())
    start = np.linalg.norm(chains["before"] - chains["retrained"], axis=1).mean()
    assert distance["relative_to_before"] == pytest.approx(gaps / start)
    assert distance["between_means"] == pytest.approx(np.linalg.norm((chains["after"] - chains["retrained"]).mean(0)))
    assert distance["layers"] == {
        "weight": {"l2": pytest.approx(gaps), "relative": pytest.approx(distance["relative_to_retrained"])}
    }
    for part, (x, _) in records.items():
        p, q = (expit(x @ chains[state].T) for state in ("after", "retrained"))
        found = row["predictions"][part]
        assert found["agreement"] == pytest.approx(((p > 0.5) == (q > 0.5)).mean())
        assert found["kl_unlearned_retrained"] == pytest.approx(binary_kl(p, q), rel=1e-9)
        assert found["kl_retrained_unlearned"] == pytest.approx(binary_kl(q, p), rel=1e-9)


def test_the_run_itself_measured_the_same(made: Callable[..., Path]) -> None:
    path = made(LANGEVIN, "--forget 3,17,20 --trials 5 --retrain")
    row, kept = one_row(path), json.loads((path / "private" / "metrics.json").read_text())
    for state in ("before", "after", "retrained"):
        for theirs, ours in (("test", "test"), ("train", "retained"), ("forget", "forgotten")):
            for name in ("accuracy", "loss"):
                value = kept[state][f"{theirs}_{name}"]["mean"]
                assert row["metrics"][state][f"{ours}_{name}"]["mean"] == pytest.approx(value, abs=1e-5)
    seconds = kept["seconds"]
    assert row["seconds"] == {**seconds, "retrain_over_unlearn": pytest.approx(seconds["retrain"] / seconds["unlearn"])}


def test_softmax(made: Callable[..., Path], records: Any) -> None:
    path = made(
        "langevin --loss softmax --l2 0.1 --unlearn-steps 4 --execute-learn-steps 6 --group-size 3",
        "--forget 3,17,20 --retrain",
    )
    row, chains = one_row(path), load_file(path / "private" / "chains.safetensors")
    x, y = records["test"]
    logs = {state: log_softmax(x @ chains[state][0].reshape(2, 4).T, axis=1) for state in ("after", "retrained")}
    index = (y > 0).astype(int)
    assert row["metrics"]["after"]["test_loss"]["mean"] == pytest.approx(-logs["after"][range(15), index].mean())
    kl = (softmax(x @ chains["after"][0].reshape(2, 4).T, axis=1) * (logs["after"] - logs["retrained"])).sum(axis=1)
    assert row["predictions"]["test"]["kl_unlearned_retrained"] == pytest.approx(kl.mean(), rel=1e-9)


def test_network(made: Callable[..., Path], records: Any) -> None:
    path = made(
        f"output-perturbation --model mlp:5 --learn {LEARN} --init-clip 1 --group-size 3",
        "--forget 3,17,20 --trials 2 --retrain",
    )
    row, chains = one_row(path), load_file(path / "private" / "chains.safetensors")
    x, y = records["test"]

    def losses(numbers: Array) -> Array:
        one, two = numbers[:20].reshape(5, 4), numbers[25:35].reshape(2, 5)
        hidden = np.maximum(x @ one.T + numbers[20:25], 0)
        return -log_softmax(hidden @ two.T + numbers[35:], axis=1)[range(15), (y > 0).astype(int)]

    expected = np.mean([losses(numbers).mean() for numbers in chains["after"]])
    assert row["metrics"]["after"]["test_loss"]["mean"] == pytest.approx(expected, abs=1e-5)
    layers = row["distance"]["layers"]
    assert list(layers) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    gaps = np.linalg.norm((chains["after"] - chains["retrained"])[:, 20:25], axis=1)
    assert layers["0.bias"]["l2"] == pytest.approx(gaps.mean())


def test_regression_has_losses_only(tmp_path: Path, rdp_calc_command: Command, regression: Callable[..., Any]) -> None:
    data, test = regression(), regression(n=12, seed=5)
    np.savez(
        tmp_path / "data.npz", X_train=data.x_train, y_train=data.y_train, X_test=test.x_train, y_test=test.y_train
    )
    rdp_calc_command(
        f"plan langevin --data {tmp_path}/data.npz --loss huber --huber-threshold 1 --l2 0.2 --unlearn-steps 3"
        f" --execute-learn-steps 5 --epsilon 5 --delta 0.01 --preprocess none -o {tmp_path}/plan.json -q"
    )
    rdp_calc_command(f"run {tmp_path}/plan.json --data {tmp_path}/data.npz --forget 3 --retrain -o {tmp_path}/run -q")
    row = one_row(tmp_path / "run", attacks=("loss", "lira"), shadows=8)
    weights = load_file(tmp_path / "run" / "private" / "chains.safetensors")["after"][0]
    gaps = np.abs(test.x_train @ weights - test.y_train)
    expected = np.where(gaps <= 1, gaps**2 / 2, gaps - 0.5).mean()
    assert row["metrics"]["after"]["test_loss"]["mean"] == pytest.approx(expected, rel=1e-6)
    assert row["metrics"]["after"]["test_accuracy"] is None
    assert row["predictions"]["test"] == {
        "agreement": None,
        "kl_unlearned_retrained": None,
        "kl_retrained_unlearned": None,
    }
    assert len(row["attacks"]) == 6


def test_ensemble_predicts_the_mean_of_its_members(made: Callable[..., Path], records: Any) -> None:
    path = made(f"baseline sisa --shards 2 --model softmax --learn {LEARN}")
    row, tensors = one_row(path), load_file(path / "model.safetensors")
    x, y = records["test"]
    shares = np.mean([softmax(x @ tensors[f"shard{k}.weight"].T, axis=1) for k in range(2)], axis=0)
    expected = -np.log(shares[range(15), (y > 0).astype(int)]).mean()
    assert row["metrics"]["after"]["test_loss"]["mean"] == pytest.approx(expected, abs=1e-5)
    assert (row["kind"], row["certificate_level"], row["claim"]) == ("baseline", "none", None)
    assert "exact" in row["statement"]
    again = one_row(path, attacks=("lira",), shadows=4, retrain=True)
    assert again["distance"]["l2"] > 0
    assert [part["target"] for part in again["attacks"]] == ["before", "after", "retrained"]


# The reference


def test_reference_of_another_folder(made: Callable[..., Path]) -> None:
    model = f"--model mlp:5 --learn {LEARN}"
    reference, path = made(f"baseline retrain {model}"), made(f"baseline sisa {model}")
    weights = [
        np.concatenate([value.reshape(-1) for _, value in sorted(load_file(folder / "model.safetensors").items())])
        for folder in (path, reference)
    ]
    row = one_row(path, retrained=reference)
    assert row["distance"]["l2"] == pytest.approx(float(np.linalg.norm(weights[0] - weights[1])), rel=1e-5)
    # What the reference took to unlearn is what retraining takes.
    times = [json.loads((p / "private" / "metrics.json").read_text())["seconds"]["unlearn"] for p in (path, reference)]
    assert row["seconds"]["retrain_over_unlearn"] == pytest.approx(times[1] / times[0])
    itself = one_row(reference, retrained=reference)
    assert itself["distance"]["l2"] == 0
    assert itself["predictions"]["test"]["agreement"] == 1
    assert itself["predictions"]["test"]["kl_unlearned_retrained"] == 0
    ensemble = one_row(made(f"baseline sisa --shards 2 {model}"), retrained=reference)
    assert ensemble["distance"] is None
    assert ensemble["predictions"]["test"]["agreement"] > 0


def test_reference_that_forgot_something_else(made: Callable[..., Path]) -> None:
    model = f"--model mlp:5 --learn {LEARN}"
    reference, path = made(f"baseline retrain {model}", "--forget 3,17"), made(f"baseline sisa {model}")
    with pytest.raises(DataError, match="other records"):
        one_row(path, retrained=reference)
    with pytest.raises(InvalidInput, match="holds no retrained model"):
        one_row(path, retrained=made(LANGEVIN, "--forget 3,17,20"))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("adjacency", ["remove", "zero-out"])
def test_reference_trained_now_is_that_of_the_run(adjacency: str, made: Callable[..., Path]) -> None:
    """Without noise retraining is one number, here and in ``run --retrain``."""
    plan = f"{LANGEVIN} --adjacency {adjacency} --bound shifted --learn-steps 6"
    rows = [
        one_row(made(plan, arguments), retrain=True)
        for arguments in ("--forget 3,17,20 --dtype float64", "--forget 3,17,20 --dtype float64 --retrain")
    ]
    for part in ("test", "retained", "forgotten"):
        values = [row["metrics"]["retrained"][f"{part}_loss"]["mean"] for row in rows]
        assert values[0] == pytest.approx(values[1], abs=1e-9)
    assert rows[0]["distance"]["l2"] == pytest.approx(rows[1]["distance"]["l2"], rel=1e-5)
    assert rows[0]["seconds"]["retrain"] > 0


@pytest.mark.usefixtures("silent")
def test_a_later_request(
    tmp_path: Path, made: Callable[..., Path], two_classes: str, rdp_calc_command: Command
) -> None:
    """What earlier requests removed is in no part, and the reference has the steps of the requests so far."""
    rdp_calc_command(
        f"plan langevin --loss logistic --l2 0.1 --requests 2:3,2:4,2:5 --execute-learn-steps 6 --data {two_classes}"
        f" --epsilon 5 --delta 1e-3 -o {tmp_path}/plan.json -q"
    )
    run = f"run {tmp_path}/plan.json --data {two_classes} --dtype float64 -q"
    rdp_calc_command(f"{run} --phase learn -o {tmp_path}/learned")
    rdp_calc_command(f"{run} --phase unlearn --start {tmp_path}/learned --forget 3,4 -o {tmp_path}/one")
    for name, retrain in (("two", ""), ("same", "--retrain")):
        rdp_calc_command(f"{run} --phase unlearn --start {tmp_path}/one --forget 8,9 {retrain} -o {tmp_path}/{name}")
    found, expected = one_row(tmp_path / "two", retrain=True), one_row(tmp_path / "same")
    assert found["records"] == {"retained": 56, "forgotten": 2, "test": 15}
    for part in ("retained", "forgotten", "test"):
        values = [row["metrics"]["retrained"][f"{part}_loss"]["mean"] for row in (found, expected)]
        assert values[0] == pytest.approx(values[1], abs=1e-10)
    assert one_row(tmp_path / "two", attacks=("lira",), shadows=4)["attacks"][0]["members"] == 2


def test_a_claim_is_about_its_own_reference(made: Callable[..., Path]) -> None:
    """Methods that take any model claim nothing of training anew, nor does any of another folder's models."""
    own = one_row(made(LANGEVIN, "--forget 3,17,20 --trials 10 --retrain"), attacks=("population",))
    assert own["attacks"][0]["certified_advantage"] == own["claim"]["advantage"]
    taken = made(
        f"output-perturbation --model mlp:5 --learn {LEARN} --init-clip 1 --group-size 3",
        "--forget 3,17,20 --trials 10 --retrain",
    )
    assert one_row(taken, attacks=("population",))["attacks"][0]["certified_advantage"] is None
    seeded = made(LANGEVIN, "--forget 3,17,20 --trials 10 --retrain --seed 1 --insecure-reproducible")
    row = one_row(seeded, attacks=("population",))
    assert (row["certificate_level"], row["claim"]) == ("none", None)
    assert row["attacks"][0]["certified_advantage"] is None
    for start, certified in (("normal:5", False), ("zeros", True)):
        run = made(f"{LANGEVIN} --init {start}", "--forget 3,17,20 --trials 10 --retrain --retrain-from zeros")
        (attack,) = one_row(run, attacks=("population",))["attacks"]
        assert (attack["certified_advantage"] is not None) is certified


def test_seeds_are_checked() -> None:
    for seed in (-1, 2**63):
        with pytest.raises(InvalidInput, match="seed must be an integer"):
            Options(seed=seed)


def test_a_reference_is_of_the_same_data(made: Callable[..., Path], two_classes: str, tmp_path: Path) -> None:
    learned = f"--model mlp:3 --learn {LEARN}"
    with np.load(two_classes) as arrays:
        other = {**arrays, "X_train": arrays["X_train"] + 0.01}
    np.savez(tmp_path / "other.npz", **other)
    run = made(f"baseline finetune {learned} --unlearn epochs=1,step-size=0.1")
    reference = made(f"baseline retrain {learned}", f"--data {tmp_path}/other.npz --forget 3,17,20")
    with pytest.raises(DataError, match="other data"):
        one_row(run, retrained=reference)


NORMED = """
import torch

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
"""


@pytest.mark.parametrize("method", ["neggrad --unlearn epochs=9,step-size=0.3", "sisa --shards 2 --seed 1"])
def test_every_state_has_its_own_statistics(
    method: str, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm: chains hold trained numbers alone, and the statistics of one model ruin another."""
    (tmp_path / "normed_network.py").write_text(NORMED)
    monkeypatch.chdir(tmp_path)
    model, forget, code = f"--model normed_network:network --learn {LEARN}", "--forget 0-14", "normed_network:network"
    run = made(f"baseline {method} {model}", forget)
    reference = None if method.startswith("sisa") else made(f"baseline retrain {model}", forget)
    row = one_row(run, model=code, retrained=reference)
    expected = {(run, state): state for state in ("before", "after")}
    if reference is not None:
        expected[reference, "after"] = "retrained"
    for (folder, state), shown in expected.items():
        own = json.loads((folder / "private" / "metrics.json").read_text())[state]
        for theirs, mine in (("train", "retained"), ("test", "test"), ("forget", "forgotten")):
            found = row["metrics"][shown][f"{mine}_loss"]["mean"]
            assert found == pytest.approx(own[f"{theirs}_loss"]["mean"], rel=1e-4)
    many = made(f"baseline {method} {model}", f"{forget} --trials 2 --retrain")
    several = one_row(many, model=code)
    assert several["models"] == {"before": 1, "after": 1}
    seconds = json.loads((many / "private" / "metrics.json").read_text())["seconds"]
    assert several["seconds"]["unlearn"] == pytest.approx(seconds["unlearn"] / 2)
    for options in ({"retrain": True}, {"attacks": ("lira",), "shadows": 4}):
        with pytest.raises(InvalidInput, match="statistics"):
            one_row(run, model=code, **options)


TIED = """
import torch

class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.last = torch.nn.Linear(4, 2)

    def forward(self, rows):
        return self.last(torch.relu(self.two(torch.relu(self.one(rows)))))
"""


def test_models_trained_again_start_from_fresh_numbers(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied parameter has a second name in the model file, which names no part that was frozen."""
    (tmp_path / "tied_network.py").write_text(TIED)
    monkeypatch.chdir(tmp_path)
    model = f"--model tied_network:Tied --learn {LEARN}"
    run, starts, train = made(f"baseline finetune {model} --unlearn epochs=1,step-size=0.1"), [], recipes.train

    def watched(network: Any, *arguments: Any, **options: Any) -> None:
        starts.append(network.weights().numpy())
        train(network, *arguments, **options)

    monkeypatch.setattr(recipes, "train", watched)
    one_row(run, model="tied_network:Tied", retrain=True)
    released = load_file(run / "model.safetensors")["one.weight"].ravel()
    assert abs(starts[0][:16] - released).max() > 0.01


# Folders


def test_nothing_in_the_folder_changes(made: Callable[..., Path]) -> None:
    path = made(LANGEVIN, "--forget 3,17,20 --trials 5 --retrain")
    before = hashes(path)
    one_row(path, attacks=("loss", "lira"), shadows=4)
    assert hashes(path) == before


def damage(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a document and give it the digest it should have."""

    def redo(document: dict[str, Any]) -> None:
        change(document)
        document["digest"] = digest(document)

    damage(path, redo)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def move_chains(path: Path) -> None:
    chains = load_file(path)
    chains["after"], chains["retrained"] = chains["retrained"], chains["after"]
    save_file(chains, path)


def narrow_chains(path: Path) -> None:
    save_file({name: np.ascontiguousarray(value[:, :3]) for name, value in load_file(path).items()}, path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no certificate": lambda p: (p / "certificate.json").unlink(),
    "certificate is no JSON": lambda p: (p / "certificate.json").write_text("{"),
    "claim was changed": lambda p: damage(p / "certificate.json", lambda d: d["claim"].update(epsilon=0.1)),
    "claim was forged": lambda p: forge(p / "certificate.json", lambda d: d["claim"].update(epsilon=0.1)),
    "level was forged": lambda p: forge(p / "certificate.json", lambda d: d["claim"].update(level="none")),
    "model was changed": lambda p: flip(p / "model.safetensors"),
    "no model": lambda p: (p / "model.safetensors").unlink(),
    "no private records": lambda p: (p / "private" / "audit.json").unlink(),
    "other forgotten records": lambda p: damage(p / "private/audit.json", lambda d: d.update(forgotten_ids=[1, 2, 3])),
    "forgotten records are no numbers": lambda p: damage(
        p / "private/audit.json", lambda d: d.update(forgotten_ids=["3"])
    ),
    "forgotten records repeat": lambda p: damage(p / "private/audit.json", lambda d: d.update(forgotten_ids=[3, 3])),
    "no key": lambda p: damage(p / "private/audit.json", lambda d: d.update(key="zz")),
    "chains are no tensors": lambda p: (p / "private/chains.safetensors").write_bytes(b"\x80\x04garbage"),
    "chains of another model": lambda p: narrow_chains(p / "private/chains.safetensors"),
    "chains in another order": lambda p: move_chains(p / "private/chains.safetensors"),
    "before is of another shape": lambda p: save_file({"weight": np.ones(7)}, p / "private/before.safetensors"),
    "data are gone": lambda p: damage(p / "private/audit.json", lambda d: d.update(data_source="missing.npz")),
    "metrics are damaged": lambda p: damage(p / "private/metrics.json", lambda d: d.update(seconds={"learn": "long"})),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(name: str, copied: Callable[..., Path]) -> None:
    path = copied(LANGEVIN, "--forget 3,17,20 --trials 5 --retrain")
    DAMAGE[name](path)
    with pytest.raises(DataError) as caught:
        one_row(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"certificate_level": "certified"},
        {"schema": "rdp-calc/baseline/2"},
        {"training": {"model": "mlp:5", "learn": {"epochs": -1}}},
        {"training": {"model": "rm -rf"}},
        {"model_sha256": "0" * 64},
    ],
)
def test_damaged_baselines(change: dict[str, Any], copied: Callable[..., Path]) -> None:
    path = copied(f"baseline retrain --model mlp:5 --learn {LEARN}")
    damage(path / "baseline.json", lambda document: document.update(change))
    with pytest.raises(DataError, match=r"digest|schema|changed"):
        one_row(path)
    forge(path / "baseline.json", lambda document: document)
    damage(
        path / "private" / "audit.json",
        lambda d: d.update(baseline_digest=json.loads((path / "baseline.json").read_text())["digest"]),
    )
    with pytest.raises(DataError) as caught:
        one_row(path)
    assert "\n" not in str(caught.value)


def test_foreign_folders(
    made: Callable[..., Path], tmp_path: Path, two_classes: str, rdp_calc_command: Command
) -> None:
    with pytest.raises(DataError, match="neither"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="not the folder"):
        read_run(tmp_path / "missing")
    plan = f"{made(LANGEVIN)}.json"
    rdp_calc_command(f"run {plan} --data {two_classes} --phase learn -o {tmp_path}/learned -q")
    with pytest.raises(DataError, match="learn run"):
        read_run(tmp_path / "learned")


def test_other_data(made: Callable[..., Path], save_npz: Callable[..., str], blobs: Callable[..., Any]) -> None:
    x, y = blobs(n=60)
    with pytest.raises(DataError, match="other data"):
        one_row(made(LANGEVIN), data=save_npz(x * 0.5, y))


def test_attacks_need_test_records(tmp_path: Path, rdp_calc_command: Command, blobs: Callable[..., Any]) -> None:
    x, y = blobs(n=60)
    np.savez(tmp_path / "data.npz", X_train=x, y_train=y)
    rdp_calc_command(f"plan {LANGEVIN} --data {tmp_path}/data.npz --epsilon 5 --delta 1e-3 -o {tmp_path}/plan.json -q")
    rdp_calc_command(f"run {tmp_path}/plan.json --data {tmp_path}/data.npz --forget 3 -o {tmp_path}/run -q")
    row = one_row(tmp_path / "run")
    assert row["metrics"]["after"]["test_accuracy"] is None
    with pytest.raises(DataError, match="test records"):
        one_row(tmp_path / "run", attacks=("loss",))


def test_external_model_needs_its_code(
    tmp_path: Path, two_classes: str, rdp_calc_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluated_model.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Linear(4, 2)\n")
    rdp_calc_command(
        f"plan output-perturbation --model external --learn {LEARN} --init-clip 1 --group-size 3 --data {two_classes}"
        " --epsilon 5 --delta 1e-3 -o plan.json -q"
    )
    rdp_calc_command(f"run plan.json --data {two_classes} --model evaluated_model:make --forget 3,17,20 -o run -q")
    with pytest.raises(InvalidInput, match="--model"):
        one_row(Path("run"))
    row = one_row(Path("run"), model="evaluated_model:make", attacks=("lira",), shadows=4, retrain=True)
    assert row["attacks"][0]["trained"] == "one after another"
    assert row["metrics"]["retrained"]["test_loss"]["mean"] > 0
    weights = load_file("run/model.safetensors")
    assert set(weights) == {"weight", "bias"}


TYPED = "--lipschitz 9 --strong-convexity 0.3 --smoothness 40 --hessian-lipschitz 10 --l2 1 --group-size 3"
SOLVED = "--learn epochs=30,step-size=0.05,batch-size=60,weight-decay=1"

SHADOWED = {
    "noisy-sgd": "noisy-sgd --loss logistic --l2 0.1 --batch-size 20 --group-size 3 --unlearn-epochs 2"
    " --execute-learn-steps 3",
    "descent-to-delete": "descent-to-delete --loss logistic --l2 0.1 --execute-learn-steps 9 --unlearn-steps 4"
    " --group-size 3",
    "gradient-norm": "gradient-norm --loss logistic --l2 0.1 --tolerance 1e-8 --group-size 3",
    "newton": "newton --loss logistic --l2 0.1 --tolerance 1e-8 --residual 1e-9 --group-size 3",
    "hessian-free": "hessian-free --loss logistic --l2 0.1 --batch-size 20 --step-size 0.5 --epochs 3 --group-size 3",
    "hessian-free, network": f"hessian-free --batch-size 20 --step-size 0.02 --epochs 3 {TYPED} --model mlp:5",
    "newton, network": f"newton {TYPED} --model mlp:5 --damping 1 --tolerance 0.01 --residual 1e-3 {SOLVED}",
    "noisy-finetune": f"noisy-finetune --model mlp:5 --learn {LEARN} --batch-size 16 --init-clip 1 --grad-clip 1"
    " --step-size 0.1 --unlearn-steps 6 --group-size 3",
    "dp-sgd": "dp-sgd --model mlp:5 --batch-size 20 --steps 5 --clip-norm 1 --step-size 0.2 --adjacency zero-out"
    " --group-size 3",
}


# The calibration of DP-SGD takes seconds.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "dp-sgd" else ()) for name in SHADOWED]
)
def test_every_recipe_trains_shadows(name: str, made: Callable[..., Path]) -> None:
    # Constants that are measured on the way depend on the initial numbers: near a kink of ReLU a run is refused.
    run = made(SHADOWED[name], "--forget 3,17,20 --seed 2 --insecure-reproducible")
    row = one_row(run, attacks=("lira", "lira-offline"), shadows=4, retrain=True)
    assert [part["attack"] for part in row["attacks"]] == ["lira"] * 3 + ["lira-offline"] * 3
    assert row["attacks"][0]["shadows"] == 4
    assert row["distance"]["l2"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"attacks": ("guess",)},
        {"attacks": ("lira",), "shadows": 5},
        {"attacks": ("lira",), "shadows": 2},
        {"variance": "some"},
        {"confidence": 1.0},
        {"confidence": float("nan")},
        {"retrain": True, "retrained": Path("run")},
    ],
)
def test_options_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Options(**options)


def test_no_recipe_no_shadows(made: Callable[..., Path], two_classes: str, rdp_calc_command: Command) -> None:
    start = made(f"baseline retrain --model mlp:5 --learn {LEARN}")
    path = start.parent / "taken"
    rdp_calc_command(
        f"plan output-perturbation --model mlp:5 --init-clip 1 --data {two_classes} --epsilon 5 --delta 1e-3"
        f" -o {path}.json -q"
    )
    rdp_calc_command(f"run {path}.json --data {two_classes} --start {start} --forget 1 -o {path} -q")
    with pytest.raises(RdpCalcError, match="no training from the start"):
        one_row(path, attacks=("lira",), shadows=4)


def test_divergence_and_distance_by_hand() -> None:
    p, q = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.25, 0.75], [1.0, 0.0]])
    with np.errstate(divide="ignore"):
        found = metrics.divergence(np.log(p), np.log(q)), metrics.divergence(np.log(q), np.log(p))
    assert found == pytest.approx(
        (0.5 * (0.5 * np.log(2) + 0.5 * np.log(2 / 3)), 0.5 * (0.25 * np.log(0.5) + 0.75 * np.log(1.5)))
    )
    one = np.array([[3.0, 4.0, 0.0]])
    found_distances = metrics.distances(one, 0 * one, None, {"a": (0, 1), "b": (1, 3)})
    assert found_distances["l2"] == 5
    assert found_distances["relative_to_retrained"] is None
    assert found_distances["layers"]["b"] == {"l2": 4.0, "relative": None}
