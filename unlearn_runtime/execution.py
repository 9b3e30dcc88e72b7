"""How a plan is carried out, none of which may change what the plan guarantees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from rdp_calc.errors import GuardFailed, InvalidInput
from rdp_calc.methods.dp_sgd import DpSgd
from rdp_calc.methods.model_clip import ModelClip
from rdp_calc.methods.noisy_finetune import NoisyFinetune
from rdp_calc.methods.noisy_sgd import NoisySgd
from rdp_calc.plan import Plan
from unlearn_runtime.noise import GaussianSource

#: More chains than any measurement needs; a larger number is a typing error.
MAX_CHAINS = 1_000_000

DTYPES = {"float32": torch.float32, "float64": torch.float64}

RETRAIN = ("fresh", "zeros", "noised")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How to run. ``seed`` and ``published_clip`` void the guarantee, and the certificate says so.

    ``dtype`` None means float32, and for GLMs float64 where float32's rounding is too large for the plan. ``chains``
    independent chains are run, for GLMs as one batch; chain 0 is the one released. ``retrain`` also runs a reference on
    the retained records: fresh (the same pipeline from the start), zeros (from zero weights), noised (from the model
    clipped and noised). ``secure_noise`` draws from a cryptographic stream. ``published_clip`` clips each record's
    gradient, regulariser included, as published code does. ``checkpoint``: a file the run saves to every
    ``checkpoint_seconds`` and resumes from. ``log``: a JSON-lines file; ``tensorboard``: a folder; both are private.
    """

    chains: int = 1
    device: str = "auto"
    dtype: str | None = None
    seed: int | None = None
    retrain: str | None = None
    secure_noise: bool = False
    published_clip: float | None = None
    checkpoint: Path | None = None
    checkpoint_seconds: float = 60.0
    log: Path | None = None
    tensorboard: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.chains <= MAX_CHAINS:
            raise InvalidInput(f"trials must be an integer in 1..{MAX_CHAINS}, got {self.chains!r}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InvalidInput(f"dtype must be float32 or float64, got {self.dtype!r}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidInput(f"seed must be an integer in 0..2^63-1, got {self.seed!r}.")
        if self.seed is not None and self.secure_noise:
            raise InvalidInput("--seed and --secure-noise conflict: a seeded stream is not secret.")
        if self.retrain is not None and self.retrain not in RETRAIN:
            raise InvalidInput(f"retrain must be one of {', '.join(RETRAIN)}, got {self.retrain!r}.")
        for name in ("published_clip", "checkpoint_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidInput(f"{name} must be a finite number > 0, got {value!r}.")

    @property
    def model_dtype(self) -> torch.dtype:
        """The precision a network computes in."""
        return DTYPES[self.dtype or "float32"]

    def torch_device(self) -> torch.device:
        """The device; raises GuardFailed where it is not there."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise InvalidInput(f"device must be cpu, cuda or auto, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise GuardFailed("device cuda is not available here; use --device cpu.")
        return torch.device("cpu" if self.device == "cpu" or not torch.cuda.is_available() else "cuda")


def noisy_steps(plan: Plan) -> int:
    """Steps of the released chain that draw noise for every coordinate, learning included."""
    method = plan.method
    if isinstance(method, NoisyFinetune):
        return method.accounted()
    if isinstance(method, ModelClip):
        return method.unlearn_steps + 1
    if isinstance(method, DpSgd):
        return method.training_steps
    asked = method.steps
    turns = sum(asked) if isinstance(asked, tuple) else asked or 0
    turns += plan.executed_learn_steps or 0
    return turns * (method.batches if isinstance(method, NoisySgd) else 1) + 1


def check_tails(plan: Plan, source: GaussianSource, coordinates: int, *, earlier: float = 0.0) -> None:
    """Raise GuardFailed where the tails that the sampler lacks, over all draws of the released chain, may cost more
    than a thousandth of delta: the two laws move by at most that probability each. ``earlier``: the missing mass of the
    samplers of the runs that this one goes on from.
    """
    missing = max(source.missing_mass, earlier) * coordinates * noisy_steps(plan)
    log_cost = math.log(missing or 5e-324) + math.log1p(math.exp(min(plan.target.epsilon, 700.0)))
    if log_cost > math.log(plan.target.delta) - math.log(1000):
        raise GuardFailed(
            f"delta = {plan.target.delta:.3g} is too small for this sampler, whose draws end early with probability"
            f" {missing:.3g} in this run; plan with a larger delta or a smaller epsilon."
        )
