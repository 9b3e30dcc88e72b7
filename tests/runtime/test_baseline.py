"""A whole baseline run: what it reads, what it leaves in its folder, what later runs do with that."""

from __future__ import annotations

import json
import stat
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from rdp_calc.documents import digest
from rdp_calc.errors import DataError, InvalidInput, RdpCalcError
from rdp_calc.plan import DataSpec
from rdp_calc.training import Recipe, Training
from unlearn_runtime.algorithms.instance_wise import InstanceWise
from unlearn_runtime.baseline import Baseline
from unlearn_runtime.baseline_methods import METHODS, Settings
from unlearn_runtime.execution import Execution
from unlearn_runtime.network import Network

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CLASSES = ("0", "1", "2")
LEARN = Recipe(epochs=6, step_size=0.5, batch_size=16)
SETTINGS = Settings(
    shards=2,
    slices=2,
    unlearn=Recipe(epochs=1, step_size=0.05, batch_size=16),
    instance_wise=InstanceWise(max_steps=20, adversarial=2, attack_steps=5),
)


@pytest.fixture(scope="module")
def arrays(blobs: Callable[..., tuple[Array, Array]]) -> tuple[Array, Array, Array, Array]:
    x, y = blobs(n=75, classes=3)
    return x[:60], y[:60], x[60:], y[60:]


@pytest.fixture
def data(arrays: Any, save_npz: Callable[..., str]) -> str:
    return save_npz(*arrays)


@pytest.fixture
def baseline(data: str, tmp_path: Path) -> Callable[..., Baseline]:
    """A baseline of mlp:6 that forgets records 2, 7 and 11; keywords change it."""

    def make(method: str, output: str = "out", **changes: Any) -> Baseline:
        given: dict[str, Any] = {
            "data": data,
            "output": tmp_path / output,
            "spec": DataSpec(features=4, classes=CLASSES),
            "training": Training(model="mlp:6", learn=LEARN),
            "settings": SETTINGS if method == "sisa" else replace(SETTINGS, shards=1, slices=1),
            "forget": "2,7,11",
            "execution": Execution(seed=1),
        }
        return Baseline(method=method, **{**given, **changes})

    return make


def document_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "baseline.json").read_text())
    return found


def private(folder: Path, name: str) -> Any:
    return json.loads((folder / "private" / name).read_text())


def weights(folder: Path) -> dict[str, Array]:
    return {name: value.numpy() for name, value in load_file(folder / "model.safetensors").items()}


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def learn_only(baseline: Callable[..., Baseline], output: str = "start") -> Path:
    """The folder of a model that forgot record 5, to start from."""
    made = baseline("finetune", output, forget="5")
    made.run()
    return made.output


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_folder_that_claims_nothing(method: str, baseline: Callable[..., Baseline]) -> None:
    made = baseline(method)
    summary = made.run()
    folder = made.output
    document, metrics = document_of(folder), private(folder, "metrics.json")
    assert document["digest"] == digest(document) == summary["digest"]
    assert document["schema"] == "rdp-calc/baseline/1"
    assert document["certificate_level"] == summary["certificate_level"] == "none"
    exact = method in ("retrain", "sisa")
    assert document["kind"] == ("exact" if exact else "empirical")
    assert ("exact by construction, not proved by a certificate" in document["statement"]) is exact
    assert ("Nothing is proved" in document["statement"]) is not exact
    assert document["stop"]["steps"] > 0
    assert set(metrics["before"]) == {f"{p}_{q}" for p in ("train", "test", "forget") for q in ("accuracy", "loss")}
    assert metrics["after"]["train_accuracy"].keys() == {"mean", "std", "chains"}
    assert metrics["before"] != metrics["after"]
    audit = private(folder, "audit.json")
    assert (audit["forgotten_ids"], audit["removed_before"]) == ([2, 7, 11], [])
    # Which records are forgotten is nobody's business.
    assert "[2, 7, 11]" not in (folder / "baseline.json").read_text().replace("\n", "").replace("  ", " ")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert modes.pop("model.safetensors") == 0o644
    assert modes.pop("baseline.json") == 0o644
    assert modes.pop("private") == 0o700
    assert set(modes.values()) == {0o600}
    assert all(np.isfinite(value).all() for value in weights(folder).values())


@pytest.mark.parametrize("method", ["retrain", "sisa", "finetune"])
def test_methods_that_say_so_use_nothing_of_the_forgotten_records(
    method: str, baseline: Callable[..., Baseline], arrays: Any, save_npz: Callable[..., str], tmp_path: Path
) -> None:
    """Two data sets that differ in the forgotten records only give the same model, bit for bit."""
    x, y, x_test, y_test = (part.copy() for part in arrays)
    x[[2, 7, 11]] = -x[[2, 7, 11]]
    y[[2, 7, 11]] = (y[[2, 7, 11]] + 1) % 3
    other = save_npz(x, y, x_test, y_test, name="other")
    changes: dict[str, Any] = {}
    if method == "finetune":
        started = baseline("retrain", "model")
        started.run()
        changes["start"] = tmp_path / "model" / "model.safetensors"
    baseline(method, "one", **changes).run()
    baseline(method, "two", data=other, **changes).run()
    assert same(tmp_path / "one", tmp_path / "two")
    before = [load_file(tmp_path / name / "private" / "before.safetensors") for name in ("one", "two")]
    moved = any(not torch.equal(value, before[1][name]) for name, value in before[0].items())
    assert moved is (method != "finetune")


@pytest.mark.parametrize("same_order", [True, False])
def test_same_order_begins_and_goes_on_as_the_first_training(
    same_order: bool, baseline: Callable[..., Baseline], monkeypatch: pytest.MonkeyPatch, arrays: Any
) -> None:
    batches: list[Array] = []
    starts: list[Array] = []
    real = Network.gradient

    def spy(self: Network, rows: torch.Tensor, labels: torch.Tensor) -> Any:
        batches.append(rows.numpy().copy())
        starts.append(self.flat.numpy().copy())
        return real(self, rows, labels)

    monkeypatch.setattr(Network, "gradient", spy)
    baseline("retrain", settings=Settings(same_order=same_order)).run()
    # 6 epochs of 4 batches of 60 records, and of 57 or 60 with holes.
    first, second = batches[:24], batches[24:]
    forgotten = arrays[0][[2, 7, 11]].astype(np.float32)

    def without(rows: Array) -> Array:
        return rows[~np.array([np.isclose(forgotten, row, atol=1e-6).all(axis=1).any() for row in rows])]

    alike = len(first) == len(second) and all(np.array_equal(without(a), b) for a, b in zip(first, second, strict=True))
    assert alike is same_order
    assert np.array_equal(starts[0], starts[24]) is same_order


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sisa"])
def test_what_a_start_forgot_is_never_looked_at(
    method: str, baseline: Callable[..., Baseline], monkeypatch: pytest.MonkeyPatch, arrays: Any
) -> None:
    start = learn_only(baseline)
    seen: list[Array] = []
    real = Network.outputs

    def spy(self: Network, rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.detach().numpy())
        return real(self, rows)

    monkeypatch.setattr(Network, "outputs", spy)
    summary = baseline(method, start=start, training=Training(), spec=DataSpec()).run()
    rows = np.concatenate(seen)
    assert not (np.abs(rows - arrays[0][5]).max(axis=1) < 1e-6).any()
    assert (np.abs(rows - arrays[0][6]).max(axis=1) < 1e-6).any()
    assert summary["forgotten_before"] == 1
    assert private(Path(summary["output"]), "audit.json")["removed_before"] == [5]


def test_a_start_gives_the_model_its_preparation_and_its_training(
    baseline: Callable[..., Baseline], tmp_path: Path
) -> None:
    start = learn_only(baseline)
    made = baseline("retrain", start=start, training=Training(), spec=DataSpec(preprocess="none"))
    made.run()
    document = document_of(made.output)
    assert document["data"]["preprocess"] == "unit-norm"
    assert document["training"]["model"] == "mlp:6"
    assert document["training"]["learn"]["epochs"] == 6
    before = load_file(made.output / "private" / "before.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in load_file(start / "model.safetensors").items())
    with pytest.raises(InvalidInput, match=r"--model mlp:7 is not what .* was made with \(mlp:6\)"):
        baseline("finetune", "x", start=start, training=Training(model="mlp:7")).run()
    with pytest.raises(DataError, match="forget id 5 was removed by an earlier request"):
        baseline("finetune", "x", start=start, forget="4,5").run()


def test_a_certified_run_starts_a_baseline_and_a_baseline_a_certified_run(
    plan_file: Callable[[str], Path], two_classes: str, rdp_calc_command: Callable[..., str], tmp_path: Path
) -> None:
    plan = plan_file(
        "noisy-finetune --model mlp:5 --learn epochs=2,step-size=0.5 --init-clip 1 --grad-clip 1 --step-size 0.1"
        " --unlearn-steps 2"
    )
    rdp_calc_command(f"run {plan} --data {two_classes} --forget 3 -o {tmp_path}/run -q")
    rdp_calc_command(
        f"baseline finetune --data {two_classes} --start {tmp_path}/run --forget 4 --unlearn epochs=1,step-size=0.1"
        f" -o {tmp_path}/tuned -q"
    )
    assert private(tmp_path / "tuned", "audit.json")["removed_before"] == [3]
    rdp_calc_command(
        f"run {plan} --phase unlearn --data {two_classes} --start {tmp_path}/tuned --forget 9 -o {tmp_path}/again -q"
    )
    assert private(tmp_path / "again", "audit.json")["removed_before"] == [3, 4]


def test_a_linear_certified_run_starts_a_baseline(
    plan_file: Callable[[str], Path], two_classes: str, rdp_calc_command: Callable[..., str], tmp_path: Path
) -> None:
    plan = plan_file("langevin --loss logistic --l2 0.1 --unlearn-steps 3 --execute-learn-steps 5")
    rdp_calc_command(f"run {plan} --data {two_classes} --forget 3 -o {tmp_path}/run -q")
    out = rdp_calc_command(
        f"baseline neggrad --data {two_classes} --start {tmp_path}/run --forget 4 --unlearn epochs=3,step-size=0.5"
        f" -o {tmp_path}/out --json"
    )
    metrics = json.loads(out)["metrics"]
    assert metrics["after"]["forget_loss"]["mean"] > metrics["before"]["forget_loss"]["mean"]
    assert weights(tmp_path / "out")["weight"].shape == (4,)


# -- sisa


def test_sisa_goes_on_request_after_request(baseline: Callable[..., Baseline], tmp_path: Path) -> None:
    learned = baseline("sisa", "learned", forget=None)
    summary = learned.run()
    assert summary["metrics"]["after"] is None
    assert summary["stop"] == {}
    assert "Nothing was forgotten yet" in summary["statement"]
    assert stat.S_IMODE((learned.output / "model.safetensors").stat().st_mode) == 0o600
    going: dict[str, Any] = {"training": Training(), "spec": DataSpec(), "settings": Settings()}
    baseline("sisa", "first", start=learned.output, forget="2", **going).run()
    baseline("sisa", "second", start=tmp_path / "first", forget="7,11", **going).run()
    baseline("sisa", "at-once", start=learned.output, **going).run()
    assert same(tmp_path / "second", tmp_path / "at-once")
    assert not same(tmp_path / "first", tmp_path / "second")
    assert private(tmp_path / "second", "audit.json")["removed_before"] == [2]
    stop = document_of(tmp_path / "second")["stop"]
    assert 0 < stop["record_epochs"] < stop["record_epochs_from_scratch"]
    # 6 epochs in two slices of 2 x 6/3 epochs, over half and then all of 57 records.
    assert stop["record_epochs_from_scratch"] == pytest.approx(4 * 57 * 1.5, rel=0.1)
    with pytest.raises(DataError, match="forget id 2 was removed by an earlier request"):
        baseline("sisa", "third", start=tmp_path / "second", forget="2", **going).run()
    with pytest.raises(InvalidInput, match="holds the models of sisa, from which only sisa goes on"):
        baseline("finetune", "third", start=learned.output, **{**going, "settings": SETTINGS}).run()
    with pytest.raises(InvalidInput, match="shards, slices and training are those of --start"):
        baseline("sisa", "third", start=learned.output, training=Training()).run()


def test_a_changed_sisa_state_is_found(
    baseline: Callable[..., Baseline], tmp_path: Path, arrays: Any, save_npz: Callable[..., str]
) -> None:
    learned = baseline("sisa", "learned", forget=None)
    learned.run()
    going: dict[str, Any] = {"training": Training(), "start": learned.output, "settings": Settings()}
    x, *rest = arrays
    with pytest.raises(DataError, match="was learned on other data"):
        baseline("sisa", data=save_npz(-x, *rest, name="other"), **going).run()
    path = learned.output / "private" / "state.safetensors"
    tensors = load_file(path)
    tensors["places"] = tensors["places"].flip(0).contiguous()
    save_file(tensors, path)
    with pytest.raises(DataError, match="it was changed or damaged"):
        baseline("sisa", **going).run()


# -- instance-wise


def test_requests_are_carried_out_one_after_another(baseline: Callable[..., Baseline], tmp_path: Path) -> None:
    settings = Settings(instance_wise=InstanceWise(adversarial=0, importance=0.0, step_size=0.2, max_steps=300))
    changes: dict[str, Any] = {"settings": settings, "new_labels": "random"}
    both = baseline("relabel", "both", forget=None, requests="3,4;7,9", **changes)
    summary = both.run()
    assert [request["reason"] for request in summary["stop"]["requests"]] == ["relabelled", "relabelled"]
    assert summary["stop"]["steps"] == sum(request["steps"] for request in summary["stop"]["requests"])
    first, second = summary["metrics"]["requests"]
    assert (first["reached"], second["reached"]) == (1, 1)
    assert first["forget_accuracy"] == first["request_accuracy"]
    assert private(both.output, "audit.json")["requests"] == [[3, 4], [7, 9]]
    assert private(both.output, "audit.json")["forgotten_ids"] == [3, 4, 7, 9]
    with pytest.raises(DataError, match="forget id 4 is in two requests"):
        baseline("relabel", "x", forget=None, requests="3,4;4", **changes).run()


def test_the_second_request_uses_none_of_the_first(
    baseline: Callable[..., Baseline], monkeypatch: pytest.MonkeyPatch, arrays: Any
) -> None:
    seen: list[list[Array]] = []
    real = Network.gradient

    def spy(self: Network, rows: torch.Tensor, labels: torch.Tensor) -> Any:
        seen[-1].append(rows.numpy().copy())
        return real(self, rows, labels)

    monkeypatch.setattr(Network, "gradient", spy)
    original = Network.__init__

    def begin(self: Network, *arguments: Any, **more: Any) -> None:
        seen.append([])
        original(self, *arguments, **more)

    monkeypatch.setattr(Network, "__init__", begin)
    settings = Settings(instance_wise=InstanceWise(adversarial=0, max_steps=3, step_size=1e-4))
    baseline("misclassify", forget=None, requests="0;3", settings=settings).run()
    loops = [np.concatenate(rows) for rows in seen if rows]
    # Learning, then one network a request.
    found = [[bool((np.abs(rows - arrays[0][i]).max(axis=1) < 1e-6).any()) for i in (0, 3, 2)] for rows in loops]
    assert found == [[True, True, True], [True, False, False], [False, True, False]]


def test_wished_labels_are_given(baseline: Callable[..., Baseline], arrays: Any) -> None:
    settings = Settings(instance_wise=InstanceWise(adversarial=0, importance=0.0, step_size=0.2))
    wished = [(int(arrays[1][i]) + 1 + i % 2) % 3 for i in (2, 7, 11)]
    made = baseline("relabel", settings=settings, new_labels=",".join(map(str, wished)))
    assert made.run()["stop"]["reason"] == "relabelled"
    tensors = weights(made.output)
    hidden = np.maximum(arrays[0][[2, 7, 11]] @ tensors["0.weight"].T + tensors["0.bias"], 0)
    outputs = hidden @ tensors["2.weight"].T + tensors["2.bias"]
    assert outputs.argmax(axis=1).tolist() == wished


# -- comparison, chains, models of others


def test_chains_and_reference_are_kept_for_evaluation(baseline: Callable[..., Baseline]) -> None:
    made = baseline("neggrad", execution=Execution(seed=1, chains=3, retrain="fresh"))
    summary = made.run()
    chains = load_file(made.output / "private" / "chains.safetensors")
    assert {name: tuple(rows.shape) for name, rows in chains.items()} == dict.fromkeys(
        ("before", "after", "retrained"), (3, 51)
    )
    assert all(rows.dtype == torch.float64 for rows in chains.values())
    flat = np.concatenate([value.reshape(-1) for value in weights(made.output).values()])
    assert np.array_equal(np.sort(flat.astype(np.float64)), np.sort(chains["after"][0].numpy()))
    assert summary["metrics"]["retrained"]["train_accuracy"]["chains"] == 3
    assert len({tuple(row.tolist()) for rows in chains.values() for row in rows}) == 9


def test_an_ensemble_is_compared_with_another_one(baseline: Callable[..., Baseline]) -> None:
    made = baseline("sisa", execution=Execution(seed=1, retrain="fresh"))
    made.run()
    chains = load_file(made.output / "private" / "chains.safetensors")
    assert chains["retrained"].shape == (1, 2 * 51)
    assert not torch.equal(chains["retrained"], chains["after"])
    assert sorted(weights(made.output))[0] == "shard0.0.bias"


FACTORY = """
import torch

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(5, 3)
    )

def wrong():
    return torch.nn.Linear(4, 2)
"""


@pytest.mark.parametrize("method", METHODS)
def test_models_of_others(
    method: str, baseline: Callable[..., Baseline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factory_of_baselines.py").write_text(FACTORY)
    made = baseline(method, training=Training(learn=LEARN), model="factory_of_baselines:network")
    made.run()
    document = document_of(made.output)
    assert document["training"]["model"] == "external"
    fixed = "taken as they came (1.running_mean, 1.running_var, 1.num_batches_tracked)"
    assert (fixed in document["statement"]) is (document["kind"] == "exact")


def test_exact_methods_take_no_statistics_of_the_forgotten_records(
    baseline: Callable[..., Baseline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: Any, save_npz: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factory_with_norm.py").write_text(FACTORY)
    x, *rest = (part.copy() for part in arrays)
    x[2] = -x[2]
    other = save_npz(x, *rest, name="other")
    changes: dict[str, Any] = {"training": Training(learn=LEARN), "model": "factory_with_norm:network", "forget": "2"}
    for method in ("retrain", "sisa"):
        baseline(method, f"{method}-one", **changes).run()
        baseline(method, f"{method}-two", data=other, **changes).run()
        assert same(tmp_path / f"{method}-one", tmp_path / f"{method}-two")


def test_a_script_file_is_trained_and_its_numbers_may_be_the_start(
    baseline: Callable[..., Baseline], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # torch from 2.10 on advises against it.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        script = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)))
        torch.jit.save(script, str(tmp_path / "model.pt"))
    made = baseline("neggrad", training=Training(), model=str(tmp_path / "model.pt"), start=tmp_path / "model.pt")
    metrics = made.run()["metrics"]
    assert metrics["after"]["forget_loss"]["mean"] > metrics["before"]["forget_loss"]["mean"]


def test_only_a_part_is_trained(baseline: Callable[..., Baseline], tmp_path: Path) -> None:
    learned = baseline("retrain", "learned")
    learned.run()
    start = tmp_path / "learned" / "model.safetensors"
    made = baseline("retrain", start=start, training=Training(model="mlp:6", trainable=("2.*",), learn=LEARN))
    made.run()
    before, after = weights(tmp_path / "learned"), weights(made.output)
    assert np.array_equal(before["0.weight"], after["0.weight"])
    assert not np.array_equal(before["2.weight"], after["2.weight"])
    assert "(0.weight, 0.bias)" in document_of(made.output)["statement"]


# -- bad input


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("newton", {}, "method must be one of retrain, sisa"),
        ("retrain", {"forget": None}, "retrain needs --forget"),
        ("finetune", {"settings": Settings()}, "finetune needs --unlearn"),
        ("retrain", {"requests": "1;2", "forget": None}, "retrain takes one request: --forget, not --requests"),
        ("misclassify", {"requests": "1;2"}, "--forget and --requests exclude each other"),
        ("neggrad", {"new_labels": "1"}, "neggrad takes no --new-labels"),
        ("relabel", {"new_labels": "7"}, "--new-labels must be of 0, 1, 2, got '7'"),
        ("relabel", {"new_labels": "2"}, "record 2 has label 2 already"),
        ("relabel", {"new_labels": "0,1"}, "--new-labels has 2 labels for 3 records"),
        ("relabel", {"new_labels": "0;1"}, "--new-labels has 2 lists for 1 requests"),
        ("retrain", {"training": Training(model="mlp:6")}, "there is no --start: say how to train, as --learn"),
        ("finetune", {"training": Training(learn=LEARN)}, "name the model: --model"),
        ("finetune", {"training": Training(model="logistic", learn=LEARN)}, "logistic takes two classes, got 3"),
        ("retrain", {"forget": "60"}, "forget id 60 is out of range"),
        ("retrain", {"forget": "0-59"}, "no record is retained"),
        ("retrain", {"settings": Settings(keep_divisor=True)}, "--keep-divisor goes with --same-order"),
        ("sisa", {"settings": Settings(shards=9, slices=9)}, "need 81 records, there are 60"),
        ("sisa", {"settings": Settings(shards=0)}, "shards must be an integer in 1"),
        ("sisa", {"forget": None, "execution": Execution(retrain="fresh")}, "without --forget there is none"),
        ("retrain", {"training": Training(model="mlp:6", trainable=("2.*",), learn=LEARN)}, "give --start"),
        ("neggrad", {"training": Training(model="mlp:6", learn=replace(LEARN, step_size=1e30))}, "smaller step size"),
        ("finetune", {"start": Path("nowhere.safetensors")}, "nowhere.safetensors does not exist"),
        ("sisa", {"start": Path("nowhere.safetensors")}, "sisa goes on from the folder of a sisa run"),
        ("retrain", {"data": "nowhere.npz"}, "nowhere.npz: no such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    method: str, changes: dict[str, Any], said: str, baseline: Callable[..., Baseline], tmp_path: Path
) -> None:
    with pytest.raises(RdpCalcError) as caught:
        baseline(method, **changes).run()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"data"}


def test_a_model_with_other_outputs_is_refused(
    baseline: Callable[..., Baseline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factory_two_outputs.py").write_text(FACTORY)
    made = baseline("finetune", training=Training(learn=LEARN), model="factory_two_outputs:wrong")
    with pytest.raises(InvalidInput, match="the model has 2 outputs, the data have 3 classes"):
        made.run()


def test_a_changed_document_is_no_start(baseline: Callable[..., Baseline]) -> None:
    start = learn_only(baseline)
    document = document_of(start)
    document["method"] = "retrain"
    (start / "baseline.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="was changed after it was written"):
        baseline("finetune", start=start, training=Training()).run()
