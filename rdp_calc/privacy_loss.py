"""Privacy-loss distribution of DP-SGD for a group of records, discretised upwards and composed in log space.

One step, in the direction of the group's clipped gradients and in units of the clip norm, is worst

    P0 = N(0, z^2)   against   P1 = sum_i w_i N(i, z^2),   w = Binomial(k, q)

(Ganesh 2024, arXiv:2401.10294; Choquette-Choo et al. 2023, arXiv:2310.15526), with privacy loss
L(x) = ln P1/P0 (x), which rises with x. Removing the group compares P1 with P0, adding it P0 with P1, and both are
computed. The law of the loss is moved to a grid by "connect the dots" (Doroshenko et al. 2022, arXiv:2207.04380): the
mass at a loss between two grid points is split between them so that its mass under both measures is kept, which can
only raise every hockey-stick divergence. The n-fold convolution is a Fourier transform of the exponentially tilted
law, so small deltas keep their relative accuracy (theory page ``docs/theory/pld.md``).

numpy is imported here, so this module is imported only inside functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import fft, special  # type: ignore[import-untyped]

from rdp_calc.errors import NotApplicable

Array = np.ndarray[Any, np.dtype[Any]]

#: Spacing of the loss grid at exponent 0; exponent j means 2^j times as much.
SPACING = 1e-4
#: A coarse grid is so many powers of two wider.
COARSE = 3
SMALLEST_DELTA = 1e-280
MOST_STEPS = 10**9

_EXPONENTS = range(-80, 200)
#: Logarithms of the mass cut off one step, tried in turn until the cut does not show in delta.
_TAILS = (-80.0, -220.0, -660.0)
_LOG_TINY = -690.0
_MOST_CELLS = 2**19
_MOST_POINTS = 2**21
_MOST_MEMBERS = 2000
_PIECES_PER_STD = 32
_NODES, _WEIGHTS = (np.array(part) for part in np.polynomial.legendre.leggauss(3))
_ROUNDING = 2.0**-52
#: ln of the mass that may leave the window of the transform, relative to the sum that is formed there.
_LOG_WRAPPED = -40.0


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
    cut = math.exp(max(log_tail, _LOG_TINY))
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
        if pieces > 8 * _MOST_CELLS:
            raise NotApplicable(
                f"noise_multiplier = {self.noise!r} is too small for the privacy-loss distribution; raise epsilon or"
                " use --bound rdp."
            )
        return np.linspace(self.low, self.high, pieces + 1)


def natural_exponent(noise: float, group_size: int, rate: float, steps: int) -> int:
    """The grid to use: 1e-4 unless one step loses much less than that, or the range would need too many points."""
    mixture = Mixture(noise, group_size, rate, _TAILS[0])
    points = mixture.lattice()
    losses, _ = mixture.loss(points)
    width = (mixture.high - mixture.low) / (points.size - 1)
    density = np.exp(losses - (points / noise) ** 2 / 2) / (noise * math.sqrt(2 * math.pi)) * width
    mean = float(density @ losses)
    variance, fine = max(float(density @ (losses - mean) ** 2), 1e-300), 0
    # The grid adds to the variance of one loss what it takes to move it to its two neighbours.
    while fine > _EXPONENTS[0]:
        spacing = math.ldexp(SPACING, fine)
        if float(density @ np.minimum(np.abs(losses), spacing / 4)) * spacing <= variance / 4096:
            break
        fine -= 1
    cells = math.ceil(math.log2((losses[-1] - losses[0]) / _MOST_CELLS / SPACING))
    exponent = min(max(fine, cells, _EXPONENTS[0]), _EXPONENTS[-1])
    widths = []
    for law in one_step(noise, group_size, rate, exponent + COARSE, _TAILS[0]):
        low, high = _reach(law, steps)
        widths.append(high - low)
    return max(exponent, min(math.ceil(math.log2(max(widths) / _MOST_POINTS / SPACING)), _EXPONENTS[-1]))


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
    if top - bottom > 8 * _MOST_CELLS:
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
    cut = math.exp(max(log_tail, _LOG_TINY))
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


def log_delta(noise: float, group_size: int, rate: float, steps: int, epsilon: float, exponent: int) -> float:
    """ln of an upper bound on delta at ``epsilon`` after ``steps`` steps, the larger of both directions.

    Raises NotApplicable where the discretisation cannot resolve it.
    """
    if exponent not in _EXPONENTS:
        raise NotApplicable(f"a loss grid of {SPACING} x 2^{exponent} is outside its range.")
    if steps > MOST_STEPS:
        raise NotApplicable(
            f"the privacy-loss distribution covers at most {MOST_STEPS} steps, got {steps}; use --bound rdp."
        )
    value = 0.0
    for log_tail in _TAILS:
        laws = one_step(noise, group_size, rate, exponent, log_tail)
        value = max(_compose(law, steps, epsilon) for law in laws)
        cut = math.log(steps) + math.log(laws[0].infinite)
        if cut < value - 20:
            break
    if math.isnan(value):
        raise NotApplicable("the privacy-loss distribution gave no number; use --bound rdp.")
    return min(value, 0.0)


def _compose(law: Law, steps: int, epsilon: float) -> float:
    """ln of the hockey-stick divergence at ``epsilon`` of ``steps`` independent losses, rounded up."""
    log_infinite = math.log(-math.expm1(steps * math.log1p(-law.infinite)))
    positive, masses = _raised(law, steps)
    log_masses = np.log(masses)
    losses = (law.lowest + positive) * law.spacing
    if steps * float(losses[-1]) <= epsilon:
        return log_infinite
    thin, atoms = _thinned(masses, losses)
    tilt = _tilt(thin, atoms, steps, epsilon)
    log_moment, mean, std = _moments(log_masses, losses, tilt)
    low, high = _window(thin, atoms, steps, tilt, log_moment, std * math.sqrt(steps))
    lowest, points = math.floor(low / law.spacing) - 1, math.ceil((high - low) / law.spacing) + 4
    if points > 4 * _MOST_POINTS:
        raise NotApplicable(f"a transform of {points} privacy losses is too large; use --bound rdp.")
    size = int(fft.next_fast_len(points, real=True))
    with np.errstate(under="ignore"):
        tilted = np.exp(log_masses + tilt * losses - log_moment)
    tilted /= tilted.sum()
    centre = round(mean / law.spacing)
    folded = np.bincount((law.lowest + positive - centre) % size, tilted, size)
    spectrum = fft.rfft(folded)
    composed = fft.irfft(_power(spectrum, steps), size)
    # Index i of the transform is the composed grid point centre * steps + i modulo size.
    composed = np.roll(composed, (centre * steps - lowest) % size)
    excess = (lowest + np.arange(size)) * law.spacing - epsilon
    above = excess > 0
    excess = excess[above]
    weights = -np.expm1(-excess) * np.exp(-tilt * excess)
    # Root mean square error of the transforms, which the power magnifies, and Cauchy's inequality for the sum.
    relative_error = 4 * _ROUNDING * math.log2(size) * (1 + steps * math.sqrt(float(folded @ folded)))
    share = float(np.maximum(composed[above], 0.0) @ weights)
    share += relative_error * math.sqrt(float(composed @ composed) * float(weights @ weights))
    share += math.exp(_LOG_WRAPPED)
    slack = 1e-11 + 4 * _ROUNDING * steps + 4 * _ROUNDING * abs(steps * log_moment)
    finite = steps * log_moment - tilt * epsilon + math.log(share) + slack
    return float(np.logaddexp(finite, log_infinite))


def _raised(law: Law, steps: int) -> tuple[Array, Array]:
    """Positions and masses, the smallest losses raised to a common one.

    Rare losses far below the others would need a long window. Raising a loss is on the safe side, and those are raised
    whose raise moves the mean of the sum by less than 1e-10 of its deviation.
    """
    positions = np.arange(law.masses.size)
    mean = float(law.masses @ positions)
    variance = float(law.masses @ (positions - mean) ** 2)
    moved = np.cumsum(np.cumsum(law.masses)) * steps
    first = int(np.searchsorted(moved, 1e-10 * math.sqrt(max(variance, 1e-12) * steps)))
    first = min(first, law.masses.size - 1)
    masses = law.masses[first:].copy()
    masses[0] += float(law.masses[:first].sum())
    positive = np.flatnonzero(masses)
    return positive + first, masses[positive]


def _power(spectrum: Array, steps: int) -> Array:
    """The spectrum to the power of ``steps``; what is below 1e-30 is left out."""
    with np.errstate(divide="ignore"):
        sizes = np.log(np.abs(spectrum)) * steps
    power = np.zeros_like(spectrum)
    kept = sizes > -70
    power[kept] = np.exp(sizes[kept] + 1j * (steps * np.angle(spectrum[kept])))
    return power


def _moments(log_masses: Array, losses: Array, tilt: float) -> tuple[float, float, float]:
    """ln E e^(tilt L), and mean and standard deviation of L under the tilted law."""
    exponents = log_masses + tilt * losses
    largest = float(exponents.max())
    with np.errstate(under="ignore"):
        masses = np.exp(exponents - largest)
    total = float(masses.sum())
    mean = float(masses @ losses) / total
    variance = float(masses @ (losses - mean) ** 2) / total
    # Untilted the logarithm is 0 but for rounding, which the number of steps would magnify.
    log_moment = 0.0 if tilt == 0 else largest + math.log(total)
    if abs(log_moment) < 0.5:
        with np.errstate(under="ignore"):
            log_moment = math.log1p(float(np.exp(log_masses) @ np.expm1(np.minimum(tilt * losses, 700.0))))
    return log_moment, mean, math.sqrt(max(variance, 1e-300))


def _thinned(masses: Array, losses: Array) -> tuple[Array, Array]:
    """Few atoms whose exponential moments bound those of the law: logarithms of masses, and losses.

    The mass of a group of neighbours goes to its two ends with its mean kept, which raises every convex moment.
    """
    stride = -(-masses.size // 8192)
    if stride == 1:
        return np.log(masses), losses
    starts = np.arange(0, masses.size, stride)
    ends = np.append(starts[1:], masses.size) - 1
    low, high = losses[starts], losses[ends]
    total = np.add.reduceat(masses, starts)
    # A share slightly off by rounding stays in its range; the window has room for it.
    share = np.add.reduceat(masses * (losses - np.repeat(low, ends - starts + 1)), starts) / np.maximum(
        total * (high - low), 1e-320
    )
    share = np.clip(share, 0.0, 1.0)
    atoms = np.concatenate((total * (1 - share), total * share))
    positive = atoms > 0
    return np.log(atoms[positive]), np.concatenate((low, high))[positive]


def _tilt(log_masses: Array, losses: Array, steps: int, epsilon: float) -> float:
    """A tilt >= 0 that brings the mean of the sum near epsilon; any other would be valid too."""
    tilt, low, high = 0.0, 0.0, math.inf
    for _ in range(60):
        _, mean, std = _moments(log_masses, losses, tilt)
        gap = epsilon / steps - mean
        if abs(gap) * math.sqrt(steps) <= 0.5 * std or (tilt == 0 and gap <= 0):
            break
        if gap > 0:
            low = tilt
        else:
            high = tilt
        tilt += gap / std**2
        if not low < tilt < high:
            tilt = (low + high) / 2 if high < math.inf else 2 * low + 1.0
    return tilt


def _window(
    log_masses: Array, losses: Array, steps: int, tilt: float, log_moment: float, spread: float
) -> tuple[float, float]:
    """Losses beyond either of which the tilted sum has a mass below exp(_LOG_WRAPPED), by Chernoff's bound."""
    high, low = steps * float(losses.max()), steps * float(losses.min())
    for factor in (1.0, 1.6, 2.5, 4.0, 6.0, 9.0, 14.0):
        rate = factor / spread
        up = _log_moment(log_masses, losses, tilt + rate)
        down = _log_moment(log_masses, losses, tilt - rate)
        high = min(high, (steps * (up - log_moment) - _LOG_WRAPPED) / rate)
        low = max(low, -(steps * (down - log_moment) - _LOG_WRAPPED) / rate)
    return low, high


def _reach(law: Law, steps: int) -> tuple[float, float]:
    """The window of the untilted sum."""
    positive, masses = _raised(law, steps)
    losses = (law.lowest + positive) * law.spacing
    _, _, std = _moments(np.log(masses), losses, 0.0)
    return _window(*_thinned(masses, losses), steps, 0.0, 0.0, std * math.sqrt(steps))


def _log_moment(log_masses: Array, losses: Array, tilt: float) -> float:
    exponents = log_masses + tilt * losses
    largest = float(exponents.max())
    with np.errstate(under="ignore"):
        return largest + math.log(float(np.exp(exponents - largest).sum()))


def propose_mu(noise: float, group_size: int, rate: float, steps: int) -> float:
    """The Gaussian-DP parameter of the central limit: sqrt(steps x chi^2(P1, P0))."""
    counts, masses = members(group_size, rate, _TAILS[0])
    stride = max(1, counts.size // 200)
    counts, masses = counts[::stride], np.add.reduceat(masses, np.arange(0, masses.size, stride))
    exponents = np.minimum(np.multiply.outer(counts, counts) / noise / noise, 600.0)
    return math.sqrt(steps) * math.sqrt(max(float(masses @ np.expm1(exponents) @ masses), 1e-300))
