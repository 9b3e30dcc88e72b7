"""Searches over a proved predicate: what they return was itself evaluated and passed.

The predicate is trusted, the proposal is not: a poor proposal costs evaluations, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rdp_calc.reals import SMALLEST_NORMAL

LARGEST = 1.7976931348623157e308
_FIRST_STEP = 2.0**-51


@dataclass(frozen=True)
class Found:
    """A passing value and its failing neighbour (None where every admissible smaller value passes)."""

    value: float
    failing: float | None


def smallest_passing(passes: Callable[[float], bool], proposal: float) -> Found | None:
    """The smallest positive double at which ``passes`` holds; its failing neighbour is the double before it.

    ``passes`` must be monotone: false below some threshold, true above. Starting from ``proposal`` the search gallops
    with doubling relative steps until it has a passing and a failing value, then bisects geometrically; at most about
    130 evaluations. Returns None when even the largest double fails.
    """
    start = min(max(proposal, SMALLEST_NORMAL), LARGEST) if proposal > 0 else SMALLEST_NORMAL
    step = _FIRST_STEP
    passing = failing = start
    if passes(start):
        while True:
            if passing <= SMALLEST_NORMAL:
                return Found(SMALLEST_NORMAL, None)
            failing = max(passing * math.exp(-step), SMALLEST_NORMAL)
            if failing >= passing:
                failing = math.nextafter(passing, 0.0)
            if not passes(failing):
                break
            passing, step = failing, 2 * step
    else:
        while True:
            if failing >= LARGEST:
                return None
            passing = failing * math.exp(step) if math.log(failing) + step < 709.7 else LARGEST
            if passing <= failing:
                passing = math.nextafter(failing, math.inf)
            if passes(passing):
                break
            failing, step = passing, 2 * step
    while True:
        apart = passing > 2 * failing
        middle = math.sqrt(passing) * math.sqrt(failing) if apart else failing + (passing - failing) / 2
        if not failing < middle < passing:
            break
        if passes(middle):
            passing = middle
        else:
            failing = middle
    return Found(passing, failing)


def smallest_passing_integer(passes: Callable[[int], bool], *, ceiling: int) -> tuple[int, int | None] | None:
    """The smallest integer in [0, ceiling] at which a monotone ``passes`` holds, with the failing integer before it.

    Doubling, then bisection: at most 2 log2(ceiling) evaluations. Returns None when the ceiling fails.
    """
    if passes(0):
        return 0, None
    failing, passing = 0, 1
    while not passes(passing):
        if passing >= ceiling:
            return None
        failing, passing = passing, min(2 * passing, ceiling)
    while passing - failing > 1:
        middle = (passing + failing) // 2
        if passes(middle):
            passing = middle
        else:
            failing = middle
    return passing, failing


def minimise(function: Callable[[float], float], low: float, high: float) -> float:
    """The argument of the smallest value of ``function`` on [low, high]: a grid of 48 points, then golden section.

    For one-dimensional proposals (a Renyi order on a logarithmic axis); the caller proves the value it uses.
    """
    count = 48
    grid = [low + (high - low) * i / count for i in range(count + 1)]
    values = [function(x) for x in grid]
    best = min(range(count + 1), key=values.__getitem__)
    a, b = grid[max(best - 1, 0)], grid[min(best + 1, count)]
    ratio = (math.sqrt(5) - 1) / 2
    x1, x2 = b - ratio * (b - a), a + ratio * (b - a)
    f1, f2 = function(x1), function(x2)
    for _ in range(64):
        if b - a <= 1e-9 * (1 + abs(a)):
            break
        if f1 <= f2:
            b, x2, f2 = x2, x1, f1
            x1 = b - ratio * (b - a)
            f1 = function(x1)
        else:
            a, x1, f1 = x1, x2, f2
            x2 = a + ratio * (b - a)
            f2 = function(x2)
    return x1 if f1 <= f2 else x2
