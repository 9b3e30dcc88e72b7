"""Langevin, noisy SGD, descent-to-delete and gradient-norm on generalised linear models: all chains as one batch.

State: "weights" (d, R x C), float64, what the method continues from. "slots" (n,), int64: the batch of every record, of
noisy SGD. "rewind" (d, R x C): the iterate unlearning starts from, where descent-to-delete rewinds. "released"
(d, R x C): weights with fresh noise, where a method adds noise only to what it publishes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.descent import Descent
from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.methods.gradient_norm import GradientNorm
from rdp_calc.methods.newton import Newton
from rdp_calc.methods.noisy_sgd import NoisySgd
from rdp_calc.plan import Plan, init_std
from unlearn_runtime.algorithms.descent_to_delete import keeping, published
from unlearn_runtime.algorithms.gradient_norm import Solution, minimise
from unlearn_runtime.algorithms.langevin import Update, descent, initial_weights
from unlearn_runtime.algorithms.noisy_sgd import SlottedBatches, assign_slots, check_slots
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.grid import on_grid
from unlearn_runtime.job import Job, State
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.records import prepare_records, records_for, regulariser
from unlearn_runtime.rounding import RoundingGuard, rounding_guard
from unlearn_runtime.stepper import Stepper

Array = npt.NDArray[Any]


class GlmJob(Job):
    """A plan of one of the four methods on a data set, for one request.

    ``ids``: records to forget, None where nothing is forgotten yet; ``gone``: records that earlier requests removed;
    ``request``: which of the plan's requests this is, from 1; ``earlier_rounding``: the largest error of a mean
    gradient in the runs that this one goes on from, which must be within this plan's limit, too. Raises GuardFailed for
    a plan without a loss, DataError where the data are not the plan's, InvalidInput for a dtype the method does not run
    in.
    """

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset,
        *,
        ids: Array | None,
        gone: Array | None = None,
        request: int = 1,
        earlier_rounding: float = 0.0,
        execution: Execution,
        device: torch.device,
        source: GaussianSource,
        stepper: Stepper,
    ) -> None:
        self.plan = plan
        self.execution = execution
        self.source = source
        self.stepper = stepper
        self.request = request
        self.solved: Solution | None = None
        self._slotted: SlottedBatches | None = None
        clip = execution.published_clip
        if isinstance(plan.method, GradientNorm | Newton):
            if execution.dtype == "float32":
                raise InvalidInput(f"{plan.method.NAME} solves in float64; leave --dtype out.")
            self.guard = RoundingGuard(limit=math.inf, step_size=1.0)
            self.records = prepare_records(plan, dataset, ids, device=device, dtype=torch.float64, gone=gone)
            return
        self.guard = rounding_guard(plan)
        self.records = records_for(
            plan,
            dataset,
            ids,
            chains=execution.chains,
            dtype=execution.dtype,
            device=device,
            guard=self.guard,
            gone=gone,
            published_clip=clip,
        )
        # The choice of the arithmetic above is this run's own.
        self.guard.largest = earlier_rounding
        if not earlier_rounding <= self.guard.limit:
            raise GuardFailed(
                f"rounding in the runs before reached {earlier_rounding:.3g} in a mean gradient, this plan bears"
                f" {self.guard.limit:.3g}; learn again with --dtype float64."
            )
        if clip is not None:
            # Nothing is certified of such a run, so there is no claim that rounding could void.
            self.guard = replace(self.guard, limit=math.inf)

    @property
    def size(self) -> int:
        """Numbers in one model."""
        return self.records.full.features * self.records.full.outputs

    # The phases

    def learn(self, *, retained: bool = False) -> State:
        """Learning on all records present before the request, or on the retained ones."""
        return self._learn(retained=retained, std=init_std(self.plan.init or "zeros"))

    def unlearn(self, start: State, *, name: str = "unlearn") -> State:
        """The steps of this request on the retained records from a copy of ``start``."""
        return self._continue(start, self._turns[-1] if self._turns else 0, name)

    def retrain(self, start: State | None, mode: str) -> State:
        """Learning and all unlearning steps so far on the retained records alone, in the slots of ``start``.

        fresh: from the initial point of the plan; zeros: from zero weights.
        """
        if mode not in ("fresh", "zeros"):
            raise InvalidInput(f"{self.plan.method.NAME} has no reference {mode!r}; use --retrain fresh or zeros.")
        std = init_std(self.plan.init or "zeros") if mode == "fresh" else 0.0
        slots = None if start is None else start.get("slots")
        learned = self._learn(retained=True, std=std, slots=slots, released=False)
        if isinstance(self.plan.method, GradientNorm):
            return self._release(learned)
        # What was removed earlier is missing from the start, so the steps of earlier requests are carried out too.
        return self._continue(learned, sum(self._turns), "retrain, last steps")

    def _learn(self, *, retained: bool, std: float, slots: torch.Tensor | None = None, released: bool = True) -> State:
        name, method = "retrain" if retained else "learn", self.plan.method
        model = self.records.retained if retained else self.records.full
        weights = initial_weights(model, self.execution.chains, std=std, source=self.source)
        state = {"weights": weights}
        if isinstance(method, GradientNorm):
            self._solve(model, state, name)
            return self._release(state) if released else state
        assert self.plan.executed_learn_steps is not None
        turns = self.plan.executed_learn_steps
        if isinstance(method, NoisySgd):
            if slots is None:
                drawn = assign_slots(method.dataset_size, method.batches, self.source)
                slots = torch.from_numpy(drawn).to(weights.device)
            state["slots"] = slots.clone()
        if isinstance(method, DescentToDelete) and method.rewind:
            state["rewind"] = weights.clone()
        self._descend(state, turns, name, retained=retained)
        return self._release(state) if released else state

    def _continue(self, start: State, turns: int, name: str) -> State:
        state = {key: tensor.clone() for key, tensor in start.items() if key in ("weights", "slots")}
        if isinstance(self.plan.method, GradientNorm):
            self._solve(self.records.retained, state, name)
            return self._release(state)
        if "rewind" in start:
            state["weights"].copy_(start["rewind"])
        self._descend(state, turns, name, retained=True)
        return self._release(state)

    @property
    def _turns(self) -> tuple[int, ...]:
        """Steps or epochs of the requests up to this one."""
        method = self.plan.method
        assert isinstance(method, Descent | GradientNorm)
        return tuple(turns for _, turns in method.asked()[: self.request]) if isinstance(method, Descent) else ()

    def _descend(self, state: State, turns: int, name: str, *, retained: bool) -> None:
        """So many turns (steps, or epochs) on ``state`` in place."""
        method, weights = self.plan.method, state["weights"]
        assert isinstance(method, Descent)
        batches = self._batches(state, retained=retained)
        steps = turns * len(batches)
        update = Update(
            step_size=method.step_size,
            l2=regulariser(self.plan),
            noise_std=0.0 if isinstance(method, DescentToDelete) else self.plan.noise_std,
            radius=method.radius,
        )
        at = steps - (method.unlearn_steps or 0) if "rewind" in state else None
        with descent(batches, weights, steps=steps, update=update, source=self.source, guard=self.guard) as step:
            whole = step if at is None else keeping(step, weights, state["rewind"], at=at)
            self.stepper.run(name, steps, state, whole)
        if at == steps:
            state["rewind"].copy_(weights)

    def _batches(self, state: State, *, retained: bool) -> Sequence[GeneralisedLinearModel]:
        method = self.plan.method
        if not isinstance(method, NoisySgd):
            return [self.records.retained if retained else self.records.full]
        slots = state["slots"].cpu().numpy()
        if self._slotted is None or not np.array_equal(self._slotted.slots, slots):
            self._slotted = SlottedBatches(
                self.records.full,
                slots=slots.copy(),
                present=self.records.present,
                retained=self.records.stays,
                drops=method.drops,
            )
        return self._slotted.retained if retained else self._slotted.present

    def _solve(self, model: GeneralisedLinearModel, state: State, name: str) -> None:
        """One solve from chain 0, shared by all chains: it is deterministic."""
        method, weights, outputs = self.plan.method, state["weights"], model.outputs
        assert isinstance(method, GradientNorm)
        solver = "newton-cg" if self.plan.training is None else self.plan.training.solver

        def solution() -> Solution:
            return minimise(
                model,
                weights[:, :outputs],
                l2=regulariser(self.plan),
                smoothness=method.constants.smoothness,
                tolerance=method.tolerance,
                solver=solver,
            )

        found: list[Solution] = []

        def solve(step: int) -> None:
            found.append(solution())
            weights.copy_(found[0].weights.repeat(1, weights.shape[1] // outputs))

        self.stepper.run(name, 1, state, solve)
        # Where a resumed run skipped the loop, this is one gradient: what is published is always shown to be within.
        found = found or [solution()]
        if name != "retrain":
            self.solved = found[0]

    def _release(self, state: State) -> State:
        """The state with what is published, where that is not the weights themselves."""
        if isinstance(self.plan.method, DescentToDelete | GradientNorm):
            state["released"] = published(state["weights"], noise_std=self.plan.noise_std, source=self.source)
        return state

    # Files

    def start_from(self, tensors: dict[str, torch.Tensor], *, state: bool = True) -> State:
        """The state of a run of this plan; for gradient-norm also a model file, which is a warm start and no more."""
        method, device = self.plan.method, self.records.full.rows.device
        if isinstance(method, GradientNorm) and not state:
            return {"weights": self._model_weights(tensors)}
        names = ["weights"]
        if isinstance(method, DescentToDelete) and method.rewind:
            names.append("rewind")
        found = {name: self._chains(tensors.get(name)) for name in names}
        if isinstance(method, NoisySgd):
            slots = tensors.get("slots")
            if (
                slots is None
                or slots.dtype != torch.int64
                or slots.shape != (method.dataset_size,)
                or not check_slots(slots.numpy(), method.batches)
            ):
                raise DataError("the learned state has no slots that fit the batches of the plan.")
            found["slots"] = slots.to(device)
        if "released" in tensors:
            found["released"] = self._chains(tensors["released"])
        return found

    def _chains(self, weights: torch.Tensor | None) -> torch.Tensor:
        model, chains = self.records.full, self.execution.chains
        fits = weights is not None and weights.dtype == torch.float64 and weights.dim() == 2
        if weights is None or not fits or len(weights) != model.features or weights.shape[1] % model.outputs:
            raise DataError("the learned state does not fit the model of the plan.")
        available = weights.shape[1] // model.outputs
        if chains > available:
            raise InvalidInput(
                f"trials is {chains}, but the learn run has {available} chains; learn with --trials {chains} too."
            )
        return weights[:, : chains * model.outputs].to(model.rows.device).contiguous()

    def _model_weights(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        model = self.records.full
        weight = tensors.get("weight")
        shapes: list[tuple[int, ...]] = [(model.outputs, model.features)]
        if model.outputs == 1:
            shapes.append((model.features,))
        if weight is None or tuple(weight.shape) not in shapes or not weight.is_floating_point():
            raise DataError(f"the model to start from must hold a tensor weight of shape {shapes[-1]}.")
        chain = weight.double().view(model.outputs, model.features).t()
        if not bool(torch.isfinite(chain).all()):
            raise DataError("the model to start from has weights that are not finite.")
        return chain.repeat(1, self.execution.chains).to(model.rows.device)

    def model(self, state: State, *, exact: bool = False) -> dict[str, torch.Tensor]:
        """Chain 0 of what is published as tensor ``weight``: (d,) for one output, (C, d) otherwise."""
        outputs = self.records.full.outputs
        chain = _published(state)[:, :outputs].t().contiguous().cpu()
        return self._file(chain, exact=exact)

    def release(self, state: State) -> dict[str, torch.Tensor]:
        """The same with its numbers on the grid of what is released."""
        chain = _published(state)[:, : self.records.full.outputs].t().contiguous().cpu()
        return self._file(on_grid(chain, self.plan.noise_std))

    def _file(self, chain: torch.Tensor, *, exact: bool = False) -> dict[str, torch.Tensor]:
        # Under the automatic choice always float32: the file must not tell which arithmetic the data led to.
        chain = chain if exact or self.execution.dtype == "float64" else chain.float()
        return {"weight": chain[0].clone() if len(chain) == 1 else chain}

    def chains(self, state: State) -> torch.Tensor:
        """Every chain of what is published, float64 (R, C d): outputs one after another, as in the model file."""
        model, published = self.records.full, _published(state)
        return published.double().t().reshape(-1, model.outputs * model.features).contiguous().cpu()

    def metrics(self, state: State) -> dict[str, Any]:
        """Accuracy and mean loss of every chain of what is published."""
        return self.records.metrics(_published(state))

    def executed(self) -> dict[str, Any]:
        # What was asked for: the choice under "auto" looks at the data and stays in the audit record.
        dtypes = {"matrix_dtype": self.execution.dtype or "auto", "update_dtype": "float64"}
        if isinstance(self.plan.method, GradientNorm):
            return {"learn_steps": None, "unlearn_steps": None, **dtypes, "matrix_dtype": "float64"}
        return {"learn_steps": self.plan.executed_learn_steps, "unlearn_steps": self._turns[-1], **dtypes}

    def audit(self) -> dict[str, Any]:
        found: dict[str, Any] = {"matrix_dtype": str(self.records.full.rows.dtype).removeprefix("torch.")}
        if isinstance(self.plan.method, GradientNorm):
            if self.solved is not None:
                found["gradient_norm"] = self.solved.gradient_norm
                found["rounding_error"] = self.solved.rounding
                found["solver_iterations"] = self.solved.iterations
            return found
        limit = self.guard.limit
        return {
            **found,
            "rounding_error": self.guard.largest,
            "rounding_limit": None if math.isinf(limit) else limit,
        }


def _published(state: State) -> torch.Tensor:
    return state.get("released", state["weights"])
