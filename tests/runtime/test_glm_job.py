"""Jobs on linear models: states, files, metrics, divisors, the choice of arithmetic, refusals, and going on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc import DataSpec, Langevin
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.methods.noisy_sgd import NoisySgd
from unlearn_runtime.data import Dataset, encode_labels
from unlearn_runtime.execution import Execution
from unlearn_runtime.glm_job import GlmJob
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
METHODS: list[tuple[Any, dict[str, Any]]] = [
    (Langevin, {}),
    (NoisySgd, {"batch_size": 9}),
    (DescentToDelete, {}),
    (DescentToDelete, {"rewind": True}),
]
IDS = [0, 8, 21]


def options_for(kind: Any, more: dict[str, Any]) -> dict[str, Any]:
    return {"step_size": 0.5, f"unlearn_{kind.TURNS}": 2, "group_size": 3, **more}


@pytest.mark.parametrize(("kind", "more"), METHODS)
def test_a_saved_state_goes_on_as_the_one_in_memory(
    kind: Any,
    more: dict[str, Any],
    plan_for: Callable[..., Any],
    regression: Callable[..., Any],
    glm_job: Callable[..., Any],
) -> None:
    plan = plan_for(kind, **options_for(kind, more))
    ends, starts = [], []
    for saved in (False, True):
        job = glm_job(plan, regression(), IDS, chains=3, seed=1)
        state = job.learn()
        starts.append({name: tensor.clone() for name, tensor in state.items()})
        if saved:
            state = job.start_from({name: tensor.clone() for name, tensor in state.items()})
        ends.append(job.unlearn(state))
        assert all(torch.equal(state[name], starts[0][name]) for name in state)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    # Fewer chains than were learned: the first ones.
    job = glm_job(plan, regression(), IDS, chains=2)
    assert torch.equal(job.start_from(starts[0])["weights"], starts[0]["weights"][:, :2])
    with pytest.raises(InvalidInput, match="--trials 4"):
        glm_job(plan, regression(), IDS, chains=4).start_from(starts[0])
    for bad in (starts[0]["weights"].float(), starts[0]["weights"][:2], starts[0]["weights"][:, 0]):
        with pytest.raises(DataError, match="fit"):
            job.start_from(starts[0] | {"weights": bad})
    with pytest.raises(DataError, match="fit"):
        job.start_from({})


@pytest.mark.parametrize(("kind", "more"), METHODS)
def test_interrupted_runs_end_where_others_end(
    kind: Any, more: dict[str, Any], plan_for: Callable[..., Any], regression: Callable[..., Any], tmp_path: Path
) -> None:
    from unlearn_runtime.checkpoint import Checkpoint

    plan, dataset = plan_for(kind, **options_for(kind, more)), regression()
    device = torch.device("cpu")

    def run(path: Path, stop: int | None) -> dict[str, torch.Tensor]:
        # What a killed run loses is its source: only the checkpoint knows the entropy.
        source = GaussianSource(device)
        stepper = Stepper(source, checkpoint=Checkpoint(path, lambda key: {"run": 1}, 0.0))
        count = 0

        class Counted:
            def run(self, name: str, steps: int, state: Any, step: Callable[[int], Any]) -> None:
                def watched(index: int) -> Any:
                    nonlocal count
                    count += 1
                    if count == stop:
                        raise RuntimeError("power is off")
                    return step(index)

                stepper.run(name, steps, state, watched)

        job = GlmJob(
            plan,
            dataset,
            ids=np.array(IDS),
            execution=Execution(dtype="float64"),
            device=device,
            source=source,
            stepper=Counted(),  # type: ignore[arg-type]
        )
        learned = job.learn()
        after = job.unlearn(learned)
        return {f"{place}.{name}": t for place, s in (("0", learned), ("1", after)) for name, t in s.items()}

    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "a", 4)
    # Twice from one checkpoint: the same numbers, wherever it stopped again.
    copy = (tmp_path / "a").read_bytes()
    whole = run(tmp_path / "a", None)
    (tmp_path / "b").write_bytes(copy)
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "b", 6)
    again = run(tmp_path / "b", None)
    assert whole.keys() == again.keys()
    for name in whole:
        assert torch.equal(whole[name], again[name]), name


def test_metrics_of_every_chain(
    plan_for: Callable[..., Any], glm_job: Callable[..., Any], blobs: Callable[..., tuple[Array, Array]]
) -> None:
    x, y = blobs(n=60, classes=3)
    test_x, test_y = blobs(n=30, classes=3, seed=5)
    dataset = Dataset(x_train=x, y_train=y, x_test=test_x, y_test=test_y, source="x")
    spec = DataSpec(features=4, classes=("0", "1", "2"))
    plan = plan_for(Langevin, loss="softmax", dataset_size=60, group_size=3, unlearn_steps=2, step_size=0.5, data=spec)
    job = glm_job(plan, dataset, IDS, chains=5)
    state = job.unlearn(job.learn())
    found = job.metrics(state)
    keep = ~np.isin(np.arange(60), IDS)
    for name, rows, labels in (("train", x[keep], y[keep]), ("test", test_x, test_y), ("forget", x[IDS], y[IDS])):
        values: dict[str, list[float]] = {"accuracy": [], "loss": []}
        for chain in state["weights"].numpy().reshape(4, 5, 3).transpose(1, 0, 2):
            scores = rows @ chain
            values["accuracy"].append(float((scores.argmax(axis=1) == labels).mean()))
            shifted = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(labels)), labels]
            values["loss"].append(float(shifted.mean()))
        for measure, expected in values.items():
            entry = found[f"{name}_{measure}"]
            assert entry["chains"] == 5
            assert entry["mean"] == pytest.approx(np.mean(expected), rel=1e-12)
            assert entry["std"] == pytest.approx(np.std(expected), rel=1e-6, abs=1e-12)
    assert glm_job(plan, dataset).metrics(state)["forget_loss"] is None
    assert job.model(state)["weight"].shape == (3, 4)
    np.testing.assert_array_equal(job.model(state, exact=True)["weight"], state["weights"][:, :3].t())


@pytest.mark.parametrize(
    ("labels", "classes", "has_accuracy"),
    [([-1, 1], None, True), ([0, 1], None, False), (["no", "yes"], ("no", "yes"), True), ([0.5, -2.5], None, False)],
)
def test_huber_labels(
    labels: list[Any],
    classes: tuple[str, ...] | None,
    has_accuracy: bool,
    plan_for: Callable[..., Any],
    regression: Callable[..., Any],
    glm_job: Callable[..., Any],
) -> None:
    x = regression().x_train
    y = np.array(labels)[(x[:, 1] > 0).astype(int)]
    numbers = np.where(x[:, 1] > 0, 1.0, -1.0) if classes else y.astype(np.float64)
    spec = DataSpec(features=3, preprocess="none", classes=classes)
    plan = plan_for(DescentToDelete, data=spec, unlearn_steps=0, learned=3, step_size=0.5, huber_threshold=0.4)
    job = glm_job(plan, Dataset(x_train=x, y_train=y, x_test=None, y_test=None, source="x"))
    state, w = job.learn(), np.zeros(3)
    for _ in range(3):
        w = w - 0.5 * (x.T @ np.clip(x @ w - numbers, -0.4, 0.4) / 40 + 0.2 * w)
    np.testing.assert_allclose(state["weights"][:, 0].numpy(), w, rtol=0, atol=1e-14)
    accuracy = job.metrics({"weights": state["weights"]})["train_accuracy"]
    assert (accuracy is not None) == has_accuracy
    if has_accuracy:
        assert accuracy["mean"] == pytest.approx((np.where(x @ w > 0, 1, -1) == numbers).mean())


def test_labels_that_are_no_numbers() -> None:
    for bad in (["a", "b"], [1.0, np.nan]):
        with pytest.raises(DataError):
            encode_labels(np.array(bad), (), loss="huber")
    assert encode_labels(np.array([1.5, -2.0]), (), loss="huber").tolist() == [1.5, -2.0]
    assert encode_labels(np.array(["x", "y"]), ("y", "x"), loss="huber").tolist() == [1.0, -1.0]
    with pytest.raises(InvalidInput, match="two classes"):
        encode_labels(np.array([1, 2, 3]), ("1", "2", "3"), loss="huber")


def test_residual_clip_of_the_plan_is_carried_out(
    plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any], silent: None
) -> None:
    dataset = regression()
    plan = plan_for(Langevin, residual_clip=0.05, unlearn_steps=1, learned=4, step_size=0.5)
    assert plan.method.constants.lipschitz == 0.05
    x, y, w = dataset.x_train, dataset.y_train, np.zeros(3)
    norms = np.linalg.norm(x, axis=1)
    for _ in range(4):
        residuals = np.clip(x @ w - y, -0.05 / norms, 0.05 / norms)
        w = w - 0.5 * (x.T @ residuals / 40 + 0.2 * w)
    found = glm_job(plan, dataset).learn()["weights"][:, 0].numpy()
    np.testing.assert_allclose(found, w, rtol=0, atol=1e-12)


def test_published_clip_is_a_choice_of_the_run(
    plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any], silent: None
) -> None:
    dataset = regression()
    plan = plan_for(Langevin, unlearn_steps=2, learned=4, step_size=0.5, group_size=3)
    job = glm_job(plan, dataset, IDS, published_clip=0.05)
    x, y, w = dataset.x_train, dataset.y_train, np.zeros(3)
    for step in range(6):
        here = ~np.isin(np.arange(40), IDS if step >= 4 else [])
        gradients = (x[here] @ w - y[here])[:, None] * x[here] + 0.2 * w
        gradients *= np.minimum(1, 0.05 / np.linalg.norm(gradients, axis=1, keepdims=True))
        w = w - 0.5 * gradients.mean(axis=0)
    after = job.unlearn(job.learn())
    np.testing.assert_allclose(after["weights"][:, 0].numpy(), w, rtol=0, atol=1e-14)
    assert job.audit()["rounding_limit"] is None


def test_arithmetic_is_chosen_by_the_plan(
    plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any]
) -> None:
    for unlearned, dtype in ((1, "float32"), (60, "float64")):
        plan = plan_for(Langevin, unlearn_steps=unlearned, step_size=0.8, learned=3)
        job = glm_job(plan, regression(), [1], dtype=None)
        assert job.audit()["matrix_dtype"] == dtype
        assert job.executed()["matrix_dtype"] == "auto"
        assert job.model(job.learn())["weight"].dtype == torch.float32
        assert 0 < job.audit()["rounding_error"] <= job.audit()["rounding_limit"]
    job = glm_job(plan, regression(), [1], dtype="float32")
    with pytest.raises(GuardFailed, match="float64"):
        job.learn()


def test_start_at_a_random_point(
    plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any]
) -> None:
    plan = plan_for(Langevin, unlearn_steps=1, step_size=0.5, learned=0, init="normal:2.0")
    job = glm_job(plan, regression(), chains=4000)
    assert float(job.learn()["weights"].std()) == pytest.approx(2, abs=6.5 * 2 / math.sqrt(2 * 12000))
    zeros = glm_job(plan, regression(), [1], chains=2).retrain(None, "zeros")["weights"]
    assert float(zeros.abs().max()) < 6.5 * plan.noise_std + 0.5


def test_refusals(plan_for: Callable[..., Any], regression: Callable[..., Any], glm_job: Callable[..., Any]) -> None:
    plan = plan_for(Langevin, unlearn_steps=1, step_size=0.5)
    with pytest.raises(DataError, match="41 training records"):
        glm_job(plan, regression(41))
    typed = plan_for(
        Langevin,
        loss=None,
        l2=None,
        unlearn_steps=1,
        step_size=0.5,
        lipschitz=1.0,
        strong_convexity=0.1,
        smoothness=1.0,
    )
    signs = replace(regression(), y_train=np.resize([-1, 1], 40))
    with pytest.raises(GuardFailed, match="--loss"):
        glm_job(typed, signs)
    with pytest.raises(DataError, match="no record is retained"):
        glm_job(plan, regression(), range(40))
    job = glm_job(plan, regression(), [1])
    with pytest.raises(InvalidInput, match="noised"):
        job.retrain(None, "noised")
    assert job.size == 3
