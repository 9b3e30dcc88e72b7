"""Conjugate gradients against numpy, and what they say where they do not get there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.algorithms.conjugate_gradients import conjugate_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def symmetric(eigenvalues: npt.NDArray[np.float64], seed: int = 0) -> torch.Tensor:
    size = len(eigenvalues)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return torch.from_numpy(turn @ np.diag(eigenvalues) @ turn.T)


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(12,), (4, 3)])
def test_solution_is_that_of_numpy(shape: tuple[int, ...], damping: float) -> None:
    matrix = symmetric(np.geomspace(0.01, 3, 12))
    right = torch.from_numpy(np.random.default_rng(1).normal(size=shape))
    found = conjugate_gradients(
        lambda v: (matrix @ v.reshape(-1)).view(v.shape), right, damping=damping, tolerance=1e-12
    )
    exact = np.linalg.solve(matrix.numpy() + damping * np.eye(12), right.numpy().ravel())
    np.testing.assert_allclose(found.solution.numpy().ravel(), exact, rtol=0, atol=1e-12 / (0.01 + damping))
    assert found.solution.shape == shape
    assert found.residual <= 1e-12
    assert 0.01 + damping <= found.least_curvature <= 3 + damping


@pytest.mark.parametrize("tolerance", [1e-1, 1e-4])
def test_a_loose_tolerance_stops_early(tolerance: float) -> None:
    matrix = symmetric(np.geomspace(1e-3, 1, 60))
    right = torch.from_numpy(np.random.default_rng(1).normal(size=60))
    found = conjugate_gradients(lambda v: matrix @ v, right, tolerance=tolerance)
    left = float((right - matrix @ found.solution).norm())
    assert left <= tolerance
    assert left > tolerance / 1e4
    assert found.residual == pytest.approx(left, rel=1e-6)


def test_the_residual_is_the_true_one() -> None:
    # Products in float32: the recurrence goes on to 1e-10 and below, the true residual of what was added up does not.
    matrix = symmetric(np.geomspace(1e-4, 1, 40)).float()
    right = torch.from_numpy(np.random.default_rng(1).normal(size=40))

    def times(vector: torch.Tensor) -> torch.Tensor:
        return (matrix @ vector.float()).double()

    with pytest.raises(GuardFailed, match=r"reached a residual of (\S+) after \d+ products, 1e-10 is needed") as found:
        conjugate_gradients(times, right, tolerance=1e-10)
    assert 1e-7 < float(str(found.value).split("residual of ")[1].split()[0]) < 1e-2


def test_restarts_repair_what_rounding_broke() -> None:
    # Badly conditioned, the recurrence drifts away; starting again from the true residual gets there.
    matrix = symmetric(np.geomspace(1e-9, 1, 30))
    right = matrix @ torch.from_numpy(np.random.default_rng(1).normal(size=30))
    found = conjugate_gradients(lambda v: matrix @ v, right, tolerance=1e-13, most_iterations=5000)
    assert float((right - matrix @ found.solution).norm()) <= 1e-13 * 1.5


def test_no_positive_curvature_is_told() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5]).double())
    right = torch.ones(3).double()
    with pytest.raises(GuardFailed, match="not positive definite"):
        conjugate_gradients(lambda v: matrix @ v, right, tolerance=1e-9)
    solved = conjugate_gradients(lambda v: matrix @ v, right, damping=1.0, tolerance=1e-12).solution
    np.testing.assert_allclose(solved, [0.5, 1 / 3, 2.0], rtol=1e-12)
    with pytest.raises(GuardFailed, match="not positive definite"):
        conjugate_gradients(lambda v: v * float("nan"), right, tolerance=1e-9)


def test_a_bounded_number_of_products() -> None:
    matrix = symmetric(np.geomspace(1e-6, 1, 50))
    count = 0

    def times(vector: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return matrix @ vector

    with pytest.raises(GuardFailed, match=r"after 7 products"):
        conjugate_gradients(times, torch.ones(50).double(), tolerance=1e-12, most_iterations=7)
    # One more for the true residual.
    assert count == 8
    assert conjugate_gradients(times, torch.zeros(50).double(), tolerance=1e-12).iterations == 0
