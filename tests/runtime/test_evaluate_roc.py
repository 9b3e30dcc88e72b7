"""ROC curves and their intervals: scikit-learn, hand-made cases with ties, Gaussian scores of known laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import beta, norm, t
from sklearn import metrics as sklearn_metrics

from rdp_calc.errors import InvalidInput
from unlearn_runtime.evaluate import roc

Array = npt.NDArray[Any]


def scores(seed: int, members: int = 40, others: int = 70, gap: float = 1.0, digits: int = 9) -> tuple[Array, Array]:
    """Gaussian scores a gap apart; few digits make ties."""
    draws = np.random.default_rng(seed)
    return draws.normal(gap, 1, members).round(digits), draws.normal(0, 1, others).round(digits)


@pytest.mark.parametrize("digits", [9, 1, 0])
@pytest.mark.parametrize("seed", range(3))
def test_curve_and_area_are_those_of_scikit_learn(seed: int, digits: int) -> None:
    one, two = scores(seed, digits=digits)
    labels, values = np.repeat([1, 0], [len(one), len(two)]), np.concatenate([one, two])
    fpr, tpr, _ = sklearn_metrics.roc_curve(labels, values, drop_intermediate=False)
    curve = roc.roc_curve(one, two)
    np.testing.assert_allclose(curve.fpr, fpr, atol=1e-15)
    np.testing.assert_allclose(curve.tpr, tpr, atol=1e-15)
    assert roc.auc(one, two).value == pytest.approx(sklearn_metrics.roc_auc_score(labels, values), abs=1e-14)


def test_ties_by_hand() -> None:
    one, two = np.array([1.0, 1.0, 2.0]), np.array([0.0, 1.0])
    curve = roc.roc_curve(one, two)
    assert curve.thresholds.tolist() == [math.inf, 2.0, 1.0, 0.0]
    assert curve.fpr.tolist() == [0, 0, 0.5, 1]
    assert curve.tpr.tolist() == pytest.approx([0, 1 / 3, 1, 1])
    # Pairs: 1 against 0 wins, 1 against 1 is half, twice; 2 wins both.
    assert roc.auc(one, two).value == pytest.approx(5 / 6)
    assert roc.advantage(one, two).value == pytest.approx(0.5)


def test_equal_scores_say_nothing() -> None:
    one = np.zeros(12)
    found = roc.auc(one, one)
    assert found.value == 0.5
    assert found.low < 0.3
    assert found.high > 0.7
    assert roc.advantage(one, one).value == 0


def test_scores_the_wrong_way_round() -> None:
    one, two = scores(0, gap=1.5)
    right, wrong = roc.auc(one, two), roc.auc(two, one)
    assert right.low > 0.7
    assert wrong.value == pytest.approx(1 - right.value)
    assert (wrong.low, wrong.high) == pytest.approx((1 - right.high, 1 - right.low))


def test_variance_is_delongs() -> None:
    """Against the definition: covariances of the two kinds of structural components over all pairs."""
    one, two = scores(4, digits=1)
    kernel = (one[:, None] > two).astype(float) + 0.5 * (one[:, None] == two)
    parts = kernel.mean(axis=1).var(ddof=1) / len(one), kernel.mean(axis=0).var(ddof=1) / len(two)
    variance, value = sum(parts), kernel.mean()
    freedom = variance**2 / (parts[0] ** 2 / (len(one) - 1) + parts[1] ** 2 / (len(two) - 1))
    reach = t.ppf(0.95, freedom) * math.sqrt(variance) / (value * (1 - value))
    # Scores in groups of one each, which are not widened.
    alone = {"member_groups": np.arange(len(one)), "other_groups": np.arange(len(two))}
    found = roc.auc(one, two, confidence=0.9, **alone)
    wide = roc.auc(one, two, confidence=0.9)
    assert wide.low <= found.low < found.high <= wide.high
    expected = [1 / (1 + math.exp(-(math.log(value / (1 - value)) + sign * reach))) for sign in (-1, 1)]
    assert [found.low, found.high] == pytest.approx(expected, abs=1e-12)


def coverage(gap: float, members: int, others: int, repeats: int = 1500) -> float:
    truth, hits = norm.cdf(gap / math.sqrt(2)), 0
    for seed in range(repeats):
        found = roc.auc(*scores(seed, members, others, gap))
        hits += found.low <= truth <= found.high
    return hits / repeats


@pytest.mark.parametrize(("gap", "members", "others"), [(0.0, 20, 100), (1.0, 30, 50), (2.0, 25, 200)])
def test_interval_covers_the_known_area(gap: float, members: int, others: int) -> None:
    # 1500 repeats: 0.95 has a standard error of 0.0056.
    assert 0.93 <= coverage(gap, members, others) <= 0.99


@pytest.mark.parametrize(("gap", "members"), [(0.0, 2), (3.0, 5), (3.0, 20)])
def test_interval_covers_with_few_members_and_near_the_ends(gap: float, members: int) -> None:
    """Where DeLong's interval alone misses in a tenth of all cases."""
    assert coverage(gap, members, 300, repeats=600) >= 0.96


def test_interval_covers_where_all_members_score_alike() -> None:
    """Rare positives: often no member has one, and its group then shows no variance."""
    draws, hits = np.random.default_rng(5), 0
    for _ in range(200):
        one, two = (draws.random(size) < 0.05 for size in (10, 300))
        found = roc.auc(one.astype(float), two.astype(float))
        hits += found.low <= 0.5 <= found.high
    assert hits >= 190


def test_perfect_separation_is_not_certainty() -> None:
    found = roc.auc(np.arange(10.0) + 100, np.arange(30.0))
    assert (found.value, found.high) == (1.0, 1.0)
    # Ten disjoint pairs all went right.
    assert found.low == pytest.approx(0.025 ** (1 / 10))


def test_groups_widen_the_interval_as_repeats_would() -> None:
    """Every score ten times over tells no more than once: with groups the interval stays, without it shrinks."""
    one, two = scores(1)
    plain = roc.auc(one, two)
    members, others = np.repeat(np.arange(len(one)), 10), np.repeat(np.arange(len(two)), 10)
    grouped = roc.auc(np.repeat(one, 10), np.repeat(two, 10), member_groups=members, other_groups=others)
    assert (grouped.value, grouped.low, grouped.high) == pytest.approx((plain.value, plain.low, plain.high), abs=1e-12)
    naive = roc.auc(np.repeat(one, 10), np.repeat(two, 10))
    assert naive.high - naive.low < 0.4 * (plain.high - plain.low)


def test_rate_at_a_false_positive_rate() -> None:
    """1000 others: at 0.1 % one of them may be above, at 1 % ten."""
    others = np.arange(1000.0)
    members = np.array([998.5, 999.5, 990.5, 500.0])
    assert roc.tpr_at_fpr(members, others, 0.001)["value"] == 0.5
    found = roc.tpr_at_fpr(members, others, 0.01)
    assert (found["value"], found["reached"], found["reason"]) == (0.75, 0.01, None)
    assert found["low"] == pytest.approx(beta.ppf(0.025, 3, 2))
    assert found["high"] == pytest.approx(beta.ppf(0.975, 4, 1))


def test_ties_at_the_threshold_get_in_together() -> None:
    others = np.concatenate([np.arange(90.0), np.full(10, 100.0)])
    members = np.array([100.0, 100.0, 101.0])
    # A threshold of 100 lets ten of the others in, which is too many for 5 %.
    assert roc.tpr_at_fpr(members, others, 0.05)["value"] == pytest.approx(1 / 3)
    assert roc.tpr_at_fpr(members, others, 0.1)["value"] == 1.0


def test_too_few_others_are_told_and_no_number_is_given() -> None:
    found = roc.tpr_at_fpr(np.ones(50), np.zeros(999), 0.001)
    assert found["value"] is None
    assert found["low"] is None
    assert "1000 non-members" in found["reason"]
    assert roc.tpr_at_fpr(np.ones(50), np.zeros(1000), 0.001)["value"] == 1.0
    # Of grouped scores the groups count.
    grouped = roc.tpr_at_fpr(
        np.ones(50), np.zeros(1000), 0.001, member_groups=np.arange(50), other_groups=np.arange(1000) // 2
    )
    assert grouped["value"] is None


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_advantage_interval_covers_the_known_advantage(gap: float) -> None:
    truth, found = 2 * norm.cdf(gap / 2) - 1, [roc.advantage(*scores(seed, 200, 300, gap)) for seed in range(300)]
    assert np.mean([part.low <= truth <= part.high for part in found]) >= 0.95
    # Not by being useless: below 0.35 wide on each side, and a clear advantage is seen.
    assert all(part.value - part.low < 0.35 for part in found)
    assert gap == 0 or all(part.low > 0 for part in found)


@pytest.mark.parametrize("bad", [np.array([]), np.array([math.nan]), np.array([math.inf])])
def test_no_scores(bad: Array) -> None:
    with pytest.raises(InvalidInput):
        roc.auc(bad, np.ones(3))
    with pytest.raises(InvalidInput):
        roc.roc_curve(np.ones(3), bad)
