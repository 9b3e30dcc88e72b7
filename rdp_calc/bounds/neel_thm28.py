"""Descent-to-delete as published, without a secret state (``docs/theory/neel-thm28.md``)."""

from __future__ import annotations

import math

from flint import arb

from rdp_calc.bounds.neel_thm9 import published, ratio
from rdp_calc.errors import NotApplicable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.methods import Method
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.problem import Target
from rdp_calc.reals import at_most, ball, midpoint
from rdp_calc.search import root, smallest_passing


class NeelTheorem28(Bound):
    """The released model itself is continued from (no secret state). Request i runs
    T_i = I + ln ln(4 d i/delta)/ln(1/g) steps of size 2/(L + m), g = (L - m)/(L + m), d the number of parameters, and
    adds

        noise_std = 8 M g^I / ((1 - g^I) m n (sqrt(2 ln(2/delta) + 3 epsilon) - sqrt(2 ln(2/delta) + 2 epsilon))).

    Here unlearn_steps is T_1, the number really run. For comparison.

    Assumes: strongly convex; one record a request; infinite learning; --dimension; and
    I >= ln(sqrt(2 d)/((1 - g)(sqrt(2 ln(2/delta) + epsilon) - sqrt(2 ln(2/delta)))))/ln(1/g).
    """

    name = "neel-thm28"
    id = "neel/theorem-28/v1"
    summary = "Descent-to-delete without a secret state, as published; for comparison."
    reference = "Neel-Roth-Sharifi-Malvajerdi 2021, arXiv:2007.02923, Theorem 28"

    def check(self, method: Method) -> None:
        super().check(method)
        problem = published(method, self.name)
        if problem.dimension is None:
            raise NotApplicable(f"bound {self.name} needs --dimension, the number of parameters.")
        if problem.learn_steps != math.inf:
            raise NotApplicable(f"bound {self.name} needs --learn-steps inf.")

    def propose_noise(self, method: Method, target: Target) -> float:
        scale, problem = self._scale(method, target.delta), published(method, self.name)
        if not self._long_enough(problem, target.epsilon, target.delta):
            return math.inf
        twice = 2 * math.log(2 / target.delta)
        gain = target.epsilon / (math.sqrt(twice + 3 * target.epsilon) + math.sqrt(twice + 2 * target.epsilon))
        return midpoint(scale) / gain

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        scale, twice = midpoint(self._scale(method, delta)) / noise, 2 * math.log(2 / delta)
        return root(lambda e: scale - e / (math.sqrt(twice + 3 * e) + math.sqrt(twice + 2 * e)), 1.0)

    def meets(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        delta: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> bool:
        # I depends on delta, so the theorem is checked at the target itself.
        problem = published(method, self.name)
        if epsilon == 0 or noise == 0 or not self._long_enough(problem, epsilon, delta):
            return False

        def lacking() -> arb:
            twice = 2 * (2 / ball(delta)).log()
            gain = (twice + 3 * ball(epsilon)).sqrt() - (twice + 2 * ball(epsilon)).sqrt()
            return self._scale(method, delta) - ball(noise) * gain

        return at_most(lacking, 0)

    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        """The smallest delta, as a double, at which the theorem holds."""
        if noise == 0 or epsilon == 0:
            return Evidence(delta=arb(1))
        found = smallest_passing(lambda delta: delta < 1 and self.meets(method, noise, epsilon, delta), 1e-6)
        return Evidence(delta=ball(found.value) if found is not None else arb(1))

    def floor(self, method: Method, target: Target) -> str:
        return "raise --unlearn-steps until I is as large as the theorem asks (rdp-calc explain neel-thm28)"

    def _inner_steps(self, problem: DescentToDelete, delta: float) -> arb:
        """I = T_1 - ln ln(4 d/delta)/ln(1/g)."""
        dimension = problem.dimension or 1
        return arb(problem.unlearn_steps or 0) + (4 * dimension / ball(delta)).log().log() / ratio(problem).log()

    def _long_enough(self, problem: DescentToDelete, epsilon: float, delta: float) -> bool:

        def missing() -> arb:
            g, twice = ratio(problem), 2 * (2 / ball(delta)).log()
            gain = (1 - g) * ((twice + ball(epsilon)).sqrt() - twice.sqrt())
            needed = (arb(2 * (problem.dimension or 1)).sqrt() / gain).log() / -g.log()
            return needed.max(arb("0.001")) - self._inner_steps(problem, delta)

        return at_most(missing, 0)

    def _scale(self, method: Method, delta: float) -> arb:
        problem = published(method, self.name)
        constants, power = problem.constants, ratio(problem) ** self._inner_steps(problem, delta)
        return (
            8
            * ball(constants.lipschitz)
            * power
            / ((1 - power) * ball(constants.strong_convexity) * problem.dataset_size)
        )


BOUND = NeelTheorem28()
