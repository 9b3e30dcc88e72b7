"""Searches whose evaluations take seconds: a passing value and a failing one close enough, by few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable

from rdp_calc.errors import NotApplicable
from rdp_calc.search import Found

_MOST_REFUSALS = 8


def settle(excess: Callable[[float], float], start: float, slope: float, width: float) -> Found | None:
    """A passing value and a failing one at most ``width`` (relative) below it, by few evaluations.

    ``start`` and ``slope`` are those of a function close to ``excess``. The two are put on either side of the crossing
    with room, so that another evaluation of the same quantity, whose last digits differ, tells them apart too.
    """
    crossing = math.log(start) - excess(start) / slope
    if abs(crossing) < 700:
        passing, failing = (math.exp(crossing + side * 0.4 * width) for side in (1, -1))
        if excess(passing) <= 0 < excess(failing):
            return Found(passing, failing)
    solved = straddle(excess, start, 0.99 * width, slope)
    return None if solved is None else solved[0]


def straddle(
    excess: Callable[[float], float], start: float, tolerance: float, slope: float
) -> tuple[Found, float] | None:
    """A passing positive value and a failing one at most ``tolerance`` (relative) below it, both evaluated.

    ``excess`` falls with ln of the value and is at most 0 where it passes; ``slope`` is a guess of its derivative, and
    the last one is returned with the answer. Secant steps that aim past the crossing. None where no double passes.
    """
    position = math.log(start)
    passing: tuple[float, float] | None = None
    failing: tuple[float, float] | None = None
    last: tuple[float, float] | None = None
    push, widths = tolerance / 3, [math.inf]
    refusals: list[NotApplicable] = []
    for _ in range(400):
        if position > 709:
            if refusals:
                raise refusals[0]
            return None
        value = math.exp(position)
        try:
            amount = excess(value)
        except NotApplicable as refusal:
            refusals.append(refusal)
            if len(refusals) > _MOST_REFUSALS:
                raise
            # A value too small for the grid of this search lies on the failing side.
            amount, last = math.inf, None
        if math.isnan(amount):
            raise NotApplicable("the privacy-loss distribution gave no number.")
        if amount <= 0:
            passing = (position, value)
        else:
            failing = (position, value)
        if amount < math.inf:
            if last is not None and position != last[0] and amount != last[1]:
                slope = min((amount - last[1]) / (position - last[0]), -1e-3)
            last = (position, amount)
            position -= min(max(amount / slope, -1.0), 1.0)
        else:
            position += 1.0
        if passing is not None and failing is not None:
            width = passing[0] - failing[0]
            if width <= 0:
                # Rounding, or grids that differ: a failing value above a passing one settles nothing.
                passing, width = None, math.inf
                push = tolerance / 3
            elif width <= tolerance and amount < math.inf:
                return Found(passing[1], failing[1]), slope
        if passing is not None and failing is not None:
            width = passing[0] - failing[0]
            if len(widths) > 3 and width > widths[-3] / 2:
                position = (passing[0] + failing[0]) / 2
            position = min(
                max(position, failing[0] + min(tolerance, width) / 3), passing[0] - min(tolerance, width) / 3
            )
            widths.append(width)
        elif passing is not None:
            position, push = min(position, passing[0]) - push, 4 * push
            if position < -690:
                return Found(passing[1], None), slope
        elif failing is not None:
            position, push = max(position, failing[0]) + push, 4 * push
    raise NotApplicable(f"the search around {start!r} did not settle; use --bound rdp.")
