"""Hessian-free on networks: vectors are derivatives of training, phases agree, and broken constants are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rdp_calc import DataSpec, Target, calibrate, plan_from_result
from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.training import Training
from unlearn_runtime.algorithms.hessian_free_network import NetworkTraining, NetworkVectors
from unlearn_runtime.algorithms.slotted_training import Schedule, Slots
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.hessian_free_job import make
from unlearn_runtime.hessian_free_network_job import HessianFreeNetworkJob
from unlearn_runtime.models.builtin import build, initialise
from unlearn_runtime.network import Network
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.run import run_plan
from unlearn_runtime.stepper import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]
CPU = torch.device("cpu")


class Attention(torch.nn.Module):
    """A transformer layer on rows of 64 numbers, whose fast kernels have one derivative only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.layer(x.view(len(x), 8, 8)).mean(1))
        return found


MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...] | None]] = {
    "tanh": (lambda: torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)), None),
    "one output": (lambda: torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)), None),
    "cnn-small": (lambda: build("cnn-small", 64, 3, (1, 8, 8)), (1, 8, 8)),
    "attention": (Attention, None),
}


def run_of(name: str, *, clip: float | None = None, steps: int = 9) -> tuple[Network, NetworkTraining, torch.Tensor]:
    """A float64 network, its training at the initial weights, and those weights."""
    draws = np.random.default_rng(0)
    factory, shape = MODULES[name]
    network = Network(factory(), device=CPU, dtype=torch.float64, input_shape=shape)
    initialise(network.module, GaussianSource(CPU, seed=1))
    labels = draws.integers(0, 3, size=14) if name != "one output" else draws.choice([-1, 1], size=14)
    slots = Slots.of(draws.permutation(np.arange(14) % 4), 4)
    schedule = Schedule(steps=steps, step_size=0.1, step_decay=0.98, l2=0.05, clip_norm=clip)
    rows = torch.from_numpy(draws.normal(size=(14, 64)) / 8)
    start = network.weights()
    return network, NetworkTraining(network, rows, torch.from_numpy(labels), slots, schedule, start.clone()), start


def weighted(network: Network, run: NetworkTraining, start: torch.Tensor, shares: Array) -> Array:
    """The weights after training with each record's loss times its share."""
    weights, schedule = start.clone(), run.schedule
    parameters = [p for _, p in network.module.named_parameters()]
    for t in range(schedule.steps):
        chosen = run.batch(t)
        network.set_weights(weights)
        with torch.enable_grad():
            losses = network.losses(network.outputs(run.rows[chosen]), run.labels[chosen])
            loss = (losses * torch.from_numpy(shares)[chosen]).sum() / len(chosen)
            slopes = torch.autograd.grad(loss, parameters)
        slope = torch.cat([part.reshape(-1) for part in slopes]) + schedule.l2 * weights
        if schedule.clip_norm is not None and slope.norm() > schedule.clip_norm:
            slope *= schedule.clip_norm / slope.norm()
        weights = weights - schedule.size(t) * slope
    found: Array = weights.numpy()
    return found


@pytest.mark.parametrize(("name", "clip"), [*((name, None) for name in MODULES), ("tanh", 0.15)])
def test_vectors_are_derivatives_of_training(name: str, clip: float | None) -> None:
    network, run, start = run_of(name, clip=clip)
    bound: list[int] = []
    run.binds = lambda t, _: bound.append(t)
    found: dict[int, Array] = {}
    with torch.no_grad():
        for t in range(run.schedule.steps):
            run.step(t)
        final = run.weights.clone()
        run.weights.copy_(start)
        longest = NetworkVectors(run, final).compute(
            [6, 0, 13], lambda ids, part: found.update(zip(ids.tolist(), part.numpy(), strict=True))
        )
    assert (0 < len(bound) <= 9) if clip else not bound
    for i in (0, 6, 13):
        ends = []
        for share in (1 - 1e-5, 1 + 1e-5):
            shares = np.ones(14)
            shares[i] = share
            ends.append(weighted(network, run, start, shares))
        slope = (ends[0] - ends[1]) / 2e-5
        assert np.linalg.norm(found[i] - slope) < 1e-7 * np.linalg.norm(slope)
    norms = []
    for t in range(4):
        network.set_weights(torch.from_numpy(weighted(network, _of_steps(run, t), start, np.ones(14))))
        for i in {0, 6, 13} & set(run.batch(t).tolist()):
            norms.append(float(network.gradient(run.rows[[i]], run.labels[[i]])[0].norm()))
    assert max(norms) <= longest * (1 + 1e-9)


def _of_steps(run: NetworkTraining, steps: int) -> NetworkTraining:
    settings = {**vars(run.schedule), "steps": steps}
    return NetworkTraining(run.network, run.rows, run.labels, run.slots, Schedule(**settings), run.weights)


def test_a_run_that_does_not_repeat_is_refused() -> None:
    _, run, start = run_of("tanh")
    with pytest.raises(GuardFailed, match="did not give the same weights"), torch.no_grad():
        NetworkVectors(run, start + 1e-12).compute([0], lambda ids, part: None)


# Jobs


def plan_of(model: str = "mlp:6", **changes: Any) -> Any:
    options: dict[str, Any] = {"dataset_size": 60, "group_size": 2, "adjacency": "zero-out", "convexity": "none"}
    options |= {"lipschitz": 4.0, "smoothness": 6.0, "hessian_lipschitz": 100.0, "l2": 0.01}
    options |= {"batch_size": 20, "step_size": 0.1, "epochs": 3, **changes}
    method, target = HessianFree.from_options(**options), Target(epsilon=1.0, delta=1e-3)
    data = DataSpec(features=5, classes=("0", "1", "2"), preprocess="unit-norm")
    return plan_from_result(method, calibrate.noise(method, target), target, data=data, training=Training(model=model))


def job_of(plan: Any, data: Dataset, ids: Array | None, **execution: Any) -> HessianFreeNetworkJob:
    source = GaussianSource(CPU, seed=5)
    found = make(
        plan,
        data,
        ids=ids,
        module=build("mlp:6", 5, 3),
        training=plan.training,
        execution=Execution(**{"dtype": "float64", **execution}),
        device=CPU,
        source=source,
        stepper=Stepper(source),
    )
    assert isinstance(found, HessianFreeNetworkJob)
    return found


@pytest.fixture
def data(blobs: Callable[..., tuple[Array, Array]]) -> Dataset:
    x, y = blobs(n=60, d=5, classes=3)
    return Dataset(x_train=x, y_train=y, x_test=None, y_test=None, source="blobs")


def test_unlearning_is_near_retraining_from_the_same_start(data: Dataset) -> None:
    plan = plan_of()
    job = job_of(plan, data, np.array([7, 31]), chains=2)
    learned = job.learn()
    after, fresh = job.unlearn(learned), job.retrain(learned, "fresh")
    for chain in range(2):
        away = float((after["weights"] - fresh["weights"])[chain].norm())
        nothing = float((learned["weights"] - fresh["weights"])[chain].norm())
        assert 0 < away < nothing / 4
        assert away <= float(plan.method.error().mid())
    # Chains begin, and so end, at points of their own.
    assert float((learned["weights"][0] - learned["weights"][1]).norm()) > 0.1
    seen = job.audit()["constants_seen"]
    assert 0.5 < seen["lipschitz"] < 4
    assert 0.05 < seen["smoothness"] < 6


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lipschitz": 0.3}, r"lipschitz [\d.]+ where the plan has 0\.3"),
        ({"smoothness": 0.1}, r"smoothness [\d.]+ where the plan has 0\.1"),
        ({"hessian_lipschitz": 1e-4}, r"hessian_lipschitz [\d.]+ where the plan has 0\.0001"),
        ({"convexity": "strongly", "strong_convexity": 0.01}, r"strong_convexity -[\d.]+ where .* --convexity none"),
    ],
)
def test_constants_that_are_seen_broken_are_refused(changes: dict[str, Any], text: str, data: Dataset) -> None:
    job = job_of(plan_of(**changes), data, np.array([7]))
    with pytest.raises(GuardFailed, match=f"not those of the plan: .*{text}"):
        job.unlearn(job.learn())


def test_phases_of_a_folder(
    save_npz: Callable[..., str],
    blobs: Callable[..., tuple[Array, Array]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import load_file

    # Smooth: how much the Hessian of a network with ReLU changes depends on which kinks the start lies near.
    lines = ("import torch", "", "def make():", "    from torch.nn import Linear, Sequential, Tanh")
    text = "\n".join((*lines, "    return Sequential(Linear(5, 6), Tanh(), Linear(6, 3))\n"))
    (tmp_path / "smooth_net.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    document, path = plan_of("external").to_json(), save_npz(*blobs(n=60, d=5, classes=3))
    shared: dict[str, Any] = {"data": path, "execution": Execution(dtype="float64"), "model": "smooth_net:make"}
    run_plan(document, output=tmp_path / "L", phase="learn", **shared)
    monkeypatch.setattr(GaussianSource, "fill", lambda self, buffer: buffer.zero_())
    start = {"start": tmp_path / "L", "phase": "unlearn"}
    summary = run_plan(document, output=tmp_path / "U", forget="7,31", **start, **shared)
    assert summary["certificate_level"] == "conditional"
    state = load_file(tmp_path / "L" / "private" / "state.safetensors")
    added = np.load(tmp_path / "L" / "private" / "vectors.npy")[[7, 31]].sum(axis=0)
    released = load_file(tmp_path / "U" / "model.safetensors")
    found = torch.cat([released[name].reshape(-1) for name in ("0.weight", "0.bias", "2.weight", "2.bias")])
    # What is released lies on a grid that is fine beside the noise.
    away = np.abs(found.numpy() - state["weights"][0].numpy() - added)
    assert away.max() < document["parameters"]["noise_std"] / 100
    assert np.abs(added).max() > 100 * away.max()
    several = {**shared, "execution": Execution(dtype="float64", chains=2)}
    with pytest.raises(InvalidInput, match="vectors of one chain; use --phase all"):
        run_plan(document, output=tmp_path / "V", forget="7", **start, **several)
