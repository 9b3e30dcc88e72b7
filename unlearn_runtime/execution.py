"""How a plan is carried out: chains, device, and the arithmetic of the matrix products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
import torch

from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.methods.langevin import Langevin
from rdp_calc.plan import Plan
from rdp_calc.problem import gradient_gap
from rdp_calc.reals import ball, midpoint, precision
from unlearn_runtime.algorithms.langevin import RoundingGuard
from unlearn_runtime.data import Dataset
from unlearn_runtime.glm import GeneralisedLinearModel
from unlearn_runtime.noise import GaussianSource
from unlearn_runtime.records import Records, prepare_records

#: More chains than any measurement needs; a larger number is a typing error.
MAX_CHAINS = 1_000_000

DTYPES = {"float32": torch.float32, "float64": torch.float64}

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How to run, none of which may change the guarantee except ``seed``, which voids it.

    ``dtype`` None means float32 where its rounding is small enough for the plan, float64 otherwise. ``chains``
    independent chains are run as one batch; chain 0 is the one released. ``retrain`` also runs the reference from the
    start on the retained records.
    """

    chains: int = 1
    device: str = "auto"
    dtype: str | None = None
    seed: int | None = None
    retrain: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.chains <= MAX_CHAINS:
            raise InvalidInput(f"trials must be an integer in 1..{MAX_CHAINS}, got {self.chains!r}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InvalidInput(f"dtype must be float32 or float64, got {self.dtype!r}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidInput(f"seed must be an integer in 0..2^63-1, got {self.seed!r}.")

    def torch_device(self) -> torch.device:
        """The device; raises GuardFailed where it is not there."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise InvalidInput(f"device must be cpu, cuda or auto, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise GuardFailed("device cuda is not available here; use --device cpu.")
        return torch.device("cpu" if self.device == "cpu" or not torch.cuda.is_available() else "cuda")


def check_tails(plan: Plan, source: GaussianSource, coordinates: int) -> None:
    """Raise GuardFailed where the tails that the sampler lacks, over all draws of the released chain, may cost more
    than a thousandth of delta: the two laws move by at most that probability each.
    """
    steps = (plan.executed_learn_steps or 0) + unlearn_steps(plan)
    missing = source.missing_mass * coordinates * steps
    log_cost = math.log(missing or 5e-324) + math.log1p(math.exp(min(plan.target.epsilon, 700.0)))
    if log_cost > math.log(plan.target.delta) - math.log(1000):
        raise GuardFailed(
            f"delta = {plan.target.delta:.3g} is too small for this sampler, whose draws end early with probability"
            f" {missing:.3g} in this run; plan with a larger delta or a smaller epsilon."
        )


def rounding_guard(plan: Plan) -> RoundingGuard:
    """The guard for a plan: its gap, and the share c^K (1 - c^T)/(1 - c^(T+K)) of a learning step's drift that is left
    at the end beside an equal drift in every step. Without learning the runs never part and nothing decays.
    """
    method = _langevin(plan)
    gap = gradient_gap(
        lipschitz=method.constants.lipschitz,
        group_size=method.group_size,
        dataset_size=method.dataset_size,
        adjacency=method.adjacency,
    )
    with precision(128):
        rate = midpoint(-method.contraction().log()) if method.contraction() > 0 else math.inf
    learned, unlearned = method.learn_steps, unlearn_steps(plan)
    decay = 1.0
    if learned > 0:
        decay = math.exp(-rate * unlearned) if unlearned else 1.0
        decay *= math.expm1(-rate * learned) / math.expm1(-rate * (learned + unlearned))
    return RoundingGuard(gap=midpoint(ball(gap)), decay=decay, step_size=method.step_size)


def records_for(
    plan: Plan, dataset: Dataset, ids: Array | None, *, execution: Execution, device: torch.device, guard: RoundingGuard
) -> Records:
    """The records in the dtype asked for, or in float32 where its rounding is well below the limit, else in float64."""
    if execution.dtype is not None:
        return prepare_records(plan, dataset, ids, device=device, dtype=DTYPES[execution.dtype])
    records = prepare_records(plan, dataset, ids, device=device, dtype=torch.float32)
    trial = replace(guard)
    for weights in _trial_weights(records.full, execution.chains, l2=regulariser(plan)):
        trial.measure(records.full, weights)
    # Half the limit, so that the guard does not stop a run that started in float32.
    if trial.largest <= guard.limit / 2:
        return records
    return prepare_records(plan, dataset, ids, device=device, dtype=torch.float64)


def _trial_weights(model: GeneralisedLinearModel, chains: int, *, l2: float) -> list[torch.Tensor]:
    """Zero, and a fixed direction at the largest norm a minimiser can have: (l2/2) ||w||^2 <= F(w) <= F(0) = ln C.

    Fixed, because the choice of the arithmetic must not depend on the noise of the run.
    """
    direction = torch.linspace(-1, 1, model.features * model.outputs, dtype=torch.float64, device=model.rows.device)
    norm = math.sqrt(2 * math.log(max(2, model.outputs)) / l2)
    far = (norm * direction / direction.norm()).view(model.features, model.outputs).repeat(1, chains)
    return [torch.zeros_like(far), far]


def regulariser(plan: Plan) -> float:
    """The coefficient l2 of the plan."""
    l2 = _langevin(plan).constants.l2
    assert l2 is not None
    return l2


def unlearn_steps(plan: Plan) -> int:
    """Unlearning steps of a plan with one request."""
    steps = plan.method.steps
    return steps if isinstance(steps, int) else 0


def _langevin(plan: Plan) -> Langevin:
    assert isinstance(plan.method, Langevin)
    return plan.method
