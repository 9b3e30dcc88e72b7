"""DP-SGD: training that is private by itself, so that a deletion needs no work at all.

Every step samples each record with probability q = b/n independently (Poisson), clips each record's gradient to a norm,
sums them and adds Gaussian noise of z times that norm. The model trained on all records is then indistinguishable from
one trained without any group of k of them (``docs/theory/pld.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from flint import arb

from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput, NotApplicable
from rdp_calc.methods import MAX_STEPS, Method
from rdp_calc.options import Option, check_known, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption, check_sizes
from rdp_calc.reals import ball


@dataclass(frozen=True, kw_only=True)
class DpSgd(Method):
    """batch_size b <= n is the expected size of a Poisson batch, training_steps the number of noisy steps.

    The noise is noise_multiplier z; noise_std is the same number, the standard deviation of the noise on the SUM of
    clipped gradients in units of the clip norm (in gradient units multiply by the clip norm, on the mean divide by b).

    adjacency is remove or zero-out, which are the same here: b, q and the divisor of the sum are numbers fixed before
    training, so a removed record and one whose gradient is zero leave the same sum. The guarantee holds in both
    directions, adding the group and removing it. replace is refused.
    """

    dataset_size: int
    adjacency: str
    batch_size: int
    training_steps: int
    group_size: int = 1

    NAME = "dp-sgd"
    SUMMARY = "Train with DP-SGD; nothing to do at a deletion."
    NOISE = "noise_multiplier"
    BOUNDS = ("pld", "rdp", "group-generic")
    HAS_STEPS = False
    REMOVES_NOTHING = True
    NEEDS_PREPARATION = True
    EXAMPLE = "dp-sgd --epsilon 3 --delta 1e-5 --dataset-size 60000 --batch-size 256 --epochs 60"
    OPTIONS = (
        *SIZE_OPTIONS,
        ADJACENCY_OPTION,
        Option(name="batch_size", kind="int", help="Expected records b in a Poisson batch; each is drawn with b/n."),
        Option(name="epochs", kind="float", help="Passes over the data; steps = floor(epochs n / b)."),
        Option(name="steps", kind="int", help="Training steps, instead of epochs."),
    )

    def __post_init__(self) -> None:
        if self.adjacency == "replace":
            raise NotApplicable("dp-sgd has no formula for replace adjacency; use --adjacency remove or zero-out.")
        check_sizes(dataset_size=self.dataset_size, group_size=self.group_size, adjacency=self.adjacency)
        for name, value, most in (
            ("batch_size", self.batch_size, self.dataset_size),
            ("steps", self.training_steps, MAX_STEPS),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InvalidInput(f"{name} must be an integer in 1..{most}, got {value!r}.")

    @classmethod
    def from_options(cls, **values: Any) -> DpSgd:
        check_known(values, cls.OPTIONS, cls.NAME)
        size, batch = require(values, "dataset_size"), require(values, "batch_size")
        epochs, steps = values.get("epochs"), values.get("steps")
        if (epochs is None) == (steps is None):
            raise InvalidInput("dp-sgd needs exactly one of --epochs and --steps.")
        return cls(
            dataset_size=size,
            adjacency=require(values, "adjacency"),
            batch_size=batch,
            training_steps=require(values, "steps") if epochs is None else steps_of(epochs, size, batch),
            group_size=1 if values.get("group_size") is None else values["group_size"],
        )

    @property
    def sampling_rate(self) -> float:
        return self.batch_size / self.dataset_size

    def noise_std(self, noise: float) -> arb:
        return ball(noise)

    @property
    def adjacency_shown(self) -> str:
        return self.adjacency

    @property
    def steps(self) -> None:
        return None

    @property
    def cost(self) -> int:
        return 0

    def assumptions(self) -> list[Assumption]:
        return [
            Assumption(
                name="sampling",
                value=f"Poisson: each record joins each batch independently with probability"
                f" {self.batch_size}/{self.dataset_size}",
                status="enforced",
                enforced_by="the run draws batches this way and no other",
            ),
            Assumption(
                name="clipping",
                value="each record's gradient is clipped to the clip norm before the sum",
                status="enforced",
                enforced_by="the run clips record by record; layers that mix records are refused",
            ),
            Assumption(
                name="noise",
                value="fresh Gaussian noise of noise_multiplier x clip norm on every sum, empty batches included",
                status="enforced",
                enforced_by="the run adds it",
            ),
            Assumption(
                name="fixed_numbers",
                value="sampling rate, clip norm, steps and the divisor of the sum do not depend on the records",
                status="enforced",
                enforced_by="they are in the plan; the reference run without the group uses the same numbers",
            ),
        ]

    def problem(self) -> dict[str, Any]:
        return {
            "dataset_size": self.dataset_size,
            "group_size": self.group_size,
            "adjacency": self.adjacency,
            "batch_size": self.batch_size,
            "training_steps": self.training_steps,
        }

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        problem = {"dataset_size": self.dataset_size, "group_size": self.group_size}
        return problem, {"batch_size": self.batch_size, "training_steps": self.training_steps}

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> DpSgd:
        return cls(
            dataset_size=field(document, "problem.dataset_size", "integer"),
            group_size=field(document, "problem.group_size", "integer"),
            adjacency=field(document, "adjacency", "text"),
            batch_size=field(document, "parameters.batch_size", "integer"),
            training_steps=field(document, "parameters.training_steps", "integer"),
        )


def steps_of(epochs: float | int, dataset_size: int, batch_size: int) -> int:
    """floor(epochs n / b), in exact arithmetic."""
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 < epochs < math.inf:
        raise InvalidInput(f"epochs must be a finite number > 0, got {epochs!r}.")
    for name, value in (("dataset_size", dataset_size), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"{name} must be an integer >= 1, got {value!r}.")
    steps = math.floor(Fraction(epochs) * dataset_size / batch_size)
    if steps < 1:
        raise InvalidInput(f"{epochs!r} epochs of {dataset_size} records in batches of {batch_size} are not one step.")
    return steps


METHOD = DpSgd
