"""How much each weight matters for what a model says of some records (Aljundi et al. 2018, Memory Aware Synapses)."""

from __future__ import annotations

import torch

from unlearn_runtime.network import Network, set_mode


def weight_importance(network: Network, rows: torch.Tensor) -> torch.Tensor:
    """(p,) mean over the rows of |d ||f(x)||^2 / dw|, at the set weights and in evaluation mode; no label enters.

    One backward pass a row: the absolute value is taken of every record's own gradient, as the paper defines it. The
    public code of Cha et al. 2024 takes it of a batch's mean gradient, where records of opposite sign cancel.
    """
    found = torch.zeros_like(network.flat)
    parameters = [parameter for parameter in network.module.parameters() if parameter.requires_grad]
    set_mode(network.module, False)
    try:
        for row in rows:
            with torch.enable_grad():
                squared = network.outputs(row[None]).square().sum()
                slopes = torch.autograd.grad(squared, parameters, allow_unused=True)
            pieces = zip(parameters, slopes, strict=True)
            found += torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1).abs() for p, g in pieces])
    finally:
        set_mode(network.module, True)
    return found / max(len(rows), 1)


def held_back(importance: torch.Tensor, ranges: dict[str, tuple[int, int]]) -> torch.Tensor:
    """(p,) in [0, 1], how firmly each weight is held while unlearning: 0 for the one of its tensor that matters most
    for the forgotten records, 1 for the one that matters least (Cha et al. 2024, section 4.3).

    1 - (importance - smallest) / (largest - smallest), tensor by tensor. A tensor whose weights all matter alike names
    none that may move, and is held as a whole.
    """
    found = torch.ones_like(importance)
    for start, stop in ranges.values():
        part = importance[start:stop]
        spread = part.max() - part.min()
        if spread > 0:
            found[start:stop] = 1 - (part - part.min()) / spread
    return found
