"""Descent-to-delete: noise-free gradient descent; noise on the released copy only, the state stays secret.

Rewinding: learning keeps the iterate from which so many steps were left, and unlearning starts there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from unlearn_runtime.noise import GaussianSource


def published(weights: torch.Tensor, *, noise_std: float, source: GaussianSource) -> torch.Tensor:
    """A copy with fresh noise, N(0, noise_std^2) on every number of every chain."""
    released = torch.empty_like(weights)
    source.fill(released)
    return released.mul_(noise_std).add_(weights)


def keeping(
    step: Callable[[int], None], weights: torch.Tensor, kept: torch.Tensor, *, at: int
) -> Callable[[int], None]:
    """The step that first copies the iterate number ``at`` into ``kept``."""

    def keep_then_step(index: int) -> None:
        if index == at:
            kept.copy_(weights)
        step(index)

    return keep_then_step
