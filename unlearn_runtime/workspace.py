"""Memory that the gradients of a linear model write to, kept from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Buffers:
    """What one worker writes to: products (rows, R x C), a block's gradient and the float64 sum (d, R x C), and sums
    of clip factors (R,).
    """

    products: torch.Tensor
    part: torch.Tensor
    total: torch.Tensor
    factors: torch.Tensor


@dataclass
class Workspace:
    """Buffers by worker, shared by models of one data set that are never computed at the same time."""

    buffers: list[Buffers] = field(default_factory=list)

    def of(self, rows: torch.Tensor, columns: int, chains: int, *, height: int, workers: int) -> list[Buffers]:
        """At least ``workers`` buffers for blocks of at most ``height`` of such rows and R x C = ``columns``."""
        fits = self.buffers and self.buffers[0].part.shape[1] == columns and len(self.buffers) >= workers
        if not fits or len(self.buffers[0].products) < height:
            features = rows.shape[1]
            self.buffers = [
                Buffers(
                    rows.new_empty((height, columns)),
                    rows.new_empty((features, columns)),
                    rows.new_zeros((features, columns), dtype=torch.float64),
                    rows.new_zeros((chains,), dtype=torch.float64),
                )
                for _ in range(workers)
            ]
        return self.buffers
