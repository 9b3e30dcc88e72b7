"""Block-wise noisy fine-tuning: the exact law on a quadratic loss, the formula where clips bind, and the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import norm

from rdp_calc import Target, noise
from rdp_calc.errors import GuardFailed
from rdp_calc.methods.blockwise_finetune import BlockwiseFinetune
from unlearn_runtime.algorithms.blockwise_finetune import blockwise_finetune
from unlearn_runtime.blocks import Block, make_blocks
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
CHAINS = 20_000
HESSIAN = np.array([[1.0, 0.4, 0.0, 0.1], [0.4, 0.8, -0.2, 0.0], [0.0, -0.2, 0.5, 0.3], [0.1, 0.0, 0.3, 0.9]])
OPTIMUM = np.array([1.0, -2.0, 0.5, 1.5])
START = np.array([0.3, 0.2, -0.4, 0.6])
#: The first block is not contiguous.
BLOCKS: tuple[Block, ...] = (((0, 1), (2, 3)), ((1, 2), (3, 4)))
COLUMNS = ([0, 2], [1, 3])


def method_of(**changes: Any) -> BlockwiseFinetune:
    settings: dict[str, Any] = {
        "init_clips": (50.0, 60.0),
        "grad_clips": (100.0, 80.0),
        "block_steps": (4, 3),
        "step_size": 0.2,
        "weight_decay": 0.3,
    }
    return BlockwiseFinetune(**{**settings, **changes})


def quadratic(weights: torch.Tensor) -> Callable[[int], tuple[torch.Tensor, None]]:
    hessian, optimum = torch.from_numpy(HESSIAN), torch.from_numpy(OPTIMUM)
    return lambda t: ((weights - optimum) @ hessian, None)


def run(
    method: BlockwiseFinetune,
    weights: torch.Tensor,
    gradient: Callable[[int], Any],
    *,
    noise_std: float = 0.3,
    blocks: tuple[Block, ...] = BLOCKS,
    seed: int = 5,
) -> GaussianSource:
    source = GaussianSource(CPU, seed=seed)
    blockwise_finetune(
        weights,
        gradient,
        method=method,
        blocks=blocks,
        noise_std=noise_std,
        source=source,
        stepper=Stepper(source),
    )
    return source


def test_the_law_on_a_quadratic_loss_is_the_exact_gaussian() -> None:
    method = method_of()
    stds = [0.3 * ratio for ratio in method.ratios()]
    assert stds[0] != pytest.approx(stds[1], rel=0.05)
    weights = torch.from_numpy(START).repeat(CHAINS, 1)
    source = run(method, weights, quadratic(weights))
    assert source.normals == CHAINS * (4 * 2 + 3 * 2)
    mean, covariance = START, np.zeros((4, 4))
    for block, steps in enumerate((4, 3)):
        treated, free = np.zeros(4), np.zeros(4)
        treated[COLUMNS[block]] = 1
        for later in COLUMNS[block + 1 :]:
            free[later] = 1
        moving = np.diag(treated + free)
        transition = np.eye(4) - 0.2 * moving @ HESSIAN - 0.2 * 0.3 * np.diag(treated)
        for _ in range(steps):
            mean = transition @ mean + 0.2 * moving @ HESSIAN @ OPTIMUM
            covariance = transition @ covariance @ transition.T + stds[block] ** 2 * np.diag(treated)
    white = np.linalg.solve(np.linalg.cholesky(covariance), (weights.numpy() - mean).T)
    assert np.abs(white.mean(axis=1)).max() < 5 / math.sqrt(CHAINS)
    assert np.abs(white @ white.T / CHAINS - np.eye(4)).max() < 5 * math.sqrt(2 / CHAINS)


def clipped(vector: Array, bound: float) -> Array:
    return vector * np.minimum(1.0, bound / np.linalg.norm(vector, axis=1, keepdims=True))


@pytest.mark.parametrize("split", ["equal", "optimal"])
def test_where_clips_bind_every_step_is_the_formula(split: str) -> None:
    clips, bounds = (0.7, 0.4), (0.5, 0.3)
    method = method_of(init_clips=clips, grad_clips=bounds, split=split, block_sizes=(2, 2))
    start = np.random.default_rng(1).normal(size=(40, 4)) * 3
    weights = torch.from_numpy(start.copy())
    seen: list[int] = []
    gradient = quadratic(weights)

    def counted(t: int) -> tuple[torch.Tensor, None]:
        seen.append(t)
        return gradient(t)

    run(method, weights, counted)
    assert seen == list(range(7))
    x, draws = start, GaussianSource(CPU, seed=5)
    for block, steps in enumerate((4, 3)):
        columns = COLUMNS[block]
        x[:, columns] = clipped(x[:, columns], clips[block])
        for _ in range(steps):
            found = (x - OPTIMUM) @ HESSIAN
            draw = torch.empty(40, 2, dtype=torch.float64)
            draws.fill(draw)
            move = clipped(found[:, columns], bounds[block]) + 0.3 * x[:, columns]
            x[:, columns] += -0.2 * move + 0.3 * method.ratios()[block] * draw.numpy()
            for later in COLUMNS[block + 1 :]:
                x[:, later] -= 0.2 * found[:, later]
    np.testing.assert_allclose(weights.numpy(), x, rtol=1e-9, atol=1e-9)


def test_the_advantage_stays_below_the_certified_curve() -> None:
    """Two blocks of one number each; the gradient pushes both away from 0, and the second by the sign of the first."""
    method = method_of(
        init_clips=(0.5, 0.4), grad_clips=(1.0, 0.5), block_steps=(1, 1), step_size=0.02, weight_decay=0.0
    )
    plan = noise(method, Target(epsilon=1.0, delta=0.05))
    assert plan.mu is not None
    assert plan.noise_std is not None
    runs = []
    for side, seed in ((1.0, 3), (-1.0, 4)):
        weights = torch.full((CHAINS, 2), side * 9.0, dtype=torch.float64)
        away = side * torch.full((CHAINS, 2), -1e6)
        run(
            method,
            weights,
            lambda t, away=away: (away, None),
            noise_std=plan.noise_std,
            blocks=(((0, 1),), ((1, 2),)),
            seed=seed,
        )
        # The sufficient statistic of the two means.
        stds = np.array(method.details(plan.noise_std)["block_noise_std"])
        runs.append(weights.numpy() @ (np.array([0.52, 0.41]) / stds**2))
    grid = np.quantile(np.concatenate(runs), np.linspace(0.01, 0.99, 99))
    above = [1 - np.searchsorted(np.sort(found), grid) / CHAINS for found in runs]
    for epsilon in (0.0, 0.5, 1.0):
        mu, error = plan.mu, 4 / math.sqrt(CHAINS) * math.exp(epsilon)
        certified = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        # One step a block, shifts as large as the clips allow: the bound is an equality.
        assert abs((above[0] - math.exp(epsilon) * above[1]).max() - certified) < error


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(GuardFailed, match="not finite"):
        run(method_of(), torch.zeros(1, 4, dtype=torch.float64), lambda t: (torch.full((1, 4), math.nan), None))


def test_rounding_that_could_add_to_mu_is_refused() -> None:
    with pytest.raises(GuardFailed, match="rounding"):
        run(
            method_of(init_clips=(1e-12, 1e-12), grad_clips=(1e-12, 1e-12)),
            torch.zeros(1, 4, dtype=torch.float64),
            lambda t: (torch.zeros(1, 4), None),
            noise_std=100.0,
        )


@pytest.mark.parametrize(
    "blocks", [(((0, 1), (2, 3)), ((1, 2),)), (((0, 2),), ((1, 4),)), (((0, 4),),)], ids=["gap", "overlap", "count"]
)
def test_blocks_that_are_no_partition_are_refused(blocks: tuple[Block, ...]) -> None:
    with pytest.raises(GuardFailed, match="do not partition"):
        run(method_of(), torch.zeros(1, 4, dtype=torch.float64), lambda t: (torch.zeros(1, 4), None), blocks=blocks)


def test_planned_block_sizes_must_be_the_real_ones() -> None:
    with pytest.raises(GuardFailed, match="--block-sizes 2,2"):
        run(
            method_of(block_sizes=(3, 1)),
            torch.zeros(1, 4, dtype=torch.float64),
            lambda t: (torch.zeros(1, 4), None),
        )


RANGES = {"a.weight": (0, 10), "a.bias": (10, 12), "b.weight": (12, 20), "b.bias": (20, 21), "c.weight": (21, 24)}


def test_layers_stay_together_and_blocks_have_nearly_equal_sizes() -> None:
    assert make_blocks("layers", ranges=RANGES, size=24, count=3) == (((0, 12),), ((12, 21),), ((21, 24),))
    assert make_blocks("layers", ranges=RANGES, size=24, count=2) == (((0, 12),), ((12, 24),))
    assert make_blocks("layers", ranges=RANGES, size=24, count=1) == (((0, 24),),)
    with pytest.raises(GuardFailed, match="3 layers"):
        make_blocks("layers", ranges=RANGES, size=24, count=4)


def test_every_block_of_layers_has_one() -> None:
    ranges = {"big.weight": (0, 1000), "x.weight": (1000, 1001), "y.weight": (1001, 1002), "z.weight": (1002, 1003)}
    for count in (1, 2, 3, 4):
        blocks = make_blocks("layers", ranges=ranges, size=1003, count=count)
        assert len(blocks) == count
        assert [block[0][0] for block in blocks[1:]] == [block[-1][1] for block in blocks[:-1]]
        assert (blocks[0][0][0], blocks[-1][-1][1]) == (0, 1003)


def test_equal_blocks_differ_by_one_number_at_most() -> None:
    blocks = make_blocks("equal", ranges=RANGES, size=24, count=5)
    assert [stop - start for ((start, stop),) in blocks] == [4, 5, 5, 5, 5]
    with pytest.raises(GuardFailed, match="24 parameters"):
        make_blocks("equal", ranges=RANGES, size=24, count=25)


def test_blocks_by_name_must_be_a_partition() -> None:
    found = make_blocks((("a.*", "c.weight"), ("b.*",)), ranges=RANGES, size=24, count=2)
    assert found == (((0, 12), (21, 24)), ((12, 21),))
    for split, problem in (
        ((("a.*",), ("b.*",)), "c.weight is in no block"),
        ((("*",), ("b.*",)), r"b.weight is in blocks 0, 1"),
        ((("a.*", "c.*"), ("b.*", "d.*")), r"d\.\* matches no"),
        ((("*",),), "names 1 blocks"),
    ):
        with pytest.raises(GuardFailed, match=problem):
            make_blocks(split, ranges=RANGES, size=24, count=2)
