"""Langevin learning and unlearning: full-batch noisy gradient descent on a generalised linear model.

w <- (1 - eta l2) w - eta x mean data gradient + noise_std x N(0, I), for R independent chains at once. Weights, the
update and the noise are float64; the two matrix products run in the dtype of the rows. In float32 their rounding error
is measured against float64 during the run and must stay below a set fraction of the gap the certificate accounts for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.noise import GaussianSource

#: Twice the rounding error may reach this share of the gap between the mean gradients of the two runs.
ROUNDING_SHARE = 1e-3

_ROUNDING_CHECKS = 10


@dataclass
class RoundingGuard:
    """Measures the rounding error of mean gradients; ``limit`` is the largest allowed, in gradient units."""

    gap: float
    largest: float = field(default=0.0)

    @property
    def limit(self) -> float:
        return ROUNDING_SHARE * self.gap / 2

    def measure(self, model: GeneralisedLinearModel, weights: torch.Tensor) -> float:
        """The largest L2 error over the chains of one mean gradient at float64 ``weights``."""
        if model.rows.dtype == torch.float64:
            return 0.0
        rounded = model.mean_gradient(weights.to(model.rows.dtype))
        error = (rounded - model.exact_mean_gradient(weights)).view(model.features, -1, model.outputs)
        value = float(error.square().sum(dim=(0, 2)).max().sqrt())
        self.largest = max(self.largest, math.inf if math.isnan(value) else value)
        return self.largest

    def check(self, model: GeneralisedLinearModel, weights: torch.Tensor) -> None:
        """Raise GuardFailed where the error is above the limit or not a number."""
        value = self.measure(model, weights)
        if not value <= self.limit:
            raise GuardFailed(
                f"rounding error {value:.3g} of a float32 mean gradient is above the allowed {self.limit:.3g}"
                " (1/2000 of the gap the certificate accounts for); run with --dtype float64."
            )


def initial_weights(model: GeneralisedLinearModel, chains: int, *, std: float, source: GaussianSource) -> torch.Tensor:
    """Float64 starting weights (d, R x C): zeros, or independent N(0, std^2)."""
    weights = torch.zeros(model.features, chains * model.outputs, dtype=torch.float64, device=model.rows.device)
    if std > 0:
        source.fill(weights)
        weights *= std
    return weights


def noisy_gradient_descent(
    model: GeneralisedLinearModel,
    weights: torch.Tensor,
    *,
    steps: int,
    step_size: float,
    l2: float,
    noise_std: float,
    source: GaussianSource,
    guard: RoundingGuard,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Carry out ``steps`` steps on float64 ``weights`` (d, R x C) in place.

    step_size in parameter^2/loss, l2 in loss/parameter^2, noise_std in parameter units. The regulariser is applied in
    float64 and never clipped. Raises GuardFailed for a rounding error above the limit and for weights that are not
    finite; the weights are then unusable.
    """
    noise = torch.empty_like(weights)
    rounded = weights.to(model.rows.dtype)
    shrink = 1.0 - step_size * l2
    check_every = max(1, -(-steps // _ROUNDING_CHECKS))
    for step in range(steps):
        if step % check_every == 0:
            guard.check(model, weights)
        rounded.copy_(weights)
        gradient = model.mean_gradient(rounded)
        source.fill(noise)
        weights.mul_(shrink).add_(gradient, alpha=-step_size).add_(noise, alpha=noise_std)
        if on_step is not None:
            on_step(step + 1)
    if not bool(torch.isfinite(weights).all()):
        raise GuardFailed("weights are not finite after the run; check the data and the step size of the plan.")
