"""Optimise to a gradient norm, then publish with noise: any solver, a strongly convex objective.

Train until the gradient of the retained objective has norm at most g and publish w + N(0, noise_std^2 I). Both runs end
within g/m of the one optimum, so they are at most 2 g/m apart, whatever n, the group or the solver
(``docs/theory/gaussian.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rdp_calc import losses
from rdp_calc.documents import field
from rdp_calc.finetune import check_positive
from rdp_calc.fromanymodel import FromAnyModel
from rdp_calc.losses import Constants
from rdp_calc.options import Option, check_known, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.reals import ball


@dataclass(frozen=True, kw_only=True)
class GradientNorm(FromAnyModel):
    """tolerance g: the norm of the retained objective's gradient at which the solver stops. The noise is noise_std.

    Of the constants only strong_convexity matters; smoothness, where known, bounds the cost.
    """

    tolerance: float
    constants: Constants

    NAME = "gradient-norm"
    SUMMARY = "Solve to a gradient norm on the retained data, then add noise once; strongly convex."
    BOUNDS = ("gaussian",)
    HAS_STEPS = False
    EXAMPLE = "gradient-norm --epsilon 1 --delta 1e-5 --loss logistic --l2 0.011982 --tolerance 1e-10"
    OPTIONS = (
        *SIZE_OPTIONS,
        ADJACENCY_OPTION,
        *losses.OPTIONS,
        Option(name="tolerance", kind="float", help="Gradient norm g at which the solver stops."),
    )

    def __post_init__(self) -> None:
        check_positive("tolerance", self.tolerance)
        check_positive("strong_convexity", self.constants.strong_convexity)
        super().__post_init__()

    @classmethod
    def from_options(cls, **values: Any) -> GradientNorm:
        check_known(values, cls.OPTIONS, cls.NAME)
        typed = values.get("strong_convexity")
        if typed is not None and values.get("loss") is None and values.get("smoothness") is None:
            # Only m matters; the others are set so that nothing is claimed of them.
            values = {**values, "smoothness": max(typed, 1e300), "lipschitz": values.get("lipschitz") or 1e300}
        return cls(
            tolerance=require(values, "tolerance"),
            constants=losses.constants_from(values),
            **cls.sizes(values),
        )

    def process(self, noise: float) -> NoisyProcess:
        release = Phase(contraction=1.0, shift=0.0, noise_std=noise, steps=1)
        return NoisyProcess(
            phases=(release,), initial_distance=2 * ball(self.tolerance) / ball(self.constants.strong_convexity)
        )

    @property
    def reference(self) -> str:
        return (
            "any model trained without them to a gradient norm of at most"
            f" {self.tolerance!r}, published with the same noise"
        )

    @property
    def steps(self) -> None:
        return None

    @property
    def cost(self) -> int | None:
        """At most the gradient evaluations that plain gradient descent needs from the model before; solvers of second
        order need a few dozen passes."""
        if self.dataset_size is None or self.constants.loss is None:
            return None
        m, L = self.constants.strong_convexity, self.constants.smoothness
        gap = 2 * self.constants.lipschitz * self.group_size / self.dataset_size
        start = L / m * (gap + self.tolerance) / self.tolerance
        shrinks = 2 * m / (L + m)
        if not (shrinks < 1 and start < math.inf):
            return self.dataset_size
        return self.dataset_size * math.ceil(math.log(start) / -math.log1p(-shrinks))

    def assumptions(self) -> list[Assumption]:
        listed = [a for a in self.constants.assumptions() if a.name == "strong_convexity"]
        return [
            *listed,
            Assumption(
                name="tolerance",
                value=self.tolerance,
                status="enforced",
                enforced_by="the gradient norm is computed in float64 with its rounding bound added before publishing",
            ),
        ]

    def problem(self) -> dict[str, Any]:
        return {**super().problem(), **self.constants.to_json()}

    def parameters(self) -> dict[str, Any]:
        return {"tolerance": self.tolerance}

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        problem, parameters = super().to_plan()
        return {**problem, **self.constants.to_plan()}, parameters

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> GradientNorm:
        return cls(
            tolerance=field(document, "parameters.tolerance", "number"),
            constants=losses.constants_from_plan(document),
            **cls.stored_sizes(document),
        )


METHOD = GradientNorm
