"""An approximation with a proved error, published with noise that covers it (``docs/theory/error-bound.md``)."""

from __future__ import annotations

from flint import arb

from rdp_calc.errorbound import Approximation
from rdp_calc.errors import NotApplicable
from rdp_calc.evidence import GaussianBound
from rdp_calc.methods import Method
from rdp_calc.problem import Target


class ErrorBound(GaussianBound):
    """If the unlearned model is within e of the one that training without the forgotten records would have given,
    publishing it with noise N(0, noise_std^2 I), as the reference is, is (e / noise_std)-GDP. e is

        newton        ((L2/2) D^2 + lambda D + r)/(m + lambda) + rho_R/m, D = (gap + rho)/m, lambda the damping
        jackknife     the same, plus ((S L1/n) (M S/n)/(m + lambda) + rho)/(m + lambda)
        hessian-free  e_N of e_(t+1) = c_t e_t + eta_t [(L2/2) D_t^2 + (S_t/b) L1 D_t],
                      D_(t+1) = c_t D_t + eta_t S_t M/b, at the worst position of the forgotten records.

    Assumes: the constants (M, m, L, L1, L2) hold everywhere; for hessian-free the reference keeps batch order and
    normaliser, and no gradient is clipped. Constants typed in make the result conditional.
    """

    name = "error-bound"
    id = "error-bound/gaussian/v1"
    summary = "Proved error of a second-order or recollection method as the sensitivity of one Gaussian release."
    reference = "docs/theory/error-bound.md; methods: arXiv:1911.03030, arXiv:2207.04806, arXiv:2404.01712"

    def unit_mu(self, method: Method, choice: tuple[int, ...] | None) -> arb:
        if not isinstance(method, Approximation):
            raise NotApplicable(f"bound error-bound needs a proved error, which {method.NAME} has not.")
        return method.error()

    def floor(self, method: Method, target: Target) -> str:
        return "the proved error has no limit; take fewer training steps, a smaller step size or a convex objective"


BOUND = ErrorBound()
