"""Carries out newton and jackknife: learn to a gradient norm, one second-order step for the request, noise once.

State: "weights", the noise-free model, which stays secret and from which requests go on; "released", weights with fresh
noise. The jackknife of a small linear model also keeps "factor" (p, p), the Cholesky factor of its Hessian, and
"factor_error" (1,). Networks: ``newton_network_job``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import DataError, GuardFailed, InvalidInput
from rdp_calc.methods.jackknife import Jackknife
from rdp_calc.methods.newton import Newton
from rdp_calc.plan import Plan
from rdp_calc.reals import round_down
from rdp_calc.training import Training
from unlearn_runtime.algorithms.descent_to_delete import published
from unlearn_runtime.algorithms.glm_hessian import GlmHessian
from unlearn_runtime.algorithms.gradient_norm import Solution, minimise
from unlearn_runtime.algorithms.jackknife import Factor, factored_step, jackknife_step
from unlearn_runtime.algorithms.langevin import initial_weights
from unlearn_runtime.algorithms.newton import MOST_DENSE, NewtonStep, below_rounding, newton_step
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.glm_job import GlmJob
from unlearn_runtime.job import Job, State
from unlearn_runtime.newton_network_job import NewtonNetworkJob
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.records import regulariser
from unlearn_runtime.stepper import Stepper

Array = npt.NDArray[Any]

_NONE: Array = np.array([], dtype=np.int64)


def make(
    plan: Plan,
    dataset: Dataset,
    *,
    ids: Array | None,
    gone: Array | None = None,
    blank: Array | None = None,
    module: torch.nn.Module | None = None,
    training: Training | None = None,
    execution: Execution,
    device: torch.device,
    source: GaussianSource,
    stepper: Stepper,
    announce: Callable[[str], None] | None = None,
    start_folder: Path | None = None,
) -> Job:
    """The job of a newton or jackknife plan: that of a linear model, or of the network ``module`` where there is one.

    ``blank``: records among ``ids`` that the data hold no more, for newton on a linear model alone, whose step looks at
    retained records. Raises GuardFailed for a plan that counts on an exact solve.
    """
    if not isinstance(plan.method, Newton):
        raise InvalidInput(f"method {plan.method.NAME} is not newton or jackknife.")
    if not plan.method.residual > 0:
        raise GuardFailed(below_rounding(0.0, 0.0))
    shared: dict[str, Any] = {"execution": execution, "device": device, "source": source, "stepper": stepper}
    if blank is not None and len(blank):
        ids, gone = (
            np.setdiff1d(_NONE if ids is None else ids, blank),
            np.union1d(_NONE if gone is None else gone, blank),
        )
    if module is None:
        return NewtonGlmJob(plan, dataset, ids=ids, gone=gone, **shared)
    training = training or plan.training or Training()
    return NewtonNetworkJob(plan, dataset, ids=ids, gone=gone, module=module, training=training, **shared)


class NewtonGlmJob(GlmJob):
    """On a generalised linear model, all in float64; the checks of tolerance and residual count rounding in."""

    #: The last step taken, and the solve it started from.
    taken: NewtonStep | None = None

    @property
    def method(self) -> Newton:
        assert isinstance(self.plan.method, Newton)
        return self.plan.method

    def learn(self, *, retained: bool = False) -> State:
        if retained:
            return self.retrain(None, "fresh")
        state = self._minimised(self.records.full, "learn", self.method.tolerance)
        if isinstance(self.method, Jackknife) and self.size <= MOST_DENSE:
            factor = Factor.of(self._hessian(self.records.full, self._chain(state)))
            state["factor"] = factor.lower
            state["factor_error"] = state["weights"].new_tensor([factor.error])
        return self._release(state)

    def unlearn(self, start: State, *, name: str = "unlearn") -> State:
        """One step from chain 0, shared by all chains: it is deterministic. Noise is every chain's own."""
        if self.records.forgotten is None:
            raise InvalidInput("nothing to forget: the job was made without ids.")
        state = {"weights": start["weights"].clone()}
        found: list[NewtonStep] = []

        def carry_out(step: int) -> None:
            found.append(self._step(start))
            state["weights"].copy_(self._repeated(found[0].weights))

        self.stepper.run(name, 1, state, carry_out)
        if not found:
            # A resumed run skipped the loop; what is published is always what was shown to be within.
            carry_out(0)
        self.taken = found[0]
        return self._release(state)

    def retrain(self, start: State | None, mode: str) -> State:
        """The retained objective solved to the plan's reference tolerance."""
        if mode != "fresh":
            raise InvalidInput(f"{self.method.NAME} has no reference {mode!r}; use --retrain fresh.")
        return self._release(self._minimised(self.records.retained, "retrain", self.method.reference_tolerance))

    def start_from(self, tensors: dict[str, torch.Tensor], *, state: bool = True) -> State:
        if not state:
            raise DataError(f"{self.method.NAME} starts from a learn run of its plan, not from a model file.")
        found = {"weights": self._chains(tensors.get("weights"))}
        if "factor" in tensors:
            lower, error = tensors["factor"], tensors.get("factor_error")
            if error is None or error.shape != (1,) or lower.shape != (self.size, self.size):
                raise DataError("the learned state has a factor that does not fit the model of the plan.")
            if (
                {lower.dtype, error.dtype} != {torch.float64}
                or not _is_factor(lower)
                or not 0 <= float(error) < math.inf
            ):
                raise DataError("the learned state has a factor that is none of a Hessian; learn again.")
            found["factor"], found["factor_error"] = (t.to(found["weights"].device) for t in (lower, error))
        if "released" in tensors:
            found["released"] = self._chains(tensors["released"])
        return found

    def executed(self) -> dict[str, Any]:
        return {"learn_steps": None, "unlearn_steps": None, "matrix_dtype": "float64", "update_dtype": "float64"}

    def audit(self) -> dict[str, Any]:
        found: dict[str, Any] = {"matrix_dtype": "float64"}
        if self.solved is not None:
            found["gradient_norm"] = self.solved.gradient_norm
            found["rounding_error"] = self.solved.rounding
            found["solver_iterations"] = self.solved.iterations
        if self.taken is not None:
            found["residual"] = self.taken.residual
            found["residual_rounding"] = self.taken.rounding
            found["linear_solver"] = self.taken.solver
            found["linear_solver_iterations"] = self.taken.iterations
        return found

    def _step(self, start: State) -> NewtonStep:
        method, weights, records = self.method, self._chain(start), self.records
        assert records.forgotten is not None
        if "factor" in start:
            factor = Factor(start["factor"], float(start["factor_error"]))
            divisor = records.full.divisor
            found = factored_step(weights, factor, records.forgotten, divisor=divisor, residual=method.residual)
        elif isinstance(method, Jackknife):
            self._check_start(weights)
            found = jackknife_step(self._hessian(records.full, weights), records.forgotten, residual=method.residual)
        else:
            self._check_start(weights)
            found = newton_step(self._hessian(records.retained, weights), residual=method.residual)
        if "hessian_lipschitz" in method.curvature.typed:
            self._check_left(found.weights)
        return found

    def _check_start(self, weights: torch.Tensor) -> None:
        """The learned model is what the plan says. Learning has shown it with rounding counted in; records may be in
        another order here, so that this sum is rounded otherwise. Where learned records are there no more, the state's
        hash in the record of that run has to do.
        """
        if len(self.records.present) < self.method.dataset_size:
            return
        hessian = GlmHessian(self.records.full, weights, l2=regulariser(self.plan))
        length = float(hessian.gradient().norm())
        if not length <= self.method.tolerance + hessian.gradient_rounding():
            raise GuardFailed(
                f"the learned model has gradient norm {length:.3g}, the plan's tolerance is"
                f" {self.method.tolerance:.3g}; learn again."
            )

    def _check_left(self, weights: torch.Tensor) -> None:
        """A typed Hessian-Lipschitz constant is believed only as far as the gradient that is left shows: what is left,
        divided by m, bounds the distance to the minimiser.
        """
        hessian = GlmHessian(self.records.retained, weights, l2=regulariser(self.plan))
        left = float(hessian.gradient().norm()) + hessian.gradient_rounding()
        convexity = self.method.curvature.strong_convexity
        allowed = convexity * round_down(self.method.error()) - self.method.reference_tolerance
        if not left <= allowed * (1 + 2.0**-30):
            raise GuardFailed(
                f"the step left a gradient of norm {left:.3g} where the plan's hessian_lipschitz"
                f" {self.method.curvature.hessian_lipschitz:.3g} allows {allowed:.3g}: it is too small for these data;"
                " plan with a larger --hessian-lipschitz."
            )

    def _minimised(self, model: GeneralisedLinearModel, name: str, tolerance: float) -> State:
        """The minimiser from zeros, in all chains alike."""
        state = {"weights": initial_weights(model, self.execution.chains, std=0.0, source=self.source)}
        solver = "newton-cg" if self.plan.training is None else self.plan.training.solver

        def solution() -> Solution:
            return minimise(
                model,
                self._chain(state),
                l2=regulariser(self.plan),
                smoothness=self.method.curvature.smoothness,
                tolerance=tolerance,
                solver=solver,
            )

        found: list[Solution] = []

        def solve(step: int) -> None:
            found.append(solution())
            state["weights"].copy_(self._repeated(found[0].weights))

        self.stepper.run(name, 1, state, solve)
        found = found or [solution()]
        if name == "learn":
            self.solved = found[0]
        return state

    def _hessian(self, model: GeneralisedLinearModel, weights: torch.Tensor) -> GlmHessian:
        return GlmHessian(model, weights, l2=regulariser(self.plan), damping=self.method.damping)

    def _chain(self, state: State) -> torch.Tensor:
        return state["weights"][:, : self.records.full.outputs].contiguous()

    def _repeated(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.repeat(1, self.execution.chains)

    def _release(self, state: State) -> State:
        state["released"] = published(state["weights"], noise_std=self.plan.noise_std, source=self.source)
        return state


def _is_factor(lower: torch.Tensor) -> bool:
    """Whether it may be a Cholesky factor: finite, lower triangular, with a positive diagonal."""
    finite = bool(torch.isfinite(lower).all())
    return finite and not bool(lower.triu(1).any()) and bool((lower.diagonal() > 0).all())
