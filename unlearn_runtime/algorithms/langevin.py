"""Langevin learning and unlearning: full-batch noisy gradient descent on a generalised linear model.

w <- (1 - eta l2) w - eta x mean data gradient + noise_std x N(0, I), for R independent chains at once. Weights, the
update and the noise are float64; the two matrix products run in the dtype of the rows. What rounding can add to mu is
kept below a set share, and the run stops where that cannot be shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.noise import GaussianSource

#: Rounding may add this share to mu.
ROUNDING_SHARE = 1e-3

_ROUNDING_CHECKS = 10

_SMALL_STEP_FLOPS = 1e8

# Roundings of one update in float64: three operations on numbers not much larger than the weights.
_UPDATE_ROUNDINGS = 8 * 2.0**-53


@dataclass
class RoundingGuard:
    """Keeps what rounding adds to mu below ``ROUNDING_SHARE``.

    An error e of every mean gradient lets two runs drift apart by up to 2 eta e more per step, in learning and in
    unlearning alike, while of the certified drift only a share ``decay`` is left at the end: mu grows by at most the
    factor 1 + 2 e / (gap x decay). ``gap`` is the largest change of the mean gradient that is accounted for, ``limit``
    the largest e allowed, both in gradient units. A float32 run is measured against float64; a float64 run has an
    a-priori bound.
    """

    gap: float
    decay: float
    step_size: float
    largest: float = field(default=0.0)

    @property
    def limit(self) -> float:
        return ROUNDING_SHARE * self.gap * self.decay / 2

    def measure(self, model: GeneralisedLinearModel, weights: torch.Tensor) -> float:
        """The largest error over the chains at float64 ``weights``, roundings of the update included."""
        norm = float(_chain_norms(model, weights).max())
        if model.rows.dtype == torch.float64:
            error = model.rounding_bound(norm)
        else:
            rounded = model.mean_gradient(weights.to(model.rows.dtype))
            error = float(_chain_norms(model, rounded - model.exact_mean_gradient(weights)).max())
        error += _UPDATE_ROUNDINGS * norm / self.step_size
        self.largest = max(self.largest, math.inf if math.isnan(error) else error)
        return self.largest

    def check(self, model: GeneralisedLinearModel, weights: torch.Tensor) -> None:
        """Raise GuardFailed where the error is above the limit or not a number."""
        value = self.measure(model, weights)
        if value <= self.limit:
            return
        advice = (
            "run with --dtype float64"
            if model.rows.dtype == torch.float32
            else "the plan relies on more decay than floating point can carry; plan with fewer unlearning steps"
        )
        raise GuardFailed(
            f"rounding error {value:.3g} of a mean gradient is above {self.limit:.3g}, where it would add more than"
            f" {ROUNDING_SHARE:.1%} to mu; {advice}."
        )


@contextmanager
def _workers_for(model: GeneralisedLinearModel, weights: torch.Tensor) -> Iterator[Executor | None]:
    """Threads that each run whole products on their share of the rows; None where a step is too little work to share.

    Products are single-threaded meanwhile: threads inside a product wait for each other many times a step, which costs
    a multiple on a machine that does something else as well.
    """
    threads = torch.get_num_threads()
    small = 4 * model.rows.numel() * weights.shape[1] < _SMALL_STEP_FLOPS
    if model.rows.is_cuda or threads == 1:
        yield None
        return
    torch.set_num_threads(1)
    try:
        if small:
            yield None
        else:
            with ThreadPoolExecutor(threads) as workers:
                yield workers
    finally:
        torch.set_num_threads(threads)


def _chain_norms(model: GeneralisedLinearModel, weights: torch.Tensor) -> torch.Tensor:
    """Euclidean norms (R,) of the chains in a matrix (d, R x C)."""
    return weights.view(model.features, -1, model.outputs).square().sum(dim=(0, 2)).sqrt()


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
    with _workers_for(model, weights) as workers:
        for step in range(steps):
            if step % check_every == 0:
                guard.check(model, weights)
            rounded.copy_(weights)
            gradient = model.mean_gradient(rounded, workers=workers)
            source.fill(noise)
            weights.mul_(shrink).add_(gradient, alpha=-step_size).add_(noise, alpha=noise_std)
            if on_step is not None:
                on_step(step + 1)
        if not bool(torch.isfinite(weights).all()):
            raise GuardFailed("weights are not finite after the run; check the data and the step size of the plan.")
        if steps:
            guard.check(model, weights)
