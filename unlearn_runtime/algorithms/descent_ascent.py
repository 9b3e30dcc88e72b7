"""Descent on retained and ascent on forgotten records at once (NegGrad+, Kurmanji et al. 2023). Proves nothing."""

from __future__ import annotations

import torch

from rdp_calc.errors import InvalidInput
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.training import descend
from unlearn_runtime.batches import Batches
from unlearn_runtime.network import Network
from unlearn_runtime.network_records import NetworkRecords
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper


def descent_ascent(
    network: Network,
    retained: NetworkRecords,
    forgotten: NetworkRecords,
    recipe: Recipe,
    *,
    mixing: float,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "unlearn",
) -> None:
    """Minimise mixing x (mean retained loss) - (1 - mixing) x (mean forgotten loss); mixing in (0, 1).

    Epochs count over the retained records; every step takes a batch of them and the next batch of the forgotten ones,
    over and over. Raises InvalidInput for another mixing, GuardFailed as ``train``.
    """
    check_mixing(mixing)
    batches = Batches(len(retained.rows), recipe.batch_size, source=source, device=network.device)
    others = Batches(len(forgotten.rows), recipe.batch_size, source=source, device=network.device)

    def gradient(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, against = batches(t), others(t)
        up = network.gradient(forgotten.rows[against], forgotten.labels[against])[0].mul(mixing - 1)
        down, loss = network.gradient(retained.rows[chosen], retained.labels[chosen])
        return down.mul_(mixing).add_(up), loss

    memory = {"order": batches.order, "forgotten_order": others.order}
    descend(network, gradient, recipe, batches.steps(recipe.epochs), memory=memory, stepper=stepper, name=name)


def check_mixing(mixing: float) -> None:
    """Raise InvalidInput unless the weight of the retained records is in (0, 1)."""
    if not 0 < mixing < 1:
        raise InvalidInput(f"mixing must be in (0, 1), the weight of the retained records, got {mixing!r}.")
