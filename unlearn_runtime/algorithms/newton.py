"""One Newton step on a generalised linear model: w - (H + damping I)^{-1} grad F(w), H the Hessian of F at w.

What is certified is the residual r of the linear system that the *stored* step leaves, rounding of the gradient, of the
product and of the subtraction included (``docs/theory/error-bound.md``, section 1). (Guo et al. 2020, arXiv:1911.03030;
Sekhari et al. 2021, arXiv:2103.03279.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.algorithms.conjugate_gradients import conjugate_gradients
from unlearn_runtime.algorithms.glm_hessian import GlmHessian, cholesky, solved

#: Numbers in a model up to which its Hessian is formed and factored (128 MiB).
MOST_DENSE = 4096

_MOST_REFINEMENTS = 3
_EPS = 2.0**-52


@dataclass(frozen=True)
class NewtonStep:
    """The new weights (d, C); the residual of the system with the step taken, and a bound on what rounding hides of
    it; how it was solved, cholesky or conjugate gradients, and in how many solves or products.
    """

    weights: torch.Tensor
    residual: float
    rounding: float
    solver: str
    iterations: int


def newton_step(hessian: GlmHessian, *, residual: float, most_dense: int = MOST_DENSE) -> NewtonStep:
    """The step at the weights of ``hessian``, whose model is the retained objective.

    Conjugate gradients, or up to ``most_dense`` numbers the dense Hessian, factored, where that takes less work. Raises
    GuardFailed where the residual, rounding included, is not shown to be at most ``residual``.
    """
    return take_step(hessian, hessian.gradient(), hessian.gradient_rounding(), residual=residual, most_dense=most_dense)


def take_step(
    hessian: GlmHessian, right: torch.Tensor, right_rounding: float, *, residual: float, most_dense: int = MOST_DENSE
) -> NewtonStep:
    """w - x with (H + damping I) x = right up to ``residual``; right (d, C) is known to ``right_rounding``."""
    # The step is at least this long.
    shortest = float(right.norm()) / (hessian.size_bound + hessian.shift)
    hidden = rounding_of(hessian, right, right_rounding, step_norm=shortest)
    if not hidden < residual:
        raise GuardFailed(below_rounding(residual, hidden))
    if hessian.numbers > most_dense or not _dense_is_cheaper(hessian, float(right.norm()) / residual):
        tolerance = (residual - hidden) / 2
        found = conjugate_gradients(hessian.times, right, tolerance=tolerance)
        return checked(hessian, hessian.weights - found.solution, right, right_rounding, residual, found.iterations)
    factor = cholesky(hessian.dense())
    step = torch.zeros_like(right)
    left = right
    for count in range(1, _MOST_REFINEMENTS + 1):
        step = step + solved(factor, left)
        left = right - hessian.times(step)
        if count > 1 and float(left.norm()) <= residual / 2:
            break
    weights = hessian.weights - step
    return checked(hessian, weights, right, right_rounding, residual, count, solver="cholesky")


def _dense_is_cheaper(hessian: GlmHessian, reduction: float) -> bool:
    """Whether forming and factoring the Hessian takes fewer operations than the products that conjugate gradients need
    at worst to shorten a residual by ``reduction``: sqrt(kappa)/2 ln(2 sqrt(kappa) reduction), kappa the condition.
    """
    root = math.sqrt(1 + hessian.size_bound / hessian.shift)
    products = min(root / 2 * math.log(max(2.0, 2 * root * reduction)), hessian.numbers) + 2
    records, features, outputs = len(hessian.model.rows), hessian.model.features, hessian.model.outputs
    dense = records * features**2 * outputs * (outputs + 1) + hessian.numbers**3 / 3
    return dense < products * 4 * records * features * outputs


def checked(
    hessian: GlmHessian,
    weights: torch.Tensor,
    right: torch.Tensor,
    right_rounding: float,
    residual: float,
    iterations: int = 0,
    *,
    solver: str = "conjugate gradients",
) -> NewtonStep:
    """The step that ended at ``weights``, after its residual, rounding included, was shown to be at most ``residual``.

    Raises GuardFailed otherwise.
    """
    taken = hessian.weights - weights
    left = float((hessian.times(taken) - right).norm()) * (1 + 2.0**-40)
    hidden = rounding_of(hessian, right, right_rounding, step_norm=float(taken.norm()))
    if not left + hidden <= residual:
        raise GuardFailed(
            f"the linear solve ({solver}) left a residual of {left:.3g} with a rounding bound of {hidden:.2g}, residual"
            f" {residual:.3g} not reached; plan with a larger --residual."
        )
    return NewtonStep(weights, left, hidden, solver, iterations)


def rounding_of(hessian: GlmHessian, right: torch.Tensor, right_rounding: float, *, step_norm: float) -> float:
    """A bound on what rounding hides of a residual: of the right side, the product, the differences and their norm."""
    moved = _EPS * (2 * float(hessian.weights.norm()) + step_norm)
    differences = (hessian.size_bound + hessian.shift) * moved + 2 * _EPS * float(right.norm())
    return right_rounding + hessian.product_rounding(step_norm) + differences


def below_rounding(residual: float, hidden: float) -> str:
    """What to say of a residual that float64 cannot show."""
    if residual == 0:
        return "this plan counts on an exact linear solve, which no arithmetic gives; plan with --residual, as 1e-9."
    return (
        f"residual {residual:.3g} is below {hidden:.3g}, the rounding of a step in float64 here; plan with a larger"
        " --residual."
    )
