"""The law of the iterates: exact where the loss is quadratic, a minimiser found by scipy where noise vanishes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import norm

from rdp_calc import DataSpec, Langevin
from rdp_calc.errors import GuardFailed
from rdp_calc.methods.descent_to_delete import DescentToDelete
from unlearn_runtime.algorithms import langevin
from unlearn_runtime.algorithms.langevin import Update, descent, initial_weights
from unlearn_runtime.data import Dataset
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.glm_losses import MODELS, Logistic
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.rounding import RoundingGuard

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
CHAINS = 20_000
UNGUARDED = RoundingGuard(limit=math.inf, step_size=1.0)


class LeastSquares(GeneralisedLinearModel):
    """(x.w - y)^2 / 2: a gradient that is linear in w, so that every iterate is exactly Gaussian."""

    @classmethod
    def from_arrays(cls, rows: Array, labels: Array, *, classes: int, device: torch.device) -> LeastSquares:
        return cls(torch.from_numpy(rows), torch.from_numpy(labels)[:, None], divisor=len(rows), outputs=1)

    def residuals_(self, products: torch.Tensor, labels: torch.Tensor) -> None:
        products -= labels

    def curvature(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(products)

    def losses(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (products - labels) ** 2 / 2

    def correct(self, products: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def records(dtype: Any = np.float64) -> tuple[Array, Array]:
    draws = np.random.default_rng(3)
    x = draws.normal(size=(40, 3)) @ np.array([[1.0, 0.6, 0.0], [0.0, 0.8, 0.3], [0.0, 0.0, 0.4]])
    return x.astype(dtype), (x @ np.array([1.0, -2.0, 0.5]) + draws.normal(size=40)).astype(dtype)


def model_of(x: Array, y: Array, divisor: int) -> LeastSquares:
    model = LeastSquares.from_arrays(x, y, classes=2, device=CPU)
    return model.kept(torch.ones(len(x), dtype=torch.bool), divisor=divisor)  # type: ignore[return-value]


def descend(
    model: GeneralisedLinearModel,
    weights: torch.Tensor,
    *,
    steps: int,
    source: GaussianSource | None = None,
    guard: RoundingGuard = UNGUARDED,
    on_step: Callable[[int], None] = lambda step: None,
    **settings: float,
) -> None:
    source, update = source or GaussianSource(CPU), Update(**settings)
    with descent([model], weights, steps=steps, update=update, source=source, guard=guard) as step:
        for index in range(steps):
            step(index)
            on_step(index + 1)


class Gaussian:
    """Mean and covariance of w <- (1 - step_size l2) w - step_size (X'X w - X'y)/divisor + N(0, noise_std^2)."""

    def __init__(self, mean: Array, covariance: Array) -> None:
        self.mean, self.covariance = mean, covariance

    def after(
        self, x: Array, y: Array, divisor: int, *, steps: int, step_size: float, l2: float, noise_std: float
    ) -> Gaussian:
        x, y = x.astype(np.float64), y.astype(np.float64)
        transition = (1 - step_size * l2) * np.eye(3) - step_size * x.T @ x / divisor
        mean, covariance = self.mean, self.covariance
        for _ in range(steps):
            mean = transition @ mean + step_size * x.T @ y / divisor
            covariance = transition @ covariance @ transition.T + noise_std**2 * np.eye(3)
        return Gaussian(mean, covariance)

    def check(self, weights: torch.Tensor) -> None:
        """Every mean and every covariance within 6.5 deviations of its sampling law over independent chains.

        A sample covariance of R normal vectors has entry variance (C_ii C_jj + C_ij^2)/(R - 1) and chi-square tails,
        at R = 20,000 normal to within a factor of 3 out there: twelve numbers of 1e-10, less than 1e-8 in all.
        """
        chains = weights.shape[1]
        deviations = np.sqrt(np.diag(self.covariance))
        assert (np.abs(weights.mean(dim=1).numpy() - self.mean) <= 6.5 * deviations / math.sqrt(chains)).all()
        outer = np.outer(deviations, deviations)
        width = np.sqrt((outer**2 + self.covariance**2) / (chains - 1))
        assert (np.abs(np.cov(weights.numpy()) - self.covariance) <= 6.5 * width).all()


ORIGIN = Gaussian(np.zeros(3), np.zeros((3, 3)))
SETTINGS = {"step_size": 0.7, "l2": 0.15, "noise_std": 0.1}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("steps", [1, 2, 15])
def test_law_of_the_final_iterate(steps: int, dtype: Any) -> None:
    x, y = records(dtype)
    weights = torch.zeros(3, CHAINS, dtype=torch.float64)
    descend(model_of(x, y, 40), weights, steps=steps, **SETTINGS)
    ORIGIN.after(x, y, 40, steps=steps, **SETTINGS).check(weights)


def test_law_check_can_fail() -> None:
    # Each of these laws is at least 12 deviations of the sampled mean or covariance away: missed with Q(5.5) = 2e-8.
    x, y = records()
    weights = torch.zeros(3, CHAINS, dtype=torch.float64)
    descend(model_of(x, y, 40), weights, steps=4, **SETTINGS)
    wrong = [
        ORIGIN.after(x, y, 40, steps=3, **SETTINGS),
        ORIGIN.after(x, y, 41, steps=4, **SETTINGS),
        ORIGIN.after(x[:-1], y[:-1], 40, steps=4, **SETTINGS),
        ORIGIN.after(x, y, 40, steps=4, **(SETTINGS | {"l2": 0.14})),
        ORIGIN.after(x, y, 40, steps=4, **(SETTINGS | {"noise_std": 0.09})),
        ORIGIN.after(x, y, 40, steps=4, **(SETTINGS | {"step_size": 0.65})),
    ]
    for law in wrong:
        with pytest.raises(AssertionError):
            law.check(weights)
    ORIGIN.after(x, y, 40, steps=4, **SETTINGS).check(weights)


@pytest.mark.parametrize("divisor", [36, 40])
def test_learning_then_unlearning(divisor: int) -> None:
    # Four records leave; the mean of what is left is over 36 (remove) or still over 40 (zero-out and replace).
    x, y = records()
    weights = torch.zeros(3, CHAINS, dtype=torch.float64)
    descend(model_of(x, y, 40), weights, steps=10, **SETTINGS)
    descend(model_of(x[4:], y[4:], divisor), weights, steps=5, **SETTINGS)
    learned = ORIGIN.after(x, y, 40, steps=10, **SETTINGS)
    learned.after(x[4:], y[4:], divisor, steps=5, **SETTINGS).check(weights)


def test_start_from_a_random_point() -> None:
    x, y = records()
    model = model_of(x, y, 40)
    weights = initial_weights(model, CHAINS, std=2.0, source=GaussianSource(CPU))
    descend(model, weights, steps=2, **SETTINGS)
    Gaussian(np.zeros(3), 4.0 * np.eye(3)).after(x, y, 40, steps=2, **SETTINGS).check(weights)


def test_zero_steps_change_nothing() -> None:
    x, y = records()
    weights = torch.ones(3, 2, dtype=torch.float64)
    descend(model_of(x, y, 40), weights, steps=0, **SETTINGS)
    assert torch.equal(weights, torch.ones(3, 2, dtype=torch.float64))


def test_steps_are_counted_one_by_one() -> None:
    x, y = records()
    seen: list[int] = []
    guard = RoundingGuard(limit=1.0, step_size=0.5)
    weights = torch.zeros(3, 1, dtype=torch.float64)
    descend(model_of(x, y, 40), weights, steps=5, guard=guard, on_step=seen.append, **SETTINGS)
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shared", [True, False])
def test_threads_change_rounding_only_and_are_put_back(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(langevin, "_SMALL_STEP_FLOPS", 0.0 if shared else math.inf)
    x, y = records()
    seen: list[tuple[bool, int]] = []
    original = LeastSquares.mean_gradient

    def watched(self: LeastSquares, weights: torch.Tensor, *, workers: Any = None) -> torch.Tensor:
        seen.append((workers is not None, torch.get_num_threads()))
        return original(self, weights, workers=workers)

    ends = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            model, weights = model_of(x, y, 40), torch.zeros(3, 5, dtype=torch.float64)
            monkeypatch.setattr(LeastSquares, "mean_gradient", watched)
            descend(model, weights, steps=6, source=GaussianSource(CPU, seed=1), **SETTINGS)
            assert torch.get_num_threads() == threads

            def stop(step: int) -> None:
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                descend(model, weights.clone(), steps=6, on_step=stop, **SETTINGS)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
            monkeypatch.setattr(LeastSquares, "mean_gradient", original)
        ends.append(weights)
    assert (ends[0] - ends[1]).abs().max() < 1e-13
    # Each product is single-threaded, and workers are there only where they pay.
    assert {count for _, count in seen} == {1}
    assert {used for used, _ in seen[:7]} == {False}
    assert {used for used, _ in seen[7:]} == {shared}


@pytest.mark.parametrize("size", [1.0, 1e3, 1e9])
def test_regulariser_is_never_clipped(size: float) -> None:
    # Without records and noise a step multiplies by exactly 1 - step_size l2, however long the weights are.
    empty = Logistic(torch.zeros(0, 4, dtype=torch.float32), torch.zeros(0), divisor=1, outputs=1)
    start = size * torch.arange(-4, 4, dtype=torch.float64).view(4, 2)
    weights = start.clone()
    descend(empty, weights, steps=3, step_size=0.5, l2=0.25, noise_std=0.0)
    assert torch.equal(weights, start * 0.875**3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_vanishing_noise_ends_at_the_minimiser(
    loss: str, dtype: Any, blobs: Callable[..., tuple[Array, Array]]
) -> None:
    outputs, l2, noise_std = (1, 0.05, 1e-6) if loss == "logistic" else (3, 0.05, 1e-6)
    x, y = blobs(n=80, classes=max(2, outputs))
    x = x.astype(dtype)
    labels = 2.0 * y - 1 if loss == "logistic" else y

    def objective(flat: Array) -> float:
        if loss == "logistic":
            data = np.logaddexp(0, -labels * (x.astype(np.float64) @ flat)).mean()
        else:
            scores = x.astype(np.float64) @ flat.reshape(3, 4).T
            data = (logsumexp(scores, axis=1) - scores[np.arange(80), y]).mean()
        return float(data + l2 / 2 * flat @ flat)

    # Derivatives by central differences of the objective in steps of 1e-5: accurate to about 1e-10.
    def slope(flat: Array) -> Array:
        steps = 1e-5 * np.eye(len(flat))
        return np.array([(objective(flat + e) - objective(flat - e)) / 2e-5 for e in steps])

    solved = minimize(objective, np.zeros(4 * outputs), jac=slope, method="BFGS", options={"gtol": 1e-9})
    best = solved.x.reshape(outputs, 4).T
    assert np.abs(slope(solved.x)).max() < 1e-8

    model = MODELS[loss].from_arrays(x.copy(), labels, classes=max(2, outputs), device=CPU)
    chains = 25
    weights = torch.zeros(4, chains * outputs, dtype=torch.float64)
    smoothness = l2 + (0.25 if loss == "logistic" else 0.5)
    descend(model, weights, steps=300, step_size=2 / (smoothness + l2), l2=l2, noise_std=noise_std)
    mean = weights.view(4, chains, outputs).mean(dim=1).numpy()
    # A slope wrong by g moves the minimiser by g/l2: 2e-7 for scipy's, 5e-6 for a float32 gradient (80 terms, 1e-7 of
    # their size). One coordinate of a chain has deviation at most noise_std/sqrt(1 - c^2), c the contraction.
    c = (smoothness - l2) / (smoothness + l2)
    spread = 6 * noise_std / math.sqrt((1 - c**2) * chains)
    assert np.abs(mean - best).max() <= spread + (5e-6 if dtype is np.float32 else 2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype) -> None:
    model = Logistic(torch.ones(3, 2, dtype=dtype), torch.ones(3), divisor=3, outputs=1)
    weights = torch.tensor([[bad, 0.0], [0.0, 0.0]], dtype=torch.float64)
    guard = RoundingGuard(limit=1.0, step_size=0.5)
    for steps in (0, 3):
        with pytest.raises(GuardFailed):
            descend(model, weights.clone(), steps=steps, guard=guard, step_size=0.5, l2=0.1, noise_std=0.1)


@pytest.mark.parametrize("steps", [100, 7, 1])
def test_rounding_is_checked_during_the_run_and_not_only_at_its_start(steps: int) -> None:
    # At zero weights every residual is 1/2 and every sum exact; the error only appears once the weights have moved.
    x = torch.tensor([[1.0, 0.5], [0.5, -1.0]], dtype=torch.float32)
    model = Logistic(x, torch.zeros(2), divisor=2, outputs=1)
    start = torch.zeros(2, 1, dtype=torch.float64)
    guard = RoundingGuard(limit=5e-13, step_size=1.0)
    guard.check([model], start)
    assert guard.largest == 0.0
    reached: list[int] = []
    with pytest.raises(GuardFailed, match="rounding error"):
        descend(model, start, steps=steps, guard=guard, on_step=reached.append, step_size=1.0, l2=0.1, noise_std=0.1)
    assert reached
    # At least ten looks in a run, or one in every step, and one at the end.
    assert reached[-1] <= max(1, steps // 10)


# Whole jobs


@pytest.mark.parametrize("adjacency", ["remove", "zero-out", "replace"])
def test_law_of_two_requests(
    adjacency: str,
    plan_for: Callable[..., Any],
    regression: Callable[..., Any],
    glm_job: Callable[..., Any],
    quadratic_law: Any,
) -> None:
    plan = plan_for(Langevin, adjacency=adjacency, learned=4, step_size=0.6, requests="3:2,2:1", epsilon=500.0)
    dataset, drops = regression(), adjacency == "remove"
    x, y = dataset.x_train, dataset.y_train
    step = {"step_size": 0.6, "l2": 0.2, "noise_std": plan.noise_std}

    def without(law: Any, away: list[int], steps: int, **changes: float) -> Any:
        here = ~np.isin(np.arange(40), away)
        divisor = 40 - len(away) if drops else 40
        return law.after(x[here], y[here], divisor, steps=steps, **(step | changes))

    first = glm_job(plan, dataset, [0, 5, 9], chains=CHAINS, seed=1)
    second = glm_job(plan, dataset, [1, 2], gone=[0, 5, 9], request=2, chains=CHAINS, seed=2)
    learned = first.learn()
    after = first.unlearn(learned)
    last = second.unlearn(second.start_from(after))
    laws = [without(quadratic_law.at_origin(), [], 4)]
    laws.append(without(laws[0], [0, 5, 9], 2))
    laws.append(without(laws[1], [0, 5, 9, 1, 2], 1))
    for state, law in zip((learned, after, last), laws, strict=True):
        assert law.holds(state["weights"])
    reference = second.retrain(last, "fresh")
    assert without(quadratic_law.at_origin(), [0, 5, 9, 1, 2], 7).holds(reference["weights"])
    assert (first.executed()["unlearn_steps"], second.executed()["unlearn_steps"]) == (2, 1)
    wrong = [
        without(laws[1], [0, 5, 9], 1),
        without(laws[1], [1, 2], 1),
        without(laws[1], [0, 5, 9, 1, 2], 2),
        without(laws[1], [0, 5, 9, 1, 2], 1, noise_std=plan.noise_std / 2),
    ]
    assert not any(law.holds(last["weights"]) for law in wrong)


@pytest.mark.parametrize("convexity", ["strongly", "convex", "none"])
def test_projected_chains(
    convexity: str, plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any]
) -> None:
    radius = 0.2
    plan = plan_for(
        Langevin,
        learned=6,
        step_size=0.6,
        unlearn_steps=3,
        radius=radius,
        convexity=convexity,
        epsilon=6.0,
        learn_steps=20,
        dataset_size=100,
    )

    dataset = regression(n=100)
    job = glm_job(plan, dataset, [7], chains=CHAINS)
    learned = job.learn()
    after = job.unlearn(learned)
    draws = np.random.default_rng(1)
    x, y, w = dataset.x_train, dataset.y_train, np.zeros((3, CHAINS))
    for step in range(9):
        here = np.arange(100) != (7 if step >= 6 else -1)
        gradient = x[here].T @ (x[here] @ w - y[here][:, None]) / here.sum()
        w = w - 0.6 * (gradient + 0.2 * w) + plan.noise_std * draws.normal(size=w.shape)
        lengths = np.linalg.norm(w, axis=0)
        w *= np.minimum(1, radius / lengths)
        if step in (5, 8):
            found = (learned if step == 5 else after)["weights"].numpy()
            # Squared in integers, so that no rounding hides a longer chain.
            for chain in found.T[:500]:
                assert sum(Fraction(float(number)) ** 2 for number in chain) <= Fraction(radius) ** 2
            # Projection does bind, not always, and the sampled moments are those of a simulation in numpy.
            share = float((np.linalg.norm(found, axis=0) > radius * (1 - 1e-9)).mean())
            assert 0.01 < share < 0.99
            width = math.sqrt(2 / CHAINS)
            assert abs(share - (lengths > radius).mean()) <= 6.5 * width / 2
            assert (np.abs(found.mean(axis=1) - w.mean(axis=1)) <= 6.5 * width * w.std(axis=1)).all()
            for one, other in ((found, w), (np.abs(found), np.abs(w))):
                squares = (one**2).mean(axis=1) - (other**2).mean(axis=1)
                assert (np.abs(squares) <= 6.5 * width * (w**2).std(axis=1)).all()


def advantage(one: Array, other: Array, direction: Array, threshold: float, epsilon: float) -> tuple[float, float]:
    """P(one beyond) - e^epsilon P(other beyond) as sampled, with the deviation of the estimate."""
    p, q = (float((direction @ w > threshold).mean()) for w in (one, other))
    spread = math.sqrt((p * (1 - p) + math.exp(2 * epsilon) * q * (1 - q)) / one.shape[1])
    return p - math.exp(epsilon) * q, spread


@pytest.mark.parametrize("kind", [Langevin, DescentToDelete])
@pytest.mark.parametrize("unlearned", [0, 1, 5])
def test_advantage_is_what_is_certified(
    unlearned: int, kind: Any, plan_for: Callable[..., Any], glm_job: Callable[..., Any]
) -> None:
    """The worst case of the bound: a forgotten record that pulls with all its strength where the others have no
    curvature. Telling unlearned from retrained models is then exactly as easy as the certificate says.
    """
    learn, n = 6, 30
    plan = plan_for(
        kind,
        adjacency="zero-out",
        learned=learn,
        learn_steps=learn,
        unlearn_steps=unlearned,
        step_size="1/L",
        epsilon=1.0,
        delta=0.05,
        dataset_size=n,
        data=DataSpec(features=2, preprocess="none"),
    )
    x = np.tile([0.0, 0.5], (n, 1))
    x[0] = [1.0, 0.0]
    y = np.full(n, 0.1)
    # The residual stays at the threshold: weights are 30 deviations of noise away from this label.
    y[0] = 1e3
    dataset = Dataset(x_train=x, y_train=y, x_test=None, y_test=None, source="worst")

    def ends(plan: Any) -> tuple[Array, Array]:
        job = glm_job(plan, dataset, [0], chains=CHAINS)
        states = job.unlearn(job.learn()), job.retrain(None, "fresh")
        one, other = (state.get("released", state["weights"]).numpy() for state in states)
        return one, other

    one, other = ends(plan)

    # Theory section 4.2 and 4.5, written out.
    eta, c = plan.method.step_size, 1 - plan.method.step_size * 0.2
    gap = eta / n * c**unlearned * (1 - c**learn) / (1 - c)
    total = learn + unlearned
    std = plan.noise_std * (math.sqrt((1 - c ** (2 * total)) / (1 - c**2)) if kind is Langevin else 1.0)
    mu = gap / std
    assert plan.mu == pytest.approx(mu, rel=1e-9)

    direction = np.array([1.0, 0.0])
    for epsilon in (0.0, 0.5, 1.0, 2.0):
        exact = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        # Two directions, each with its own best event: the likelihood ratio beyond e^epsilon.
        for first, second, sign in ((one, other, 1), (other, one, -1)):
            middle = gap / 2
            threshold = sign * middle + epsilon * std / mu
            found, spread = advantage(first, second, sign * direction, threshold, epsilon)
            assert abs(found - exact) <= 6.5 * spread + 1e-12
    # With half the noise the same pipeline is caught.
    found, spread = advantage(*ends(replace(plan, noise_std=plan.noise_std / 2)), direction, gap / 2, 0.0)
    assert found > norm.cdf(mu / 2) - norm.cdf(-mu / 2) + 6.5 * spread
