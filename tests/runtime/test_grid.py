"""Released numbers lie on a power-of-two grid far below the noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unlearn_runtime.grid import on_grid


@pytest.mark.parametrize("noise_std", [1e-12, 0.0128, 1.0, 3e7])
def test_numbers_are_multiples_of_a_power_of_two_below_the_noise(noise_std: float) -> None:
    numbers = torch.from_numpy(np.random.default_rng(3).normal(size=10_000) * noise_std * 50)
    rounded = on_grid(numbers, noise_std)
    step = 2.0 ** np.floor(np.log2(noise_std * 2.0**-20))
    assert torch.equal(rounded / step, (rounded / step).round())
    # Fine: no number moves by more than half a step, which is at most a millionth of the noise.
    assert float((rounded - numbers).abs().max()) <= step / 2 <= 2.0**-21 * noise_std
    # Coarse: distinct sums with equal high bits become one number.
    assert len(torch.unique(on_grid(rounded + step * 0.3, noise_std) - rounded)) == 1


def test_without_noise_nothing_is_rounded() -> None:
    numbers = torch.tensor([0.1, 1e-30], dtype=torch.float64)
    assert torch.equal(on_grid(numbers, 0.0), numbers)
