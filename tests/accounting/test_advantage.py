"""The largest TPR - FPR that a claim allows: two closed formulas, on the safe side."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mpmath import mp, mpf

from rdp_calc.errors import InvalidInput
from rdp_calc.profiles import gaussian, hockey_stick

EPSILONS = (0.0, 1e-12, 1e-3, 0.3, 1.0, 7.5, 40.0, 800.0, 1e6)
DELTAS = (0.0, 1e-300, 1e-5, 0.2, 1.0)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
def test_hockey_stick(epsilon: float, delta: float) -> None:
    with mp.workdps(60):
        exact = min((mp.expm1(epsilon) + 2 * mpf(delta)) / (mp.exp(epsilon) + 1), mpf(1))
        found = hockey_stick.advantage(epsilon=epsilon, delta=delta)
        assert exact <= found <= exact * (1 + mpf(2) ** -50) + mpf(10) ** -320


@pytest.mark.parametrize("mu", [0.0, 1e-300, 1e-9, 0.4, 1.0, 6.0, 40.0])
def test_gaussian(mu: float) -> None:
    with mp.workdps(60):
        exact = mp.erf(mpf(mu) / (2 * mp.sqrt(2)))
        assert exact <= gaussian.advantage(mu=mu) <= exact * (1 + mpf(2) ** -45)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.01), (2.0, 1e-3), (0.0, 0.1)])
def test_no_point_of_the_region_has_more(epsilon: float, delta: float) -> None:
    """The region of tests that (epsilon, delta) in both directions allows, on a grid; its best corner is attained."""
    fpr = np.linspace(0, 1, 100_001)
    tpr = np.minimum(np.exp(epsilon) * fpr + delta, 1 - np.exp(-epsilon) * (1 - delta - fpr)).clip(max=1)
    found = hockey_stick.advantage(epsilon=epsilon, delta=delta)
    assert (tpr - fpr).max() <= found + 1e-15
    assert (tpr - fpr).max() == pytest.approx(found, abs=2e-5)


@pytest.mark.parametrize(("epsilon", "delta"), [(math.nan, 0.1), (-1.0, 0.1), (1.0, math.nan), (1.0, 1.1), (1.0, -0.1)])
def test_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(InvalidInput):
        hockey_stick.advantage(epsilon=epsilon, delta=delta)
