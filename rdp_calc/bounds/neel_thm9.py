"""Descent-to-delete as published, with a secret state (``docs/theory/neel-thm9.md``)."""

from __future__ import annotations

import math

from flint import arb

from rdp_calc.errors import NotApplicable
from rdp_calc.evidence import Bound, Evidence
from rdp_calc.methods import Method
from rdp_calc.methods.descent_to_delete import DescentToDelete
from rdp_calc.problem import Target
from rdp_calc.reals import ball, midpoint


def published(method: Method, name: str) -> DescentToDelete:
    """The method, where the published theorems cover it; NotApplicable otherwise, with what to change."""
    if not isinstance(method, DescentToDelete):
        raise NotApplicable(f"bound {name} covers descent-to-delete only, not {method.NAME}.")
    if method.convexity != "strongly" or method.rewind:
        raise NotApplicable(f"bound {name} covers strongly convex objectives without --rewind.")
    if method.group_size != 1:
        raise NotApplicable(f"bound {name} covers one record at a time, not a group of {method.group_size}.")
    constants = method.constants
    if method.step_size != 2 / (constants.smoothness + constants.strong_convexity):
        raise NotApplicable(
            f"bound {name} needs the default step size 2/(smoothness + strong-convexity), got {method.step_size!r}."
        )
    return method


def ratio(problem: DescentToDelete) -> arb:
    """g = (L - m)/(L + m), the contraction of the published step."""
    m, L = ball(problem.constants.strong_convexity), ball(problem.constants.smoothness)
    return (L - m) / (L + m)


class NeelTheorem9(Bound):
    """With I unlearning steps of size 2/(L + m) a request, g = (L - m)/(L + m), and the noise

        noise_std = 4 sqrt2 M g^I / (m n (1 - g^I) (sqrt(ln(1/delta) + epsilon) - sqrt(ln(1/delta))))

    on what is published, every release is (epsilon, delta)-indistinguishable from the reference, while the state
    without noise stays secret. For comparison: the exact profile of the same distance needs less.

    Assumes: strongly convex; one record a request; learning of at least I + ln(D m n/(2 M))/ln(1/g) steps, D the
    diameter of the domain (--radius), which an infinite learning phase meets.
    """

    name = "neel-thm9"
    id = "neel/theorem-9/v1"
    summary = "Descent-to-delete with a secret state, as published; for comparison."
    reference = "Neel-Roth-Sharifi-Malvajerdi 2021, arXiv:2007.02923, Theorem 9"

    def check(self, method: Method) -> None:
        super().check(method)
        problem = published(method, self.name)
        if not problem.unlearn_steps:
            raise NotApplicable(f"bound {self.name} needs at least one unlearning step.")
        if problem.learn_steps == math.inf:
            return
        if problem.radius is None:
            raise NotApplicable(f"bound {self.name} with finite --learn-steps needs --radius, for its diameter.")
        g = midpoint(ratio(problem))
        burn = 2 * problem.radius * problem.constants.strong_convexity * problem.dataset_size
        needed = problem.unlearn_steps + math.log(max(burn / (2 * problem.constants.lipschitz), 1)) / -math.log(g)
        if problem.learn_steps < needed:
            raise NotApplicable(f"bound {self.name} needs --learn-steps >= {math.ceil(needed)}.")

    def scale(self, problem: DescentToDelete) -> arb:
        """4 sqrt2 M g^I / (m n (1 - g^I))."""
        constants, power = problem.constants, ratio(problem) ** (problem.unlearn_steps or 0)
        top = 4 * arb(2).sqrt() * ball(constants.lipschitz) * power
        return top / (ball(constants.strong_convexity) * problem.dataset_size * (1 - power))

    def propose_noise(self, method: Method, target: Target) -> float:
        log_inverse = -math.log(target.delta)
        gain = target.epsilon / (math.sqrt(log_inverse + target.epsilon) + math.sqrt(log_inverse))
        return midpoint(self.scale(published(method, self.name))) / gain

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        gain = midpoint(self.scale(published(method, self.name))) / noise
        return gain * (gain + 2 * math.sqrt(-math.log(delta)))

    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        # With y = sqrt(ln(1/delta) + epsilon) - sqrt(ln(1/delta)): ln(1/delta) = ((epsilon - y^2)/(2 y))^2.
        scale = self.scale(published(method, self.name))
        if scale.is_zero():
            return Evidence(delta=arb(0))
        if noise == 0:
            return Evidence(delta=arb(1))
        y = scale / ball(noise)
        room = ball(epsilon) - y**2
        if room <= 0:
            return Evidence(delta=arb(1))
        return Evidence(delta=(-((room / (2 * y)) ** 2)).exp() if room > 0 else arb.nan())


BOUND = NeelTheorem9()
