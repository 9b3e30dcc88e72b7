"""How the models of a run are trained again: the trainer that fits its plan or its baseline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.methods.newton import Newton
from rdp_calc.training import EXTERNAL
from unlearn_runtime.algorithms.descent_to_delete import published
from unlearn_runtime.algorithms.gradient_polish import shorten_gradient
from unlearn_runtime.algorithms.noisy_sgd import assign_slots
from unlearn_runtime.algorithms.training import train
from unlearn_runtime.evaluate.predictions import Part, fixed_names, members_of, module_of, shard
from unlearn_runtime.evaluate.runs import RunFolder
from unlearn_runtime.evaluate.shadows import EnsembleTrainer, LinearTrainer, LoopTrainer, StackedTrainer, Trainer
from unlearn_runtime.models import initialise
from unlearn_runtime.network import Network, check_tensors
from unlearn_runtime.network_curvature import NetworkObjective
from unlearn_runtime.network_job import copied
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper


def trainer_for(
    run: RunFolder, part: Part, *, classes: int, model: str | None = None, divisor: int | None = None
) -> Trainer:
    """Trains the models of ``run`` again, by its plan or its learning recipe, on subsets of ``part``.

    ``divisor``: for generalised linear models, what the sums of gradients are divided by where it is not the number of
    records kept. Raises InvalidInput where the run holds no training from the start.
    """
    if not run.network:
        assert run.plan is not None
        assert run.constants is not None
        return LinearTrainer(run.plan, run.constants, part, classes=classes, requests=run.requests, divisor=divisor)
    members = members_of(run)
    if members:
        if (field(run.document, "settings.slices", "integer", optional=True) or 1) > 1:
            raise InvalidInput(f"{run.path} was trained in slices; models like it are trained from one slice only.")
        alone = replace(run, released=shard(run.released, 0))
        return EnsembleTrainer(trainer_for(alone, part, classes=classes, model=model), members)
    method = None if run.plan is None else run.plan.method
    if run.training.learn is None and not isinstance(method, DpSgd | HessianFree):
        raise InvalidInput(f"{run.path} holds no training from the start, so no model can be trained by its recipe.")
    module, shape = module_of(run, model, features=part.rows.shape[1], classes=classes)
    recipe = run.training.learn
    built_in = run.training.model != EXTERNAL and run.training.trainable is None
    if recipe is not None and built_in and not isinstance(method, Newton):
        return StackedTrainer(_fresh(module), part, recipe, input_shape=shape, losses=stacked_losses)
    return LoopTrainer(part, _one_after_another(run, module, shape))


def stacked_losses(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``Network.losses`` for labels 0..C-1, of one output as well."""
    if outputs.shape[1] == 1:
        return torch.nn.functional.softplus(-(2 * labels - 1).to(outputs.dtype) * outputs[:, 0])
    return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


def _fresh(module: torch.nn.Module) -> Callable[[GaussianSource], torch.nn.Module]:
    def make(source: GaussianSource) -> torch.nn.Module:
        made = copy.deepcopy(module)
        initialise(made, source)
        return made

    return make


def _one_after_another(
    run: RunFolder, module: torch.nn.Module, shape: tuple[int, ...] | None
) -> Callable[..., torch.Tensor]:
    """Training of one model as a run does it, frozen parts and buffers as released."""
    training, plan = run.training, run.plan

    def train_one(
        rows: torch.Tensor, labels: torch.Tensor, *, source: GaussianSource, stepper: Stepper, name: str
    ) -> torch.Tensor:
        made = copied(module)
        network = Network(made, device="cpu", trainable=training.trainable, input_shape=shape)
        initialise(made, source)
        _restore(network, made, run.released)
        inputs, wanted = rows.to(network.dtype), labels
        with torch.no_grad():
            outputs = network.outputs(inputs[:1])
        if outputs.ndim == 1 or outputs.shape[1] == 1:
            wanted = 2 * labels - 1
        settings: dict[str, Any] = {"source": source, "stepper": stepper, "name": name}
        method = None if plan is None else plan.method
        if isinstance(method, DpSgd):
            from unlearn_runtime.algorithms.dp_sgd import dp_sgd

            assert plan is not None
            dp_sgd(
                network,
                inputs,
                wanted,
                sampling_rate=method.sampling_rate,
                batch_size=method.batch_size,
                steps=method.training_steps,
                noise_multiplier=plan.noise,
                clip_norm=training.clip_norm,  # type: ignore[arg-type]
                step_size=training.step_size,  # type: ignore[arg-type]
                **settings,
            )
        elif isinstance(method, HessianFree):
            _cyclic(network, inputs, wanted, method, **settings)
        else:
            assert training.learn is not None
            train(network, inputs, wanted, training.learn, **settings)
        weights = network.weights()
        if isinstance(method, Newton):
            exact = Network(
                copied(made), device="cpu", dtype=torch.float64, trainable=training.trainable, input_shape=shape
            )
            weights = _solved(exact, rows, wanted, weights, method, solver=training.solver)
        if plan is not None and isinstance(method, Newton | HessianFree):
            weights = published(weights, noise_std=plan.noise_std, source=source)
        return weights

    return train_one


def _solved(
    network: Network,
    rows: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    method: Newton,
    *,
    solver: str,
) -> torch.Tensor:
    """What the plan's solver makes of the recipe's result, as newton and jackknife learn."""
    objective = NetworkObjective(network, rows, labels, l2=method.curvature.l2 or 0.0)
    return shorten_gradient(
        objective.gradient,
        objective.hessian,
        weights,
        # What the reference of the plan is solved to, where that is less than what learning is.
        tolerance=min(method.tolerance, method.reference_tolerance),
        solver=solver,
        first_step=1 / method.curvature.smoothness,
    )


def _cyclic(
    network: Network,
    rows: torch.Tensor,
    labels: torch.Tensor,
    method: HessianFree,
    *,
    source: GaussianSource,
    stepper: Stepper,
    name: str,
) -> None:
    """Gradient descent over fixed batches in turn, as hessian-free learns."""
    batches = -(-len(rows) // method.batch_size)
    slots = torch.from_numpy(assign_slots(len(rows), batches, source))
    members = [torch.nonzero(slots == number)[:, 0] for number in range(batches)]
    curvature = method.curvature

    def step(t: int) -> torch.Tensor:
        chosen = members[t % batches]
        found, loss = network.gradient(rows[chosen], labels[chosen])
        size = method.step_size * method.step_decay**t
        network.flat.mul_(1.0 - size * (curvature.l2 or 0.0)).sub_(found, alpha=size)
        return loss

    stepper.run(name, method.training_steps, {"weights": network.flat}, step)


def _restore(network: Network, module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Frozen parameters and buffers are those of the released model."""
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    check_tensors(tensors, {name: tuple(value.shape) for name, value in state.items()})
    fixed = fixed_names(network)
    with torch.no_grad():
        for name, value in state.items():
            if name in fixed:
                value.copy_(tensors[name])
