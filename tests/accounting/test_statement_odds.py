"""What a statement says in numbers, against the trade-off functions themselves in high precision."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath
from hypothesis import given, settings
from hypothesis import strategies as st

from rdp_calc.statement.odds import ceiling, exact, factor, floor, odds_of, one_in, percent


def tilted(f: Any, epsilon: Any, delta: Any) -> Any:
    """The largest true positive rate at false positive rate ``f`` under (epsilon, delta) in both directions."""
    grown = mpmath.exp(epsilon)
    return min(grown * f + delta, 1 - (1 - delta - f) / grown, mpmath.mpf(1))


def shifted(f: Any, mu: Any) -> Any:
    """The same between N(0, 1) and N(mu, 1)."""
    return mpmath.ncdf(mu - mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * f))


@settings(max_examples=60, deadline=None)
@given(
    epsilon=st.floats(1e-3, 12),
    delta=st.floats(1e-12, 0.4),
    mu=st.none() | st.floats(1e-3, 8),
)
def test_odds_are_those_of_the_trade_off_rounded_up(epsilon: float, delta: float, mu: float | None) -> None:
    found = odds_of(epsilon=epsilon, delta=delta, mu=mu)
    with mpmath.workdps(40):
        eps, d = mpmath.mpf(epsilon), mpmath.mpf(delta)
        # Where the two lines of (epsilon, delta) cross, and where the curve of mu has slope 1.
        corner = (1 - d) / (1 + mpmath.exp(eps))
        advantage, power = tilted(corner, eps, d) - corner, tilted(mpmath.mpf(0.01), eps, d)
        if mu is not None:
            middle = mpmath.ncdf(-mpmath.mpf(mu) / 2)
            advantage = min(advantage, shifted(middle, mpmath.mpf(mu)) - middle)
            power = min(power, shifted(mpmath.mpf(1) / 100, mpmath.mpf(mu)))
        near = mpmath.mpf(10) ** -14
        assert 0 <= found.advantage - advantage < near
        assert 0 <= found.accuracy - (1 + advantage) / 2 < near
        assert 0 <= found.power - power < near


def test_no_test_beats_the_odds() -> None:
    found = odds_of(epsilon=0.7, delta=0.01, mu=0.5)
    for i in range(1, 1000):
        f = mpmath.mpf(i) / 1000
        best = min(tilted(f, mpmath.mpf(0.7), mpmath.mpf(0.01)), shifted(f, mpmath.mpf(0.5)))
        assert best - f <= found.advantage
        assert (best + 1 - f) / 2 <= found.accuracy
        assert f > 0.01 or best <= found.power


@given(st.floats(0, 1))
def test_percentages_are_rounded_up(probability: float) -> None:
    text = percent(probability)
    assert text.endswith(" %")
    shown = Fraction(text.removesuffix(" %")) / 100
    assert 0 <= shown - Fraction(probability) < Fraction(1, 1000)


@given(st.floats(1e-300, 30))
def test_factors_are_rounded_up(epsilon: float) -> None:
    with mpmath.workdps(40):
        grown = mpmath.exp(mpmath.mpf(epsilon))
        shown = mpmath.mpf(factor(epsilon).replace(",", ""))
        assert shown >= grown
        # Three digits: of the factor from 2 on, of what it is above 1 below.
        one_percent = mpmath.mpf("1.0101")
        most = grown * one_percent if grown >= 2 else 1 + max((grown - 1) * one_percent, mpmath.mpf("1.1e-6"))
        assert shown <= most


def test_numbers_as_people_read_them() -> None:
    assert [percent(p) for p in (0, 0.5, 1, 0.5537, 1e-20, 0.5000005)] == [
        "0 %",
        "50 %",
        "100 %",
        "55.4 %",
        "0.0001 %",
        "50.0001 %",
    ]
    assert [ceiling(x) for x in (0.0, 0.12345, 1e-5, 12345.0, 1e-12)] == ["0", "0.124", "0.00001", "12,400", "1e-12"]
    assert [floor(x) for x in (0.12345, 12355.0)] == ["0.123", "12,300"]
    assert [exact(x) for x in (1.0, 1e-5, 1 / 11982, 1e-9)] == ["1", "0.00001", "0.00008345852111500584", "1e-9"]
    assert [one_in(p) for p in (1e-5, 1 / 11982, 0.3, 1e-12)] == [
        *("about 1 in 100,000", "about 1 in 11,982"),
        *("30 %", "less than 1 in a billion"),
    ]
    assert factor(1e9) == "e^1,000,000,000"
