"""DP-SGD: each record clipped, noise of the planned size on every sum, Poisson batches, our own source."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rdp_calc.errors import GuardFailed
from unlearn_runtime.algorithms import dp_sgd as module_under_test
from unlearn_runtime.algorithms.dp_sgd import clip_margin, dp_sgd, largest_batch, sums_exactly
from unlearn_runtime.models.builtin import build, initialise
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def records(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(n, 1, 8, 8, generator=draws).reshape(n, 64)
    return rows, torch.arange(n) % 3


def network(spec: str = "cnn-small") -> Network:
    shape = (1, 8, 8) if spec == "cnn-small" else None
    found = Network(build(spec, 64, 3, shape), device=CPU, input_shape=shape)
    initialise(found.module, GaussianSource(CPU, seed=1))
    return found


def fit(model: Network, rows: torch.Tensor, labels: torch.Tensor, **changes: Any) -> GaussianSource:
    source = GaussianSource(CPU, seed=2)
    settings: dict[str, Any] = {
        "sampling_rate": 0.3,
        "batch_size": 12,
        "steps": 3,
        "noise_multiplier": 1.1,
        "clip_norm": 0.5,
        "step_size": 0.2,
    }
    dp_sgd(model, rows, labels, source=source, stepper=Stepper(source), **{**settings, **changes})
    return source


def reference(rows: torch.Tensor, labels: torch.Tensor, *, steps: int, rate: float, noise: float) -> torch.Tensor:
    """The same run from the textbook: one backward pass a record, and the draws of a source of the same seed."""
    model, source = network(), GaussianSource(CPU, seed=2)
    weights, draw = model.weights(), torch.empty(model.size, dtype=torch.float64)
    for _ in range(steps):
        total = torch.zeros(model.size, dtype=torch.float64)
        model.set_weights(weights)
        for record in source.poisson(len(rows), rate).tolist():
            gradient = model.gradient(rows[record : record + 1], labels[record : record + 1])[0].double()
            total += gradient * min(1.0, 0.5 / float(gradient.norm()))
        source.fill(draw)
        weights = weights - 0.2 / 12 * (total + noise * 0.5 * draw)
    return weights


@pytest.mark.parametrize("noise", [0.0, 1.1])
def test_the_run_is_that_of_the_textbook(noise: float) -> None:
    rows, labels = records()
    model = network()
    source = fit(model, rows, labels, noise_multiplier=noise)
    assert source.normals == 3 * model.size
    expected = reference(rows, labels, steps=3, rate=0.3, noise=noise)
    torch.testing.assert_close(model.weights(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, network().weights(), atol=1e-3)


def test_no_record_moves_the_sum_by_more_than_the_clip_norm() -> None:
    rows, labels = records(1)
    model = network()
    before = model.weights()
    fit(model, rows * 1e4, labels, sampling_rate=1.0, steps=1, noise_multiplier=0.0, batch_size=1, step_size=1.0)
    moved = float((model.weights() - before).norm())
    assert 0.4999 < moved <= 0.5


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The clipped sum of every step, before noise, in float64."""
    found: list[torch.Tensor] = []
    add_noise = module_under_test._Optimizer.add_noise

    def spy(optimizer: Any) -> None:
        found.append(torch.cat([parameter.summed_grad.reshape(-1) for parameter in optimizer.params]).clone())
        add_noise(optimizer)

    monkeypatch.setattr(module_under_test._Optimizer, "add_noise", spy)
    return found


def test_a_record_of_a_wide_layer_is_clipped_to_the_last_digits(sums: list[torch.Tensor]) -> None:
    """A float32 norm of a million equal numbers is too small by 4e-4."""
    inner = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(1000, 2, bias=False))
    with torch.no_grad():
        inner[0].weight.fill_(1e-3)
        inner[1].weight.copy_(torch.tensor([[0.3], [-0.3]]))
    model = Network(inner, device=CPU)
    rows = torch.full((1, 1000), 1000**-0.5)
    fit(model, rows, torch.tensor([1]), sampling_rate=1.0, steps=1, batch_size=1, clip_norm=0.01)
    assert sums[0].dtype == torch.float64
    margin = clip_margin(model.size, largest_batch(1), exact=False)
    assert 1 - margin - 4e-5 < float(sums[0].norm()) / 0.01 <= 1


def test_one_record_moves_the_sum_of_a_large_batch_by_the_clip_norm_at_most(sums: list[torch.Tensor]) -> None:
    rows, labels = records(3000)
    rows[-1] *= 1e3
    clip = 1e-4
    for count in (3000, 2999):
        # The same numbers for the other records whatever the batch: every gradient is the bias's.
        model = Network(build("mlp:1", 64, 3), device=CPU, trainable=("2.bias",))
        fit(model, rows[:count], labels[:count], sampling_rate=1.0, steps=1, batch_size=3000, clip_norm=clip)
    margin = clip_margin(model.size, largest_batch(3000), exact=True)
    assert 1 - margin - 4e-5 < float((sums[0] - sums[1]).norm()) / clip <= 1


@pytest.mark.parametrize("size", [1, 100, 128, 1000, 30_000])
@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1.0, 1e15])
def test_norms_are_never_too_small(size: int, scale: float) -> None:
    draws = torch.rand(20, size, generator=torch.Generator().manual_seed(1)) * scale
    for rows in (draws, torch.full((3, size), scale)):
        exact = rows.double().square().sum(dim=1)
        found = module_under_test._squares(rows)
        assert bool((found >= exact).all())
        assert bool((found <= exact * (1 + 8e-5) + size * 1.2e-38).all())


def test_the_margin_covers_what_it_says() -> None:
    assert clip_margin(10**6, 2**15, exact=True) < 1e-6
    assert clip_margin(1, 2**20, exact=True) > 2 * (2**20) ** 2 * 2.0**-53
    # Large batches and tiny clips are summed in float64, so that the margin never eats the clip.
    numbers = torch.zeros(10**6)
    for batch in (1, 100, 10**3, 10**5, 10**6):
        most = largest_batch(batch)
        assert clip_margin(10**6, most, exact=sums_exactly(numbers, most, 1.0)) < 2e-3
    assert not sums_exactly(numbers, largest_batch(100), 1.0)
    assert sums_exactly(numbers, largest_batch(10**5), 1.0)
    assert sums_exactly(numbers, largest_batch(100), 1e-25)
    # Sums of 16 float32 records: 18 roundings of 2^-24 each, in both runs.
    assert 2 * 18 * 300 * 2.0**-24 < clip_margin(10**6, 300, exact=False) < 1e-3


class Patches(torch.nn.Module):
    """A row is 4 patches of 16 numbers, which enter the layers as rows, or first."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.layer, self.first = torch.nn.Linear(16, 3), first

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.first:
            return self.layer(rows.reshape(-1, 4, 16).transpose(0, 1)).mean(dim=0)
        return self.layer(rows.reshape(-1, 16)).reshape(-1, 4, 3).mean(dim=1)


@pytest.mark.parametrize("first", [True, False])
def test_gradients_that_are_not_one_a_record_are_refused_in_every_step(first: bool) -> None:
    rows, labels = records(5)
    with pytest.raises(GuardFailed, match=r"for 5 records; dp-sgd needs one a record"):
        fit(Network(Patches(first=first), device=CPU), rows, labels, sampling_rate=1.0)


def test_parameters_that_take_no_part_are_refused() -> None:
    class Spare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = torch.nn.Linear(64, 3), torch.nn.Linear(2, 2)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.used(rows)

    with pytest.raises(GuardFailed, match="no single gradient each"):
        fit(Network(Spare(), device=CPU), *records(), sampling_rate=1.0)


def test_empty_batches_are_noised_as_planned() -> None:
    rows, labels = records()
    model = network()
    before = model.weights()
    fit(model, rows, labels, sampling_rate=0.0, steps=5)
    # Five draws of z C, times step size over the fixed divisor.
    white = (model.weights() - before).numpy() / (0.2 / 12 * 1.1 * 0.5 * math.sqrt(5))
    assert abs(white.mean()) < 5 / math.sqrt(len(white))
    assert abs(np.mean(white**2) - 1) < 5 * math.sqrt(2 / len(white))


def test_a_batch_in_parts_is_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = records()
    whole, parts = network(), network()
    fit(whole, rows, labels)
    monkeypatch.setattr(module_under_test, "_GRADIENT_NUMBERS", 4 * parts.size)
    source = fit(parts, rows, labels)
    assert source.normals == 3 * parts.size
    torch.testing.assert_close(parts.flat, whole.flat, rtol=1e-4, atol=1e-6)


def test_the_network_is_left_as_it_was_found() -> None:
    rows, labels = records()
    model = network()
    fit(model, rows, labels)
    gradient, _ = model.gradient(rows, labels)
    assert float(gradient.norm()) > 0
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.module.parameters())
    # A second run on the same network, as another chain does.
    fit(model, rows, labels)


def test_frozen_parameters_stay_and_are_not_noised() -> None:
    rows, labels = records()
    inner = build("mlp:5", 64, 3)
    initialise(inner, GaussianSource(CPU, seed=1))
    model = Network(inner, device=CPU, trainable=("2.*",))
    before = inner.state_dict()["0.weight"].clone()
    source = fit(model, rows, labels)
    assert source.normals == 3 * model.size == 3 * 18
    assert torch.equal(inner.state_dict()["0.weight"], before)


def test_layers_that_mix_records_are_refused() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    with pytest.raises(GuardFailed, match="not fit for DP-SGD"):
        fit(Network(inner, device=CPU), *records())


def test_a_batch_too_large_for_the_margin_is_refused() -> None:
    rows, labels = records(4)
    model = Network(build("mlp:1", 64, 3), device=CPU)
    with pytest.raises(GuardFailed, match="smaller batch size"):
        fit(model, rows, labels, sampling_rate=0.5, steps=1, batch_size=10**8, clip_norm=1.0)
