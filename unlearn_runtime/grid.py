"""Released numbers lie on a fixed grid, so that their last bits tell nothing of how weights and noise were added.

In floating point the sum w + noise can reach some numbers for one w and not for another (Mironov 2012; for Gaussian
noise Haney et al. 2022, arXiv:2207.13793). Rounding to a grid much coarser than doubles and much finer than the noise
is post-processing in theory and closes that in practice.
"""

from __future__ import annotations

import math

import torch

#: The grid has 2^20 points within one standard deviation of the noise.
_BITS = 20


def on_grid(numbers: torch.Tensor, noise_std: float) -> torch.Tensor:
    """Float64 ``numbers`` rounded to multiples of a power of two, at most noise_std 2^-20; unchanged without noise."""
    if not noise_std > 0:
        return numbers
    step = 2.0 ** (math.floor(math.log2(noise_std)) - _BITS)
    return torch.round(numbers / step).mul_(step)
