"""Langevin learning and unlearning: noisy gradient descent on a generalised linear model.

w <- (1 - eta l2) w - eta x mean data gradient + noise_std x N(0, I), then onto the ball of the radius where there is
one, for R independent chains at once. Weights, the update and the noise are float64; the two matrix products run in the
dtype of the rows. What rounding can add to mu is kept below a set share, and the run stops where that cannot be shown.

The other descents use the same step: noisy SGD on several batches in turn, descent-to-delete without noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.rounding import RoundingGuard, chain_norms

_ROUNDING_CHECKS = 10

_SMALL_STEP_FLOPS = 1e8

# A ball that much smaller, relatively, holds every projected chain in exact arithmetic too.
_PROJECTION_SLACK = 2.0**-40


@dataclass(frozen=True, kw_only=True)
class Update:
    """One step in numbers: step_size in parameter^2/loss, l2 in loss/parameter^2, noise_std and radius in parameter
    units. The regulariser is applied in float64 and never clipped.
    """

    step_size: float
    l2: float
    noise_std: float
    radius: float | None = None


def initial_weights(model: GeneralisedLinearModel, chains: int, *, std: float, source: GaussianSource) -> torch.Tensor:
    """Float64 starting weights (d, R x C): zeros, or independent N(0, std^2)."""
    weights = torch.zeros(model.features, chains * model.outputs, dtype=torch.float64, device=model.rows.device)
    if std > 0:
        source.fill(weights)
        weights *= std
    return weights


def project_(weights: torch.Tensor, radius: float, *, outputs: int) -> None:
    """Every chain of (d, R x C) onto the ball of ``radius``, in place: the projection onto a ball that is smaller by
    2^-40, so that norms are at most ``radius`` in exact arithmetic.
    """
    factors = (radius * (1 - _PROJECTION_SLACK) / chain_norms(weights, outputs)).clamp_(max=1.0)
    weights *= factors if outputs == 1 else factors.repeat_interleave(outputs)


@contextmanager
def descent(
    batches: Sequence[GeneralisedLinearModel],
    weights: torch.Tensor,
    *,
    steps: int,
    update: Update,
    source: GaussianSource,
    guard: RoundingGuard,
) -> Iterator[Callable[[int], None]]:
    """Gives step(0) .. step(steps - 1) on float64 ``weights`` (d, R x C) in place, each on the next of the batches.

    Raises GuardFailed, in a step or on leaving, for a rounding error above the limit and for weights that are not
    finite; the weights are then unusable.
    """
    noise = torch.empty_like(weights)
    rounded = weights.to(batches[0].rows.dtype)
    shrink = 1.0 - update.step_size * update.l2
    outputs = batches[0].outputs
    check_every = max(1, -(-steps // _ROUNDING_CHECKS))
    with _workers_for(batches[0], weights) as workers:

        def step(index: int) -> None:
            if index % check_every == 0:
                guard.check(batches, weights)
            rounded.copy_(weights)
            gradient = batches[index % len(batches)].mean_gradient(rounded, workers=workers)
            weights.mul_(shrink).add_(gradient, alpha=-update.step_size)
            if update.noise_std > 0:
                source.fill(noise)
                weights.add_(noise, alpha=update.noise_std)
            if update.radius is not None:
                project_(weights, update.radius, outputs=outputs)

        yield step
        if not bool(torch.isfinite(weights).all()):
            raise GuardFailed("weights are not finite after the run; check the data and the step size of the plan.")
        if steps:
            guard.check(batches, weights)


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
            with ThreadPoolExecutor(threads - 1) as workers:
                yield workers
    finally:
        torch.set_num_threads(threads)
