"""Adversarial examples against linear models, whose best perturbation of a given length is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rdp_calc.errors import InvalidInput
from unlearn_runtime.adversarial import attack
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource

CPU = torch.device("cpu")
W = torch.tensor([[1.0, -2.0, 0.5], [-0.5, 1.0, 2.0]], dtype=torch.float64)
ROWS = torch.tensor([[0.3, 0.1, -0.2], [-0.4, 0.5, 0.7], [0.0, 0.2, 0.1]], dtype=torch.float64)


def linear(weights: torch.Tensor) -> Network:
    module = torch.nn.Linear(weights.shape[1], len(weights), bias=False)
    network = Network(module, device=CPU, dtype=torch.float64)
    network.set_weights(weights.reshape(-1))
    return network


def moved(network: Network, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    settings = {"radius": 0.3, "steps": 60, "step_size": 0.02, "targeted": True, **options}
    return attack(network, ROWS, labels, **settings) - ROWS


@pytest.mark.parametrize("targeted", [True, False])
def test_two_classes_move_along_the_difference_of_their_weights(targeted: bool) -> None:
    target = torch.tensor([1, 0, 1])
    labels = target if targeted else 1 - target
    direction = (W[1] - W[0]) / (W[1] - W[0]).norm()
    expected = 0.3 * torch.where(target == 1, 1.0, -1.0)[:, None] * direction
    assert torch.allclose(moved(linear(W), labels, targeted=targeted), expected.double(), atol=1e-9)


def test_one_output_moves_along_its_weights() -> None:
    labels = torch.tensor([1.0, -1.0, 1.0])
    direction = W[0] / W[0].norm()
    expected = -0.3 * labels[:, None].double() * direction
    assert torch.allclose(moved(linear(W[:1]), labels, targeted=False), expected, atol=1e-9)


def test_the_margin_decides_which_radius_is_enough() -> None:
    network = linear(W)
    with torch.no_grad():
        outputs = network.outputs(ROWS)
    target = 1 - outputs.argmax(dim=1)
    for row, wanted, margin in zip(ROWS, target, (outputs[:, 0] - outputs[:, 1]).abs(), strict=True):
        enough = float(margin / (W[0] - W[1]).norm())
        for factor in (0.999, 1.001):
            radius = enough * factor
            found = attack(
                network, row[None], wanted[None], radius=radius, steps=200, step_size=radius / 20, targeted=True
            )
            assert bool((network.outputs(found).argmax(dim=1) == wanted).item()) is (factor > 1)


def test_three_classes_lower_the_loss_of_the_target_more_than_random_directions() -> None:
    weights = torch.cat([W, torch.tensor([[0.2, 0.3, -1.0]], dtype=torch.float64)])
    network, labels = linear(weights), torch.tensor([2, 0, 1])
    best = network.losses(network.outputs(ROWS + moved(network, labels)), labels).detach()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        noise = torch.randn(ROWS.shape, dtype=torch.float64, generator=generator)
        random = ROWS + 0.3 * noise / noise.norm(dim=1, keepdim=True)
        assert bool((network.losses(network.outputs(random), labels) >= best).all())


def test_a_random_start_is_uniform_in_the_ball_and_no_row_leaves_it() -> None:
    rows = torch.zeros(4000, 3, dtype=torch.float64)
    labels = torch.zeros(4000, dtype=torch.int64)
    # The step is so small that the start is seen.
    found = attack(
        linear(W), rows, labels, radius=0.5, steps=1, step_size=1e-9, targeted=True, source=GaussianSource(CPU, seed=1)
    )
    share = (found.norm(dim=1) / 0.5) ** 3  # uniform on [0, 1] for a uniform point of a ball in 3 dimensions
    assert float(share.max()) <= 1 + 1e-7
    assert abs(float(share.mean()) - 0.5) < 5 / (12 * 4000) ** 0.5
    assert float(found.mean(dim=0).abs().max()) < 5 * 0.5 / 4000**0.5
    far = attack(
        linear(W), rows, labels, radius=0.5, steps=30, step_size=0.4, targeted=True, source=GaussianSource(CPU, seed=1)
    )
    assert float(far.norm(dim=1).max()) <= 0.5 + 1e-12


def test_the_model_is_left_as_it_was() -> None:
    network = linear(W)
    network.flat_grad.fill_(7.0)
    moved(network, torch.tensor([1, 0, 1]))
    assert torch.equal(network.weights(), W.reshape(-1))
    assert network.module.training
    assert bool((network.flat_grad == 7.0).all())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"radius": 0.0}, "radius must be a finite number > 0"),
        ({"step_size": float("nan")}, "step_size must be a finite number > 0"),
        ({"steps": 0}, "attack steps must be at least 1, got 0"),
    ],
)
def test_settings_without_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        moved(linear(W), torch.tensor([1, 0, 1]), **options)
