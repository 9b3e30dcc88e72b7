"""Training without noise: stochastic gradient descent with momentum and a step size schedule.

It learns the model to start from, the reference to compare with, and fine-tunes after unlearning. It enters no bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rdp_calc.errors import GuardFailed
from rdp_calc.training import Recipe
from unlearn_runtime.batches import Batches
from unlearn_runtime.checkpoint import State
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

#: Part of a one-cycle schedule in which the step size grows.
_WARM_UP = 0.3


def train(
    network: Network,
    rows: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    *,
    source: GaussianSource,
    stepper: Stepper,
    name: str,
) -> None:
    """Train the network's numbers in place from where they are, on all the rows.

    v <- momentum v + g, w <- w - step_size_t (v + weight_decay w), from v = 0; batches of shuffled epochs from
    ``source``. Raises GuardFailed where the numbers end up not finite.
    """
    batches = Batches(len(rows), recipe.batch_size, source=source, device=network.device)

    def gradient(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = batches(t)
        return network.gradient(rows[chosen], labels[chosen])

    steps = batches.steps(recipe.epochs)
    descend(network, gradient, recipe, steps, memory={"order": batches.order}, stepper=stepper, name=name)


def descend(
    network: Network,
    gradient: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    recipe: Recipe,
    steps: int,
    *,
    memory: State,
    stepper: Stepper,
    name: str,
) -> None:
    """The recipe's loop with any direction: ``gradient(t)`` gives what step t goes against, (p,), and a loss to show.

    ``memory``: tensors that ``gradient`` keeps from one step to the next. Raises GuardFailed as ``train``.
    """
    weights, velocity = network.flat, torch.zeros_like(network.flat)

    def step(t: int) -> torch.Tensor:
        found, loss = gradient(t)
        size = step_size(recipe, t, steps)
        direction = found
        if recipe.momentum:
            direction = velocity.mul_(recipe.momentum).add_(found)
        if recipe.weight_decay:
            weights.mul_(1.0 - size * recipe.weight_decay)
        weights.sub_(direction, alpha=size)
        return loss

    stepper.run(name, steps, {"weights": weights, "velocity": velocity, **memory}, step)
    if not bool(torch.isfinite(weights).all()):
        raise GuardFailed(f"training ({name}) diverged: the weights are not finite; use a smaller step size.")


def step_size(recipe: Recipe, t: int, steps: int) -> float:
    """The step size of step t of ``steps``.

    constant; cosine: from the recipe's value to 0 along half a cosine; one-cycle: linear growth to it over the first
    30 % of the steps, then half a cosine to 0.
    """
    if recipe.schedule == "constant":
        return recipe.step_size
    warm = math.ceil(_WARM_UP * steps) if recipe.schedule == "one-cycle" else 0
    if t < warm:
        return recipe.step_size * (t + 1) / warm
    return recipe.step_size * (1 + math.cos(math.pi * (t - warm) / max(steps - warm, 1))) / 2
