"""Weight importance against its closed form for linear models: d ||W x||^2 / dW = 2 (W x) x'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unlearn_runtime.importance import held_back, weight_importance
from unlearn_runtime.network import Network

CPU = torch.device("cpu")


def network_of(module: torch.nn.Module) -> Network:
    return Network(module, device=CPU, dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 3])
def test_linear_model(outputs: int) -> None:
    draws = np.random.default_rng(0)
    rows, weights = draws.normal(size=(5, 4)), draws.normal(size=(outputs, 4))
    network = network_of(torch.nn.Linear(4, outputs, bias=False))
    network.set_weights(torch.from_numpy(weights).reshape(-1))
    expected = np.mean([np.abs(2 * np.outer(weights @ x, x)) for x in rows], axis=0)
    found = weight_importance(network, torch.from_numpy(rows))
    np.testing.assert_allclose(found.view(outputs, 4).numpy(), expected, rtol=1e-12)


def test_records_of_opposite_slopes_do_not_cancel() -> None:
    network = network_of(torch.nn.Linear(2, 1))
    network.set_weights(torch.tensor([1.0, 0.0, 0.5]))
    # f = w1 x1 + w2 x2 + b: outputs 1.5 and -0.5, d f^2 / db = 2 f.
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert weight_importance(network, rows).tolist() == pytest.approx([(3 + 1) / 2, 0, (3 + 1) / 2])


def test_frozen_parts_count_for_nothing_and_parts_without_influence_get_zero() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(2, 2, bias=False)
            self.unused = torch.nn.Linear(2, 1, bias=False)
            self.head = torch.nn.Linear(2, 1, bias=False)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(rows))

    network = Network(Model(), device=CPU, dtype=torch.float64, trainable=("unused.*", "head.*"))
    found = weight_importance(network, torch.ones(1, 2, dtype=torch.float64))
    assert found.shape == (4,)
    assert found[:2].tolist() == [0, 0]
    assert bool((found[2:] > 0).all())
    assert network.module.training


def test_what_matters_most_may_move_and_the_rest_is_held() -> None:
    importance = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 0.0])
    held = held_back(importance, {"a": (0, 3), "b": (3, 5), "c": (5, 6)})
    assert held.tolist() == [1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
