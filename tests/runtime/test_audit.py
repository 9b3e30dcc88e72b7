"""Audits: a claim attained with equality stands, and a runtime that does less than it claims is refuted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy import stats

from rdp_calc import (
    DataSpec,
    DescentToDelete,
    Langevin,
    NoisySgd,
    OutputPerturbation,
    Plan,
    Target,
    noise,
    plan_from_result,
)
from rdp_calc.documents import digest
from rdp_calc.errors import DataError, InvalidInput, VerificationFailed
from unlearn_runtime import glm_job
from unlearn_runtime.algorithms.noisy_step import NoisyStep
from unlearn_runtime.evaluate.audit import audit, refutation
from unlearn_runtime.evaluate.populations import Populations, Settings, of_folder, of_plan
from unlearn_runtime.evaluate.separation import separate
from unlearn_runtime.execution import Execution
from unlearn_runtime.glm_job import GlmJob
from unlearn_runtime.run import run_plan

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]

N, L2, ETA, LEARN, UNLEARN = 40, 0.2, 0.5, 20, 7
CHAINS = 6000
DELTA = 0.1


def glm_plan(plan_for: Callable[..., Plan], kind: Any, **options: Any) -> Plan:
    return plan_for(
        kind,
        learned=LEARN,
        learn_steps=LEARN,
        unlearn_steps=UNLEARN,
        step_size=ETA,
        l2=L2,
        dataset_size=N,
        epsilon=1.5,
        delta=DELTA,
        data=DataSpec(features=1, preprocess="none"),
        **options,
    )


@pytest.fixture
def worst(save_npz: Callable[..., str]) -> str:
    """Huber regression with every residual beyond the threshold 1: gradients never change. The forgotten record 0 pulls
    as hard as it may against the others, which pull together.
    """
    y = np.full(N, 50.0)
    y[0] = -50.0
    return save_npz(np.ones((N, 1)), y, name="worst")


def audited(plan: Plan, data: str, *, trials: int = CHAINS, seed: int = 1, **settings: Any) -> dict[str, Any]:
    found = of_plan(plan.to_json(), data=data, forget="0", settings=Settings(trials=trials, seed=seed, **settings))
    return audit(found)


def halved(original: Any) -> Any:
    """The same with noise_std cut in half."""

    def wrong(*args: Any, **given: Any) -> Any:
        given["noise_std"] *= 0.5
        return original(*args, **given)

    return wrong


def check_attained(document: dict[str, Any], mu: float) -> None:
    bounds = document["lower_bounds"]
    assert document["claim"]["mu"] == pytest.approx(mu, rel=1e-9)
    assert 0.8 * mu <= bounds["mu"] <= mu
    assert 0.6 * document["claim"]["epsilon"] <= bounds["epsilon"] <= document["claim"]["epsilon"]
    assert (document["verdict"], refutation(document)) == ("not refuted", None)


def check_refuted(document: dict[str, Any]) -> None:
    assert document["verdict"] == "refuted"
    assert document["lower_bounds"]["mu"] > document["claim"]["mu"]
    text = refutation(document)
    assert text is not None
    assert "REFUTED" in text


def test_noisy_descent_attains_its_claim_and_a_wrong_runtime_is_refuted(
    plan_for: Callable[..., Plan], worst: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = glm_plan(plan_for, Langevin)
    # The two linear chains of this data set, in closed form: distance of the means over the deviation of both.
    c, shift = 1 - ETA * L2, ETA * 2 / N
    mean = shift * c**UNLEARN * (1 - c**LEARN) / (1 - c)
    deviation = plan.noise_std * math.sqrt((1 - c ** (2 * (LEARN + UNLEARN))) / (1 - c**2))
    check_attained(audited(plan, worst), mean / deviation)

    with monkeypatch.context() as patch:
        patch.setattr(glm_job, "Update", halved(glm_job.Update))
        check_refuted(audited(plan, worst))

    def skipped(self: GlmJob, start: Any, *, name: str = "unlearn") -> Any:
        return {key: tensor.clone() for key, tensor in start.items()}

    monkeypatch.setattr(GlmJob, "unlearn", skipped)
    check_refuted(audited(plan, worst))


def test_descent_to_delete_attains_its_claim_and_a_wrong_runtime_is_refuted(
    plan_for: Callable[..., Plan], worst: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = glm_plan(plan_for, DescentToDelete)
    c = 1 - ETA * L2
    check_attained(audited(plan, worst), ETA * 2 / N * c**UNLEARN * (1 - c**LEARN) / (1 - c) / plan.noise_std)

    with monkeypatch.context() as patch:
        patch.setattr(glm_job, "published", halved(glm_job.published))
        check_refuted(audited(plan, worst))

    def skipped(self: GlmJob, start: Any, *, name: str = "unlearn") -> Any:
        return self._release({"weights": start["weights"].clone()})

    monkeypatch.setattr(GlmJob, "unlearn", skipped)
    check_refuted(audited(plan, worst))


def network_plan(learn: Any = None) -> Plan:
    from rdp_calc.training import Recipe, Training

    method, target = OutputPerturbation(init_clip=0.5, group_size=30), Target(epsilon=6.0, delta=DELTA)
    training = Training(model="mlp:1", learn=None if learn is None else Recipe(**learn))
    data = DataSpec(features=1, classes=("0", "1"), preprocess="none")
    return plan_from_result(method, noise(method, target), target, data=data, training=training)


def test_output_perturbation_attains_its_claim_and_a_wrong_runtime_is_refuted(
    tmp_path: Path, save_npz: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model outside the ball, and its opposite, end on opposite sides of the ball."""
    plan, data = network_plan(), save_npz(np.ones((4, 1)), np.array([0, 1, 0, 1]))
    model = {"0.weight": (1, 1), "0.bias": (1,), "2.weight": (2, 1), "2.bias": (2,)}
    path = tmp_path / "model.safetensors"
    save_file({name: np.full(shape, 3.0, dtype=np.float32) for name, shape in model.items()}, path)
    found = audited(plan, data, trials=800, start=path)
    assert "opposite" in found["populations"]["reference"]
    assert found["claim"]["mu"] == pytest.approx(1.0 / plan.noise_std, rel=1e-9)
    assert 0.8 * found["claim"]["mu"] <= found["lower_bounds"]["mu"] <= found["claim"]["mu"]
    assert found["verdict"] == "not refuted"

    # The folder of a run brings the model it started from; its references are run now.
    execution = Execution(chains=100, device="cpu", seed=2)
    run_plan(plan.to_json(), data=data, output=tmp_path / "run", forget="0", start=path, execution=execution)
    found = of(tmp_path / "run", seed=3)
    assert "opposite" in found["populations"]["reference"]
    assert found["verdict"] == "not refuted"
    assert found["gaussian_fit"]["lower"] < found["claim"]["mu"] < found["gaussian_fit"]["upper"]

    original = NoisyStep.add_noise
    monkeypatch.setattr(NoisyStep, "add_noise", lambda self, std: original(self, 0.5 * std))
    check_refuted(audited(plan, data, trials=150, start=path))


def test_a_network_with_a_recipe_is_compared_with_one_trained_without_the_records(
    save_npz: Callable[..., str],
) -> None:
    """The forgotten records turn every prediction around, so that trained biases and clipped models are far apart."""
    y = np.array([1] * 30 + [0] * 20)
    data = save_npz(np.full((50, 1), 0.01), y)
    plan = network_plan({"epochs": 100, "step_size": 0.5, "batch_size": 64, "weight_decay": 0.1})
    settings = Settings(trials=300, seed=3)
    found = of_plan(plan.to_json(), data=data, forget="0-29", settings=settings)
    assert found.reference == "the same procedure from a model trained on the retained records alone"
    (name, direction), means = found.directions[0], [m.mean(axis=0) for m in (found.unlearned, found.retrained)]
    assert name == "difference of the start models"
    assert np.dot(direction, means[0] - means[1]) > 0
    document = audit(found)
    assert 0.4 < document["lower_bounds"]["mu"] <= document["claim"]["mu"]
    assert document["populations"]["numbers"] == 6


# Run folders


@pytest.fixture
def folder(tmp_path: Path, plan_for: Callable[..., Plan], worst: str) -> Path:
    output = tmp_path / "run"
    execution = Execution(chains=2000, retrain="fresh", dtype="float64", device="cpu", seed=2)
    run_plan(glm_plan(plan_for, Langevin).to_json(), data=worst, output=output, forget="0", execution=execution)
    return output


def chains(folder: Path) -> dict[str, Array]:
    return load_file(folder / "private" / "chains.safetensors")


def forge(folder: Path, **changed: Array | None) -> None:
    tensors = {**chains(folder), **changed}
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items() if t is not None},
        folder / "private" / "chains.safetensors",
    )


def of(folder: Path, **settings: Any) -> dict[str, Any]:
    return audit(of_folder(folder, data=None, forget=None, settings=Settings(**settings)))


def test_the_models_of_a_run_are_audited_as_they_are(folder: Path) -> None:
    found = of(folder)
    assert found["populations"]["unlearned"] == found["populations"]["retrained"] == 2000
    assert found["verdict"] == "not refuted"
    assert found["lower_bounds"]["mu"] > 0.5 * found["claim"]["mu"]


def test_forged_models_are_refuted(folder: Path) -> None:
    kept = chains(folder)
    # Models that were learned and never unlearned, behind the one that was released.
    forge(folder, after=np.concatenate([kept["after"][:1], kept["before"][1:]]))
    check_refuted(of(folder))
    # Too little noise in one population alone: means agree, spreads do not.
    centre = kept["retrained"].mean(axis=0)
    forge(folder, after=kept["after"], retrained=centre + 0.2 * (kept["retrained"] - centre))
    check_refuted(of(folder))


def test_models_that_repeat_are_refused(folder: Path) -> None:
    kept = chains(folder)
    for changed in (
        {"after": np.concatenate([kept["after"][:100]] * 20)},
        {"retrained": np.concatenate([kept["retrained"][:100]] * 20)},
        {"retrained": kept["after"]},
    ):
        forge(folder, **{**kept, **changed})
        with pytest.raises(VerificationFailed, match="independent noisy runs"):
            of(folder)


def test_models_that_are_not_of_the_release_are_refused(folder: Path) -> None:
    kept = chains(folder)
    forge(folder, after=kept["after"][::-1])
    with pytest.raises(VerificationFailed, match="not the released one"):
        of(folder)
    forge(folder, **kept)
    model = load_file(folder / "model.safetensors")
    save_file({"weight": model["weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(VerificationFailed, match="is not the model that"):
        of(folder)


def test_missing_references_are_run_on_the_data_of_the_run(folder: Path, worst: str) -> None:
    forge(folder, retrained=None)
    assert of(folder, seed=4)["verdict"] == "not refuted"
    # The same file name, other data.
    np.savez(worst, X_train=np.ones((N, 1)), y_train=np.full(N, 50.0))
    with pytest.raises(DataError, match="not the data"):
        of(folder, seed=4)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    document["digest"] = digest(document)
    path.write_text(json.dumps(document))


def test_a_claim_must_follow_from_its_plan(folder: Path) -> None:
    """A forged claim with the digest that goes with it would make any audit pass."""
    rewrite(folder / "certificate.json", lambda d: d["claim"].update(epsilon=50.0, mu=40.0))
    with pytest.raises(DataError, match="does not verify"):
        of(folder)


def test_private_records_of_another_release_are_refused(folder: Path) -> None:
    rewrite(folder / "private" / "audit.json", lambda d: d.update(certificate_digest="0" * 64))
    with pytest.raises(DataError, match="another certificate"):
        of(folder)


def test_what_kept_models_cannot_follow_is_refused(folder: Path, worst: str) -> None:
    for data, forget, option in (("elsewhere.npz", None, "--data"), (None, "3", "--forget")):
        with pytest.raises(InvalidInput, match=f"{option} has no say"):
            of_folder(folder, data=data, forget=forget, settings=Settings())
    forge(folder, retrained=None)
    with pytest.raises(InvalidInput, match="--forget has no say"):
        of_folder(folder, data=worst, forget="3", settings=Settings())
    assert len(of_folder(folder, data=worst, forget=None, settings=Settings(seed=1)).retrained) == 2000


def test_slots_drawn_for_a_run_belong_to_its_reference(
    tmp_path: Path, plan_for: Callable[..., Plan], worst: str
) -> None:
    plan = plan_for(
        NoisySgd,
        learned=3,
        learn_epochs=3,
        unlearn_epochs=2,
        batch_size=20,
        epsilon=5.0,
        step_size=ETA,
        data=DataSpec(features=1, preprocess="none"),
    )
    execution = Execution(chains=50, retrain="fresh", device="cpu", seed=2)
    run_plan(plan.to_json(), data=worst, output=tmp_path / "run", forget="0", execution=execution)
    assert of(tmp_path / "run")["verdict"] == "not refuted"
    forge(tmp_path / "run", retrained=None)
    with pytest.raises(InvalidInput, match="run again with --trials R --retrain"):
        of(tmp_path / "run")


def test_asked_for_trials_a_run_is_repeated(folder: Path) -> None:
    found = of(folder, trials=300, seed=5)
    assert found["populations"]["source"] == "300 runs of the plan"
    (folder / "private" / "chains.safetensors").unlink()
    assert of(folder, trials=None, seed=5)["populations"]["unlearned"] == 4000


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    kept = chains(folder)
    for changed, text in (
        ({"after": kept["after"].astype(np.float32)}, "after must be float64"),
        ({"retrained": np.ones((3, 2))}, "retrained must be"),
        ({"after": np.full_like(kept["after"], np.nan)}, "not finite"),
        ({"after": None}, "no tensor after"),
    ):
        forge(folder, **{**kept, **changed})
        with pytest.raises(DataError, match=text):
            of(folder)
        forge(folder, **kept)
    with pytest.raises(DataError, match=r"no certificate\.json"):
        of(tmp_path)
    path = folder / "certificate.json"
    path.write_text(path.read_text().replace('"epsilon": 1.5', '"epsilon": 2.5'))
    with pytest.raises(DataError, match="digest is wrong"):
        of(folder)


def test_a_learn_run_of_one_chain_is_no_start(tmp_path: Path, plan_for: Callable[..., Plan], worst: str) -> None:
    plan, learned = glm_plan(plan_for, Langevin), tmp_path / "learned"
    run_plan(plan.to_json(), data=worst, output=learned, phase="learn", execution=Execution(chains=1))
    with pytest.raises(InvalidInput, match="learned with 1 chain"):
        audited(plan, worst, trials=None, start=learned)  # type: ignore[arg-type]
    many = tmp_path / "many"
    run_plan(plan.to_json(), data=worst, output=many, phase="learn", execution=Execution(chains=500))
    found = audited(plan, worst, trials=None, start=many)  # type: ignore[arg-type]
    assert found["populations"]["unlearned"] == 500


# Statistics of whole audits


def populations(unlearned: Array, retrained: Array, *, mu: float | None = 1.0, noise_std: float = 1.0) -> Populations:
    document = {"method": "m", "bound": "b", "adjacency": "any", "digest": "d", "parameters": {"noise_std": noise_std}}
    claim = {"epsilon": 50.0, "delta": DELTA, "mu": mu, "level": "certified"}
    return Populations(
        document=document, claim=claim, unlearned=unlearned, retrained=retrained, source="s", reference="r"
    )


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_claims_attained_with_equality_are_refuted_as_rarely_as_stated(mu: float) -> None:
    """Thirty numbers and sixty models each: a score tested on the models it was found on would look far too good."""
    draws, runs, refuted = np.random.default_rng(int(mu) + 11), 40, 0
    for _ in range(runs):
        one, other = draws.normal(size=(2, 60, 30))
        one[:, 0] += mu
        refuted += audit(populations(one, other, mu=mu), confidence=0.8)["verdict"] == "refuted"
    assert refuted <= stats.binom.isf(1e-4, runs, 0.2)


@pytest.mark.slow
def test_the_worst_case_of_the_runtime_is_refuted_as_rarely_as_stated(
    plan_for: Callable[..., Plan], worst: str
) -> None:
    plan, runs = glm_plan(plan_for, Langevin), 300
    refuted = sum(audited(plan, worst, trials=400, seed=seed)["verdict"] == "refuted" for seed in range(runs))
    assert refuted <= stats.binom.isf(1e-4, runs, 0.05)


def test_the_half_that_is_counted_chooses_nothing() -> None:
    """Every second model finds score and events; whatever the others are, these do not move."""
    draws = np.random.default_rng(9)
    one, other = draws.normal(size=(2, 200, 3))
    seen = set()
    for _ in range(3):
        one[1::2], other[1::2] = draws.normal(size=(2, 100, 3)) + 5
        found = audit(populations(one, other))
        events = [found["lower_bounds"][f"{name}_event"] for name in ("mu", "epsilon")]
        chosen = [(event["threshold"], event["above"], event["first"]) for event in events]
        seen.add((found["score"], *chosen, *(point["threshold"] for point in found["curve"]["points"])))
    assert len(seen) == 1


def test_the_score_fits_how_the_populations_differ() -> None:
    draws = np.random.default_rng(4)
    # A small shift where noise is small, beside a coordinate of much noise.
    scales = np.array([10.0, 0.1])
    one, other = draws.normal(size=(2, 2000, 2)) * scales
    one += np.array([1.0, 0.1])
    found = separate(one, other)
    assert found.kind == "whitened difference of means"
    scored = found.score(one), found.score(other)
    assert (scored[0].mean() - scored[1].mean()) / scored[1].std() == pytest.approx(1.0, abs=0.1)
    # Only the spread differs.
    one, other = draws.normal(size=(2, 2000, 3))
    assert separate(2 * one, other).kind == "spread"
    # Many numbers, few models: only a direction known beforehand sees anything.
    one, other = draws.normal(size=(2, 100, 3000))
    direction = np.zeros(3000)
    direction[7] = 1
    one[:, 7] += 2
    assert separate(one, other, directions=[("known", direction)]).kind == "known"


def test_populations_without_noise() -> None:
    """One model, whatever is repeated: the same in both, nothing is seen; another, all that counts can show."""
    same = audit(populations(np.ones((50, 3)), np.ones((50, 3)), noise_std=0.0))
    assert same["lower_bounds"]["mu"] == same["lower_bounds"]["epsilon"] == 0
    assert same["gaussian_fit"] is None
    other = audit(populations(np.ones((50, 3)), np.zeros((50, 3)), noise_std=0.0))["lower_bounds"]
    assert other["mu"] == other["largest_mu"] > 0
    assert other["epsilon"] == other["largest_epsilon"] > 0


def test_a_claim_without_mu_is_judged_by_epsilon() -> None:
    draws = np.random.default_rng(6)
    one, other = draws.normal(size=(2, 2000, 1))
    found = populations(one + 4, other, mu=None)
    found.claim["epsilon"] = 3.0
    document = audit(found)
    assert document["exceeded"] == ["epsilon"]
    # The certified curve is that of (epsilon, delta), attained by no pair of normal laws.
    at = {point["fpr"]: point["tpr"] for point in document["curve"]["certified"]}
    assert at[0.0] == pytest.approx(DELTA)
    assert at[0.01] == pytest.approx(math.exp(3.0) * 0.01 + DELTA)
    assert at[0.5] == pytest.approx(1 - (0.5 - DELTA) / math.exp(3.0))
    found.claim["epsilon"] = 50.0
    assert audit(found)["verdict"] == "not refuted"


@pytest.mark.parametrize(
    ("shapes", "text"),
    [(((4, 2), (4, 3)), "2 numbers, retrained ones 3"), (((1, 2), (4, 2)), "needs 2 unlearned models")],
)
def test_populations_that_cannot_be_compared_are_refused(shapes: Any, text: str) -> None:
    draws = np.random.default_rng(0)
    with pytest.raises((DataError, InvalidInput), match=text):
        audit(populations(*(draws.normal(size=shape) for shape in shapes)))


def test_the_smallest_populations_show_nothing() -> None:
    draws = np.random.default_rng(0)
    for count in (2, 3, 5, 9):
        one, other = draws.normal(size=(2, count, 4))
        bounds = audit(populations(one + 100, other))["lower_bounds"]
        assert 0 <= bounds["mu"] <= bounds["largest_mu"] < 10


def test_chains_are_independent_draws(plan_for: Callable[..., Plan], worst: str) -> None:
    """With other seeds other models; with one seed the same: nothing but the source is random."""
    plan = glm_plan(plan_for, Langevin).to_json()
    found = [
        of_plan(plan, data=worst, forget="0", settings=Settings(trials=20, seed=seed)).unlearned for seed in (1, 1, 2)
    ]
    assert np.array_equal(found[0], found[1])
    assert not np.isin(found[0], found[2]).any()
    assert torch.is_grad_enabled()
