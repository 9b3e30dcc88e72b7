"""Privacy-loss distribution of DP-SGD for a group of records: one step's law composed over all steps, in log space.

The law of one step is that of ``loss_of_step``, which can only raise every hockey-stick divergence. The n-fold
convolution is a Fourier transform of the exponentially tilted law, so small deltas keep their relative accuracy (theory
page ``docs/theory/pld.md``).

numpy is imported here, so this module is imported only inside functions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import fft  # type: ignore[import-untyped]

from rdp_calc.errors import NotApplicable
from rdp_calc.loss_of_step import MOST_CELLS, SPACING, Law, Mixture, members, one_step

Array = np.ndarray[Any, np.dtype[Any]]

#: A coarse grid is so many powers of two wider.
COARSE = 3
SMALLEST_DELTA = 1e-280
MOST_STEPS = 10**9

_EXPONENTS = range(-80, 200)
#: Logarithms of the mass cut off one step, tried in turn until the cut does not show in delta.
_TAILS = (-80.0, -220.0, -660.0)
_MOST_POINTS = 2**21
_ROUNDING = 2.0**-52
#: ln of the mass that may leave the window of the transform, relative to the sum that is formed there.
_LOG_WRAPPED = -40.0


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
    cells = math.ceil(math.log2((losses[-1] - losses[0]) / MOST_CELLS / SPACING))
    exponent = min(max(fine, cells, _EXPONENTS[0]), _EXPONENTS[-1])
    widths = []
    for law in one_step(noise, group_size, rate, exponent + COARSE, _TAILS[0]):
        low, high = _reach(law, steps)
        widths.append(high - low)
    return max(exponent, min(math.ceil(math.log2(max(widths) / _MOST_POINTS / SPACING)), _EXPONENTS[-1]))


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
