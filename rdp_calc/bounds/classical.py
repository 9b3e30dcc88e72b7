"""The classical calibration of the Gaussian mechanism, for comparison: noise_std = w sqrt(2 ln(1.25/delta)) / epsilon.

Valid for epsilon <= 1 only and refused above (Dwork-Roth 2014, Theorem A.1; theory page ``docs/theory/classical.md``).
"""

from __future__ import annotations

import math

from flint import arb

from rdp_calc.evidence import Bound, Evidence
from rdp_calc.methods import Method
from rdp_calc.problem import Target
from rdp_calc.reals import ball, midpoint


class ClassicalGaussian(Bound):
    """noise_std = w sqrt(2 ln(1.25/delta)) / epsilon for a release of L2 sensitivity w, that is
    delta = 1.25 exp(-(epsilon noise_std / w)^2 / 2). Never tighter than the exact profile; for comparison.

    Assumes: epsilon <= 1 (above it the formula is not valid, and it is refused there).
    """

    name = "classical"
    id = "gaussian-mechanism/classical/v1"
    summary = "Textbook formula sqrt(2 ln(1.25/delta)), epsilon <= 1 only; for comparison."
    reference = "Dwork-Roth 2014, Theorem A.1"
    largest_epsilon = 1.0

    def propose_noise(self, method: Method, target: Target) -> float:
        return self._sensitivity(method) * math.sqrt(2 * math.log(1.25 / target.delta)) / target.epsilon

    def propose_epsilon(self, method: Method, noise: float, delta: float) -> float:
        epsilon = self._sensitivity(method) * math.sqrt(2 * math.log(1.25 / delta)) / noise
        self.check_epsilon(epsilon)
        return epsilon

    def evidence(
        self,
        method: Method,
        noise: float,
        epsilon: float,
        *,
        alpha: float | None = None,
        choice: tuple[int, ...] | None = None,
    ) -> Evidence:
        process = method.process(noise)
        ratio = ball(epsilon) * process.final_noise_std() / ball(process.initial_distance)
        if epsilon > self.largest_epsilon:
            return Evidence(delta=arb(1))
        return Evidence(delta=arb("1.25") * (-(ratio**2) / 2).exp())

    @staticmethod
    def _sensitivity(method: Method) -> float:
        return midpoint(ball(method.process(1.0).initial_distance))


BOUND = ClassicalGaussian()
