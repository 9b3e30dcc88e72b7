"""Newton and jackknife as jobs on linear models: what is released, what is kept, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import expit, softmax

from rdp_calc import DataSpec
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.gradient_norm import GradientNorm
from rdp_calc.methods.jackknife import Jackknife
from rdp_calc.methods.newton import Newton
from rdp_calc.training import Training
from unlearn_runtime.algorithms import glm_hessian, newton
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.newton_job import NewtonGlmJob, make
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
IDS = np.array([0, 8, 21])
CHAINS = 20_000
KINDS = (Newton, Jackknife)


def job_of(plan: Any, dataset: Dataset, ids: Array | None = IDS, *, chains: int = 1, **execution: Any) -> NewtonGlmJob:
    source = GaussianSource(CPU)
    found = make(
        plan,
        dataset,
        ids=ids,
        execution=Execution(chains=chains, **execution),
        device=CPU,
        source=source,
        stepper=Stepper(source),
    )
    assert isinstance(found, NewtonGlmJob)
    return found


@pytest.fixture
def least_squares(plan_for: Callable[..., Any]) -> Callable[..., Any]:
    """A plan for ``regression`` data; its residuals are far below the threshold 1."""

    def plan(kind: type[Newton], **options: Any) -> Any:
        adjacency = "zero-out" if kind is Jackknife else "remove"
        settings = {"adjacency": adjacency, "group_size": 3, "hessian_lipschitz": 0.0, "learned": None}
        settings |= {"tolerance": 1e-10, "residual": 1e-10, "epsilon": 1.0}
        return plan_for(kind, **{**settings, **options})

    return plan


def solution(dataset: Dataset, here: Array, divisor: int) -> Array:
    rows, labels = dataset.x_train[here], dataset.y_train[here]
    exact: Array = np.linalg.solve(rows.T @ rows / divisor + 0.2 * np.eye(3), rows.T @ labels / divisor)
    return exact


def expected(kind: type[Newton], dataset: Dataset, kept: Array, adjacency: str) -> Array:
    """The unlearned weights, from normal equations."""
    divisor = int(kept.sum()) if adjacency == "remove" else 40
    if kind is Newton:
        return solution(dataset, kept, divisor)
    x, y, w = dataset.x_train, dataset.y_train, solution(dataset, np.full(40, True), 40)
    pull = x[~kept].T @ (x[~kept] @ w - y[~kept]) / 40
    moved: Array = w + np.linalg.solve(x.T @ x / 40 + 0.2 * np.eye(3), pull)
    return moved


@pytest.mark.parametrize("adjacency", ["remove", "zero-out", "replace"])
@pytest.mark.parametrize("kind", KINDS)
def test_law_of_the_released_model(
    kind: type[Newton],
    adjacency: str,
    least_squares: Callable[..., Any],
    regression: Callable[..., Dataset],
    quadratic_law: Any,
) -> None:
    if kind is Jackknife and adjacency != "zero-out":
        return
    plan, dataset = least_squares(kind, adjacency=adjacency), regression()
    kept = ~np.isin(np.arange(40), IDS)
    # The error over the noise is what is certified (docs/theory/error-bound.md).
    assert plan.mu == pytest.approx(float(plan.method.error().mid()) / plan.noise_std, rel=1e-9)
    # Noise that Monte Carlo can tell from nothing, whatever the error is.
    plan = replace(plan, noise_std=0.02)
    job = job_of(plan, dataset, chains=CHAINS)
    learned = job.learn()
    after = job.unlearn(learned)
    fresh = job.retrain(after, "fresh")
    divisor = 37 if adjacency == "remove" else 40
    wanted = (
        (learned, solution(dataset, np.full(40, True), 40)),
        (after, expected(kind, dataset, kept, adjacency)),
        (fresh, solution(dataset, kept, divisor)),
    )
    for state, exact in wanted:
        assert float((state["weights"] - torch.from_numpy(exact)[:, None]).norm(dim=0).max()) <= 2e-10 / 0.2
        assert torch.equal(state["weights"], state["weights"][:, :1].expand(-1, CHAINS).contiguous())
        law = quadratic_law(exact, np.zeros((3, 3)))
        assert law.with_noise(0.02).holds(state["released"])
        # Half the noise, noise on the weights that were learned, or none, would be seen.
        assert not law.with_noise(0.02 / 2).holds(state["released"])
    assert not quadratic_law(wanted[0][1], np.zeros((3, 3))).with_noise(0.02).holds(after["released"])
    assert job.chains(after).shape == (CHAINS, 3)
    assert torch.equal(job.chains(after)[:5].t(), after["released"][:, :5])
    assert torch.equal(job.model(after, exact=True)["weight"], after["released"][:, 0])
    off = job.release(after)["weight"].double() - after["released"][:, 0]
    assert 0 < float(off.abs().max()) <= 0.02 * 2.0**-20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_error_of_a_run_is_within_the_plan(
    loss: str,
    kind: type[Newton],
    plan_for: Callable[..., Any],
    blobs: Callable[..., tuple[Array, Array]],
) -> None:
    outputs = 3 if loss == "softmax" else 1
    x, y = blobs(n=60, classes=max(2, outputs))
    spec = DataSpec(features=4, classes=tuple(map(str, range(max(2, outputs)))))
    plan = plan_for(
        kind,
        loss=loss,
        adjacency="zero-out",
        l2=0.05,
        dataset_size=60,
        group_size=5,
        tolerance=1e-9,
        residual=1e-9,
        learned=None,
        data=spec,
    )
    ids = np.array([3, 4, 5, 10, 59])
    job = job_of(plan, Dataset(x_train=x, y_train=y, x_test=x, y_test=y, source="x"), ids)
    learned = job.learn()
    after, fresh = job.unlearn(learned), job.retrain(learned, "fresh")
    error = float((after["weights"] - fresh["weights"]).norm())
    untouched = float((learned["weights"] - fresh["weights"]).norm())
    assert 0 < error <= float(plan.method.error().mid())
    assert error < 0.3 * untouched
    kept = ~np.isin(np.arange(60), ids)
    for state, here in ((learned, np.full(60, True)), (fresh, kept)):
        w, rows = state["weights"].numpy(), x[here]
        scores = rows @ w
        if loss == "softmax":
            residuals = softmax(scores, axis=1) - np.eye(3)[y[here]]
        else:
            signs = (2 * y[here] - 1)[:, None]
            residuals = -signs * expit(-signs * scores)
        assert np.linalg.norm(rows.T @ residuals / 60 + 0.05 * w) <= 1e-9
    audit = job.audit()
    assert audit["gradient_norm"] + audit["rounding_error"] <= 1e-9
    assert audit["residual"] + audit["residual_rounding"] <= 1e-9
    assert job.metrics(after)["forget_accuracy"]["chains"] == 1
    assert job.executed()["matrix_dtype"] == "float64"


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_where_it_was_kept(
    kind: type[Newton], least_squares: Callable[..., Any], regression: Callable[..., Dataset]
) -> None:
    plan, dataset = least_squares(kind), regression()
    learned = job_of(plan, dataset, None, chains=3).learn()
    assert ("factor" in learned) == (kind is Jackknife)
    later = job_of(plan, dataset, chains=2)
    start = later.start_from(dict(learned))
    before = {name: tensor.clone() for name, tensor in start.items()}
    after = later.unlearn(start)
    assert set(after) == {"weights", "released"}
    assert after["weights"].shape == (3, 2)
    assert all(torch.equal(start[name], tensor) for name, tensor in before.items())
    whole = job_of(plan, dataset)
    again = whole.unlearn(whole.learn())["weights"]
    np.testing.assert_allclose(again, after["weights"][:, :1], rtol=0, atol=1e-15)
    with pytest.raises(InvalidInput, match="3 chains"):
        job_of(plan, dataset, chains=4).start_from(dict(learned))
    with pytest.raises(DataError, match="learn run"):
        later.start_from({"weight": torch.zeros(3)}, state=False)
    with pytest.raises(DataError, match="does not fit"):
        later.start_from({**learned, "weights": learned["weights"][:2]})
    if kind is Jackknife:
        for wrong in ({"factor": torch.zeros(2, 2)}, {"factor_error": torch.zeros(2)}):
            with pytest.raises(DataError, match="factor"):
                later.start_from({**learned, **wrong})


def test_a_request_to_the_jackknife_reads_the_forgotten_records_alone(
    least_squares: Callable[..., Any], regression: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(least_squares(Jackknife), regression())
    learned = job.learn()
    read = []
    mean_gradient = GeneralisedLinearModel.mean_gradient

    def watched(self: GeneralisedLinearModel, weights: torch.Tensor, **more: Any) -> torch.Tensor:
        read.append(len(self.rows))
        return mean_gradient(self, weights, **more)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a Hessian is read")

    monkeypatch.setattr(GeneralisedLinearModel, "mean_gradient", watched)
    monkeypatch.setattr(GeneralisedLinearModel, "hessian", forbidden)
    # The typed Hessian-Lipschitz constant of the Huber loss is checked with one more gradient.
    monkeypatch.setattr(NewtonGlmJob, "_check_left", lambda self, weights: None)
    job.unlearn(learned)
    assert read == [3]


def test_large_models_go_through_products(
    least_squares: Callable[..., Any], regression: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, kept = regression(), ~np.isin(np.arange(40), IDS)
    monkeypatch.setattr("unlearn_runtime.newton_job.MOST_DENSE", 2)
    monkeypatch.setattr(newton.take_step, "__kwdefaults__", {"most_dense": 2})
    for kind in KINDS:
        plan = least_squares(kind)
        job = job_of(plan, dataset)
        learned = job.learn()
        assert "factor" not in learned
        monkeypatch.setattr(glm_hessian.GlmHessian, "numbers", property(lambda self: 10**6))
        after = job.unlearn(learned)
        exact = expected(kind, dataset, kept, plan.method.adjacency)
        np.testing.assert_allclose(after["weights"][:, 0], exact, rtol=0, atol=2e-10 / 0.2)
        assert job.audit()["linear_solver"] == "conjugate gradients"


@pytest.mark.parametrize("solver", ["newton-cg", "lbfgs"])
def test_the_solver_is_the_plans(
    solver: str,
    least_squares: Callable[..., Any],
    regression: Callable[..., Dataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unlearn_runtime import newton_job

    asked = []
    minimise = newton_job.minimise

    def watched(*values: Any, **named: Any) -> Any:
        asked.append((named["solver"], named["tolerance"]))
        return minimise(*values, **named)

    monkeypatch.setattr(newton_job, "minimise", watched)
    plan = least_squares(Newton, training=Training(model="huber", solver=solver), reference_tolerance=1e-7)
    job = job_of(plan, regression())
    job.retrain(job.learn(), "fresh")
    assert asked == [(solver, 1e-10), (solver, 1e-7)]


def test_refusals(
    plan_for: Callable[..., Any], least_squares: Callable[..., Any], regression: Callable[..., Dataset]
) -> None:
    dataset = regression()
    with pytest.raises(GuardFailed, match="plan with --residual"):
        job_of(least_squares(Newton, residual=0.0), dataset)
    with pytest.raises(InvalidInput, match="float64"):
        job_of(least_squares(Newton), dataset, dtype="float32")
    with pytest.raises(InvalidInput, match="no reference 'zeros'"):
        job_of(least_squares(Newton), dataset).retrain(None, "zeros")
    with pytest.raises(InvalidInput, match="without ids"):
        job_of(least_squares(Newton), dataset, None).unlearn({})
    with pytest.raises(InvalidInput, match="not newton or jackknife"):
        job_of(plan_for(GradientNorm, tolerance=1e-8, learned=None), dataset)
    with pytest.raises(GuardFailed, match="rounding of a gradient"):
        job_of(least_squares(Newton, tolerance=1e-17), dataset).learn()
    job = job_of(least_squares(Newton), dataset)
    state = job.learn()
    with pytest.raises(GuardFailed, match=r"gradient norm .* tolerance is 1e-10"):
        job.unlearn({"weights": state["weights"] + 1e-6})


@pytest.mark.parametrize("kind", KINDS)
def test_a_typed_hessian_lipschitz_that_is_too_small_is_seen(
    kind: type[Newton], plan_for: Callable[..., Any], regression: Callable[..., Dataset]
) -> None:
    """Residuals on both sides of the Huber threshold: the Hessian jumps, and 0 is wrong."""
    dataset = regression()
    labels = dataset.y_train.copy()
    labels[::2] += 0.2
    dataset = replace(dataset, y_train=labels)
    adjacency = "zero-out"
    settings = {"adjacency": adjacency, "group_size": 8, "tolerance": 1e-10, "residual": 1e-10, "learned": None}
    typed = {"huber_threshold": 0.1, "lipschitz": 0.1, **settings}
    ids = np.arange(0, 16, 2)

    def run(hessian_lipschitz: float) -> tuple[float, float]:
        plan = plan_for(kind, hessian_lipschitz=hessian_lipschitz, **typed)
        job = job_of(plan, dataset, ids)
        learned = job.learn()
        after, fresh = job.unlearn(learned), job.retrain(learned, "fresh")
        return float((after["weights"] - fresh["weights"]).norm()), float(plan.method.error().mid())

    if kind is Newton:
        with pytest.raises(GuardFailed, match="hessian_lipschitz"):
            run(0.0)
    error, bound = run(30.0)
    assert 1e-5 < error <= bound
