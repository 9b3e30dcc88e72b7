"""Renyi curves and their conversions to (epsilon, delta).

A curve gives e(alpha), a bound on the Renyi divergence of order alpha > 1 in both directions. For every alpha > 1

    epsilon = e(alpha) + ln(1/delta)/(alpha - 1)                                       Mironov 2017, arXiv:1702.07476
    epsilon = e(alpha) + ln((alpha - 1)/alpha) - (ln delta + ln alpha)/(alpha - 1)     Canonne-Kamath-Steinke 2020,
                                                       arXiv:2004.00010, and Balle et al. 2020, arXiv:1905.09982

so any order is valid and the best one is only a matter of searching; the second is smaller at every order. Orders are
optimised on a continuous axis, ln(alpha - 1), never on a list. Negative results count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from flint import arb

from rdp_calc.reals import ball
from rdp_calc.search import minimise

Conversion = Literal["mironov", "improved"]

LOG_ORDER_RANGE = (-35.0, 75.0)


def delta_at_order(divergence: arb, alpha: float, epsilon: float, conversion: Conversion = "mironov") -> arb:
    """delta at one order, never above 1."""
    order = ball(alpha)
    log_delta = (order - 1) * (divergence - ball(epsilon))
    if conversion == "improved":
        log_delta += (order - 1) * (1 - 1 / order).log() - order.log()
    return log_delta.exp().min(arb(1))


def rest(alpha: float, order: float, conversion: Conversion) -> float:
    """What the conversion adds to e(alpha) besides ln(1/delta)/(alpha - 1), in floats; order is alpha - 1."""
    if conversion == "mironov":
        return 0.0
    return -math.log1p(1 / order) - math.log(alpha) / order


def best_order_for_delta(curve: Callable[[float], float], epsilon: float, conversion: Conversion = "mironov") -> float:
    """A float order that nearly minimises delta at ``epsilon``; ``curve`` is e(alpha) in floats."""
    return _order(lambda alpha, order: order * (curve(alpha) - epsilon + rest(alpha, order, conversion)))


def best_order_for_epsilon(curve: Callable[[float], float], delta: float, conversion: Conversion = "mironov") -> float:
    """A float order that nearly minimises epsilon at ``delta``."""
    log_inverse = -math.log(delta)
    return _order(lambda alpha, order: curve(alpha) + log_inverse / order + rest(alpha, order, conversion))


def epsilon_at_order(divergence: float, alpha: float, delta: float, conversion: Conversion = "mironov") -> float:
    """epsilon at one order in floats, at least 0."""
    order = alpha - 1
    return max(divergence - math.log(delta) / order + rest(alpha, order, conversion), 0.0)


def largest_linear_rate(epsilon: float, delta: float, conversion: Conversion) -> tuple[float, float]:
    """The largest rho for which e(alpha) = rho alpha gives (epsilon, delta), and the order that shows it, in floats."""
    log_inverse = -math.log(delta)

    def minus_log_rate(alpha: float, order: float) -> float:
        room = epsilon - log_inverse / order - rest(alpha, order, conversion)
        return math.log(alpha) - math.log(room) if room > 0 else 1e3 - room

    alpha = _order(minus_log_rate)
    return math.exp(-minus_log_rate(alpha, alpha - 1)), alpha


def _order(objective: Callable[[float, float], float]) -> float:
    log_order = minimise(lambda x: objective(1 + math.exp(x), math.exp(x)), *LOG_ORDER_RANGE)
    return 1 + math.exp(log_order)
