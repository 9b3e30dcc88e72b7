"""Many whole runs against many retrained ones: no event may tell them apart better than the certificate says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from rdp_calc import Plan
from rdp_calc.documents import read_document
from unlearn_runtime.execution import Execution
from unlearn_runtime.glm_job import GlmJob
from unlearn_runtime.run import run_plan

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]

CHAINS = 20_000
#: Probability that a lower bound on mu is above the true one. Four are computed here.
MISS = 1e-7


def worst_case(n: int, forgotten: int) -> tuple[Array, Array]:
    """The forgotten records, rows 0.., are as long as allowed and misclassified by what the others teach; the others
    are short, so that they add next to no curvature: gradient and contraction come near the constants of the bound.
    """
    x = np.tile([0.8, -0.6], (n, 1))
    x[forgotten:] *= 0.25
    y = np.ones(n, dtype=int)
    y[:forgotten] = 0
    return x, y


def final_weights(
    plan: Plan, data: str, forget: str, output: Path, patch: pytest.MonkeyPatch, noise_factor: float
) -> tuple[Array, Array]:
    """(unlearned, retrained), each (d, R): the end points of all chains of one run of the whole pipeline."""
    ends: dict[str, Array] = {}
    prepare = GlmJob.__init__

    def with_other_noise(self: GlmJob, plan: Plan, *args: Any, **settings: Any) -> None:
        prepare(self, replace(plan, noise_std=noise_factor * plan.noise_std), *args, **settings)

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(GlmJob, name)

        def phase(self: GlmJob, *args: Any, **settings: Any) -> Any:
            state = original(self, *args, **settings)
            ends[name] = state["weights"].numpy().copy()
            return state

        return phase

    patch.setattr(GlmJob, "__init__", with_other_noise)
    for name in ("learn", "unlearn", "retrain"):
        patch.setattr(GlmJob, name, watched(name))
    execution = Execution(chains=CHAINS, retrain="fresh", dtype="float64")
    run_plan(plan.to_json(), data=data, output=output, forget=forget, execution=execution)
    patch.undo()
    assert not np.array_equal(ends["learn"], ends["unlearn"])
    return ends["unlearn"], ends["retrain"]


def lower_bound_on_mu(one: Array, other: Array) -> float:
    """A number that is above the mu of the pair of laws with probability at most MISS.

    Half of the chains choose a direction (from one mean to the other) and a threshold; on the other half the event
    "beyond it" has probabilities p and q, bounded by Clopper-Pearson. A mu-GDP pair has
    Phi^-1(p) - Phi^-1(q) <= mu for every event, whatever the laws are.
    """
    half = one.shape[1] // 2
    direction = one[:, :half].mean(axis=1) - other[:, :half].mean(axis=1)
    threshold = direction @ (one[:, :half].mean(axis=1) + other[:, :half].mean(axis=1)) / 2
    trials = one.shape[1] - half
    hits, alarms = (int((direction @ w[:, half:] > threshold).sum()) for w in (one, other))
    p = stats.beta.ppf(MISS / 2, hits, trials - hits + 1)
    q = stats.beta.isf(MISS / 2, alarms + 1, trials - alarms)
    return float(stats.norm.ppf(p) - stats.norm.ppf(q))


@pytest.mark.parametrize(("adjacency", "group"), [("zero-out", 1), ("zero-out", 3), ("remove", 1), ("replace", 1)])
def test_unlearned_models_look_like_retrained_ones(
    adjacency: str,
    group: int,
    tmp_path: Path,
    make_plan: Callable[..., Plan],
    save_npz: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n = 24
    plan = make_plan(
        n=n,
        group=group,
        adjacency=adjacency,
        features=2,
        l2=0.02,
        step_size="1/L",
        learned=80,
        unlearned=1,
        epsilon=3.0,
        delta=0.05,
    )
    data = save_npz(*worst_case(n, group))
    forget = f"0-{group - 1}"
    unlearned, retrained = final_weights(plan, data, forget, tmp_path / "run", monkeypatch, 1.0)
    certified = read_document(tmp_path / "run" / "certificate.json")["claim"]["mu"]

    # Independent of the accounting: the mu of theory section 4.2 at the noise of the plan.
    eta, tau = plan.method.step_size, plan.noise_std  # type: ignore[attr-defined]
    c = 1 - eta * 0.02
    shift = eta * (1 if adjacency == "zero-out" else 2) * group / n
    assert certified == pytest.approx(shift / tau * c * math.sqrt((1 + c) / (1 - c)), rel=1e-9)

    assert lower_bound_on_mu(unlearned, retrained) <= certified
    # The test has power: with a quarter of the noise the same pipeline is caught.
    unlearned, retrained = final_weights(plan, data, forget, tmp_path / "quarter", monkeypatch, 0.25)
    assert lower_bound_on_mu(unlearned, retrained) > certified


def test_lower_bound_on_known_laws() -> None:
    draws = np.random.default_rng(11)
    for mu in (0.5, 2.0):
        one, other = draws.normal(size=(2, CHAINS)), draws.normal(size=(2, CHAINS))
        one[0] += 0.6 * mu
        one[1] -= 0.8 * mu
        found = lower_bound_on_mu(one, other)
        # Two bounds of 5.3 deviations each: Phi^-1 at p moves by sqrt(p (1 - p)/10,000)/phi, 0.015 at most here.
        assert mu - 0.2 < found < mu
