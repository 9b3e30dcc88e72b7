"""Newton and jackknife on networks: the step, the constants that are seen, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc import DataSpec, Plan, Target, noise, plan_from_result
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.jackknife import Jackknife
from rdp_calc.methods.newton import Newton
from rdp_calc.training import Recipe, Training
from unlearn_runtime.algorithms import gradient_polish
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.models.builtin import build
from unlearn_runtime.newton_job import make
from unlearn_runtime.newton_network_job import NewtonNetworkJob
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
IDS = np.array([2, 7, 11])
L2 = 0.1
KINDS = (Newton, Jackknife)
RECIPE = Recipe(epochs=3, step_size=0.5, batch_size=16, weight_decay=L2)

#: Those of softmax regression on rows of norm 1, as if somebody had estimated them.
CONSTANTS = {
    "lipschitz": 2**0.5,
    "strong_convexity": L2,
    "smoothness": 0.5 + L2,
    "hessian_lipschitz": 6**0.5 / 9 * (1 + 1e-12),
}


def plan_of(
    kind: type[Newton] = Newton,
    *,
    model: str = "external",
    recipe: Recipe = RECIPE,
    solver: str = "newton-cg",
    **options: Any,
) -> Plan:
    adjacency = "zero-out" if kind is Jackknife else "remove"
    settings = {"dataset_size": 60, "group_size": 3, "adjacency": adjacency, "l2": L2, "tolerance": 1e-8}
    method = kind.from_options(**{**settings, **CONSTANTS, "residual": 1e-9, **options})
    target = Target(epsilon=3.0, delta=1e-3)
    return plan_from_result(
        method,
        noise(method, target),
        target,
        data=DataSpec(features=4, classes=("0", "1", "2"), preprocess="unit-norm"),
        training=Training(model=model, learn=recipe, solver=solver),
    )


@pytest.fixture
def job_for(blobs: Callable[..., tuple[Array, Array]]) -> Callable[..., NewtonNetworkJob]:
    def job(
        plan: Plan, *, ids: Array | None = IDS, module: torch.nn.Module | None = None, chains: int = 1, **execution: Any
    ) -> NewtonNetworkJob:
        x, y = blobs(classes=3)
        source = GaussianSource(CPU, seed=5)
        found = make(
            plan,
            Dataset(x_train=x, y_train=y, x_test=x[:9], y_test=y[:9], source="blobs"),
            ids=ids,
            module=module or build("softmax", 4, 3, None),
            training=plan.training,
            execution=Execution(chains=chains, **execution),
            device=CPU,
            source=source,
            stepper=Stepper(source),
        )
        assert isinstance(found, NewtonNetworkJob)
        return found

    return job


class SoftmaxOracle:
    """Softmax regression in numpy: weights (C, d) flattened, as the module has them."""

    def __init__(self, x: Array, y: Array) -> None:
        self.x, self.y = x.astype(np.float32).astype(np.float64), y

    def parts(self, w: Array, here: Array, divisor: int) -> tuple[Array, Array]:
        x, y = self.x[here], self.y[here]
        shares = np.exp(x @ w.reshape(3, -1).T)
        shares /= shares.sum(axis=1, keepdims=True)
        gradient = ((shares - np.eye(3)[y]).T @ x / divisor).ravel() + L2 * w
        curved = shares[:, :, None] * np.eye(3) - shares[:, :, None] * shares[:, None, :]
        hessian = np.einsum("ice,ia,ib->caeb", curved, x, x).reshape(len(w), len(w)) / divisor
        return gradient, hessian + L2 * np.eye(len(w))

    def minimiser(self, here: Array, divisor: int) -> Array:
        w = np.zeros(3 * self.x.shape[1])
        for _ in range(40):
            gradient, hessian = self.parts(w, here, divisor)
            w = w - np.linalg.solve(hessian, gradient)
        return w


@pytest.mark.parametrize("damping", [0.0, 0.05])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "adjacency"), [(Newton, "remove"), (Newton, "zero-out"), (Newton, "replace"), (Jackknife, "zero-out")]
)
def test_a_linear_network_gets_the_step_of_numpy(
    kind: type[Newton],
    adjacency: str,
    dtype: str,
    damping: float,
    job_for: Callable[..., NewtonNetworkJob],
    blobs: Callable[..., tuple[Array, Array]],
) -> None:
    plan = plan_of(kind, adjacency=adjacency, damping=damping)
    job = job_for(plan, chains=2, dtype=dtype)
    learned = job.learn()
    after, fresh = job.unlearn(learned), job.retrain(learned, "fresh")
    x, y = blobs(classes=3)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    oracle, kept = SoftmaxOracle(x / np.maximum(norms, 1.0), y), ~np.isin(np.arange(60), IDS)
    everyone, divisor = np.full(60, True), 57 if adjacency == "remove" else 60
    w = oracle.minimiser(everyone, 60)
    if kind is Newton:
        gradient, hessian = oracle.parts(w, kept, divisor)
    else:
        gradient = L2 * w - oracle.parts(w, ~kept, 60)[0]
        hessian = oracle.parts(w, everyone, 60)[1]
    exact = w - np.linalg.solve(hessian + damping * np.eye(12), gradient)
    # Rows in float32 and in float64 differ by that much, and w by tolerance / m.
    near = 1e-6
    for state, wanted in ((learned, w), (after, exact), (fresh, oracle.minimiser(kept, divisor))):
        assert state["weights"].shape == (2, 12)
        for chain in state["weights"].numpy():
            np.testing.assert_allclose(chain, wanted, rtol=0, atol=near)
        # Fresh noise on every chain, of the size of the plan.
        noises = (state["released"] - state["weights"]) / plan.noise_std
        assert 0.4 < float(noises.std()) < 1.8
        assert not torch.equal(state["released"][0], state["released"][1])
    error = float((after["weights"] - fresh["weights"]).norm(dim=1).max())
    untouched = float((learned["weights"] - fresh["weights"]).norm(dim=1).max())
    assert error <= float(plan.method.error().mid())
    assert untouched > 1e3 * near
    assert error < 0.5 * untouched
    audit = job.audit()
    assert audit["gradient_norm"] <= 1e-8
    assert audit["residual"] <= 1e-9
    seen = audit["constants_seen"]
    assert L2 * (1 - 1e-9) <= seen["strong_convexity"] < 0.2
    assert 0.5 < seen["lipschitz"] <= 2**0.5
    largest = np.linalg.eigvalsh(hessian)[-1]
    assert seen["smoothness"] == pytest.approx(largest, rel=1e-5) or (
        kind is Jackknife and largest < seen["smoothness"] <= 0.6
    )
    assert 0 < seen["hessian_lipschitz"] <= CONSTANTS["hessian_lipschitz"]


def tanh_network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


@pytest.mark.parametrize("solver", ["newton-cg", "lbfgs"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_is_not_convex(
    kind: type[Newton], solver: str, job_for: Callable[..., NewtonNetworkJob]
) -> None:
    """Near one of its minima: the step brings the retained gradient down by orders, within the plan's constants."""
    wide = {"lipschitz": 20.0, "strong_convexity": 1e-4, "smoothness": 20.0, "hessian_lipschitz": 20.0}
    recipe = Recipe(epochs=60, step_size=0.5, batch_size=60, weight_decay=0.01)
    plan = plan_of(kind, recipe=recipe, solver=solver, l2=0.01, **wide)
    job = job_for(plan, module=tanh_network())
    learned = job.learn()
    after = job.unlearn(learned)
    retained = job._objective(job._exact(), job._records.retained_or_all, job._divisor)
    before, left = (float(retained.gradient(state["weights"][0]).norm()) for state in (learned, after))
    assert left < (0.05 if kind is Newton else 0.4) * before
    assert job.audit()["constants_seen"]["lipschitz"] > 1
    released = job.release(after)
    assert set(released) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    flat = torch.cat([tensor.double().reshape(-1) for tensor in released.values()])
    assert float((flat - after["released"][0]).abs().max()) < 1e-5 * plan.noise_std + 1e-6


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ({"lipschitz": 0.5}, "lipschitz"),
        ({"smoothness": 0.12}, "smoothness"),
        ({"strong_convexity": 0.3}, "strong_convexity"),
        ({"hessian_lipschitz": 1e-6}, "hessian_lipschitz"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_constants_that_are_seen_broken_are_refused(
    kind: type[Newton], typed: dict[str, float], name: str, job_for: Callable[..., NewtonNetworkJob]
) -> None:
    job = job_for(plan_of(kind, **typed))
    learned = job.learn()
    with pytest.raises(GuardFailed, match=rf"{name} \S+ where the plan has {next(iter(typed.values())):.4g}"):
        job.unlearn(learned)


def test_the_gradient_that_is_left_must_be_what_the_constants_allow(
    job_for: Callable[..., NewtonNetworkJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the probe along the step would not see it."""
    monkeypatch.setattr("unlearn_runtime.newton_network_job.hessian_change", lambda *_: 0.0)
    job = job_for(plan_of(hessian_lipschitz=1e-6))
    learned = job.learn()
    with pytest.raises(GuardFailed, match=r"left a gradient of norm .* at most"):
        job.unlearn(learned)


def test_a_gradient_above_the_tolerance_is_refused(
    job_for: Callable[..., NewtonNetworkJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_polish, "MOST_ITERATIONS", {"newton-cg": 0, "lbfgs": 0})
    with pytest.raises(GuardFailed, match=r"gradient norm of 0\.\d+ of the full objective.* --tolerance 0\.") as found:
        job_for(plan_of()).learn()
    assert "weight-decay" not in str(found.value)
    momentum = Recipe(epochs=3, step_size=0.5, momentum=0.5, weight_decay=L2)
    with pytest.raises(GuardFailed, match=r"weight-decay=0\.2 in --learn"):
        job_for(plan_of(recipe=momentum)).learn()
    monkeypatch.undo()
    # The objective's minimum, not the recipe's, is what counts.
    job = job_for(plan_of(recipe=momentum))
    learned = job.learn()
    with pytest.raises(GuardFailed, match="gradient norm"):
        job.unlearn({**learned, "weights": learned["weights"] + 1e-3})


def test_the_recipe_of_the_reference_has_the_retained_objective(
    job_for: Callable[..., NewtonNetworkJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero-out divides the retained sum by n: gradient steps are shorter, weight decay is not."""
    used = []

    def train(network: Any, rows: torch.Tensor, labels: torch.Tensor, recipe: Recipe, **_: Any) -> None:
        used.append((len(rows), recipe))

    monkeypatch.setattr("unlearn_runtime.network_job.train", train)
    for adjacency, share in (("remove", 1.0), ("zero-out", 57 / 60), ("replace", 57 / 60)):
        used.clear()
        job = job_for(plan_of(adjacency=adjacency))
        job.retrain(job.learn(), "fresh")
        (all_rows, whole), (rows, recipe) = used
        assert (all_rows, rows) == (60, 57)
        assert whole == RECIPE
        assert recipe.step_size == pytest.approx(RECIPE.step_size * share, rel=1e-15)
        assert recipe.step_size * recipe.weight_decay == pytest.approx(RECIPE.step_size * L2, rel=1e-15)


def test_a_state_goes_on_where_it_was_kept(job_for: Callable[..., NewtonNetworkJob]) -> None:
    plan = plan_of()
    learned = job_for(plan, ids=None, chains=2).learn()
    later = job_for(plan)
    start = later.start_from(dict(learned))
    assert set(start) == {"weights"}
    after = later.unlearn(start)
    assert torch.equal(start["weights"], learned["weights"][:1])
    assert after["weights"].shape == (1, 12)
    with pytest.raises(DataError):
        later.start_from({"weights": torch.zeros(1, 5).double()})
    with pytest.raises(InvalidInput, match="without ids"):
        job_for(plan, ids=None).unlearn(learned)
    with pytest.raises(InvalidInput, match="no reference 'zeros'"):
        later.retrain(None, "zeros")
    with pytest.raises(GuardFailed, match="--residual"):
        job_for(plan_of(residual=0.0))
