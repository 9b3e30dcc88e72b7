"""Infinitesimal jackknife: a Newton step with the Hessian of the full objective, computed before any request.

Zero-out adjacency only. Besides the error of the Newton step it leaves ((S L1/n) (M S/n)/(m + lambda) + rho)/(m +
lambda), S the forgotten records of n, L1 the smoothness of one record's loss, lambda the damping (Giordano et al. 2019,
arXiv:1806.00550; Suriyakumar-Wilson 2022, arXiv:2207.04806; accounting: ``docs/theory/error-bound.md``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flint import arb

from rdp_calc.errors import NotApplicable
from rdp_calc.methods.newton import Newton
from rdp_calc.options import Option
from rdp_calc.reals import ball


@dataclass(frozen=True, kw_only=True)
class Jackknife(Newton):
    """The fields of ``Newton``; adjacency must be zero-out."""

    NAME = "jackknife"
    SUMMARY = "Newton step with the Hessian of the full data, precomputed; zero-out, strongly convex."
    EXAMPLE = (
        "jackknife --epsilon 1 --delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982 --tolerance 1e-8"
        " --residual 1e-8"
    )

    OPTIONS: ClassVar[tuple[Option, ...]] = tuple(
        replace(o, default="zero-out") if o.name == "adjacency" else o for o in Newton.OPTIONS
    )

    def __post_init__(self) -> None:
        if self.adjacency in ("remove", "replace"):
            raise NotApplicable(f"jackknife is proved for --adjacency zero-out only, got {self.adjacency}.")
        super().__post_init__()

    def error(self) -> arb:
        damped = ball(self.curvature.strong_convexity) + ball(self.damping)
        share = arb(self.group_size) / (damped * self.dataset_size)
        wrong_hessian = share * self.curvature.record_smoothness * share * ball(self.curvature.lipschitz)
        return super().error() + wrong_hessian + ball(self.tolerance) / damped

    @property
    def cost(self) -> int:
        # Gradients of the forgotten records; the Hessian was factored before.
        return self.group_size


METHOD = Jackknife
