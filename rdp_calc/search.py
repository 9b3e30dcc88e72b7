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


def smallest_passing_integer(
    passes: Callable[[int], bool], *, ceiling: int, floor: int = 0, proposal: int | None = None
) -> tuple[int, int | None] | None:
    """The smallest integer in [floor, ceiling] at which a monotone ``passes`` holds, and the failing one before it.

    Doubling from ``proposal`` (or 0), then bisection: at most 2 log2(ceiling) evaluations. None when the ceiling fails.
    """
    passing, failing = ceiling, floor - 1
    start, step = max(floor, min(proposal or floor, ceiling)), 1
    if passes(start):
        passing = start
        while passing > floor:
            trial = max(passing - step, floor)
            if not passes(trial):
                failing = trial
                break
            passing, step = trial, 2 * step
    else:
        failing = start
        while True:
            if failing >= ceiling:
                return None
            trial = min(failing + step, ceiling)
            if passes(trial):
                passing = trial
                break
            failing, step = trial, 2 * step
    while passing - failing > 1:
        middle = (passing + failing) // 2
        if passes(middle):
            passing = middle
        else:
            failing = middle
    return passing, None if failing < floor else failing


def minimise(function: Callable[[float], float], low: float, high: float) -> float:
    """The argument of the smallest value of ``function`` on [low, high]: a grid, then Brent's method.

    For one-dimensional proposals (a Renyi order on a logarithmic axis); the caller proves the value it uses.
    """
    count = 32
    step = (high - low) / count
    values = [function(low + step * i) for i in range(count + 1)]
    best = min(range(count + 1), key=values.__getitem__)
    a, b = low + step * max(best - 1, 0), low + step * min(best + 1, count)
    x = w = v = low + step * best
    fx = fw = fv = values[best]
    move = before = 0.0
    golden = (3 - math.sqrt(5)) / 2
    for _ in range(64):
        middle, tolerance = (a + b) / 2, 1e-9 * (1 + abs(x))
        if abs(x - middle) <= 2 * tolerance - (b - a) / 2:
            break
        parabola = 0.0
        if abs(before) > tolerance:
            # Through the three best points; a step is taken only inside the bracket and while steps shrink.
            r, q = (x - w) * (fx - fv), (x - v) * (fx - fw)
            p, q = (x - v) * q - (x - w) * r, 2 * (q - r)
            parabola = p / -q if q and math.isfinite(p / q) else 0.0
        usable = parabola != 0.0 and abs(parabola) < abs(before / 2) and a < x + parabola < b
        before = move if usable else (b - x if x < middle else a - x)
        move = parabola if usable else golden * before
        u = x + (move if abs(move) >= tolerance else math.copysign(tolerance, move))
        fu = function(u)
        if fu <= fx:
            a, b = (x, b) if u >= x else (a, x)
            v, fv, w, fw, x, fx = w, fw, x, fx, u, fu
        else:
            a, b = (u, b) if u < x else (a, u)
            if fu <= fw or w == x:
                v, fv, w, fw = w, fw, u, fu
            elif fu <= fv or v in (x, w):
                v, fv = u, fu
    return x


def minimise_integer(function: Callable[[int], float], high: int) -> int:
    """An integer in [0, high] at which ``function`` is nearly smallest: powers of two, then golden section.

    Exact for a function with one valley. For proposals; the caller proves the value it uses.
    """
    values: dict[int, float] = {}

    def at(x: int) -> float:
        if x not in values:
            values[x] = function(x)
        return values[x]

    grid = sorted({0, high, *(2**i for i in range(high.bit_length()))})
    best = min(range(len(grid)), key=lambda i: at(grid[i]))
    low, top = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    while top - low > 8:
        third = max(1, int((top - low) * 0.381966))
        if at(low + third) <= at(top - third):
            top -= third
        else:
            low += third
    return min(range(low, top + 1), key=at)


def root(function: Callable[[float], float], start: float) -> float:
    """A positive x at which a falling ``function`` of ln x crosses zero, in floats: a bracket, then regula falsi.

    Returns infinity (or the smallest normal double) where it does not cross. For proposals.
    """
    low = high = math.log(start)
    value_low = value_high = function(start)
    step = 1.0
    while value_high > 0:
        low, value_low = high, value_high
        high, step = high + step, 2 * step
        if high > 709:
            return math.inf
        value_high = function(math.exp(high))
    step = 1.0
    while value_low <= 0:
        high, value_high = low, value_low
        low, step = low - step, 2 * step
        if low < -708:
            return SMALLEST_NORMAL
        value_low = function(math.exp(low))
    side = 0
    for count in range(100):
        if high - low <= 1e-14 * (1 + abs(high)):
            break
        middle = (low + high) / 2
        if count % 3 < 2 and math.isfinite(value_low) and math.isfinite(value_high) and value_low > value_high:
            middle = min(max(low + (high - low) * value_low / (value_low - value_high), low), high)
        if middle in (low, high):
            middle = (low + high) / 2
        value = function(math.exp(middle))
        if value > 0:
            low, value_low = middle, value
            value_high = value_high / 2 if side == 1 else value_high
            side = 1
        else:
            high, value_high = middle, value
            value_low = value_low / 2 if side == -1 else value_low
            side = -1
        if value == 0:
            break
    return math.exp(high)
