"""Attacks: known Gaussian cases, a model that memorises, its unlearned and retrained versions, and certified chains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import multivariate_normal, norm

from rdp_calc.errors import InvalidInput
from unlearn_runtime.evaluate import lira, membership, roc
from unlearn_runtime.evaluate.report import Options, evaluate
from unlearn_runtime.evaluate.shadows import LinearTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
Command = Callable[..., str]


def attack(document: dict[str, Any], name: str, target: str = "after", run: int = 0) -> dict[str, Any]:
    (found,) = [
        part for part in document["runs"][run]["attacks"] if part["attack"] == name and part["target"] == target
    ]
    return found


# Likelihood ratios on Gaussian numbers


def shadow_numbers(gap: Array, seed: int = 0, models: int = 64) -> tuple[Array, Array, Array]:
    """Numbers of shadow models on records whose mean moves by ``gap`` (m,) when they are trained on, who trained on
    what, and a draw of the generator.
    """
    draws = np.random.default_rng(seed)
    inside = np.zeros((models, len(gap)), dtype=bool)
    for record in range(len(gap)):
        inside[draws.permutation(models)[: models // 2], record] = True
    base = draws.normal(0, 3, len(gap))
    return base + inside * gap + draws.normal(0, 1, inside.shape), inside, base


def test_ratio_is_the_log_ratio_of_two_normal_densities() -> None:
    values, inside, _ = shadow_numbers(np.full(5, 2.0))
    target = np.linspace(-2, 2, 5)
    expected = []
    for record in range(5):
        one, two = values[inside[:, record], record], values[~inside[:, record], record]
        expected.append(
            norm.logpdf(target[record], one.mean(), one.std(ddof=1))
            - norm.logpdf(target[record], two.mean(), two.std(ddof=1))
        )
    np.testing.assert_allclose(lira.online(target, values, inside, variance="per-example"), expected, atol=1e-10)


def test_fixed_variance_is_pooled() -> None:
    values, inside, _ = shadow_numbers(np.full(5, 2.0))
    squares = [((values[inside[:, i], i] - values[inside[:, i], i].mean()) ** 2).sum() for i in range(5)]
    found = lira.fit(values, inside, variance="fixed")
    np.testing.assert_allclose(found.std, np.sqrt(sum(squares) / (5 * 31)))


@pytest.mark.parametrize("variance", lira.VARIANCES)
@pytest.mark.parametrize("kind", [lira.online, lira.offline])
def test_area_of_the_known_law(kind: Any, variance: str) -> None:
    """Every record moves by 1.5 standard deviations: the best AUC is Phi(1.5/sqrt 2) = 0.8556."""
    count = 2000
    values, inside, base = shadow_numbers(np.full(count, 1.5), models=128)
    member = np.arange(count) % 2 == 0
    target = base + 1.5 * member + np.random.default_rng(7).normal(size=count)
    scores = kind(target, values, inside, variance=variance)
    found = roc.auc(scores[member], scores[~member], confidence=0.999)
    assert found.low <= norm.cdf(1.5 / np.sqrt(2)) <= found.high + 0.02
    assert found.value > 0.83
    # Without the shadow models' means the spread between records hides the rest.
    assert roc.auc(target[member], target[~member]).value < 0.7


def test_online_looks_at_both_sides() -> None:
    """Records whose number falls when they are trained on: the one-sided offline attack has them the wrong way."""
    gap = np.full(600, -1.5)
    values, inside, base = shadow_numbers(gap)
    member = np.arange(600) % 2 == 0
    target = base + gap * member + np.random.default_rng(7).normal(size=600)
    one, two = (
        roc.auc(scores[member], scores[~member])
        for scores in (
            lira.online(target, values, inside, variance="fixed"),
            lira.offline(target, values, inside, variance="fixed"),
        )
    )
    assert one.low > 0.8
    assert two.high < 0.2


def test_too_few_models() -> None:
    values, inside, _ = shadow_numbers(np.zeros(3), models=2)
    with pytest.raises(InvalidInput, match="2 models"):
        lira.online(values[0], values, inside, variance="fixed")
    with pytest.raises(InvalidInput, match="8 models"):
        lira.populations(values, values, variance="fixed")
    with pytest.raises(InvalidInput, match="variance"):
        lira.fit(values, variance="none")


def test_constant_numbers_do_not_divide_by_zero() -> None:
    same = np.ones((16, 4))
    scores = lira.populations(same, same, variance="per-example")
    assert (scores.unlearned == 0).all()
    apart = lira.populations(same, same + 1e-6, variance="per-example")
    assert np.isfinite(apart.unlearned).all()
    assert (apart.unlearned > 0).all()
    assert (apart.retrained < 0).all()


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_populations_of_known_laws(gap: float) -> None:
    """Two Gaussian populations on one record, a gap apart: AUC Phi(gap/sqrt 2), advantage 2 Phi(gap/2) - 1."""
    draws = np.random.default_rng(3)
    scores = lira.populations(draws.normal(gap, 1, (4000, 1)), draws.normal(0, 1, (4000, 1)), variance="fixed")
    one, two = scores.unlearned[:, 0], scores.retrained[:, 0]
    assert len(one) == len(two) == 2000
    area, best = roc.auc(one, two), roc.advantage(one, two)
    if gap:
        assert area.low <= norm.cdf(gap / np.sqrt(2)) <= area.high
        assert best.value == pytest.approx(2 * norm.cdf(gap / 2) - 1, abs=0.04)
    assert best.low <= 2 * norm.cdf(gap / 2) - 1 <= best.high


def test_independent_records_add_up() -> None:
    """Five records, each 0.6 apart: together sqrt 5 times 0.6."""
    draws = np.random.default_rng(3)
    scores = lira.populations(draws.normal(0.6, 1, (3000, 5)), draws.normal(0, 1, (3000, 5)), variance="per-example")
    found = roc.auc(scores.unlearned.sum(axis=1), scores.retrained.sum(axis=1), confidence=0.999)
    assert found.low <= norm.cdf(0.6 * np.sqrt(5 / 2)) <= found.high


# The logistic attack


def test_logistic_attack_finds_a_direction_and_no_more() -> None:
    draws = np.random.default_rng(0)
    cloud = multivariate_normal(np.zeros(3), np.eye(3), seed=1)
    one, two = cloud.rvs(300) + np.array([0.0, 1.5, 0.0]), cloud.rvs(500)
    found = roc.auc(*membership.logistic_scores(one, two, generator=draws))
    assert found.low <= norm.cdf(1.5 / np.sqrt(2)) <= found.high
    # Cross-fitted, so that fitting noise is no success: 40 features that say nothing.
    areas = [
        roc.auc(*membership.logistic_scores(draws.normal(size=(30, 40)), draws.normal(size=(60, 40)), generator=draws))
        for _ in range(8)
    ]
    assert np.mean([area.value for area in areas]) == pytest.approx(0.5, abs=0.07)
    with pytest.raises(InvalidInput, match="2 forgotten"):
        membership.logistic_scores(one[:1], two, generator=draws)


# Runs


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory, rdp_calc_command: Command) -> Path:
    """A run on 60 records of 150 features with random labels and almost no regulariser, of which 25 are forgotten, by
    solving anew with hardly any noise.
    """
    folder = tmp_path_factory.mktemp("memorised")
    draws = np.random.default_rng(11)
    x = draws.normal(size=(120, 150))
    x *= 0.95 / np.linalg.norm(x, axis=1, keepdims=True)
    y = draws.permutation(np.arange(120) % 2)
    np.savez(folder / "data.npz", X_train=x[:60], y_train=y[:60], X_test=x[60:], y_test=y[60:])
    rdp_calc_command(
        f"plan gradient-norm --data {folder}/data.npz --loss logistic --l2 0.002 --tolerance 1e-9 --epsilon 50"
        f" --delta 0.01 --group-size 25 -o {folder}/plan.json -q"
    )
    rdp_calc_command(
        f"run {folder}/plan.json --data {folder}/data.npz --forget 0-24 --trials 40 --retrain -o {folder}/run -q"
    )
    return folder / "run"


@pytest.fixture(scope="module")
def attacked(memorised: Path) -> dict[str, Any]:
    names = ("loss", "logistic", "lira", "lira-offline")
    return evaluate([memorised], Options(attacks=names, shadows=32, seed=4)).document


@pytest.mark.parametrize("name", ["loss", "logistic", "lira", "lira-offline"])
def test_a_model_that_memorises_is_found_out(name: str, attacked: dict[str, Any]) -> None:
    assert attack(attacked, name, "before")["auc"]["value"] >= 0.7
    assert attack(attacked, name, "before")["auc"]["low"] > 0.5


@pytest.mark.parametrize("name", ["loss", "logistic", "lira", "lira-offline"])
@pytest.mark.parametrize("target", ["retrained", "after"])
def test_without_the_records_guessing_is_within_the_interval(name: str, target: str, attacked: dict[str, Any]) -> None:
    found = attack(attacked, name, target)["auc"]
    assert found["low"] <= 0.5 <= found["high"]


def test_shuffled_membership_says_nothing(memorised: Path) -> None:
    """The scores that find the model out, given to the two groups at random."""
    found = evaluate([memorised], Options(attacks=("lira",), shadows=32, seed=4))
    (before,) = [part for part in found.attacked[0] if part.target == "before"]
    # Each point of the curve back to scores: the numbers at every threshold.
    steps = [np.rint(np.diff(rate) * n).astype(int) for rate, n in ((before.curve.tpr, 25), (before.curve.fpr, 60))]
    scores = np.concatenate([np.repeat(before.curve.thresholds[1:], count) for count in steps])
    assert len(scores) == 85
    assert roc.auc(scores[:25], scores[25:]).value == pytest.approx(before.auc.value)
    inside = [
        (part := roc.auc(shuffled[:25], shuffled[25:])).low <= 0.5 <= part.high
        for shuffled in (np.random.default_rng(seed).permutation(scores) for seed in range(200))
    ]
    assert np.mean(inside) > 0.9


def test_chains_under_a_claim(tmp_path: Path, two_classes: str, rdp_calc_command: Command) -> None:
    """Certified chains are told apart less than the claim allows; models that were not unlearned more."""
    rdp_calc_command(
        f"plan langevin --data {two_classes} --loss logistic --l2 0.1 --unlearn-steps 2 --execute-learn-steps 30"
        f" --group-size 3 --epsilon 1 --delta 1e-3 -o {tmp_path}/plan.json -q"
    )
    run = tmp_path / "run"
    rdp_calc_command(f"run {tmp_path}/plan.json --data {two_classes} --forget 0-2 --trials 3000 --retrain -o {run} -q")
    names = ("population", "u-lira")
    honest = evaluate([run], Options(attacks=names, seed=1)).document
    allowed = honest["runs"][0]["claim"]["advantage"]
    # The smaller of (e - 1 + 0.002)/(e + 1) and the Gaussian one.
    assert allowed < (np.e - 1 + 0.002) / (np.e + 1)
    for name in names:
        found = attack(honest, name, "after against retrained")
        assert found["advantage"]["value"] < allowed == found["certified_advantage"]
        assert found["within_claim"] is True
        assert found["auc"]["value"] < 0.5 + allowed / 2
    # Only what is attacked changes: the chains stay those before unlearning, moved far away.
    chains = load_file(run / "private" / "chains.safetensors")
    chains["after"][1:] = chains["retrained"][1:] + 40 * chains["retrained"].std()
    save_file(chains, run / "private" / "chains.safetensors")
    forged = evaluate([run], Options(attacks=names, seed=1)).document
    for name in names:
        found = attack(forged, name, "after against retrained")
        assert found["advantage"]["low"] > allowed
        assert found["within_claim"] is False


def test_models_from_before_passed_off_as_unlearned(memorised: Path, tmp_path: Path) -> None:
    """Chains that were unlearned are like retrained ones; the ones before, in their place, are all found out."""
    run = tmp_path / "run"
    shutil.copytree(memorised, run)
    # The noise of the run is fresh: an interval that nearly always holds.
    honest = evaluate([run], Options(attacks=("population",), confidence=0.99999)).document
    found = attack(honest, "population", "after against retrained")["auc"]
    assert found["low"] <= 0.5 <= found["high"]
    chains = load_file(run / "private" / "chains.safetensors")
    # The first is the one that was released, and must be.
    chains["after"][1:] = chains["before"][1:]
    save_file(chains, run / "private" / "chains.safetensors")
    forged = evaluate([run], Options(attacks=("population",))).document
    assert attack(forged, "population", "after against retrained")["auc"]["low"] > 0.8


def test_everything_is_json(attacked: dict[str, Any]) -> None:
    text = json.dumps(attacked, allow_nan=False)
    assert json.loads(text) == attacked


def test_shadow_models_see_the_records_under_attack(
    tmp_path: Path, two_classes: str, rdp_calc_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shadow models that all are the released one give every record under attack its own number."""
    rdp_calc_command(
        f"plan langevin --data {two_classes} --loss logistic --l2 0.1 --unlearn-steps 2 --execute-learn-steps 30"
        f" --group-size 3 --epsilon 1 --delta 1e-3 -o {tmp_path}/plan.json -q"
    )
    rdp_calc_command(f"run {tmp_path}/plan.json --data {two_classes} --forget 9,17,44 -o {tmp_path}/run -q")
    weights = load_file(tmp_path / "run" / "model.safetensors")["weight"].astype(np.float64)
    seen: list[tuple[Array, Array, Array]] = []

    def online(target: Array, values: Array, inside: Array, *, variance: str) -> Array:
        seen.append((target, values, inside))
        return target

    def train(self: Any, masks: Array, **_: Any) -> Array:
        train_masks.append(masks)
        return np.tile(weights, (len(masks), 1))

    train_masks: list[Array] = []
    monkeypatch.setattr(lira, "online", online)
    monkeypatch.setattr(LinearTrainer, "train", train)
    evaluate([tmp_path / "run"], Options(attacks=("lira",), shadows=6))
    ((masks,), (_, released)) = train_masks, seen
    target, values, inside = released
    assert values.shape == inside.shape == (6, 3 + 15)
    np.testing.assert_allclose(values, np.tile(target, (6, 1)), atol=1e-12)
    # Records 0..59 are the training set, the test set follows.
    np.testing.assert_array_equal(inside, masks[:, [9, 17, 44, *range(60, 75)]])
    # Scaled logits by hand: y x.w of two classes.
    with np.load(two_classes) as arrays:
        margins = (2.0 * arrays["y_train"] - 1) * (arrays["X_train"] @ weights)
    np.testing.assert_allclose(target[:3], margins[[9, 17, 44]], atol=1e-12)
