"""The numbers of a guarantee as people read them: every limit on an observer rounded up."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction

from rdp_calc.profiles import gaussian, hockey_stick
from rdp_calc.reals import ball, enclose, round_up
from rdp_calc.statement.document import Odds

#: The quantile of the standard normal law at 0.99, rounded down.
QUANTILE_99 = 2.3263478740408408

_FALSE_POSITIVES = 0.01

#: From here on e^epsilon is no number that tells anybody anything.
_LARGEST_FACTOR_AT = 30.0

#: A smaller growth than this is shown as this.
_SMALLEST_EXCESS = 1e-6


def odds_of(*, epsilon: float, delta: float, mu: float | None) -> Odds:
    """The limits on tests between two laws that are (epsilon, delta)-indistinguishable in both directions and, where
    ``mu`` is given, mu-GDP apart: the smaller limit of the two.

    advantage = 2 Phi(mu/2) - 1 and (e^epsilon - 1 + 2 delta)/(e^epsilon + 1); accuracy = (1 + advantage)/2; power =
    Phi(mu - z), z the quantile at 0.99, and min(e^epsilon f + delta, 1 - e^-epsilon (1 - delta - f)) at f = 1 %.
    Rounded up, in [0, 1]. (Dong-Roth-Su 2019, arXiv:1905.02383; Kairouz-Oh-Viswanath 2015, arXiv:1311.0776.)
    """
    advantage = hockey_stick.advantage(epsilon=epsilon, delta=delta)
    power = _power(epsilon, delta)
    if mu is not None and mu < math.inf:
        advantage = min(advantage, gaussian.advantage(mu=mu))
        # Phi(x) = erfc(-x / sqrt 2) / 2
        tail = enclose(lambda: ((ball(QUANTILE_99) - ball(mu)) / ball(2).sqrt()).erfc() / 2)
        power = min(power, round_up(tail))
    return Odds(advantage=advantage, accuracy=accuracy_of(advantage), power=min(power, 1.0))


def accuracy_of(advantage: float) -> float:
    """The share of right answers at an advantage where both cases are equally likely, (1 + advantage)/2, rounded up."""
    return min(round_up(enclose(lambda: (1 + ball(advantage)) / 2)), 1.0)


def _power(epsilon: float, delta: float) -> float:
    below = enclose(lambda: 1 - (1 - ball(delta) - ball(_FALSE_POSITIVES)) * (-ball(epsilon)).exp())
    # Beyond this epsilon the other limit is above 1.
    least = (
        1.0 if epsilon > 5 else round_up(enclose(lambda: ball(epsilon).exp() * ball(_FALSE_POSITIVES) + ball(delta)))
    )
    return min(round_up(below), least, 1.0)


def percent(probability: float) -> str:
    """A probability in percent, rounded up; one decimal, more where it is that close to 0, 1, 50 or 100 %."""
    value = 100 * Fraction(probability)
    distance = min(abs(value - mark) for mark in (0, 1, 50, 100))
    decimals = 1
    while decimals < 4 and 0 < distance * 10**decimals < 10:
        decimals += 1
    whole, part = divmod(math.ceil(value * 10**decimals), 10**decimals)
    return f"{whole} %" if part == 0 else f"{whole}.{part:0{decimals}d} %"


def ceiling(value: float, digits: int = 3) -> str:
    """A stated number with ``digits`` significant digits, rounded up, with commas between thousands."""
    return _rounded(Decimal(repr(value)), digits, ROUND_CEILING)


def exact(value: float) -> str:
    """A stated number as it is, without an exponent where that is short."""
    decimal = Decimal(repr(value)).normalize()
    return f"{decimal:,f}" if -7 < decimal.adjusted() < 16 else f"{decimal:e}"


def floor(value: float, digits: int = 3) -> str:
    """The same rounded down."""
    return _rounded(Decimal(repr(value)), digits, ROUND_FLOOR)


def _rounded(value: Decimal, digits: int, direction: str = ROUND_CEILING) -> str:
    if value == 0:
        return "0"
    rounded = Context(prec=digits, rounding=direction).create_decimal(value).normalize()
    return f"{rounded:,f}" if -7 < rounded.adjusted() < 16 else f"{rounded:e}"


def factor(epsilon: float) -> str:
    """e^epsilon rounded up, as the number of times that a chance may grow."""
    if epsilon > _LARGEST_FACTOR_AT:
        return f"e^{ceiling(epsilon)}"
    excess = round_up(enclose(lambda: ball(epsilon).exp() - 1))
    if excess >= 1:
        return _rounded(Decimal(round_up(enclose(lambda: ball(epsilon).exp()))), 3)
    return str(1 + Decimal(_rounded(Decimal(max(excess, _SMALLEST_EXCESS)), 3)))


def one_in(probability: float) -> str:
    """A stated probability once more: in percent where it is large, otherwise as 1 in about so many."""
    if probability > 0.1:
        return percent(probability)
    if probability < 1e-9:
        return "less than 1 in a billion"
    return f"about 1 in {round(1 / Fraction(probability)):,}"


def count(number: int, one: str, many: str | None = None) -> str:
    """A number of things: "one record", "12,000 records"."""
    return f"one {one}" if number == 1 else f"{number:,} {many or one + 's'}"
