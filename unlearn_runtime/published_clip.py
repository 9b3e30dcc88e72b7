"""The clip of published experiments, for comparison runs only: each record's gradient, regulariser included.

It can break the contraction that bounds rest on, so a run with it certifies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PublishedClip:
    """Each record's gradient r x + l2 w clipped to Euclidean norm ``norm`` C: times f = min(1, C/||r x + l2 w||).

    The mean is then X'(f r)/n + l2 w mean(f), and ||r x + l2 w||^2 = |r|^2 |x|^2 + 2 l2 r.(W x) + l2^2 |W|^2 follows
    from the products: no gradient of a record is formed.
    """

    norm: float
    l2: float

    def clip_(
        self,
        residuals: torch.Tensor,
        products: torch.Tensor,
        squared_norms: torch.Tensor,
        weight_squares: torch.Tensor,
    ) -> torch.Tensor:
        """Scale residuals (rows, R x C) by their factors, overwriting ``products``; the sum of the factors, (R,).

        squared_norms (rows, 1) of the rows, weight_squares (R,) of the chains.
        """
        chains = len(weight_squares)
        # In place, on numbers that are still in the cache: squared norms, then factors.
        squares = products.mul_(2 * self.l2).addcmul_(residuals, squared_norms).mul_(residuals)
        if products.shape[1] > chains:
            squares = squares.view(len(products), chains, -1).sum(dim=2)
        own = (self.l2**2 * weight_squares).to(products.dtype)
        found = squares.add_(own).clamp_(min=0).rsqrt_().mul_(self.norm).clamp_(max=1)
        shaped = residuals.view(len(residuals), chains, -1)
        shaped *= found[:, :, None]
        return found.sum(dim=0, dtype=torch.float64)

    def off_regulariser(
        self, weights: torch.Tensor, factors: torch.Tensor, weight_squares: torch.Tensor, *, records: int, divisor: int
    ) -> torch.Tensor:
        """(mean factor - 1) l2 w, like ``weights`` (d, R x C), from the sum of the factors of ``records`` records.

        A record of the divisor that is not there was zeroed or replaced: it has the regulariser's gradient alone.
        """
        null = (weight_squares.sqrt() * self.l2).reciprocal_().mul_(self.norm).clamp_(max=1)
        mean = (factors + (divisor - records) * null) / divisor
        return (self.l2 * (mean - 1)).repeat_interleave(weights.shape[1] // len(factors)) * weights
