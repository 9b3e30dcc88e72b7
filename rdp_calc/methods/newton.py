"""Newton unlearning: one Newton step on the retained objective, then noise that covers the error of the step.

w - (H_retained + lambda I)^{-1} grad F_retained(w), lambda >= 0 the damping. Trained to ||grad F(w)|| <= rho, with
linear-solve residual r and a reference trained to rho_R, the error is at most ((L2/2) D^2 + lambda D + r)/(m + lambda)
+ rho_R/m with D = (gap + rho)/m, gap = 2 M S/n (M S/n for zero-out).
(Guo-Goldstein-Hannun-van der Maaten 2020, arXiv:1911.03030; Sekhari-Acharya-Kamath-Suresh 2021, arXiv:2103.03279;
accounting: ``docs/theory/error-bound.md``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flint import arb

from rdp_calc.curvature import OPTIONS, curvature_from, curvature_from_plan
from rdp_calc.documents import field
from rdp_calc.errorbound import Approximation
from rdp_calc.finetune import check_not_negative, check_positive
from rdp_calc.options import Option, check_known, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption, check_sizes, gradient_gap
from rdp_calc.reals import ball

TOLERANCE_OPTIONS = (
    Option(name="tolerance", kind="float", help="Gradient norm rho reached by training."),
    Option(name="residual", kind="float", default="0", help="Norm r of the residual of the linear solve."),
    Option(name="reference_tolerance", kind="float", help="Gradient norm of the reference (default --tolerance)."),
    Option(name="damping", kind="float", default="0", help="Added to the Hessian's diagonal in the step."),
)


@dataclass(frozen=True, kw_only=True)
class Newton(Approximation):
    """tolerance rho, residual r, reference_tolerance rho_R, all gradient norms in loss / parameter; damping lambda in
    loss / parameter^2.
    """

    tolerance: float
    residual: float
    reference_tolerance: float
    damping: float = 0.0

    NAME = "newton"
    SUMMARY = "One Newton step on the retained data, then noise; strongly convex."
    EXAMPLE = (
        "newton --epsilon 1 --delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982 --tolerance 1e-8"
        " --residual 1e-8"
    )
    OPTIONS: ClassVar[tuple[Option, ...]] = (*SIZE_OPTIONS, ADJACENCY_OPTION, *OPTIONS, *TOLERANCE_OPTIONS)

    def __post_init__(self) -> None:
        check_sizes(dataset_size=self.dataset_size, group_size=self.group_size, adjacency=self.adjacency)
        check_positive("strong_convexity", self.curvature.strong_convexity)
        for name in ("tolerance", "residual", "reference_tolerance", "damping"):
            check_not_negative(name, getattr(self, name))

    @classmethod
    def read(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of this class from raw inputs."""
        check_known(values, cls.OPTIONS, cls.NAME)
        tolerance = require(values, "tolerance", ": the gradient norm that training reaches")
        reference = values.get("reference_tolerance")
        return {
            "dataset_size": require(values, "dataset_size"),
            "group_size": 1 if values.get("group_size") is None else values["group_size"],
            "adjacency": require(values, "adjacency"),
            "curvature": curvature_from(values),
            "tolerance": tolerance,
            "residual": 0.0 if values.get("residual") is None else values["residual"],
            "reference_tolerance": tolerance if reference is None else reference,
            "damping": 0.0 if values.get("damping") is None else values["damping"],
        }

    @classmethod
    def from_options(cls, **values: Any) -> Newton:
        return cls(**cls.read(values))

    def gap(self) -> arb:
        """The largest change of the mean gradient by the deletion."""
        return ball(
            gradient_gap(
                lipschitz=self.curvature.lipschitz,
                group_size=self.group_size,
                dataset_size=self.dataset_size,
                adjacency=self.adjacency,
            )
        )

    def error(self) -> arb:
        m, damping = ball(self.curvature.strong_convexity), ball(self.damping)
        distance = (self.gap() + ball(self.tolerance)) / m
        curved = ball(self.curvature.hessian_lipschitz) / 2 * distance**2
        step = (curved + damping * distance + ball(self.residual)) / (m + damping)
        return step + ball(self.reference_tolerance) / m

    @property
    def cost(self) -> int:
        # One pass for the gradient and one for the Hessian.
        return 2 * (self.dataset_size - (self.group_size if self.adjacency == "remove" else 0))

    @property
    def reference(self) -> str:
        return (
            "a model trained without them to a gradient norm of at most"
            f" {self.reference_tolerance!r}, published with the same noise"
        )

    def assumptions(self) -> list[Assumption]:
        reached = "checked in float64 with its rounding bound added, before publishing"
        return [
            *super().assumptions(),
            Assumption(name="tolerance", value=self.tolerance, status="enforced", enforced_by=reached),
            Assumption(name="residual", value=self.residual, status="enforced", enforced_by=reached),
        ]

    def problem(self) -> dict[str, Any]:
        return {**super().problem(), **self._tolerances()}

    def _tolerances(self) -> dict[str, float]:
        found = {name: getattr(self, name) for name in ("tolerance", "residual", "reference_tolerance")}
        # Shown only where there is one, so that older plans read the same.
        return {**found, "damping": self.damping} if self.damping else found

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.problem_of_plan(), self._tolerances()

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> Newton:
        return cls(
            dataset_size=field(document, "problem.dataset_size", "integer"),
            group_size=field(document, "problem.group_size", "integer"),
            adjacency=field(document, "adjacency", "text"),
            curvature=curvature_from_plan(document),
            tolerance=field(document, "parameters.tolerance", "number"),
            residual=field(document, "parameters.residual", "number"),
            reference_tolerance=field(document, "parameters.reference_tolerance", "number"),
            damping=field(document, "parameters.damping", "number", optional=True) or 0.0,
        )


METHOD = Newton
