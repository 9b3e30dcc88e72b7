"""The Gaussian mechanism, exactly: a release with L2 sensitivity w and noise N(0, noise_std^2 I) is w/noise_std-GDP.

(Balle-Wang 2018, arXiv:1805.06530; theory page ``docs/theory/gaussian.md``.)
"""

from __future__ import annotations

from flint import arb

from rdp_calc.evidence import GaussianBound
from rdp_calc.methods import Method
from rdp_calc.reals import ball


class GaussianMechanism(GaussianBound):
    """A release with L2 sensitivity w and noise N(0, noise_std^2 I) on every coordinate is (w / noise_std)-GDP in both
    directions:

        delta(epsilon; mu) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu),

    which holds with equality. w is twice the clip norm for output perturbation, and 2 g/m for two runs that end where
    the gradient norm is at most g on an m-strongly convex objective.

    Assumes: one release; Gaussian noise, independent of the data.
    """

    name = "gaussian"
    id = "gaussian-mechanism/exact/v1"
    summary = "Exact profile of one Gaussian release."
    reference = "Balle-Wang 2018, arXiv:1805.06530, Theorem 8"

    def unit_mu(self, method: Method, choice: tuple[int, ...] | None) -> arb:
        return one_release(method)


def one_release(method: Method) -> arb:
    """mu at noise 1 of a method that is one Gaussian release."""
    process = method.process(1.0)
    return ball(process.initial_distance) / process.final_noise_std()


BOUND = GaussianMechanism()
