"""Gradients and accuracies of the linear models against automatic differentiation of the loss as it is defined."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch

from unlearn_runtime import glm
from unlearn_runtime.glm import MODELS, GeneralisedLinearModel

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
FLOATS = [np.float32, np.float64]
# Rows per block are at least 256, so these give one block, full blocks, and a last block of another size.
SIZES = [1, 255, 256, 257, 700]


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "many blocks":
        monkeypatch.setattr(glm, "_CPU_BLOCK_BYTES", 1)
    return str(request.param)


class Problem:
    """Records of one loss, the model built from them, and its loss written out as a function of one chain."""

    def __init__(self, loss: str, n: int, *, d: int = 5, dtype: Any = np.float64, seed: int = 0) -> None:
        draws = np.random.default_rng(seed)
        self.loss = loss
        self.outputs = 1 if loss == "logistic" else 3
        self.x = draws.normal(size=(n, d)).astype(dtype)
        self.y = draws.choice([-1.0, 1.0], n) if loss == "logistic" else draws.integers(0, self.outputs, n)
        self.model = MODELS[loss].from_arrays(self.x.copy(), self.y, classes=max(2, self.outputs), device=CPU)
        self.draws = draws

    def weights(self, chains: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(scale * self.draws.normal(size=(self.x.shape[1], chains * self.outputs)))

    def loss_sum(self, chain: torch.Tensor, rows: slice | Array = slice(None)) -> torch.Tensor:
        """Sum of ln(1 + exp(-y x.w)), or of -log softmax(x W)_y, over the records; ``chain`` is (d, outputs)."""
        scores = torch.from_numpy(self.x[rows].astype(np.float64)) @ chain
        if self.loss == "logistic":
            margins = -torch.from_numpy(self.y[rows]) * scores[:, 0]
            return torch.logaddexp(torch.zeros_like(margins), margins).sum()
        chosen = torch.log_softmax(scores, dim=1).gather(1, torch.from_numpy(self.y[rows])[:, None])
        return -chosen.sum()

    def gradient(self, weights: torch.Tensor, divisor: int, rows: slice | Array = slice(None)) -> torch.Tensor:
        """Automatic differentiation of loss_sum / divisor, chain by chain."""
        parts = []
        for chain in weights.double().split(self.outputs, dim=1):
            leaf = chain.clone().requires_grad_()
            (part,) = torch.autograd.grad(self.loss_sum(leaf, rows) / divisor, leaf)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def tolerance(self, divisor: int, dtype: Any) -> float:
        """Rounding of a sum: residuals are at most 1, a block sums 700 rows at most, a product d features."""
        mass = float(np.abs(self.x).sum(axis=0).max()) / divisor
        return (700 + 5 + 10) * float(np.finfo(dtype).eps) * mass


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_mean_gradient(loss: str, n: int, chains: int, dtype: Any, blocks: str) -> None:
    problem = Problem(loss, n, dtype=dtype)
    weights = problem.weights(chains).to(torch.from_numpy(problem.x).dtype)
    expected = problem.gradient(weights, n)
    found = problem.model.mean_gradient(weights)
    assert found.dtype == torch.float64
    assert found.shape == weights.shape
    assert (found - expected).abs().max() <= problem.tolerance(n, dtype)
    # The exact gradient at float32 rows is float64 all the way.
    exact = problem.model.exact_mean_gradient(weights)
    assert (exact - expected).abs().max() <= problem.tolerance(n, np.float64)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_several_blocks_are_really_walked(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glm, "_CPU_BLOCK_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    problem = Problem(loss, 700)
    seen: list[int] = []
    original = type(problem.model).residuals_

    def counted(self: GeneralisedLinearModel, products: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append(len(products))
        original(self, products, labels)

    monkeypatch.setattr(type(problem.model), "residuals_", counted)
    problem.model.mean_gradient(problem.weights(1))
    # Two workers, four blocks of one size: the first and third, then the second and fourth.
    assert seen == [175, 175, 175, 175]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 5, 700])
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_workers_share_the_rows(loss: str, n: int, threads: int, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    problem = Problem(loss, n)
    with ThreadPoolExecutor(threads) as workers:
        for chains in (2, 1):
            weights = problem.weights(chains)
            expected = problem.gradient(weights, n)
            found = [problem.model.mean_gradient(weights, workers=workers).clone() for _ in range(5)]
            assert (found[0] - expected).abs().max() <= problem.tolerance(n, np.float64)
            # One order of summation, whichever worker is first.
            assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_divisor_need_not_be_the_row_count(loss: str, blocks: str) -> None:
    problem = Problem(loss, 700)
    mask = torch.from_numpy(np.arange(700) % 7 != 3)
    for divisor in (600, 700, 1234):
        kept = problem.model.kept(mask, divisor=divisor)
        weights = problem.weights(2)
        expected = problem.gradient(weights, divisor, mask.numpy())
        assert kept.divisor == divisor
        for found in (kept.mean_gradient(weights), kept.exact_mean_gradient(weights)):
            assert (found - expected).abs().max() <= problem.tolerance(divisor, np.float64)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_kept_records_are_copies(loss: str) -> None:
    problem = Problem(loss, 10)
    kept = problem.model.kept(torch.arange(10) < 4, divisor=4)
    weights = problem.weights(1)
    before = kept.mean_gradient(weights).clone()
    problem.model.rows.zero_()
    assert torch.equal(kept.mean_gradient(weights), before)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_no_records_pull_nowhere(loss: str) -> None:
    problem = Problem(loss, 5)
    empty = problem.model.kept(torch.zeros(5, dtype=torch.bool), divisor=5)
    weights = problem.weights(2)
    assert torch.equal(empty.mean_gradient(weights), torch.zeros_like(weights))
    assert torch.equal(empty.exact_mean_gradient(weights), torch.zeros_like(weights))
    with pytest.raises(ValueError, match="no records"):
        empty.accuracy(weights)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_number_of_chains_may_change_between_calls(loss: str, blocks: str) -> None:
    problem = Problem(loss, 300)
    for chains in (2, 5, 1, 2):
        weights = problem.weights(chains)
        found = problem.model.mean_gradient(weights)
        assert (found - problem.gradient(weights, 300)).abs().max() <= problem.tolerance(300, np.float64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_extreme_weights_give_finite_gradients(loss: str, scale: float, dtype: Any) -> None:
    problem = Problem(loss, 300, dtype=dtype)
    weights = problem.weights(2, scale).to(torch.from_numpy(problem.x).dtype)
    expected = problem.gradient(weights, 300)
    for found in (problem.model.mean_gradient(weights), problem.model.exact_mean_gradient(weights)):
        assert torch.isfinite(found).all()
    # A product of size 1e4 carries an absolute error of 1e4 roundings, and a residual changes at most that much; only
    # in float64 does that leave digits to compare.
    exact = problem.model.exact_mean_gradient(weights)
    assert (exact - expected).abs().max() <= scale * 100 * float(np.finfo(np.float64).eps) * np.abs(problem.x).max()


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_labels_and_rows_follow_each_other(loss: str) -> None:
    # One record pulls its own class up: the sign of the step, which no symmetric data would show.
    problem = Problem(loss, 1)
    weights = torch.zeros(5, problem.outputs, dtype=torch.float64)
    stepped = weights - problem.model.mean_gradient(weights)
    with torch.no_grad():
        assert problem.loss_sum(stepped) < problem.loss_sum(weights)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_rounding_bound_contains_the_error(loss: str, scale: float, dtype: Any) -> None:
    # Rows of norm 1 that all pull the same way, so that their sum grows as far as it can, over a smaller divisor.
    draws = np.random.default_rng(2)
    x = (np.array([0.6, -0.48, 0.64]) + 1e-3 * draws.normal(size=(40, 3))).astype(dtype)
    labels = np.ones(40) if loss == "logistic" else np.zeros(40, dtype=np.int64)
    outputs = 1 if loss == "logistic" else 3
    model = MODELS[loss].from_arrays(x.copy(), labels, classes=max(2, outputs), device=CPU)
    model = model.kept(torch.ones(40, dtype=torch.bool), divisor=17)
    weights = torch.from_numpy((scale * draws.normal(size=(3, outputs))).astype(dtype))
    columns = weights.double().t().tolist()
    # Thirty digits: the loss written with mpmath, its gradient from the definition of the derivative of each term.
    with mpmath.workdps(30):
        total = [[mpmath.mpf(0)] * outputs for _ in range(3)]
        for row in x.astype(np.float64):
            scores = [mpmath.fsum(mpmath.mpf(a) * mpmath.mpf(b) for a, b in zip(row, w, strict=True)) for w in columns]
            if loss == "logistic":
                residuals = [-1 / (1 + mpmath.exp(scores[0]))]
            else:
                mass = mpmath.fsum(mpmath.exp(score) for score in scores)
                residuals = [mpmath.exp(score) / mass - (c == 0) for c, score in enumerate(scores)]
            total = [
                [t + mpmath.mpf(a) * r for t, r in zip(line, residuals, strict=True)]
                for line, a in zip(total, row, strict=True)
            ]
        found = model.mean_gradient(weights)
        pairs = [(found[j, c], total[j][c]) for j in range(3) for c in range(outputs)]
        error = mpmath.sqrt(mpmath.fsum((mpmath.mpf(float(a)) - b / 17) ** 2 for a, b in pairs))
        bound = model.rounding_bound(float(weights.double().norm()))
        assert error <= bound
        # Not so loose that it would refuse everything: a few hundred roundings of a gradient of size 40/17.
        assert bound <= (500 + 20 * scale) * float(np.finfo(dtype).eps) * 40 / 17


def predicted(problem: Problem, chain: Array) -> Array:
    scores = problem.x.astype(np.float64) @ chain
    if problem.loss == "logistic":
        return np.where(scores[:, 0] > 0, 1.0, -1.0)
    return np.array([max(range(problem.outputs), key=row.__getitem__) for row in scores])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_accuracy_by_chain(loss: str, dtype: Any) -> None:
    problem = Problem(loss, 400, dtype=dtype)
    # The first chain learned something, so that its accuracy is far from that of the random ones.
    good = np.linalg.lstsq(problem.x, problem.y if loss == "logistic" else np.eye(3)[problem.y], rcond=None)[0]
    weights = problem.weights(3)
    weights[:, : problem.outputs] = torch.from_numpy(good.reshape(5, -1).astype(np.float64))
    expected = [
        float(np.mean(predicted(problem, chain.numpy()) == problem.y)) for chain in weights.split(problem.outputs, 1)
    ]
    assert len({round(value, 2) for value in expected}) > 1
    found = problem.model.accuracy(weights)
    assert found.shape == (3,)
    # One record may change sides by rounding in float32.
    assert np.abs(found - expected).max() <= (1.01 / 400 if dtype is np.float32 else 1e-12)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_from_arrays(loss: str, blobs: Callable[..., tuple[Array, Array]]) -> None:
    x, y = blobs(n=9, classes=2 if loss == "logistic" else 3)
    labels = 2.0 * y - 1 if loss == "logistic" else y
    model = MODELS[loss].from_arrays(x.copy(), labels, classes=2 if loss == "logistic" else 3, device=CPU)
    assert (model.divisor, model.features, model.outputs) == (9, 4, 1 if loss == "logistic" else 3)
