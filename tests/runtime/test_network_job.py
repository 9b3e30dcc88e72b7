"""The job of every network method: what it learns, unlearns, releases, measures and hands over to a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc import DataSpec, NoisyFinetune, OutputPerturbation, Plan, Target, noise, plan_from_result
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods import Method
from rdp_calc.methods.blockwise_finetune import BlockwiseFinetune
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.methods.model_clip import ModelClip
from rdp_calc.training import Recipe, Training
from unlearn_runtime.algorithms.noisy_finetune import noisy_finetune
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.grid import on_grid
from unlearn_runtime.models.builtin import build
from unlearn_runtime.network_job import NetworkJob
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
IDS = np.array([2, 7, 11])
LEARN = Recipe(epochs=4, step_size=0.5, batch_size=16, momentum=0.9, schedule="one-cycle")

METHODS: dict[str, Method] = {
    "noisy-finetune": NoisyFinetune(init_clip=1.0, grad_clip=1.0, step_size=0.05, unlearn_steps=12),
    "blockwise-finetune": BlockwiseFinetune(
        init_clips=(1.0, 0.5), grad_clips=(1.0, 1.0), block_steps=(4, 3), step_size=0.1
    ),
    "model-clip": ModelClip(model_clip=1.0, unlearn_steps=6, grad_clip=1.0, step_size=0.1),
    "output-perturbation": OutputPerturbation(init_clip=1.0),
    "dp-sgd": DpSgd(dataset_size=60, adjacency="remove", batch_size=12, training_steps=8),
}


def plan_of(method: Method, *, classes: int = 3, **training: Any) -> Plan:
    settings: dict[str, Any] = {"model": "mlp:5"}
    if isinstance(method, DpSgd):
        settings |= {"clip_norm": 1.0, "step_size": 0.2}
    else:
        settings["learn"] = LEARN
    target = Target(epsilon=3.0, delta=1e-3)
    return plan_from_result(
        method,
        noise(method, target),
        target,
        data=DataSpec(features=4, classes=tuple(map(str, range(classes))), preprocess="unit-norm"),
        training=Training(**{**settings, **training}),
    )


@pytest.fixture
def make_job(blobs: Callable[..., tuple[Array, Array]]) -> Callable[..., NetworkJob]:
    def make(
        plan: Plan,
        *,
        ids: Array | None = IDS,
        chains: int = 1,
        seed: int = 3,
        change: Callable[[Array], None] | None = None,
        module: torch.nn.Module | None = None,
        center: dict[str, torch.Tensor] | None = None,
        **execution: Any,
    ) -> NetworkJob:
        assert plan.training is not None
        assert plan.data.classes is not None
        x, y = blobs(classes=len(plan.data.classes))
        if change is not None:
            change(x)
        dataset = Dataset(x_train=x, y_train=y, x_test=x[:20] * 1.01, y_test=y[:20], source="blobs")
        source = GaussianSource(CPU, seed=seed)
        return NetworkJob(
            plan,
            dataset,
            ids=ids,
            module=module or build(plan.training.model, 4, len(plan.data.classes), None),
            training=plan.training,
            execution=Execution(chains=chains, **execution),
            device=CPU,
            source=source,
            stepper=Stepper(source),
            center=center,
        )

    return make


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_unlearns_and_releases(name: str, make_job: Callable[..., NetworkJob]) -> None:
    job = make_job(plan_of(METHODS[name]), chains=2)
    before = job.learn()
    kept = before["weights"].clone()
    after = job.unlearn(before)
    assert torch.equal(before["weights"], kept)
    assert after["weights"].shape == (2, job.size) == (2, 4 * 5 + 5 + 5 * 3 + 3)
    assert after["weights"].dtype == torch.float64
    assert not torch.equal(after["weights"][0], after["weights"][1])
    assert torch.equal(after["weights"], kept) == (name == "dp-sgd")
    released = job.model(after)
    assert {key: tuple(tensor.shape) for key, tensor in released.items()} == {
        "0.weight": (5, 4),
        "0.bias": (5,),
        "2.weight": (3, 5),
        "2.bias": (3,),
    }
    flat = torch.cat([tensor.reshape(-1) for tensor in released.values()])
    assert torch.equal(flat, after["weights"][0].float())
    exact = torch.cat([tensor.reshape(-1) for tensor in job.model(after, exact=True).values()])
    assert torch.equal(exact, after["weights"][0])
    found = job.metrics(after)
    assert set(found) == {f"{part}_{what}" for part in ("train", "test", "forget") for what in ("accuracy", "loss")}
    assert all(values["chains"] == 2 for values in found.values())
    steps = {"noisy-finetune": 12, "blockwise-finetune": [4, 3], "model-clip": 6}.get(name)
    assert job.executed() == {
        "learn_steps": None,
        "unlearn_steps": steps,
        "matrix_dtype": "float32",
        "update_dtype": "float32" if name == "dp-sgd" else "float64",
    }
    assert job.audit()["parameters"] == job.size


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dp-sgd"])
def test_forgotten_records_do_not_enter_what_is_released(name: str, make_job: Callable[..., NetworkJob]) -> None:
    """The same start and seed, other forgotten records: bit for bit the same model."""

    def other(x: Array) -> None:
        x[IDS] *= -0.7

    plan = plan_of(METHODS[name], finetune=Recipe(epochs=2, step_size=0.1, batch_size=16))
    start = make_job(plan).learn()
    found = [make_job(plan, change=change).unlearn(start)["released"] for change in (None, other)]
    assert torch.equal(*found)
    if name != "output-perturbation":

        def retained(x: Array) -> None:
            x[0] *= -0.7

        assert not torch.equal(found[0], make_job(plan, change=retained).unlearn(start)["released"])


@pytest.mark.parametrize("name", ["noisy-finetune", "dp-sgd"])
def test_learning_on_the_retained_records_never_sees_the_others(name: str, make_job: Callable[..., NetworkJob]) -> None:
    def other(x: Array) -> None:
        x[IDS] *= -0.7

    plan = plan_of(METHODS[name])
    for learn in (lambda job: job.learn(retained=True), lambda job: job.retrain(None, "fresh")):
        found = [learn(make_job(plan, change=change))["weights"] for change in (None, other)]
        assert torch.equal(*found)
    assert not torch.equal(make_job(plan).learn()["weights"], make_job(plan, change=other).learn()["weights"])


def test_learning_learns_and_fine_tuning_repairs(make_job: Callable[..., NetworkJob]) -> None:
    learn = replace(LEARN, epochs=60)
    job = make_job(plan_of(METHODS["output-perturbation"], learn=learn, finetune=learn))
    before = job.learn()
    assert job.metrics(before)["train_accuracy"]["mean"] > 0.9
    after = job.unlearn(before)
    # What a later step continues from is the noised model; what is published is the fine-tuned one.
    assert set(after) == {"weights", "released"}
    noised = job.metrics({"weights": after["weights"]})
    assert job.metrics(after)["train_loss"]["mean"] < noised["train_loss"]["mean"]
    assert torch.equal(job.model(after)["0.bias"], after["released"][0][20:25].float())


def test_two_classes_with_one_output_have_signed_labels(make_job: Callable[..., NetworkJob]) -> None:
    job = make_job(plan_of(METHODS["noisy-finetune"], classes=2, model="logistic"))
    before = job.learn()
    assert job.metrics(before)["train_accuracy"]["mean"] > 0.9
    assert job.model(job.unlearn(before))["weight"].shape == (4,)


def test_a_state_goes_through_a_file_and_a_model_starts_every_chain(make_job: Callable[..., NetworkJob]) -> None:
    plan = plan_of(METHODS["noisy-finetune"])
    job = make_job(plan, chains=2)
    before = job.learn()
    again = make_job(plan, chains=2).start_from({key: value.clone() for key, value in before.items()})
    assert torch.equal(again["weights"], before["weights"])
    with pytest.raises(InvalidInput, match="3, but the learn run has 2"):
        make_job(plan, chains=3).start_from(before)
    with pytest.raises(DataError, match="40 numbers"):
        job.start_from({"weights": torch.zeros(2, 40, dtype=torch.float64)})
    model = job.model(before)
    started = make_job(plan, chains=3).start_from(model, state=False)
    assert torch.equal(started["weights"], before["weights"][0].float().double().repeat(3, 1))
    with pytest.raises(DataError, match="no tensor"):
        job.start_from({"0.weight": model["0.weight"]}, state=False)


def test_a_model_file_is_never_taken_for_a_state(make_job: Callable[..., NetworkJob]) -> None:
    job = make_job(plan_of(METHODS["noisy-finetune"]))
    forged = {"weights": torch.zeros(1, job.size, dtype=torch.float64)}
    with pytest.raises(DataError, match=r"no tensor 0\.weight"):
        job.start_from(forged, state=False)
    with pytest.raises(DataError, match="tensor weights"):
        job.start_from(job.model(job.learn()))


@pytest.mark.parametrize("bad", [torch.nan, None, torch.zeros(2)])
def test_what_goes_with_a_state_is_checked(bad: Any, make_job: Callable[..., NetworkJob]) -> None:
    job = make_job(plan_of(METHODS["noisy-finetune"], trainable=("2.*",)))
    learned = job.learn()
    state, name = dict(learned), "fixed:0.weight"
    if isinstance(bad, torch.Tensor):
        state[name] = bad
    elif bad is None:
        del state[name]
    else:
        state[name] = torch.full_like(state[name], bad)
    with pytest.raises(DataError, match=r"0\.weight"):
        job.start_from(state)
    with pytest.raises(DataError, match="not finite"):
        job.start_from({**learned, "weights": torch.full((1, job.size), torch.inf, dtype=torch.float64)})


class Remembers(torch.nn.Module):
    """Keeps what it has seen in plain attributes, and lets it into its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.seen: list[torch.Tensor] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen = [*self.seen[-3:], rows.detach().mean(dim=0)]
        return self.layer(rows + sum(self.seen))


def test_what_a_module_remembers_does_not_get_into_the_next_phase(make_job: Callable[..., NetworkJob]) -> None:
    plan = plan_of(METHODS["noisy-finetune"], finetune=Recipe(epochs=1, step_size=0.1, batch_size=16))
    start = make_job(plan, module=Remembers(), chains=2).learn()
    fresh = make_job(plan, module=Remembers(), chains=2).unlearn(start)
    job = make_job(plan, module=Remembers(), chains=2)
    draws = job._source.state()
    learned = job.learn()
    job._source.restore(draws)
    after = job.unlearn(start)
    assert torch.equal(after["weights"], fresh["weights"])
    assert torch.equal(after["released"], fresh["released"])
    # Nor into the next chain: alone it draws what the first of two does.
    assert torch.equal(make_job(plan, module=Remembers()).learn()["weights"][0], learned["weights"][0])
    assert len(job._module.seen) == 4
    job.metrics(after)
    assert not job._module.seen


def test_numbers_are_on_the_grid_before_anything_else_is_computed(
    make_job: Callable[..., NetworkJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = Recipe(epochs=1, step_size=0.1, batch_size=16)
    for name in ("model-clip", "output-perturbation", "dp-sgd"):
        job = make_job(plan_of(METHODS[name], finetune=None if name == "dp-sgd" else finetune), dtype="float64")
        starts = []
        train = job._train
        monkeypatch.setattr(job, "_train", lambda *given: (starts.append(job.network.weights()), train(*given)))  # noqa: B023
        state = job.learn()
        numbers = state["weights"][0]
        if name != "dp-sgd":
            job.unlearn(state)
            numbers = starts[-1]
        assert torch.equal(on_grid(numbers, job._last_noise_std), numbers)


def test_steps_without_noise_start_from_the_grid() -> None:
    method = NoisyFinetune(init_clip=1.0, grad_clip=1.0, step_size=0.05, unlearn_steps=5, accounted_steps=3)
    weights, source, seen = torch.ones(1, 7, dtype=torch.float64), GaussianSource(CPU, seed=1), []

    def gradient(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(weights.clone())
        return weights.clone(), torch.zeros(())

    noisy_finetune(weights, gradient, method=method, noise_std=0.3, mu=1.0, source=source, stepper=Stepper(source))
    assert torch.equal(on_grid(seen[3], 0.3), seen[3])
    assert not torch.equal(on_grid(seen[2], 0.3), seen[2])


def test_a_model_that_is_not_finite_is_not_released(make_job: Callable[..., NetworkJob]) -> None:
    job = make_job(plan_of(METHODS["noisy-finetune"]))
    with pytest.raises(GuardFailed, match=r"tensor 0\.weight is not finite"):
        job.release({"weights": torch.full((1, job.size), 1e300, dtype=torch.float64)})


def test_retraining_modes(make_job: Callable[..., NetworkJob]) -> None:
    plan = plan_of(METHODS["noisy-finetune"])
    start = make_job(plan).learn()
    found = {mode: make_job(plan).retrain(start, mode)["weights"] for mode in ("fresh", "zeros", "noised")}
    assert not torch.equal(found["fresh"], found["zeros"])
    # From zero every hidden unit of a layer stays like the others; the reference shows just that.
    first = found["zeros"][0][:20].view(5, 4)
    assert torch.equal(first, first[:1].expand(5, 4))
    assert not torch.equal(found["noised"], found["fresh"])
    with pytest.raises(InvalidInput, match="needs the model before"):
        make_job(plan).retrain(None, "noised")
    for name, mode in (("dp-sgd", "zeros"), ("blockwise-finetune", "noised"), ("model-clip", "noised")):
        with pytest.raises(InvalidInput, match="no reference"):
            make_job(plan_of(METHODS[name])).retrain(start, mode)
    with pytest.raises(InvalidInput, match="--learn"):
        make_job(plan_of(METHODS["model-clip"], learn=None)).learn()


def test_frozen_parts_are_kept_and_go_with_the_state(make_job: Callable[..., NetworkJob]) -> None:
    plan = plan_of(METHODS["noisy-finetune"], trainable=("2.*",))
    module = build("mlp:5", 4, 3)
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    frozen = module.state_dict()["0.weight"].clone()
    job = make_job(plan, module=module)
    before = job.learn()
    assert job.size == 18
    after = job.unlearn(before)
    assert torch.equal(job.model(after)["0.weight"], frozen)
    assert torch.equal(job.model(job.retrain(before, "fresh"))["0.weight"], frozen)
    # Another process builds the module anew, with other numbers in it.
    other = make_job(plan)
    assert torch.equal(other.model(other.start_from(before))["0.weight"], frozen)
    assert other.audit()["frozen"] == ["0.weight", "0.bias"]


def test_norms_around_public_weights(make_job: Callable[..., NetworkJob]) -> None:
    method = replace(METHODS["noisy-finetune"], init_clip=1e-3, center="0" * 64)  # type: ignore[type-var]
    plan = plan_of(method)
    public = {key: torch.full_like(value, 3.0) for key, value in build("mlp:5", 4, 3).state_dict().items()}
    job = make_job(plan, center=public)
    after = job.unlearn(job.learn())
    assert abs(float(after["weights"].mean()) - 3.0) < 0.5
    del public["0.bias"]
    with pytest.raises(DataError, match=r"no tensor 0\.bias"):
        make_job(plan, center=public)


def test_float64_runs_in_float64(make_job: Callable[..., NetworkJob]) -> None:
    job = make_job(plan_of(METHODS["noisy-finetune"]), dtype="float64")
    after = job.unlearn(job.learn())
    assert job.model(after)["0.weight"].dtype == torch.float64
    assert job.executed()["matrix_dtype"] == "float64"


def test_a_plan_for_other_blocks_is_refused(make_job: Callable[..., NetworkJob]) -> None:
    method = replace(METHODS["blockwise-finetune"], block_sizes=(20, 23))  # type: ignore[type-var]
    job = make_job(plan_of(method))
    with pytest.raises(GuardFailed, match="--block-sizes 25,18"):
        job.unlearn(job.learn())


def test_the_same_seed_gives_the_same_model(make_job: Callable[..., NetworkJob]) -> None:
    plan = plan_of(METHODS["blockwise-finetune"], blocks="equal")
    found = []
    for _ in range(2):
        job = make_job(plan)
        found.append(job.unlearn(job.learn())["weights"])
    assert torch.equal(*found)
