"""Conjugate gradients for (H + damping I) x = b, known by products alone, until the true residual is short enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rdp_calc.errors import GuardFailed

#: How often the recurrence may start again where its residual has drifted from the true one.
_MOST_RESTARTS = 8


@dataclass(frozen=True)
class CgSolution:
    """``residual``: ||b - (H + damping I) x|| computed anew from x, not the recurrence; ``least_curvature``: the
    smallest v.(H + damping I)v / ||v||^2 over the directions v, an upper bound on the smallest eigenvalue.
    """

    solution: torch.Tensor
    residual: float
    iterations: int
    least_curvature: float


def conjugate_gradients(
    times: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    *,
    damping: float = 0.0,
    tolerance: float,
    most_iterations: int | None = None,
) -> CgSolution:
    """The x with ||right - (H + damping I) x|| <= tolerance, from x = 0; ``times`` maps v to H v.

    Float64 of any shape; H symmetric, H + damping I positive definite. ``most_iterations`` None: ten for each number
    and 100 more, because rounding delays what would be exact after one for each. Rounding inside ``times`` is not in
    the residual: callers add a bound of it. Deterministic where ``times`` is.

    Raises GuardFailed where a direction has no positive curvature, and where the tolerance is not reached, naming the
    residual that was. (Hestenes-Stiefel 1952; Nocedal-Wright 2006, algorithm 5.2.)
    """

    def product(vector: torch.Tensor) -> torch.Tensor:
        return times(vector).add(vector, alpha=damping)

    most = 10 * right.numel() + 100 if most_iterations is None else most_iterations
    found, residual = torch.zeros_like(right), right.clone()
    reached, best = float(residual.norm()), float("inf")
    done, least = 0, float("inf")
    for _ in range(_MOST_RESTARTS):
        # A start that does not even halve the residual has met rounding.
        if reached <= tolerance or done >= most or not reached <= best / 2:
            break
        best = reached
        along, squared = residual.clone(), float((residual * residual).sum())
        while squared**0.5 > tolerance / 2 and done < most:
            turned = product(along)
            bend = float((along * turned).sum())
            length = float((along * along).sum())
            done += 1
            if not bend > 0:
                raise GuardFailed(
                    f"the Hessian plus damping {damping:.3g} is not positive definite: curvature {bend / length:.3g}"
                    " along a direction; plan with more --damping, or train with a larger --l2."
                )
            least = min(least, bend / length)
            found = found + (squared / bend) * along
            residual = residual - (squared / bend) * turned
            before, squared = squared, float((residual * residual).sum())
            along = residual + (squared / before) * along
        residual = right - product(found)
        reached = float(residual.norm())
    if not reached <= tolerance:
        raise GuardFailed(
            f"conjugate gradients reached a residual of {reached:.3g} after {done} products, {tolerance:.3g} is needed;"
            " plan with a larger --residual, or with --damping."
        )
    return CgSolution(found, reached, done, least)
