"""Descent-to-delete: a deterministic secret state, fresh noise on every release, rewinding, requests."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc.errors import DataError, InvalidInput
from rdp_calc.methods.descent_to_delete import DescentToDelete

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CHAINS = 20_000
IDS = [0, 8, 21]


@pytest.mark.parametrize("adjacency", ["remove", "zero-out", "replace"])
def test_state_is_exact_and_releases_have_fresh_noise(
    adjacency: str,
    plan_for: Callable[..., Any],
    regression: Callable[..., Any],
    glm_job: Callable[..., Any],
    quadratic_law: Any,
) -> None:
    plan = plan_for(DescentToDelete, adjacency=adjacency, learned=5, step_size=0.8, requests="3:2,1:4", epsilon=30.0)
    dataset, drops = regression(), adjacency == "remove"
    step = {"step_size": 0.8, "l2": 0.2, "noise_std": 0.0}
    first = glm_job(plan, dataset, IDS, chains=CHAINS)
    second = glm_job(plan, dataset, [11], gone=IDS, request=2, chains=CHAINS)
    learned = first.learn()
    after = first.unlearn(learned)
    last = second.unlearn(second.start_from(after))
    x, y = dataset.x_train, dataset.y_train
    law = quadratic_law.at_origin().after(x, y, 40, steps=5, **step)
    laws = [law]
    for away, steps in ((IDS, 2), ([*IDS, 11], 4)):
        here = ~np.isin(np.arange(40), away)
        laws.append(laws[-1].after(x[here], y[here], 40 - len(away) if drops else 40, steps=steps, **step))
    for state, exact in zip((learned, after, last), laws, strict=True):
        assert (state["weights"] - torch.from_numpy(exact.mean)[:, None]).abs().max() < 1e-14
        released = exact.with_noise(plan.noise_std)
        assert released.holds(state["released"])
        # Half the noise, a request forgotten.
        assert not exact.with_noise(plan.noise_std / 2).holds(state["released"])
    noises = [((state["released"] - state["weights"]) / plan.noise_std).flatten() for state in (learned, after, last)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        # Independent: the mean product of 60,000 pairs has deviation 1/245.
        assert abs(float((noises[one] * noises[other]).mean())) < 6.5 / math.sqrt(len(noises[one]))
    # The reference is noise-free gradient descent on what is left, all steps of it.
    here = ~np.isin(np.arange(40), [*IDS, 11])
    alone = quadratic_law.at_origin().after(x[here], y[here], 36 if drops else 40, steps=11, **step)
    reference = second.retrain(last, "fresh")
    assert (reference["weights"] - torch.from_numpy(alone.mean)[:, None]).abs().max() < 1e-14
    assert alone.with_noise(plan.noise_std).holds(reference["released"])
    assert torch.equal(first.model(after, exact=True)["weight"], after["released"][:, 0])


@pytest.mark.parametrize("unlearned", [0, 2, 6])
def test_rewinding_starts_from_an_earlier_iterate(
    unlearned: int,
    plan_for: Callable[..., Any],
    regression: Callable[..., Any],
    glm_job: Callable[..., Any],
    quadratic_law: Any,
) -> None:
    plan = plan_for(
        DescentToDelete, learned=6, step_size=0.8, unlearn_steps=unlearned, group_size=3, rewind=True, learn_steps=9
    )
    dataset = regression()
    x, y, step = dataset.x_train, dataset.y_train, {"step_size": 0.8, "l2": 0.2, "noise_std": 0.0}
    job = glm_job(plan, dataset, IDS, chains=2)
    learned = job.learn()
    early = quadratic_law.at_origin().after(x, y, 40, steps=6 - unlearned, **step)
    assert (learned["rewind"] - torch.from_numpy(early.mean)[:, None]).abs().max() < 1e-14
    whole = early.after(x, y, 40, steps=unlearned, **step)
    assert (learned["weights"] - torch.from_numpy(whole.mean)[:, None]).abs().max() < 1e-14
    here = ~np.isin(np.arange(40), IDS)
    end = early.after(x[here], y[here], 37, steps=unlearned, **step)
    after = job.unlearn(job.start_from(learned))
    assert (after["weights"] - torch.from_numpy(end.mean)[:, None]).abs().max() < 1e-14
    assert "rewind" not in after
    with pytest.raises(DataError, match="fit"):
        job.start_from({"weights": learned["weights"]})
    alone = quadratic_law.at_origin().after(x[here], y[here], 37, steps=6, **step)
    assert (job.retrain(learned, "zeros")["weights"] - torch.from_numpy(alone.mean)[:, None]).abs().max() < 1e-14


def test_start_is_left_as_it_was(
    plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any]
) -> None:
    job = glm_job(plan_for(DescentToDelete, unlearn_steps=3, step_size=0.5), regression(), [1])
    learned = job.learn()
    before = {name: tensor.clone() for name, tensor in learned.items()}
    job.unlearn(learned)
    assert all(torch.equal(learned[name], before[name]) for name in before)
    with pytest.raises(InvalidInput, match="noised"):
        job.retrain(learned, "noised")
