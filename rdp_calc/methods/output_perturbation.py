"""Output perturbation: publish the model projected to a ball, plus Gaussian noise.

clip(w, C0) + N(0, noise_std^2 I), C0 the radius: two projected models are at most 2 C0 apart, so one Gaussian
mechanism of sensitivity 2 C0 covers any deletion, of any size, from any model (``docs/theory/gaussian.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flint import arb

from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput
from rdp_calc.methods import Method
from rdp_calc.options import Option, check_known, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption, check_any_group
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.reals import ball


@dataclass(frozen=True, kw_only=True)
class OutputPerturbation(Method):
    """init_clip C0 > 0: the norm to which the model is projected before the noise, in parameter units.

    dataset_size, group_size and adjacency are accepted and do not matter. The noise is noise_std.
    """

    init_clip: float
    dataset_size: int | None = None
    group_size: int = 1

    NAME = "output-perturbation"
    SUMMARY = "Project the model to a ball and add Gaussian noise once."
    NOISE = "noise_std"
    BOUNDS = ("gaussian", "classical")
    HAS_STEPS = False
    NEEDS_PREPARATION = False
    EXAMPLE = "output-perturbation --epsilon 1 --delta 1e-5 --init-clip 0.5"
    OPTIONS = (
        *SIZE_OPTIONS,
        ADJACENCY_OPTION,
        Option(name="init_clip", kind="float", help="Norm C0 the model is projected to before the noise."),
    )

    def __post_init__(self) -> None:
        if not 0 < self.init_clip < math.inf:
            raise InvalidInput(f"init_clip must be a finite number > 0, got {self.init_clip!r}.")
        check_any_group(self.dataset_size, self.group_size)

    @classmethod
    def from_options(cls, **values: Any) -> OutputPerturbation:
        check_known(values, cls.OPTIONS, cls.NAME)
        return cls(
            init_clip=require(values, "init_clip"),
            dataset_size=values.get("dataset_size"),
            group_size=1 if values.get("group_size") is None else values["group_size"],
        )

    def noise_std(self, noise: float) -> arb:
        return ball(noise)

    def process(self, noise: float) -> NoisyProcess:
        one_step = Phase(contraction=1.0, shift=0.0, noise_std=noise, steps=1)
        return NoisyProcess(phases=(one_step,), initial_distance=2 * ball(self.init_clip))

    @property
    def adjacency_shown(self) -> str:
        return "any"

    @property
    def steps(self) -> None:
        return None

    @property
    def cost(self) -> int:
        return 0

    def assumptions(self) -> list[Assumption]:
        return [
            Assumption(
                name="init_clip", value=self.init_clip, status="enforced", enforced_by="the model is projected first"
            )
        ]

    def problem(self) -> dict[str, Any]:
        return {
            "dataset_size": self.dataset_size,
            "group_size": self.group_size,
            "adjacency": "any",
            "init_clip": self.init_clip,
        }

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        problem = {"dataset_size": self.dataset_size, "group_size": self.group_size}
        return problem, {"init_clip": self.init_clip}

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> OutputPerturbation:
        return cls(
            init_clip=field(document, "parameters.init_clip", "number"),
            dataset_size=field(document, "problem.dataset_size", "integer", optional=True),
            group_size=field(document, "problem.group_size", "integer"),
        )


METHOD = OutputPerturbation
