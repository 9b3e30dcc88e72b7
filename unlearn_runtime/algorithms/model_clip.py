"""Model clipping: every step projects the model to a ball, so that noise makes any two runs forget their past.

noise after: x <- proj_C2(x - gamma (clip(g, C1) + lambda x)) + N(0, noise_std^2 I). noise before: the same with the
noise inside the projection, from x_0 projected to C2. Initial noise, where planned, is added to the model clipped to
C0, and the first projection comes after it (theory 5).
"""

from __future__ import annotations

import torch

from rdp_calc.methods.model_clip import ModelClip
from unlearn_runtime.algorithms.noisy_step import Gradient, NoisyStep, check_rounding, reach, rounding_of_a_step
from unlearn_runtime.job import State
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.projections import project_
from unlearn_runtime.stepper import Stepper


def model_clip(
    weights: torch.Tensor,
    gradient: Gradient,
    *,
    method: ModelClip,
    noise_std: float,
    mu: float | None,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "unlearn",
    state: State | None = None,
) -> None:
    """Carry out the plan's steps on float64 ``weights`` (R, p) in place.

    noise_std: of every step, in parameter units. mu: what the plan certifies, None where it is contraction and not a
    Gaussian bound. A plan without step size takes no gradient: noise and projection alone. state: tensors of
    ``gradient`` that a checkpoint must keep. Raises GuardFailed for a gradient or model that is not finite and where
    rounding could add to the claim.
    """
    _guard_rounding(method, noise_std, mu, size=weights.shape[1])
    step = NoisyStep(weights, source)
    if method.init_noise_std > 0:
        assert method.init_clip is not None
        project_(weights, method.init_clip)
        step.add_noise(method.init_noise_std)
    before = method.noise_order == "before"
    if before:
        project_(weights, method.model_clip)

    def carry_out(t: int) -> torch.Tensor | float | None:
        loss = None
        if method.step_size is not None:
            found, loss = gradient(t)
            step(
                found,
                clip=method.grad_clip,
                step_size=method.step_size,
                weight_decay=method.weight_decay,
                noise_std=noise_std if before else 0.0,
            )
        project_(weights, method.model_clip)
        if not before:
            step.add_noise(noise_std)
        return loss

    stepper.run(name, method.unlearn_steps, {"weights": weights, **(state or {})}, carry_out)


def _guard_rounding(method: ModelClip, noise_std: float, mu: float | None, *, size: int) -> None:
    step_size = method.step_size or 0.0
    drift = 0.0 if method.grad_clip is None else step_size * method.grad_clip
    # Every step starts from the ball, with one noise at most (which rounding_of_a_step counts), the first one from the
    # clipped model and the initial noise.
    image = method.model_clip
    if method.noise_order == "before":
        image = abs(1.0 - step_size * method.weight_decay) * image + drift
    farthest = max(image, method.model_clip)
    if method.init_noise_std > 0 and method.init_clip is not None:
        noise = method.init_noise_std
        farthest = max(
            farthest, reach(start=method.init_clip, size=size, steps=1, contraction=1.0, drift=0.0, noise_std=noise)
        )
    rounding = rounding_of_a_step(reach=farthest, drift=drift, noise_std=noise_std, size=size)
    check_rounding(rounding, steps=method.unlearn_steps, noise_std=noise_std, mu=mu, diameter=2 * image)
