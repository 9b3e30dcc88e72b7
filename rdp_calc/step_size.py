"""Step sizes: a number, or the literal 1/L."""

from __future__ import annotations

import math

from rdp_calc import losses
from rdp_calc.options import Option, read_float
from rdp_calc.reals import at_most, ball

STEP_SIZE_OPTION = Option(
    name="step_size", kind="text", help="Step size eta: a number or 1/L (default 2/(smoothness + strong-convexity))."
)


def read_step_size(value: str | float | None, constants: losses.Constants) -> float:
    """A step size from a number, its text, the literal 1/L, or None (2 / (smoothness + strong_convexity)).

    1/L gives the largest double whose product with the smoothness is at most 1.
    """
    if value is None:
        return 2 / (constants.smoothness + constants.strong_convexity)
    if isinstance(value, str):
        if value.strip() == "1/L":
            step = math.nextafter(1 / constants.smoothness, math.inf)
            while not product_at_most_one(step, constants.smoothness):
                step = math.nextafter(step, 0.0)
            return step
        return read_float("--step-size", value)
    return value


def product_at_most_one(first: float, second: float) -> bool:
    """Whether the exact product of two doubles is at most 1."""
    return at_most(lambda: ball(first) * ball(second), 1)
