"""Renyi curves and their conversion to (epsilon, delta).

A curve gives e(alpha), a bound on the Renyi divergence of order alpha > 1 in both directions. Mironov 2017
(arXiv:1702.07476, Proposition 3): (e(alpha) + ln(1/delta)/(alpha - 1), delta)-DP for every alpha > 1, so any order is
valid and the best one is only a matter of searching. Orders are optimised on a continuous axis, ln(alpha - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flint import arb

from rdp_calc.reals import ball
from rdp_calc.search import minimise

LOG_ORDER_RANGE = (-35.0, 75.0)


def delta_at_order(divergence: arb, alpha: float, epsilon: float) -> arb:
    """Mironov's delta at one order: exp((alpha - 1)(e(alpha) - epsilon)), never above 1."""
    return ((ball(alpha) - 1) * (divergence - ball(epsilon))).exp().min(arb(1))


def best_order_for_delta(curve: Callable[[float], float], epsilon: float) -> float:
    """A float order that nearly minimises delta at ``epsilon``; ``curve`` is e(alpha) in floats."""
    return _order(lambda alpha, order: order * (curve(alpha) - epsilon))


def best_order_for_epsilon(curve: Callable[[float], float], delta: float) -> float:
    """A float order that nearly minimises epsilon at ``delta``."""
    log_inverse = -math.log(delta)
    return _order(lambda alpha, order: curve(alpha) + log_inverse / order)


def _order(objective: Callable[[float, float], float]) -> float:
    log_order = minimise(lambda x: objective(1 + math.exp(x), math.exp(x)), *LOG_ORDER_RANGE)
    return 1 + math.exp(log_order)
