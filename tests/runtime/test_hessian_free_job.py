"""Hessian-free as a job on linear models: its phases agree, noise is what the plan says, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc import DataSpec, Plan, Target, calibrate, plan_from_result
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.training import Training
from rdp_calc.verify import verify_document
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.hessian_free_job import HessianFreeGlmJob, make
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.run import run_plan
from unlearn_runtime.stepper import OnStep, Progress, Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
IDS = np.array([3, 17])
CHAINS = 20_000


def plan_of(*, loss: str = "logistic", training: Training | None = None, **changes: Any) -> Plan:
    options: dict[str, Any] = {"dataset_size": 60, "group_size": 2, "adjacency": "zero-out", "loss": loss, "l2": 0.1}
    options |= {"batch_size": 8, "step_size": 0.6, "epochs": 4, **changes}
    method, target = HessianFree.from_options(**options), Target(epsilon=1.0, delta=1e-3)
    names = ("0", "1", "2") if loss == "softmax" else ("0", "1")
    data = DataSpec(features=4, classes=names, preprocess="unit-norm")
    result = calibrate.noise(method, target)
    return plan_from_result(method, result, target, data=data, training=training or Training(model=loss))


def dataset(blobs: Callable[..., tuple[Array, Array]], classes: int = 2) -> Dataset:
    x, y = blobs(n=60, d=4, classes=classes)
    return Dataset(x_train=x, y_train=y, x_test=None, y_test=None, source="blobs")


def job_of(
    plan: Plan,
    data: Dataset,
    ids: Array | None = IDS,
    *,
    folder: Path | None = None,
    said: Any = None,
    **execution: Any,
) -> HessianFreeGlmJob:
    source = GaussianSource(CPU)
    found = make(
        plan,
        data,
        ids=ids,
        execution=Execution(**execution),
        device=CPU,
        source=source,
        stepper=Stepper(source),
        announce=said,
        start_folder=folder,
    )
    assert isinstance(found, HessianFreeGlmJob)
    return found


@pytest.fixture
def data(blobs: Callable[..., tuple[Array, Array]]) -> Dataset:
    return dataset(blobs)


@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_unlearning_is_near_retraining_in_the_same_slots(loss: str, blobs: Callable[..., tuple[Array, Array]]) -> None:
    plan, here = plan_of(loss=loss), dataset(blobs, 3 if loss == "softmax" else 2)
    job = job_of(plan, here)
    learned = job.learn()
    after, fresh = job.unlearn(learned), job.retrain(learned, "fresh")
    assert torch.equal(learned["slots"], fresh["slots"])
    assert np.bincount(learned["slots"].numpy()).tolist() == [8, 7, 8, 7, 8, 7, 8, 7]
    away = float((after["weights"] - fresh["weights"]).norm())
    assert 0 < away <= float(plan.method.error().mid())
    assert away < float((learned["weights"] - fresh["weights"]).norm()) / 10
    # The forgotten are nowhere in the reference: other rows in their place change nothing.
    x = here.x_train.copy()
    x[IDS] = -x[IDS][::-1]
    again = job_of(plan, replace(here, x_train=x)).retrain(learned, "fresh")
    assert torch.allclose(again["weights"], fresh["weights"], rtol=0, atol=1e-15)


def test_noise_is_added_once_and_the_state_stays_noise_free(data: Dataset) -> None:
    plan = plan_of()
    assert plan.mu == pytest.approx(float(plan.method.error().mid()) / plan.noise_std, rel=1e-9)
    job = job_of(plan, data, chains=CHAINS)
    learned = job.learn()
    for state in (learned, job.unlearn(learned), job.retrain(learned, "fresh")):
        assert bool((state["weights"] == state["weights"][:, :1]).all())
        noise = ((state["released"] - state["weights"]) / plan.noise_std).numpy()
        assert abs(noise.mean()) < 5 / (4 * CHAINS) ** 0.5
        assert noise.std() == pytest.approx(1, abs=5 / (8 * CHAINS) ** 0.5)


def test_refusals_of_a_job(data: Dataset) -> None:
    job = job_of(plan_of(), data, None)
    learned = job.learn()
    with pytest.raises(InvalidInput, match="made without ids"):
        job.unlearn(learned)
    for mode in ("zeros", "noised"):
        with pytest.raises(InvalidInput, match="use --retrain fresh"):
            job.retrain(learned, mode)
    with pytest.raises(InvalidInput, match="learn first"):
        job_of(plan_of(), data).unlearn(learned)
    with pytest.raises(DataError, match="not from a model file"):
        job.start_from({"weight": torch.zeros(4)}, state=False)
    for slots in (None, learned["slots"].float(), learned["slots"][:-1], torch.zeros(60, dtype=torch.int64)):
        tensors = {"weights": learned["weights"]} | ({} if slots is None else {"slots": slots})
        with pytest.raises(DataError, match="no slots that fit"):
            job.start_from(tensors)


def test_a_clip_that_binds_is_refused(data: Dataset) -> None:
    loose = job_of(plan_of(training=Training(model="logistic", clip_norm=5.0)), data, None)
    assert torch.isfinite(loose.learn()["weights"]).all()
    tight = job_of(plan_of(training=Training(model="logistic", clip_norm=0.01)), data, None)
    with pytest.raises(GuardFailed, match=r"step 0 has norm 0\.\d+ and would be clipped to 0\.01"):
        tight.learn()


def test_float32_and_float16_are_refused_where_rounding_counts(data: Dataset, tmp_path: Path) -> None:
    job = job_of(plan_of(), data, dtype="float32")
    with pytest.raises(GuardFailed, match=r"0\.1%: run with --dtype float64"):
        job.unlearn(job.learn())
    # One epoch of small steps has next to no error, which float16 would drown.
    fine = Training(model="logistic", store="float16")
    job = job_of(plan_of(training=fine, group_size=1, step_size=0.05, epochs=1), data, None)
    job.learn()
    with pytest.raises(GuardFailed, match=r"0\.1%: plan with --store float32"):
        job.store(tmp_path)
    # Where the proved error is large beside the vectors, float16 will do.
    job = job_of(plan_of(training=fine), data, None)
    job.learn()
    assert job.store(tmp_path)["dtype"] == "float16"


def test_float32_with_shortened_factors_is_not_float32(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(group_size=30, batch_size=60)

    def dtype_of(**execution: Any) -> Any:
        job = job_of(plan, data, **execution)
        job.unlearn(job.learn())
        return job.audit()["vectors_dtype"]

    assert dtype_of() == "float32"
    before = torch.get_float32_matmul_precision()
    try:
        for allowed in ("high", "medium"):
            torch.set_float32_matmul_precision(allowed)
            assert dtype_of() == "float64"
            with pytest.raises(GuardFailed, match="run with --dtype float64"):
                dtype_of(dtype="float32")
    finally:
        torch.set_float32_matmul_precision(before)

    def raising() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", raising)
    assert dtype_of() == "float64"


# Folders


@pytest.fixture
def folders(
    save_npz: Callable[..., str], blobs: Callable[..., tuple[Array, Array]], tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], str, Path]]:
    """A plan, its data file, and the folder of a learning run."""

    def learned(**changes: Any) -> tuple[dict[str, Any], str, Path]:
        document, path = plan_of(**changes).to_json(), save_npz(*blobs(n=60, d=4))
        said: list[str] = []
        run_plan(document, data=path, output=tmp_path / "L", phase="learn", announce=said.append)
        assert said == ["60 vectors of 4 numbers in float32 take 2.78 kB."]
        return document, path, tmp_path / "L"

    return learned


def test_a_stored_run_unlearns_as_one_in_one_go(
    folders: Callable[..., tuple[dict[str, Any], str, Path]], tmp_path: Path, data: Dataset, silent: None
) -> None:
    from safetensors.torch import load_file

    from rdp_calc.documents import read_document

    document, path, start = folders()
    run_plan(document, data=path, output=tmp_path / "U", phase="unlearn", start=start, forget="3,17")
    certificate = read_document(tmp_path / "U" / "certificate.json")
    assert verify_document(certificate).holds
    assert certificate["claim"]["level"] == "certified"
    # The same slots, with the vectors computed at once.
    state = load_file(start / "private" / "state.safetensors")
    job = job_of(plan_of(), data)
    run = job._train(state["slots"], retained=False, name="again")
    assert torch.equal(run["weights"], state["weights"])
    exact = job.unlearn(run)["weights"][:, 0]
    found = load_file(tmp_path / "U" / "model.safetensors")["weight"]
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-6)
    assert float((exact - state["weights"][:, 0]).abs().max()) > 1e-3


def test_damaged_vectors_are_not_released(
    folders: Callable[..., tuple[dict[str, Any], str, Path]], tmp_path: Path
) -> None:
    document, path, start = folders()
    vectors = start / "private" / "vectors.npy"
    content = bytearray(vectors.read_bytes())
    content[128 + 16 * 17 + 2] ^= 4
    vectors.write_bytes(content)
    with pytest.raises(DataError, match=r"vector of record 17 .* is damaged"):
        run_plan(document, data=path, output=tmp_path / "U", phase="unlearn", start=start, forget="3,17")
    assert not (tmp_path / "U").exists()
    # Other records are as they were.
    run_plan(document, data=path, output=tmp_path / "U", phase="unlearn", start=start, forget="3,18")
    vectors.unlink()
    with pytest.raises(DataError, match="cannot read the stored vectors"):
        run_plan(document, data=path, output=tmp_path / "V", phase="unlearn", start=start, forget="3")


def test_a_resumed_run_checks_the_vectors_that_it_adds(
    folders: Callable[..., tuple[dict[str, Any], str, Path]], tmp_path: Path
) -> None:
    from rdp_calc.documents import read_document

    @contextmanager
    def interrupting(name: str, steps: int) -> Iterator[OnStep]:
        def on_step(step: int, loss: Any = None, /) -> None:
            if name == "retrain":
                raise KeyboardInterrupt

        yield on_step

    document, path, start = folders()
    execution = Execution(checkpoint=tmp_path / "checkpoint", checkpoint_seconds=1e-9, retrain="fresh")

    def run(progress: Progress | None) -> None:
        # The loop of unlearning was finished before the interruption, and is skipped afterwards.
        asked: dict[str, Any] = {"phase": "unlearn", "start": start, "forget": "3,17", "progress": progress}
        run_plan(document, data=path, output=tmp_path / "U", execution=execution, **asked)

    with pytest.raises(KeyboardInterrupt):
        run(interrupting)
    run(None)
    audit = read_document(tmp_path / "U" / "private" / "audit.json")
    assert 0 < audit["rounding_error"] < audit["rounding_limit"]
