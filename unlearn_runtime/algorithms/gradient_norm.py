"""Solve the retained objective until its gradient is shorter than a tolerance, in float64; noise is added afterwards.

Both solvers look at gradients alone: differences of the objective vanish in rounding long before its gradient does (an
objective near 1 shows gradients above 1e-8 only), so the line searches of the usual libraries stop too early.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.glm import GeneralisedLinearModel

_MOST_ITERATIONS = {"newton-cg": 200, "lbfgs": 5000}
_MOST_HALVINGS = 50
_MEMORY = 20
_UNIT = 2.0**-53


@dataclass(frozen=True)
class Solution:
    """Weights (d, C), the norm of the gradient there, a bound on the rounding error of that norm, and iterations."""

    weights: torch.Tensor
    gradient_norm: float
    rounding: float
    iterations: int


def minimise(
    model: GeneralisedLinearModel,
    start: torch.Tensor,
    *,
    l2: float,
    smoothness: float,
    tolerance: float,
    solver: str = "newton-cg",
) -> Solution:
    """The minimiser of data loss + (l2/2) ||w||^2 from ``start`` (d, C), float64, to a gradient norm, rounding bound
    included, of at most ``tolerance``.

    Raises GuardFailed where float64 cannot show the tolerance, or where it is not reached within a set number of
    iterations. Deterministic.
    """

    def gradient(weights: torch.Tensor) -> torch.Tensor:
        return model.mean_gradient(weights).add(weights, alpha=l2)

    def rounding(weights: torch.Tensor) -> float:
        norm = float(weights.norm())
        return model.rounding_bound(norm) + 4 * _UNIT * (l2 * norm + model.residual_size)

    weights = start.clone()
    slope = gradient(weights)
    directions = _newton(model, l2) if solver == "newton-cg" else lbfgs_directions(smoothness)
    for iteration in range(_MOST_ITERATIONS[solver] + 1):
        length, bound = float(slope.norm()), rounding(weights)
        # The norm itself is rounded too.
        if length * (1 + 2.0**-40) + bound <= tolerance:
            return Solution(weights, length, bound, iteration)
        if not length < float("inf"):
            raise GuardFailed("the gradient is not finite; check the data.")
        if bound >= tolerance:
            raise GuardFailed(
                f"tolerance {tolerance:.3g} is below {bound:.3g}, the rounding of a gradient in float64 here; plan with"
                " a larger --tolerance."
            )
        direction = directions(weights, slope)
        moved = line_search(gradient, weights, slope, direction)
        if moved is None:
            break
        weights, slope = moved
    raise GuardFailed(
        f"solver {solver} stopped at a gradient norm of {float(slope.norm()):.3g} with a rounding bound of"
        f" {rounding(weights):.2g}, tolerance {tolerance:.3g} not reached; plan with a larger --tolerance, or with"
        " --solver newton-cg."
    )


def line_search(
    gradient: Callable[[torch.Tensor], torch.Tensor],
    weights: torch.Tensor,
    slope: torch.Tensor,
    direction: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The first of the steps 1, 1/2, 1/4, ... that shortens the gradient or still goes downhill at its end.

    Going downhill at its end, the step is at least half of the best one along a convex objective and gains at least
    half of what that gains: the objective need not be computed.
    """
    length, step = float(slope.norm()), 1.0
    for _ in range(_MOST_HALVINGS):
        moved = weights + step * direction
        found = gradient(moved)
        if float(found.norm()) <= (1 - 1e-4 * step) * length or float((found * direction).sum()) <= 0:
            return moved, found
        step /= 2
    return None


def _newton(model: GeneralisedLinearModel, l2: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Newton directions by conjugate gradients, solved the better the shorter the gradient has become."""
    first: list[float] = []

    def direction(weights: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        times = model.hessian(weights)
        length = float(slope.norm())
        first.append(length)
        accuracy = min(0.1, (length / first[0]) ** 0.5) * length
        found = torch.zeros_like(slope)
        residual, along = -slope, -slope
        squared = float((residual * residual).sum())
        for _ in range(10 * slope.numel() + 100):
            if squared**0.5 <= accuracy:
                break
            product = times(along).add_(along, alpha=l2)
            scale = squared / float((along * product).sum())
            found = found + scale * along
            residual = residual - scale * product
            before, squared = squared, float((residual * residual).sum())
            along = residual + (squared / before) * along
        return found

    return direction


def lbfgs_directions(smoothness: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Directions by the two-loop recursion (Nocedal-Wright 2006, algorithm 7.4)."""
    pairs: deque[tuple[torch.Tensor, torch.Tensor, float]] = deque(maxlen=_MEMORY)
    last: list[tuple[torch.Tensor, torch.Tensor]] = []

    def direction(weights: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        if last:
            moved, turned = weights - last[0][0], slope - last[0][1]
            product = float((moved * turned).sum())
            if product > 0:
                pairs.append((moved, turned, product))
        last[:] = [(weights, slope)]
        found, shares = -slope, []
        for moved, turned, product in reversed(pairs):
            shares.append(float((moved * found).sum()) / product)
            found = found - shares[-1] * turned
        newest = pairs[-1] if pairs else None
        found = found * (1 / smoothness if newest is None else newest[2] / float(newest[1].square().sum()))
        for (moved, turned, product), share in zip(pairs, reversed(shares), strict=True):
            found = found + (share - float((turned * found).sum()) / product) * moved
        return found

    return direction
