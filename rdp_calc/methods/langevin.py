"""Langevin unlearning: full-batch noisy gradient descent.

Learn T steps on D, then K more on the retained data: w <- w - eta grad F(w) + sigma sqrt(2 eta) N(0, I). While the
forgotten records are in the objective the two runs drift by s = eta x (2 M S / n, or M S / n for zero-out) per step.
The step contracts by max(|1 - eta m|, |1 - eta L|) < 1 on a strongly convex objective, not at all on a convex one, and
may expand by 1 + eta L otherwise; the last two need a radius or finitely many steps. (Method: Chien-Wang-Chen-Li 2024,
arXiv:2401.10371; accounting: shifted composition, ``docs/theory/shifted.md``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flint import arb

from rdp_calc.descent import COMMON_OPTIONS, FINAL_ITERATE, REAL_ARITHMETIC, SHAPE_OPTIONS, Descent
from rdp_calc.options import Option
from rdp_calc.problem import Assumption
from rdp_calc.process import Cycle, Phase
from rdp_calc.reals import Real, ball
from rdp_calc.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Langevin(Descent):
    """Full-batch noisy gradient descent. The noise is sigma; the standard deviation added per step is
    sigma sqrt(2 eta). The other fields are those of ``Descent``.
    """

    NAME = "langevin"
    SUMMARY = "Full-batch noisy gradient descent (Langevin), strongly convex, convex or smooth only."
    NOISE = "sigma"
    BOUNDS = ("shifted", "lsi-sharp", "lsi-published", "contraction")
    EXAMPLE = (
        "langevin --epsilon 1 --delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982 --step-size 1/L"
        " --unlearn-steps 1"
    )
    OPTIONS = (
        *COMMON_OPTIONS,
        Option(name="learn_steps", kind="steps", default="inf", help="Learning steps T accounted for; inf covers all."),
        Option(name="unlearn_steps", kind="int", help="Unlearning steps K on the retained data."),
        *SHAPE_OPTIONS,
    )

    @classmethod
    def from_options(cls, **values: Any) -> Langevin:
        return cls(**cls.read(values))

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> Langevin:
        return cls(**cls.stored(document))

    def noise_std(self, noise: float) -> arb:
        return ball(noise) * (2 * ball(self.step_size)).sqrt()

    def turn(self, remaining: int, removed: int, noise_std: Real, times: int | float) -> tuple[Phase | Cycle, ...]:
        present = self.dataset_size - (removed if self.drops else 0)
        return (
            Phase(
                contraction=self.contraction(),
                shift=self.shift_of(remaining, present),
                noise_std=noise_std,
                steps=times,
                alternative=self.alternative(),
            ),
        )

    def sequence(self) -> Sequence | None:
        return self.closed_form(steps_per_turn=1, noise_std=self.noise_std(1.0))

    def assumptions(self) -> list[Assumption]:
        return [*super().assumptions(), REAL_ARITHMETIC, FINAL_ITERATE]


METHOD = Langevin
