"""The Gaussian mechanism, exactly: a release with L2 sensitivity w and noise N(0, noise_std^2 I) is w/noise_std-GDP.

(Balle-Wang 2018, arXiv:1805.06530; theory page ``docs/theory/gaussian.md``.)
"""

from __future__ import annotations

from flint import arb

from rdp_calc.evidence import GaussianBound
from rdp_calc.methods import Method
from rdp_calc.reals import ball


class GaussianMechanism(GaussianBound):
    """One Gaussian release of a point known up to ``initial_distance``."""

    name = "gaussian"
    id = "gaussian-mechanism/exact/v1"
    summary = "Exact profile of one Gaussian release."
    reference = "Balle-Wang 2018, arXiv:1805.06530, Theorem 8"

    def mu(self, method: Method, noise: float) -> arb:
        process = method.process(noise)
        return ball(process.initial_distance) / ball(process.phases[0].noise_std)


BOUND = GaussianMechanism()
