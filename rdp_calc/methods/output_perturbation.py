"""Output perturbation: publish the model projected to a ball, plus Gaussian noise.

clip(w, C0) + N(0, noise_std^2 I), C0 the radius: two projected models are at most 2 C0 apart, so one Gaussian
mechanism of sensitivity 2 C0 covers any deletion, of any size, from any model (``docs/theory/gaussian.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput
from rdp_calc.fromanymodel import FromAnyModel
from rdp_calc.options import Option, check_known, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.reals import ball


@dataclass(frozen=True, kw_only=True)
class OutputPerturbation(FromAnyModel):
    """init_clip C0 > 0: the norm to which the model is projected before the noise, in parameter units.

    dataset_size, group_size and adjacency are accepted and do not matter. The noise is noise_std.
    """

    init_clip: float

    NAME = "output-perturbation"
    SUMMARY = "Project the model to a ball and add Gaussian noise once."
    BOUNDS = ("gaussian", "classical")
    HAS_STEPS = False
    EXAMPLE = "output-perturbation --epsilon 1 --delta 1e-5 --init-clip 0.5"
    OPTIONS = (
        *SIZE_OPTIONS,
        ADJACENCY_OPTION,
        Option(name="init_clip", kind="float", help="Norm C0 the model is projected to before the noise."),
    )

    def __post_init__(self) -> None:
        if not 0 < self.init_clip < math.inf:
            raise InvalidInput(f"init_clip must be a finite number > 0, got {self.init_clip!r}.")
        super().__post_init__()

    @classmethod
    def from_options(cls, **values: Any) -> OutputPerturbation:
        check_known(values, cls.OPTIONS, cls.NAME)
        return cls(
            init_clip=require(values, "init_clip"),
            **cls.sizes(values),
        )

    def process(self, noise: float) -> NoisyProcess:
        one_step = Phase(contraction=1.0, shift=0.0, noise_std=noise, steps=1)
        return NoisyProcess(phases=(one_step,), initial_distance=2 * ball(self.init_clip))

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

    def parameters(self) -> dict[str, Any]:
        return {"init_clip": self.init_clip}

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> OutputPerturbation:
        return cls(
            init_clip=field(document, "parameters.init_clip", "number"),
            **cls.stored_sizes(document),
        )


METHOD = OutputPerturbation
