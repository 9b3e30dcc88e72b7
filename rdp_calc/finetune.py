"""What the noisy fine-tuning methods share: clip norms, steps that decay and shift, and the noise-minimising number."""

from __future__ import annotations

import math

from flint import arb

from rdp_calc.errors import InvalidInput
from rdp_calc.reals import Real, at_most, ball, enclose, precision, round_up
from rdp_calc.search import minimise_integer

_SEARCH_BITS = 128


def check_positive(name: str, value: float | None) -> None:
    """Raise InvalidInput unless the value is a finite number > 0."""
    if value is None or isinstance(value, bool) or not 0 < value < math.inf:
        raise InvalidInput(f"{name} must be a finite number > 0, got {value!r}.")


def check_not_negative(name: str, value: float) -> None:
    """Raise InvalidInput unless the value is a finite number >= 0."""
    if isinstance(value, bool) or not 0 <= value < math.inf:
        raise InvalidInput(f"{name} must be a finite number >= 0, got {value!r}.")


def contraction(step_size: float, weight_decay: float) -> arb:
    """c = |1 - gamma lambda| of x - gamma (clip(g) + lambda x)."""
    return abs(1 - ball(step_size) * ball(weight_decay))


def shift(step_size: float, grad_clip: float) -> arb:
    """s = 2 gamma C1: two clipped gradients differ by at most 2 C1."""
    return 2 * ball(step_size) * ball(grad_clip)


def clamp_norm(clamp: float, dimension: int) -> float:
    """C0 = v sqrt(d) of a clamp of every coordinate to +-v, rounded up."""
    return round_up(enclose(lambda: ball(clamp) * arb(dimension).sqrt(), accuracy_bits=100))


def unit_mu_squared(c: Real, s: Real, start: Real, steps: int) -> arb:
    """mu^2 of ``steps`` equal steps at noise 1 from points ``start`` apart: one chord, since the shift is constant."""
    factor = ball(c)
    if factor == 1:
        return (ball(start) + ball(s) * steps) ** 2 / steps
    power = factor**steps
    distance = ball(start) * power + ball(s) * (1 - power) / (1 - factor)
    return distance**2 * (1 - factor**2) / (1 - power**2)


def best_steps(
    *, init_clip: float, grad_clip: float, step_size: float, weight_decay: float, limit: int | None
) -> int | None:
    """The number of steps, at most ``limit``, at which equal steps need least noise; None where it falls for ever.

    C0/(gamma C1) without decay, ln(1 - lambda C0/C1)/ln(1 - gamma lambda) with lambda C0 < C1; the better neighbour.
    """
    decay = step_size * weight_decay
    c, s, start = contraction(step_size, weight_decay), shift(step_size, grad_clip), 2 * ball(init_clip)
    if not decay < 1:
        if limit is None:
            return None
        with precision(_SEARCH_BITS):
            return max(
                1, minimise_integer(lambda t: float(unit_mu_squared(c, s, start, t).mid()) if t else math.inf, limit)
            )
    if at_most(lambda: ball(grad_clip) - ball(weight_decay) * ball(init_clip), 0):
        return limit
    if weight_decay == 0 or decay == 0:
        ideal = init_clip / grad_clip / step_size if init_clip / grad_clip < step_size * 1e300 else math.inf
    else:
        ideal = math.log1p(-weight_decay * init_clip / grad_clip) / math.log1p(-decay)
    ideal = min(ideal, 1e15)
    candidates = {max(1, math.floor(ideal) + k) for k in (-1, 0, 1, 2)}
    if limit is not None:
        candidates = {min(candidate, limit) for candidate in candidates}
    with precision(_SEARCH_BITS):
        return min(sorted(candidates), key=lambda t: unit_mu_squared(c, s, start, t).mid())
