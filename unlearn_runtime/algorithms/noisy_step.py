"""One noisy step: x <- x - gamma (clip(g, C1) + lambda (x - center)) + N(0, tau^2 I), in float64 and in few passes.

The gradient is read twice, for its norm and for the update; the weights are read and written once. Noise is drawn for
all numbers at once, so that the draws do not depend on tiles and the source may use all cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.projections import Range, clip_factors, norms, tiles

#: The gradient (R, p) of every chain at its current weights, and the loss, given the number of the step.
Gradient = Callable[[int], tuple[torch.Tensor, torch.Tensor | float | None]]

#: Rounding may move mu by this share of it.
ROUNDING_SHARE = 1e-3

#: Roundings of one coordinate in one step, with room: factor, decay, product, sum, noise, sum, and their constants.
_ROUNDINGS = 8 * 2.0**-53

#: The norm of p standard normals is above sqrt(p) + this with a probability below 1e-40.
_NORM_TAIL = 14.0


class NoisyStep:
    """Updates of the given columns of float64 weights (R, p); the rest is not touched. Holds the noise buffer.

    center (p,): what weight decay pulls towards, 0 where None.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        source: GaussianSource,
        ranges: Sequence[Range] | None = None,
        *,
        center: torch.Tensor | None = None,
    ) -> None:
        self.weights = weights
        self.source = source
        self.ranges = ((0, weights.shape[1]),) if ranges is None else tuple(ranges)
        self.size = sum(stop - start for start, stop in self.ranges)
        self.center = center
        self._noise: torch.Tensor | None = None

    def __call__(
        self,
        direction: torch.Tensor,
        *,
        clip: float | None,
        step_size: float,
        weight_decay: float = 0.0,
        noise_std: float = 0.0,
    ) -> torch.Tensor:
        """Carry out one step along -direction (R, p), clipped per chain to ``clip`` (None: not clipped).

        clip in gradient units, noise_std in parameter units; no noise is drawn where it is 0. Returns the norms of the
        direction (R,). Raises GuardFailed where the direction is not finite; the weights are then untouched.
        """
        lengths = norms(direction, self.ranges)
        # Without a bound the factor is 1; the check that the gradient is finite stays.
        factors = clip_factors(lengths, math.inf if clip is None else clip, self.size)
        scales = factors.mul_(-step_size)[:, None]
        noise = self._draw() if noise_std > 0 else None
        shrink = step_size * weight_decay
        for rows, columns, places in self._tiles():
            tile = self.weights[rows, columns]
            if self.center is not None and shrink:
                tile.sub_(tile.sub(self.center[columns]), alpha=shrink)
            elif shrink:
                tile.mul_(1.0 - shrink)
            tile.addcmul_(direction[rows, columns].to(torch.float64), scales[rows])
            if noise is not None:
                tile.add_(noise[rows, places], alpha=noise_std)
        return lengths

    def add_noise(self, noise_std: float) -> None:
        """Add N(0, noise_std^2) to every number of the columns."""
        noise = self._draw()
        for rows, columns, places in self._tiles():
            self.weights[rows, columns].add_(noise[rows, places], alpha=noise_std)

    def _draw(self) -> torch.Tensor:
        if self._noise is None:
            shape = (len(self.weights), self.size)
            self._noise = torch.empty(shape, dtype=torch.float64, device=self.weights.device)
        self.source.fill(self._noise)
        return self._noise

    def _tiles(self) -> list[tuple[slice, slice, slice]]:
        found, offset = [], 0
        for start, stop in self.ranges:
            for rows, columns in tiles(len(self.weights), ((start, stop),), self.weights.device):
                places = slice(columns.start - start + offset, columns.stop - start + offset)
                found.append((rows, columns, places))
            offset += stop - start
        return found


def reach(
    *, start: float, size: int, steps: int, contraction: float, drift: float, noise_std: float, center: float = 0.0
) -> float:
    """A bound on every norm ||x_t|| that holds but for a chance of 1e-40 a step, without looking at the data.

    x_t is c^t x_0, plus clipped gradients of norm at most ``drift`` a step, plus noise whose sum has variance
    sum c^(2s) tau^2 a coordinate. inf where c > 1 grows out of the range of numbers.
    """
    if contraction < 1:
        gain = min(float(steps), 1.0 / (1.0 - contraction))
        spread = min(float(steps), 1.0 / (1.0 - contraction**2))
        grown = 1.0
    else:
        exponent = steps * math.log(contraction)
        grown = math.exp(exponent) if exponent < 300 else math.inf
        gain, spread = steps * grown, steps * grown * grown
    return center + grown * start + gain * drift + noise_std * math.sqrt(spread) * (math.sqrt(size) + _NORM_TAIL)


def rounding_of_a_step(*, reach: float, drift: float, noise_std: float, size: int) -> float:
    """What floating point may add to one step's update, as a norm: a shift like any other."""
    return _ROUNDINGS * (reach + drift + noise_std * (math.sqrt(size) + _NORM_TAIL))


def check_rounding(rounding: float, *, steps: int, noise_std: float, mu: float | None, diameter: float = 0.0) -> None:
    """Raise GuardFailed where rounding could add more than a thousandth to mu.

    Each run's step is off by at most ``rounding``, so two runs part by 2 x rounding a step beyond the accounted shift;
    spent at once, that adds 2 sqrt(steps) rounding/noise_std to mu (which is subadditive in the shifts, theory 4.1).

    mu None: the contraction bound, which knows a step by its image's diameter only. Rounding makes that larger by
    2 x rounding, allowed up to a billionth of it: as if noise_std were smaller by a billionth.
    """
    if mu is None:
        extra, allowed = 2 * rounding, 1e-9 * diameter
    else:
        extra, allowed = 2 * math.sqrt(steps) * rounding / noise_std, ROUNDING_SHARE * mu
    if not extra <= allowed:
        raise GuardFailed(
            f"float64 rounding may add {extra:.3g} where {allowed:.3g} is allowed: the noise is too small beside the"
            " weights; plan with smaller clip norms, fewer steps or more noise."
        )
