"""Output perturbation: clip(model, C0) + N(0, noise_std^2 I), once (theory 7)."""

from __future__ import annotations

import torch

from rdp_calc.methods.output_perturbation import OutputPerturbation
from unlearn_runtime.algorithms.noisy_step import NoisyStep, check_rounding, rounding_of_a_step
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.projections import project_
from unlearn_runtime.stepper import Stepper


def output_perturbation(
    weights: torch.Tensor,
    *,
    method: OutputPerturbation,
    noise_std: float,
    mu: float | None,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "unlearn",
) -> None:
    """Project float64 ``weights`` (R, p) to the plan's ball and add noise of noise_std (parameter units), in place.

    mu: what the plan certifies; None where its bound is not a Gaussian one. Raises GuardFailed where rounding could add
    to it, and for a model that is not finite.
    """
    size = weights.shape[1]
    rounding = rounding_of_a_step(reach=method.init_clip, drift=0.0, noise_std=noise_std, size=size)
    check_rounding(rounding, steps=1, noise_std=noise_std, mu=mu, diameter=2 * method.init_clip)
    step = NoisyStep(weights, source)

    def carry_out(t: int) -> None:
        project_(weights, method.init_clip)
        step.add_noise(noise_std)

    stepper.run(name, 1, {"weights": weights}, carry_out)
