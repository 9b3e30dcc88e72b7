"""The Gaussian profile against 60-digit mpmath: closer than 1e-12, never on the unsafe side, over the whole domain."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr

from rdp_calc.errors import InvalidInput
from rdp_calc.profiles import gaussian

EPSILONS = [1e-6, 1e-4, 0.01, 0.3, 1.0, 7.0, 50.0, 1e3, 1e6]
DELTAS = [1e-300, 1e-150, 1e-60, 1e-30, 1e-12, 1e-7, 1e-5, 1e-3, 0.1, 0.4, 0.5]
MUS = [1e-12, 1e-9, 1e-6, 1e-3, 0.1, 1.0, 6.0, 40.0, 1e3, 1e6, 1e12]

# A relative step to the wrong side by which every answer must fail: the accuracy theory section 11 asks for.
NEIGHBOUR = 1e-12


def log_range(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log10(low), math.log10(high)).map(lambda x: min(max(10.0**x, low), high))


def check_mu(oracle: Any, epsilon: float, delta: float) -> None:
    value = gaussian.mu(epsilon=epsilon, delta=delta)
    assert oracle.gauss_delta(epsilon, value) <= delta
    assert oracle.gauss_delta(epsilon, oracle.mp.mpf(value) * (1 + NEIGHBOUR)) > delta


def check_epsilon(oracle: Any, delta: float, mu: float) -> None:
    value = gaussian.epsilon(delta=delta, mu=mu)
    if value == 0:
        assert oracle.gauss_delta(0, mu) <= delta
    else:
        assert oracle.gauss_delta(value, mu) <= delta
        assert oracle.gauss_delta(oracle.mp.mpf(value) * (1 - NEIGHBOUR), mu) > delta


def check_delta(oracle: Any, epsilon: float, mu: float) -> None:
    value, exact = gaussian.delta(epsilon=epsilon, mu=mu), oracle.gauss_delta(epsilon, mu)
    assert exact <= value <= 1
    if exact >= 1e-300:
        assert value <= exact * (1 + oracle.mp.mpf("1e-12"))
    else:
        # Below the domain a double may lose digits, but it stays a positive bound.
        assert 0 < value <= max(exact * (1 + oracle.mp.mpf("1e-12")), exact + 5e-324)


@pytest.mark.parametrize(("epsilon", "delta"), list(itertools.product(EPSILONS, DELTAS)))
def test_mu_grid(oracle: Any, epsilon: float, delta: float) -> None:
    check_mu(oracle, epsilon, delta)


@pytest.mark.parametrize(("delta", "mu"), list(itertools.product(DELTAS, MUS)))
def test_epsilon_grid(oracle: Any, delta: float, mu: float) -> None:
    check_epsilon(oracle, delta, mu)


@pytest.mark.parametrize(("epsilon", "mu"), list(itertools.product([0.0, *EPSILONS], MUS)))
def test_delta_grid(oracle: Any, epsilon: float, mu: float) -> None:
    check_delta(oracle, epsilon, mu)


@settings(deadline=None, max_examples=150)
@given(epsilon=log_range(1e-6, 1e6), delta=log_range(1e-300, 0.5))
def test_mu_anywhere(oracle: Any, epsilon: float, delta: float) -> None:
    check_mu(oracle, epsilon, delta)


@settings(deadline=None, max_examples=150)
@given(delta=log_range(1e-300, 0.5), mu=log_range(1e-12, 1e12))
def test_epsilon_anywhere(oracle: Any, delta: float, mu: float) -> None:
    check_epsilon(oracle, delta, mu)


@settings(deadline=None, max_examples=150)
@given(epsilon=log_range(1e-6, 1e6), mu=log_range(1e-12, 1e12))
@example(epsilon=1e6, mu=1e-12)
def test_delta_anywhere(oracle: Any, epsilon: float, mu: float) -> None:
    check_delta(oracle, epsilon, mu)


@settings(deadline=None, max_examples=150)
@given(delta=log_range(1e-300, 0.5), epsilon=log_range(1e-6, 1e6))
def test_delta_where_it_is_neither_0_nor_1(oracle: Any, delta: float, epsilon: float) -> None:
    # Random (epsilon, mu) almost always give delta near 0 or 1; this walks along the curve in between, where the
    # two terms cancel.
    check_delta(oracle, epsilon, gaussian.mu(epsilon=epsilon, delta=delta))


def test_reference_values(oracle: Any, reference: dict[str, Any]) -> None:
    assert len(reference["gauss"]) >= 10
    for row in reference["gauss"]:
        exact = oracle.mp.mpf(row["mu"])
        value = gaussian.mu(epsilon=row["epsilon"], delta=row["delta"])
        assert exact * (1 - oracle.mp.mpf("1e-10")) <= value <= exact * (1 + oracle.mp.mpf("1e-24"))
        assert 1 / value == pytest.approx(float(row["sigma_unit_sensitivity"]), rel=1e-10)


@pytest.mark.parametrize(
    ("epsilon", "delta", "sigma"),
    [
        (1.0, 1e-5, "3.730631634815941832"),
        (1e-4, 1e-30, "101936.331761967865"),
        (50.0, 1e-12, "0.190710442406377139"),
    ],
)
def test_extremes_where_other_accountants_fail(oracle: Any, epsilon: float, delta: float, sigma: str) -> None:
    exact = oracle.mp.mpf(sigma)
    noise = 1 / oracle.mp.mpf(gaussian.mu(epsilon=epsilon, delta=delta))
    # The printed value is itself rounded in its last digit.
    assert exact * (1 - oracle.mp.mpf("3e-18")) <= noise <= exact * (1 + oracle.mp.mpf("1e-12"))


def test_large_mu() -> None:
    # mu = 1000 is exact, unlike 1 / 1e-3 in doubles; the printed value belongs to the exact 1000 to 1e-12.
    assert gaussian.epsilon(delta=1e-5, mu=1000.0) == pytest.approx(504263.892920654080, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-300, -1.0])
def test_epsilon_and_mu_out_of_domain(bad: float) -> None:
    with pytest.raises(InvalidInput, match="epsilon"):
        gaussian.mu(epsilon=bad, delta=1e-5)
    with pytest.raises(InvalidInput, match="epsilon"):
        gaussian.delta(epsilon=bad, mu=1.0)
    with pytest.raises(InvalidInput, match="mu"):
        gaussian.delta(epsilon=1.0, mu=bad)
    with pytest.raises(InvalidInput, match="mu"):
        gaussian.epsilon(delta=1e-5, mu=bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-5, 0.0, 1.0, 1.5])
def test_delta_out_of_domain(bad: float) -> None:
    with pytest.raises(InvalidInput, match="delta"):
        gaussian.mu(epsilon=1.0, delta=bad)
    with pytest.raises(InvalidInput, match="delta"):
        gaussian.epsilon(delta=bad, mu=1.0)


def test_no_difference_is_free() -> None:
    assert gaussian.delta(epsilon=0.0, mu=0.0) == 0.0
    assert gaussian.epsilon(delta=1e-300, mu=0.0) == 0.0


@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.25])
def test_epsilon_is_zero_exactly_up_to_the_total_variation(oracle: Any, delta: float) -> None:
    # delta(0; mu) = erf(mu / sqrt 8) is the total variation distance: epsilon 0 is free up to there and not beyond.
    mp = oracle.mp
    edge = mp.findroot(lambda m: mp.erf(m / mp.sqrt(8)) - mp.mpf(delta), mp.mpf(delta) * 2.5)
    assert gaussian.epsilon(delta=delta, mu=float(edge * (1 - mp.mpf("1e-14")))) == 0.0
    assert gaussian.epsilon(delta=delta, mu=float(edge * (1 + mp.mpf("1e-14")))) > 0.0


@settings(deadline=None, max_examples=60)
@given(mu=log_range(1e-6, 1e3), factor=st.floats(1.001, 100), epsilon=log_range(1e-4, 1e3))
def test_monotone(mu: float, factor: float, epsilon: float) -> None:
    assert gaussian.delta(epsilon=epsilon, mu=mu) <= gaussian.delta(epsilon=epsilon, mu=mu * factor)
    assert gaussian.delta(epsilon=epsilon * factor, mu=mu) <= gaussian.delta(epsilon=epsilon, mu=mu)
    assert gaussian.epsilon(delta=1e-9, mu=mu) <= gaussian.epsilon(delta=1e-9, mu=mu * factor)
    assert gaussian.mu(epsilon=epsilon, delta=1e-9) < gaussian.mu(epsilon=epsilon * factor, delta=1e-9)


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-6, 1e-3])
def test_dp_accounting_agrees_with_the_analytic_gaussian(epsilon: float, delta: float) -> None:
    peer = pytest.importorskip("dp_accounting")
    if not hasattr(peer, "get_sigma_gaussian"):
        pytest.skip("dp-accounting has it from 0.6 on")
    noise = 1 / gaussian.mu(epsilon=epsilon, delta=delta)
    assert peer.get_sigma_gaussian(epsilon, delta) == pytest.approx(noise, rel=1e-6)
    assert peer.get_epsilon_gaussian(noise, delta) == pytest.approx(epsilon, rel=1e-6)


def test_renyi_accountants_contain_the_exact_profile() -> None:
    # Renyi conversions are valid upper bounds, so an exact epsilon above them would be wrong.
    rdp = pytest.importorskip("dp_accounting.rdp")
    events = pytest.importorskip("dp_accounting.dp_event")
    opacus = pytest.importorskip("opacus.accountants.analysis.rdp")
    for noise, delta in itertools.product([0.5, 1.0, 4.0, 20.0], [1e-9, 1e-5]):
        exact = gaussian.epsilon(delta=delta, mu=1 / noise)
        accountant = rdp.RdpAccountant()
        accountant.compose(events.GaussianDpEvent(noise))
        orders = np.linspace(1.1, 200, 2000)
        curve = opacus.compute_rdp(q=1.0, noise_multiplier=noise, steps=1, orders=orders)
        for upper in (
            accountant.get_epsilon(delta),
            opacus.get_privacy_spent(orders=orders, rdp=curve, delta=delta)[0],
        ):
            assert exact <= upper <= 1.6 * exact


def test_float_formula_agrees_where_it_does_not_cancel() -> None:
    # A third evaluation, through scipy's log of the normal distribution function.
    for epsilon, mu in itertools.product([0.5, 2.0, 8.0], [0.5, 2.0, 5.0]):
        plus = np.exp(log_ndtr(mu / 2 - epsilon / mu))
        minus = np.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
        assert gaussian.delta(epsilon=epsilon, mu=mu) == pytest.approx(plus - minus, rel=1e-9)
