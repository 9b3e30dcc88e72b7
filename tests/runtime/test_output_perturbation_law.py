"""Output perturbation: the clipped model plus one draw of the planned noise, as far from private as certified."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from rdp_calc import OutputPerturbation, Target, noise
from rdp_calc.errors import GuardFailed
from unlearn_runtime.algorithms.output_perturbation import output_perturbation
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CHAINS = 20_000


def run(
    start: list[float], *, noise_std: float, clip: float = 0.5, seed: int = 1, mu: float | None = 1.0
) -> torch.Tensor:
    weights = torch.tensor([start], dtype=torch.float64).repeat(CHAINS, 1)
    source = GaussianSource(CPU, seed=seed)
    method = OutputPerturbation(init_clip=clip)
    output_perturbation(weights, method=method, noise_std=noise_std, mu=mu, source=source, stepper=Stepper(source))
    assert source.normals == weights.numel()
    return weights


@pytest.mark.parametrize(("start", "mean"), [([3.0, 4.0], [0.3, 0.4]), ([0.1, -0.2], [0.1, -0.2])])
def test_the_law_is_the_clipped_model_with_the_planned_noise(start: list[float], mean: list[float]) -> None:
    white = (run(start, noise_std=0.7).numpy() - mean) / 0.7
    assert np.abs(white.mean(axis=0)).max() < 5 / math.sqrt(CHAINS)
    assert np.abs(white.T @ white / CHAINS - np.eye(2)).max() < 5 * math.sqrt(2 / CHAINS)


def test_opposite_models_are_as_far_apart_as_certified() -> None:
    plan = noise(OutputPerturbation(init_clip=0.5), Target(epsilon=1.0, delta=0.05))
    assert plan.noise_std is not None
    runs = [run([side, 0.0], noise_std=plan.noise_std, seed=seed)[:, 0] for side, seed in ((9.0, 3), (-9.0, 4))]
    mu = plan.mu
    assert mu is not None
    for epsilon in (0.0, 0.5, 1.0):
        certified = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        # The likelihood ratio exceeds e^epsilon above this point.
        edge = epsilon * plan.noise_std**2
        above = [float((found > edge).double().mean()) for found in runs]
        assert abs(above[0] - math.exp(epsilon) * above[1] - certified) < 4 / math.sqrt(CHAINS) * math.exp(epsilon)


def test_rounding_that_could_add_to_mu_is_refused() -> None:
    for mu in (1e-15, None):
        with pytest.raises(GuardFailed, match="rounding"):
            run([1.0, 0.0], clip=1e-7 if mu is None else 0.5, noise_std=100.0 if mu is None else 1.0, mu=mu)


def test_a_model_that_is_not_finite_is_refused() -> None:
    with pytest.raises(GuardFailed, match="not finite"):
        run([math.nan, 0.0], noise_std=1.0)
