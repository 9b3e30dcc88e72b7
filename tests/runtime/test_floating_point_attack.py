"""Attacks on how weights and noise were added (docs/threat-model.md): naive additions fall, the release does not.

The two candidates for a weight are 0 and 1, and the noise has standard deviation 1: by theory (mu = 1) an event that
has probability 0.05 under one has a probability above 0 under the other.
"""

from __future__ import annotations

import math

import pytest
import torch

from unlearn_runtime.algorithms.noisy_step import NoisyStep
from unlearn_runtime.grid import on_grid
from unlearn_runtime.noise import GaussianSource

DRAWS = 2**18
CPU = torch.device("cpu")


def below(x: torch.Tensor, bit: int) -> torch.Tensor:
    """The event of the attacker: near zero, and no multiple of 2^-bit."""
    scaled = x.double() * 2.0**bit
    return (x.abs() < 0.125) & (scaled != scaled.round())


def summed(w: float, source: GaussianSource) -> torch.Tensor:
    """w plus noise as a run adds it, in float64."""
    weights = torch.full((1, DRAWS), w, dtype=torch.float64)
    NoisyStep(weights, source).add_noise(1.0)
    return weights[0]


@pytest.fixture(params=[False, True], ids=["default", "secure"])
def source(request: pytest.FixtureRequest) -> GaussianSource:
    return GaussianSource(CPU, entropy=bytes(range(32)), secure=request.param)


def test_the_attack_breaks_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    seen = {w: below(torch.randn(DRAWS, generator=generator) + w, 24).double().mean() for w in (0.0, 1.0)}
    # Whoever sees such a number knows for certain: an (epsilon, 0.05) guarantee does not hold for any epsilon.
    assert seen[0.0] > 0.05
    assert seen[1.0] == 0


def test_the_attack_breaks_float64(source: GaussianSource) -> None:
    # Drawing in float64 is not enough: the same bits are there, further down.
    assert below(summed(0.0, source), 53).double().mean() > 0.05
    assert not below(summed(1.0, source), 53).any()


def test_float32_files_alone_leave_some_of_it() -> None:
    # A file in float32 keeps the first 24 bits, which of a number below 2^-30 reach beyond the 53rd after the point.
    tiny = torch.tensor([1.25 * 2.0**-53], dtype=torch.float64)
    assert bool(below(tiny.float(), 53).all())
    assert not bool(below(on_grid(tiny, 1.0).float(), 53).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_release_shows_the_attacker_nothing(dtype: torch.dtype, source: GaussianSource) -> None:
    released = {w: on_grid(summed(w, source), 1.0).to(dtype) for w in (0.0, 1.0)}
    for numbers in released.values():
        for bit in (24, 53):
            assert not below(numbers, bit).any()
        scaled = numbers.double() * 2**20
        assert torch.equal(scaled, scaled.round())
    # The last bits that are left are as good as random under both.
    for numbers in released.values():
        near = numbers[numbers.abs() < 0.5].double() * 2**20
        for period in (2, 4, 8):
            shares = torch.bincount((near.long() % period), minlength=period) / len(near)
            assert float((shares - 1 / period).abs().max()) < 5 / math.sqrt(len(near))


@pytest.mark.parametrize("width", [3.910757959537, 3.6541528853610088, 2.0, 1.0, 0.2720])
@pytest.mark.parametrize("w", [0.0, 1.0, 0.3, -1 / 3, 1e-9])
def test_a_cell_of_the_grid_has_its_mass_whatever_the_weight(width: float, w: float) -> None:
    # A layer of the default source's ziggurat draws k width 2^-52 with a sign, k uniform below 2^52. How many of these
    # end in a cell of the grid is counted, not sampled.
    step, spacing = 2.0**-20, width * 2.0**-52
    offsets = torch.tensor([-0.95, -0.5, -0.1234567, 0.1, 0.25, 0.6180339, 0.9], dtype=torch.float64) * width
    cells = torch.round((w + offsets) / step)
    counts = torch.zeros(len(cells), dtype=torch.float64)
    for sign in (-1.0, 1.0):

        def first(limit: torch.Tensor, sign: float = sign) -> torch.Tensor:
            """The first k at which the released number is at or beyond a cell, in the direction of the draws."""
            low, high = torch.zeros(len(limit), dtype=torch.int64), torch.full((len(limit),), 2**52)
            while bool((low < high).any()):
                middle = (low + high) // 2
                number = torch.round(on_grid(w + sign * (middle.double() * spacing), 1.0) / step)
                beyond = (number - limit) * sign >= 0
                high, low = torch.where(beyond, middle, high), torch.where(beyond, low, torch.minimum(middle + 1, high))
            return low

        counts += (first(cells + sign) - first(cells)).double()
    expected = step / spacing
    assert float((counts / expected - 1).abs().max()) < 2.0**-27
    assert expected > 2**30


def test_what_stays_open() -> None:
    # Noise below 2^-33 of a weight: the grid is finer than doubles of that size, and only a float32 file cuts anything.
    numbers = 1.0 + torch.arange(64, dtype=torch.float64) * 2.0**-52
    assert torch.equal(on_grid(numbers, 2.0**-33), numbers)
    assert not torch.equal(on_grid(numbers, 2.0**-31), numbers)
    assert len(torch.unique(numbers.float())) == 1
