"""Projections: inside the ball in exact arithmetic, and nothing moved that need not be."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime import projections
from unlearn_runtime.projections import clamp_, clip_factors, norms, project_, tiles

pytestmark = pytest.mark.usefixtures("one_thread")


def exactly_within(vector: torch.Tensor, bound: float) -> bool:
    return sum(Fraction(value) ** 2 for value in vector.tolist()) <= Fraction(bound) ** 2


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 3, 700])
@pytest.mark.parametrize("bound", [1e-6, 1.0, 0.1, 3e8])
def test_projected_vectors_are_inside_in_exact_arithmetic(size: int, bound: float) -> None:
    vectors = draws(60, size) * bound
    # Norms all over, and a few on the boundary up to rounding.
    vectors[:20] *= bound / vectors[:20].norm(dim=1, keepdim=True)
    vectors[20:30] *= 1e6
    before = vectors.clone()
    lengths = project_(vectors, bound)
    torch.testing.assert_close(lengths, before.norm(dim=1), rtol=1e-12, atol=0)
    for old, new in zip(before, vectors, strict=True):
        assert exactly_within(new, bound)
        length = float(old.norm())
        if length < bound * (1 - 1e-9):
            assert torch.equal(old, new)
        else:
            torch.testing.assert_close(new, old * (min(bound, length) / length), rtol=1e-11, atol=0)


def test_a_float32_gradient_is_measured_in_float64() -> None:
    # Squares of these vanish in float32.
    gradient = torch.full((1, 1000), 1e-30, dtype=torch.float32)
    torch.testing.assert_close(norms(gradient)[0].item(), 1e-30 * math.sqrt(1000), rtol=1e-6, atol=0)


def test_tiles_do_not_change_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, center = draws(7, 50), draws(50, seed=1)
    whole = vectors.clone()
    project_(whole, 2.0, ((3, 20), (30, 50)), center=center)
    for tile in (1, 4, 64):
        monkeypatch.setattr(projections, "_TILE", tile)
        found = vectors.clone()
        project_(found, 2.0, ((3, 20), (30, 50)), center=center)
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tile", [1, 3, 8, 1000])
def test_tiles_cover_every_number_once(device: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """meta stands for any accelerator."""
    monkeypatch.setattr(projections, "_TILE", tile)
    counts, ranges = torch.zeros(5, 12), ((0, 4), (6, 11))
    for rows, columns in tiles(5, ranges, torch.device(device)):
        counts[rows, columns] += 1
        if device == "cpu":
            assert counts[rows, columns].numel() <= tile
    expected = torch.zeros(5, 12)
    expected[:, :4] = expected[:, 6:11] = 1
    assert torch.equal(counts, expected)


def test_only_the_given_columns_count_and_move() -> None:
    vectors = draws(5, 10)
    before = vectors.clone()
    project_(vectors, 0.5, ((0, 2), (7, 9)))
    chosen = [0, 1, 7, 8]
    others = [2, 3, 4, 5, 6, 9]
    assert torch.equal(vectors[:, others], before[:, others])
    expected = before[:, chosen] * (0.5 / before[:, chosen].norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(vectors[:, chosen], expected, rtol=1e-11, atol=0)


def test_norms_are_taken_around_the_center() -> None:
    vectors, center = draws(6, 4), draws(4, seed=1) * 10
    expected = center + (vectors - center) / (vectors - center).norm(dim=1, keepdim=True)
    project_(vectors, 1.0, center=center)
    torch.testing.assert_close(vectors, expected, rtol=1e-11, atol=1e-11)


def test_clamping_moves_each_number_to_the_box_around_the_center() -> None:
    vectors, center = draws(6, 4), draws(4, seed=1)
    before = vectors.clone()
    clamp_(vectors, 0.5, center=center)
    assert torch.equal(vectors, torch.minimum(torch.maximum(before, center - 0.5), center + 0.5))
    clamp_(before, 0.25)
    assert float(before.abs().max()) == 0.25


def test_a_zero_vector_stays_zero() -> None:
    vectors = torch.zeros(2, 3, dtype=torch.float64)
    project_(vectors, 1.0)
    assert not vectors.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    vectors = draws(3, 4)
    vectors[1, 2] = value
    with pytest.raises(GuardFailed, match="not finite"):
        project_(vectors, 1.0)
    with pytest.raises(GuardFailed, match="not finite"):
        clip_factors(norms(vectors), math.inf, 4)
    if math.isnan(value):
        with pytest.raises(GuardFailed, match="not finite"):
            clamp_(vectors, 1.0)
