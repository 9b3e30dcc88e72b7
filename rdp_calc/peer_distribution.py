"""delta of DP-SGD by dp-accounting's privacy-loss distributions, where they resolve an answer (``docs/theory/pld.md``).

The package is imported where it is used: it is slow to import.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from rdp_calc.errors import NotApplicable

#: dp-accounting takes part where its grid exponent, and so the cancelling of its differences, allows it.
_LEAST_EXPONENT = -10
_LEAST_DELTA = 1e-12
#: Limits of one evaluation by dp-accounting: points of one step, losses of a mixture (each is halved down to 1e-6 in
#: turn; 2^19 take ten seconds), points times members, points of the sum.
_MOST_CELLS = 2**20
_MOST_LOSSES = 2**19
_MOST_MIXTURE_CELLS = 2**25
_MOST_POINTS = 2**22
_LOG_STEP_TAIL = -50.0


def resolved_delta(steps: int) -> float:
    """The smallest delta that dp-accounting's untilted transform of ``steps`` steps tells from its own rounding."""
    return max(_LEAST_DELTA, steps * 2.0**-52)


def accounted_delta(
    noise: float, group_size: int, rate: float, steps: int, epsilon: float, exponent: int
) -> float | None:
    """delta at ``epsilon`` by dp-accounting, both directions; None where it resolves no answer.

    Counts that a batch exceeds with probability at most T are left out of the mixture w, which becomes w' with
    w >= (1 - T) w'. Removing the group then loses at most steps x T of delta; adding it, where the mixture comes
    second, is read at epsilon + steps ln(1 - T). Counts below the smallest kept are raised to it.
    """
    import warnings

    import numpy as np

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        law = composed(noise, group_size, rate, steps, exponent)
        if law is None:
            return None
        cut = steps * _member_tail(steps) if group_size > 1 and rate < 1 else 0.0
        read_at = math.nextafter(epsilon - 2 * cut, -math.inf) if cut else epsilon
        value = float(law.get_delta_for_epsilon(read_at)) + cut
    return min(value, 1.0) if math.isfinite(value) else None


def _member_tail(steps: int) -> float:
    """T, so small that steps x T is below 1e-6 of every delta that is resolved."""
    return 1e-6 * resolved_delta(steps) / steps


@lru_cache(maxsize=2)
def composed(noise: float, group_size: int, rate: float, steps: int, exponent: int) -> Any:
    """dp-accounting's pessimistic distribution of the whole training, or None where it has none to offer."""
    from dp_accounting.pld import privacy_loss_distribution  # type: ignore[import-untyped]

    from rdp_calc import loss_of_step

    spacing = math.ldexp(loss_of_step.SPACING, exponent)
    try:
        if exponent < _LEAST_EXPONENT or not _within_reach(noise, group_size, rate, steps, exponent):
            return None
        if group_size == 1:
            step = privacy_loss_distribution.from_gaussian_mechanism(
                noise, sampling_prob=rate, value_discretization_interval=spacing
            )
        else:
            # Two cuts of a third of T, so that rounding and the members never listed have the rest.
            counts, masses = loss_of_step.members(group_size, rate, math.log(_member_tail(steps) / 3))
            step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
                noise, counts, masses / masses.sum(), value_discretization_interval=spacing
            )
        return step.self_compose(steps)
    except (ArithmeticError, ValueError, MemoryError, NotApplicable):
        return None


def _within_reach(noise: float, group_size: int, rate: float, steps: int, exponent: int) -> bool:
    """Whether the arrays that dp-accounting would form are of a size to work with, judged by our own step."""
    from dp_accounting.pld import common

    from rdp_calc import loss_of_step

    for law in loss_of_step.one_step(noise, group_size, rate, exponent, _LOG_STEP_TAIL):
        size = law.masses.size
        if size > _MOST_CELLS:
            return False
        if group_size > 1:
            counts, _ = loss_of_step.members(group_size, rate, math.log(_member_tail(steps) / 3))
            halvings = math.log2(max((20 * noise + float(counts[-1])) / size / 1e-6, 2.0))
            if size * halvings > _MOST_LOSSES or size * counts.size > _MOST_MIXTURE_CELLS:
                return False
        # A few of its own Chernoff orders: the window of all of them is not larger.
        orders = [sign * order / size for order in (1, 4, 16) for sign in (1, -1)]
        low, high = common.compute_self_convolve_bounds(law.masses, steps, 1e-15, orders)
        if high - low > _MOST_POINTS:
            return False
    return True
