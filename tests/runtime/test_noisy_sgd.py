"""Noisy SGD in fixed slots: the exact law on quadratic batches, holes where records left, slots that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc.errors import DataError
from rdp_calc.methods.noisy_sgd import NoisySgd
from unlearn_runtime.algorithms.noisy_sgd import SlottedBatches, assign_slots, check_slots
from unlearn_runtime.noise import GaussianSource

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CHAINS = 20_000
GONE, IDS = [3, 17], [0, 8, 21, 30, 31, 32]


def batch_law(law: Any, dataset: Any, slots: Array, away: list[int], drops: bool, epochs: int, **step: float) -> Any:
    """Epochs over the batches of ``slots`` in order, records ``away`` missing from the sums."""
    here = ~np.isin(np.arange(len(slots)), away)
    for _ in range(epochs):
        for batch in range(slots.max() + 1):
            rows = here & (slots == batch)
            divisor = max(1, rows.sum()) if drops else (slots == batch).sum()
            law = law.after(dataset.x_train[rows], dataset.y_train[rows], int(divisor), **step)
    return law


@pytest.mark.parametrize("adjacency", ["remove", "zero-out", "replace"])
def test_law_of_learning_and_of_two_requests(
    adjacency: str,
    plan_for: Callable[..., Any],
    regression: Callable[..., Any],
    glm_job: Callable[..., Any],
    quadratic_law: Any,
) -> None:
    plan = plan_for(
        NoisySgd, batch_size=7, adjacency=adjacency, learned=3, step_size=0.5, requests="2:2,6:1", epsilon=3000.0
    )
    assert plan.noise_std > 1e-3
    dataset, drops = regression(), adjacency == "remove"
    step = {"step_size": 0.5, "l2": 0.2, "noise_std": plan.noise_std}
    first = glm_job(plan, dataset, GONE, chains=CHAINS, seed=4)
    learned = first.learn()
    slots = learned["slots"].numpy()
    expected = batch_law(quadratic_law.at_origin(), dataset, slots, [], drops, 3, **step)
    assert expected.holds(learned["weights"])
    after = first.unlearn(learned)
    expected = batch_law(expected, dataset, slots, GONE, drops, 2, **step)
    assert expected.holds(after["weights"])
    # The second request goes on from the state of the first, read from a file.
    second = glm_job(plan, dataset, IDS, gone=GONE, request=2, chains=CHAINS)
    again = second.unlearn(second.start_from({name: tensor.clone() for name, tensor in after.items()}))
    assert torch.equal(again["slots"], learned["slots"])
    law = batch_law(expected, dataset, slots, GONE + IDS, drops, 1, **step)
    assert law.holds(again["weights"])
    # The reference never saw any of them, keeps the slots, and runs all epochs.
    reference = second.retrain(again, "fresh")
    fresh = batch_law(quadratic_law.at_origin(), dataset, slots, GONE + IDS, drops, 6, **step)
    assert fresh.holds(reference["weights"])
    # The check has power: half the noise, holes filled, another divisor, other slots, one epoch less.
    weights = again["weights"]
    wrong = [
        batch_law(expected, dataset, slots, GONE + IDS, drops, 1, **(step | {"noise_std": plan.noise_std / 2})),
        batch_law(expected, dataset, slots, GONE, drops, 1, **step),
        batch_law(expected, dataset, slots, GONE + IDS, not drops, 1, **step),
        batch_law(expected, dataset, np.roll(slots, 1), GONE + IDS, drops, 1, **step),
        batch_law(expected, dataset, slots, GONE + IDS, drops, 2, **step),
    ]
    found = [law.deviation(weights) for law in wrong]
    assert min(found) > 12


@pytest.mark.parametrize("adjacency", ["remove", "zero-out"])
def test_an_emptied_batch_shrinks_and_adds_noise_only(
    adjacency: str,
    plan_for: Callable[..., Any],
    regression: Callable[..., Any],
    glm_job: Callable[..., Any],
    silent: None,
) -> None:
    plan = plan_for(
        NoisySgd, batch_size=4, adjacency=adjacency, learned=1, unlearn_epochs=1, step_size=0.5, group_size=4
    )
    dataset = regression()
    learned = glm_job(plan, dataset).learn()
    slots = learned["slots"].numpy()
    job = glm_job(plan, dataset, np.flatnonzero(slots == 9))
    w = learned["weights"][:, 0].numpy().copy()
    for batch in range(9):
        x, y = dataset.x_train[slots == batch], dataset.y_train[slots == batch]
        w -= 0.5 * (x.T @ (x @ w - y) / 4 + 0.2 * w)
    w *= 1 - 0.5 * 0.2
    np.testing.assert_allclose(job.unlearn(learned)["weights"][:, 0].numpy(), w, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("n", "batches"), [(10, 3), (40, 6), (7, 7), (5, 1), (1000, 33)])
def test_slots_are_a_random_partition_into_nearly_equal_batches(n: int, batches: int) -> None:
    source = GaussianSource(torch.device("cpu"), seed=5)
    slots = assign_slots(n, batches, source)
    sizes = np.bincount(slots, minlength=batches)
    assert sizes.min() == n // batches
    assert sizes.max() == -(-n // batches)
    assert check_slots(slots, batches)
    if 1 < batches < n:
        assert not np.array_equal(slots, assign_slots(n, batches, source))
        moved = slots.copy()
        moved[np.flatnonzero(slots == 0)[0]] = 1
        assert not check_slots(moved, batches)
    assert not check_slots(slots + 1, batches)
    assert not check_slots(slots - 1, batches)


def test_rows_of_a_batch_are_one_range_and_not_copied(
    plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any]
) -> None:
    plan = plan_for(NoisySgd, batch_size=7, learned=1, unlearn_epochs=1, step_size=0.5, group_size=6)
    job = glm_job(plan, regression(), IDS)
    slots = assign_slots(40, 6, job.source)
    records = job.records
    batches = SlottedBatches(records.full, slots=slots, present=records.present, retained=records.stays, drops=True)
    for both in zip(batches.present, batches.retained, strict=True):
        whole, left = both
        assert whole.rows.untyped_storage().data_ptr() == left.rows.untyped_storage().data_ptr()
        assert whole.rows.data_ptr() == left.rows.data_ptr() or not len(left.rows)
        assert len(left.rows) <= len(whole.rows)
    assert sum(len(part.rows) for part in batches.retained) == 34
    assert sum(len(part.rows) for part in batches.present) == 40


def test_a_state_without_fitting_slots_is_refused(
    plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any]
) -> None:
    plan = plan_for(NoisySgd, batch_size=7, learned=1, unlearn_epochs=1, step_size=0.5)
    job = glm_job(plan, regression(), [0])
    state = job.learn()
    bad = [
        {"weights": state["weights"]},
        state | {"slots": state["slots"][1:]},
        state | {"slots": state["slots"].to(torch.int32)},
        state | {"slots": torch.zeros_like(state["slots"])},
    ]
    for tensors in bad:
        with pytest.raises(DataError, match="slots"):
            job.start_from(tensors)
    assert torch.equal(job.start_from(state)["slots"], state["slots"])
