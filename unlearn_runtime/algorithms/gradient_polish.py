"""Shorten the gradient of a smooth objective near a minimum, where stochastic steps have stopped making progress.

The bounds of the second-order methods count the gradient that training leaves; a recipe of epochs alone rarely brings
it below a thousandth. Nothing is proved of the objective: what is reached is measured by whoever calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from unlearn_runtime.algorithms.gradient_norm import lbfgs_directions, line_search

MOST_ITERATIONS = {"newton-cg": 100, "lbfgs": 2000}

_MOST_PRODUCTS = 200

Gradient = Callable[[torch.Tensor], torch.Tensor]
Hessian = Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


def shorten_gradient(
    gradient: Gradient, hessian: Hessian, start: torch.Tensor, *, tolerance: float, solver: str, first_step: float
) -> torch.Tensor:
    """Weights like ``start``, at which the gradient norm is at most ``tolerance`` or no step shortens it any more.

    ``hessian`` maps weights to products with their Hessian. solver: newton-cg, whose directions end where the curvature
    does (Dembo-Steihaug 1983), or lbfgs. first_step: length of the first step of lbfgs in gradients. Deterministic.
    """
    weights, slope = start, gradient(start)
    quasi = lbfgs_directions(1 / first_step)
    for _ in range(MOST_ITERATIONS[solver]):
        if not float(slope.norm()) > tolerance:
            break
        direction = _newton(hessian(weights), slope) if solver == "newton-cg" else quasi(weights, slope)
        moved = line_search(gradient, weights, slope, direction)
        if moved is None:
            break
        weights, slope = moved
    return weights


def _newton(times: Callable[[torch.Tensor], torch.Tensor], slope: torch.Tensor) -> torch.Tensor:
    """Conjugate gradients for H d = -slope, solved roughly, and cut off where a direction has no positive curvature."""
    length = float(slope.norm())
    accuracy = min(0.1, length**0.5) * length
    found = torch.zeros_like(slope)
    residual, along = -slope, -slope
    squared = float((residual * residual).sum())
    for count in range(_MOST_PRODUCTS):
        if squared**0.5 <= accuracy:
            break
        product = times(along)
        bend = float((along * product).sum())
        if not bend > 0:
            return along if count == 0 else found
        found = found + (squared / bend) * along
        residual = residual - (squared / bend) * product
        before, squared = squared, float((residual * residual).sum())
        along = residual + (squared / before) * along
    return found
