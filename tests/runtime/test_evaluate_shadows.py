"""Shadow models trained as one batch are the models that the loops of a run train one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from rdp_calc import DataSpec, Plan
from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.methods.gradient_norm import GradientNorm
from rdp_calc.methods.langevin import Langevin
from rdp_calc.methods.noisy_sgd import NoisySgd
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.training import train
from unlearn_runtime.evaluate.predictions import Part
from unlearn_runtime.evaluate.recipes import stacked_losses
from unlearn_runtime.evaluate.shadows import EnsembleTrainer, LinearTrainer, LoopTrainer, StackedTrainer, halves
from unlearn_runtime.models import build, initialise
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]

CPU = torch.device("cpu")


def part_of(x: Array, y: Array) -> Part:
    return Part(torch.from_numpy(x), torch.from_numpy(y))


def linear(plan: Plan, part: Part, masks: Array, *, classes: int, seed: int = 1, divisor: int | None = None) -> Array:
    trainer = LinearTrainer(plan, plan.method.constants, part, classes=classes, divisor=divisor)  # type: ignore[attr-defined]
    source = GaussianSource(CPU, seed=seed)
    return trainer.train(masks, source=source, stepper=Stepper(source))


@pytest.fixture
def records(blobs: Callable[..., tuple[Array, Array]]) -> tuple[Array, Array, Array]:
    """40 rows of 4 features, labels 0/1, and who trains on what, 6 models."""
    x, y = blobs(n=40)
    return x, y, halves(6, 40, GaussianSource(CPU, seed=5))


def logistic_plan(plan_for: Callable[..., Plan], kind: Any, **options: Any) -> Plan:
    spec = DataSpec(features=4, classes=("0", "1"), preprocess="none")
    return plan_for(kind, loss="logistic", data=spec, **{"learned": 30, "unlearn_steps": 4, **options})


def test_halves() -> None:
    for size in (40, 41):
        masks = halves(10, size, GaussianSource(CPU))
        assert set(masks.sum(axis=1)) == {size // 2}
        assert not (masks[::2] & masks[1::2]).any()
        assert masks.sum(axis=0).max() <= 5
    # With an even number every record is in exactly half of the models.
    assert set(halves(10, 40, GaussianSource(CPU)).sum(axis=0)) == {5}
    # The record left out of an odd number is one that can be spared.
    odd = halves(10, 41, GaussianSource(CPU), spare=np.array([3, 7]))
    assert set(odd.sum(axis=0)[np.setdiff1d(np.arange(41), [3, 7])]) == {5}
    # Random: two pairs agree on about half of the records.
    many = halves(200, 100, GaussianSource(CPU, seed=2))[::2].astype(float)
    assert abs(np.corrcoef(many.T)[np.triu_indices(100, 1)].mean()) < 0.03


@pytest.mark.parametrize(("count", "size"), [(3, 40), (5, 40), (2, 40), (4, 1)])
def test_halves_refused(count: int, size: int) -> None:
    with pytest.raises(InvalidInput):
        halves(count, size, GaussianSource(CPU))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("divisor", [None, 40])
def test_langevin_batch_is_the_loop(
    records: Any, plan_for: Callable[..., Plan], exact_descent: Callable[..., Array], divisor: int | None
) -> None:
    x, y, masks = records
    plan = logistic_plan(plan_for, Langevin)
    found = linear(plan, part_of(x, y), masks, classes=2, divisor=divisor)
    method: Any = plan.method
    for weights, mask in zip(found, masks, strict=True):
        expected = exact_descent(
            np.zeros(4),
            x[mask],
            2.0 * y[mask] - 1,
            steps=34,
            step_size=method.step_size,
            l2=0.2,
            divisor=divisor or int(mask.sum()),
        )
        np.testing.assert_allclose(weights, expected, atol=1e-12)


@pytest.mark.usefixtures("silent")
def test_softmax_batch_is_the_loop(
    blobs: Callable[..., tuple[Array, Array]], plan_for: Callable[..., Plan], exact_descent: Callable[..., Array]
) -> None:
    x, y = blobs(n=42, classes=3)
    masks = halves(4, 42, GaussianSource(CPU, seed=5))
    spec = DataSpec(features=4, classes=("0", "1", "2"), preprocess="none")
    plan = plan_for(Langevin, loss="softmax", data=spec, dataset_size=42, learned=20, unlearn_steps=3)
    found = linear(plan, part_of(x, y), masks, classes=3)
    method: Any = plan.method
    for weights, mask in zip(found, masks, strict=True):
        expected = exact_descent(
            np.zeros((3, 4)), x[mask], y[mask], steps=23, step_size=method.step_size, l2=0.2, divisor=21
        )
        np.testing.assert_allclose(weights.reshape(3, 4), expected, atol=1e-12)


@pytest.mark.usefixtures("silent")
def test_noisy_sgd_visits_its_slots(
    records: Any, plan_for: Callable[..., Plan], exact_descent: Callable[..., Array]
) -> None:
    x, y, masks = records
    spec = DataSpec(features=4, classes=("0", "1"), preprocess="none")
    plan = plan_for(
        NoisySgd, loss="logistic", data=spec, learned=2, batch_size=10, unlearn_epochs=1, learn_epochs=2, epsilon=200.0
    )
    found = linear(plan, part_of(x, y), masks, classes=2, seed=9)
    # 20 records in a half, batches of 10: two slots of 20 of the 40 records, in the first order that is drawn.
    order = GaussianSource(CPU, seed=9).permutation(40)
    method: Any = plan.method
    for weights, mask in zip(found, masks, strict=True):
        expected = np.zeros(4)
        for _ in range(3):
            for slot in (order[:20], order[20:]):
                kept = slot[mask[slot]]
                expected = exact_descent(
                    expected,
                    x[kept],
                    2.0 * y[kept] - 1,
                    steps=1,
                    step_size=method.step_size,
                    l2=0.2,
                    divisor=len(kept),
                )
        np.testing.assert_allclose(weights, expected, atol=1e-12)


@pytest.mark.usefixtures("silent")
def test_solved_batch_is_the_minimum_of_each(records: Any, plan_for: Callable[..., Plan]) -> None:
    x, y, masks = records
    spec = DataSpec(features=4, classes=("0", "1"), preprocess="none")
    plan = plan_for(GradientNorm, loss="logistic", data=spec, learned=None, tolerance=1e-9)
    found = linear(plan, part_of(x, y), masks, classes=2)
    for weights, mask in zip(found, masks, strict=True):
        rows, signs = x[mask], 2.0 * y[mask] - 1

        def objective(w: Array, rows: Array = rows, signs: Array = signs) -> tuple[float, Array]:
            products = signs * (rows @ w)
            slope = -(signs * expit(-products)) @ rows / len(rows) + 0.2 * w
            return float(np.logaddexp(0, -products).mean() + 0.1 * w @ w), slope

        assert np.linalg.norm(objective(weights)[1]) <= 1e-9
        best = minimize(objective, np.zeros(4), jac=True, options={"gtol": 1e-7}).x
        np.testing.assert_allclose(weights, best, atol=1e-5)


@pytest.mark.parametrize("kind", [GradientNorm, DescentToDelete, Langevin])
def test_published_noise(kind: Any, records: Any, plan_for: Callable[..., Plan]) -> None:
    """400 models on the same records: the noise of the plan, once at the end or accumulated over the steps."""
    x, y, _ = records
    spec = DataSpec(features=4, classes=("0", "1"), preprocess="none")
    options = {"tolerance": 1e-4} if kind is GradientNorm else {"unlearn_steps": 2}
    plan = plan_for(kind, loss="logistic", data=spec, learned=None if kind is GradientNorm else 3, **options)
    masks = np.ones((400, 40), dtype=bool)
    spread = linear(plan, part_of(0 * x, y), masks, classes=2).std()
    if kind is Langevin:
        # Rows of zeros have no gradient: the noise of five steps, shrunk by the regulariser in between.
        method: Any = plan.method
        shrink = (1 - method.step_size * 0.2) ** 2
        expected = plan.noise_std * np.sqrt(sum(shrink**step for step in range(5)))
    else:
        expected = plan.noise_std
    # 1600 numbers: a relative standard error of 0.018.
    assert spread == pytest.approx(expected, rel=0.08)


def test_residual_clip(records: Any, plan_for: Callable[..., Plan]) -> None:
    """No gradient of one record is longer than the clip of the plan."""
    x, y, _ = records
    plan = logistic_plan(plan_for, Langevin, residual_clip=0.1)
    trainer = LinearTrainer(plan, plan.method.constants, part_of(x, y), classes=2)  # type: ignore[attr-defined]
    one = torch.zeros(40, 1, dtype=torch.float64)
    for record in range(40):
        one.zero_()
        one[record] = 1.0
        found = trainer.gradient(torch.zeros(4, 1, dtype=torch.float64), one, slice(None))
        length = float(np.linalg.norm(x[record])) / 2
        assert float(found.norm()) == pytest.approx(min(0.1, length), rel=1e-12)


class Recorded:
    """Permutations and initial numbers drawn before, given out again in order."""

    def __init__(self, orders: list[Array]) -> None:
        self.orders = list(orders)

    def permutation(self, n: int) -> Array:
        found = self.orders.pop(0)
        assert len(found) == n
        return found


@pytest.mark.parametrize("model", ["mlp:6", "logistic", "softmax", "cnn-small"])
@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
def test_stacked_networks_are_the_loop(
    model: str, schedule: str, blobs: Callable[..., tuple[Array, Array]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same initial numbers and orders: step for step what ``train`` does, a last batch that is shorter included."""
    features, shape = (64, (1, 8, 8)) if model == "cnn-small" else (4, None)
    x, y = blobs(n=31, d=features)
    recipe = Recipe(epochs=3, step_size=0.3, schedule=schedule, batch_size=6, momentum=0.9, weight_decay=0.01)
    starts: list[torch.nn.Module] = []

    def initial(source: GaussianSource) -> torch.nn.Module:
        made = build(model, features, 2, shape)
        initialise(made, source)
        kept = build(model, features, 2, shape)
        kept.load_state_dict(made.state_dict())
        starts.append(kept)
        return made

    source = GaussianSource(CPU, seed=3)
    masks = halves(4, 31, source)
    orders: list[Array] = []
    draw = source.permutation

    def recorded(n: int) -> Array:
        orders.append(draw(n))
        return orders[-1]

    monkeypatch.setattr(source, "permutation", recorded)
    trainer = StackedTrainer(initial, part_of(x, y), recipe, input_shape=shape, losses=stacked_losses)
    found = trainer.train(masks, source=source, stepper=Stepper(source))
    # 15 records in batches of 6: three epochs of three batches.
    assert len(orders) == 3 * len(masks)
    labels = torch.from_numpy(2 * y - 1 if model == "logistic" else y)
    for index, mask in enumerate(masks):
        network = Network(starts[index], device=CPU, input_shape=shape)
        chosen = torch.from_numpy(np.flatnonzero(mask))
        replay: Any = Recorded(orders[index :: len(masks)])
        with torch.no_grad():
            train(
                network,
                torch.from_numpy(x).float()[chosen],
                labels[chosen],
                recipe,
                source=replay,
                stepper=Stepper(source),
                name="train",
            )
        assert found[index].shape == (network.size,)
        np.testing.assert_allclose(found[index], network.weights().numpy(), atol=2e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_divergence_is_told(blobs: Callable[..., tuple[Array, Array]]) -> None:
    x, y = blobs(n=20)

    def initial(source: GaussianSource) -> torch.nn.Module:
        made = build("mlp:6", 4, 2)
        initialise(made, source)
        return made

    recipe = Recipe(epochs=60, step_size=1e6, batch_size=2)
    source = GaussianSource(CPU, seed=1)
    trainer = StackedTrainer(initial, part_of(1e3 * x, y), recipe, input_shape=None, losses=stacked_losses)
    with pytest.raises(GuardFailed, match="diverged"):
        trainer.train(halves(4, 20, source), source=source, stepper=Stepper(source))


def test_loop_gives_each_model_its_records(blobs: Callable[..., tuple[Array, Array]]) -> None:
    x, y = blobs(n=20)
    masks = halves(4, 20, GaussianSource(CPU, seed=1))

    def mean(rows: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        return rows[labels == 1].mean(dim=0)

    source = GaussianSource(CPU, seed=1)
    found = LoopTrainer(part_of(x, y), mean).train(masks, source=source, stepper=Stepper(source))
    for weights, mask in zip(found, masks, strict=True):
        np.testing.assert_allclose(weights, x[mask & (y == 1)].mean(axis=0))


def test_members_of_an_ensemble_share_its_records(blobs: Callable[..., tuple[Array, Array]]) -> None:
    """Three members: disjoint shares of equal size, within the half of their ensemble, side by side in one row."""
    x, y = blobs(n=40)
    masks = halves(4, 40, GaussianSource(CPU, seed=1))

    def who(rows: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        return (torch.from_numpy(x)[:, None] == rows[None]).all(dim=2).any(dim=1).double()

    source = GaussianSource(CPU, seed=1)
    member = LoopTrainer(part_of(x, y), who)
    found = EnsembleTrainer(member, 3).train(masks, source=source, stepper=Stepper(source)).reshape(4, 3, 40)
    assert (found.sum(axis=2) == 6).all()
    assert found.sum(axis=1).max() == 1
    assert not (found.sum(axis=1) > masks).any()
    # Drawn anew for each ensemble: not the first records in order.
    assert all(np.flatnonzero(part[0]).max() > np.flatnonzero(part[1]).min() for part in found)
