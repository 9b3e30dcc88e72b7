"""Adversarial examples by projected gradient descent in an L2 ball (Madry et al. 2018).

Our own, because torchattacks needs torchvision and foolbox is no longer maintained.
"""

from __future__ import annotations

import torch

from rdp_calc.errors import InvalidInput
from rdp_calc.finetune import check_positive
from unlearn_runtime.network import Network, set_mode
from unlearn_runtime.noise import GaussianSource

#: Below this a gradient has no direction; a step along it would be 0/0.
_SMALLEST = 1e-30


def attack(
    network: Network,
    rows: torch.Tensor,
    labels: torch.Tensor,
    *,
    radius: float,
    steps: int,
    step_size: float,
    targeted: bool,
    source: GaussianSource | None = None,
) -> torch.Tensor:
    """Rows (n, d) moved by at most ``radius`` each in the Euclidean norm, at the set weights, in evaluation mode.

    ``targeted``: towards a small loss of ``labels`` (n,), the labels wished for; otherwise away from it, ``labels``
    being the true ones. Each step moves a row by ``step_size`` along its normalised gradient and then projects its
    displacement to the ball. ``source``: start anywhere in the ball, uniformly; None: at the rows themselves.

    Raises InvalidInput unless radius and step_size are finite and positive and steps is at least 1.
    """
    check_positive("radius", radius)
    check_positive("step_size", step_size)
    if steps < 1:
        raise InvalidInput(f"attack steps must be at least 1, got {steps!r}.")
    set_mode(network.module, False)
    try:
        moved = torch.zeros_like(rows) if source is None else _uniform_in_ball(rows, radius, source)
        for _ in range(steps):
            slope = _slope(network, rows + moved, labels)
            direction = slope / _norms(slope).clamp_min(_SMALLEST)
            moved = _projected(moved - direction * (step_size if targeted else -step_size), radius)
    finally:
        set_mode(network.module, True)
    return rows + moved


def _slope(network: Network, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The gradient (n, d) of each row's own loss with respect to the row."""
    with torch.enable_grad():
        inputs = rows.detach().requires_grad_(True)
        total = network.losses(network.outputs(inputs), labels).sum()
        (found,) = torch.autograd.grad(total, inputs)
    return found


def _projected(moved: torch.Tensor, radius: float) -> torch.Tensor:
    return moved * (radius / _norms(moved).clamp_min(radius))


def _norms(rows: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return found


def _uniform_in_ball(rows: torch.Tensor, radius: float, source: GaussianSource) -> torch.Tensor:
    """The first d coordinates of a uniform point on the sphere in d + 2 dimensions are uniform in the ball."""
    draws = torch.empty(len(rows), rows.shape[1] + 2, dtype=torch.float64, device=rows.device)
    source.fill(draws)
    return (radius * draws[:, : rows.shape[1]] / _norms(draws)).to(rows.dtype)
