"""The Gaussian profile: what mu-GDP says about (epsilon, delta), exactly, in both directions.

delta(epsilon; mu) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)

(Balle-Wang 2018, arXiv:1805.06530, Theorem 8; Dong-Roth-Su 2019, arXiv:1905.02383, Corollary 1; theory page
``docs/theory/gaussian.md``.) Floats propose, in log space and with ``math`` alone; ball arithmetic decides, so every
returned value is on the safe side and within a relative 1.4e-14 of the exact one.
"""

from __future__ import annotations

import math
from functools import lru_cache

from flint import arb

from rdp_calc.errors import InvalidInput
from rdp_calc.reals import Real, at_most, ball, enclose, precision, round_up
from rdp_calc.search import smallest_passing

_LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)
# From here on the continued fraction of the Mills ratio beats erfc, which bounds but no longer resolves the tail.
_LARGE_TAIL = 64.0


def delta_enclosure(epsilon: Real, mu: Real) -> arb:
    """A ball that contains delta(epsilon; mu) for mu > 0, at the working precision."""
    eps, m = ball(epsilon), ball(mu)
    u = eps / m - m / 2
    upper = u + m
    root_two = arb(2).sqrt()
    tail = (u / root_two).erfc() / 2
    if upper > _LARGE_TAIL:
        density = (-(u**2) / 2).exp() / (2 * arb.pi()).sqrt()
        return tail - density * _mills_enclosure(upper)
    return tail - eps.exp() * (upper / root_two).erfc() / 2


def _mills_enclosure(x: arb) -> arb:
    """(1 - Phi(x)) / phi(x) for x > 64, between two consecutive convergents of Laplace's continued fraction."""
    convergents = []
    for depth in (64, 65):
        value = x
        for k in range(depth, 0, -1):
            value = x + k / value
        convergents.append(1 / value)
    return convergents[0].union(convergents[1])


def delta(*, epsilon: float, mu: float) -> float:
    """The smallest delta at which mu-GDP implies (epsilon, delta)-DP, rounded up.

    Valid for epsilon >= 0 and mu >= 0, both finite; in [0, 1]. Raises InvalidInput otherwise.
    """
    check_epsilon(epsilon, allow_zero=True)
    check_mu(mu)
    if mu == 0:
        return 0.0
    return min(round_up(enclose(lambda: delta_enclosure(epsilon, mu))), 1.0)


def advantage(*, mu: float) -> float:
    """The largest TPR - FPR of any test between two laws that are mu-GDP apart, 2 Phi(mu/2) - 1, rounded up.

    It is their total variation, delta(0; mu). Valid for finite mu >= 0, in [0, 1]. Raises InvalidInput otherwise.
    (Dong-Roth-Su 2019, arXiv:1905.02383, Corollary 1 at epsilon = 0.)
    """
    return delta(epsilon=0.0, mu=mu)


def epsilon(*, delta: float, mu: float) -> float:
    """The smallest epsilon >= 0 at which mu-GDP implies (epsilon, delta)-DP, rounded up; 0 only where 0 is proved.

    Valid for delta in (0, 1) and finite mu >= 0. Raises InvalidInput otherwise.
    """
    check_delta(delta)
    check_mu(mu)
    if mu == 0 or at_most(lambda: delta_enclosure(0, mu), delta):
        return 0.0
    found = smallest_passing(
        lambda value: at_most(lambda: delta_enclosure(value, mu), delta), propose_epsilon(delta=delta, mu=mu)
    )
    if found is None:
        raise InvalidInput(f"mu = {mu!r} gives no finite epsilon in double precision at delta = {delta!r}; lower mu.")
    return found.value


def mu(*, epsilon: float, delta: float) -> float:
    """The largest mu for which mu-GDP implies (epsilon, delta)-DP, rounded down.

    Valid for epsilon >= 0 and delta in (0, 1). Raises InvalidInput otherwise. The noise of a Gaussian mechanism with
    L2 sensitivity w is w / mu.
    """
    check_epsilon(epsilon, allow_zero=True)
    check_delta(delta)
    # The search looks for the smallest passing value, so it runs on 1/mu: the noise of unit sensitivity.
    found = smallest_passing(
        lambda noise: at_most(lambda: delta_enclosure(epsilon, 1 / ball(noise)), delta),
        1 / propose_mu(epsilon=epsilon, delta=delta),
    )
    if found is None:
        raise InvalidInput(f"no noise in double precision meets epsilon = {epsilon!r}, delta = {delta!r}.")
    return math.nextafter(1 / found.value, 0.0)


def mu_enclosure(epsilon: float, delta: float) -> arb:
    """A ball of about 120 correct bits around mu*(epsilon, delta), the mu at which delta(epsilon; mu) = delta.

    One Newton step from the float proposal, then both ends of the ball are proved to lie on their sides.
    """
    return _mu_enclosure(epsilon, delta)


@lru_cache(maxsize=4096)
def _mu_enclosure(epsilon: float, delta: float) -> arb:
    start = propose_mu(epsilon=epsilon, delta=delta)
    width = arb(2) ** -100
    for bits in (192, 384, 768, 1536, 3072):
        with precision(bits):
            centre = ball(start)
            for _ in range(3):
                u = ball(epsilon) / centre - centre / 2
                slope = (-(u**2) / 2).exp() / (2 * arb.pi()).sqrt()
                move = (delta_enclosure(epsilon, centre) - ball(delta)) / slope
                if not move.is_finite():
                    break
                centre = arb((centre - move).mid())
                if abs(move) < centre * 2.0**-60:
                    break
            low, high = centre * (1 - width), centre * (1 + width)
            if low > 0 and delta_enclosure(epsilon, low) <= ball(delta) < delta_enclosure(epsilon, high):
                return low.union(high)
    raise InvalidInput(f"no mu is resolved for epsilon = {epsilon!r}, delta = {delta!r}.")


def propose_mu(*, epsilon: float, delta: float) -> float:
    """A float near mu*(epsilon, delta): Newton's iteration on log delta over log mu, from a point that passes."""
    log_target = math.log(delta)
    z = math.sqrt(-2 * log_target)
    value = max(2 * epsilon / (z + math.sqrt(z * z + 2 * epsilon)), delta * 2.5)
    for _ in range(80):
        u = epsilon / value - value / 2
        log_value = log_delta(u, value)
        slope = value * math.exp(min(-u * u / 2 - _LOG_SQRT_TWO_PI - log_value, 700.0))
        if not slope > 0:
            break
        move = max(-1.0, min(1.0, (log_target - log_value) / slope))
        value *= math.exp(move)
        if abs(move) < 1e-15:
            break
    return value


def propose_epsilon(*, delta: float, mu: float) -> float:
    """A float near the epsilon of mu-GDP at delta: Newton's iteration in u = epsilon/mu - mu/2, from the right."""
    log_target = math.log(delta)
    u = math.sqrt(-2 * log_target)
    for _ in range(80):
        log_value = log_delta(u, mu)
        slope = mu * math.exp(min(-u * u / 2 - _LOG_SQRT_TWO_PI - log_value, 700.0)) * _mills(u + mu)
        if not slope > 0:
            break
        move = max(-2.0, min(2.0, (log_value - log_target) / slope))
        u = max(u + move, -mu / 2)
        if abs(move) < 1e-15 * (1 + abs(u)):
            break
    return mu * (u + mu / 2)


def log_delta(u: float, mu: float) -> float:
    """log delta in floats at u = epsilon/mu - mu/2, free of cancellation.

    phi(u) times the drop of the Mills ratio from u to u + mu.
    """
    if u <= 0:
        value = 0.5 * math.erfc(u / math.sqrt(2)) - math.exp(-u * u / 2 - _LOG_SQRT_TWO_PI) * _mills(u + mu)
        if value > 0.1:
            return math.log(value)
        if u < -20:
            return -math.inf if value <= 0 else math.log(value)
    if mu < 0.1:
        half, node = mu / 2, math.sqrt(0.6)
        centre = u + half
        drop = half * (5 * _slope(centre - half * node) + 8 * _slope(centre) + 5 * _slope(centre + half * node)) / 9
    else:
        drop = _mills(u) - _mills(u + mu)
    return -u * u / 2 - _LOG_SQRT_TWO_PI + math.log(drop) if drop > 0 else -math.inf


def _mills(x: float) -> float:
    """(1 - Phi(x)) / phi(x), finite for x > -37."""
    if x < 25:
        return math.sqrt(math.pi / 2) * math.exp(x * x / 2) * math.erfc(x / math.sqrt(2))
    return 1 / (x + _tail_fraction(x))


def _slope(x: float) -> float:
    """1 - x times the Mills ratio: minus its derivative."""
    if x < 25:
        return 1 - x * _mills(x)
    fraction = _tail_fraction(x)
    return fraction / (x + fraction)


def _tail_fraction(x: float) -> float:
    value = x
    for k in range(16, 1, -1):
        value = x + k / value
    return 1 / value


def check_epsilon(value: float, *, allow_zero: bool = False) -> None:
    """Raise InvalidInput unless epsilon is finite and positive (or zero, where that is allowed)."""
    if not (0 < value < math.inf) and not (allow_zero and value == 0):
        raise InvalidInput(f"epsilon must be a finite number > 0, got {value!r}.")


def check_delta(value: float) -> None:
    """Raise InvalidInput unless 0 < delta < 1."""
    if not 0 < value < 1:
        raise InvalidInput(f"delta must be in (0, 1), got {value!r}.")


def check_mu(value: float) -> None:
    """Raise InvalidInput unless mu is finite and not negative."""
    if not 0 <= value < math.inf:
        raise InvalidInput(f"mu must be a finite number >= 0, got {value!r}.")
