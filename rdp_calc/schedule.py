"""Shifted composition of a long schedule in which every step has its own numbers, in extended floats with a margin.

Ball arithmetic at every one of a million steps would take minutes. Here floats propose the slopes of the greatest
convex minorant, and the spending a_t they give is made feasible by construction: with a margin theta that exceeds every
rounding error of the sums, a_t' = (1 - theta) a_t leaves z_t' >= theta w_t > 0, w_t the distance with nothing spent,
and the last step spends what is left. The energy of a', rounded up by its own error bound, is therefore a proof; it
exceeds the minimum by a relative 3 theta or so, about 1e-12 for a million steps where a long double has 64 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flint import arb

from rdp_calc.reals import ball

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Schedule:
    """Step t contracts by |1 - step_sizes[t] weight_decay|, shifts by 2 step_sizes[t] grad_clip and adds noise of
    standard deviation noise_ratios[t] (in units of the noise that is solved for) from points 2 init_clip apart."""

    step_sizes: np.ndarray
    noise_ratios: np.ndarray
    weight_decay: float
    grad_clip: float
    init_clip: float


#: Steps that share one scale in the search for a prefix.
_STRETCH = 2048

#: Longest schedule whose prefixes are all looked at.
_EVERY_PREFIX = 20_000


def best_prefix(schedule: Schedule) -> int:
    """A prefix of the schedule with the smallest mu, in floats: of all prefixes, or nearly so for a long schedule.

    Of a long one the chord D_t^2/V_t of a prefix is a lower bound of its energy (where no contraction is below 1e-2),
    equal to it where the minorant has one piece: the prefix with the smallest chord is the best one if its energy is no
    larger. Otherwise a few more are tried.
    """
    import numpy as np

    total = len(schedule.step_sizes)
    if total <= _EVERY_PREFIX:
        energies = _prefix_energies(schedule)
        return min(range(total), key=energies.__getitem__) + 1
    chords = _chords(schedule)
    best = int(np.argmin(chords)) + 1
    if energy_float(schedule, best) <= chords[best - 1] * (1 + 1e-9):
        return best
    trials = {best, total, *(max(1, best * k // 8) for k in (4, 6, 7)), min(total, best * 9 // 8)}
    return min(sorted(trials), key=lambda count: energy_float(schedule, count))


def _prefix_energies(schedule: Schedule) -> list[float]:
    """mu squared of every prefix in floats: the minorant of one prefix, one more step pushed for the next."""
    # Each block holds distance and variance in units of its own last step, the factor past it, and the energy so far.
    blocks: list[tuple[float, float, float, float]] = [(2 * schedule.init_clip, 0.0, 1.0, math.inf)]
    found = []
    for step, noise in zip(schedule.step_sizes.tolist(), schedule.noise_ratios.tolist(), strict=True):
        factor = abs(1 - step * schedule.weight_decay)
        distance, variance = 2 * step * schedule.grad_clip, noise * noise
        while blocks and blocks[-1][0] * variance >= distance * blocks[-1][1] * factor:
            before = blocks.pop()
            distance, variance = before[0] * factor + distance, before[1] * factor * factor + variance
            factor *= before[2]
        energy = (blocks[-1][3] if blocks else 0.0) + distance * distance / variance
        blocks.append((distance, variance, factor, energy))
        found.append(energy)
    return found


def _chords(schedule: Schedule) -> np.ndarray:
    """D_t^2/V_t of every prefix in floats; the scale is renewed in every stretch against underflow."""
    import numpy as np

    steps = np.asarray(schedule.step_sizes, dtype=np.longdouble)
    contraction = np.abs(1 - steps * schedule.weight_decay)
    shifts, variances = 2 * steps * schedule.grad_clip, np.asarray(schedule.noise_ratios, dtype=np.longdouble) ** 2
    distance, variance = np.longdouble(2 * schedule.init_clip), np.longdouble(0)
    found = np.empty(len(steps))
    for start in range(0, len(steps), _STRETCH):
        part = slice(start, start + _STRETCH)
        scale = np.cumprod(np.maximum(contraction[part], 1e-2))
        distances = distance + np.cumsum(shifts[part] / scale)
        spreads = variance + np.cumsum(variances[part] / scale**2)
        found[part] = distances**2 / spreads
        distance, variance = distances[-1] * scale[-1], spreads[-1] * scale[-1] ** 2
    return found


def energy_float(schedule: Schedule, count: int) -> float:
    """mu squared of the first ``count`` steps at noise 1, in floats."""
    return float(_spent(schedule, count)[0])


def mu_squared(schedule: Schedule, count: int) -> arb:
    """A ball above mu squared of the first ``count`` steps at noise 1: a feasible spending, its cost rounded up."""
    import numpy as np

    energy, spending, distance, variance = _spent(schedule, count)
    if not np.isfinite(energy):
        return arb.pos_inf()
    unit = float(np.finfo(np.longdouble).eps)
    terms = len(distance) + 8
    # Products of up to ``terms`` factors and sums of as many positive terms, each off by one rounding, with room to
    # spare; and the slopes come from doubles.
    margin = max(16 * terms * unit, 1e-13)
    reached, wanted = np.cumsum(distance)[:-1], np.cumsum(spending)[:-1]
    while np.any(reached * (1 - np.longdouble(margin) / 2) < wanted * (1 - np.longdouble(margin))):
        margin *= 4
        if margin > 1e-3:
            return arb.pos_inf()
    spent = (1 - np.longdouble(margin)) * spending
    total = distance.sum()
    spent[-1] = total - spent[:-1].sum() + np.longdouble(margin) * total
    value = float((spent**2 / variance).sum() * (1 + np.longdouble(margin)))
    # Clips near the largest double leave infinities behind, and no number that bounds anything.
    return ball(math.nextafter(value, math.inf)) if math.isfinite(value) else arb.pos_inf()


def _spent(schedule: Schedule, count: int) -> tuple[Any, Any, Any, Any]:
    """Energy, spending, distances and variances of the first ``count`` steps, in units of the last one."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return _spent_in_floats(schedule, count)


def _spent_in_floats(schedule: Schedule, count: int) -> tuple[Any, Any, Any, Any]:
    import numpy as np
    from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]

    real = np.longdouble
    steps = np.asarray(schedule.step_sizes[:count], dtype=real)
    noise = np.asarray(schedule.noise_ratios[:count], dtype=real)
    # Rounded up: mu grows with every contraction.
    contraction = np.abs(1 - steps * real(schedule.weight_decay))
    if schedule.weight_decay:
        contraction += 2 * np.finfo(real).eps
    after = _products_after(contraction)
    distance = 2 * steps * real(schedule.grad_clip) * after
    start = 2 * real(schedule.init_clip) * contraction[0] * after[0]
    # Far back, where a step no longer counts, its noise is given up and its distance handed on.
    cut = int(np.argmax(after > real(1e-140)))
    distance[cut] += start + distance[:cut].sum()
    distance, variance = distance[cut:], (noise[cut:] * after[cut:]) ** 2
    slopes = isotonic_regression(
        np.asarray(distance / variance, dtype=float), weights=np.asarray(variance, dtype=float)
    ).x
    spending = np.asarray(slopes, dtype=real) * variance
    # Pooling in doubles leaves each piece slightly off its own distance: rescale piece by piece.
    edges = np.flatnonzero(np.diff(slopes) != 0) + 1
    starts = np.concatenate(([0], edges))
    wanted, got = np.add.reduceat(distance, starts), np.add.reduceat(spending, starts)
    lengths = np.diff(np.concatenate((starts, [len(spending)])))
    spending = spending * np.repeat(wanted / np.where(got > 0, got, 1), lengths)
    return (spending**2 / variance).sum(), spending, distance, variance


def _products_after(contraction: np.ndarray) -> np.ndarray:
    """For each step the product of the contractions after it, in extended floats (underflow far back is harmless)."""
    import numpy as np

    reverse = np.cumprod(contraction[:0:-1])
    return np.concatenate((reverse[::-1], np.ones(1, dtype=contraction.dtype)))
