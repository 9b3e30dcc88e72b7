"""Gradient-norm: both solvers reach what is asked for, against scipy and exact normal equations; then the noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import expit, softmax

from rdp_calc import DataSpec
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.gradient_norm import GradientNorm
from rdp_calc.training import Training
from unlearn_runtime.algorithms import gradient_norm
from unlearn_runtime.algorithms.gradient_norm import minimise
from unlearn_runtime.data import Dataset
from unlearn_runtime.glm_losses import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
CHAINS = 20_000
SOLVERS = ("newton-cg", "lbfgs")


def slope(loss: str, w: Array, x: Array, y: Array, l2: float, divisor: int, clip: float | None = None) -> Array:
    """The gradient of the regularised mean loss, (d, C), written out in numpy."""
    scores = x @ w
    if loss == "logistic":
        residuals = -y[:, None] * expit(-y[:, None] * scores)
    elif loss == "huber":
        residuals = np.clip(scores - y[:, None], -0.3, 0.3)
    else:
        residuals = softmax(scores, axis=1) - np.eye(w.shape[1])[y]
    if clip is not None:
        limits = clip / np.linalg.norm(x, axis=1, keepdims=True)
        residuals = np.clip(residuals, -limits, limits)
    return x.T @ residuals / divisor + l2 * w


@pytest.mark.parametrize("start", [0.0, 30.0])
@pytest.mark.parametrize("l2", [1e-2, 1e-5])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("loss", ["logistic", "huber", "softmax", "clipped"])
def test_solvers_reach_the_tolerance(loss: str, solver: str, l2: float, start: float) -> None:
    draws = np.random.default_rng(2)
    n, d, clip = 500, 12, 0.2 if loss == "clipped" else None
    loss = "logistic" if clip else loss
    x = draws.normal(size=(n, d)) * np.geomspace(1, 0.05, d)
    x /= np.linalg.norm(x, axis=1, keepdims=True) * 1.001
    teacher = draws.normal(size=(d, 3))
    scores = x @ teacher + 0.2 * draws.normal(size=(n, 3))
    y: Array = {"softmax": scores.argmax(axis=1), "huber": scores[:, 0], "logistic": np.sign(scores[:, 0])}[loss]
    options: dict[str, Any] = {"threshold": 0.3} if loss == "huber" else {}
    if clip:
        options["residual_clip"] = clip
    outputs = 3 if loss == "softmax" else 1
    model = MODELS[loss].from_arrays(x.copy(), y, classes=max(2, outputs), device=CPU, **options)
    curvature = {"softmax": 0.5, "huber": 1.0, "logistic": 0.25}[loss]
    found = minimise(
        model,
        torch.full((d, outputs), start, dtype=torch.float64),
        l2=l2,
        smoothness=curvature + l2,
        tolerance=1e-10,
        solver=solver,
    )
    assert found.gradient_norm + found.rounding <= 1e-10
    own = slope(loss, found.weights.numpy(), x, y, l2, n, clip)
    # numpy's own rounding, and that of the clip's safe side, is far below the tolerance.
    assert np.linalg.norm(own) <= 1e-10 + 1e-12
    assert found.iterations < (60 if solver == "newton-cg" else 3000)


def test_tolerance_below_float64_is_refused(regression: Callable[..., Dataset]) -> None:
    data = regression()
    model = MODELS["huber"].from_arrays(data.x_train.copy(), data.y_train, classes=0, device=CPU, threshold=1.0)
    for solver in SOLVERS:
        with pytest.raises(GuardFailed, match="float64"):
            minimise(model, torch.zeros(3, 1).double(), l2=0.1, smoothness=1.1, tolerance=1e-17, solver=solver)
    with pytest.raises(GuardFailed, match="not finite"):
        minimise(model, torch.full((3, 1), np.nan).double(), l2=0.1, smoothness=1.1, tolerance=1e-9)


def test_a_bounded_number_of_iterations(regression: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    data = regression()
    model = MODELS["huber"].from_arrays(data.x_train.copy(), data.y_train, classes=0, device=CPU, threshold=1.0)
    monkeypatch.setitem(gradient_norm._MOST_ITERATIONS, "lbfgs", 3)
    with pytest.raises(GuardFailed, match="not reached"):
        minimise(model, torch.zeros(3, 1).double(), l2=1e-4, smoothness=1.1, tolerance=1e-12, solver="lbfgs")


@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_law_of_the_released_model(
    solver: str | None,
    plan_for: Callable[..., Any],
    regression: Callable[..., Any],
    glm_job: Callable[..., Any],
    quadratic_law: Any,
) -> None:
    training = None if solver is None else Training(model="huber", solver=solver)
    plan = plan_for(GradientNorm, tolerance=1e-9, epsilon=1.0, learned=None, training=training)
    # mu = 2 g/(m noise_std), theory section 4.9.
    assert plan.mu == pytest.approx(2 * 1e-9 / (0.2 * plan.noise_std), rel=1e-9)
    dataset, ids = regression(), [0, 8, 21]
    x, y = dataset.x_train, dataset.y_train

    def solution(here: Array) -> Array:
        rows, labels = x[here], y[here]
        exact: Array = np.linalg.solve(rows.T @ rows / len(rows) + 0.2 * np.eye(3), rows.T @ labels / len(rows))
        return exact

    job = glm_job(plan, dataset, ids, chains=CHAINS)
    learned = job.learn()
    after = job.unlearn(job.start_from(learned))
    fresh = job.retrain(after, "zeros")
    kept = ~np.isin(np.arange(40), ids)
    for state, here in ((learned, np.full(40, True)), (after, kept), (fresh, kept)):
        exact = solution(here)
        assert float((state["weights"] - torch.from_numpy(exact)[:, None]).norm(dim=0).max()) <= 1e-9 / 0.2
        assert torch.equal(state["weights"], state["weights"][:, :1].expand(-1, CHAINS).contiguous())
        law = quadratic_law(state["weights"][:, 0].numpy(), np.zeros((3, 3)))
        assert law.with_noise(plan.noise_std).holds(state["released"])
        assert not law.with_noise(plan.noise_std / 2).holds(state["released"])
    assert np.linalg.norm(solution(kept) - solution(np.full(40, True))) > 1e-3
    assert job.executed()["learn_steps"] is None
    assert job.executed()["matrix_dtype"] == "float64"
    audit = job.audit()
    assert audit["gradient_norm"] + audit["rounding_error"] <= 1e-9
    # It is the solve of the released model that is recorded, not that of the reference.
    assert job.solved is not None
    assert torch.equal(job.solved.weights, after["weights"][:, :1])


def test_any_model_is_a_warm_start(
    plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any]
) -> None:
    plan = plan_for(GradientNorm, tolerance=1e-8, learned=None)
    job = glm_job(plan, regression(), [4], chains=2)
    state = job.start_from({"weight": torch.tensor([1.0, -2.0, 3.0])}, state=False)
    assert state["weights"].tolist() == [[1.0, 1.0], [-2.0, -2.0], [3.0, 3.0]]
    ends = [job.unlearn(start)["weights"] for start in (state,)]
    other = glm_job(plan, regression(), [4], chains=2)
    ends.append(other.unlearn(other.learn())["weights"])
    assert float((ends[0] - ends[1]).norm(dim=0).max()) <= 2e-8 / 0.2
    for tensors in (
        {},
        {"weight": torch.zeros(4)},
        {"weight": torch.tensor([1.0, np.inf, 0.0])},
        {"weight": torch.zeros(3, dtype=torch.int64)},
    ):
        with pytest.raises(DataError):
            job.start_from(tensors, state="weights" in tensors)


def test_float32_is_refused(
    plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidInput, match="float64"):
        glm_job(plan_for(GradientNorm, tolerance=1e-8, learned=None), regression(), dtype="float32")


def test_softmax_from_its_own_file(
    plan_for: Callable[..., Any], glm_job: Callable[..., Any], blobs: Callable[..., tuple[Array, Array]]
) -> None:
    x, y = blobs(classes=3)
    spec = DataSpec(features=4, classes=("0", "1", "2"))
    plan = plan_for(GradientNorm, loss="softmax", tolerance=1e-8, learned=None, data=spec, dataset_size=60)
    job = glm_job(plan, Dataset(x_train=x, y_train=y, x_test=None, y_test=None, source="x"), [4], chains=2, dtype=None)
    learned = job.learn()
    file = job.model(learned)
    assert file["weight"].shape == (3, 4)
    assert file["weight"].dtype == torch.float32
    again = job.start_from({"weight": file["weight"]}, state=False)
    assert again["weights"].shape == learned["weights"].shape
    np.testing.assert_allclose(again["weights"][:, :3].t().numpy(), file["weight"].numpy())
    assert slope("softmax", learned["weights"][:, 3:].numpy(), x, y, 0.2, 60) == pytest.approx(0, abs=1e-8)
