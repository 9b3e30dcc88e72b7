"""Shadow models: many models trained by one recipe on different subsets of the records, as one batch where possible.

Generalised linear models are columns of one weight matrix: rows @ W, residuals masked by who trains on which record,
rows^T @ R. Built-in networks are stacked tensors under ``torch.func.vmap``. Everything else is trained one after
another with the loops of a run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.descent import Descent
from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.losses import Constants
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.methods.hessian_free import HessianFree
from rdp_calc.plan import Plan, init_std
from rdp_calc.training import Recipe
from unlearn_runtime.algorithms.langevin import project_
from unlearn_runtime.algorithms.training import step_size
from unlearn_runtime.evaluate.predictions import Part
from unlearn_runtime.glm_losses import MODELS
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

Array = npt.NDArray[Any]

_ROWS = 4096

#: More than any accelerated descent in float64 needs, in units of the square root of the condition number.
_ITERATIONS = 200


def halves(count: int, size: int, source: GaussianSource, *, spare: Array | None = None) -> Array:
    """Who trains on what, boolean (count, size): random halves of ``size`` records, every second one the complement of
    the one before, so that each record is in half of the models. All halves have size // 2 records; of an odd number
    one of the records ``spare`` (numbers; all where None), another in each pair, is in neither half.

    Raises InvalidInput for an odd or too small number of models or fewer than two records.
    """
    if count < 4 or count % 2:
        raise InvalidInput(f"shadow models must be an even number >= 4, got {count}.")
    if size < 2:
        raise InvalidInput(f"random halves need two records or more, got {size}.")
    masks = np.zeros((count, size), dtype=bool)
    for first in range(0, count, 2):
        order = source.permutation(size)
        if size % 2 and spare is not None:
            last = np.flatnonzero(np.isin(order, spare))[-1]
            order[[last, -1]] = order[[-1, last]]
        masks[first, order[: size // 2]] = True
        masks[first + 1, order[size // 2 : 2 * (size // 2)]] = True
    return masks


class Trainer(ABC):
    """Trains models on subsets of ``part``. ``how`` says in which way, for people."""

    how: str

    @abstractmethod
    def train(self, masks: Array, *, source: GaussianSource, stepper: Stepper) -> Array:
        """Models (N, p), float64, each on the records where its row of ``masks`` (N, n) is true."""


class LinearTrainer(Trainer):
    """The whole pipeline of a plan on a generalised linear model, learning steps and those of so many ``requests``, all
    models as columns of one matrix. ``divisor``: what sums of gradients are divided by, None for the number of records
    kept.
    """

    how = "one batch, models as columns of one weight matrix"

    def __init__(
        self,
        plan: Plan,
        constants: Constants,
        part: Part,
        *,
        classes: int,
        requests: int = 1,
        divisor: int | None = None,
    ) -> None:
        self._plan, self._constants, self._requests, self._divisor = plan, constants, requests, divisor
        options: dict[str, Any] = {}
        labels = part.labels.numpy()
        if constants.loss == "huber":
            options = {"threshold": constants.huber_threshold, "signs": classes == 2}
        if constants.loss != "softmax" and classes == 2:
            labels = 2.0 * labels - 1.0
        self.model = MODELS[constants.loss or ""].from_arrays(
            part.rows.numpy().copy(), labels, classes=classes, device=torch.device("cpu"), **options
        )
        self._limits = None
        if constants.residual_clip is not None:
            lengths = torch.linalg.vector_norm(part.rows, dim=1, keepdim=True)
            self._limits = constants.residual_clip / lengths.clamp(min=1e-300)

    def train(self, masks: Array, *, source: GaussianSource, stepper: Stepper) -> Array:
        model, method, plan = self.model, self._plan.method, self._plan
        weights = torch.zeros(model.features, len(masks) * model.outputs, dtype=torch.float64)
        std = init_std(plan.init or "zeros")
        if std:
            source.fill(weights)
            weights *= std
        kept = torch.from_numpy(masks.T.copy()).double()
        if isinstance(method, Descent | HessianFree):
            self._descend(weights, kept, source=source, stepper=stepper)
        else:
            self._solve(weights, kept, stepper=stepper)
        if not bool(torch.isfinite(weights).all()):
            raise GuardFailed("shadow models diverged: their weights are not finite; check the step size of the plan.")
        if not self._noisy_steps:
            # What is published gets its noise at the end.
            noise = torch.empty_like(weights)
            source.fill(noise)
            weights += plan.noise_std * noise
        found: Array = weights.t().reshape(len(masks), -1).numpy()
        return found

    @property
    def _noisy_steps(self) -> bool:
        method = self._plan.method
        return isinstance(method, Descent) and not isinstance(method, DescentToDelete)

    def gradient(self, weights: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Mean data gradients (d, N x C) of all models over their records among ``rows``; ``kept`` (n, N) is 0 or 1."""
        model, total = self.model, torch.zeros_like(weights)
        x, y, mask = model.rows[rows], model.labels[rows], kept[rows]
        limits = None if self._limits is None else self._limits[rows]
        for start in range(0, len(x), _ROWS):
            block = slice(start, start + _ROWS)
            products = x[block] @ weights
            model.residuals_(products, y[block])
            if limits is not None:
                products = torch.clamp(products, min=-limits[block], max=limits[block])
            products.view(len(products), -1, model.outputs).mul_(mask[block].unsqueeze(2))
            total += x[block].t() @ products
        counts = mask.sum(dim=0).clamp(min=1.0)
        if self._divisor is not None:
            counts = torch.full_like(counts, float(self._divisor) * len(x) / len(model.rows))
        return total / counts.repeat_interleave(model.outputs)

    def _descend(self, weights: torch.Tensor, kept: torch.Tensor, *, source: GaussianSource, stepper: Stepper) -> None:
        method, plan, l2 = self._plan.method, self._plan, self._constants.l2 or 0.0
        assert isinstance(method, Descent | HessianFree)
        slots = self._slots(kept, source)
        if isinstance(method, HessianFree):
            steps, decay, radius = method.training_steps, method.step_decay, None
        else:
            # Learning and what the requests add, as the reference of the plan runs them.
            turns = (plan.executed_learn_steps or 0) + sum(turns for _, turns in method.asked()[: self._requests])
            steps, decay, radius = turns * len(slots), 1.0, method.radius
        noise = torch.empty_like(weights)

        def step(t: int) -> None:
            eta = method.step_size * decay**t
            found = self.gradient(weights, kept, slots[t % len(slots)])
            weights.mul_(1 - eta * l2).sub_(found, alpha=eta)
            if self._noisy_steps:
                source.fill(noise)
                weights.add_(noise, alpha=plan.noise_std)
            if radius is not None:
                project_(weights, radius, outputs=self.model.outputs)

        stepper.run("train", steps, {"weights": weights}, step)

    def _slots(self, kept: torch.Tensor, source: GaussianSource) -> list[torch.Tensor | slice]:
        """Batches of all records, visited in turn; a model uses its own records of each: on average the plan's size."""
        batch = getattr(self._plan.method, "batch_size", None)
        if batch is None:
            return [slice(None)]
        count = max(1, -(-int(kept.sum(dim=0).max()) // batch))
        order = torch.from_numpy(source.permutation(len(kept)))
        return [order[i * len(kept) // count : (i + 1) * len(kept) // count] for i in range(count)]

    def _solve(self, weights: torch.Tensor, kept: torch.Tensor, *, stepper: Stepper) -> None:
        """Nesterov's accelerated descent on all objectives at once until every gradient is within the tolerance."""
        method, constants = self._plan.method, self._constants
        smoothness, l2 = constants.smoothness, constants.l2 or 0.0
        tolerance = float(getattr(method, "tolerance", 0.0))
        # Of newton and jackknife, whose reference may be solved further than what is learned.
        tolerance = min(tolerance, float(getattr(method, "reference_tolerance", tolerance)))
        root = math.sqrt(constants.strong_convexity / smoothness)
        momentum = (1 - root) / (1 + root)
        state = {"weights": weights, "ahead": weights.clone()}
        columns = self.model.outputs

        def longest(found: torch.Tensor) -> float:
            return float(found.view(len(found), -1, columns).square().sum(dim=(0, 2)).max().sqrt())

        def step(_: int) -> None:
            ahead = state["ahead"]
            found = self.gradient(ahead, kept, slice(None)).add_(ahead, alpha=l2)
            moved = ahead - found / smoothness
            state["ahead"] = moved + momentum * (moved - weights)
            weights.copy_(moved)

        def solve(_: int) -> None:
            for count in range(math.ceil(_ITERATIONS / root)):
                # The gradient of the published point costs as much as a step.
                if count % 10 == 0:
                    found = self.gradient(weights, kept, slice(None)).add_(weights, alpha=l2)
                    if longest(found) <= tolerance:
                        return
                step(count)
            raise GuardFailed(
                f"shadow models do not reach a gradient norm of {tolerance:.3g}; plan a larger --tolerance."
            )

        stepper.run("train", 1, state, solve)


class StackedTrainer(Trainer):
    """Training without noise of a built-in network, all models as stacked tensors; their subsets have one size.

    ``initial`` gives a fresh module. Rows are taken in the module's dtype.
    """

    how = "one batch, stacked tensors under vmap"

    def __init__(
        self,
        initial: Callable[[GaussianSource], torch.nn.Module],
        part: Part,
        recipe: Recipe,
        *,
        input_shape: tuple[int, ...] | None,
        losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        self._initial, self._recipe, self._losses = initial, recipe, losses
        shape = (len(part), *input_shape) if input_shape is not None else part.rows.shape
        self._rows, self._labels = part.rows.float().reshape(shape), part.labels

    def train(self, masks: Array, *, source: GaussianSource, stepper: Stepper) -> Array:
        members = torch.from_numpy(np.stack([np.flatnonzero(mask) for mask in masks]))
        modules = [self._initial(source) for _ in masks]
        # Stacked in the order of the parameters; a built-in network has no buffers.
        stacked, _ = torch.func.stack_module_state(modules)
        weights = {name: tensor.detach() for name, tensor in stacked.items()}
        base, recipe = modules[0], self._recipe

        def loss(parameters: dict[str, torch.Tensor], rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            outputs = torch.func.functional_call(base, parameters, (rows,))
            return self._losses(outputs, labels).mean()

        gradients = torch.func.vmap(torch.func.grad(loss))
        size = members.shape[1]
        batch = min(recipe.batch_size, size)
        per_epoch = -(-size // batch)
        steps = max(1, math.ceil(recipe.epochs * per_epoch - 1e-9))
        velocity = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        order = torch.zeros_like(members)

        def step(t: int) -> None:
            place = t % per_epoch
            if place == 0:
                shuffled = np.stack([source.permutation(size) for _ in masks])
                order.copy_(members.gather(1, torch.from_numpy(shuffled)))
            chosen = order[:, place * batch : (place + 1) * batch]
            found = gradients(weights, self._rows[chosen], self._labels[chosen])
            eta = step_size(recipe, t, steps)
            for name, tensor in weights.items():
                direction = found[name]
                if recipe.momentum:
                    direction = velocity[name].mul_(recipe.momentum).add_(direction)
                if recipe.weight_decay:
                    tensor.mul_(1.0 - eta * recipe.weight_decay)
                tensor.sub_(direction, alpha=eta)

        with torch.enable_grad():
            stepper.run("train", steps, {**weights, "order": order}, step)
        flat = torch.cat([tensor.double().reshape(len(masks), -1) for tensor in weights.values()], dim=1)
        if not bool(torch.isfinite(flat).all()):
            raise GuardFailed("shadow models diverged: their weights are not finite; use a smaller step size.")
        found_weights: Array = flat.numpy()
        return found_weights


class EnsembleTrainer(Trainer):
    """Ensembles of ``count`` members, each on a random share of the records of its ensemble; shares have one size."""

    def __init__(self, member: Trainer, count: int) -> None:
        self._member, self._count = member, count
        self.how = member.how

    def train(self, masks: Array, *, source: GaussianSource, stepper: Stepper) -> Array:
        shares = np.zeros((len(masks), self._count, masks.shape[1]), dtype=bool)
        for mask, parts in zip(masks, shares, strict=True):
            members = np.flatnonzero(mask)[source.permutation(int(mask.sum()))]
            size = len(members) // self._count
            for number, part in enumerate(parts):
                part[members[number * size : (number + 1) * size]] = True
        flat = self._member.train(shares.reshape(-1, masks.shape[1]), source=source, stepper=stepper)
        found: Array = flat.reshape(len(masks), -1)
        return found


class LoopTrainer(Trainer):
    """One model after another: ``train_one(rows, labels, source, stepper, name)`` gives the numbers (p,) of one."""

    how = "one after another"

    def __init__(self, part: Part, train_one: Callable[..., torch.Tensor]) -> None:
        self._part, self._train_one = part, train_one

    def train(self, masks: Array, *, source: GaussianSource, stepper: Stepper) -> Array:
        found = []
        for number, mask in enumerate(masks):
            chosen = self._part.chosen(np.flatnonzero(mask))
            name = f"train, model {number}"
            weights = self._train_one(chosen.rows, chosen.labels, source=source, stepper=stepper, name=name)
            found.append(weights.double().numpy())
        return np.stack(found)
