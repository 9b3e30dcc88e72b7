"""Hockey-stick contraction: how delta at one epsilon shrinks when every step maps into a bounded set and adds noise.

theta_e(r) = delta(e; r) of the Gaussian profile. A step into a set of diameter D with noise N(0, tau^2 I) gives

    delta' = theta_e(D/tau) delta     with e = ln(1 + (e^epsilon - 1)/delta)

(Balle-Barthe-Gaboardi-Geumlek 2019, arXiv:1905.13229, and Asoodeh-Diaz-Calmon 2020, arXiv:2012.11035; theory page
``docs/theory/contraction.md``). In balls delta itself is kept (their exponents have no limit), in floats its logarithm.
Past EXACT_STEPS the factor is frozen over stretches of steps: it only falls as delta does, so that is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from flint import arb

from rdp_calc.errors import InvalidInput
from rdp_calc.profiles.gaussian import check_epsilon, delta_enclosure, log_delta
from rdp_calc.reals import Real, ball, enclose, round_up

EXACT_STEPS = 10_000

_NEGLIGIBLE = arb(2) ** -100_000


def contract(start: arb, epsilon: float, ratio: Real, steps: int) -> arb:
    """delta after ``steps`` steps from delta ``start`` at ``epsilon``; ratio is D/tau."""
    delta, excess, r = start.min(arb(1)), ball(epsilon).expm1(), ball(ratio)
    if epsilon == 0:
        return delta * delta_enclosure(0, r) ** steps
    for count in stretches(steps):
        if delta < _NEGLIGIBLE:
            # Beyond any use, and soon beyond what balls can hold; a factor never exceeds 1.
            return delta
        factor = delta_enclosure((excess / delta).log1p(), r)
        delta *= factor if count == 1 else factor**count
    return delta


def advantage(*, epsilon: float, delta: float) -> float:
    """The largest TPR - FPR of any test between two laws that are (epsilon, delta)-indistinguishable in both
    directions, (e^epsilon - 1 + 2 delta) / (e^epsilon + 1), rounded up.

    Where TPR <= e^epsilon FPR + delta meets 1 - FPR <= e^epsilon (1 - TPR) + delta. Valid for finite epsilon >= 0 and
    delta in [0, 1]; in [0, 1]. Raises InvalidInput otherwise. (Kairouz-Oh-Viswanath 2015, arXiv:1311.0776,
    section 2.)
    """
    check_epsilon(epsilon, allow_zero=True)
    if not 0 <= delta <= 1:
        raise InvalidInput(f"delta must be in [0, 1], got {delta!r}.")
    # 1 - 2 (1 - delta)/(e^epsilon + 1): one exponential, and no quotient of two large ones.
    found = enclose(lambda: 1 - 2 * (1 - ball(delta)) / (ball(epsilon).exp() + 1))
    return min(round_up(found), 1.0)


def log_contract(log_start: float, epsilon: float, ratio: float, steps: int) -> float:
    """ln of ``contract`` in floats."""
    log_excess = log_expm1(epsilon)
    value, half = log_start, ratio / 2
    for count in stretches(steps):
        gain = log_excess - value
        e = gain + math.log1p(math.exp(-gain)) if gain > 0 else math.log1p(math.exp(gain))
        value += count * log_delta(e / ratio - half, ratio)
        if value == -math.inf:
            break
    return value


def log_step(log_value: float, log_excess: float, ratio: float) -> float:
    """One step of ``log_contract``; log_excess is ln(e^epsilon - 1)."""
    gain = log_excess - log_value
    e = gain + math.log1p(math.exp(-gain)) if gain > 0 else math.log1p(math.exp(gain))
    return log_value + log_delta(e / ratio - ratio / 2, ratio)


def log_expm1(epsilon: float) -> float:
    """ln(e^epsilon - 1) in floats, minus infinity at 0."""
    if epsilon <= 0:
        return -math.inf
    return epsilon + math.log(-math.expm1(-epsilon))


def stretches(steps: int) -> Iterator[int]:
    """Lengths of the stretches over which the factor is kept: 1 for EXACT_STEPS steps, then one in 100 of the past."""
    done = 0
    while done < steps:
        count = 1 if done < EXACT_STEPS else min(done // 100, steps - done)
        yield count
        done += count
