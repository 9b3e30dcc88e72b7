"""Noisy fine-tuning: clip the model once, then clipped and noised steps on retained data.

x_0 = center + clip(model - center, C0); x <- x - gamma_t (clip(g, C1) + lambda (x - center)) + N(0, tau_t^2 I), with
gamma_t and tau_t the plan's step size and noise times the ratios of their schedules. With momentum or Adam the whole
direction is clipped, from fresh state, and weight decay is decoupled. Steps after the accounted ones apply the same
clipped kernel without noise: both runs do, so they are post-processing (theory 4.6).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from rdp_calc.errors import GuardFailed
from rdp_calc.methods.noisy_finetune import NoisyFinetune
from rdp_calc.schedule_values import ratios
from unlearn_runtime.algorithms.noisy_step import Gradient, NoisyStep, check_rounding, reach, rounding_of_a_step
from unlearn_runtime.grid import on_grid
from unlearn_runtime.job import State
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.projections import clamp_, project_
from unlearn_runtime.stepper import Stepper

#: Constants of Adam, those of torch.optim.Adam.
BETAS, EPS = (0.9, 0.999), 1e-8


def noisy_finetune(
    weights: torch.Tensor,
    gradient: Gradient,
    *,
    method: NoisyFinetune,
    noise_std: float,
    mu: float | None,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "unlearn",
    center: torch.Tensor | None = None,
    momentum: float = 0.9,
    state: State | None = None,
) -> None:
    """Carry out the plan's steps on float64 ``weights`` (R, p) in place.

    noise_std: of the first step, in parameter units. mu: what the plan certifies. center (p,): the public point norms
    are taken around. momentum: of optimizer momentum. state: tensors of ``gradient`` that a checkpoint must keep.
    Raises GuardFailed for a gradient that is not finite and where rounding could add to mu.
    """
    steps = Schedules(method, noise_std)
    _guard_rounding(method, noise_std, mu, size=weights.shape[1], center=center)
    # The start needs no checkpoint of its own: a resumed loop overwrites it with the saved weights.
    if method.init_clamp is None:
        project_(weights, method.init_clip, center=center)
    else:
        if method.dimension != weights.shape[1]:
            raise GuardFailed(
                f"the plan clamps {method.dimension} parameters, the model trains {weights.shape[1]}; plan with"
                f" --dimension {weights.shape[1]}."
            )
        clamp_(weights, method.init_clamp, center=center)
    direction = DIRECTIONS[method.optimizer](weights, momentum)
    step = NoisyStep(weights, source, center=center)

    def carry_out(t: int) -> torch.Tensor | float | None:
        found, loss = gradient(t)
        step(
            direction(found),
            clip=method.grad_clip,
            step_size=steps.step_size(t),
            weight_decay=method.weight_decay,
            noise_std=steps.noise_std(t),
        )
        if t == method.accounted() - 1 < method.unlearn_steps - 1:
            # The last bits of noised numbers are not to enter the steps without noise.
            weights.copy_(on_grid(weights, steps.noise_std(t)))
        return loss

    stepper.run(name, method.unlearn_steps, {"weights": weights, **direction.state, **(state or {})}, carry_out)


class Schedules:
    """gamma_t and tau_t: the first values times the ratios that the accounting uses, tau_t never below that product."""

    def __init__(self, method: NoisyFinetune, noise_std: float) -> None:
        self._noisy = method.accounted()
        self._step_size, self._noise_std = method.step_size, noise_std
        # A constant schedule may have more steps than an array could hold.
        self._steps = self._noises = None
        if method.step_schedule != "constant":
            self._steps = method.step_size * ratios(method.step_schedule, method.unlearn_steps)
        if method.noise_schedule != "constant":
            found = ratios(method.noise_schedule, method.unlearn_steps)
            self._noises = np.where(found == 1.0, noise_std, np.nextafter(noise_std * found, math.inf))

    def step_size(self, t: int) -> float:
        return self._step_size if self._steps is None else float(self._steps[t])

    def noise_std(self, t: int) -> float:
        """0 for the steps that are not accounted: they need no noise."""
        if t >= self._noisy:
            return 0.0
        return self._noise_std if self._noises is None else float(self._noises[t])


class Sgd:
    """The gradient itself. ``state`` holds what a checkpoint must keep."""

    def __init__(self, weights: torch.Tensor, momentum: float) -> None:
        self.state: State = {}

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Momentum:
    """v <- momentum v + g from v = 0, as torch.optim.SGD without dampening."""

    def __init__(self, weights: torch.Tensor, momentum: float) -> None:
        self._momentum = momentum
        self._velocity = torch.zeros_like(weights)
        self.state: State = {"velocity": self._velocity}

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._velocity.mul_(self._momentum).add_(gradient)


class Adam:
    """m/(1 - b1^t) / (sqrt(v/(1 - b2^t)) + eps), as torch.optim.Adam."""

    def __init__(self, weights: torch.Tensor, momentum: float) -> None:
        self._first, self._second = torch.zeros_like(weights), torch.zeros_like(weights)
        self._direction = torch.empty_like(weights)
        # A tensor, so that a checkpoint keeps it with the moments.
        self._count = torch.zeros((), dtype=torch.int64)
        self.state: State = {"first_moment": self._first, "second_moment": self._second, "adam_steps": self._count}

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        count = int(self._count.add_(1))
        gradient = gradient.to(torch.float64)
        self._first.lerp_(gradient, 1 - BETAS[0])
        self._second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        torch.sqrt(self._second, out=self._direction)
        self._direction.div_(math.sqrt(1 - BETAS[1] ** count)).add_(EPS)
        return torch.div(self._first, self._direction, out=self._direction).div_(1 - BETAS[0] ** count)


DIRECTIONS: dict[str, type[Sgd] | type[Momentum] | type[Adam]] = {"sgd": Sgd, "momentum": Momentum, "adam": Adam}


def _guard_rounding(
    method: NoisyFinetune, noise_std: float, mu: float | None, *, size: int, center: torch.Tensor | None
) -> None:
    steps, contraction = method.accounted(), abs(1.0 - method.step_size * method.weight_decay)
    largest, smallest = noise_std, noise_std
    step_size = method.step_size
    if method.step_schedule != "constant":
        # The decay differs from step to step and is at most 1 with a schedule.
        step_size *= float(ratios(method.step_schedule, method.unlearn_steps)[:steps].max())
        contraction = 1.0
    if method.noise_schedule != "constant":
        accounted = ratios(method.noise_schedule, method.unlearn_steps)[:steps]
        largest, smallest = noise_std * float(accounted.max()), noise_std * float(accounted.min())
    drift = step_size * method.grad_clip
    farthest = reach(
        start=method.init_clip,
        size=size,
        steps=steps,
        contraction=contraction,
        drift=drift,
        noise_std=largest,
        center=0.0 if center is None else float(center.to(torch.float64).norm()),
    )
    rounding = rounding_of_a_step(reach=farthest, drift=drift, noise_std=largest, size=size)
    check_rounding(rounding, steps=steps, noise_std=smallest, mu=mu)
