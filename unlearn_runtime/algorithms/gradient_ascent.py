"""Gradient ascent on the loss of the forgotten records (NegGrad, Golatkar et al. 2020). Proves nothing."""

from __future__ import annotations

import torch

from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.training import descend
from unlearn_runtime.batches import Batches
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper


def gradient_ascent(
    network: Network,
    rows: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    *,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "unlearn",
) -> None:
    """Epochs over the rows given, the forgotten ones, in which their mean loss is climbed.

    The loss has no top: too many epochs or too large steps ruin the model. Raises GuardFailed as ``train``.
    """
    batches = Batches(len(rows), recipe.batch_size, source=source, device=network.device)

    def gradient(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = batches(t)
        found, loss = network.gradient(rows[chosen], labels[chosen])
        return found.neg_(), loss

    steps = batches.steps(recipe.epochs)
    descend(network, gradient, recipe, steps, memory={"order": batches.order}, stepper=stepper, name=name)
