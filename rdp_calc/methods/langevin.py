"""Langevin unlearning: full-batch noisy gradient descent on a strongly convex smooth loss.

Learn T steps on D, then K more on the retained data: w <- w - eta grad F(w) + sigma sqrt(2 eta) N(0, I). The step map
contracts by c = max(|1 - eta m|, |1 - eta L|) < 1, and while the forgotten records are in the objective the two runs
drift by s = eta x (2 M S / n, or M S / n for zero-out) per step. (Method: Chien-Wang-Chen-Li 2024, arXiv:2401.10371;
accounting: shifted composition, ``docs/theory/shifted.md``.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from flint import arb

from rdp_calc import losses
from rdp_calc.documents import field
from rdp_calc.errors import InvalidInput, NotApplicable
from rdp_calc.methods import Method
from rdp_calc.options import Option, check_known, read_float, require
from rdp_calc.problem import ADJACENCY_OPTION, SIZE_OPTIONS, Assumption, check_sizes, gradient_gap
from rdp_calc.process import NoisyProcess, Phase
from rdp_calc.reals import at_most, ball

#: Largest finite number of steps accepted; beyond it use inf.
MAX_STEPS = 10**15


@dataclass(frozen=True, kw_only=True)
class Langevin(Method):
    """dataset_size n, group_size S, adjacency, the constants, step_size eta, learn_steps T (inf allowed) and
    unlearn_steps K >= 0. The noise is sigma; the standard deviation added per step is sigma sqrt(2 eta).

    Raises InvalidInput for a number out of its domain, NotApplicable where the step does not contract
    (step_size >= 2 / smoothness).
    """

    dataset_size: int
    group_size: int
    adjacency: str
    constants: losses.Constants
    step_size: float
    learn_steps: int | float
    unlearn_steps: int

    NAME = "langevin"
    SUMMARY = "Full-batch noisy gradient descent (Langevin) on a strongly convex smooth loss."
    NOISE = "sigma"
    BOUNDS = ("shifted", "lsi-published")
    HAS_STEPS = True
    NEEDS_PREPARATION = True
    EXAMPLE = (
        "langevin --epsilon 1 --delta 1/n --dataset-size 11982 --loss logistic --l2 0.011982 --step-size 1/L"
        " --unlearn-steps 1"
    )
    OPTIONS = (
        *SIZE_OPTIONS,
        ADJACENCY_OPTION,
        *losses.OPTIONS,
        Option(name="step_size", kind="text", help="Step size eta: a number or 1/L (default 2/(L + m))."),
        Option(name="learn_steps", kind="steps", default="inf", help="Learning steps T accounted for; inf covers all."),
        Option(name="unlearn_steps", kind="int", help="Unlearning steps K on the retained data."),
    )

    def __post_init__(self) -> None:
        check_sizes(dataset_size=self.dataset_size, group_size=self.group_size, adjacency=self.adjacency)
        if not 0 < self.step_size < math.inf:
            raise InvalidInput(f"step_size must be a finite number > 0, got {self.step_size!r}.")
        if not (self.learn_steps == math.inf or self._is_step_count(self.learn_steps)):
            raise InvalidInput(f"learn_steps must be an integer in 0..{MAX_STEPS} or inf, got {self.learn_steps!r}.")
        if not self._is_step_count(self.unlearn_steps):
            raise InvalidInput(f"unlearn_steps must be an integer in 0..{MAX_STEPS}, got {self.unlearn_steps!r}.")
        if at_most(lambda: 2 - ball(self.step_size) * ball(self.constants.smoothness), 0):
            raise NotApplicable(
                f"step_size {self.step_size!r} does not contract: it must be below 2/smoothness ="
                f" {2 / self.constants.smoothness!r}."
            )

    @staticmethod
    def _is_step_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEPS

    @classmethod
    def from_options(cls, **values: Any) -> Langevin:
        check_known(values, cls.OPTIONS, cls.NAME)
        constants = losses.constants_from(values)
        return cls(
            dataset_size=require(values, "dataset_size"),
            group_size=1 if values.get("group_size") is None else values["group_size"],
            adjacency=require(values, "adjacency"),
            constants=constants,
            step_size=read_step_size(values.get("step_size"), constants),
            learn_steps=math.inf if values.get("learn_steps") is None else values["learn_steps"],
            unlearn_steps=require(values, "unlearn_steps"),
        )

    def contraction(self) -> arb:
        """An enclosure of c = max(|1 - eta m|, |1 - eta L|)."""
        eta = ball(self.step_size)
        slow, fast = 1 - eta * ball(self.constants.strong_convexity), 1 - eta * ball(self.constants.smoothness)
        return abs(slow).max(abs(fast))

    def shift(self) -> arb:
        """An enclosure of the distance one learning step can open, in parameter units."""
        gap = gradient_gap(
            lipschitz=self.constants.lipschitz,
            group_size=self.group_size,
            dataset_size=self.dataset_size,
            adjacency=self.adjacency,
        )
        return ball(self.step_size) * ball(gap)

    def noise_std(self, noise: float) -> arb:
        return ball(noise) * (2 * ball(self.step_size)).sqrt()

    def process(self, noise: float) -> NoisyProcess:
        contraction, noise_std = self.contraction(), self.noise_std(noise)
        return NoisyProcess(
            phases=(
                Phase(contraction=contraction, shift=self.shift(), noise_std=noise_std, steps=self.learn_steps),
                Phase(contraction=contraction, shift=0.0, noise_std=noise_std, steps=self.unlearn_steps),
            )
        )

    def with_unlearn_steps(self, steps: int) -> Langevin:
        return replace(self, unlearn_steps=steps)

    @property
    def adjacency_shown(self) -> str:
        return self.adjacency

    @property
    def steps(self) -> int:
        return self.unlearn_steps

    @property
    def cost(self) -> int:
        retained = self.dataset_size - (self.group_size if self.adjacency == "remove" else 0)
        return self.unlearn_steps * retained

    def assumptions(self) -> list[Assumption]:
        listed = self.constants.assumptions()
        if self.constants.feature_norm is not None:
            listed.append(
                Assumption(
                    name="feature_norm",
                    value=self.constants.feature_norm,
                    status="enforced",
                    enforced_by="rows longer than this are scaled down, or refused with preprocess none",
                )
            )
        listed += [
            Assumption(
                name="real_arithmetic",
                value="rounding adds at most 0.1 % to mu",
                status="enforced",
                enforced_by="rounding errors of gradients are measured or bounded during the run, which stops above it",
            ),
            Assumption(
                name="only_final_iterate",
                value="no iterate before the last one is released",
                status="enforced",
                enforced_by="an unlearn run writes the last iterate only; the model of a learn run is not for release",
            ),
        ]
        return listed

    def problem(self) -> dict[str, Any]:
        return {
            "dataset_size": self.dataset_size,
            "group_size": self.group_size,
            "adjacency": self.adjacency,
            **self.constants.to_json(),
            "step_size": self.step_size,
            "learn_steps": self.learn_steps,
            "unlearn_steps": self.unlearn_steps,
        }

    def to_plan(self) -> tuple[dict[str, Any], dict[str, Any]]:
        problem = {"dataset_size": self.dataset_size, "group_size": self.group_size, **self.constants.to_plan()}
        parameters = {
            "step_size": self.step_size,
            "learn_steps": self.learn_steps,
            "unlearn_steps": self.unlearn_steps,
        }
        return problem, parameters

    @classmethod
    def from_plan(cls, document: dict[str, Any]) -> Langevin:
        return cls(
            dataset_size=field(document, "problem.dataset_size", "integer"),
            group_size=field(document, "problem.group_size", "integer"),
            adjacency=field(document, "adjacency", "text"),
            constants=losses.constants_from_plan(document),
            step_size=field(document, "parameters.step_size", "number"),
            learn_steps=field(document, "parameters.learn_steps", "steps"),
            unlearn_steps=field(document, "parameters.unlearn_steps", "integer"),
        )


def read_step_size(value: str | float | None, constants: losses.Constants) -> float:
    """A step size from a number, its text, the literal 1/L, or None (2 / (smoothness + strong_convexity)).

    1/L gives the largest double whose product with the smoothness is at most 1.
    """
    if value is None:
        return 2 / (constants.smoothness + constants.strong_convexity)
    if isinstance(value, str):
        if value.strip() == "1/L":
            step = math.nextafter(1 / constants.smoothness, math.inf)
            while not product_at_most_one(step, constants.smoothness):
                step = math.nextafter(step, 0.0)
            return step
        return read_float("--step-size", value)
    return value


def product_at_most_one(first: float, second: float) -> bool:
    """Whether the exact product of two doubles is at most 1."""
    return at_most(lambda: ball(first) * ball(second), 1)


METHOD = Langevin
