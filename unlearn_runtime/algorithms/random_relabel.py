"""Training with random wrong labels for the forgotten records (Graves et al. 2021, Golatkar et al. 2020).

Proves nothing.
"""

from __future__ import annotations

import torch

from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.training import train
from unlearn_runtime.network import Network
from unlearn_runtime.network_records import NetworkRecords
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper


def random_relabel(
    network: Network,
    retained: NetworkRecords | None,
    forgotten: NetworkRecords,
    recipe: Recipe,
    *,
    classes: int,
    source: GaussianSource,
    stepper: Stepper,
    name: str = "unlearn",
) -> torch.Tensor:
    """Draw a wrong label for every forgotten record, once, and train on; returns the labels drawn (m,).

    With ``retained`` forgotten and retained records are shuffled into one data set, without it only the forgotten ones
    are trained on. Raises GuardFailed as ``train``.
    """
    drawn = wrong_labels(forgotten.labels, classes=classes, source=source)
    rows, labels = forgotten.rows, drawn
    if retained is not None:
        rows, labels = torch.cat([rows, retained.rows]), torch.cat([labels, retained.labels])
    train(network, rows, labels, recipe, source=source, stepper=stepper, name=name)
    return drawn


def wrong_labels(labels: torch.Tensor, *, classes: int, source: GaussianSource) -> torch.Tensor:
    """A label for each of ``labels`` (n,), uniform over the others: of 0..classes-1, or the other sign of -1 and +1."""
    if labels.is_floating_point():
        return -labels
    # The largest of several normal draws is equally likely to be any of them.
    draws = torch.empty(len(labels), classes - 1, dtype=torch.float64, device=labels.device)
    source.fill(draws)
    return (labels + 1 + draws.argmax(dim=1)) % classes
