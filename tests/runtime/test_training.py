"""Training without noise: the optimiser of torch, schedules, whole epochs, and a run that resumes bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from rdp_calc.errors import GuardFailed
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.training import step_size, train
from unlearn_runtime.batches import Batches
from unlearn_runtime.checkpoint import Checkpoint
from unlearn_runtime.models.builtin import build, initialise
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def records(n: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(n, 6, generator=draws)
    return rows, (rows[:, 0] > rows[:, 1]).long() + (rows[:, 2] > 1).long()


def network(seed: int = 1) -> Network:
    found = Network(build("mlp:8", 6, 3), device=CPU)
    initialise(found.module, GaussianSource(CPU, seed=seed))
    return found


def recipe(**changes: object) -> Recipe:
    return Recipe(**{"epochs": 3, "step_size": 0.1, "batch_size": 16, **changes})  # type: ignore[arg-type]


def fit(model: Network, how: Recipe, *, seed: int = 2) -> GaussianSource:
    source = GaussianSource(CPU, seed=seed)
    train(model, *records(), how, source=source, stepper=Stepper(source), name="learn")
    return source


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
def test_the_steps_are_those_of_torch_with_decoupled_decay(schedule: str) -> None:
    how = recipe(schedule=schedule, momentum=0.8, weight_decay=0.05)
    model, peer = network(), network().module
    fit(model, how)
    rows, labels = records()
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.1, momentum=0.8)
    source = GaussianSource(CPU, seed=2)
    for t in range(12):
        if t % 4 == 0:
            order = source.permutation(50)
        chosen = order[16 * (t % 4) : 16 * (t % 4) + 16]
        size = step_size(how, t, 12)
        optimizer.param_groups[0]["lr"] = size
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(peer(rows[chosen]), labels[chosen]).backward()
        with torch.no_grad():
            for parameter in peer.parameters():
                parameter.mul_(1 - size * 0.05)
        optimizer.step()
    expected = torch.cat([parameter.detach().reshape(-1) for parameter in peer.parameters()])
    torch.testing.assert_close(model.flat, expected, rtol=1e-5, atol=1e-6)


def test_schedules() -> None:
    assert [step_size(recipe(), t, 10) for t in range(10)] == [0.1] * 10
    cosine = [step_size(recipe(schedule="cosine"), t, 10) for t in range(10)]
    assert cosine[0] == 0.1
    assert cosine[5] == pytest.approx(0.05)
    assert cosine == sorted(cosine, reverse=True)
    cycle = [step_size(recipe(schedule="one-cycle"), t, 20) for t in range(20)]
    assert cycle[:6] == pytest.approx([0.1 * k / 6 for k in range(1, 7)])
    assert cycle[6] == 0.1
    assert cycle[6:] == sorted(cycle[6:], reverse=True)
    assert 0 < cycle[-1] < 0.002
    assert step_size(recipe(schedule="one-cycle"), 0, 1) == 0.1


def test_an_epoch_visits_every_record_once() -> None:
    batches = Batches(10, 4, source=GaussianSource(CPU, seed=1), device=CPU)
    epochs = [[batches(3 * epoch + t).tolist() for t in range(3)] for epoch in range(2)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert all(sorted(itertools.chain(*epoch)) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [batches.steps(epochs) for epochs in (1, 2.5, 0.1, 1 / 3)] == [3, 8, 1, 1]
    assert Batches(3, 100, source=GaussianSource(CPU, seed=1), device=CPU).per_epoch == 1
    with pytest.raises(GuardFailed, match="no record"):
        Batches(0, 4, source=GaussianSource(CPU, seed=1), device=CPU)


def test_training_learns() -> None:
    model = network()
    before = model.evaluate(*records())
    fit(model, recipe(epochs=100, momentum=0.9, schedule="one-cycle"))
    after = model.evaluate(*records())
    assert after["accuracy"] > 0.95
    assert after["loss"] < before["loss"] / 3


def test_a_run_that_was_stopped_resumes_bit_for_bit(tmp_path: Path) -> None:
    how = recipe(momentum=0.9, schedule="cosine")
    whole = network()
    fit(whole, how)

    class StoppingError(Exception):
        pass

    class Stopping(Network):
        calls = 0

        def gradient(self, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.calls += 1
            if self.calls == 8:
                raise StoppingError
            return super().gradient(rows, labels)

    for model in (Stopping(network().module, device=CPU), network(seed=77)):
        source = GaussianSource(CPU, seed=2)
        checkpoint = Checkpoint(tmp_path / "run.ckpt", {"run": "the same"}, every_seconds=0)
        stepper = Stepper(source, checkpoint=checkpoint)
        try:
            train(model, *records(), how, source=source, stepper=stepper, name="learn")
        except StoppingError:
            assert checkpoint.path.exists()
    assert checkpoint.resumed
    assert torch.equal(model.flat, whole.flat)


def test_training_that_diverges_is_told() -> None:
    with pytest.raises(GuardFailed, match="diverged"):
        fit(network(), recipe(step_size=1e30, weight_decay=1.0))
