"""Newton and jackknife on a torch network, whose constants are estimates: the recipe, one step, noise once.

Training is the plan's recipe, after which its solver shortens the gradient of the full objective to the tolerance.

Nothing here can be proved: the guarantee holds on condition that the plan's constants are true near the learned models.
What can be seen is compared with them, and a run that sees them broken is refused. Derivatives are taken in float64 on
a copy of the module, whatever the model was trained in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.methods.jackknife import Jackknife
from rdp_calc.methods.newton import Newton
from rdp_calc.plan import Plan
from rdp_calc.reals import round_down, round_up
from rdp_calc.training import Recipe, Training
from unlearn_runtime.algorithms.conjugate_gradients import conjugate_gradients
from unlearn_runtime.algorithms.descent_to_delete import published
from unlearn_runtime.algorithms.gradient_polish import shorten_gradient
from unlearn_runtime.data import Dataset
from unlearn_runtime.execution import Execution
from unlearn_runtime.job import State
from unlearn_runtime.network import Network
from unlearn_runtime.network_curvature import NetworkObjective, extreme_eigenvalues, hessian_change
from unlearn_runtime.network_job import NetworkJob, chain_name, copied
from unlearn_runtime.network_records import NetworkRecords
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.stepper import Stepper

Array = npt.NDArray[Any]

#: A product with the Hessian costs several passes over the data; what CG has not solved by then it will not.
_MOST_PRODUCTS = 2000

#: Room for rounding, relatively, where what was seen is compared with the plan.
_SLACK = 1 + 1e-9


@dataclass
class Seen:
    """The largest values seen in a run (of strong_convexity the smallest), by the names of the plan's constants."""

    lipschitz: float = 0.0
    smoothness: float = 0.0
    strong_convexity: float = float("inf")
    hessian_lipschitz: float = 0.0

    def note(self, **values: float) -> None:
        for name, value in values.items():
            better = min if name == "strong_convexity" else max
            setattr(self, name, better(getattr(self, name), value))


class NewtonNetworkJob(NetworkJob):
    """See the module. The objective is the mean loss of the records plus (l2/2) ||w||^2, l2 that of the plan or 0."""

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset,
        *,
        ids: Array | None,
        gone: Array | None = None,
        module: torch.nn.Module,
        training: Training,
        execution: Execution,
        device: torch.device,
        source: GaussianSource,
        stepper: Stepper,
    ) -> None:
        if ids is not None and gone is not None:
            # What earlier requests removed stays out.
            ids = np.union1d(ids, gone)
        super().__init__(
            plan,
            dataset,
            ids=ids,
            module=module,
            training=training,
            execution=execution,
            device=device,
            source=source,
            stepper=stepper,
        )
        assert isinstance(plan.method, Newton)
        self.method: Newton = plan.method
        self.seen = Seen()
        self.gradient_norm = self.residual = 0.0
        #: What the mean over retained records counts for in the objective of the recipe now under way.
        self._share = 1.0

    def learn(self, *, retained: bool = False) -> State:
        return self._released(self._trained(retained=retained))

    def retrain(self, start: State | None, mode: str) -> State:
        if mode != "fresh":
            raise InvalidInput(f"{self.method.NAME} has no reference {mode!r}; use --retrain fresh.")
        return self._released(self._trained(retained=True))

    def unlearn(self, start: State, *, name: str = "unlearn") -> State:
        if self._records.forgotten is None:
            raise InvalidInput("nothing to forget: the job was made without ids.")
        self._restore_fixed(start)
        found: State = {key: value.clone() for key, value in start.items() if key != "released"}
        for chain, weights in enumerate(found["weights"]):
            self._renew()

            def carry_out(step: int, weights: torch.Tensor = weights) -> None:
                weights.copy_(self._step(weights.clone()))

            self._stepper.run(chain_name(name, chain), 1, {"weights": weights}, carry_out)
        return self._released(found)

    def audit(self) -> dict[str, Any]:
        seen = {name: value for name, value in vars(self.seen).items() if np.isfinite(value)}
        reached = {"gradient_norm": self.gradient_norm, "residual": self.residual}
        return {**super().audit(), **reached, "constants_seen": seen}

    # Learning

    def _trained(self, *, retained: bool) -> State:
        records = self._records.retained_or_all if retained else self._records.full
        divisor = self._divisor if retained else len(self._records.full.rows)
        self._share = len(records.rows) / divisor
        try:
            state = super()._learn(retained=retained, zeros=False, name="retrain" if retained else "learn")
        finally:
            self._share = 1.0
        objective = self._objective(self._exact(), records, divisor)
        tolerance = self.method.reference_tolerance if retained else self.method.tolerance
        name = "retrain" if retained else "learn"
        for chain, weights in enumerate(state["weights"]):

            def carry_out(step: int, weights: torch.Tensor = weights) -> None:
                found = shorten_gradient(
                    objective.gradient,
                    objective.hessian,
                    weights.clone(),
                    tolerance=tolerance,
                    solver=self._training.solver,
                    first_step=1 / self.method.curvature.smoothness,
                )
                weights.copy_(found)

            label = chain_name(f"{name}, to the tolerance", chain)
            self._stepper.run(label, 1, {"weights": weights}, carry_out)
            self._check_gradient(objective, weights, tolerance)
        return state

    def _recipe(self) -> Recipe:
        """The recipe on the mean over retained records, for an objective that divides their sum by another number: the
        step is that much shorter on losses and the same on weight decay.
        """
        recipe = super()._recipe()
        if self._share == 1.0:
            return recipe
        return replace(recipe, step_size=recipe.step_size * self._share, weight_decay=recipe.weight_decay / self._share)

    @property
    def _divisor(self) -> int:
        """What the sum over retained records is divided by."""
        removes = self.method.adjacency == "remove"
        return len((self._records.retained_or_all if removes else self._records.full).rows)

    @property
    def _l2(self) -> float:
        return self.method.curvature.l2 or 0.0

    def _check_gradient(self, objective: NetworkObjective, weights: torch.Tensor, tolerance: float) -> None:
        length = float(objective.gradient(weights).norm())
        if length <= tolerance * _SLACK:
            self.gradient_norm = max(self.gradient_norm, length)
            return
        recipe = super()._recipe()
        decay = self._l2 / (1 - recipe.momentum)
        advice = "plan with a --learn of more epochs that ends nearer to a minimum"
        if abs(recipe.weight_decay - decay) > 1e-9 * max(decay, recipe.weight_decay):
            advice = (
                f"plan with weight-decay={decay:g} in --learn, as an objective with l2 = {self._l2:g} needs at momentum"
                f" {recipe.momentum:g}"
            )
        raise GuardFailed(
            f"training reached a gradient norm of {length:.3g} of the full objective, the plan's tolerance is"
            f" {tolerance:.3g}; {advice}, or with --tolerance {length * 1.1:.2g}."
        )

    # The step

    def _step(self, weights: torch.Tensor) -> torch.Tensor:
        method, records = self.method, self._records
        assert records.forgotten is not None
        network = self._exact()
        full = self._objective(network, records.full, len(records.full.rows))
        retained = self._objective(network, records.retained_or_all, self._divisor)
        self._check_gradient(full, weights, method.tolerance)
        stepped = full if isinstance(method, Jackknife) else retained
        ends = extreme_eigenvalues(stepped.hessian(weights), self.size, device=weights.device)
        self.seen.note(
            lipschitz=float(full.record_norms(weights).max()),
            smoothness=max(abs(ends.smallest), abs(ends.largest)),
            strong_convexity=ends.smallest,
        )
        if isinstance(method, Jackknife):
            forgotten = full.part(records.forgotten.rows, records.forgotten.labels)
            alone = extreme_eigenvalues(forgotten.hessian(weights), self.size, device=weights.device)
            self.seen.note(smoothness=max(abs(alone.smallest), abs(alone.largest)) + self._l2)
            right = forgotten.gradient(weights) * (-len(records.forgotten.rows) / full.divisor)
        else:
            right = retained.gradient(weights)
        # Before the solve, which would only say that the Hessian is not positive definite.
        self._check_seen()
        solution = conjugate_gradients(
            stepped.hessian(weights),
            right,
            damping=method.damping,
            tolerance=method.residual,
            most_iterations=min(_MOST_PRODUCTS, 10 * self.size + 100),
        )
        moved = weights - solution.solution
        self.residual = max(self.residual, solution.residual)
        self.seen.note(
            lipschitz=float(full.record_norms(moved).max()),
            strong_convexity=solution.least_curvature - method.damping,
            hessian_lipschitz=hessian_change(retained, weights, moved - weights),
        )
        self._check_seen()
        self._check_left(retained, moved)
        return moved

    def _check_seen(self) -> None:
        """Raise GuardFailed, naming all that was seen, where the plan's constants cannot be true."""
        curvature, broken = self.method.curvature, []
        for name, value in vars(self.seen).items():
            planned = getattr(curvature, name)
            fails = value * _SLACK < planned if name == "strong_convexity" else value > planned * _SLACK
            if fails:
                broken.append(f"{name} {value:.4g} where the plan has {planned:.4g}")
        if broken:
            raise GuardFailed(
                f"the constants seen on this model are not those of the plan: {', '.join(broken)}; plan with constants"
                " on the safe side of what was seen, or train with a larger l2."
            )

    def _check_left(self, retained: NetworkObjective, moved: torch.Tensor) -> None:
        """With the plan's constants the step leaves so long a gradient and no longer."""
        left = float(retained.gradient(moved).norm())
        convexity = self.method.curvature.strong_convexity
        allowed = convexity * round_down(self.method.error()) - self.method.reference_tolerance
        # The solve's residual counts whole here, and shrunk by the damping in the error.
        allowed += self.method.residual
        if not left <= allowed * _SLACK:
            raise GuardFailed(
                f"the step left a gradient of norm {left:.3g}, with the plan's constants it is at most {allowed:.3g}"
                f" (error {round_up(self.method.error()):.3g}): they are not true for this model; plan with a larger"
                " --hessian-lipschitz or a smaller --strong-convexity."
            )

    def _exact(self) -> Network:
        """A float64 copy of the module as it was handed over, with the frozen numbers of now."""
        network = Network(copied(self._pristine), **{**self._settings, "dtype": torch.float64})
        own, mine = network.module.state_dict(), self._module.state_dict()
        with torch.no_grad():
            for name in self._fixed_names(mine):
                own[name].copy_(mine[name])
        return network

    def _objective(self, network: Network, records: NetworkRecords, divisor: int) -> NetworkObjective:
        return NetworkObjective(network, records.rows, records.labels, l2=self._l2, divisor=divisor)

    def _released(self, state: State) -> State:
        state["released"] = published(state["weights"], noise_std=self._plan.noise_std, source=self._source)
        return state
