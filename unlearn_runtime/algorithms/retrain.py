"""Training again without the forgotten records: exact by construction, and the reference for everything else.

In the same order the first training is repeated step by step, from its initial weights and with its batches, in which
the forgotten records leave holes. That is the reference of the recollection methods (theory, section 9).
"""

from __future__ import annotations

import torch

from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.training import descend, train
from unlearn_runtime.batches import Batches
from unlearn_runtime.models.builtin import initialise
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper


def fresh(network: Network, source: GaussianSource) -> None:
    """Draw the trained numbers anew, and the statistics that layers with trained numbers keep (batch norm). Frozen
    parameters and other buffers stay what they are.
    """
    named = dict(network.module.named_parameters())
    frozen = {name: named[name].detach().clone() for name in network.frozen}
    initialise(network.module, source)
    with torch.no_grad():
        for name, value in frozen.items():
            named[name].copy_(value)


def retrain(
    network: Network,
    rows: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    *,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "retrain",
) -> None:
    """Train from fresh weights on the rows given, the retained ones. Raises GuardFailed as ``train``."""
    fresh(network, source)
    train(network, rows, labels, recipe, source=source, stepper=stepper, name=name)


def retrain_in_order(
    network: Network,
    rows: torch.Tensor,
    labels: torch.Tensor,
    kept: torch.Tensor,
    recipe: Recipe,
    *,
    keep_divisor: bool,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "retrain",
) -> None:
    """Repeat the training on all n rows, in which only the rows ``kept`` (n,), boolean, are looked at.

    ``source`` is to be in the state that it had before ``retrain`` was called for all rows: then the initial weights,
    the batches and the number of steps are those of that training. ``keep_divisor``: the sum over the rest of a batch
    is divided by the size of the whole batch (zero-out adjacency), otherwise by what is left of it (remove); a batch
    of which nothing is left moves nothing but weight decay and momentum. Dropout is not repeated: its masks have the
    shape of the batch.
    """
    fresh(network, source)
    batches = Batches(len(rows), recipe.batch_size, source=source, device=network.device)

    def gradient(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = batches(t)
        left = batch[kept[batch]]
        found, loss = network.gradient(rows[left], labels[left])
        return found.mul_(len(left) / len(batch)) if keep_divisor else found, loss

    steps = batches.steps(recipe.epochs)
    descend(network, gradient, recipe, steps, memory={"order": batches.order}, stepper=stepper, name=name)
