"""Lower bounds from samples: exact intervals, coverage by simulation, and nothing infinite."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from rdp_calc.errors import InvalidInput
from rdp_calc.lower_bounds import (
    epsilon_at,
    gaussian_fit,
    lower_bounds,
    mu_at,
    proportion_bounds,
    trade_off,
)

Array = npt.NDArray[np.float64]

DELTA = 0.05
RUNS = 150


def epsilon_of(mu: float) -> float:
    """epsilon of N(0, 1) against N(mu, 1) at DELTA, by bisection on the textbook formula."""
    if mu == 0:
        return 0.0

    def delta(epsilon: float) -> float:
        return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu))

    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    return high


def most(runs: int, share: float) -> int:
    """Failures that so many runs reach with probability below 1e-4 if each fails with probability ``share``."""
    return int(stats.binom.isf(1e-4, runs, share))


def test_counts_are_bounded_as_binomial_tails_say() -> None:
    for n in (1, 2, 7, 1000):
        k = np.unique(np.linspace(0, n, 5).astype(int))
        lower, upper = proportion_bounds(k, n, miss=0.02)
        for hits, low, high in zip(k, lower, upper, strict=True):
            assert low == 0 if hits == 0 else math.isclose(stats.binom.sf(hits - 1, n, low), 0.02, rel_tol=1e-9)
            assert high == 1 if hits == n else math.isclose(stats.binom.cdf(hits, n, high), 0.02, rel_tol=1e-9)
            assert low < 1
            assert high > 0


def test_bounds_of_an_event() -> None:
    assert epsilon_at(0.5, 0.1, delta=0.1) == pytest.approx(math.log(4))
    assert epsilon_at(0.05, 0.1, delta=0.1) == 0
    assert mu_at(stats.norm.cdf(1.3), stats.norm.cdf(-0.2)) == pytest.approx(1.5)
    assert mu_at([0.0, 0.2], [0.5, 0.5]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 3.0])
def test_the_truth_is_exceeded_as_rarely_as_promised(mu: float) -> None:
    """At confidence 0.8 each of the two bounds may be wrong in 10 % of runs; both together in 20 %."""
    draws = np.random.default_rng(int(10 * mu) + 1)
    truth, wrong = {"mu": mu, "epsilon": epsilon_of(mu)}, {"mu": 0, "epsilon": 0}
    both, fits = 0, 0
    for _ in range(RUNS):
        one, other = draws.normal(size=(2, 120))
        one += mu
        found = lower_bounds(one, other, delta=DELTA, confidence=0.8)
        missed = [getattr(found, name) > value for name, value in truth.items()]
        wrong["mu"] += missed[0]
        wrong["epsilon"] += missed[1]
        both += any(missed)
        fit = gaussian_fit(one, other, delta=DELTA)
        assert fit is not None
        fits += not fit.lower <= mu <= fit.upper
    assert wrong["mu"] <= most(RUNS, 0.1)
    assert wrong["epsilon"] <= most(RUNS, 0.1)
    assert both <= most(RUNS, 0.2)
    # The interval of |mu| is one-sided at 0.
    assert fits <= most(RUNS, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 3.0])
def test_at_95_percent_the_truth_is_exceeded_in_one_of_twenty_runs_at_most(mu: float) -> None:
    draws, runs = np.random.default_rng(int(10 * mu) + 7), 1500
    epsilon, wrong = epsilon_of(mu), 0
    for _ in range(runs):
        one, other = draws.normal(size=(2, 400))
        found = lower_bounds(one + mu, other, delta=DELTA)
        wrong += found.mu > mu or found.epsilon > epsilon
    assert wrong <= most(runs, 0.05)


def test_bounds_come_near_the_truth_with_many_samples() -> None:
    draws = np.random.default_rng(5)
    for mu in (0.5, 1.0, 3.0):
        one, other = draws.normal(size=(2, 40_000))
        found = lower_bounds(one + mu, other, delta=DELTA)
        assert 0.9 * mu < found.mu < mu
        # At its best the epsilon of an event rests on rarer counts.
        assert 0.6 * epsilon_of(mu) < found.epsilon < epsilon_of(mu)


@pytest.mark.parametrize(
    "pair",
    [
        lambda draws: (draws.normal(size=4000), draws.normal(size=4000) + 1),
        lambda draws: (-draws.normal(size=4000), -draws.normal(size=4000) - 1),
    ],
)
def test_both_directions_are_looked_at(pair: Callable[[np.random.Generator], tuple[Array, Array]]) -> None:
    one, other = pair(np.random.default_rng(3))
    assert lower_bounds(one, other, delta=DELTA).mu > 0.8
    assert lower_bounds(other, one, delta=DELTA).mu > 0.8
    assert lower_bounds(one, other, delta=DELTA).epsilon > 0.9


def test_epsilon_takes_the_direction_in_which_the_laws_differ_more() -> None:
    """Uniform on [0, 1] inside a law that is elsewhere half of the time: only one direction sees more than ln 2."""
    draws = np.random.default_rng(8)
    inner, outer = draws.random(8000), np.where(draws.random(8000) < 0.5, draws.random(8000), 2 + draws.random(8000))
    for one, other in ((inner, outer), (outer, inner)):
        found = lower_bounds(one, other, delta=0.0)
        event = found.epsilon_event
        # The outer law has records where the inner one has none.
        assert event.false_alarms == 0
        assert (event.first == "unlearned") == (one is outer)
        assert found.epsilon == pytest.approx(math.log(0.47 / (math.log(80) / 4000)), abs=0.1)


def test_no_samples_show_an_infinite_bound() -> None:
    for n, m in ((2, 2), (2, 5000), (3, 2), (5000, 3000)):
        one, other = np.zeros(n), np.full(m, 1e308)
        found = lower_bounds(one, other, delta=1e-300)
        assert 0 <= found.mu <= found.largest_mu < 10
        assert 0 <= found.epsilon <= found.largest_epsilon < 10
    assert lower_bounds(np.zeros(5000), np.ones(5000), delta=0).mu == pytest.approx(found.largest_mu, abs=0.3)


def test_equal_constant_scores_show_nothing() -> None:
    found = lower_bounds(np.ones(100), np.ones(100), delta=0.0)
    assert (found.epsilon, found.mu) == (0.0, 0.0)
    assert gaussian_fit(np.ones(100), np.ones(100), delta=DELTA) is None


def test_events_are_chosen_on_the_held_out_samples_alone() -> None:
    """Whatever is counted, the event does not move: choosing cannot use up the confidence."""
    draws = np.random.default_rng(1)
    held = draws.normal(size=300) + 1, draws.normal(size=300)
    events = set()
    for _ in range(3):
        found = lower_bounds(draws.normal(size=90), draws.normal(size=70), delta=DELTA, held_out=held)
        events.add(tuple((e.threshold, e.above, e.first) for e in (found.mu_event, found.epsilon_event)))
        assert (found.mu_event.trials, found.mu_event.other_trials) in ((90, 70), (70, 90))
    assert len(events) == 1


def test_the_band_holds_at_all_thresholds_together() -> None:
    draws, thresholds, runs = np.random.default_rng(2), np.linspace(-2, 3, 12), 300
    truth = stats.norm.sf(thresholds[::-1] - 1), stats.norm.sf(thresholds[::-1])
    wrong = 0
    for _ in range(runs):
        one, other = draws.normal(size=(2, 100))
        band = trade_off(one + 1, other, thresholds, confidence=0.8)
        inside = (band.tpr_low <= truth[0]) & (truth[0] <= band.tpr_high)
        wrong += not (inside & (band.fpr_low <= truth[1]) & (truth[1] <= band.fpr_high)).all()
    assert wrong <= most(runs, 0.2)
    assert (np.diff(band.fpr) >= 0).all()
    assert band.points()[3]["tpr"] == band.tpr[3]


@pytest.mark.parametrize(
    ("scores", "options", "text"),
    [
        (([1.0], [1.0, 2.0]), {}, "unlearned must hold at least 2 scores"),
        (([1.0, math.nan], [1.0, 2.0]), {}, "not finite"),
        (([1.0, 2.0], [1.0, 2.0]), {"delta": math.nan}, r"delta must be in \[0, 1\)"),
        (([1.0, 2.0], [1.0, 2.0]), {"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        (([1.0, 2.0], [1.0, 2.0]), {"held_out": ([], [1.0])}, "held-out unlearned"),
    ],
)
def test_bad_input_is_refused(scores: tuple[list[float], list[float]], options: dict[str, float], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        lower_bounds(*scores, **{"delta": DELTA, **options})  # type: ignore[arg-type]


def test_impossible_counts_are_refused() -> None:
    for hits, trials in ((3, 2), (0, 0), (-1, 2), (math.nan, 2)):
        with pytest.raises(InvalidInput, match="hits"):
            proportion_bounds(hits, trials, miss=0.1)
