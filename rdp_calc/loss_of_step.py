"""The privacy loss of one step of DP-SGD for a group of records, discretised upwards.

One step, in the direction of the group's clipped gradients and in units of the clip norm, is worst

    P0 = N(0, z^2)   against   P1 = sum_i w_i N(i, z^2),   w = Binomial(k, q)

(Ganesh 2024, arXiv:2401.10294; Choquette-Choo et al. 2023, arXiv:2310.15526), with privacy loss
L(x) = ln P1/P0 (x), which rises with x. Removing the group compares P1 with P0, adding it P0 with P1, and both are
computed. The law of the loss is moved to a grid by "connect the dots" (Doroshenko et al. 2022, arXiv:2207.04380): the
mass at a loss between two grid points is split between them so that its mass under both measures is kept, which can
only raise every hockey-stick divergence. (Theory page ``docs/theory/pld.md``.)

numpy is imported here, so this module is imported only inside functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special  # type: ignore[import-untyped]

from rdp_calc.errors import NotApplicable

Array = np.ndarray[Any, np.dtype[Any]]

#: Spacing of the loss grid at exponent 0; exponent j means 2^j times as much.
SPACING = 1e-4
LOG_TINY = -690.0
MOST_CELLS = 2**19

_MOST_MEMBERS = 2000
_PIECES_PER_STD = 32
_NODES, _WEIGHTS = (np.array(part) for part in np.polynomial.legendre.leggauss(3))


@dataclass(frozen=True)
class Law:
    """Masses of the loss at the grid points spacing (lowest + i), and the mass put at infinity."""

    spacing: float
    lowest: int
    masses: Array
    infinite: float


def members(group_size: int, rate: float, log_tail: float) -> tuple[Array, Array]:
    """Numbers of group members in a batch and their probabilities, but for a mass of exp(log_tail) at either end.

    The lower end is counted at the smallest number kept, which can only raise the loss; the upper is the caller's.
    """
    if rate == 1:
        return np.array([float(group_size)]), np.array([1.0])
    mean, room = group_size * rate, -log_tail + 5
    top = min(group_size, math.ceil(mean + room + math.sqrt(2 * mean * room)))
    if top > 50 * _MOST_MEMBERS:
        raise _too_many(mean)
    counts = np.arange(top, dtype=float)
    steps = np.log((group_size - counts) / (counts + 1)) + (math.log(rate) - math.log1p(-rate))
    log_masses = group_size * math.log1p(-rate) + np.concatenate(([0.0], np.cumsum(steps)))
    masses = np.exp(log_masses)
    total = math.fsum(masses)
    if not abs(total - 1) < 1e-8:
        raise NotApplicable(f"the number of group members in a batch has mass {total!r}, not 1; lower group_size.")
    masses /= total
    cut = math.exp(max(log_tail, LOG_TINY))
    first = int(np.searchsorted(np.cumsum(masses), cut))
    last = masses.size - int(np.searchsorted(np.cumsum(masses[::-1]), cut))
    kept = masses[first:last].copy()
    kept[0] += math.fsum(masses[:first])
    if kept.size > _MOST_MEMBERS:
        raise _too_many(mean)
    return np.arange(first, last, dtype=float), kept


def _too_many(mean: float) -> NotApplicable:
    return NotApplicable(
        f"a batch holds {mean:.3g} members of the group on average, too many for the privacy-loss distribution;"
        " lower group_size or batch_size, or use --bound rdp."
    )


class Mixture:
    """The loss L(x) of one step as a function of the released coordinate x."""

    def __init__(self, noise: float, group_size: int, rate: float, log_tail: float) -> None:
        self.noise = noise
        self.counts, self.probabilities = members(group_size, rate, log_tail)
        self.log_probabilities = np.log(self.probabilities)
        self.reach = noise * float(-special.ndtri_exp(log_tail))
        self.low = -self.reach
        self.high = self._upper_end(log_tail)

    def _upper_end(self, log_tail: float) -> float:
        """A point above which the mixture has a mass below exp(log_tail)."""
        low, high = self.counts[0], self.counts[-1] + self.reach
        for _ in range(60):
            middle = (low + high) / 2
            tails = self.log_probabilities + special.log_ndtr((self.counts - middle) / self.noise)
            low, high = (middle, high) if special.logsumexp(tails) > log_tail else (low, middle)
        return float(high)

    def loss(self, points: Array, *, slope: bool = False) -> tuple[Array, Array]:
        """L at ``points``, and its derivative where asked (else an empty array)."""
        values, slopes = np.empty(points.size), np.empty(points.size if slope else 0)
        chunk = max(1, 2**21 // self.counts.size)
        for start in range(0, points.size, chunk):
            part = slice(start, start + chunk)
            exponents = np.multiply.outer(self.counts, points[part])
            exponents -= (self.counts**2 / 2)[:, None]
            exponents /= self.noise
            exponents /= self.noise
            # Near 0 the logarithm of the sum would cancel; far from it expm1 would overflow.
            near = exponents.max(axis=0, initial=0.0) < 50.0
            small = self.probabilities @ np.expm1(np.minimum(exponents, 50.0))
            near &= np.abs(small) < 0.5
            exponents += self.log_probabilities[:, None]
            largest = exponents.max(axis=0)
            exponents -= largest
            np.exp(exponents, out=exponents)
            total = exponents.sum(axis=0)
            values[part] = np.where(near, np.log1p(np.where(near, small, 0.0)), largest + np.log(total))
            if slope:
                slopes[part] = (self.counts @ exponents) / total / self.noise / self.noise
        return values, slopes

    def lattice(self) -> Array:
        pieces = math.ceil((self.high - self.low) / self.noise * _PIECES_PER_STD)
        if pieces > 8 * MOST_CELLS:
            raise NotApplicable(
                f"noise_multiplier = {self.noise!r} is too small for the privacy-loss distribution; raise epsilon or"
                " use --bound rdp."
            )
        return np.linspace(self.low, self.high, pieces + 1)


@lru_cache(maxsize=12)
def one_step(noise: float, group_size: int, rate: float, exponent: int, log_tail: float) -> tuple[Law, Law]:
    """The discretised laws of the loss of one step: removing the group, adding it."""
    mixture = Mixture(noise, group_size, rate, log_tail)
    spacing = math.ldexp(SPACING, exponent)
    lattice = mixture.lattice()
    at_lattice, slopes = mixture.loss(lattice, slope=True)
    at_lattice = np.maximum.accumulate(at_lattice)
    bottom, top = math.floor(at_lattice[0] / spacing), math.ceil(at_lattice[-1] / spacing)
    top = max(top, bottom + 1)
    if top - bottom > 8 * MOST_CELLS:
        raise NotApplicable(f"a grid of {top - bottom} privacy losses is too large; raise epsilon or the noise.")
    inner = np.arange(bottom + 1, top) * spacing
    crossings = _invert(mixture, inner, lattice, at_lattice, slopes)
    ends = np.concatenate((lattice, crossings))
    order = np.argsort(ends, kind="stable")
    ends = ends[order]
    cells = np.cumsum(order >= lattice.size)[:-1]
    centres, halves = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    cells = np.repeat(cells, _NODES.size)
    points = (centres[:, None] + halves[:, None] * _NODES).ravel()
    widths = (halves[:, None] * _WEIGHTS).ravel()
    losses, _ = mixture.loss(points)
    log_density = -((points / noise) ** 2) / 2 - math.log(noise * math.sqrt(2 * math.pi))
    without = np.exp(log_density) * widths
    with_group = np.exp(log_density + losses) * widths
    offsets = np.clip(losses - (bottom + cells) * spacing, 0.0, spacing)
    # The share of the upper of two neighbours that keeps the mass under both measures.
    upwards = np.expm1(-offsets) / math.expm1(-spacing)
    downwards = np.expm1(offsets - spacing) / math.expm1(-spacing)
    number = top - bottom + 1
    remove = _gather(cells, with_group, upwards, number)
    add = _gather(cells, without, downwards, number, reverse=True)
    cut = math.exp(max(log_tail, LOG_TINY))
    # Of the cut masses the lower end counts at the lowest grid point above it, the upper end at infinity. Four cuts:
    # the noise, the number of members twice, and masses below the smallest double.
    return (
        _law(spacing, bottom, remove, float(np.exp(special.logsumexp(_below(mixture)))), 4 * cut),
        _law(spacing, -top, add, float(special.ndtr(-mixture.high / noise)), 4 * cut),
    )


def _below(mixture: Mixture) -> Array:
    below: Array = mixture.log_probabilities + special.log_ndtr((mixture.low - mixture.counts) / mixture.noise)
    return below


def _gather(cells: Array, masses: Array, shares: Array, number: int, *, reverse: bool = False) -> Array:
    """Masses at the grid points; ``shares`` goes to the end of the cell with the larger loss."""
    raised, kept = masses * shares, masses * (1 - shares)
    first, second = (raised, kept) if reverse else (kept, raised)
    gathered = np.bincount(cells, first, number) + np.bincount(cells + 1, second, number)
    return gathered[::-1] if reverse else gathered


def _law(spacing: float, lowest: int, masses: Array, lower_tail: float, infinite: float) -> Law:
    masses = masses.copy()
    # The lower tail's loss is below the second grid point, since the first one is rounded down from the end of the cut.
    masses[1] += lower_tail
    total = float(masses.sum())
    if not abs(total - 1) < 1e-9:
        raise NotApplicable(
            f"the privacy-loss distribution of one step has mass {total!r}, not 1: the problem is outside its range;"
            " use --bound rdp."
        )
    return Law(spacing, lowest, masses / total, infinite)


def _invert(mixture: Mixture, values: Array, lattice: Array, at_lattice: Array, slopes: Array) -> Array:
    """Points where the loss takes ``values``: Newton's iteration inside pieces of the lattice."""
    if values.size == 0:
        return values
    piece = np.clip(np.searchsorted(at_lattice, values) - 1, 0, lattice.size - 2)
    low, high = lattice[piece], lattice[piece + 1]
    rise = np.maximum(at_lattice[piece + 1] - at_lattice[piece], 1e-300)
    share = np.clip((values - at_lattice[piece]) / rise, 0.0, 1.0)
    # Cubic through the values and slopes at both ends, read as a function of the loss.
    step = high - low
    with np.errstate(divide="ignore", over="ignore"):
        first = np.minimum(rise / np.maximum(slopes[piece], 1e-300) / step, 3.0)
        second = np.minimum(rise / np.maximum(slopes[piece + 1], 1e-300) / step, 3.0)
    back = 1 - share
    cubic = share**2 * (3 - 2 * share) + first * share * back**2 - second * share**2 * back
    points = low + step * np.clip(cubic, 0.0, 1.0)
    open_ones = np.arange(values.size)
    for _ in range(40):
        losses, slope = mixture.loss(points[open_ones], slope=True)
        gap = losses - values[open_ones]
        # Newton's error is quadratic, so a move of 1e-7 leaves 1e-14.
        move = -gap / np.maximum(slope, 1e-300)
        here = points[open_ones]
        low[open_ones] = np.where(gap <= 0, np.maximum(low[open_ones], here), low[open_ones])
        high[open_ones] = np.where(gap >= 0, np.minimum(high[open_ones], here), high[open_ones])
        target = here + move
        outside = ~((target >= low[open_ones]) & (target <= high[open_ones]))
        points[open_ones] = np.where(outside, (low[open_ones] + high[open_ones]) / 2, target)
        open_ones = open_ones[np.abs(points[open_ones] - here) > 1e-7 * mixture.noise]
        if open_ones.size == 0:
            break
    return np.maximum.accumulate(points)
