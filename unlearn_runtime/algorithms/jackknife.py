"""Infinitesimal jackknife on a generalised linear model: w + (H + damping I)^{-1} (1/n) sum of the forgotten gradients.

H is the Hessian of the full objective, which no request changes, so its Cholesky factor is made once, after learning; a
request then costs the forgotten records' gradients and one solve. The factor stands for a matrix that is known to be
within ``error`` of H + damping I, so the residual of a solve is shown without reading the data again
(``docs/theory/error-bound.md``, section 2). (Giordano et al. 2019, arXiv:1806.00550.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.algorithms.glm_hessian import GlmHessian, cholesky, solved
from unlearn_runtime.algorithms.newton import MOST_DENSE, NewtonStep, below_rounding, take_step
from unlearn_runtime.glm import GeneralisedLinearModel

_EPS = 2.0**-52
_REFINEMENTS = 1


@dataclass(frozen=True)
class Factor:
    """Lower L (p, p), and a bound on the spectral norm of L L^T - (H + shift I), with rounding counted."""

    lower: torch.Tensor
    error: float

    @classmethod
    def of(cls, hessian: GlmHessian) -> Factor:
        """The factor at the weights of ``hessian``, whose model is the full objective."""
        matrix = hessian.dense()
        lower = cholesky(matrix)
        measured = float((lower @ lower.t() - matrix).norm()) * (1 + 2.0**-40)
        # Entries of L L^T are sums of p products; the sum of squares of L is its trace.
        product = 2 * hessian.numbers * _EPS * float(matrix.diagonal().sum())
        return cls(lower, measured + product + hessian.dense_rounding())

    @property
    def rounding(self) -> float:
        """A bound on the rounding of L (L^T v) for a v of norm 1."""
        size = float(self.lower.square().sum())
        return 4 * len(self.lower) * _EPS * size


def forgotten_gradient(
    forgotten: GeneralisedLinearModel, weights: torch.Tensor, *, divisor: int
) -> tuple[torch.Tensor, float]:
    """-(1/divisor) times the sum of the forgotten records' data gradients (d, C), and a bound on its rounding: what
    the deletion adds to the gradient of the objective.
    """
    share = forgotten.divisor / divisor
    gradient = forgotten.mean_gradient(weights) * -share
    rounding = share * forgotten.rounding_bound(float(weights.norm())) + 4 * _EPS * float(gradient.norm())
    return gradient, rounding


def jackknife_step(
    hessian: GlmHessian, forgotten: GeneralisedLinearModel, *, residual: float, most_dense: int = MOST_DENSE
) -> NewtonStep:
    """The step at the weights of ``hessian``, whose model is the full objective.

    Raises GuardFailed where the residual, rounding included, is not shown to be at most ``residual``.
    """
    right, right_rounding = forgotten_gradient(forgotten, hessian.weights, divisor=hessian.model.divisor)
    return take_step(hessian, right, right_rounding, residual=residual, most_dense=most_dense)


def factored_step(
    weights: torch.Tensor, factor: Factor, forgotten: GeneralisedLinearModel, *, divisor: int, residual: float
) -> NewtonStep:
    """The same step from weights (d, C) and the factor of their Hessian, over the divisor of the full objective."""
    right, right_rounding = forgotten_gradient(forgotten, weights, divisor=divisor)
    lower = factor.lower

    def times(vector: torch.Tensor) -> torch.Tensor:
        return (lower @ (lower.t() @ vector.reshape(-1, 1))).view(vector.shape)

    step = solved(lower, right)
    for _ in range(_REFINEMENTS):
        step = step + solved(lower, right - times(step))
    moved = weights - step
    taken = weights - moved
    left = float((times(taken) - right).norm()) * (1 + 2.0**-40)
    length = float(taken.norm())
    # The stored difference is rounded by that much, before the matrix acts on it.
    lost = _EPS * (2 * float(weights.norm()) + length)
    size = float(lower.square().sum())
    hidden = right_rounding + (factor.error + factor.rounding) * length + size * lost + 2 * _EPS * float(right.norm())
    if not hidden < residual:
        raise GuardFailed(below_rounding(residual, hidden))
    if not left + hidden <= residual:
        raise GuardFailed(
            f"the linear solve left a residual of {left:.3g} with a rounding bound of {hidden:.2g}, residual"
            f" {residual:.3g} not reached; plan with a larger --residual."
        )
    return NewtonStep(moved, left, hidden, "cholesky", 1 + _REFINEMENTS)
