"""Minibatches of shuffled epochs, as a stream that a checkpoint can resume."""

from __future__ import annotations

import math

import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.noise import GaussianSource


class Batches:
    """Batch t of records 0..n-1: each epoch is a fresh permutation cut into batches of ``size``, the last one shorter.

    The order depends on nothing but n and fresh randomness. So two runs on the same retained records may be compared
    order by order, and given the order each step is the same kernel in both (theory 4.6).

    ``order`` is all of its memory: the permutation of the epoch under way, on the device.
    """

    def __init__(self, n: int, size: int, *, source: GaussianSource, device: torch.device) -> None:
        if n < 1:
            raise GuardFailed("no record is retained, so there is nothing to train on.")
        self.size = min(size, n)
        self.per_epoch = -(-n // self.size)
        self.order = torch.zeros(n, dtype=torch.int64, device=device)
        self._source = source

    def __call__(self, t: int) -> torch.Tensor:
        """The indices of batch t; call it for t = 0, 1, ... in turn."""
        place = t % self.per_epoch
        if place == 0:
            self.order.copy_(torch.from_numpy(self._source.permutation(len(self.order))))
        return self.order[place * self.size : (place + 1) * self.size]

    def steps(self, epochs: float) -> int:
        """Batches in so many epochs, a started batch counted."""
        return max(1, math.ceil(epochs * self.per_epoch - 1e-9))
