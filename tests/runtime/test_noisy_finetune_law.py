"""The law of noisy fine-tuning: exactly Gaussian on quadratic losses, the formula step by step where clips bind, and an
advantage below the certified curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import norm

from rdp_calc import NoisyFinetune, Target, noise
from rdp_calc.errors import GuardFailed
from rdp_calc.schedule_values import ratios
from unlearn_runtime.algorithms.noisy_finetune import noisy_finetune
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
CHAINS = 20_000
HESSIAN = np.array([[1.0, 0.4, 0.0], [0.4, 0.8, -0.2], [0.0, -0.2, 0.5]])
OPTIMUM = np.array([1.0, -2.0, 0.5])
START = np.array([0.3, 0.2, -0.4])


def method_of(**changes: Any) -> NoisyFinetune:
    settings: dict[str, Any] = {"init_clip": 50.0, "grad_clip": 100.0, "step_size": 0.2, "unlearn_steps": 7}
    return NoisyFinetune(**{**settings, "accounted_steps": changes.get("unlearn_steps", 7), **changes})


def quadratic(weights: torch.Tensor) -> Callable[[int], tuple[torch.Tensor, None]]:
    hessian, optimum = torch.from_numpy(HESSIAN), torch.from_numpy(OPTIMUM)
    return lambda t: ((weights - optimum) @ hessian, None)


def run(
    method: NoisyFinetune,
    weights: torch.Tensor,
    gradient: Callable[[int], Any],
    *,
    noise_std: float = 0.3,
    seed: int = 5,
    **more: Any,
) -> GaussianSource:
    source = GaussianSource(CPU, seed=seed)
    settings = {"mu": 1.0, **more}
    noisy_finetune(
        weights,
        gradient,
        method=method,
        noise_std=noise_std,
        source=source,
        stepper=Stepper(source),
        **settings,
    )
    return source


def assert_gaussian(weights: torch.Tensor, mean: Array, covariance: Array) -> None:
    """Sample mean and covariance within five standard errors, in the coordinates where the law is standard."""
    white = np.linalg.solve(np.linalg.cholesky(covariance), (weights.numpy() - mean).T)
    chains = white.shape[1]
    assert np.abs(white.mean(axis=1)).max() < 5 / math.sqrt(chains)
    assert np.abs(white @ white.T / chains - np.eye(len(mean))).max() < 5 * math.sqrt(2 / chains)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.3},
        {"noise_schedule": "linear:0.2", "step_schedule": "cosine", "weight_decay": 0.1},
        {"noise_schedule": (1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 0.7), "step_schedule": "linear:2"},
        {"accounted_steps": 3},
    ],
    ids=["plain", "decay", "schedules", "listed", "prefix"],
)
def test_the_law_on_a_quadratic_loss_is_the_exact_gaussian(changes: dict[str, Any]) -> None:
    method = method_of(**changes)
    weights = torch.from_numpy(START).repeat(CHAINS, 1)
    run(method, weights, quadratic(weights))
    mean, covariance = START, np.zeros((3, 3))
    for t in range(7):
        step = 0.2 * ratios(method.step_schedule, 7)[t]
        std = 0.3 * ratios(method.noise_schedule, 7)[t] * (t < method.accounted())
        transition = (1 - step * method.weight_decay) * np.eye(3) - step * HESSIAN
        mean = transition @ mean + step * HESSIAN @ OPTIMUM
        covariance = transition @ covariance @ transition.T + std**2 * np.eye(3)
    assert_gaussian(weights, mean, covariance)


def test_the_law_with_momentum_is_the_exact_gaussian() -> None:
    weights = torch.from_numpy(START).repeat(CHAINS, 1)
    run(method_of(optimizer="momentum", weight_decay=0.1), weights, quadratic(weights), momentum=0.6)
    eye, zero = np.eye(3), np.zeros((3, 3))
    # (x, v): v <- 0.6 v + H (x - x*), then x <- (1 - gamma lambda) x - gamma v + noise.
    transition = np.block([[0.98 * eye - 0.2 * HESSIAN, -0.12 * eye], [HESSIAN, 0.6 * eye]])
    constant = np.concatenate([0.2 * HESSIAN @ OPTIMUM, -HESSIAN @ OPTIMUM])
    mean, covariance = np.concatenate([START, np.zeros(3)]), np.zeros((6, 6))
    for _ in range(7):
        mean = transition @ mean + constant
        covariance = transition @ covariance @ transition.T + 0.09 * np.block([[eye, zero], [zero, zero]])
    assert_gaussian(weights, mean[:3], covariance[:3, :3])


def clipped(vector: Array, bound: float) -> Array:
    return vector * np.minimum(1.0, bound / np.linalg.norm(vector, axis=1, keepdims=True))


def normals(shape: tuple[int, ...], count: int, seed: int = 5) -> list[Array]:
    """What a source of this seed fills into ``count`` buffers one after another."""
    source, found = GaussianSource(CPU, seed=seed), []
    for _ in range(count):
        buffer = torch.empty(shape, dtype=torch.float64)
        source.fill(buffer)
        found.append(buffer.numpy())
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_where_clips_bind_every_step_is_the_formula(optimizer: str) -> None:
    steps, decay, center = 9, 0.4, np.array([2.0, -1.0, 0.5])
    method = NoisyFinetune(
        init_clip=0.8,
        grad_clip=0.5,
        step_size=0.3,
        unlearn_steps=steps,
        weight_decay=decay,
        noise_schedule="linear:0.5",
        step_schedule="cosine",
        optimizer=optimizer,
        accounted_steps=steps,
        center="0" * 64,
    )
    start = np.random.default_rng(1).normal(size=(40, 3)) * 2
    weights = torch.from_numpy(start.copy())
    run(method, weights, quadratic(weights), center=torch.from_numpy(center), momentum=0.7)

    x = center + clipped(start - center, 0.8)
    velocity, first, second = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    bound = 0
    for t, draw in enumerate(normals(x.shape, steps)):
        gradient = (x - OPTIMUM) @ HESSIAN
        velocity = 0.7 * velocity + gradient
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        adam = (first / (1 - 0.9 ** (t + 1))) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
        direction = {"sgd": gradient, "momentum": velocity, "adam": adam}[optimizer]
        bound += int((np.linalg.norm(direction, axis=1) > 0.5).sum())
        step = 0.3 * ratios("cosine", steps)[t]
        x = x - step * (clipped(direction, 0.5) + decay * (x - center)) + 0.3 * ratios("linear:0.5", steps)[t] * draw
    assert bound > 100
    np.testing.assert_allclose(weights.numpy(), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_directions_are_those_of_torch(optimizer: str) -> None:
    x = torch.nn.Parameter(torch.from_numpy(START)[None].clone())
    peer: torch.optim.Optimizer = torch.optim.Adam([x], lr=0.2)
    if optimizer == "momentum":
        peer = torch.optim.SGD([x], lr=0.2, momentum=0.9)
    weights = torch.from_numpy(START)[None].clone()
    run(method_of(optimizer=optimizer), weights, quadratic(weights))
    for draw in normals((1, 3), 7):
        x.grad = (x.detach() - torch.from_numpy(OPTIMUM)) @ torch.from_numpy(HESSIAN)
        peer.step()
        with torch.no_grad():
            x += 0.3 * torch.from_numpy(draw)
    torch.testing.assert_close(weights, x.detach(), rtol=1e-9, atol=1e-9)


def test_only_accounted_steps_are_noised_and_all_are_clipped() -> None:
    method = NoisyFinetune(init_clip=1.0, grad_clip=0.5, step_size=0.25, unlearn_steps=30)
    assert method.accounted() == 8
    weights = torch.zeros(2, 3, dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def push(t: int) -> tuple[torch.Tensor, None]:
        seen.append(weights.clone())
        return torch.full((2, 3), -1e3, dtype=torch.float32), None

    source = run(method, weights, push)
    assert source.normals == 8 * weights.numel()
    moves = torch.stack([*seen[9:], weights]) - torch.stack(seen[8:])
    torch.testing.assert_close(moves.norm(dim=2), torch.full((22, 2), 0.125, dtype=torch.float64), rtol=1e-9, atol=0)
    # Any move beyond the accounted drift in an accounted step is noise.
    assert ((seen[1] - seen[0]).norm(dim=1) - 0.125).abs().min() > 1e-6


def test_a_clamped_start_is_the_box_around_the_center() -> None:
    method = NoisyFinetune(
        init_clip=0.5 * math.sqrt(3) * 1.001,
        init_clamp=0.5,
        dimension=3,
        grad_clip=1.0,
        step_size=0.1,
        unlearn_steps=1,
        accounted_steps=1,
        center="0" * 64,
    )
    start, center = np.array([[5.0, 1.1, -7.0]]), np.array([1.0, 1.0, 1.0])
    weights = torch.from_numpy(start)
    run(method, weights, lambda t: (torch.zeros(1, 3), None), center=torch.from_numpy(center))
    np.testing.assert_allclose(weights.numpy() - 0.3 * normals((1, 3), 1)[0], [[1.5, 1.1, 0.5]], rtol=1e-9)
    with pytest.raises(GuardFailed, match="clamps 3 parameters, the model trains 4"):
        run(method, torch.zeros(1, 4, dtype=torch.float64), lambda t: (torch.zeros(1, 4), None))


def pushed_apart(weights: torch.Tensor) -> Callable[[int], tuple[torch.Tensor, None]]:
    """The worst gradient one kernel can have: away from 0 along the first axis, as far as the clip allows."""
    return lambda t: (torch.stack([-1e6 * weights[:, 0].sign(), torch.zeros(len(weights))], dim=1), None)


@pytest.mark.parametrize("steps", [1, 5])
def test_the_advantage_stays_below_the_certified_curve(steps: int) -> None:
    method = NoisyFinetune(init_clip=0.5, grad_clip=1.0, step_size=0.02, unlearn_steps=steps, accounted_steps=steps)
    plan = noise(method, Target(epsilon=1.0, delta=0.05))
    assert plan.mu is not None
    runs = []
    for side, seed in ((1.0, 3), (-1.0, 4)):
        weights = torch.tensor([[side * 9.0, 0.0]], dtype=torch.float64).repeat(CHAINS, 1)
        run(method, weights, pushed_apart(weights), noise_std=plan.noise_std, seed=seed, mu=plan.mu)
        runs.append(weights[:, 0].numpy())
    grid = np.quantile(np.concatenate(runs), np.linspace(0.01, 0.99, 99))
    above = [1 - np.searchsorted(np.sort(found), grid) / CHAINS for found in runs]
    error = 4 / math.sqrt(CHAINS)
    for epsilon in (0.0, 0.3, 1.0, 2.0):
        mu = plan.mu
        certified = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        found = (above[0] - math.exp(epsilon) * above[1]).max()
        assert found <= certified + error * math.exp(epsilon)
        if steps == 1:
            assert found >= certified - error * math.exp(epsilon)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_at_once(value: float) -> None:
    steps = []

    def broken(t: int) -> tuple[torch.Tensor, None]:
        steps.append(t)
        return torch.tensor([[1.0, value if t == 2 else 0.0, 0.0]]), None

    with pytest.raises(GuardFailed, match="not finite"):
        run(method_of(), torch.zeros(1, 3, dtype=torch.float64), broken)
    assert steps == [0, 1, 2]


def test_rounding_that_could_add_to_mu_is_refused() -> None:
    weights = torch.zeros(1, 3, dtype=torch.float64)
    still = (torch.zeros(1, 3), None)
    run(method_of(), weights, lambda t: still, noise_std=1e-9, mu=1.0)
    for changes in ({"noise_std": 1e-12}, {"mu": 1e-14}, {"center": torch.full((3,), 1e13, dtype=torch.float64)}):
        with pytest.raises(GuardFailed, match="rounding"):
            run(method_of(), weights, lambda t: still, **{"mu": 1.0, **changes})


def test_a_schedule_never_adds_less_noise_than_planned() -> None:
    from unlearn_runtime.algorithms.noisy_finetune import Schedules

    method = replace(method_of(), noise_schedule="cosine")
    steps = Schedules(method, 0.1)
    for t, ratio in enumerate(ratios("cosine", 7)):
        assert float(0.1 * ratio) <= steps.noise_std(t) <= float(0.1 * ratio) * (1 + 3e-16)
