"""The regularised Hessian of a generalised linear model at one point: products, the dense matrix, rounding of both.

H + shift I with H the Hessian of the mean data loss and shift = l2 + damping. Rows must be float64. Where a loss has a
kink (Huber) H is the generalised derivative that the computed residuals select.

Rounding bounds follow Higham 2002, section 3.1, as ``GeneralisedLinearModel.rounding_bound`` does: gamma_k = k u to
first order, twice that for the rest, in any order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.glm import GeneralisedLinearModel

#: Bounds the Lipschitz constant of the curvature diag(p) - p p^T by the products: sqrt(6)/9; logistic 1/(6 sqrt 3).
_CURVATURE_LIPSCHITZ = 0.3

_EPS = 2.0**-52


class GlmHessian:
    """H + (l2 + damping) I at float64 ``weights`` (d, C) of ``model``."""

    def __init__(
        self, model: GeneralisedLinearModel, weights: torch.Tensor, *, l2: float, damping: float = 0.0
    ) -> None:
        if model.rows.dtype != torch.float64:
            raise ValueError("second-order steps need rows in float64")
        self.model, self.weights = model, weights
        self.l2, self.damping = l2, damping
        self._times = model.hessian(weights)
        self._norm = float(weights.norm())
        self._longest = float(torch.linalg.vector_norm(model.rows, dim=1).max()) if len(model.rows) else 0.0

    @property
    def shift(self) -> float:
        return self.l2 + self.damping

    def times(self, direction: torch.Tensor) -> torch.Tensor:
        """H v + shift v for v of shape (d, C). Two matrix products."""
        return self._times(direction).add_(direction, alpha=self.shift)

    def gradient(self) -> torch.Tensor:
        """The gradient (d, C) of the regularised objective, damping left out."""
        return self.model.mean_gradient(self.weights).add(self.weights, alpha=self.l2)

    def gradient_rounding(self) -> float:
        """A bound on the norm of the rounding error of ``gradient``."""
        return self.model.rounding_bound(self._norm) + 2 * _EPS * (self.l2 * self._norm + self.model.residual_size)

    def product_rounding(self, length: float) -> float:
        """A bound on the norm of the rounding error of ``times`` on a vector of norm ``length``."""
        own = 4 * _EPS * (self.size_bound + self.shift)
        return (self._data_rounding() + own) * length

    @property
    def size_bound(self) -> float:
        """A bound on the largest eigenvalue of H, the regulariser left out."""
        return self.model.RESIDUAL_LIPSCHITZ * self._longest**2 * len(self.model.rows) / self.model.divisor

    def _data_rounding(self) -> float:
        """A bound on the rounding of a product with H, or of all of H, for a vector or matrix of norm 1.

        A product of a row with the weights errs by (d + 3) u B ||w||, which the curvature turns into its Lipschitz
        constant times that, next to its own C + 8 roundings; then come the product with v and the sum over rows.
        """
        model, longest = self.model, self._longest
        if not len(model.rows):
            return 0.0
        products = (model.features + 3) * _EPS * longest * self._norm
        curvature = _CURVATURE_LIPSCHITZ * products + (model.outputs + 8) * _EPS
        blocks = -(-len(model.rows) // model.block_rows)
        # RESIDUAL_LIPSCHITZ bounds the curvature itself.
        applied = model.RESIDUAL_LIPSCHITZ * (model.features + 4 * model.outputs + 4 + model.block_rows + blocks) * _EPS
        return 2 * longest**2 * (curvature + applied) * len(model.rows) / model.divisor

    # Dense

    @property
    def numbers(self) -> int:
        return self.weights.numel()

    def dense(self) -> torch.Tensor:
        """H + shift I as a symmetric matrix (d C, d C); number (a, c) of the weights is row a C + c, as in ``view``."""
        features, outputs = self.model.features, self.model.outputs
        total = self.weights.new_zeros(features, outputs, features, outputs)
        for rows, curvature in self._parts():
            if outputs == 1:
                total[:, 0, :, 0] += rows.t() @ (curvature * rows)
                continue
            for one in range(outputs):
                for other in range(one, outputs):
                    shares = -curvature[:, one] * curvature[:, other]
                    if one == other:
                        shares = shares + curvature[:, one]
                    part = rows.t() @ (shares[:, None] * rows)
                    total[:, one, :, other] += part
                    if one != other:
                        total[:, other, :, one] += part.t()
        matrix = total.view(self.numbers, self.numbers).div_(self.model.divisor)
        matrix = (matrix + matrix.t()).div_(2)
        matrix.diagonal().add_(self.shift)
        return matrix

    def dense_rounding(self) -> float:
        """A bound on the Frobenius norm of the rounding error of ``dense``."""
        own = 8 * _EPS * (self.size_bound + self.shift) * math.sqrt(self.numbers)
        # Curvatures are C x C: their Frobenius norms, and those of their absolute values, are at most sqrt(C) longer.
        return self._data_rounding() * math.sqrt(self.model.outputs) + own

    def _parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        model = self.model
        for start in range(0, len(model.rows), model.block_rows or 1):
            part = slice(start, start + model.block_rows)
            rows = model.rows[part]
            yield rows, model.curvature(rows @ self.weights, model.labels[part])


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """The lower factor. Raises GuardFailed where the matrix is not positive definite in float64."""
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise GuardFailed(
            "the Hessian plus regulariser is not positive definite in float64; plan with a larger --l2, or --damping."
        )
    return factor


def solved(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The solution of L L^T x = right for the lower ``factor`` L, in the shape of ``right``."""
    return torch.cholesky_solve(right.reshape(-1, 1), factor).view(right.shape)
