"""Gradients and accuracies of the linear models against automatic differentiation of the loss as it is defined."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch

from unlearn_runtime import glm
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.glm_losses import MODELS
from unlearn_runtime.published_clip import PublishedClip

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


# Huber losses, clips and second derivatives


def autograd_records(loss: str, x: Array, y: Array, chain: torch.Tensor) -> torch.Tensor:
    """Data gradient of every record at one chain (d, C), (n, d, C), by automatic differentiation."""
    found = []
    for row, label in zip(x, y, strict=True):
        leaf = chain.clone().requires_grad_()
        score = torch.from_numpy(row.astype(np.float64)) @ leaf
        if loss == "logistic":
            value = torch.nn.functional.softplus(-float(label) * score[0])
        elif loss == "huber":
            value = torch.nn.functional.huber_loss(score[0], torch.tensor(float(label)).double(), delta=0.7)
        else:
            value = torch.nn.functional.cross_entropy(score, torch.tensor(int(label)))
        found.append(torch.autograd.grad(value, leaf)[0])
    return torch.stack(found)


def objective(
    loss: str, n: int, *, dtype: Any = np.float64, **options: Any
) -> tuple[GeneralisedLinearModel, Array, Array]:
    draws = np.random.default_rng(4)
    x = (0.9 * draws.normal(size=(n, 5))).astype(dtype)
    x[0] = 0
    y: Array = {
        "logistic": draws.choice([-1.0, 1.0], n),
        "huber": draws.normal(size=n).astype(np.float32).astype(np.float64),
        "softmax": draws.integers(0, 3, n),
    }[loss]
    if loss == "huber":
        options["threshold"] = 0.7
    model = MODELS[loss].from_arrays(x.copy(), y, classes=3 if loss == "softmax" else 2, device=CPU, **options)
    return model, x, y


def chains(model: GeneralisedLinearModel, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).normal(size=(5, count * model.outputs)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_huber_gradient_and_loss(dtype: Any, blocks: str) -> None:
    model, x, y = objective("huber", 300, dtype=dtype)
    weights = chains(model, 2)
    unit = float(np.finfo(dtype).eps)
    for found in (model.mean_gradient(weights.to(model.rows.dtype)), model.exact_mean_gradient(weights)):
        for c in range(2):
            expected = autograd_records("huber", x, y, weights[:, c : c + 1]).mean(dim=0)[:, 0]
            assert (found[:, c] - expected).abs().max() <= 300 * unit
    scores = x.astype(np.float64) @ weights.numpy() - y[:, None]
    sizes = np.abs(scores)
    by_hand = np.where(sizes <= 0.7, scores**2 / 2, 0.7 * (sizes - 0.35)).mean(axis=0)
    np.testing.assert_allclose(model.loss(weights), by_hand, rtol=300 * unit)
    assert model.accuracy(weights) is None
    signed = MODELS["huber"].from_arrays(x, np.sign(y), classes=2, device=CPU, threshold=0.7, signs=True)
    agree = (np.where(x.astype(np.float64) @ weights.numpy() > 0, 1, -1) == np.sign(y)[:, None]).mean(axis=0)
    found = signed.accuracy(weights)
    assert found is not None
    assert np.abs(found - agree).max() <= 1.01 / 300


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_loss_by_chain(loss: str, blocks: str) -> None:
    model, x, y = objective(loss, 300)
    weights = chains(model, 2)
    for c, chain in enumerate(weights.split(model.outputs, dim=1)):
        scores = torch.from_numpy(x) @ chain
        if loss == "logistic":
            expected = torch.nn.functional.softplus(-torch.from_numpy(y) * scores[:, 0]).mean()
        else:
            expected = torch.nn.functional.cross_entropy(scores, torch.from_numpy(y))
        assert model.loss(weights)[c] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clip", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("loss", ["logistic", "huber"])
def test_residual_clip(loss: str, clip: float, dtype: Any, blocks: str) -> None:
    model, x, y = objective(loss, 300, dtype=dtype, residual_clip=clip)
    weights = chains(model, 2)
    kept = model.kept(torch.arange(300) % 3 > 0, divisor=123)
    for number in range(2):
        gradients = autograd_records(loss, x, y, weights[:, number : number + 1])[:, :, 0]
        # The residual multiplies the row, so clipping it to C/||x|| scales the gradient of one record to norm C.
        clipped = gradients * (clip / gradients.norm(dim=1, keepdim=True)).nan_to_num(nan=1, posinf=1).clamp(max=1)
        assert (clipped.norm(dim=1) > 0.99 * clip).any()
        for part, rows in ((model, slice(None)), (kept, np.arange(300) % 3 > 0)):
            expected = clipped[rows].sum(dim=0) / part.divisor
            for found in (part.mean_gradient(weights.to(part.rows.dtype)), part.exact_mean_gradient(weights)):
                # Limits are 2^-40 short of C/||x||.
                tolerance = 300 * float(np.finfo(dtype).eps) + 2.0**-40
                assert (found[:, number] - expected).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_clipped_gradient_is_longer_than_the_clip(dtype: Any) -> None:
    draws = np.random.default_rng(8)
    x = (10.0 ** draws.uniform(-3, 3, (200, 1)) * draws.normal(size=(200, 30))).astype(dtype)
    # Residuals of 1: every one is clipped, or so long is the row.
    model = MODELS["huber"].from_arrays(
        x.copy(), np.full(200, -1e9), classes=2, device=CPU, threshold=1e6, residual_clip=0.3
    )
    for record in range(200):
        alone = model.kept(torch.arange(200) == record, divisor=1)
        (limit,) = (float(block.limits[0, 0]) for block in alone._blocks if block.limits is not None)
        # Compared as fractions: norm(x) * limit <= 0.3 without any rounding.
        squared = sum(Fraction(float(v)) ** 2 for v in x[record])
        assert squared * Fraction(limit) ** 2 <= Fraction(0.3) ** 2
        assert float(squared) ** 0.5 * limit >= 0.3 * (1 - 1e-6)


def test_clipped_residuals_of_several_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="one number"):
        objective("softmax", 10, residual_clip=1.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clip", [0.2, 0.9, 1e6])
@pytest.mark.parametrize("loss", ["logistic", "huber", "softmax"])
def test_published_clip(loss: str, clip: float, dtype: Any, blocks: str) -> None:
    # What published code does: the gradient of each record, data and l2 w, clipped as one vector; their mean.
    l2, n = 0.3, 200
    model, x, y = objective(loss, n, dtype=dtype, published_clip=PublishedClip(clip, l2))
    short = model.kept(torch.arange(n) < 150, divisor=n)
    weights = chains(model, 2)
    for number, chain in enumerate(weights.split(model.outputs, dim=1)):
        whole = autograd_records(loss, x, y, chain) + l2 * chain
        clipped = whole * (clip / whole.norm(dim=(1, 2), keepdim=True)).clamp(max=1)
        null = l2 * chain * min(1.0, clip / (l2 * float(chain.norm())))
        expected = {model: clipped.sum(dim=0), short: clipped[:150].sum(dim=0) + 50 * null}
        for part, total in expected.items():
            for found in (part.mean_gradient(weights.to(part.rows.dtype)), part.exact_mean_gradient(weights)):
                # A step takes l2 w off by itself.
                step = found.split(model.outputs, dim=1)[number] + l2 * chain
                assert (step - total / n).abs().max() <= 1000 * float(np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("loss", "clip"), [("logistic", None), ("logistic", 0.3), ("huber", None), ("huber", 0.3), ("softmax", None)]
)
def test_hessian_products(loss: str, clip: float | None, blocks: str) -> None:
    model, _, _ = objective(loss, 300, residual_clip=clip)
    weights = chains(model, 1)
    times = model.hessian(weights)
    for seed in range(3):
        direction = torch.from_numpy(np.random.default_rng(seed).normal(size=weights.shape))
        ahead = model.exact_mean_gradient(weights + 1e-7 * direction)
        behind = model.exact_mean_gradient(weights - 1e-7 * direction)
        # Kinks are 1e-7 away with probability 1e-4; differences of float64 gradients in 1e-7 are good to 1e-8.
        assert (times(direction) - (ahead - behind) / 2e-7).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_bound_of_huber_contains_the_error(dtype: Any) -> None:
    model, x, y = objective("huber", 400, dtype=dtype)
    weights = chains(model, 1).to(model.rows.dtype)
    with mpmath.workdps(30):
        total = [mpmath.mpf(0)] * 5
        for row, label in zip(x.astype(np.float64), y.astype(dtype).astype(np.float64), strict=True):
            score = mpmath.fsum(mpmath.mpf(a) * mpmath.mpf(b) for a, b in zip(row, weights[:, 0].tolist(), strict=True))
            residual = min(max(score - mpmath.mpf(label), -mpmath.mpf(0.7)), mpmath.mpf(0.7))
            total = [t + mpmath.mpf(a) * residual for t, a in zip(total, row, strict=True)]
        found = model.mean_gradient(weights)[:, 0].tolist()
        error = mpmath.sqrt(mpmath.fsum((mpmath.mpf(a) - b / 400) ** 2 for a, b in zip(found, total, strict=True)))
    assert 0 < error <= model.rounding_bound(float(weights.double().norm()))
