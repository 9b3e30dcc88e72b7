"""Fine-tuning on the retained records: the forgotten ones are left to fade. Proves nothing."""

from __future__ import annotations

import torch

from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.training import train
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper


def finetune(
    network: Network,
    rows: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    *,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "unlearn",
) -> None:
    """Train on from the set weights on the rows given, the retained ones; no forgotten record is looked at.

    Raises GuardFailed as ``train``.
    """
    train(network, rows, labels, recipe, source=source, stepper=stepper, name=name)
